"""`orthrus train` for a view: what changes, what is saved, stopping and going on, one process and two."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from orthrus.cli.app import app
from orthrus.model.checkpoint import load_model
from orthrus.training import view_trainer
from orthrus.training.checkpoints import complete, find_checkpoint
from tests.cli.commands import last_json, refused, run
from tests.training.view_files import same_states, write_files

PROGRAM = str(Path(__file__).with_name("interruption.py"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """A run that nothing interrupted."""
    out = recipe.parent / "whole"
    base = bytes_of(recipe.parent / "base")
    result = run("train", "--config", recipe, "--out", out)
    assert bytes_of(recipe.parent / "base") == base, "training changed the base's files"
    (out / "output.txt").write_text(result.output)
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupted(*plan: dict[str, Any], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """The program of interruption.py, alone or under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*(launch if ranks > 1 else [sys.executable]), PROGRAM, json.dumps(plan)]
    root = Path(__file__).parents[2]
    paths = f"{root / 'src'}:{root}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def arguments(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["--config", str(recipe), "--out", str(out), "--device", "cpu", *more]


def test_a_run_writes_a_view_that_generates_and_says_where_it_is_from(whole: Path) -> None:
    result = run("generate", "draft the", "--model", whole, "--max-new-tokens", "8", "--json")
    assert last_json(result.output)["stats"]["num_spec_steps"] > 0
    facts = json.loads((whole / "provenance.json").read_text())
    assert {"commit", "versions", "command", "recipe_digest", "data_fingerprint", "base_fingerprint"} <= facts.keys()
    assert facts["step"] == 6


def test_only_the_view_is_stored_and_no_pickle(whole: Path) -> None:
    assert all("_diff." in name for name in load_file(whole / "model.safetensors"))
    assert all("_diff." in name for name in load_file(whole / "checkpoint-6" / "model.safetensors"))
    files = [path.name for path in whole.rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith((".pt", ".pth", ".bin", ".pkl"))], files


def test_only_the_view_moved(whole: Path, recipe: Path) -> None:
    trained = load_model(whole)
    started = load_model(recipe.parent / "base", start_view=True, block_size=8, mask_token_id=258)
    moved = {
        name for (name, a), b in zip(trained.named_parameters(), started.parameters(), strict=True) if not a.equal(b)
    }
    assert moved == set(trained.view_parameters())


