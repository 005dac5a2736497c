"""Batches of prompts decoded with and without drafting in one process on one backend: what a cycle takes, and brings.

Prompts are taken in groups of a batch's size. Each group is decoded in every mode right after one another, in an order
that rotates from group to group, after runs of the same that are not counted, so that compiling, capturing and
allocating are over. Prompts are admitted one by one;
timed apart from that are the steps behind it. A row that has ended takes no part in later steps: times of a step are
of those in which all rows of the group took part.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from statistics import fmean
from typing import Any, Literal

import torch
from tqdm import tqdm

from orthrus.decoding.backends import Chosen, choose_backend
from orthrus.decoding.decoder import Decoder, Record, Request, check_block_size
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import Stopping, eos_token_ids
from orthrus.evaluation.measurement import ONE_ROW, Mode, dtype_name, encode, modes
from orthrus.evaluation.records import Origin, ResultRecord
from orthrus.evaluation.suites import Prompt
from orthrus.evaluation.tables import mode_name, shown
from orthrus.model.packed import is_packed

WARM_UPS = 2
"""Runs of each group and mode that are not counted: the engine captures a shape the second time that it meets it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of a group in which all of its rows took part."""

    wall_ms: float
    draft_ms: float
    verify_ms: float
    is_cycle: bool
    """Whether anything was drafted."""


@dataclass(kw_only=True, slots=True)
class BatchRun:
    """One group decoded in one mode."""

    tokens: list[list[int]]
    """New tokens of each row."""
    prefill_ms: list[float]
    """Wall time of each row's admission, which gives its first token."""
    decode_s: float
    """Wall time of all steps."""
    steps: list[Step]
    stats: DecodingStats

    @property
    def num_timed(self) -> int:
        """Tokens written by steps."""
        return sum(map(len, self.tokens)) - len(self.tokens)


@dataclass(kw_only=True, slots=True)
class BatchMeasurement:
    """All groups of one batch size in all modes: `runs[mode][i]` is group i."""

    batch: int
    backend: str
    exact: bool
    refusal: str | None
    draft_precision: str | None = None
    draft_bytes: int = 0
    """What drafts' own copy of the weights takes."""
    runs: dict[Mode, list[BatchRun]] = field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        """Prompts that were decoded: those that fill groups."""
        return self.batch * len(self.runs[ONE_ROW])


def measure_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batches: Sequence[int],
    block_sizes: Sequence[int | Literal["auto"]],
    max_new_tokens: int,
    backend: Any = "auto",
    exact: bool | None = None,
    draft_precision: Any = None,
) -> list[BatchMeasurement]:
    """Decode prompts greedily in groups of each batch size, on one backend; prompts that fill no group are left out.

    `ValueError` where there are fewer prompts than a batch has rows, and for what the backend refuses.
    """
    check_numbers(batches, num_prompts=len(prompts), max_new_tokens=max_new_tokens)
    for block_size in block_sizes:
        check_block_size(block_size, model.config.block_size)
    prompt_ids, context = encode(tokenizer, prompts), model.config.max_position_embeddings
    eos = eos_token_ids(model, tokenizer)

    def requests_of(group: Sequence[list[int]], *, drafting: bool) -> list[Request]:
        rooms = [max(1, min(max_new_tokens, context - len(ids))) for ids in group]
        return [
            Request(prompt_ids=ids, stopping=Stopping(max_new_tokens=room, eos_token_ids=eos), drafting=drafting)
            for ids, room in zip(group, rooms, strict=True)
        ]

    longest = min(max(map(len, prompt_ids)) + max_new_tokens, context)
    rows = [longest] * max(batches)
    with choose_backend(model, wish=backend, row_tokens=rows, exact=exact, draft_precision=draft_precision) as chosen:
        decoders = decoders_of(model, chosen, block_sizes)
        measured = []
        for batch in batches:
            found = BatchMeasurement(
                batch=batch, backend=chosen.name, exact=chosen.exact, refusal=chosen.refusal,
                draft_precision=chosen.draft_precision, draft_bytes=chosen.draft_bytes,
            )  # fmt: skip
            found.runs = {mode: [] for mode in decoders}
            groups = [prompt_ids[i : i + batch] for i in range(0, len(prompt_ids) - batch + 1, batch)]
            ways = list(decoders.items())
            for index, group in enumerate(tqdm(groups, desc=f"batch {batch}", disable=None)):
                start = index % len(ways)  # noise of the machine falls on all modes alike
                for mode, decoder in ways[start:] + ways[:start]:
                    requests = requests_of(group, drafting=mode.drafting)
                    *_, run = (run_batch(decoder, requests) for _ in range(WARM_UPS + 1))
                    found.runs[mode].append(run)
            measured.append(found)
    return measured


