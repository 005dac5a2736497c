"""The speed benchmark: its numbers are consistent and its records complete."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthrus.decoding import timing
from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.stopping import Stopping
from orthrus.decoding.timing import Run
from orthrus.evaluation import summary
from orthrus.evaluation.measurement import ONE_ROW, Measurement, Mode, measure, modes
from orthrus.evaluation.records import ResultRecord, command_line, here_and_now, read_records, results_name, to_json
from orthrus.evaluation.repetition import (
    LOOPING_SHARE,
    distinct_4gram_share,
    is_looping,
    is_varied,
    pooled_4gram_share,
)
from orthrus.evaluation.speed import Settings, bench
from orthrus.evaluation.suites import prompts_from_jsonl
from orthrus.evaluation.summary import Summary, compare_runs, records_of, summarise
from orthrus.evaluation.tables import print_summaries
from orthrus.model.checkpoint import load_model, load_tokenizer
from tests.evaluation.conftest import TEXTS

NUM_NEW = 24
DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def measured(checkpoint: Path, prompt_file: Path, dtype: str = "float32", **settings) -> Measurement:
    """All prompts in all modes."""
    model, tokenizer = load_model(checkpoint, dtype=dtype), load_tokenizer(checkpoint)
    return measure(model, tokenizer, prompts_from_jsonl(prompt_file), max_new_tokens=NUM_NEW, **settings)


@pytest.fixture(scope="module")
def found(checkpoint: Path, prompt_file: Path) -> Measurement:
    return measured(checkpoint, prompt_file, block_sizes=(4, 8))


@pytest.fixture(scope="module")
def summaries(found: Measurement) -> list[Summary]:
    return summarise(found)


def drafted(summaries: list[Summary]) -> list[Summary]:
    return [one for one in summaries if one.mode.drafting]


# Modes and texts


def test_without_exact_mode_one_baseline_serves_all_block_sizes():
    assert modes((4, 8), exact=False) == [
        ONE_ROW,
        Mode(drafting=True, exact=False, block_size=4),
        Mode(drafting=True, exact=False, block_size=8),
    ]


def test_in_exact_mode_each_block_size_has_its_own_baseline_and_one_row_passes_are_there_too():
    found = modes((4, 8), exact=True)
    assert found[0] == ONE_ROW and len(found) == 5
    for mode in found[1:]:
        assert mode.exact and mode.baseline in found and mode.baseline.block_size == mode.block_size


def test_fp32_texts_are_identical_and_complete(summaries: list[Summary]):
    assert len(drafted(summaries)) == 2
    for one in drafted(summaries):
        assert one.against["ar"].num_identical == len(TEXTS) and not one.divergences
        assert all(len(run.token_ids) == NUM_NEW for run in one.runs)


def test_bf16_texts_are_identical_to_the_same_computation_without_drafting(checkpoint: Path, prompt_file: Path):
    found = measured(checkpoint, prompt_file, "bfloat16", block_sizes=(8,))
    assert len(found.runs) == 3, "one-row passes, 8-row passes, drafting"
    for one in drafted(summarise(found)):
        assert one.mode.exact and one.against["ar"].num_identical == len(TEXTS)


def test_trained_block_size_is_measured_by_default(checkpoint: Path, prompt_file: Path):
    sizes = {mode.block_size for mode in measured(checkpoint, prompt_file).runs if mode.drafting}
    assert sizes == {4, 8}


# Numbers


def test_tokens_are_the_first_plus_what_cycles_and_steps_wrote(summaries: list[Summary]):
    for one in summaries:
        stats = one.stats
        assert stats.num_prefills == len(TEXTS) and stats.num_tokens == NUM_NEW * len(TEXTS)
        assert stats.num_tokens == stats.num_prefills + stats.num_cycles + stats.num_accepted + stats.num_plain_steps


def test_tokens_per_cycle_is_what_cycles_wrote_over_cycles(summaries: list[Summary]):
    for one in drafted(summaries):
        stats = one.stats
        written = stats.num_tokens - stats.num_prefills - stats.num_plain_steps
        assert one.tokens_per_cycle() == pytest.approx(written / stats.num_cycles)
        assert stats.tokens_per_forward == pytest.approx(
            stats.num_tokens / (stats.num_prefills + 2 * stats.num_cycles + stats.num_plain_steps)
        )
        each = [value for value in one.tokens_per_cycle_each if value is not None]
        assert one.tokens_per_cycle_mean == pytest.approx(sum(each) / len(each))
        assert one.worst is not None and one.tokens_per_cycle_each[one.worst] == min(each)


def test_histogram_and_positions_add_up(summaries: list[Summary]):
    for one in drafted(summaries):
        stats = one.stats
        assert sum(stats.acceptance_histogram) == stats.num_cycles
        assert sum(count * a for a, count in enumerate(stats.acceptance_histogram)) == stats.num_accepted
        shares = one.acceptance_per_position
        block_size = one.mode.block_size
        assert isinstance(block_size, int) and len(shares) == block_size - 1
        assert all(0 <= share <= 1 for share in shares)
        drafted_at = stats.drafted_per_position
        assert sum(a * b for a, b in zip(shares, drafted_at, strict=True)) == pytest.approx(stats.num_accepted)


def test_plain_decoding_has_no_cycles(summaries: list[Summary]):
    plain = summaries[0]
    assert plain.mode == ONE_ROW and not plain.against
    assert plain.tokens_per_cycle() is None and plain.worst is None and plain.rho is None
    assert plain.stats.tokens_per_forward == 1.0


def test_passes_fit_into_their_cycle_and_cycles_into_the_decode_time(summaries: list[Summary]):
    for run in (run for one in summaries for run in one.runs):
        assert run.draft_ms + run.verify_ms <= run.cycles_s * 1000 + 1e-6
        assert run.cycles_s <= run.decode_s


def run_of(token_ids: list[int], seconds: float, like: Run) -> Run:
    return dataclasses.replace(like, token_ids=token_ids, decode_s=seconds)


def test_speedup_is_the_median_of_ratios_and_the_total_is_weighted_by_time(found: Measurement):
    like = found.runs[ONE_ROW][0]
    text = list(range(11))
    plain = [run_of(text, 1.0, like), run_of(text, 1.0, like), run_of(text, 8.0, like)]
    fast = [run_of(text, 0.5, like), run_of(text, 0.25, like), run_of([*text[:-1], 0], 8.0, like)]
    against = compare_runs(fast, plain)
    assert against.speedup == pytest.approx(2.0)
    assert against.speedup_total == pytest.approx(10.0 / 8.75)
    assert against.num_identical == 2
    assert summary.speed(plain) == pytest.approx(3.0)


def test_text_of_one_token_has_no_speed(found: Measurement):
    one = run_of([7], 0.0, found.runs[ONE_ROW][0])
    against = compare_runs([one], [one])
    assert summary.speed([one]) is None and against.speedup is None and against.num_identical == 1


def test_prefill_is_no_part_of_decode_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 5.0, 6.0, 8.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))

    class Stream:
        """A decoder that admits, cycles once and ends with a plain step."""

        def stream(self, request: Request):
            fields = dict(row=0, finish_reason=None, logprobs=None, draft_ms=1.0, verify_ms=2.0, draft_ids=())
            for token_ids, num_drafted in (((1,), 0), ((2, 3), 4), ((4,), 0)):
                yield measurement_record(token_ids, num_drafted, fields)

        def stats(self, row: int):
            return None

    run = timing.timed_run(Stream(), Request(prompt_ids=[1], stopping=Stopping(max_new_tokens=4)))  # type: ignore
    assert run.token_ids == [1, 2, 3, 4] and run.num_timed == 3
    assert (run.prefill_s, run.decode_s, run.cycles_s) == (5.0, 3.0, 1.0)
    assert (run.draft_ms, run.verify_ms) == (1.0, 2.0), "the admission's and the plain step's passes are not a cycle's"


def measurement_record(token_ids: tuple[int, ...], num_drafted: int, fields: dict):
    from orthrus.decoding.decoder import Record

    return Record(token_ids=token_ids, num_drafted=num_drafted, num_accepted=len(token_ids) - 1, **fields)


# Repetition


def test_distinct_share_counts_runs_of_four():
    assert distinct_4gram_share(range(20)) == 1.0
    assert distinct_4gram_share([5] * 13) == pytest.approx(1 / 10)
    assert distinct_4gram_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(4 / 5)
    assert distinct_4gram_share([1, 1, 1]) == 1.0, "too short to have a run of four"
    assert pooled_4gram_share([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [7]]) == pytest.approx(3 / 4), "1 2 3 4 is in both"
    assert pooled_4gram_share([[1, 2], [3, 4]]) == 1.0, "no run of four crosses two outputs"


def test_looping_is_less_than_half_distinct():
    loop = [1, 2, 3, 4]
    assert not is_looping(range(50)) and is_looping(loop * 12)
    just_half = [*range(8), *range(8)][:-1]
    share = distinct_4gram_share(just_half)
    assert share >= LOOPING_SHARE and not is_looping(just_half)


def test_counting_up_is_not_varied():
    assert not is_varied("".join(f"    axis{i} : int{i}\n" for i in range(20)))
    assert is_varied("def area(self):\n    return self.width * self.height\n\ndef half(x):\n    return x / 2\n")


def test_looping_outputs_are_counted_apart(found: Measurement):
    mode = next(mode for mode in found.runs if mode.drafting)
    runs = list(found.runs[mode])
    runs[0] = dataclasses.replace(runs[0], token_ids=[3, 4] * (NUM_NEW // 2))
    texts = [
        "a b a b",
        "".join(f"y{i} = x{i}\n" for i in range(9)),
        *[f"{a} of all others" for a in "cdefgh"][: len(runs) - 2],
    ]
    one = Summary(mode=mode, runs=runs, texts=texts, ar_step_ms=1.0, against={})
    assert one.looping == [True, *[False] * (len(runs) - 1)]
    assert one.tokens_per_cycle(one.looping) == pytest.approx(runs[0].stats.tokens_per_cycle)
    assert one.varied == [False, False, *[True] * (len(runs) - 2)]
    assert one.tokens_per_cycle(one.varied) == pytest.approx(summary.merged(runs[2:]).tokens_per_cycle)
    assert one.tokens_per_cycle() == pytest.approx(summary.merged(runs).tokens_per_cycle)


# A planted divergence


def test_planted_divergence_is_reported_with_its_position_and_gap(
    found: Measurement, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A verifier that writes the second best token once: what a broken accept would do, and only drafting sees it."""
    at, unbroken = 9, PortableBackend._verify_logits
    plain, ids = found.runs[ONE_ROW][0].token_ids, found.prompt_ids[0]

    def broken(self: PortableBackend, rows, ids_BW: Tensor, num_slots: int) -> Tensor:
        logits_BWV = unbroken(self, rows, ids_BW, num_slots)
        column = rows[0].num_prompt + at - len(rows[0].tokens)
        if rows[0].width and 0 <= column < logits_BWV.shape[1]:
            logits_BWV[0, column, logits_BWV[0, column].argmax()] = -1e9
        return logits_BWV

    monkeypatch.setattr(PortableBackend, "_verify_logits", broken)
    mode = Mode(drafting=True, exact=False, block_size=8)
    request = Request(prompt_ids=ids, stopping=Stopping(max_new_tokens=NUM_NEW))
    wrong = timing.timed_run(Decoder(PortableBackend(found.model)), request)
    monkeypatch.undo()
    runs = {ONE_ROW: found.runs[ONE_ROW], mode: [wrong, *found.runs[mode][1:]]}
    (one,) = drafted(summarise(dataclasses.replace(found, runs=runs)))
    assert one.against["ar"].num_identical == len(TEXTS) - 1
    with torch.inference_mode():
        logits_V = found.model(input_ids=torch.tensor([[*ids, *plain[:at]]])).logits[0, -1]
    best, second = logits_V.topk(2).values.tolist()
    divergence = one.divergences[0]
    assert list(one.divergences) == [0] and divergence.position == at
    assert divergence.gap == pytest.approx(best - second, rel=1e-3) and not divergence.is_rounding

    origin = here_and_now(torch.device("cpu"))
    records = records_of(one, {}, origin, found.prompts)
    (record,) = [record for record in records if record.name == "first_divergence"]
    assert record.value == at and record.params["prompt"] == "snippets:1" and record.params["rounding"] is False
    print_summaries([one], found, heading="planted")
    assert f"differs: snippets:1 at new token {at}" in capsys.readouterr().out


