"""A row shown to a person says what training does with it."""

import io

import torch
from rich.console import Console

from orthrus.training.anchors import Blocks
from orthrus.training.inspect import ANCHOR, DRAFTED, PLAIN, REPLY, inspect_row, picture
from orthrus.training.rows import PADDING, Rows
from tests.training.chat import tokenizer

BLOCKS = Blocks.of(((4, 1), (3, 1)))


def example() -> tuple[Rows, torch.Tensor]:
    """Two documents, `a b` asked and `c d e f` replied in each, then padding; blocks at the first c and the last e."""
    words = [tokenizer()(f" {letter}")["input_ids"] for letter in "abcdef"]
    assert all(len(word) == 1 for word in words)
    ids = [word[0] for word in words] * 2 + [0, 0]
    document = [0] * 6 + [1] * 6 + [PADDING] * 2
    reply = [0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0]
    return Rows(torch.tensor([ids]), torch.tensor([document]), torch.tensor([reply])), torch.tensor([[2, 10]])


def test_every_token_is_shown_as_what_it_is() -> None:
    rows, anchors = example()
    plain = inspect_row(rows, tokenizer(), BLOCKS, anchors, coloured=False).plain
    assert "--- document 0, tokens 0 .. 5 ---\n a b[ c]( d e f)\n" in plain
    assert "--- document 1, tokens 6 .. 11 ---\n a b{ c d}[ e]( f)\n" in plain
    assert "--- padding, 2 tokens ---" in plain
    assert "14 tokens: 12 in 2 documents (isolated), 2 padding; 8 in 2 replies" in plain
    assert "4 of 5 drafts have a target" in plain, "the second block overhangs its reply by one draft"


def test_colours_say_the_same() -> None:
    rows, anchors = example()
    text = inspect_row(rows, tokenizer(), BLOCKS, anchors)
    start = text.plain.index("--- document 0")
    styled = [(text.plain[s.start : s.end], s.style) for s in text.spans if s.start > start]
    kinds = [(piece, style) for piece, style in styled if style in (PLAIN, REPLY, DRAFTED, ANCHOR)]
    assert kinds == [
        (" a b", PLAIN), (" c", ANCHOR), (" d e f", DRAFTED),
        (" a b", PLAIN), (" c d", REPLY), (" e", ANCHOR), (" f", DRAFTED),
    ]  # fmt: skip
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=120).print(text)
    assert "\x1b[32m d e f" in out.getvalue()


def test_the_mask_is_drawn_from_the_masks_themselves() -> None:
    rows, anchors = example()
    lines = inspect_row(rows, tokenizer(), BLOCKS, anchors, coloured=False).plain.splitlines()
    start = lines.index("AR view, over the row:") + 1
    truth = [[k <= q and rows.document_BT[0, q] == rows.document_BT[0, k] for k in range(14)] for q in range(14)]
    assert lines[start : start + 14] == ["".join("#" if seen else "." for seen in row) for row in truth]
    first, second = "##............ | ####...", "......####.... | ....###"
    assert lines[start + 15 :] == [first] * 4 + [second] * 3
    whole = Rows(rows.ids_BT, torch.zeros_like(rows.document_BT), rows.reply_BT, isolated=False)
    assert "##########.... | ....###" in inspect_row(whole, tokenizer(), BLOCKS, anchors).plain


def test_a_row_of_a_batch_is_the_row_alone_and_a_row_without_anchors_has_none() -> None:
    rows, anchors = example()
    silent = torch.zeros_like(rows.reply_BT)
    both = Rows(rows.ids_BT.repeat(2, 1), rows.document_BT.repeat(2, 1), torch.cat([silent, rows.reply_BT]))
    anchors_2 = torch.cat([torch.tensor([[3, 4]]), anchors])
    assert (
        inspect_row(both, tokenizer(), BLOCKS, anchors_2, row=1).plain
        == inspect_row(rows, tokenizer(), BLOCKS, anchors).plain
    )
    assert "[" not in inspect_row(both, tokenizer(), BLOCKS, anchors_2, coloured=False).plain.split("---")[2]


def test_pictures_shrink() -> None:
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    assert picture(mask, 1, 1) == ["#....", "##...", "###..", "####.", "#####"]
    assert picture(mask, 2, 2) == ["+..", "#+.", "###"]
