"""A measurement for the eye: one table of all modes, then what each block size accepted, its worst prompt, and every
text that is not the baseline's.
"""

import sys
from collections.abc import Sequence

from orthrus.evaluation.lossless import Divergence
from orthrus.evaluation.measurement import Measurement, Mode
from orthrus.evaluation.repetition import LOOPING_SHARE
from orthrus.evaluation.summary import Summary, name_of

COLUMNS = (
    "decoding", "tokens/s", "speed-up", "(total)", "vs one-row", "step ms", "N", "N per text", "TPF", "N looping",
    "N varied", "looping", "varied", "4-grams", "identical",
)  # fmt: skip

NOTES = f"""\
speed-up: median over texts against plain decoding by the same computation; (total): all tokens / all time; vs one-row:
median against plain decoding in one-row passes. step ms: a cycle, or a plain step. N: tokens per cycle, weighted by
cycle; TPF: tokens per forward pass of either kind, prefill included. looping: texts of whose 4-grams less than
{LOOPING_SHARE:.0%} are distinct; varied: texts that neither loop nor count up; 4-grams: mean distinct share. identical:
to the same computation's plain text (a plain row's: to the one-row text). Decoding only, prefill apart."""

SHOWN_CHARS = 400
"""Of the worst prompt's output."""


def print_summaries(summaries: Sequence[Summary], found: Measurement, *, heading: str) -> None:
    """Print everything about one dtype."""
    print(f"\n{heading}\n")
    print_table(COLUMNS, [table_row(summary) for summary in summaries])
    print(f"\n{NOTES}")
    for summary in summaries:
        if summary.mode.drafting:
            print_details(summary, found)


def table_row(summary: Summary) -> list[str]:
    """One mode."""
    same, one_row = summary.against.get("ar"), summary.against.get("ar_one_row")
    reference = same or one_row
    step = summary.per_cycle_ms("cycle_ms") if summary.mode.drafting else summary.ar_step_ms
    return [
        mode_name(summary.mode),
        shown(summary.tokens_per_second, 1),
        shown(same.speedup if same else None),
        shown(same.speedup_total if same else None),
        shown(one_row.speedup if one_row else None),
        shown(step),
        shown(summary.tokens_per_cycle()),
        shown(summary.tokens_per_cycle_mean),
        shown(summary.stats.tokens_per_forward),
        shown(summary.tokens_per_cycle(summary.looping)),
        shown(summary.tokens_per_cycle(summary.varied)),
        f"{sum(summary.looping)}/{len(summary.runs)}",
        f"{sum(summary.varied)}/{len(summary.runs)}",
        shown(sum(summary.distinct_4gram_shares) / len(summary.runs)),
        f"{reference.num_identical}/{len(summary.runs)}" if reference else "-",
    ]


def mode_name(mode: Mode) -> str:
    """What a row of the table is called."""
    if mode.drafting:
        return f"block {mode.block_size}"
    if mode.block_size == "auto":
        return "plain, auto's passes"
    return "plain, one-row passes" if mode.block_size is None else f"plain, {mode.block_size}-row passes"


def shown(value: float | None, digits: int = 2) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table drawn by rich in a terminal, aligned text elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for first, *rest in [columns, *rows]:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]))


def print_details(summary: Summary, found: Measurement) -> None:
    """What one block size accepted, where its texts differ, and its worst prompt."""
    accepted = " ".join(f"{share:.2f}" for share in summary.acceptance_per_position)
    print(f"\n{mode_name(summary.mode)}: accepted per position {accepted or '-'}")
    draft_ms, verify_ms = summary.per_cycle_ms("draft_ms"), summary.per_cycle_ms("verify_ms")
    print(f"  draft {shown(draft_ms)} ms, verify {shown(verify_ms)} ms, cycle / plain step {shown(summary.rho)}")
    for index, divergence in summary.divergences.items():
        print(f"  differs: {name_of(found.prompts[index])} {told(divergence)}")
    if (worst := summary.worst) is not None:
        prompt, run = found.prompts[worst], summary.runs[worst]
        text = summary.texts[worst]
        loops = "looping" if summary.looping[worst] else "not looping"
        print(f"  worst prompt: {name_of(prompt)}, N {run.stats.tokens_per_cycle:.2f}, {loops}")
        for line in [*prompt.text.split("\n")[-3:], "-->", *text[:SHOWN_CHARS].split("\n")]:
            print(f"    | {line}")


def told(divergence: Divergence) -> str:
    """Where two texts part and how close the decision was."""
    cause = "rounding" if divergence.is_rounding else "more than rounding explains"
    return (
        f"at new token {divergence.position}, two best logits {divergence.top_logits[0]:.5g} and "
        f"{divergence.top_logits[1]:.5g}, {divergence.ulps:.1f} ulp apart: {cause}"
    )