# Records and the command


def settings(checkpoint: Path, prompt_file: Path, **changes) -> Settings:
    fields = dict(model=str(checkpoint), prompts=prompt_file, num_prompts=2, max_new_tokens=12, block_sizes=(8,))
    return Settings(**fields | changes)  # pyrefly: ignore


@pytest.fixture(scope="module")
def records(checkpoint: Path, prompt_file: Path) -> list[ResultRecord]:
    return bench(settings(checkpoint, prompt_file))


def test_records_have_all_fields_and_parse_again(records: list[ResultRecord], tmp_path: Path):
    path = tmp_path / "results.json"
    path.write_text(to_json(records))
    assert read_records(path) == records
    for record in json.loads(path.read_text()):
        assert set(record) == {
            "name", "value", "unit", "params", "hardware", "versions", "commit", "command", "date"
        }  # fmt: skip
        assert record["hardware"] and record["commit"] and record["command"]
        assert {"orthrus", "torch", "transformers", "python"} == set(record["versions"])
        assert datetime.fromisoformat(record["date"]).tzinfo is not None
        known = {"model", "backend", "batch", "dtype", "suite", "num_prompts", "max_new_tokens", "threads"}
        assert known | {"drafting", "exact", "block_size", "packed"} <= set(record["params"])


def test_record_with_a_field_missing_is_refused_with_its_place(records: list[ResultRecord], tmp_path: Path):
    path = tmp_path / "results.json"
    document = json.loads(to_json(records[:2]))
    del document[1]["unit"]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="record 1.*unit"):
        read_records(path)


