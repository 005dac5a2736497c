"""Figures: what is drawn of which records, that it says where it was measured, and what it refuses."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import typer

from orthrus.evaluation.plots import Bar, chosen, draw, main
from orthrus.evaluation.records import Origin, ResultRecord, write_records

ORIGIN = Origin(
    hardware="NVIDIA H200", versions={"torch": "2.11.0"}, commit="0123456789ab", command="cycle.py",
    date="2026-11-27T00:01:54+00:00",
)  # fmt: skip


def record(value: float, floor: float | None, *, origin: Origin = ORIGIN, **params: Any) -> ResultRecord:
    """A cycle, or a plain step where the trace is "ar"."""
    given: dict[str, Any] = dict(
        model="8b", context=1024, batch=1, block_size=32, trace="geometric", backend="engine", dtype="bfloat16",
        draft_precision=None, floor_ms=floor,
    ) | params  # fmt: skip
    name = "ar_step_ms" if given["trace"] == "ar" else "cycle_ms"
    return ResultRecord.of(origin, name=name, value=value, unit="ms", params=given)


STEP, CYCLE = record(4.625, 3.5, trace="ar"), record(9.75, 7.0)
FP8 = record(7.25, 5.0, draft_precision="fp8")
SMALL = [record(2.5, 1.5, trace="ar", model="1.7b", context=40_960), record(3.125, 2.0, model="1.7b", context=40_960)]
ALL = [STEP, CYCLE, FP8, *SMALL]
OTHERS = [
    record(1.0, 0.5, trace="31"),
    record(1.0, 0.5, batch=4),
    record(1.0, None, backend="portable"),
    dataclasses.replace(CYCLE, name="draft_ms", value=1.0),
    record(99.0, 3.5, trace="ar", draft_precision="fp8"),
]
"""Of other batches, traces, backends and names, and the plain steps that a run with fp8 drafts measures once more."""


def texts(path: Path) -> list[str]:
    """The texts of an SVG file."""
    return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text())


@pytest.mark.parametrize("records", [[*ALL, *OTHERS], [*OTHERS, *ALL]], ids=["others last", "others first"])
def test_a_bar_is_a_record_of_the_engine_at_this_batch_and_trace(tmp_path: Path, records: list[ResultRecord]):
    bars = draw(records, tmp_path / "cycle.svg")
    assert set(bars) == {
        Bar("8b", 1024, "plain step", 4.625, 3.5),
        Bar("8b", 1024, "cycle, bfloat16 drafts", 9.75, 7.0),
        Bar("8b", 1024, "cycle, fp8 drafts", 7.25, 5.0),
        Bar("1.7b", 40_960, "plain step", 2.5, 1.5),
        Bar("1.7b", 40_960, "cycle, bfloat16 drafts", 3.125, 2.0),
    }
    assert len(bars) == 5


def test_plain_steps_of_a_run_with_fp8_drafts_are_taken_where_there_are_no_others():
    step = record(4.5, 3.5, trace="ar", draft_precision="fp8")
    assert chosen([FP8, step], batch=1, trace="geometric") == [FP8, step]


def test_a_figure_says_what_is_drawn_in_which_unit_and_where_it_was_measured(tmp_path: Path):
    draw(ALL, out := tmp_path / "folder" / "cycle.svg")
    found = texts(out)
    labels = {"1.7b", "8b", "1k", "40k", "time (ms)", "plain step", "cycle, bfloat16 drafts", "cycle, fp8 drafts"}
    assert labels | {"floor", "cached tokens"} <= set(found)
    assert {"4.62", "9.75", "7.25", "2.50", "3.12"} <= set(found), "a bar has no number"
    caption = " ".join(found)
    for fact in ("NVIDIA H200", "2026-11-27", "2.11.0", "0123456789ab", "batch 1", "block 32", "geometric"):
        assert fact in caption, f"the caption does not say {fact}"


def rectangles(path: Path, colour: str) -> list[tuple[float, float]]:
    """Top and bottom of what is filled with a colour, in points from the top: the legend's sample, then bars."""
    found = []
    for points in re.findall(rf'd="([^"]+)"[^>]*style="fill: {colour}', path.read_text()):
        y = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", points)][1::2]
        found.append((min(y), max(y)))
    return sorted(found)