def check_numbers(batches: Sequence[int], *, num_prompts: int, max_new_tokens: int) -> None:
    """`ValueError` for numbers that measure nothing."""
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens must be at least 2 (prefill gives the first), got {max_new_tokens}")
    for batch in batches:
        if not 1 <= batch <= num_prompts:
            raise ValueError(f"a batch must be 1 .. {num_prompts} (the prompts there are), got {batch}")


def decoders_of(model: Any, chosen: Chosen, block_sizes: Sequence[int | Literal["auto"]]) -> dict[Mode, Decoder]:
    """A step loop for each mode, over the one backend; one-row passes need another where passes are padded."""
    is_padded = chosen.backend.exact
    one_row = PortableBackend(model, exact=False) if is_padded else chosen.backend
    return {
        mode: Decoder(chosen.backend if mode.exact == is_padded else one_row, block_size=mode.block_size)
        for mode in modes(block_sizes, exact=is_padded)
    }


def run_batch(decoder: Decoder, requests: Sequence[Request]) -> BatchRun:
    """Admit the requests one by one and step until all have ended; no row is left behind."""
    tokens: dict[int, list[int]] = {}
    prefill_ms, steps = [], []
    try:
        for request in requests:
            started = time.perf_counter()
            record = decoder.admit(request)
            prefill_ms.append((time.perf_counter() - started) * 1000)
            tokens[record.row] = list(record.token_ids)
        began = time.perf_counter()
        while decoder.active:
            started = time.perf_counter()
            records = decoder.step()
            wall_ms = (time.perf_counter() - started) * 1000
            for record in records:
                tokens[record.row] += record.token_ids
            if len(records) == len(requests):
                steps.append(step_of(records, wall_ms))
        decode_s = time.perf_counter() - began
        stats = reduce(DecodingStats.merge, map(decoder.stats, tokens))
        return BatchRun(
            tokens=list(tokens.values()), prefill_ms=prefill_ms, decode_s=decode_s, steps=steps, stats=stats
        )
    finally:
        for row in tokens:
            decoder.release(row)


def step_of(records: Sequence[Record], wall_ms: float) -> Step:
    """A step from its rows' records, whose shares of a pass add up to it."""
    return Step(
        wall_ms=wall_ms,
        draft_ms=sum(record.draft_ms for record in records),
        verify_ms=sum(record.verify_ms for record in records),
        is_cycle=any(record.num_drafted for record in records),
    )


# --- what it amounts to ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """One mode at one batch size, beside its baselines. Names as in `docs/benchmarks.md`; None: no such number."""

    batch: int
    mode: Mode
    tokens_per_second: float | None
    prefill_ms: float
    step_ms: float | None
    """`cycle_ms`, or `ar_step_ms` of plain decoding."""
    draft_ms: float | None
    verify_ms: float | None
    tokens_per_cycle: float | None
    rho: float | None
    speedup_total: dict[str, float | None]
    """By reference: "ar", the same computation with drafting off, and "ar_one_row" where that is another."""
    num_identical: dict[str, int]
    num_texts: int
    num_tokens: int


def summarise_batch(found: BatchMeasurement) -> list[BatchSummary]:
    """A summary of each mode."""
    return [summarise_batch_mode(found, mode) for mode in found.runs]


def summarise_batch_mode(found: BatchMeasurement, mode: Mode) -> BatchSummary:
    """One mode beside its baselines."""
    runs = found.runs[mode]
    references = {"ar": mode.baseline} if mode.drafting else {}
    if mode != ONE_ROW and mode.baseline != ONE_ROW:
        references["ar_one_row"] = ONE_ROW
    own_speed, step_ms = speed(runs), mean_ms(runs, "wall_ms", is_cycle=mode.drafting)
    plain_ms = mean_ms(found.runs[mode.baseline], "wall_ms", is_cycle=False)
    stats = reduce(DecodingStats.merge, (run.stats for run in runs))
    texts = [tokens for run in runs for tokens in run.tokens]
    return BatchSummary(
        batch=found.batch,
        mode=mode,
        tokens_per_second=own_speed,
        prefill_ms=fmean(ms for run in runs for ms in run.prefill_ms),
        step_ms=step_ms,
        draft_ms=mean_ms(runs, "draft_ms", is_cycle=True),
        verify_ms=mean_ms(runs, "verify_ms", is_cycle=True),
        tokens_per_cycle=stats.tokens_per_cycle if stats.num_cycles else None,
        rho=ratio(step_ms, plain_ms) if mode.drafting else None,
        speedup_total={name: ratio(own_speed, speed(found.runs[other])) for name, other in references.items()},
        num_identical={name: count_equal(runs, found.runs[other]) for name, other in references.items()},
        num_texts=len(texts),
        num_tokens=sum(map(len, texts)),
    )