def test_each_record_is_told_apart_by_name_and_params(records: list[ResultRecord]):
    keys = [(record.name, json.dumps(record.params, sort_keys=True)) for record in records]
    assert len(set(keys)) == len(keys)


def test_both_baselines_are_in_the_records(records: list[ResultRecord]):
    def values(name: str, **params) -> list:
        return [r.value for r in records if r.name == name and params.items() <= r.params.items()]

    assert len(values("tokens_per_second", dtype="bfloat16", drafting=False)) == 2
    assert len(values("tokens_per_second", dtype="float32", drafting=False)) == 1
    for dtype in ("float32", "bfloat16"):
        for reference in ("ar", "ar_one_row"):
            assert len(values("speedup", dtype=dtype, drafting=True, reference=reference)) == 1
        assert values("identical_texts", dtype=dtype, drafting=True, reference="ar") == [2]


def test_every_name_is_defined_in_the_documentation(records: list[ResultRecord]):
    text = DOCS.read_text()
    names = {record.name for record in records} | {"first_divergence"}
    assert not {name for name in names if f"| `{name}` |" not in text}


def test_results_file_is_named_by_theme_hardware_and_date(records: list[ResultRecord]):
    record = dataclasses.replace(
        records[0], hardware="AMD EPYC, 2 cores, avx512_bf16", date="2026-01-02T03:04:05+00:00"
    )
    assert results_name(record, theme="speed-tiny") == "speed-tiny_amd-epyc-2-cores_2026-01-02.json"


