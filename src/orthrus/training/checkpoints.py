"""Checkpoints of a run: the view, and what continuing bit for bit takes. No pickles anywhere.

    OUT/checkpoint-N/  config.json, model.safetensors, README.md: a view file (`*_diff`, fp32), loadable as it is
                       optimizer.safetensors   NAME.exp_avg, NAME.exp_avg_sq, NAME.step for each tensor of the view
                       rng.safetensors         the random states of every rank
                       scheduler.json, trainer_state.json
                       run.json                recipe, data, base, ranks, commit, versions, command

It is written as OUT/.checkpoint-N.part and renamed when all of it is on the disk, run.json last, so what has the name
of a checkpoint is one. Data order and anchors are functions of seed and step (`task.draw_seed`): they need no state.
"""

import hashlib
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthrus.model.export import save_view, write_json
from orthrus.model.modeling import OrthrusLM
from orthrus.model.tensors import read_headers, read_json

RUN = "run.json"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
SCHEDULER = "scheduler.json"
TRAINER_STATE = "trainer_state.json"


def find_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder; half-written ones are not seen."""
    found = {int(path.name.split("-")[1]): path for path in complete(out)}
    return found[max(found)] if found else None


def complete(out: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    paths = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in paths if (path / RUN).is_file()), key=lambda path: int(path.name.split("-")[1]))


def write_checkpoint(
    out: Path,
    step: int,
    model: OrthrusLM,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, dict[str, Any]],
    keep: int,
) -> Path:
    """Write OUT/checkpoint-STEP, whole or not at all, and drop all but the newest `keep`.

    `tensors` holds "view" and, by file name, other tensors; `documents` holds JSON documents by file name.
    """
    staging, final = out / f".checkpoint-{step}.part", out / f"checkpoint-{step}"
    clear_halves(out)
    save_view(model, staging, tensors=tensors["view"])
    for name in tensors.keys() - {"view"}:
        save_file({key: value.contiguous() for key, value in tensors[name].items()}, staging / name)
        (staging / name).chmod(0o644)
    for name in sorted(documents, key=lambda name: name == RUN):
        write_json(staging / name, documents[name])
    for path in (*staging.iterdir(), staging):
        flush(path)
    shutil.rmtree(final, ignore_errors=True)  # of the same step, when a run was continued from before it
    staging.rename(final)
    flush(out)
    for old in complete(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def clear_halves(out: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in [*out.glob(".checkpoint-*.part"), *out.glob("..checkpoint-*.part")]:
        shutil.rmtree(path, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the system put a file or folder on the disk before anything is renamed over it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(folder: Path | None) -> str:
    """A checkpoint's name and a hash that two checkpoints do not share: of its JSON documents, which hold the losses of
    its run, and of its files' sizes. "no checkpoint" without one."""
    if folder is None:
        return "no checkpoint"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    return f"{folder.name} ({digest.hexdigest()[:12]})"


def read_view(folder: Path) -> dict[str, Tensor]:
    """The view's tensors of a checkpoint, by name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({tensor.file for tensor in read_headers(folder).values()}):
        tensors |= load_file(file)
    return tensors


def read_run(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about the run it is of."""
    return read_json(folder / RUN)


# --- random states -----------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The state of every generator that code may draw from without naming one, as tensors of fixed shapes."""
    _, words, gauss = random.getstate()
    # The legacy form, which names its fields; the tuple's third and fifth element are numbers.
    numpy_state: Any = np.random.get_state(legacy=False)
    states = {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_place": torch.tensor([numpy_state["state"]["pos"], numpy_state["has_gauss"]]),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators where `random_states` found them."""
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if gauss != gauss else gauss))
    position, has_gauss = states["numpy_place"].tolist()
    inner = {"key": states["numpy"].numpy().astype(np.uint32), "pos": position}
    np.random.set_state(
        {"bit_generator": "MT19937", "state": inner, "has_gauss": has_gauss, "gauss": states["numpy_gauss"].item()}
    )
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
