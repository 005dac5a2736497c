"""Checkpoints of a run: whole or not there, random states, how many are kept."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orthrus.config import OrthrusConfig
from orthrus.model.modeling import OrthrusLM
from orthrus.training import checkpoints
from orthrus.training.checkpoints import complete, find_checkpoint, random_states, set_random_states, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_config: OrthrusConfig, tmp_path: Path) -> Any:
    model = OrthrusLM(tiny_config)
    base = SimpleNamespace(id="base", revision=None, fingerprint="sha256:0")
    model.load_report = SimpleNamespace(folder=tmp_path, form="base", base=base)
    return model


def write(model: Any, out: Path, step: int, keep: int = 2) -> None:
    out.mkdir(exist_ok=True)
    tensors = {"view": model.view_parameters(), "optimizer.safetensors": {"a": torch.ones(2)}}
    documents = {"run.json": {"step": step}, "scheduler.json": {}}
    write_checkpoint(out, step, model, tensors=tensors, documents=documents, keep=keep)


def test_the_newest_of_the_kept_is_found(model: Any, tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        write(model, tmp_path / "out", step)
    assert [path.name for path in complete(tmp_path / "out")] == ["checkpoint-10", "checkpoint-11"]
    assert find_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-11"
    assert checkpoints.read_view(tmp_path / "out" / "checkpoint-11").keys() == model.view_parameters().keys()


@pytest.mark.parametrize("broken", ["save_view", "save_file", "write_json", "flush"])
def test_a_write_that_fails_anywhere_leaves_the_last_one(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    out = tmp_path / "out"
    write(model, out, 1)

    def full_disk(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoints, broken, full_disk)
        write(model, out, 2)
    assert find_checkpoint(out) == out / "checkpoint-1"
    write(model, out, 3)
    assert {path.name for path in out.iterdir()} == {"checkpoint-1", "checkpoint-3"}, "the half is still there"


def test_random_states_come_back() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()  # leaves a second Gaussian in both generators that make them in pairs
    states = {name: state.clone() for name, state in random_states(CPU).items()}
    expected = [draw() for _ in range(3)]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    set_random_states(states, CPU)
    assert [draw() for _ in range(3)] == expected
