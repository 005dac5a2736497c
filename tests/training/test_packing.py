"""Packing: nothing lost, nothing twice, and every row says who belongs to whom."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus.training.documents import DataSettings, Document
from orthrus.training.packing import OPEN_ROWS, PackedRow, isolated_rows, pack
from orthrus.training.rows import PADDING

WIDTH = 10


def data(**fields: Any) -> DataSettings:
    return DataSettings(source="x", row_tokens=WIDTH, **fields)


def document(number: int, replies: list[int]) -> Document:
    """Tokens 100 * number, 100 * number + 1, ...: each names its document and place."""
    return Document(np.arange(len(replies), dtype=np.int32) + 100 * number, np.array(replies, dtype=np.int16))


@st.composite
def documents(draw: st.DrawFn) -> list[Document]:
    """Documents with an anchor each; shorter than, as long as and longer than a row."""
    made = []
    for number in range(draw(st.integers(1, 12))):
        if draw(st.booleans()):  # a plain text: one reply, numbered as its neighbour's
            made.append(document(number + 1, [1] * draw(st.integers(2, 25))))
            continue
        lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
        replies = [turn // 2 + 1 if turn % 2 else 0 for turn, length in enumerate([*lengths, 3]) for _ in range(length)]
        made.append(document(number + 1, [*replies, 7, 7]))
    return made


def spans(row: PackedRow) -> list[list[int]]:
    """The tokens of each reply of a row."""
    return [row.ids[row.reply == number].tolist() for number in range(1, int(row.reply.max()) + 1)]


def reply_spans(some: Document) -> list[list[int]]:
    """The tokens of each reply of a document: runs of one number."""
    edges = [0, *(np.flatnonzero(np.diff(some.reply)) + 1).tolist(), len(some)]
    runs = zip(edges[:-1], edges[1:], strict=True)
    return [some.ids[start:end].tolist() for start, end in runs if some.reply[start] > 0]


@given(documents())
@settings(max_examples=100, deadline=None)
def test_isolated_rows_hold_whole_documents_once(some: list[Document]) -> None:
    counts: Counter[str] = Counter()
    rows = list(pack(iter(some), data(long_documents="drop"), counts))
    fitting = [d for d in some if len(d) <= WIDTH]
    found = []
    for row in rows:
        for number in range(int(row.document.max()) + 1):
            places = np.flatnonzero(row.document == number)
            assert places.tolist() == list(range(places[0], places[-1] + 1)), "a document must be in one piece"
            found.append(row.ids[places].tolist())
        used = int((row.document != PADDING).sum())
        assert (row.document[:used] >= 0).all() and not row.reply[used:].any(), "padding stands behind all documents"
    assert sorted(found) == sorted(d.ids.tolist() for d in fitting)
    assert sorted(s for row in rows for s in spans(row)) == sorted(s for d in fitting for s in reply_spans(d))
    assert counts["documents_dropped"] == len(some) - len(fitting) and counts["rows"] == len(rows)
    assert counts["tokens"] == sum(map(len, fitting))


@given(documents())
@settings(max_examples=100, deadline=None)
def test_long_documents_are_cut_into_pieces_that_have_a_reply(some: list[Document]) -> None:
    counts: Counter[str] = Counter()
    rows = list(pack(iter(some), data(), counts))
    pieces = [d.piece(start, start + WIDTH) for d in some for start in range(0, len(d), WIDTH)]
    kept = [piece.ids.tolist() for piece in pieces if piece.has_anchor or len(piece) == 0]
    found = [row.ids[row.document == n].tolist() for row in rows for n in range(int(row.document.max()) + 1)]
    assert sorted(found) == sorted(kept) and counts["pieces_without_reply"] == len(pieces) - len(kept)
    assert counts["documents_cut"] == sum(len(d) > WIDTH for d in some)


@given(documents())
@settings(max_examples=100, deadline=None)
def test_concatenated_rows_are_one_text_cut_where_a_row_ends(some: list[Document]) -> None:
    counts: Counter[str] = Counter()
    rows = list(pack(iter(some), data(packing="concatenated"), counts))
    text = np.concatenate([d.ids for d in some]).tolist()
    assert np.concatenate([row.ids for row in rows]).tolist()[: len(text)] == text
    assert len(rows) == -(-len(text) // WIDTH), "only the last row is padded"
    for number, row in enumerate(rows):
        used = min(WIDTH, len(text) - number * WIDTH)
        assert row.document.tolist() == [0] * used + [PADDING] * (WIDTH - used), "the whole row is one document"
        for span in spans(row):
            assert len({i // 100 for i in span}) == 1, "a reply must not run into the next document"
    whole = list(pack(iter(some), data(packing="concatenated", anchors="all"), Counter()))
    assert all((row.reply == (row.document == 0)).all() for row in whole), "as published: anchors anywhere in the row"


def test_best_fit_fills_rows_and_a_full_house_gives_up_its_fullest() -> None:
    some = [document(n, [1] * length) for n, length in enumerate((6, 7, 3, 4, 2), start=1)]
    rows = [[len(d) for d in row] for row in isolated_rows(some, WIDTH)]
    assert rows == [[7, 3], [6, 4], [2]], "3 leaves less room behind 7 than behind 6"
    many = [document(n, [1] * (9 if n == 5 else 8)) for n in range(OPEN_ROWS + 1)]
    first, *rest = isolated_rows(many, WIDTH)
    assert [len(d) for d in first] == [9] and len(rest) == OPEN_ROWS


def test_no_more_rows_than_asked_for() -> None:
    counts: Counter[str] = Counter()
    some = (document(n, [1] * 9) for n in range(1000))
    assert len(list(pack(some, data(max_rows=3), counts))) == 3 == counts["rows"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataSettings(source=""), "data.source is empty"),
        (lambda: DataSettings(source="x", row_tokens=1), "data.row_tokens must be 2 .. 32767, got 1"),
        (lambda: DataSettings(source="x", row_tokens=40000), "data.row_tokens"),
        (lambda: DataSettings(source="x", max_rows=0), "data.max_rows"),
    ],
)
def test_impossible_settings_are_refused_by_name(make: Callable[[], DataSettings], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
