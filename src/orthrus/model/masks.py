"""Who may see whom: every attention mask of the method, as pure functions of lengths and anchors.

A wrong draft mask never corrupts text, it only lowers acceptance, so each mask here is proved element by element
against the sentence in its docstring (tests/model/test_masks.py). True means visible.

    B = rows, Q = queries of a pass, S = cache slots, T = clean tokens of a training row, A = anchors (blocks) of one
"""

from collections.abc import Callable

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


def document_rule(document_BT: Tensor) -> Callable[..., Tensor]:
    """`document_mask` as a function of (row, head, query, key) indices, as `flex_attention` wants it."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (document_BT[b, k] == document_BT[b, q])

    return visible


def block_training_rule(
    anchors_BA: Tensor, block_Q: Tensor, num_clean: int, document_BT: Tensor | None = None
) -> Callable[..., Tensor]:
    """`block_training_mask` as a function of (row, head, query, key) indices, as `flex_attention` wants it."""
    anchor_BQ = anchors_BA[:, block_Q]
    document_BQ = None if document_BT is None else document_BT.gather(1, anchors_BA)[:, block_Q]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        before_anchor = (k < num_clean) & (k < anchor_BQ[b, q])
        if document_BT is not None and document_BQ is not None:
            before_anchor = before_anchor & (document_BT[b, k.clamp(max=num_clean - 1)] == document_BQ[b, q])
        own_block = (k >= num_clean) & (block_Q[(k - num_clean).clamp(min=0)] == block_Q[q])
        return before_anchor | own_block

    return visible


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