def speed(runs: Sequence[BatchRun]) -> float | None:
    """All tokens behind the first of each row / all time of steps; None where there was none."""
    num_tokens = sum(run.num_timed for run in runs)
    return num_tokens / sum(run.decode_s for run in runs) if num_tokens else None


def mean_ms(runs: Sequence[BatchRun], part: str, *, is_cycle: bool) -> float | None:
    """Mean of a step's `wall_ms`, `draft_ms` or `verify_ms` over cycles or over plain steps of whole groups."""
    found = [getattr(step, part) for run in runs for step in run.steps if step.is_cycle == is_cycle]
    return fmean(found) if found else None


def ratio(own: float | None, other: float | None) -> float | None:
    """own / other, None where either is not there."""
    return own / other if own is not None and other else None


def count_equal(runs: Sequence[BatchRun], others: Sequence[BatchRun]) -> int:
    """Texts that two modes have in common, prompt by prompt."""
    return sum(
        a == b for run, other in zip(runs, others, strict=True) for a, b in zip(run.tokens, other.tokens, strict=True)
    )


def batch_facts(model: Any, found: BatchMeasurement) -> dict[str, Any]:
    """What the machine and the backend add to the `params` of records."""
    return {
        "backend": found.backend,
        "batch": found.batch,
        "exact": found.exact,
        "draft_precision": found.draft_precision,
        "dtype": dtype_name(model),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "packed": is_packed(model),
        "attn_implementation": model.config._attn_implementation if found.backend == "portable" else None,
    }


def batch_records(summary: BatchSummary, params: dict[str, Any], origin: Origin) -> list[ResultRecord]:
    """The records of one mode; a number that does not exist has none."""
    mode = summary.mode
    exact = mode.exact if params["backend"] == "portable" else params["exact"]
    precision = params["draft_precision"] if mode.drafting else None
    own = {"drafting": mode.drafting, "exact": exact, "block_size": mode.block_size, "draft_precision": precision}
    shared = params | own
    return [
        ResultRecord.of(origin, name=name, value=value, unit=unit, params=shared | more)
        for name, value, unit, more in numbers(summary)
        if value is not None
    ]


def numbers(summary: BatchSummary) -> Iterator[tuple[str, Any, str, dict[str, Any]]]:
    """Name, value, unit, and what the value depends on beside the mode."""
    yield "tokens_per_second", summary.tokens_per_second, "tokens/s", {}
    yield "prefill_ms", summary.prefill_ms, "ms", {}
    yield "num_tokens", summary.num_tokens, "tokens", {}
    yield "cycle_ms" if summary.mode.drafting else "ar_step_ms", summary.step_ms, "ms", {}
    if summary.mode.drafting:
        yield "draft_ms", summary.draft_ms, "ms", {}
        yield "verify_ms", summary.verify_ms, "ms", {}
        yield "rho", summary.rho, "ratio", {}
        yield "tokens_per_cycle", summary.tokens_per_cycle, "tokens", {"outputs": "all"}
    for name, value in summary.speedup_total.items():
        yield "speedup_total", value, "ratio", {"reference": name}
    for name, value in summary.num_identical.items():
        yield "identical_texts", value, "texts", {"reference": name}


COLUMNS = (
    "batch", "decoding", "tokens/s", "speed-up", "vs one-row", "step ms", "draft ms", "verify ms", "rho", "N",
    "prefill ms", "identical",
)  # fmt: skip
NOTES = """\
speed-up: all tokens / all time of steps against plain decoding by the same computation; vs one-row: against plain
decoding in one-row passes, where exact mode pads them. step ms: a cycle, or a plain step, of all rows together; rho: a
cycle / a plain step. N: tokens per cycle and row. prefill ms: of one prompt. identical: to the same plain text."""


def batch_row(summary: BatchSummary) -> list[str]:
    """One mode in the table."""
    reference = "ar" if summary.mode.drafting else "ar_one_row"
    equal = summary.num_identical.get(reference)
    return [
        str(summary.batch),
        "plain" if summary.mode == ONE_ROW else mode_name(summary.mode),
        shown(summary.tokens_per_second, 1),
        shown(summary.speedup_total.get("ar")),
        shown(summary.speedup_total.get("ar_one_row")),
        shown(summary.step_ms),
        shown(summary.draft_ms if summary.mode.drafting else None),
        shown(summary.verify_ms if summary.mode.drafting else None),
        shown(summary.rho),
        shown(summary.tokens_per_cycle),
        shown(summary.prefill_ms),
        "-" if equal is None else f"{equal}/{summary.num_texts}",
    ]
