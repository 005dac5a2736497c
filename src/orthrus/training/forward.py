"""The two passes of training: the clean row in the AR view, then all its blocks in the diffusion view.

The AR pass is frozen: it gives each layer's keys and values (what the blocks may read) and the teacher's logits. The
block pass attends to [clean keys ; block keys] under `masks.block_training_mask`. On a GPU that is one compiled
`flex_attention` a layer; `dense_attend` is its slow, obviously right twin and what a CPU runs (flex has no backward
there).

    B = rows, T = clean tokens, A = anchors a row, K = block size, N = heads, G = key/value heads, H = head dimension
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from orthrus.model.attention import causal_attend, run_layers
from orthrus.model.masks import block_training_mask

KeyValues = list[tuple[Tensor, Tensor]]


def ar_hidden(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Final hidden states of the AR view over clean rows: what pretraining differentiates. [B, T, D]."""
    return run_layers(model.model, ids_BT, row_positions(ids_BT), causal_attend, "ar")


def ar_pass(model: nn.Module, ids_BT: Tensor) -> tuple[Tensor, KeyValues]:
    """The frozen AR view over clean rows: hidden states [B, T, D] and each layer's (keys, values) [B, G, T, H]."""
    cached: KeyValues = []

    def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cached.append((k, v))
        return causal_attend(attention, q, k, v)

    return run_layers(model.model, ids_BT, row_positions(ids_BT), attend, "ar"), cached


def row_positions(ids_BT: Tensor) -> Tensor:
    """Positions 0 .. T-1. [1, T]."""
    return torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]


def block_pass(model: nn.Module, blocks: tuple[Tensor, Tensor], clean: KeyValues, mask: Any) -> Tensor:
    """The diffusion view over all blocks' (ids, positions): final hidden states [B, A*K, D].

    `mask` is a `BlockMask` (flex_attention) or a boolean tensor [B, A*K, T + A*K] (dense).
    """
    layer = iter(clean)
    attend_over = flex_attend if isinstance(mask, BlockMask) else dense_attend

    def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_clean, v_clean = next(layer)
        return attend_over(attention, q, torch.cat([k_clean, k], dim=2), torch.cat([v_clean, v], dim=2), mask)

    ids, positions = blocks
    return run_layers(model.model, ids, positions, attend, "diffusion")


def flex_attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Block-sparse attention; must run compiled to be sparse."""
    mixed = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, scale=attention.scaling)
    return mixed.transpose(1, 2).flatten(2)


def dense_attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask_BQS: Tensor) -> Tensor:
    """The same attention with every key read and a boolean mask."""
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_BQS[:, None], enable_gqa=True, scale=attention.scaling
    )
    return mixed.transpose(1, 2).flatten(2)


def block_mask(anchors_BA: Tensor, *, block_size: int, num_clean: int) -> BlockMask | Tensor:
    """`masks.block_training_mask` in the form that this device's attention reads."""
    if anchors_BA.device.type == "cpu":
        return block_training_mask(anchors_BA, block_size, num_clean)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block = q // block_size
        before_anchor = (k < num_clean) & (k < anchors_BA[b, block])
        return before_anchor | ((k >= num_clean) & ((k - num_clean) // block_size == block))

    num_rows, num_anchors = anchors_BA.shape
    num_queries = num_anchors * block_size
    # Compiled, or the mask would be materialised as rows x queries x keys booleans.
    return create_block_mask(
        visible, num_rows, None, num_queries, num_clean + num_queries, device=anchors_BA.device, _compile=True
    )
