"""Rows: positions, places of anchors, and that no block reaches out of the reply of its anchor."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus.training.anchors import Blocks
from orthrus.training.rows import PADDING, Rows, one_reply_rows

BLOCKS = Blocks.of(((6, 3), (3, 5)))


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Rows of 24 tokens: documents of any length, in each any replies, which may touch; padding behind."""
    document, reply = [], []
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
        documents = [number for number, length in enumerate(lengths) for _ in range(length)][:24]
        documents += [PADDING] * (24 - len(documents))
        starts = draw(st.lists(st.booleans(), min_size=24, max_size=24))
        in_reply = draw(st.lists(st.booleans(), min_size=24, max_size=24))
        replies, number = [], 0
        for t in range(24):
            fresh = t == 0 or starts[t] or documents[t] != documents[t - 1]
            inside = (in_reply[t] if fresh else replies[-1] > 0) and documents[t] != PADDING
            number += inside and fresh
            replies.append(number if inside else 0)
        document.append(documents)
        reply.append(replies)
    document_BT, reply_BT = torch.tensor(document), torch.tensor(reply)
    return Rows(torch.randint(0, 90, document_BT.shape), document_BT, reply_BT)


@given(rows())
@settings(max_examples=100, deadline=None)
def test_positions_count_from_the_start_of_each_document(some: Rows) -> None:
    for b in range(len(some)):
        counted, before = [], None
        for document in some.document_BT[b].tolist():
            counted.append(counted[-1] + 1 if document == before else 0)
            before = document
        assert some.positions_BT[b].tolist() == counted


@given(rows(), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_anchors_and_targets_stay_in_one_reply_of_one_document(some: Rows, seed: int) -> None:
    anchors = BLOCKS.sample(some.anchorable_BT, torch.Generator().manual_seed(seed))
    supervised, reply, document = BLOCKS.supervised(some.reply_BT, anchors), some.reply_BT, some.document_BT
    for b in range(len(some)):
        usable = [t for t in range(23) if reply[b, t] and reply[b, t] == reply[b, t + 1]]
        assert some.anchorable_BT[b].nonzero()[:, 0].tolist() == usable
        if not usable:
            assert not supervised[b].any(), "a row without a reply must have no weight"
            continue
        assert set(anchors[b].tolist()) <= set(usable)
        widths = [width for width, count in BLOCKS.groups for _ in range(count)]
        blocks = list(zip(widths, anchors[b].tolist(), strict=True))
        for q in range(len(BLOCKS.block_Q)):
            block = int(BLOCKS.block_Q[q])
            anchor = blocks[block][1]
            target = anchor + int(BLOCKS.offset_Q[q]) + 1
            inside = target < 24 and reply[b, target] == reply[b, anchor] and not BLOCKS.is_last_Q[q]
            inside = inside and blocks[block] not in blocks[:block]  # of copies one has weight
            assert supervised[b, q] == inside
            if inside:
                assert document[b, target] == document[b, anchor] != PADDING
        firsts = supervised[b][BLOCKS.offset_Q == 0]
        assert int(firsts.sum()) == len(set(blocks)), "the first draft of a block always has a target"


def test_rows_of_one_reply_are_one_document() -> None:
    some = one_reply_rows(torch.zeros(2, 6, dtype=torch.int16), torch.tensor([1, 4]), torch.tensor([6, 5]))
    assert some.reply_BT.tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]]
    assert some.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5]] * 2 and some.ids_BT.dtype == torch.long
    assert torch.equal(Rows(some.ids_BT, some.document_BT, some.reply_BT).positions_BT, some.positions_BT)


def test_rows_keep_what_they_are_on_their_way_to_a_device() -> None:
    some = one_reply_rows(torch.zeros(2, 6, dtype=torch.long), torch.tensor([1, 4]), torch.tensor([6, 5]))
    assert some.to("cpu").isolated is False and len(some.to("cpu")) == 2
