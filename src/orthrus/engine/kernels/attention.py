"""Attention of a pass over paged keys and values, in both views: the kernel of `reference.attend`.

Where sums begin and in which order they go on depends on a query's own length alone, so that plain decoding and
verification give one position the same bits, in any batch:

- slots are cut into splits at fixed places: of FIRST_SLOTS at first, later of 2, 4, ... times as many (`num_splits`).
  So short rows are spread over many programs, and long ones leave few states;
- within a split, tiles of TILE_K slots go through an online softmax; the states of splits (fp32) are folded ascending,
  the own block's last;
- keys that a query does not see are exact no-ops, in a tile as in a split that it does not reach.

Who computes a state changes none of this. The shapes of a pass choose among two ways (`Plan`): a program reads one
split and leaves its state in a scratch of (num_splits + 1) * R * N * (H + 2) * 4 bytes, which a second kernel folds; or
it reads all of a row, when there are programs enough, as in prefill. For Qwen3-8B at 40k slots, the scratch of 32
positions is 24 MB, beside 168 MB of keys and values. Lengths and tables are read on the device.

The kernels are Triton's (`attention_kernels.py`). B, R, N, G, H, P, S, M as in `engine/reference.py`.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from orthrus.engine.kernels import attention_kernels
from orthrus.engine.kernels.overlap import overlap
from orthrus.engine.reference import Pages

kernels: Any = attention_kernels

LOG2E = 1.4426950408889634

FIRST_SLOTS = 256
"""Slots of the first splits, a multiple of every TILE_K."""

SHARE = 8
"""A split doubles in size when SHARE of that size lie before it: it has at most a SHARE-th of the slots before it."""

DOUBLINGS = 3
"""How often splits double: the largest have FIRST_SLOTS << DOUBLINGS slots."""

TILES = {
    2: dict(TILE_M=64, TILE_K=64, num_warps=4, num_stages=3),
    4: dict(TILE_M=32, TILE_K=32, num_warps=4, num_stages=1),
}
"""Query heads and slots of a tile, by bytes of an element. TILE_K is a constant: it decides the order of sums. Several
programs of 64 heads on a multiprocessor were faster on an H200 than one of 128, though each reads the keys
(docs/experiments.md)."""

MERGE = dict(TILE_M=4, num_warps=4, AHEAD=16)
"""Query heads that a program folds the states of, a warp each, and how many states it loads at a time."""

ALL_PROGRAMS = 128
"""Programs of whole rows that suffice where the scratch would exceed SCRATCH_BYTES: about one a multiprocessor."""

SHORT_SLOTS = 4096
"""Slots of tables up to which rows count as short in `reads_whole_rows`."""

SCRATCH_BYTES = 64 << 20


class Plan(NamedTuple):
    """How a pass is spread over programs: a function of its shapes."""

    num_tiles: int
    """Tiles of a row's query heads that share a key head."""
    num_splits: int
    """Splits of a row; 0: a program reads all of them."""


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
    plan = spread(q_RNH.shape, pages, width=width, element_size=q_RNH.element_size())
    own_keys, own_values = own or (None, None)
    out = torch.empty_like(q_RNH)
    read = (q_RNH, *pages, own_keys, own_values, widths_B)
    strides = (*pages.keys_PSGH.stride()[:3], *pages.values_PSGH.stride()[:3])
    sizes = dict(
        H=head_dim, BLOCK_H=max(16, triton.next_power_of_2(head_dim)), HAS_OWN=own is not None,
        FIRST=FIRST_SLOTS, SHARE=SHARE, DOUBLINGS=DOUBLINGS,
    ) | overlap(q_RNH)  # fmt: skip
    sizes_of_read = sizes | dict(
        GROUP=num_heads // num_groups, S=num_slots,
        BY="ieee" if q_RNH.dtype == torch.float32 else "tf32",  # of no effect below fp32
    ) | TILES[q_RNH.element_size()]  # fmt: skip
    by_2, table_pages, heads = scale * LOG2E, pages.tables_BM.shape[1], len(pages.lengths_B) * num_groups
    if not plan.num_splits:
        kernels.read_all[plan.num_tiles, heads](
            *read, out, *strides, by_2, table_pages, width, num_groups, **sizes_of_read
        )
        return out.flatten(1)
    num_parts = plan.num_splits + (own is not None)
    acc = q_RNH.new_empty(num_parts, num_rows, num_heads, head_dim, dtype=torch.float32)
    peak, total = q_RNH.new_empty(2, num_parts, num_rows, num_heads, dtype=torch.float32)
    kernels.read_part[heads, plan.num_tiles * num_parts](
        *read, acc, peak, total, *strides, by_2, table_pages, num_rows, width, num_groups, plan.num_tiles,
        plan.num_splits, **sizes_of_read,
    )  # fmt: skip
    kernels.merge[(triton.cdiv(num_rows * num_heads, MERGE["TILE_M"]),)](
        acc, peak, total, pages.lengths_B, out, num_rows, width, num_heads, plan.num_splits,
        **MERGE, **sizes,
    )  # fmt: skip
    return out.flatten(1)


