"""A training row as a person can check it: its documents, its replies, where blocks start and what they may draft.

Most mistakes in training data (a template without its replies, an anchor in the question, documents that see one
another) cost acceptance and nothing else, so they are found by looking or not at all.
"""

from collections.abc import Iterator
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from orthrus.model.masks import block_training_mask, document_mask
from orthrus.training.anchors import Blocks
from orthrus.training.rows import PADDING, Rows

PLAIN, REPLY, DRAFTED, ANCHOR, EDGE = "dim", "cyan", "green", "bold reverse yellow", "bold magenta"
MARKS = {REPLY: "{}", DRAFTED: "()", ANCHOR: "[]"}
"""What stands around a run of such tokens where there is no colour to tell them."""
PICTURE = 48
"""Rows and columns of the mask's picture, at most."""


def inspect_row(
    rows: Rows, tokenizer: Any, blocks: Blocks, anchors_BA: Tensor, *, row: int = 0, coloured: bool = True
) -> Text:
    """One of the rows as text: a summary, its tokens by what they are to training, and the mask.

    Without colour the marks of `MARKS` stand around the tokens instead. `anchors_BA` are the rows' anchors.
    """
    one = slice(row, row + 1)
    alone = Rows(rows.ids_BT[one].cpu(), rows.document_BT[one].cpu(), rows.reply_BT[one].cpu(), rows.isolated)
    blocks, anchors_1A = Blocks.of(blocks.groups), anchors_BA[one].cpu()
    text = Text()
    summarise(text, alone, blocks, anchors_1A)
    text.append("\n")
    show_tokens(text, alone, tokenizer, kinds(alone, blocks, anchors_1A), coloured=coloured)
    text.append("\n\n")
    show_mask(text, alone, blocks, anchors_1A)
    return text


def kinds(rows: Rows, blocks: Blocks, anchors_1A: Tensor) -> list[str]:
    """What each token of a single row is: an anchor, drafted by some block, of a reply, or none of these. [T]."""
    supervised_Q = blocks.supervised(rows.reply_BT, anchors_1A)[0]
    targets = set((blocks.places(anchors_1A)[0] + 1)[supervised_Q].tolist())
    usable = rows.anchorable_BT[0]
    anchors = {place for place in anchors_1A[0].tolist() if usable[place]}
    found = []
    for place, reply in enumerate(rows.reply_BT[0].tolist()):
        is_drafted = DRAFTED if place in targets else REPLY if reply else PLAIN
        found.append(ANCHOR if place in anchors else is_drafted)
    return found


def summarise(text: Text, rows: Rows, blocks: Blocks, anchors_1A: Tensor) -> None:
    """How much of what a row holds."""
    document_T, reply_T = rows.document_BT[0], rows.reply_BT[0]
    used, num_replies = int((document_T != PADDING).sum()), int(reply_T.max())
    supervised = int(blocks.supervised(rows.reply_BT, anchors_1A).sum())
    drafts = int((~blocks.is_last_Q).sum())
    text.append(
        f"{len(document_T)} tokens: {used} in {int(document_T.max()) + 1} documents "
        f"({'isolated' if rows.isolated else 'one text, which sees itself'}), {len(document_T) - used} padding; "
        f"{int((reply_T > 0).sum())} in {num_replies} replies\n"
        f"{anchors_1A.shape[1]} blocks of {', '.join(f'{count} x {width}' for width, count in blocks.groups)}: "
        f"{supervised} of {drafts} drafts have a target in the reply of their anchor\n"
    )
    for label, style in (("anchor", ANCHOR), ("drafted", DRAFTED), ("of a reply, not drafted", REPLY)):
        text.append(f"{label} {MARKS[style]}  ", style)
    text.append("no reply", PLAIN)


def show_tokens(text: Text, rows: Rows, tokenizer: Any, kind_of: list[str], *, coloured: bool) -> None:
    """The row's tokens, a heading before each document; runs of one kind are decoded together."""
    for document, start, end in runs(rows.document_BT[0]):
        if document == PADDING:
            text.append(f"\n--- padding, {end - start} tokens ---\n", EDGE)
            continue
        text.append(f"\n--- document {document}, tokens {start} .. {end - 1} ---\n", EDGE)
        while start < end:
            kind, stop = kind_of[start], start + 1
            # Anchors stand alone: two that touch are two.
            while stop < end and kind_of[stop] == kind != ANCHOR:
                stop += 1
            piece = tokenizer.decode(rows.ids_BT[0, start:stop].tolist(), skip_special_tokens=False)
            before, after = MARKS.get(kind, ("", "")) if not coloured else ("", "")
            text.append(f"{before}{piece}{after}", kind if coloured else "")
            start = stop


def runs(values_T: Tensor) -> Iterator[tuple[int, int, int]]:
    """(value, start, end) of every run of equal values."""
    values, start = values_T.tolist(), 0
    for place in range(1, len(values) + 1):
        if place == len(values) or values[place] != values[start]:
            yield values[start], start, place
            start = place


def show_mask(text: Text, rows: Rows, blocks: Blocks, anchors_1A: Tensor) -> None:
    """A picture of both passes' masks, made of the masks themselves and shrunk to fit.

    Rows are queries, columns are keys; the right part of the second picture is the blocks' own keys.
    """
    num_clean = rows.ids_BT.shape[1]
    document_BT = rows.document_BT if rows.isolated else None
    clean = document_mask(rows.document_BT if rows.isolated else torch.zeros_like(rows.document_BT))[0]
    drafted = block_training_mask(anchors_1A, blocks.block_Q, num_clean, document_BT)[0]
    step, block_step = -(-num_clean // PICTURE), -(-len(blocks.block_Q) // PICTURE)
    text.append(f"who sees whom ('#' all, '+' some, '.' none; a character is {step} x {step} tokens)\n", EDGE)
    text.append("AR view, over the row:\n")
    for line in picture(clean, step, step):
        text.append(line + "\n")
    text.append(f"blocks ({block_step} positions a character), over the row | over the blocks:\n")
    over_row, over_blocks = drafted[:, :num_clean], drafted[:, num_clean:]
    parts = (picture(over_row, block_step, step), picture(over_blocks, block_step, block_step))
    for left, right in zip(*parts, strict=True):
        text.append(f"{left} | {right}\n")


def picture(mask_QK: Tensor, step_q: int, step_k: int) -> list[str]:
    """A boolean mask as lines of characters, each for a cell of step_q x step_k entries."""
    lines: list[str] = []
    for start in range(0, len(mask_QK), step_q):
        cells = mask_QK[start : start + step_q].float().mean(dim=0).split(step_k)
        shares = [float(cell.mean()) for cell in cells]
        lines.append("".join("#" if share == 1 else "+" if share > 0 else "." for share in shares))
    return lines
