"""Figures of measured numbers, drawn from results files: the time of a cycle beside that of reading its bytes.

    python -m orthrus.evaluation.plots RESULTS.json [MORE.json ...] --out docs/figures/cycle.svg

The files are what `benchmarks/cycle.py` prints as its last line; drafts in fp8 are a run, and so a file, of their own.
A panel for each model, a group for each context; a bar is a median time, the black line across it its `floor_ms`. The
same records make the same bytes with the same matplotlib, so that a figure under version control changes with its
numbers alone.
"""

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from orthrus.evaluation.records import ResultRecord, read_records

PLAIN = "plain step"
"""The series of drafting off."""

COLOURS = ("#8c8c8c", "#0072b2", "#e69f00", "#009e73")
"""Of series, in their order: told apart by colour-blind readers and in grey."""

STYLE = {"svg.hashsalt": "orthrus", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
"""Ids that do not change from run to run, and text that stays text."""

FLOOR_LINE = 1.6
"""Points."""

Key = tuple[str, int, str]
"""Model, context and series of a bar."""


class Bar(NamedTuple):
    """One measured time and its floor, in milliseconds."""

    model: str
    context: int
    """Cached tokens of each row."""
    series: str
    ms: float
    floor_ms: float


def series_of(record: ResultRecord) -> str:
    """The bars that a record belongs to. What drafts read is of no interest to a plain step."""
    if record.name == "ar_step_ms":
        return PLAIN
    precision = record.params.get("draft_precision")
    return f"cycle, {precision or record.params['dtype']} drafts"


def chosen(records: Iterable[ResultRecord], *, batch: int, trace: str) -> list[ResultRecord]:
    """The engine's steps and cycles of one batch size and one trace of acceptance, a record for each bar.

    `ValueError` where there are no cycles, where a cycle has no plain step beside it, where a record has no floor, and
    where runs are mixed that one figure cannot show.
    """
    found: dict[Key, ResultRecord] = {}
    # A run with fp8 drafts measures plain steps, too: the same computation, taken where no other run has it.
    for record in sorted(records, key=lambda r: r.params.get("draft_precision") is not None):
        if not is_drawn(record, batch=batch, trace=trace):
            continue
        params = record.params
        key = params["model"], params["context"], series_of(record)
        first = found.setdefault(key, record)
        if first is not record and first.params.get("draft_precision") == params.get("draft_precision"):
            raise ValueError(f"{record.name} of {described(key)} is there twice: draw one run at a time")
        if not isinstance(params.get("floor_ms"), int | float):
            raise ValueError(f"{record.name} of {described(key)} has no floor_ms: benchmarks/cycle.py writes it")
    check_complete(list(found), batch=batch, trace=trace)
    check_same(list(found.values()))
    return list(found.values())


def is_drawn(record: ResultRecord, *, batch: int, trace: str) -> bool:
    """Whether a record is a plain step of the engine, or a cycle of this trace, at this batch size."""
    params = record.params
    is_step = record.name == "ar_step_ms" or (record.name == "cycle_ms" and params.get("trace") == trace)
    return is_step and params.get("backend") == "engine" and params.get("batch") == batch and "context" in params


def check_complete(keys: Sequence[Key], *, batch: int, trace: str) -> None:
    """`ValueError` naming the records without which there is no figure."""
    steps = {key[:2] for key in keys if key[2] == PLAIN}
    cycles = {key[:2] for key in keys if key[2] != PLAIN}
    if not cycles:
        raise ValueError(
            f"no cycle_ms of the engine at batch {batch} with trace {trace!r} among the records: "
            "measure them with benchmarks/cycle.py, or name another --batch or --trace"
        )
    if missing := sorted(cycles - steps):
        raise ValueError(f"no ar_step_ms of {'; '.join(map(described, missing))} to compare its cycles with")


def check_same(records: Sequence[ResultRecord]) -> None:
    """`ValueError` where the caption, which speaks of all numbers, would be true of some."""
    shared = {
        "machine": {record.hardware for record in records},
        "torch": {record.versions["torch"] for record in records},
        "block size": {str(record.params["block_size"]) for record in records},
        "dtype": {record.params["dtype"] for record in records},
    }
    for what, values in shared.items():
        if len(values) > 1:
            raise ValueError(f"a figure is of one {what}, these records are of {' and '.join(sorted(values))}")


def described(key: Sequence[Any]) -> str:
    """A model and a context, for an error."""
    return f"model {key[0]}, context {key[1]}"


def bars_of(records: Iterable[ResultRecord]) -> list[Bar]:
    """What is drawn of chosen records."""
    return [
        Bar(r.params["model"], r.params["context"], series_of(r), float(r.value), r.params["floor_ms"])
        for r in records
        if not isinstance(r.value, list)
    ]


def caption(records: Sequence[ResultRecord], *, batch: int, trace: str) -> str:
    """Where and when the numbers were measured, and what a floor is. Two lines."""
    first = records[0]
    dates = " and ".join(sorted({record.date[:10] for record in records}))
    commits = " and ".join(sorted({record.commit for record in records}))
    params = first.params
    return (
        f"{first.hardware}, {dates}, torch {first.versions['torch']}, commit {commits}; Qwen3 shapes, random weights, "
        f"{params['dtype']}, batch {batch}, block {params['block_size']}, acceptance forced: {trace}.\n"
        "Floor: the bytes that a step or a cycle must read, at the measured rate of a kernel that only reads. "
        "No bar: not measured."
    )


def draw(records: Sequence[ResultRecord], out: Path, *, batch: int = 1, trace: str = "geometric") -> list[Bar]:
    """Draw the figure of cycle times into an SVG file; what was drawn. `ValueError`: see `chosen`."""
    if out.suffix != ".svg":
        raise ValueError(f"figures are SVG: name a file that ends in .svg, got {out}")
    shown = chosen(records, batch=batch, trace=trace)
    bars = bars_of(shown)
    mpl = load_matplotlib()
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own matplotlibrc says
        mpl.rcParams.update(STYLE)
        figure = figure_of(bars, caption(shown, batch=batch, trace=trace))
        out.parent.mkdir(parents=True, exist_ok=True)
        # No date and no version of the program: the numbers alone decide what is in the file.
        figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return bars


def load_matplotlib() -> Any:
    """The package, which is no dependency of anything else here; `ValueError` says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install 'orthrus-llm[bench]'") from None
    return matplotlib


def figure_of(bars: Sequence[Bar], note: str) -> Any:
    """The figure: a panel for each model, from the fastest to the slowest, all to one scale."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    models = sorted({bar.model for bar in bars}, key=lambda model: min(bar.ms for bar in bars if bar.model == model))
    series = sorted({bar.series for bar in bars}, key=lambda name: (name != PLAIN, "fp8" in name, name))
    figure = Figure(figsize=(max(6.0, 1.2 + 2.8 * len(models)), 4.4), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        draw_panel(panel, [bar for bar in bars if bar.model == model], series)
        panel.set_title(model)
    panels[0].set_ylabel("time (ms)")
    # Not what the panels hold: a series without bars in one of them would lend its neighbour's colour.
    handles = [Patch(color=COLOURS[index], label=name) for index, name in enumerate(series)]
    floor = Line2D([], [], color="black", linewidth=FLOOR_LINE, label="floor")
    figure.legend(handles=[*handles, floor], loc="outside upper center", ncols=len(handles) + 1, frameon=False)
    lines = [line for part in note.splitlines() for line in textwrap.wrap(part, round(17 * figure.get_figwidth()))]
    figure.supxlabel("\n".join(["cached tokens", "", *lines]), fontsize=7)
    return figure


def draw_panel(panel: Any, bars: Sequence[Bar], series: Sequence[str]) -> None:
    """Groups of bars, one for each context, each bar with its value above it and its floor across it."""
    contexts = sorted({bar.context for bar in bars})
    width = 0.84 / len(series)
    for index, name in enumerate(series):
        own = [bar for bar in bars if bar.series == name]
        places = [contexts.index(bar.context) + (index - (len(series) - 1) / 2) * width for bar in own]
        drawn = panel.bar(places, [bar.ms for bar in own], width=width * 0.92, color=COLOURS[index])
        panel.bar_label(drawn, fmt="%.2f", fontsize=6.5, padding=1)
        edges = [place - width * 0.46 for place in places], [place + width * 0.46 for place in places]
        panel.hlines([bar.floor_ms for bar in own], *edges, color="black", linewidth=FLOOR_LINE)
    panel.set_xticks(range(len(contexts)), [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in contexts])
    panel.set_xlim(-0.7, len(contexts) - 0.3)
    panel.spines[["top", "right"]].set_visible(False)


def main(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS.json...", help="Records of benchmarks/cycle.py.")],
    out: Annotated[Path, typer.Option(metavar="FILE.svg", help="Where to draw.")],
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 1,
    trace: Annotated[
        str, typer.Option(help="Acceptance that was forced: geometric, or a number of drafts.")
    ] = "geometric",
) -> None:
    """Draw cycle times and plain steps against their floors; the last line is JSON."""
    try:
        bars = draw([r for path in results for r in read_records(path)], out, batch=batch, trace=trace)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(json.dumps({"written": str(out), "bars": len(bars)}))


if __name__ == "__main__":
    typer.run(main)