def heights(path: Path, colour: str) -> list[float]:
    """Of bars, without the legend's sample, which stands above them all."""
    return [bottom - top for top, bottom in rectangles(path, colour)[1:]]


def test_bars_are_as_high_as_their_times_and_a_series_keeps_its_colour(tmp_path: Path):
    """The panel of 1.7b, the first, has no fp8 bar: it must not lend another one's colour to the legend."""
    draw(ALL, out := tmp_path / "cycle.svg")
    plain, drafted, fp8 = (sorted(heights(out, colour)) for colour in ("#8c8c8c", "#0072b2", "#e69f00"))
    scale = plain[0] / 2.5
    assert plain == pytest.approx([2.5 * scale, 4.625 * scale], rel=1e-3)
    assert drafted == pytest.approx([3.125 * scale, 9.75 * scale], rel=1e-3)
    assert fp8 == pytest.approx([7.25 * scale], rel=1e-3)


def test_a_floor_is_a_line_where_a_bar_of_its_time_would_end(tmp_path: Path):
    draw([STEP, CYCLE], out := tmp_path / "cycle.svg")
    top, bottom = rectangles(out, "#0072b2")[-1]
    scale = (bottom - top) / 9.75
    lines = re.findall(
        r'd="M [\d.]+ ([\d.]+) \s*L [\d.]+ ([\d.]+) \s*"[^>]*stroke: #000000; stroke-width: 1.6', out.read_text()
    )
    level = [float(begin) for begin, end in lines if begin == end]
    assert sorted(bottom - y for y in level) == pytest.approx([3.5 * scale, 7.0 * scale], rel=1e-3)


def test_the_same_records_make_the_same_bytes_whatever_the_users_style_is(tmp_path: Path):
    draw(ALL, first := tmp_path / "first.svg")
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "axes.facecolor": "black"}):
        draw(ALL, second := tmp_path / "second.svg")
        assert matplotlib.rcParams["font.size"] == 20, "the user's style is gone"
    assert first.read_bytes() == second.read_bytes()
    assert "<dc:date>" not in first.read_text(), "the file would change every day"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no cycle_ms of the engine at batch 1 with trace 'geometric'"),
        ([STEP], "no cycle_ms of the engine"),
        ([CYCLE, FP8, *SMALL], "no ar_step_ms of model 8b, context 1024 to compare"),
        ([STEP, record(9.0, None)], "cycle_ms of model 8b, context 1024 has no floor_ms"),
        ([STEP, CYCLE, record(9.5, 7.0)], "cycle_ms of model 8b, context 1024 is there twice"),
        ([STEP, record(9.5, 7.0, origin=dataclasses.replace(ORIGIN, hardware="NVIDIA H100"))], "H100 and NVIDIA H200"),
        (
            [STEP, CYCLE, *(record(2.0, 1.0, model="4b", trace=t, block_size=8) for t in ("ar", "geometric"))],
            "32 and 8",
        ),
    ],
    ids=["nothing", "no cycle", "no plain step", "no floor", "two runs", "two machines", "two block sizes"],
)
def test_records_that_make_no_figure_are_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], records: list[ResultRecord], message: str
):
    (path := tmp_path / "results.json").write_text(json.dumps([dataclasses.asdict(r) for r in records]))
    with pytest.raises(typer.Exit) as exit:
        main([path], tmp_path / "cycle.svg")
    assert exit.value.exit_code == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and not out
    assert not (tmp_path / "cycle.svg").exists()


def test_a_figure_is_drawn_from_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parts = {"one.json": [STEP, CYCLE], "two.json": [FP8]}
    paths = [write_records(records, tmp_path / name, theme="cycle") for name, records in parts.items()]
    main(paths, tmp_path / "cycle.svg")
    assert json.loads(capsys.readouterr().out) == {"written": str(tmp_path / "cycle.svg"), "bars": 3}
    assert (tmp_path / "cycle.svg").exists()


def test_figures_are_svg(tmp_path: Path):
    with pytest.raises(ValueError, match="ends in .svg, got .*figure.png"):
        draw(ALL, tmp_path / "figure.png")


def test_without_matplotlib_an_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'orthrus-llm\[bench\]'"):
        draw(ALL, tmp_path / "cycle.svg")
