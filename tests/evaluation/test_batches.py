"""`orthrus bench decode`: batches of prompts, measured through the one loop on either backend."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orthrus.decoding.backends import choose_backend
from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import Stopping
from orthrus.evaluation import batches as module
from orthrus.evaluation.batches import (
    BatchMeasurement,
    BatchRun,
    Step,
    decoders_of,
    mean_ms,
    measure_batches,
    run_batch,
    summarise_batch,
)
from orthrus.evaluation.measurement import ONE_ROW, Mode
from orthrus.evaluation.records import check_writable, read_records
from orthrus.evaluation.suites import prompts_from_jsonl
from orthrus.model.checkpoint import load_model, load_tokenizer
from tests.cli.commands import last_json, refused, run
from tests.evaluation.conftest import TEXTS
from tests.evaluation.test_speed import DOCS

NUM_NEW = 14


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_model(checkpoint, dtype="float32")


def measured(checkpoint: Path, prompt_file: Path, model: Any, **settings) -> list[BatchMeasurement]:
    options: dict[str, Any] = {"batches": (1, 3), "block_sizes": (4, 8), "max_new_tokens": NUM_NEW} | settings
    return measure_batches(model, load_tokenizer(checkpoint), prompts_from_jsonl(prompt_file), **options)


def bench(*arguments: object) -> str:
    return run("bench", "decode", *arguments, "--device", "cpu", "--max-new-tokens", NUM_NEW).stdout


@pytest.mark.parametrize("backend", ["portable", "engine"])
def test_every_mode_writes_the_same_texts_and_steps_are_those_of_whole_groups(
    checkpoint: Path, prompt_file: Path, model: Any, backend: str
):
    for found in measured(checkpoint, prompt_file, model, backend=backend):
        assert found.backend == backend and found.refusal is None
        assert list(found.runs) == [ONE_ROW, *(Mode(drafting=True, exact=False, block_size=k) for k in (4, 8))]
        for mode, runs in found.runs.items():
            assert len(runs) == len(TEXTS) // found.batch
            for own, plain in zip(runs, found.runs[ONE_ROW], strict=True):
                assert own.tokens == plain.tokens and len(own.tokens) == len(own.prefill_ms) == found.batch
                assert own.stats.num_tokens == sum(map(len, own.tokens))
                steps = [step for step in own.steps if step.is_cycle == mode.drafting]
                assert 0 < len(steps) <= max(map(len, own.tokens)) - 1
                for step in steps:
                    assert step.wall_ms >= (step.draft_ms + step.verify_ms) * 0.999 > 0
                    assert (step.draft_ms > 0) == mode.drafting
        for summary in summarise_batch(found):
            assert set(summary.num_identical) == ({"ar"} if summary.mode.drafting else set())
            assert all(equal == summary.num_texts for equal in summary.num_identical.values())


def test_a_step_without_a_row_of_the_group_is_not_timed(model: Any):
    with choose_backend(model, row_tokens=[60] * 2) as chosen:
        decoder = Decoder(chosen.backend, block_size=8)
        requests = [Request(prompt_ids=[1, 2, 3], stopping=Stopping(max_new_tokens=n), drafting=False) for n in (5, 12)]
        done = run_batch(decoder, requests)
        assert len(done.steps) == 4 and list(map(len, done.tokens)) == [5, 12] and done.num_timed == 15
        assert not decoder.active and not any(chosen.backend.length(row) for row in range(4)), "rows are left"


def test_cycles_and_plain_steps_are_not_mixed():
    """A drafted run ends with a plain step where one token is left to write."""
    steps = [Step(wall_ms=ms, draft_ms=ms / 4, verify_ms=ms / 2, is_cycle=ms > 10) for ms in (20.0, 40.0, 7.0)]
    done = BatchRun(tokens=[[1]], prefill_ms=[1.0], decode_s=0.1, steps=steps, stats=DecodingStats(block_size=8))
    assert (mean_ms([done], "wall_ms", is_cycle=True), mean_ms([done], "draft_ms", is_cycle=True)) == (30.0, 7.5)
    assert mean_ms([done], "wall_ms", is_cycle=False) == 7.0
    assert mean_ms([], "wall_ms", is_cycle=True) is None


def test_one_row_passes_are_not_padded(checkpoint: Path):
    model = load_model(checkpoint, dtype="bfloat16")
    with choose_backend(model, row_tokens=[20]) as chosen:
        decoders = decoders_of(model, chosen, [4, 8])
        assert {mode: decoder._backend.exact for mode, decoder in decoders.items()} == {m: m.exact for m in decoders}


def test_runs_that_warm_up_are_not_counted(
    checkpoint: Path, prompt_file: Path, model: Any, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def spy(decoder: Decoder, requests: Sequence[Request]):
        calls.append(run_batch(decoder, requests))
        return calls[-1]

    monkeypatch.setattr(module, "run_batch", spy)
    (found,) = measured(checkpoint, prompt_file, model, batches=(4,), block_sizes=(8,))
    assert len(calls) == 2 * 3
    assert {id(run) for runs in found.runs.values() for run in runs} == {id(calls[2]), id(calls[5])}


def test_exact_mode_has_both_baselines(checkpoint: Path, prompt_file: Path):
    model = load_model(checkpoint, dtype="bfloat16")
    (found,) = measured(checkpoint, prompt_file, model, batches=(2,), block_sizes=(4,))
    one_row, plain, drafted = summarise_batch(found)
    assert (one_row.mode, plain.mode, drafted.mode.baseline) == (ONE_ROW, plain.mode, plain.mode)
    assert plain.mode.exact and set(plain.speedup_total) == {"ar_one_row"}
    assert set(drafted.speedup_total) == {"ar", "ar_one_row"} and drafted.num_identical["ar"] == drafted.num_texts


@pytest.fixture(scope="module")
def output(checkpoint: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command prints, and the file it writes."""
    folder = tmp_path_factory.mktemp("records")
    arguments = ["--model", checkpoint, "--prompts", prompt_file, "--dtype", "float32", "--batch", 1, "--batch", 3]
    text = bench(*arguments, "--block-size", 4, "--backend", "engine", "--json", "--out", folder)
    (path,) = folder.glob("decode-random-engine_*.json")
    return text, path


