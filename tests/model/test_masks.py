"""Every mask against the sentence that defines it, element by element."""

import itertools

import pytest
import torch

from orthrus.model.masks import (
    block_training_intervals,
    block_training_mask,
    document_intervals,
    document_mask,
    draft_mask,
    verify_mask,
)


@pytest.mark.parametrize("num_queries", [1, 2, 5])
def test_draft_mask_shows_prefix_and_whole_block(num_queries: int):
    lengths, widths, num_slots = [0, 3, 7, 7], [num_queries, 1, num_queries, 1], 13
    mask = draft_mask(torch.tensor(lengths), torch.tensor(widths), num_queries, num_slots)
    assert mask.shape == (4, num_queries, num_slots) and mask.dtype == torch.bool
    for b, q, s in itertools.product(range(4), range(num_queries), range(num_slots)):
        in_prefix = s < lengths[b]
        in_block = lengths[b] <= s < lengths[b] + widths[b]
        truth = in_prefix or in_block
        assert mask[b, q, s] == truth, f"row {b}, query {q}, slot {s}: the block must be seen both ways, whatever q"


def test_draft_mask_leaves_no_softmax_row_empty():
    mask = draft_mask(torch.tensor([0, 4]), torch.tensor([1, 1]), 6, 12)
    assert mask.any(dim=2).all(), "a padding query without keys gives NaN, which spreads"


@pytest.mark.parametrize("num_queries", [1, 2, 5])
def test_verify_mask_is_causal_from_each_rows_own_length(num_queries: int):
    lengths, num_slots = [0, 1, 6, 8], 14
    mask = verify_mask(torch.tensor(lengths), num_queries, num_slots)
    assert mask.shape == (4, num_queries, num_slots) and mask.dtype == torch.bool
    for b, q, s in itertools.product(range(4), range(num_queries), range(num_slots)):
        position = lengths[b] + q  # of the query; slots are positions
        assert mask[b, q, s] == (s <= position), f"row {b}, query {q}, slot {s}: shorter rows must not see further"


def test_verify_mask_of_one_query_is_plain_decoding():
    assert verify_mask(torch.tensor([3]), 1, 6).tolist() == [[[True] * 4 + [False] * 2]]


@pytest.mark.parametrize("widths", [(2, 2, 2), (4, 4, 4), (4, 2, 3)])
@pytest.mark.parametrize("documents", [None, [[0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 2, 2]]])
def test_training_mask_shows_tokens_before_the_anchor_and_the_own_block(widths: tuple, documents: list | None):
    anchors, num_clean = [[0, 2, 5], [4, 4, 8]], 9
    document = torch.tensor(documents) if documents is not None else None
    block = [number for number, width in enumerate(widths) for _ in range(width)]
    mask = block_training_mask(torch.tensor(anchors), torch.tensor(block), num_clean, document)
    num_queries = len(block)
    assert mask.shape == (2, num_queries, num_clean + num_queries) and mask.dtype == torch.bool
    for b, q, k in itertools.product(range(2), range(num_queries), range(num_clean + num_queries)):
        anchor = anchors[b][block[q]]
        if k < num_clean:
            truth = k < anchor and (documents is None or documents[b][k] == documents[b][anchor])
        else:
            truth = block[k - num_clean] == block[q]
        assert mask[b, q, k] == truth, f"row {b}, query {q}, key {k}, anchor {anchor}"


@pytest.mark.parametrize("documents", [None, [[0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 2, -1, -1]]])
@pytest.mark.parametrize("widths", [(4, 2, 3), (2, 2, 2), (1, 5, 1)])
def test_training_intervals_are_the_training_mask(widths: tuple, documents: list | None):
    anchors, num_clean = torch.tensor([[0, 2, 5], [4, 4, 8]]), 9
    document = torch.tensor(documents) if documents is not None else None
    block = torch.tensor([number for number, width in enumerate(widths) for _ in range(width)])
    offset = torch.tensor([place for width in widths for place in range(width)])
    mask = block_training_intervals(anchors, block, offset, document).mask(num_clean)
    dense = block_training_mask(anchors, block, num_clean, document)
    assert torch.equal(mask, dense), "GPU and CPU train different views"
    assert dense.any(dim=2).all(), "a query without keys gives NaN, which spreads"


DOCUMENTS = [[0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 2, -1, -1], [-1, -1, -1, -1, -1, -1, -1]]


def test_document_mask_is_causal_within_each_document():
    mask = document_mask(torch.tensor(DOCUMENTS))
    assert mask.shape == (3, 7, 7) and mask.dtype == torch.bool
    for b, q, k in itertools.product(range(3), range(7), range(7)):
        truth = k <= q and DOCUMENTS[b][k] == DOCUMENTS[b][q]
        assert mask[b, q, k] == truth, f"row {b}, query {q}, key {k}: documents of a row are strangers"
    assert mask.any(dim=2).all(), "a query without keys gives NaN, which spreads; padding too must see something"
    assert torch.equal(mask[0], verify_mask(torch.tensor([0]), 7, 7)[0]), "one document is plain causal attention"


def test_document_intervals_are_the_document_mask():
    document = torch.tensor(DOCUMENTS)
    mask = document_intervals(document).mask(7)
    assert torch.equal(mask, document_mask(document)), "GPU and CPU train different views"


def test_training_mask_hides_the_clean_anchor_from_its_own_block():
    mask = block_training_mask(torch.tensor([[3]]), torch.tensor([0, 0]), 6)
    assert not mask[0, :, 3].any(), "the anchor is in the block; seen twice, it would be counted twice"


def test_training_mask_of_a_block_is_the_draft_mask_of_its_anchor():
    block_size, num_clean = 4, 10
    for anchor in range(num_clean - block_size):
        train = block_training_mask(torch.tensor([[anchor]]), torch.zeros(block_size, dtype=torch.long), num_clean)[0]
        seen = torch.cat([train[:, :anchor], train[:, num_clean:]], dim=1)
        draft = draft_mask(torch.tensor([anchor]), torch.tensor([block_size]), block_size, anchor + block_size)[0]
        assert torch.equal(seen, draft), "training and decoding must ask the view the same question"
        assert not train[:, anchor:num_clean].any()
