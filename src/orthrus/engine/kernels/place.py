"""Queries, keys and values of a pass put in their places: q/k norm, RoPE and page write in one kernel.

It is `reference.place_heads`, with a program for a few heads of one position, so that what a position gets depends on
nothing else. The kernel is Triton's (`place_kernels.py`). Lengths and tables are read on the device. A row of a batch
that is only padding is written too: its table must name a page that nobody reads.

R, B, N, G, H, P, S, M, E as in `engine/reference.py`.
"""

from typing import Any

import triton
from torch import Tensor

from orthrus.engine.kernels import place_kernels
from orthrus.engine.kernels.linear import parts
from orthrus.engine.kernels.overlap import overlap
from orthrus.engine.reference import HeadNorms, Pages, Rotary

kernels: Any = place_kernels

TILE = dict(TILE_T=4, num_warps=4, enable_fp_fusion=False)
"""Heads of a program; each product is rounded before it is added, in fp32 too."""


def place_heads(
    qkv_RE: Tensor,
    pages: Pages,
    rotary: Rotary,
    norms: HeadNorms | None,
    *,
    num_heads: int,
    width: int,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Split a fused projection into heads, norm and rotate queries and keys, store keys and values. Queries [R, N, H].

    As `reference.place_heads`: to slots lengths[b] + w of the pages or, in a draft pass, to `own`, buffers [R, G, H].
    """
    q_RNH = qkv_RE.new_empty(len(qkv_RE), num_heads, pages.keys_PSGH.shape[3])
    return _place(qkv_RE[None], None, None, q_RNH, pages, rotary, norms, width, own)


def project_heads(
    x_RD: Tensor,
    qkv_ED: Tensor,
    pages: Pages,
    rotary: Rotary,
    norms: HeadNorms | None,
    *,
    num_heads: int,
    width: int,
    own: tuple[Tensor, Tensor] | None = None,
    bias_E: Tensor | None = None,
    scale_E: Tensor | None = None,
) -> Tensor:
    """`linear` and `place_heads`; the parts of the product are added where they are placed."""
    parts_SRE = parts(x_RD, qkv_ED, scale_E, bias_E)
    q_RNH = x_RD.new_empty(len(x_RD), num_heads, pages.keys_PSGH.shape[3])
    return _place(parts_SRE, scale_E, bias_E, q_RNH, pages, rotary, norms, width, own)


def _place(
    parts_SRE: Tensor, scale_E: Tensor | None, bias_E: Tensor | None, q_RNH: Tensor, pages: Pages, rotary: Rotary,
    norms: HeadNorms | None, width: int, own: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    num_slots, num_groups, head_dim = pages.keys_PSGH.shape[1:]
    num_rows, num_heads = q_RNH.shape[:2]
    num_kinds = num_heads + 2 * num_groups
    assert num_rows == len(pages.lengths_B) * width, "a pass has `width` positions of each row"
    assert parts_SRE.shape[1:] == (num_rows, num_kinds * head_dim), "a projection has all heads"
    assert parts_SRE.is_contiguous(), "a row of the projection lies together"
    assert all(x.is_contiguous() for x in (*rotary, pages.tables_BM, *(own or ()))), "tables and buffers lie together"
    assert pages.keys_PSGH.stride(3) == pages.values_PSGH.stride(3) == 1, "a head of a page lies together"
    keys, values = own or pages[:2]
    if own is None:
        strides = (*keys.stride()[:3], *values.stride()[:3])
    else:
        strides = (0, 0, head_dim, 0, 0, head_dim)
    query_norm, key_norm, eps = norms or (None, None, 0.0)
    kernels.place[num_rows, triton.cdiv(num_kinds, TILE["TILE_T"])](
        parts_SRE, scale_E, bias_E, q_RNH, keys, values, pages.tables_BM, pages.lengths_B, *rotary, query_norm,
        key_norm, parts_SRE.stride(0), *strides, eps, pages.tables_BM.shape[1], width,
        NUM_HEADS=num_heads,
        NUM_GROUPS=num_groups, H=head_dim, BLOCK_H=triton.next_power_of_2(head_dim), S=num_slots,
        HAS_NORMS=norms is not None, HAS_OWN=own is not None, SPLITS=len(parts_SRE), **TILE, **overlap(q_RNH),
    )  # fmt: skip
    return q_RNH