def test_the_command_prints_a_table_and_the_records_that_it_writes(output: tuple[str, Path]):
    text, path = output
    assert last_json(text) == json.loads(path.read_text())
    assert "engine backend" in text.splitlines()[0] and "prefill ms" in text
    rows = [line.split() for line in text.splitlines() if line[:1] in ("1", "3") and "tokens" not in line]
    assert [row[:2] for row in rows] == [["1", "plain"], ["1", "block"], ["3", "plain"], ["3", "block"]]
    assert [row[-1] for row in rows] == ["-", "4/4", "-", "3/3"]


def test_records_say_what_they_depend_on_and_are_told_apart(output: tuple[str, Path]):
    records = read_records(output[1])
    keys = [(record.name, json.dumps(record.params, sort_keys=True)) for record in records]
    assert len(set(keys)) == len(keys)
    known = {"model", "backend", "batch", "dtype", "suite", "num_prompts", "max_new_tokens", "threads", "drafting"}
    assert all(known | {"exact", "block_size", "packed", "device"} <= set(record.params) for record in records)
    assert {(r.params["batch"], r.params["num_prompts"]) for r in records} == {(1, 4), (3, 3)}
    names = {record.name for record in records}
    assert {"prefill_ms", "ar_step_ms", "cycle_ms", "draft_ms", "verify_ms", "tokens_per_cycle", "rho"} <= names
    assert not {name for name in names if f"| `{name}` |" not in DOCS.read_text()}

    def value(name: str, **params) -> float:
        (found,) = [r.value for r in records if r.name == name and params.items() <= r.params.items()]
        assert isinstance(found, float | int)
        return found

    for batch in (1, 3):
        cycle, step = value("cycle_ms", batch=batch), value("ar_step_ms", batch=batch)
        assert value("rho", batch=batch) == pytest.approx(cycle / step)
        fast = value("tokens_per_second", batch=batch, drafting=True)
        slow = value("tokens_per_second", batch=batch, drafting=False)
        assert value("speedup_total", batch=batch, reference="ar") == pytest.approx(fast / slow)
        assert value("num_tokens", batch=batch, drafting=True) == value("num_tokens", batch=batch, drafting=False)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("engine", "float32"), ("portable", "float32"), ("portable", "bfloat16")]
)
def test_auto_is_a_block_size_like_others(checkpoint: Path, prompt_file: Path, backend: str, dtype: str):
    arguments = ["--model", checkpoint, "--prompts", prompt_file, "--dtype", dtype, "--num-prompts", 2, "--batch", 2]
    text = bench(*arguments, "--backend", backend, "--block-size", 4, "--block-size", "auto", "--json")
    rows = [line for line in text.splitlines() if line.startswith("2 ")]
    drafted = [line.split()[1:3] for line in rows if " block " in line]
    assert drafted == [["block", "4"], ["block", "auto"]] and all(line.endswith(("2/2", "-")) for line in rows)
    records = last_json(text)
    for name in ("tokens_per_second", "identical_texts"):
        found = [r for r in records if r["name"] == name and r["params"].get("reference") in (None, "ar")]
        sizes = [r["params"]["block_size"] for r in found if r["params"]["drafting"]]
        assert sizes == [4, "auto"], name


