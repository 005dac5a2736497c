"""What `vllm serve` and `orthrus serve --backend vllm` refuse, run as a person runs them: the sentence comes last."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.environment import BUNDLED
from tests.vllm.subjects import environment
from tests.vllm.test_refusals import BASE_TENSOR, VIEW_TENSOR, damaged, drop_view, reshape, view_over_base
from tests.vllm.test_server import SETTINGS, named_vllm

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm-test")
VLLM = (Path(sys.executable).with_name("vllm"), "serve")
ORTHRUS = (sys.executable, "-c", "from orthrus.cli.app import main; main()", "serve")
STARTED = "Initializing a V1 LLM engine"
"""What vLLM logs once a configuration is accepted."""


def speculation(view: Path, width: int = 31) -> tuple[str, str]:
    config = {"method": "dflash", "model": str(view), "num_speculative_tokens": width}
    return "--speculative-config", json.dumps(config)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def shift(tensors: dict[str, torch.Tensor]) -> None:
    tensors[BASE_TENSOR] += 1


def halved(folder: Path) -> Path:
    """The bundled checkpoint, its weights half copied."""
    file = damaged(folder, lambda tensors: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder


Lines = tuple[tuple[Any, ...], tuple[Any, ...]]
"""The words behind `vllm serve`, and those behind `orthrus serve`, of one mistake."""


def of_checkpoint(folder: Path, *more: Any) -> Lines:
    return (folder, *speculation(folder), *more), (folder, *more)


def of_other_base(folder: Path) -> Lines:
    view, _ = view_over_base(folder)
    other = damaged(folder / "other", lambda tensors: (shift(tensors), drop_view(tensors)))
    named = ("--hf-overrides", '{"architectures": ["OrthrusLM"]}')
    return (other, *named, *speculation(view)), (view, "--base", other)


CASES: dict[str, tuple[Callable[[Path], Lines], str]] = {
    "view tensor missing": (
        lambda folder: of_checkpoint(damaged(folder / "m", drop(VIEW_TENSOR))), f"/m lacks 1 tensors: {VIEW_TENSOR}"
    ),
    "base tensor missing": (
        lambda folder: of_checkpoint(damaged(folder / "m", drop(BASE_TENSOR))), f"/m lacks 1 tensors: {BASE_TENSOR}"
    ),
    "tensor of another shape": (
        lambda folder: of_checkpoint(damaged(folder / "m", reshape)),
        f"/m: {BASE_TENSOR} has shape [1016, 512], config.json asks for [1024, 512]",
    ),
    "half a file": (
        lambda folder: of_checkpoint(halved(folder / "m")), "/m/model.safetensors is broken or half-written"
    ),
    "another base": (of_other_base, "other weights. Load that base, or train a view for this one"),
    "two stages": (
        lambda folder: of_checkpoint(BUNDLED, "--pipeline-parallel-size", 2),
        "pipeline_parallel_size=2 is not supported by Orthrus",
    ),
    "quantised cache": (
        lambda folder: of_checkpoint(BUNDLED, "--kv-cache-dtype", "fp8"), "kv_cache_dtype=fp8 is not supported"
    ),
    "larger block": (
        lambda folder: ((BUNDLED, *speculation(BUNDLED, 32)), (BUNDLED, "--block-size", 33)), "blocks of 32"
    ),
}  # fmt: skip
CASES_OF_VLLM = CASES | {
    "base tensor missing, no drafting": (
        lambda folder: ((damaged(folder / "m", drop(BASE_TENSOR)),), ()), f"/m lacks 1 tensors: {BASE_TENSOR}"
    ),
}  # fmt: skip


def fail(*words: Any, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a line that must fail at once."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode > 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("mistake", CASES)
def test_orthrus_serve_says_one_sentence_alone(mistake: str, tmp_path: Path):
    lines, sentence = CASES[mistake]
    done = fail(*ORTHRUS, *lines(tmp_path)[1], "--backend", "vllm", "--dry-run", env=environment())
    assert not done.stdout, "there is no line to run"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and sentence in line and done.returncode == 2


@needs_vllm
@pytest.mark.parametrize("mistake", CASES_OF_VLLM)
def test_vllm_serve_ends_with_the_sentence_before_an_engine_starts(mistake: str, tmp_path: Path):
    lines, sentence = CASES_OF_VLLM[mistake]
    env = named_vllm(tmp_path) | {"VLLM_LOGGING_LEVEL": "INFO"}
    done = fail(*VLLM, *lines(tmp_path)[0], *SETTINGS, env=env)
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("RuntimeError: ") and sentence in last, done.stderr[-3000:]
    assert STARTED not in done.stdout + done.stderr
