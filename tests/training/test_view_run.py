"""`orthrus train` for a view: what changes, what is saved, stopping and going on, one process and two."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from orthrus.cli.app import app
from orthrus.datagen import package_text
from orthrus.model.checkpoint import load_model
from orthrus.training import view_run, view_trainer
from orthrus.training.checkpoints import complete, describe, find_checkpoint
from orthrus.training.view_recipe import load_any_recipe
from tests.cli.commands import last_json, refused, run
from tests.cli.tiny import byte_tokenizer
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


def interrupted(base: Path, *plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What the program of interruption.py says of each run."""
    environment = program_environment()
    command = [sys.executable, PROGRAM, json.dumps(plan), str(base)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def program_environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{root / 'src'}:{root}"}


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


@pytest.fixture(scope="module")
def history(recipe: Path) -> dict[str, dict[str, Any]]:
    """Runs of one and two ranks in processes of their own, by their folder and what was done to them."""
    plan: dict[str, dict[str, Any]] = {}

    def add(name: str, ranks: int, sharding: str, *more: str, **happens: Any) -> None:
        out = recipe.parent / name.split(" ")[0]
        settings = [f"train.sharding={sharding}", "evaluation.every=6"]
        plan[name] = {"arguments": arguments(recipe, out, *settings, *more), "ranks": ranks, **happens}

    add("killed", 1, "ddp", step=3, signal="SIGKILL")
    for kind in ("ddp", "fsdp2"):
        add(f"{kind}-whole", 2, kind)
        add(f"{kind}-term", 2, kind, step=2, signal="SIGTERM", rank=1)
        add(f"{kind}-term again", 2, kind, "--resume")
        add(f"{kind}-kill", 2, kind, step=3, signal="SIGKILL")
        add(f"{kind}-kill again", 2, kind, "--resume")
        add(f"{kind}-nan", 2, kind, step=2, nan=True, rank=1)
    return dict(zip(plan, interrupted(recipe.parent / "base", *plan.values()), strict=True))


def test_sigkill_and_resuming_equals_one_run(whole: Path, recipe: Path, history: dict[str, dict[str, Any]]) -> None:
    out = recipe.parent / "killed"
    assert history["killed"]["codes"] == [-signal.SIGKILL], history["killed"]["output"]
    assert find_checkpoint(out) == out / "checkpoint-2"
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-5")
    (out / "checkpoint-5" / "run.json").unlink()  # as a write that was cut off might leave it
    (out / ".checkpoint-4.part").mkdir()
    log = out / "log.jsonl"
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 3, "killed behind a step that was not saved"
    with log.open("a") as file:
        file.write('{"step": 4, "lo')  # as a line that was cut off
    run("train", "--config", recipe, "--out", out, "--resume")
    assert not same_states(whole, out)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6], "a step is reported twice"
    assert lines[0]["step"] == 0 and "eval_n" in lines[0], "what was saved stays reported"


