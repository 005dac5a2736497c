"""What the runs of one mode amount to: speed, acceptance, repetition, equality with the baselines; and their records.

Every number is defined in `docs/benchmarks.md` under its record's name.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.timing import Run
from orthrus.evaluation.lossless import Divergence, find_divergence
from orthrus.evaluation.measurement import ONE_ROW, Measurement, Mode
from orthrus.evaluation.records import Origin, ResultRecord
from orthrus.evaluation.repetition import distinct_4gram_share, is_looping, is_varied, pooled_4gram_share
from orthrus.evaluation.suites import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Against:
    """A mode's runs beside those of a baseline, prompt by prompt."""

    speedup: float | None
    """Median over prompts of the ratio of tokens per second; None where no prompt has more than one token."""
    speedup_total: float | None
    """Ratio of all tokens / all time."""
    num_identical: int
    """Prompts with the same token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One mode over all prompts."""

    mode: Mode
    runs: Sequence[Run]
    texts: Sequence[str]
    """What each run wrote."""
    ar_step_ms: float | None
    """Mean time of a step of this mode's baseline (of its own, when it is a baseline)."""
    against: dict[str, Against]
    """By baseline: "ar", the same computation with drafting off, and "ar_one_row"."""
    divergences: dict[int, Divergence] = field(default_factory=dict)
    """By prompt: where the drafted text leaves the baseline's."""

    @property
    def looping(self) -> list[bool]:
        """Whether each output runs in circles."""
        return [is_looping(run.token_ids) for run in self.runs]

    @property
    def varied(self) -> list[bool]:
        """Whether each output neither runs in circles nor counts."""
        return [not loops and is_varied(text) for loops, text in zip(self.looping, self.texts, strict=True)]

    @property
    def distinct_4gram_shares(self) -> list[float]:
        """The share of each output."""
        return [distinct_4gram_share(run.token_ids) for run in self.runs]

    @property
    def tokens_per_second(self) -> float | None:
        """All tokens behind the first / all decode time."""
        return speed(self.runs)

    @property
    def stats(self) -> DecodingStats:
        """The counters of all runs together."""
        return merged(self.runs)

    @property
    def tokens_per_cycle_each(self) -> list[float | None]:
        """N of each output; None where nothing was drafted."""
        return [run.stats.tokens_per_cycle if run.stats.num_cycles else None for run in self.runs]

    @property
    def tokens_per_cycle_mean(self) -> float | None:
        """N averaged over outputs instead of cycles."""
        known = [value for value in self.tokens_per_cycle_each if value is not None]
        return statistics.fmean(known) if known else None

    @property
    def worst(self) -> int | None:
        """The prompt with the lowest N."""
        known = [(value, index) for index, value in enumerate(self.tokens_per_cycle_each) if value is not None]
        return min(known)[1] if known else None

    @property
    def acceptance_per_position(self) -> list[float]:
        """Entry j: share of the drafts at position j that were accepted (with all drafts before them)."""
        pairs = zip(self.stats.accepted_per_position, self.stats.drafted_per_position, strict=True)
        return [accepted / drafted for accepted, drafted in pairs if drafted]

    def tokens_per_cycle(self, chosen_outputs: Sequence[bool] | None = None) -> float | None:
        """Token-weighted N of all outputs, or of some; None where nothing was drafted."""
        picks = [True] * len(self.runs) if chosen_outputs is None else chosen_outputs
        chosen = [run for run, picked in zip(self.runs, picks, strict=True) if picked]
        stats = merged(chosen) if chosen else None
        return stats.tokens_per_cycle if stats and stats.num_cycles else None

    def per_cycle_ms(self, part: str) -> float | None:
        """Mean over drafted cycles of `cycle_ms` (wall time), `draft_ms` or `verify_ms` (the passes)."""
        num_cycles = self.stats.num_cycles
        if not num_cycles:
            return None
        totals = {
            "cycle_ms": sum(run.cycles_s for run in self.runs) * 1000,
            "draft_ms": sum(run.draft_ms for run in self.runs),
            "verify_ms": sum(run.verify_ms for run in self.runs),
        }
        return totals[part] / num_cycles

    @property
    def rho(self) -> float | None:
        """Time of a cycle / time of the baseline's step."""
        cycle_ms = self.per_cycle_ms("cycle_ms")
        return cycle_ms / self.ar_step_ms if cycle_ms is not None and self.ar_step_ms else None


def merged(runs: Sequence[Run]) -> DecodingStats:
    """The counters of some runs together."""
    return reduce(DecodingStats.merge, [run.stats for run in runs])


def speed(runs: Sequence[Run]) -> float | None:
    """All tokens behind the first / all decode time; None where no run has such a token."""
    seconds = sum(run.decode_s for run in runs if run.num_timed)
    return sum(run.num_timed for run in runs) / seconds if seconds else None


def step_ms(runs: Sequence[Run]) -> float | None:
    """Mean wall time of a plain step."""
    num_steps = merged(runs).num_plain_steps
    return sum(run.decode_s for run in runs) * 1000 / num_steps if num_steps else None


def compare_runs(runs: Sequence[Run], baseline: Sequence[Run]) -> Against:
    """The speed and the texts of two modes, prompt by prompt."""
    pairs = list(zip(runs, baseline, strict=True))
    ratios = [own / other for a, b in pairs if (own := speed([a])) and (other := speed([b]))]
    total, total_baseline = speed(runs), speed(baseline)
    return Against(
        speedup=statistics.median(ratios) if ratios else None,
        speedup_total=total / total_baseline if total and total_baseline else None,
        num_identical=sum(a.token_ids == b.token_ids for a, b in pairs),
    )