def test_auto_is_a_mode_of_its_own_whose_loop_chooses_widths(checkpoint: Path, prompt_file: Path, model: Any):
    (found,) = measured(checkpoint, prompt_file, model, batches=(2,), block_sizes=(4, "auto"))
    fixed, auto = (Mode(drafting=True, exact=False, block_size=size) for size in (4, "auto"))
    assert list(found.runs) == [ONE_ROW, fixed, auto]
    with choose_backend(model, row_tokens=[20]) as chosen:
        ways = decoders_of(model, chosen, [4, "auto"])
        assert {mode: decoder.is_auto for mode, decoder in ways.items()} == {ONE_ROW: False, fixed: False, auto: True}


def test_only_prompts_that_are_decoded_are_counted(checkpoint: Path, prompt_file: Path):
    """Four prompts, of which groups of three leave one out, and groups of two none."""
    arguments = ["--model", checkpoint, "--prompts", prompt_file, "--dtype", "float32", "--block-size", 4]
    assert ", 3 prompts (" in bench(*arguments, "--batch", 3).splitlines()[0]
    assert ", 4 prompts (" in bench(*arguments, "--batch", 3, "--batch", 2).splitlines()[0]


def test_records_that_cannot_be_written_are_refused_before_anything_is_measured(
    checkpoint: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "measure_batches", lambda *args, **settings: pytest.fail("something was measured"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    arguments = ["bench", "decode", "--model", checkpoint, "--prompts", prompt_file, "--device", "cpu"]
    for out in ("file", "file/deeper/still", "file/records.json", "folder.json"):
        assert f"{tmp_path / out} cannot be written" in refused(*arguments, "--out", tmp_path / out)
    for out in (tmp_path / "new" / "folder", tmp_path / "new.json", tmp_path / "old.json"):
        (tmp_path / "old.json").write_text("[]")
        check_writable(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json", "old.json"], (
        "a check leaves traces"
    )
    assert (tmp_path / "old.json").read_text() == "[]"


def test_drafts_in_fp8_are_in_the_records_of_drafts(checkpoint: Path, prompt_file: Path):
    arguments = ["--model", checkpoint, "--prompts", prompt_file, "--dtype", "float32", "--block-size", 4, "--json"]
    settings = ["--device", "cpu", "--max-new-tokens", NUM_NEW, "--backend", "engine", "--draft-precision", "fp8"]
    result = run("bench", "decode", *arguments, *settings)
    assert result.stderr.count("note: drafts read a second copy of the weights in fp8") == 1
    assert "engine backend, drafts in fp8, " in result.stdout.splitlines()[0]
    records = last_json(result.stdout)
    found = {(record["params"]["drafting"], record["params"]["draft_precision"]) for record in records}
    assert found == {(True, "fp8"), (False, None)}
    (equal,) = [record["value"] for record in records if record["name"] == "identical_texts"]
    assert equal == len(TEXTS)


def test_a_refused_engine_is_noted(checkpoint: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orthrus.decoding.backends.is_preferred", lambda model: True)
    arguments = ["--model", checkpoint, "--prompts", prompt_file, "--num-prompts", 1, "--max-new-tokens", 4]
    result = run("bench", "decode", *arguments, "--attn", "eager")
    assert "note: decoding on the portable backend: attn_implementation 'eager'" in result.stderr
    assert "portable backend" in result.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", 0], "a batch must be 1 .. 4 (the prompts there are), got 0"),
        (["--batch", 5], "a batch must be 1 .. 4"),
        (["--max-new-tokens", 1], "max_new_tokens must be at least 2"),
        (["--block-size", 64], "block_size must be 2 .. 8"),
        (["--block-size", "auto", "--block-size", "fast"], "--block-size fast: give a number of positions, or auto"),
        (["--num-prompts", 9], "has 4 prompts, 9 are wanted"),
        (["--num-prompts", 0], "num_prompts must be at least 1"),
        (["--field", "text"], "needs an object with a string under 'text'"),
        (["--backend", "fast"], "--backend fast"),
        (["--dtype", "float8"], "--dtype float8"),
        (["--device", "toaster"], "--device toaster"),
        (["--backend", "engine", "--exact"], "exact=True"),
        (["--backend", "portable", "--draft-precision", "fp8"], "--draft-precision fp8"),
        (["--draft-precision", "fp8"], "this model is on cpu"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line(checkpoint: Path, prompt_file: Path, arguments: list, message: str):
    settings = ["--model", checkpoint, "--prompts", prompt_file, "--device", "cpu"]
    assert message in refused("bench", "decode", *settings, *arguments)