def test_a_run_begun_again_begins_its_log_again(recipe: Path, tmp_path: Path) -> None:
    """A process that was killed before it saved anything leaves nothing but its log."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 0, "eval_n": 9}\n{"step": 1, "loss": 9}\n')
    run("train", "--config", recipe, "--out", out, "--resume", "train.num_steps=1", "evaluation.every=0")
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 1]
    assert '"loss": 9' not in (out / "log.jsonl").read_text()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_stop_or_die_and_go_on_as_one_run(
    recipe: Path, history: dict[str, dict[str, Any]], kind: str
) -> None:
    """SIGTERM that reaches one rank has both save and leave; SIGKILL reaches both."""
    assert history[f"{kind}-whole"]["codes"] == [0, 0], history[f"{kind}-whole"]["output"]
    stopped = history[f"{kind}-term"]
    assert stopped["codes"] == [0, 0] and "stopped at step 3" in stopped["output"], stopped["output"]
    assert history[f"{kind}-kill"]["codes"] == [-signal.SIGKILL] * 2
    for name in ("term", "kill"):
        again = history[f"{kind}-{name} again"]
        assert again["codes"] == [0, 0], again["output"]
        assert not same_states(recipe.parent / f"{kind}-whole", recipe.parent / f"{kind}-{name}")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_loss_that_is_nan_on_one_rank_is_skipped_by_all(
    recipe: Path, history: dict[str, dict[str, Any]], kind: str
) -> None:
    done = history[f"{kind}-nan"]
    assert done["codes"] == [0, 0] and "step 3 skipped on all ranks" in done["output"], done["output"]
    facts = json.loads((recipe.parent / f"{kind}-nan" / "provenance.json").read_text())
    assert facts["result"]["num_skipped"] == 1
    weights = load_file(recipe.parent / f"{kind}-nan" / "model.safetensors").values()
    assert all(tensor.isfinite().all() for tensor in weights), "one rank's NaN reached the weights"


def test_ddp_and_fsdp2_train_alike(recipe: Path, history: dict[str, dict[str, Any]]) -> None:
    assert history
    one, other = (load_file(recipe.parent / f"{kind}-whole" / "model.safetensors") for kind in ("ddp", "fsdp2"))
    for name in one:
        # Gradients are summed in another order; a step moves a weight by up to 1e-3.
        assert (one[name] - other[name]).abs().max() < 1e-4, name


UNEVEN = ["view.objective={focus: 0.9, decay: 3.0}", "evaluation.every=0"]
"""What gives some rows much more weight than others, besides the padding that some have."""


def test_a_step_is_the_same_however_it_is_cut(recipe: Path) -> None:
    """Into one micro-batch or four: the mean is over the step's drafts, not over micro-batches."""
    views = []
    for rows in (1, 4):
        out = recipe.parent / f"cut-{rows}"
        run("train", "--config", recipe, "--out", out, *UNEVEN, f"train.rows_per_pass={rows}")
        losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        views.append(load_file(out / "model.safetensors") | {
            f"log of step {line['step']}": torch.tensor([line["loss"], line["grad_norm"]])
            for line in losses if "loss" in line
        })  # fmt: skip
    for name, one in views[0].items():
        # Sums run in another order; a step moves a weight by up to 1e-3.
        torch.testing.assert_close(one, views[1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_one_rank_and_two_train_alike(whole: Path, recipe: Path, history: dict[str, dict[str, Any]]) -> None:
    assert history
    one, other = (load_file(out / "model.safetensors") for out in (whole, recipe.parent / "ddp-whole"))
    for name in one:
        assert (one[name] - other[name]).abs().max() < 1e-4, name


def test_torchrun_trains_as_any_two_processes_do(recipe: Path, history: dict[str, dict[str, Any]]) -> None:
    out = recipe.parent / "torchrun"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "orthrus"]
    settings = ["train.sharding=fsdp2", "evaluation.every=6"]
    command = [*launch, "train", *arguments(recipe, out, *settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=program_environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert not same_states(recipe.parent / "fsdp2-whole", out)


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
        ("evaluation.held_out_documents=4", "trained with evaluation.held_out_documents 3, this recipe says 4"),
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
        save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        change = f"model.base={tmp_path / 'base'}"
    assert message in refused("train", "--config", recipe, "--out", tmp_path / "out", "--resume", change)


def test_ranks_that_find_different_checkpoints_are_told_so(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = whole / "checkpoint-4", tmp_path / "checkpoint-4"
    shutil.copytree(mine, other)
    assert describe(mine) == describe(other)
    (other / "trainer_state.json").write_text((mine / "trainer_state.json").read_text().replace("loss", "Loss"))
    for found in (describe(other), describe(None), describe(whole / "checkpoint-6")):
        monkeypatch.setattr(view_run, "from_all", lambda value, found=found: [value, value, found])
        with pytest.raises(ValueError, match=r"rank 0 goes on from checkpoint-4 \(.*, rank 2 .*one shared folder"):
            view_run.check_shared(whole, mine)
    monkeypatch.setattr(view_run, "from_all", lambda value: [value] * 3)
    view_run.check_shared(whole, mine)


def test_a_revision_may_be_named_later_and_what_reaches_a_weight_may_not() -> None:
    facts = {"data_fingerprint": "a", "base_fingerprint": "b", "num_ranks": 1, "run_steps": 6}
    begun = facts | {"settings": {"seed": 0, "data.revision": None}}
    view_run.check_same_run(begun, facts | {"settings": {"seed": 0}}, Path("checkpoint-4"))
    with pytest.raises(ValueError, match="trained with seed 0, this recipe says 1"):
        view_run.check_same_run(begun, facts | {"settings": {"seed": 1}}, Path("checkpoint-4"))


def test_what_does_not_reach_a_weight_may_change(recipe: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    shutil.copy(recipe.parent / "text.jsonl", tmp_path / "moved.jsonl")
    changes = [f"data.source={tmp_path / 'moved.jsonl'}", "train.save_steps=5", "evaluation.num_prompts=1"]
    run("train", "--config", recipe, "--out", tmp_path / "out", "--resume", *changes)
    assert [path.name for path in complete(tmp_path / "out")] == ["checkpoint-5", "checkpoint-6"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["train.sharding=fsdp2"], "train.sharding fsdp2 spreads weights over ranks, and this is one"),
        (["train.report_to=[trackio]"], "train.report_to: trackio is not installed here"),
        (["evaluation.held_out_documents=24"], "24 held out (evaluation.held_out_documents)"),
        (["train.rows_per_step=80"], "fewer than the 80 of one step"),
        (["data.source=nowhere.jsonl"], "nowhere.jsonl"),
        (["--stages", "base"], "--stages: only the bundled model's recipe has stages"),
        (["--corpus", "x"], "--corpus: only the bundled model's recipe has stages and a corpus"),
        (["--dry-run", "--resume"], "--dry-run, --inspect and --resume are three things to do"),
        (["--inspect", "0", "--resume"], "--dry-run, --inspect and --resume are three things to do"),
        (["data.row_tokens=257"], "data.row_tokens 257 is above the context of"),
        (["data.row_tokens=257", "--dry-run"], "data.row_tokens 257 is above the context of"),
        (["--inspect", "900"], "--inspect: row 900 is not in 0 .. "),
        (["--device", "meta"], "--device meta"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    recipe: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    assert message in refused("train", "--config", recipe, "--out", tmp_path / "out", *change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluation.prompts=nowhere.jsonl", "evaluation.prompts: nowhere.jsonl cannot be read"),
        ("evaluation.prompts=LONG", "the prompt has 250 tokens, not 1 .. 246"),
        ("evaluation.max_new_tokens=256", "evaluation.max_new_tokens 256 leaves no room in the base's context, 256"),
        ("model.mask_token_id=264", "mask_token_id 264 is outside the embedding"),
        ("model.restart_view=true", "model.restart_view:"),
        ("model.base=VIEW", "is a view file, no base"),
        ("model.base=bundled", "has a view already; model.restart_view=true trains a new one"),
        ("model={base: bundled, restart_view: true, block_size: 8}", "model.block_size: "),
        ("model.base=GPT2", "has model_type 'gpt2', which is not supported"),
        ("model.base=CUT", "lacks 2 tensors"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_data_is_packed(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    """Packing may take hours, and a mistake elsewhere in the recipe must not cost them."""
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a" * 250}))
    for name in ("gpt2", "cut"):
        shutil.copytree(recipe.parent / "base", tmp_path / name)
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    save_file({name: tensors[name] for name in list(tensors)[2:]}, tmp_path / "cut" / "model.safetensors")
    places = {"LONG": tmp_path / "long.jsonl", "VIEW": whole, "GPT2": tmp_path / "gpt2", "CUT": tmp_path / "cut"}
    for word, path in places.items():
        change = change.replace(word, str(path))
    packed: list[int] = []
    monkeypatch.setattr(view_run, "packed_rows", lambda *arguments: packed.append(1))
    out = tmp_path / "out"
    assert message in refused("train", "--config", recipe, "--out", out, change)
    assert not packed and not out.exists()


def test_prompts_longer_than_a_row_are_left_out(recipe: Path) -> None:
    """The view has never been trained at such positions; where none is left, that is said."""
    loaded: Any = load_any_recipe(recipe, ["data.row_tokens=16"])
    config: Any = SimpleNamespace(max_position_embeddings=512, block_size=8)
    short, long = [1] * 16, [1] * 17
    data: Any = SimpleNamespace(prompts=[long, short], counts={"held_out": 2})
    assert view_run.held_out_prompts(loaded, data, config) == [short]
    data.prompts = [long]
    with pytest.raises(ValueError, match="the reply of none of the 2 begins within 16 tokens"):
        view_run.held_out_prompts(loaded, data, config)


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
def test_prompts_are_beginnings_of_documents_that_are_not_trained_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    seen: dict[str, Any] = {}

    class Watched(view_run.HeldOutPrompts):
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            seen.update(prompts=self.prompts, rows=self.trainer.train_dataset)

    monkeypatch.setattr(view_run, "HeldOutPrompts", Watched)
    settings = [f"data.packing={packing}", "data.anchors=all", "train.num_steps=1", "evaluation.max_new_tokens=1"]
    run("train", "--config", recipe, "--out", tmp_path / "out", *settings)
    texts = [json.loads(line)["text"] for line in (recipe.parent / "text.jsonl").read_text().splitlines()]
    decode = byte_tokenizer().decode
    trained = "".join(decode(row["ids"][row["document"] >= 0].tolist()) for row in seen["rows"])
    held = [text for text in texts if text[:20] not in trained]
    assert len(held) == 3, "all others must be trained on, from where they begin"
    assert len(seen["prompts"]) == 2, "evaluation.num_prompts"
    for prompt in seen["prompts"]:
        assert any(decode(prompt) == text[: min(48, len(text) // 2)] for text in held)


def test_options_that_a_bundled_recipe_does_not_have_are_refused(tmp_path: Path) -> None:
    tiny = next((Path(__file__).parents[2] / "recipes").glob("tiny-python_*.yaml"))
    arguments = ["train", "--config", tiny, "--out", tmp_path / "out"]
    assert "--dry-run" in refused(*arguments, "--dry-run")
    assert "give --corpus" in refused(*arguments)


def test_a_row_is_shown(recipe: Path, tmp_path: Path) -> None:
    assert "who sees whom" in run("train", "--config", recipe, "--out", tmp_path / "out", "--inspect", "2").output


def test_a_finished_folder_is_not_written_again(recipe: Path, whole: Path) -> None:
    assert "holds a finished view" in refused("train", "--config", recipe, "--out", whole)


def test_a_folder_of_something_else_is_refused_for_what_it_is(recipe: Path, whole: Path, tmp_path: Path) -> None:
    base = recipe.parent / "base"
    assert "holds a checkpoint that no run of this kind wrote" in refused("train", "--config", recipe, "--out", base)
    shutil.copytree(whole / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    message = refused("train", "--config", recipe, "--out", tmp_path / "out", "--dry-run")
    assert "holds a run's checkpoints" in message and "--resume" not in message


def test_a_run_among_its_data_is_refused(recipe: Path, tmp_path: Path) -> None:
    shutil.copy(recipe.parent / "text.jsonl", tmp_path)
    message = refused("train", "--config", recipe, "--out", tmp_path / "out", f"data.source={tmp_path}")
    assert "its log would be data" in message


@pytest.mark.parametrize("what", [["--dry-run"], ["--inspect", "0"]])
def test_one_rank_prints_and_writes_for_all(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: list[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    result = run("train", "--config", recipe, "--out", tmp_path / "out", *what)
    assert not result.output and not (tmp_path / "out").exists(), "two ranks would write one folder at once"


def test_dry_run_says_what_it_would_take_and_leaves_a_loadable_view(recipe: Path, tmp_path: Path) -> None:
    result = run("train", "--config", recipe, "--out", tmp_path / "out", "--dry-run")
    facts = last_json(result.output)
    model = load_model(tmp_path / "out")
    assert facts["num_trained"] == sum(p.numel() for p in model.view_parameters().values())
    assert facts["num_frozen"] + facts["num_trained"] == sum(p.numel() for p in model.parameters())
    assert "trained parameters" in result.output and "GFLOP" in result.output
    run("train", "--config", recipe, "--out", tmp_path / "out", "train.num_steps=1", "evaluation.every=0")


def test_dry_run_of_many_ranks_needs_one_process(recipe: Path, tmp_path: Path) -> None:
    sharded = ["train", "--config", recipe, "train.sharding=fsdp2", "train.rows_per_step=8", "--dry-run"]
    assert "--ranks N" in refused(*sharded, "--out", tmp_path / "one")
    one = last_json(run(*sharded[:3], "--dry-run", "--out", tmp_path / "ddp").output)
    two = last_json(run(*sharded, "--ranks", "2", "--out", tmp_path / "two").output)
    assert two["training_bytes"] < one["training_bytes"] and two["num_trained"] == one["num_trained"]
    assert "--ranks" in refused("train", "--config", recipe, "--ranks", "2", "--out", tmp_path / "three")


def test_the_finished_view_is_uploaded_alone(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("huggingface_hub.create_repo", lambda repo_id, **options: None)
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **options: calls.append(options))
    hub = ["train.push_to_hub=true", "train.hub_model_id=me/view", "train.num_steps=1", "evaluation.every=0"]
    run("train", "--config", recipe, "--out", tmp_path / "out", *hub)
    assert calls[0]["repo_id"] == "me/view" and "checkpoint-*/*" in calls[0]["ignore_patterns"]


def test_the_smoke_recipe_raises_n(tmp_path: Path) -> None:
    """A short piece of it: on the bundled base, N on prompts that no step has seen is higher after it than before."""
    package_text.main(str(tmp_path / "text.jsonl"))
    # Its own 80 steps raise N by a half; these by about 0.24.
    shorter = [
        "train.num_steps=16", "evaluation.every=16", "data.row_tokens=192", "data.max_rows=120",
        "view.blocks=[[8, 16]]",
    ]  # fmt: skip
    smoke = Path(__file__).parents[2] / "recipes" / "smoke_cpu.yaml"
    source = f"data.source={tmp_path / 'text.jsonl'}"
    result = run("train", "--config", smoke, "--out", tmp_path / "out", source, *shorter)
    (_, first), (_, last) = last_json(result.output)["n"]
    assert last > first + 0.08, (first, last)