def test_the_log_has_loss_and_decoding_side_by_side(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_n" in line] == [0, 3, 6]


def test_old_checkpoints_go(whole: Path) -> None:
    assert [path.name for path in complete(whole)] == ["checkpoint-4", "checkpoint-6"]


def test_sigterm_saves_and_resuming_equals_one_run(whole: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, and between two saves."""
    out, plain = recipe.parent / "stopped", view_trainer.OrthrusTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and self._micro_batch == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(view_trainer.OrthrusTrainer, "compute_loss", compute_loss)
        result = run("train", "--config", recipe, "--out", out)
    assert "the same command with --resume goes on" in result.output
    assert last_json(result.output)["stopped_at_step"] == 3
    assert not (out / "config.json").exists(), "a stopped run has no finished view"
    assert "holds checkpoint-3 of a run: add --resume" in refused("train", "--config", recipe, "--out", out)
    run("train", "--config", recipe, "--out", out, "--resume")
    assert not same_states(whole, out)


def test_sigkill_and_resuming_equals_one_run(whole: Path, recipe: Path) -> None:
    out = recipe.parent / "killed"
    killed = interrupted({"arguments": arguments(recipe, out), "step": 3, "signal": "SIGKILL"})
    assert killed.returncode == -signal.SIGKILL and find_checkpoint(out) == out / "checkpoint-2", killed.stderr
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-5")
    (out / "checkpoint-5" / "run.json").unlink()  # as a write that was cut off might leave it
    (out / ".checkpoint-4.part").mkdir()
    run("train", "--config", recipe, "--out", out, "--resume")
    assert not same_states(whole, out)


def test_two_ranks_stop_skip_and_go_on_as_one_run(recipe: Path) -> None:
    """DDP and FSDP2; SIGTERM that reaches one rank, SIGKILL that reaches all, a loss that is NaN on one rank."""
    folder = recipe.parent

    def of(name: str, sharding: str, *more: str) -> list[str]:
        return arguments(recipe, folder / name, f"train.sharding={sharding}", *more)

    def runs(sharding: str) -> list[dict[str, Any]]:
        return [
            {"arguments": of(f"{sharding}-whole", sharding)},
            {"arguments": of(f"{sharding}-term", sharding), "step": 2, "signal": "SIGTERM", "rank": 1},
            {"arguments": of(f"{sharding}-term", sharding, "--resume")},
            {"arguments": of(f"{sharding}-nan", sharding), "step": 2, "nan_rank": 1},
        ]

    def killed(sharding: str) -> dict[str, Any]:
        return {"arguments": of(f"{sharding}-kill", sharding), "step": 3, "signal": "SIGKILL"}

    first = interrupted(*runs("ddp"), killed("ddp"), ranks=2)
    assert first.stdout.count("ended 0") == 8, first.stderr[-3000:]
    resumed = {"arguments": of("ddp-kill", "ddp", "--resume")}
    second = interrupted(resumed, *runs("fsdp2"), killed("fsdp2"), ranks=2)
    assert second.stdout.count("ended 0") == 10, second.stderr[-3000:]
    third = interrupted({"arguments": of("fsdp2-kill", "fsdp2", "--resume")}, ranks=2)
    assert third.stdout.count("ended 0") == 2, third.stderr[-3000:]
    for sharding in ("ddp", "fsdp2"):
        for name in ("term", "kill"):
            assert not same_states(folder / f"{sharding}-whole", folder / f"{sharding}-{name}"), (sharding, name)
        skipped = load_file(folder / f"{sharding}-nan" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in skipped.values()), "one rank's NaN reached the weights"
        facts = json.loads((folder / f"{sharding}-nan" / "provenance.json").read_text())
        assert facts["result"]["num_skipped"] == 1
    for output in (first.stdout, second.stdout):
        assert output.count("step 3 skipped on all ranks") == 1
    one, other = (load_file(folder / f"{sharding}-whole" / "model.safetensors") for sharding in ("ddp", "fsdp2"))
    for name in one:
        # Gradients are summed in another order.
        assert (one[name] - other[name]).abs().max() < 1e-4, f"{name}: DDP and FSDP2 train differently"


def test_a_step_that_is_not_finite_is_left_out_and_too_many_end_the_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = view_trainer.OrthrusTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        return loss * float("inf") if self.state.global_step in (1, 3, 4) else loss

    monkeypatch.setattr(view_trainer.OrthrusTrainer, "compute_loss", compute_loss)
    result = run("train", "--config", recipe, "--out", recipe.parent / "skips", "evaluation.every=0")
    assert last_json(result.output)["num_skipped"] == 3
    assert all(t.isfinite().all() for t in load_file(recipe.parent / "skips" / "model.safetensors").values())
    settings = ["evaluation.every=0", "train.max_skipped_steps=2"]
    ended = CliRunner().invoke(
        app, ["train", "--config", str(recipe), "--out", str(recipe.parent / "ended"), *settings]
    )
    assert ended.exit_code == 1 and "2 steps in a row had a loss or gradient that is not finite" in ended.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.learning_rate=5e-4", "trained with train.learning_rate 0.001, this recipe says 0.0005"),
        ("seed=3", "trained with seed 0, this recipe says 3"),
        ("data.max_rows=20", "trained with data.max_rows None, this recipe says 20"),
        ("data.source=OTHER", "other data (data.source)"),
        ("model.base=OTHER", "another base (model.base)"),
    ],
)
def test_another_recipe_is_not_resumed(recipe: Path, whole: Path, tmp_path: Path, change: str, message: str) -> None:
    shutil.copytree(whole / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    if change == "data.source=OTHER":
        (tmp_path / "other.jsonl").write_text((recipe.parent / "text.jsonl").read_text().replace("draft", "raft"))
        change = f"data.source={tmp_path / 'other.jsonl'}"
    if change == "model.base=OTHER":
        model = load_model(recipe.parent / "base", start_view=True, block_size=8, mask_token_id=258)
        shutil.copytree(recipe.parent / "base", tmp_path / "base")
        tensors = {name: tensor for name, tensor in model.state_dict().items() if "_diff." not in name}
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        change = f"model.base={tmp_path / 'base'}"
    assert message in refused("train", "--config", recipe, "--out", tmp_path / "out", "--resume", change)


def test_what_does_not_reach_a_weight_may_change(recipe: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    shutil.copy(recipe.parent / "text.jsonl", tmp_path / "moved.jsonl")
    changes = [f"data.source={tmp_path / 'moved.jsonl'}", "evaluation.every=0", "evaluation.held_out_rows=3"]
    changes = [f"data.source={tmp_path / 'moved.jsonl'}", "train.save_steps=3", "evaluation.num_prompts=1"]
    run("train", "--config", recipe, "--out", tmp_path / "out", "--resume", *changes)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_finished_folder_is_not_written_again(recipe: Path, whole: Path) -> None:
    assert "holds a finished view" in refused("train", "--config", recipe, "--out", whole)


def test_dry_run_says_what_it_would_take_and_leaves_a_loadable_view(recipe: Path, tmp_path: Path) -> None:
    result = run("train", "--config", recipe, "--out", tmp_path / "out", "--dry-run")
    facts = last_json(result.output)
    model = load_model(tmp_path / "out")
    assert facts["num_trained"] == sum(p.numel() for p in model.view_parameters().values())
    assert facts["num_frozen"] + facts["num_trained"] == sum(p.numel() for p in model.parameters())
    assert "trained parameters" in result.output and "GFLOP" in result.output
    run("train", "--config", recipe, "--out", tmp_path / "out", "train.num_steps=1", "evaluation.every=0")


def test_the_finished_view_is_uploaded_alone(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("huggingface_hub.create_repo", lambda repo_id, **options: None)
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **options: calls.append(options))
    hub = ["train.push_to_hub=true", "train.hub_model_id=me/view", "train.num_steps=1", "evaluation.every=0"]
    run("train", "--config", recipe, "--out", tmp_path / "out", *hub)
    assert calls[0]["repo_id"] == "me/view" and "checkpoint-*/*" in calls[0]["ignore_patterns"]