def summarise(found: Measurement) -> list[Summary]:
    """A summary of each mode, in the order they were asked for."""
    return [summarise_mode(found, mode) for mode in found.runs]


def summarise_mode(found: Measurement, mode: Mode) -> Summary:
    """One mode beside its baselines; a drafted text that differs is looked into."""
    runs, baseline = found.runs[mode], found.runs[mode.baseline]
    against, divergences = {}, {}
    if mode.drafting:
        against["ar"] = compare_runs(runs, baseline)
        for index, (ids, own, plain) in enumerate(zip(found.prompt_ids, runs, baseline, strict=True)):
            divergence = find_divergence(found.model, ids, plain.token_ids, own.token_ids)
            if divergence is not None:
                divergences[index] = divergence
    if mode != ONE_ROW:
        against["ar_one_row"] = compare_runs(runs, found.runs[ONE_ROW])
    return Summary(
        mode=mode, runs=runs, texts=[text_of(found.tokenizer, run) for run in runs],
        ar_step_ms=step_ms(baseline), against=against, divergences=divergences,
    )  # fmt: skip


def text_of(tokenizer: Any, run: Run) -> str:
    """What a run wrote."""
    return tokenizer.decode(run.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


Number = tuple[str, Any, str, dict[str, Any]]
"""Name, value, unit, and what the value depends on beside the mode."""


def records_of(
    summary: Summary, params: dict[str, Any], origin: Origin, prompts: Sequence[Prompt]
) -> list[ResultRecord]:
    """The records of one mode; a number that does not exist (no looping output, say) has none."""
    mode = summary.mode
    shared = params | {"drafting": mode.drafting, "exact": mode.exact, "block_size": mode.block_size}
    numbers = [*plain_numbers(summary), *against_numbers(summary)]
    if mode.drafting:
        numbers += [*drafting_numbers(summary), *prompt_numbers(summary, prompts)]
    return [
        ResultRecord.of(origin, name=name, value=value, unit=unit, params=shared | own)
        for name, value, unit, own in numbers
        if value is not None
    ]


def plain_numbers(summary: Summary) -> Iterator[Number]:
    """What every mode has."""
    shares, runs = summary.distinct_4gram_shares, summary.runs
    yield "tokens_per_second", summary.tokens_per_second, "tokens/s", {}
    yield "prefill_ms", statistics.fmean(run.prefill_s for run in runs) * 1000, "ms", {}
    if not summary.mode.drafting:
        yield "ar_step_ms", summary.ar_step_ms, "ms", {}
    yield "num_tokens", summary.stats.num_tokens, "tokens", {}
    yield "distinct_4gram_share", statistics.fmean(shares), "share", {}
    yield "distinct_4gram_share_per_output", shares, "share", {}
    yield "distinct_4gram_share_pooled", pooled_4gram_share([run.token_ids for run in runs]), "share", {}
    yield "looping_outputs", sum(summary.looping), "texts", {}
    yield "varied_outputs", sum(summary.varied), "texts", {}


def against_numbers(summary: Summary) -> Iterator[Number]:
    """Speed and equality beside each baseline."""
    for reference, against in summary.against.items():
        own = {"reference": reference}
        yield "speedup", against.speedup, "ratio", own
        yield "speedup_total", against.speedup_total, "ratio", own
        yield "identical_texts", against.num_identical, "texts", own


def drafting_numbers(summary: Summary) -> Iterator[Number]:
    """What only cycles have."""
    stats = summary.stats
    for part in ("cycle_ms", "draft_ms", "verify_ms"):
        yield part, summary.per_cycle_ms(part), "ms", {}
    yield "rho", summary.rho, "ratio", {}
    looping = summary.looping
    straight = [not loops for loops in looping]
    kinds = (("all", None), ("looping", looping), ("not_looping", straight), ("varied", summary.varied))
    for outputs, chosen in kinds:
        yield "tokens_per_cycle", summary.tokens_per_cycle(chosen), "tokens", {"outputs": outputs}
    yield "tokens_per_cycle_mean", summary.tokens_per_cycle_mean, "tokens", {}
    yield "tokens_per_cycle_per_output", summary.tokens_per_cycle_each, "tokens", {}
    yield "tokens_per_forward", stats.tokens_per_forward, "tokens", {}
    yield "num_cycles", stats.num_cycles, "cycles", {}
    yield "acceptance_per_position", summary.acceptance_per_position, "share", {}
    yield "acceptance_histogram", stats.acceptance_histogram, "cycles", {}


def prompt_numbers(summary: Summary, prompts: Sequence[Prompt]) -> Iterator[Number]:
    """The worst prompt, and every prompt whose text is not the baseline's."""
    if (worst := summary.worst) is not None:
        own = {"prompt": name_of(prompts[worst]), "looping": summary.looping[worst]}
        yield "worst_tokens_per_cycle", summary.tokens_per_cycle_each[worst], "tokens", own
    for index, divergence in summary.divergences.items():
        own = divergence.as_dict()
        yield "first_divergence", own.pop("position"), "tokens", {"prompt": name_of(prompts[index]), **own}


def name_of(prompt: Prompt) -> str:
    """Where a prompt is from: "heapq:123"."""
    return f"{prompt.module}:{prompt.line}"
