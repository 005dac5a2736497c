"""Who may see whom: every attention mask of the method, as pure functions of lengths and anchors.

A wrong draft mask never corrupts text, it only lowers acceptance, so each mask here is proved element by element
against the sentence in its docstring (tests/model/test_masks.py). True means visible.

    B = rows, Q = queries of a pass, S = cache slots, T = clean tokens of a training row, A = anchors (blocks) of one
"""

from typing import NamedTuple

import torch
from torch import Tensor


def draft_mask(lengths_B: Tensor, widths_B: Tensor, num_queries: int, num_slots: int) -> Tensor:
    """visible[b, q, s] = s < lengths[b] + widths[b]: all of the prefix and the whole block, both ways. [B, Q, S].

    `widths_B` is the number of block positions row b really drafts (anchor included); queries beyond it are padding
    and see the same keys, so no row of the softmax is empty.
    """
    slots_S = torch.arange(num_slots, device=lengths_B.device)
    visible_BS = slots_S < (lengths_B + widths_B)[:, None]
    return visible_BS[:, None, :].expand(-1, num_queries, -1)


def verify_mask(lengths_B: Tensor, num_queries: int, num_slots: int) -> Tensor:
    """visible[b, q, s] = s <= lengths[b] + q: causal over the prefix and the block's own positions. [B, Q, S].

    Prefill is the same mask: its queries start at slot lengths[b] too.
    """
    slots_S = torch.arange(num_slots, device=lengths_B.device)
    queries_Q = torch.arange(num_queries, device=lengths_B.device)
    last_BQ = lengths_B[:, None] + queries_Q
    return slots_S <= last_BQ[:, :, None]


def document_mask(document_BT: Tensor) -> Tensor:
    """visible[b, q, k] = k <= q and document[b, k] == document[b, q]: causal within the document. [B, T, T].

    Padding is a document like any other here: each of its tokens sees itself, so no row of the softmax is empty.
    """
    places_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    return (places_T <= places_T[:, None]) & (document_BT[:, None, :] == document_BT[:, :, None])


def block_training_mask(
    anchors_BA: Tensor, block_Q: Tensor, num_clean: int, document_BT: Tensor | None = None
) -> Tensor:
    """visible[b, q, k] for queries of all blocks over keys [T clean tokens ; Q block positions]. [B, Q, T+Q].

    For k < T: k < anchors[b, block[q]] (and, where documents are given, in the anchor's own). Otherwise: block[k - T]
    == block[q], where block[q] is the block that position q belongs to. (method.md section 5: strictly before the
    anchor, and the whole own block.)
    """
    clean_T = torch.arange(num_clean, device=anchors_BA.device)
    sees_clean_BQT = clean_T < anchors_BA[:, block_Q][:, :, None]
    if document_BT is not None:
        document_of_query_BQ = document_BT.gather(1, anchors_BA)[:, block_Q]
        sees_clean_BQT = sees_clean_BQT & (document_BT[:, None, :] == document_of_query_BQ[:, :, None])
    sees_block_QQ = block_Q[:, None] == block_Q[None, :]
    return torch.cat([sees_clean_BQT, sees_block_QQ.expand(len(anchors_BA), -1, -1)], dim=2)


class Intervals(NamedTuple):
    """A mask of training as numbers: query q of row b sees clean tokens first .. stop - 1 and block positions own_first
    .. own_stop - 1, neither where a pass has no blocks. int32.

    A block sees itself both ways, so own_first and own_stop are also the queries that see position q.
    """

    first_BQ: Tensor
    stop_BQ: Tensor
    own_first_Q: Tensor | None = None
    own_stop_Q: Tensor | None = None

    def mask(self, num_clean: int) -> Tensor:
        """The same as booleans over [clean tokens ; block positions]. [B, Q, T] or [B, Q, T + Q]."""
        clean_T = torch.arange(num_clean, device=self.first_BQ.device)
        sees_clean_BQT = (clean_T >= self.first_BQ[..., None]) & (clean_T < self.stop_BQ[..., None])
        if self.own_first_Q is None or self.own_stop_Q is None:
            return sees_clean_BQT
        places_Q = torch.arange(len(self.own_first_Q), device=clean_T.device)
        sees_block_QQ = (places_Q >= self.own_first_Q[:, None]) & (places_Q < self.own_stop_Q[:, None])
        return torch.cat([sees_clean_BQT, sees_block_QQ.expand(len(sees_clean_BQT), -1, -1)], dim=2)


def document_starts(document_BT: Tensor) -> Tensor:
    """Where the document of each token begins in its row; the tokens of a document stand together. [B, T]."""
    places_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    starts_BT = torch.zeros_like(document_BT)
    starts_BT[:, 1:] = places_T[1:] * (document_BT[:, 1:] != document_BT[:, :-1])
    return starts_BT.cummax(dim=1).values


def document_intervals(document_BT: Tensor) -> Intervals:
    """`document_mask` as intervals: from the beginning of a token's document up to itself."""
    stop_T = torch.arange(1, document_BT.shape[1] + 1, device=document_BT.device)
    return Intervals(document_starts(document_BT).int(), stop_T.expand_as(document_BT).int().contiguous())


def block_training_intervals(
    anchors_BA: Tensor, block_Q: Tensor, offset_Q: Tensor, document_BT: Tensor | None = None
) -> Intervals:
    """`block_training_mask` as intervals. `offset_Q` is the place of each position in its block."""
    starts_BA = (
        torch.zeros_like(anchors_BA) if document_BT is None else document_starts(document_BT).gather(1, anchors_BA)
    )
    own_first_Q = torch.arange(len(block_Q), device=block_Q.device) - offset_Q
    widths_A = torch.zeros_like(anchors_BA[0]).scatter_add_(0, block_Q, torch.ones_like(block_Q))
    return Intervals(
        starts_BA[:, block_Q].int(), anchors_BA[:, block_Q].int(),
        own_first_Q.int(), (own_first_Q + widths_A[block_Q]).int(),
    )  # fmt: skip
