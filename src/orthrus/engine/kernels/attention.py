"""Attention of a pass over paged keys and values, in both views: the kernel of `reference.attend`.

Where sums begin and in which order they go on depends on a query's own length alone, so that plain decoding and
verification give one position the same bits, in any batch:

- slots are cut at fixed multiples of SPLIT_SLOTS; within a split, tiles of TILE_K slots go through an online softmax;
- SPAN_SPLITS splits make a span: their states (fp32) are folded ascending, then the spans' are, then the own block's;
- keys that a query does not see are exact no-ops, in a tile as in a split that it does not reach.

Who computes a state changes none of this. The shapes of a pass choose among three ways (`Plan`): a program reads one
split, so that few rows fill the GPU; or one span, so that the scratch and its traffic stay small; or all of a row, when
there are programs enough, as in prefill. The first two leave states in a scratch of
(cdiv(M * S, unit slots) + 1) * R * N * (H + 2) * 4 bytes, which a second kernel folds: for Qwen3-8B at 40k slots, 21 MB
for 32 positions (84 MB had every split its own state). Lengths and tables are read on the device.

The kernels are Triton's (`attention_kernels.py`). B, R, N, G, H, P, S, M as in `engine/reference.py`.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from orthrus.engine.kernels import attention_kernels
from orthrus.engine.reference import Pages

kernels: Any = attention_kernels

LOG2E = 1.4426950408889634

SPLIT_SLOTS = 256
"""A state begins anew at multiples of this. Pages lie within splits: S divides it."""

SPAN_SPLITS = 4
"""Splits that are folded before their span is."""

TILE_K = {2: 64, 4: 32}
"""Slots of a tile, by bytes of an element. A constant: it decides the order of sums."""

TILES_M = {
    2: (dict(TILE_M=64, num_warps=4, num_stages=3), dict(TILE_M=128, num_warps=8, num_stages=3)),
    4: (dict(TILE_M=32, num_warps=4, num_stages=1),),
}
"""Query heads of a tile, by bytes of an element: the smallest tile that holds a pass's, or the last. In bf16 a warp has
16 of them and all slots of a tile in either size, and Hopper's MMA needs 64, so one position is not given fewer."""

MERGE = dict(TILE_M=4, num_warps=4)
"""Query heads that a program folds the states of."""

SPLIT_PROGRAMS = 1024
"""Programs above which one reads a span rather than a split: some 8 for each multiprocessor."""

ALL_PROGRAMS = 64
"""Programs of whole rows that suffice where the scratch would exceed SCRATCH_BYTES."""

SCRATCH_BYTES = 64 << 20


class Plan(NamedTuple):
    """How a pass is spread over programs: a function of its shapes."""

    num_tiles: int
    """Tiles of a row's query heads that share a key head."""
    unit: int
    """Splits that a program reads; 0: a program reads all of a row."""
    num_units: int


