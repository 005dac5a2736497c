"""Documents into rows of one length.

*Isolated* rows hold whole documents, each put where it leaves the least room; what is left of a row is padding.
*Concatenated* rows are one endless text, cut where a row ends, as the published recipe has it.

    T = tokens of a row
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from orthrus.training.documents import DataSettings, Document
from orthrus.training.rows import PADDING

OPEN_ROWS = 64
"""Rows that are being filled at one time: enough that most find a document of the length they lack."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A row as `rows.Rows` has it: ids [T] int32, document [T] int16, reply [T] int16."""

    ids: np.ndarray
    document: np.ndarray
    reply: np.ndarray


def pack(documents: Iterable[Document], settings: DataSettings, counts: Counter[str]) -> Iterator[PackedRow]:
    """Rows of `settings.row_tokens` tokens, at most `max_rows`; what was cut, dropped and padded is counted."""
    rows_of = isolated_rows if settings.packing == "isolated" else concatenated_rows
    fitting = fit(documents, settings, counts)
    for number, pieces in enumerate(rows_of(fitting, settings.row_tokens), start=1):
        row = lay_out(pieces, settings)
        counts["rows"] += 1
        counts["tokens"] += int((row.document != PADDING).sum())
        counts["reply_tokens"] += int((row.reply > 0).sum())
        yield row
        if number == settings.max_rows:
            return


def fit(documents: Iterable[Document], settings: DataSettings, counts: Counter[str]) -> Iterator[Document]:
    """Documents that are no longer than a row, where that matters: longer ones cut or dropped."""
    width = settings.row_tokens
    for document in documents:
        if len(document) <= width:
            yield document
        elif settings.long_documents == "drop":
            counts["documents_dropped"] += 1
        else:
            counts["documents_cut"] += 1
            if settings.packing == "concatenated":  # which cuts where a row ends, and nowhere else
                yield document
                continue
            for start in range(0, len(document), width):
                piece = document.piece(start, start + width)
                if piece.has_anchor:
                    yield piece
                else:
                    counts["pieces_without_reply"] += 1


def isolated_rows(documents: Iterable[Document], width: int) -> Iterator[list[Document]]:
    """The documents of each row, by best fit among the rows that are being filled."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in documents:
        fitting = [(left, number) for number, left in enumerate(room) if left >= len(document)]
        if fitting:
            _, number = min(fitting)
        else:
            if len(rows) == OPEN_ROWS:
                fullest = room.index(min(room))
                del room[fullest]
                yield rows.pop(fullest)
            number = len(rows)
            rows.append([])
            room.append(width)
        rows[number].append(document)
        room[number] -= len(document)
        if not room[number]:
            del room[number]
            yield rows.pop(number)
    yield from rows


def concatenated_rows(documents: Iterable[Document], width: int) -> Iterator[list[Document]]:
    """The pieces of documents in each row, one document right behind the other."""
    row: list[Document] = []
    room = width
    for document in documents:
        start = 0
        while len(document) - start >= room:
            yield [*row, document.piece(start, start + room)]
            start, row, room = start + room, [], width
        if start < len(document):
            row.append(document.piece(start, len(document)))
            room -= len(row[-1])
    if row:
        yield row


def lay_out(pieces: list[Document], settings: DataSettings) -> PackedRow:
    """One row of pieces and padding, its documents numbered from 0 and its replies from 1."""
    width = settings.row_tokens
    ids, document = np.zeros(width, dtype=np.int32), np.full(width, PADDING, dtype=np.int16)
    reply = np.zeros(width, dtype=np.int16)
    used = sum(len(piece) for piece in pieces)
    ids[:used] = np.concatenate([piece.ids for piece in pieces])
    piece_of = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    document[:used] = piece_of if settings.packing == "isolated" else 0
    if settings.packing == "concatenated" and settings.anchors == "all":
        reply[:used] = 1  # one text, all of it the reply: blocks may run from one document into the next
    else:
        replies = np.concatenate([piece.reply for piece in pieces])
        begins = replies > 0
        begins[1:] &= (replies[1:] != replies[:-1]) | (piece_of[1:] != piece_of[:-1])
        reply[:used] = np.where(replies > 0, np.cumsum(begins), 0)
    return PackedRow(ids, document, reply)