def num_splits(num_slots: int) -> int:
    """Splits that begin below `num_slots`: split i begins at (i - SHARE * d) * (FIRST_SLOTS << d), d being how often
    sizes have doubled, min(max(i // SHARE - 1, 0), DOUBLINGS)."""
    doublings = sum(num_slots > (SHARE * FIRST_SLOTS << i) for i in range(1, DOUBLINGS + 1))
    return SHARE * doublings + triton.cdiv(num_slots, FIRST_SLOTS << doublings)


def spread(shape: torch.Size, pages: Pages, *, width: int, element_size: int) -> Plan:
    """How a pass of queries [R, N, H] is spread over programs. No value is read."""
    num_rows, num_heads, head_dim = shape
    num_batch, num_pages = pages.tables_BM.shape
    num_slots, num_groups = pages.keys_PSGH.shape[1:3]
    splits = num_splits(num_pages * num_slots)
    is_small = _scratch_bytes(splits, num_rows * num_heads, head_dim) <= SCRATCH_BYTES
    num_tiles = triton.cdiv(width * num_heads // num_groups, TILES[element_size]["TILE_M"])
    num_programs = num_tiles * num_batch * num_groups
    is_whole = reads_whole_rows(num_rows * num_heads, num_programs, num_pages * num_slots)
    return Plan(num_tiles, 0 if is_whole or (num_programs >= ALL_PROGRAMS and not is_small) else splits)


def reads_whole_rows(num_heads: int, num_programs: int, num_slots: int) -> bool:
    """Whether a pass of so many query heads is faster with whole rows, by so many programs.

    Measured on an H200 at the shapes of Qwen3-8B and 1.7B, 1k and 4k slots, 8 to 64 rows of 1 to 32 positions
    (docs/experiments.md). Tables are as long as the longest row of a batch needs: beyond SHORT_SLOTS a single long row
    could keep all others waiting, so that many heads must make up for it.
    """
    if num_slots > SHORT_SLOTS:
        return num_programs >= ALL_PROGRAMS and num_heads >= 8192
    return num_programs >= 192 or (num_programs >= ALL_PROGRAMS and num_heads >= 4096)


def _scratch_bytes(splits: int, num_heads: int, head_dim: int) -> int:
    """Bytes of the states of all splits and an own block."""
    return (splits + 1) * num_heads * (head_dim + 2) * 4


def _check(
    q: Tensor, pages: Pages, *, width: int, scale: float, own: tuple[Tensor, Tensor] | None, widths_B: Tensor | None
) -> None:
    """What the kernels take for granted: they would read other numbers otherwise."""
    assert len(q) == len(pages.lengths_B) * width, "a pass has `width` positions of each row"
    assert scale > 0, "the largest score must stay the largest when scaled"
    assert q.is_contiguous() and pages.tables_BM.is_contiguous(), "queries and tables lie together"
    assert pages.keys_PSGH.stride(3) == pages.values_PSGH.stride(3) == 1, "a head of a page lies together"
    assert own is None or (widths_B is not None and own[0].is_contiguous() and own[1].is_contiguous()), (
        "a draft pass has widths and buffers that lie together"
    )