def attend(
    q_RNH: Tensor,
    pages: Pages,
    *,
    width: int,
    scale: float,
    own: tuple[Tensor, Tensor] | None = None,
    widths_B: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a pass, as `reference.attend`; 0 for a query that sees no key. [R, N * H]."""
    num_rows, num_heads, head_dim = q_RNH.shape
    num_slots, num_groups = pages.keys_PSGH.shape[1:3]
    _check(q_RNH, pages, width=width, scale=scale, own=own, widths_B=widths_B)
    tile = _tile(width * num_heads // num_groups, q_RNH.element_size())
    plan = spread(q_RNH.shape, pages, width=width, tile_m=tile["TILE_M"])
    own_keys, own_values = own or (None, None)
    out = torch.empty_like(q_RNH)
    read = (q_RNH, *pages, own_keys, own_values, widths_B)
    strides = (*pages.keys_PSGH.stride()[:3], *pages.values_PSGH.stride()[:3])
    sizes = dict(
        H=head_dim, BLOCK_H=max(16, triton.next_power_of_2(head_dim)), HAS_OWN=own is not None, SPLIT=SPLIT_SLOTS
    )
    sizes_of_read = sizes | dict(
        GROUP=num_heads // num_groups, S=num_slots, TILE_K=TILE_K[q_RNH.element_size()],
        BY="ieee" if q_RNH.dtype == torch.float32 else "tf32",  # of no effect below fp32
    ) | tile  # fmt: skip
    by_2, table_pages, heads = scale * LOG2E, pages.tables_BM.shape[1], len(pages.lengths_B) * num_groups
    if not plan.unit:
        kernels.read_all[plan.num_tiles, heads](
            *read, out, *strides, by_2, table_pages, width, num_groups, SPAN=SPAN_SPLITS, **sizes_of_read
        )
        return out.flatten(1)
    num_parts = plan.num_units + (own is not None)
    acc = q_RNH.new_empty(num_parts, num_rows, num_heads, head_dim, dtype=torch.float32)
    peak, total = q_RNH.new_empty(2, num_parts, num_rows, num_heads, dtype=torch.float32)
    kernels.read_unit[plan.num_tiles * num_parts, heads](
        *read, acc, peak, total, *strides, by_2, table_pages, num_rows, width, num_groups, plan.num_tiles,
        plan.num_units, UNIT=plan.unit, **sizes_of_read,
    )  # fmt: skip
    kernels.merge[(triton.cdiv(num_rows * num_heads, MERGE["TILE_M"]),)](
        acc, peak, total, pages.lengths_B, out, by_2, num_rows, width, num_heads, plan.num_units,
        SPAN=SPAN_SPLITS, UNIT=plan.unit, **MERGE, **sizes,
    )  # fmt: skip
    return out.flatten(1)


def spread(shape: torch.Size, pages: Pages, *, width: int, tile_m: int) -> Plan:
    """How a pass of queries [R, N, H] is spread over programs. No value is read."""
    num_rows, num_heads, head_dim = shape
    num_batch, num_pages = pages.tables_BM.shape
    num_slots, num_groups = pages.keys_PSGH.shape[1:3]
    num_tiles = triton.cdiv(width * num_heads // num_groups, tile_m)
    num_splits = triton.cdiv(num_pages * num_slots, SPLIT_SLOTS)
    programs = num_tiles * num_batch * num_groups
    if programs * num_splits <= SPLIT_PROGRAMS:
        unit = 1
    elif programs < ALL_PROGRAMS or _scratch_bytes(num_splits, num_rows * num_heads, head_dim) <= SCRATCH_BYTES:
        unit = SPAN_SPLITS
    else:
        unit = 0
    return Plan(num_tiles, unit, triton.cdiv(num_splits, unit) if unit else 0)


def _scratch_bytes(num_splits: int, num_heads: int, head_dim: int) -> int:
    """Bytes of the states of all spans and an own block."""
    return (triton.cdiv(num_splits, SPAN_SPLITS) + 1) * num_heads * (head_dim + 2) * 4


def _tile(num_heads: int, element_size: int) -> dict[str, int]:
    """The tile of queries for a pass that has so many for each row and key head."""
    tiles = TILES_M[element_size]
    return next((tile for tile in tiles if tile["TILE_M"] >= num_heads), tiles[-1])


def _check(
    q: Tensor, pages: Pages, *, width: int, scale: float, own: tuple[Tensor, Tensor] | None, widths_B: Tensor | None
) -> None:
    """What the kernels take for granted: they would read other numbers otherwise."""
    page_slots = pages.keys_PSGH.shape[1]
    if SPLIT_SLOTS % page_slots:
        raise ValueError(f"a page must hold a divisor of {SPLIT_SLOTS} slots, got {page_slots}")
    assert len(q) == len(pages.lengths_B) * width, "a pass has `width` positions of each row"
    assert scale > 0, "the largest score must stay the largest when scaled"
    assert q.is_contiguous() and pages.tables_BM.is_contiguous(), "queries and tables lie together"
    assert pages.keys_PSGH.stride(3) == pages.values_PSGH.stride(3) == 1, "a head of a page lies together"
    assert own is None or (widths_B is not None and own[0].is_contiguous() and own[1].is_contiguous()), (
        "a draft pass has widths and buffers that lie together"
    )