def test_numbers_that_are_none_are_an_error_in_json(records: list[ResultRecord]):
    with pytest.raises(ValueError):
        to_json([dataclasses.replace(records[0], value=math.nan)])


def test_command_names_the_program():
    assert command_line()


def test_command_prints_json_last_and_writes_the_same_records(checkpoint: Path, prompt_file: Path, tmp_path: Path):
    arguments = ["--model", checkpoint, "--prompts", prompt_file, "--dtype", "float32", "--block-size", 8]
    done = speed(*arguments, "--max-new-tokens", 12, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    (path,) = tmp_path.glob("speed-random_*.json")
    assert json.loads(path.read_text()) == last
    assert last[0]["command"].startswith("python -m orthrus.evaluation.speed --model")
    assert "plain, one-row passes" in done.stdout and "worst prompt: snippets:" in done.stdout


def speed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the benchmark as a user does."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "orthrus.evaluation.speed", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--block-size", 64), "error: block_size must be 2 .. 8"),
        (("--device", "toaster"), "error: --device toaster"),
        (("--num-prompts", 1, "--out", f"{__file__}/records"), f"error: {__file__}/records cannot be written"),
    ],
)
def test_users_mistake_is_one_line_and_exit_code_2(checkpoint: Path, arguments: tuple, message: str):
    done = speed("--model", checkpoint, *arguments)
    assert done.returncode == 2 and not done.stdout.strip()
    assert done.stderr.splitlines()[-1].startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 1}, "max_new_tokens must be at least 2"),
        ({"num_prompts": 0}, "num_prompts must be at least 1"),
        ({"dtypes": ()}, "dtypes"),
    ],
)
def test_settings_that_measure_nothing_are_refused(checkpoint: Path, prompt_file: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        settings(checkpoint, prompt_file, **changes)


def test_too_few_prompts_in_a_file_are_refused(checkpoint: Path, prompt_file: Path):
    with pytest.raises(ValueError, match=f"has {len(TEXTS)} prompts, 9 are wanted"):
        settings(checkpoint, prompt_file, num_prompts=9).read_prompts()
