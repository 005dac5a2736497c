"""The Triton kernels of `engine/kernels/attention.py`, which says what splits, spans and units are.

M and K = query heads and keys of a tile; U = parts in the scratch, the block's own among them. The state of a softmax
is (acc, peak, total): values mixed by 2^((score - peak) * scale), the largest raw score, and the sum of those powers.
"""

# pyrefly: ignore-errors
# Triton's language has Python's grammar and types of its own.

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1.0e30)
"""The peak of no keys. Finite, so that scores of -inf below it are weights of exactly 0 and not NaN."""

SHAPES = ["table_pages", "num_rows", "width", "num_groups", "num_heads", "num_tiles", "num_units"]
"""Arguments that no kernel is compiled anew for: passes of one position and of many run the same instructions."""


@triton.jit
def _fold(acc, peak, total, later_acc, later_peak, later_total, scale):
    """The softmax of two sets of keys. Exact where either has none.

    Products and sums are spelled as fma: what a compiler may contract, two kernels could round differently.
    """
    top = tl.maximum(peak, later_peak)
    fade, join = tl.exp2((peak - top) * scale), tl.exp2((later_peak - top) * scale)
    acc = tl.fma(later_acc, tl.broadcast_to(join[:, None], later_acc.shape), acc * fade[:, None])
    return acc, top, tl.fma(later_total, join, total * fade)


@triton.jit
def _none(TILE_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """The state of no keys."""
    acc = tl.zeros([TILE_M, BLOCK_H], tl.float32)
    return acc, tl.full([TILE_M], NOTHING, tl.float32), tl.zeros([TILE_M], tl.float32)


@triton.jit
def _mix(acc, peak, total, q, k_rows, v_rows, places, end, stop_M, dims, is_dim, scale, BY: tl.constexpr):
    """One more tile of keys, those at `places` below `end`; a query sees those below its `stop`."""
    is_there = (places < end)[:, None] & is_dim[None, :]
    k = tl.load(k_rows[:, None] + dims[None, :], mask=is_there, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=BY)
    scores = tl.where(places[None, :] < stop_M[:, None], scores, -float("inf"))
    top = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2((scores - top[:, None]) * scale)
    fade = tl.exp2((peak - top) * scale)
    v = tl.load(v_rows[:, None] + dims[None, :], mask=is_there, other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=BY)
    return acc, top, tl.fma(total, fade, tl.sum(weights, 1))


@triton.jit
def _splits(q, K, V, TABLE, kp, ks, vp, vs, first, last, end, stop_M, dims, is_dim, scale,
            S: tl.constexpr, SPLIT: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, BLOCK_H: tl.constexpr,
            BY: tl.constexpr):  # fmt: skip
    """The state of splits first .. last - 1, each begun anew and folded in ascending order."""
    acc, peak, total = _none(TILE_M, BLOCK_H)
    for split in range(first, last):
        one_acc, one_peak, one_total = _none(TILE_M, BLOCK_H)
        for at in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, end), TILE_K):
            slots = at + tl.arange(0, TILE_K)
            page = tl.load(TABLE + slots // S, mask=slots < end, other=0).to(tl.int64)
            one_acc, one_peak, one_total = _mix(
                one_acc, one_peak, one_total, q, K + page * kp + slots % S * ks, V + page * vp + slots % S * vs,
                slots, end, stop_M, dims, is_dim, scale, BY,
            )  # fmt: skip
        acc, peak, total = _fold(acc, peak, total, one_acc, one_peak, one_total, scale)
    return acc, peak, total


@triton.jit
def _own_block(q, K, V, stride, stop, dims, is_dim, scale,
               TILE_M: tl.constexpr, TILE_K: tl.constexpr, BLOCK_H: tl.constexpr, BY: tl.constexpr):  # fmt: skip
    """The state of a draft pass's own block, whose first `stop` positions all queries see."""
    acc, peak, total = _none(TILE_M, BLOCK_H)
    stop_M = tl.zeros([TILE_M], tl.int32) + stop
    for at in range(0, stop, TILE_K):
        places = at + tl.arange(0, TILE_K)
        acc, peak, total = _mix(acc, peak, total, q, K + places * stride, V + places * stride, places, stop, stop_M,
                                dims, is_dim, scale, BY)  # fmt: skip
    return acc, peak, total


@triton.jit
def _queries(Q, b, g, tile, length, width, num_heads, dims, is_dim,
             GROUP: tl.constexpr, H: tl.constexpr, TILE_M: tl.constexpr, HAS_OWN: tl.constexpr):  # fmt: skip
    """A tile of the width * GROUP query heads that share a key head: themselves, their places among all R * N, which
    of them there are, and where in the pages each stops seeing. Those that are not there do as the last."""
    places = tile * TILE_M + tl.arange(0, TILE_M)
    rows = tl.minimum(places, width * GROUP - 1)
    heads_M = (b * width + rows // GROUP) * num_heads + g * GROUP + rows % GROUP
    q = tl.load(Q + heads_M[:, None] * H + dims[None, :], mask=is_dim[None, :], other=0.0)
    stop_M = length + (rows * 0 if HAS_OWN else rows // GROUP + 1)
    return q, heads_M, places < width * GROUP, stop_M


@triton.jit
def _store(OUT, heads_M, acc, total, is_query, dims, is_dim, H: tl.constexpr):
    """Mixed values, rounded once; 0 where there was no key (padding of a batch)."""
    mixed = acc / tl.where(total > 0, total, 1.0)[:, None]
    out = OUT + heads_M[:, None] * H + dims[None, :]
    tl.store(out, mixed.to(OUT.dtype.element_ty), mask=is_query[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=SHAPES)
def read_unit(
    Q, K, V, TABLES, LENGTHS, OWN_K, OWN_V, WIDTHS, ACC, PEAK, TOTAL,
    kp, ks, kg, vp, vs, vg, scale, table_pages, num_rows, width, num_groups, num_tiles, num_units,
    GROUP: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, S: tl.constexpr, HAS_OWN: tl.constexpr,
    SPLIT: tl.constexpr, UNIT: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """One unit of one tile of queries: its state to the scratch, [U, R * N, H] and [U, R * N]. Unit num_units: own."""
    tile, unit = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    b, g = (tl.program_id(1) // num_groups).to(tl.int64), tl.program_id(1) % num_groups
    num_heads = num_groups * GROUP
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    q, heads_M, is_query, stop_M = _queries(Q, b, g, tile, tl.load(LENGTHS + b), width, num_heads, dims, is_dim,
                                            GROUP, H, TILE_M, HAS_OWN)  # fmt: skip
    end = tl.max(stop_M, 0)
    last = tl.minimum((unit + 1) * UNIT, tl.cdiv(end, SPLIT))
    acc, peak, total = _splits(q, K + g * kg, V + g * vg, TABLES + b * table_pages, kp, ks, vp, vs, unit * UNIT, last,
                               end, stop_M, dims, is_dim, scale, S, SPLIT, TILE_M, TILE_K, BLOCK_H, BY)  # fmt: skip
    is_read = unit * UNIT < last
    if HAS_OWN:
        if unit == num_units:
            block = (b * width * num_groups + g) * H
            acc, peak, total = _own_block(q, OWN_K + block, OWN_V + block, num_groups * H,
                                          tl.minimum(tl.load(WIDTHS + b), width), dims, is_dim, scale,
                                          TILE_M, TILE_K, BLOCK_H, BY)  # fmt: skip
        is_read = is_read | (unit == num_units)
    to = unit.to(tl.int64) * num_rows * num_heads + heads_M
    if is_read:
        tl.store(ACC + to[:, None] * H + dims[None, :], acc, mask=is_query[:, None] & is_dim[None, :])
        tl.store(PEAK + to, peak, mask=is_query)
        tl.store(TOTAL + to, total, mask=is_query)


@triton.jit(do_not_specialize=SHAPES)
def merge(
    ACC, PEAK, TOTAL, LENGTHS, OUT, scale, num_rows, width, num_heads, num_units,
    H: tl.constexpr, BLOCK_H: tl.constexpr, HAS_OWN: tl.constexpr,
    SPLIT: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """A tile of query heads: units folded to spans, spans to all, each in ascending order, the own block last."""
    heads_M = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    is_head = heads_M < num_rows * num_heads
    row_M = tl.where(is_head, heads_M // num_heads, 0)
    stop_M = tl.load(LENGTHS + row_M // width) + (row_M * 0 if HAS_OWN else row_M % width + 1)
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    UNITS: tl.constexpr = SPAN // UNIT
    acc, peak, total = _none(TILE_M, BLOCK_H)
    for span in range(0, tl.cdiv(tl.max(stop_M, 0), SPAN * SPLIT)):
        span_acc, span_peak, span_total = _none(TILE_M, BLOCK_H)
        for i in tl.static_range(UNITS):
            unit = span * UNITS + i
            is_read = is_head & (unit * (UNIT * SPLIT) < stop_M)
            part_acc, part_peak, part_total = _part(ACC, PEAK, TOTAL, unit, num_rows, num_heads, heads_M, is_read,
                                                    dims, is_dim, H)  # fmt: skip
            span_acc, span_peak, span_total = _fold(span_acc, span_peak, span_total,
                                                    part_acc, part_peak, part_total, scale)  # fmt: skip
        acc, peak, total = _fold(acc, peak, total, span_acc, span_peak, span_total, scale)
    if HAS_OWN:
        part_acc, part_peak, part_total = _part(ACC, PEAK, TOTAL, num_units, num_rows, num_heads, heads_M, is_head,
                                                dims, is_dim, H)  # fmt: skip
        acc, peak, total = _fold(acc, peak, total, part_acc, part_peak, part_total, scale)
    _store(OUT, heads_M, acc, total, is_head, dims, is_dim, H)


@triton.jit
def _part(ACC, PEAK, TOTAL, unit, num_rows, num_heads, heads_M, is_read, dims, is_dim, H: tl.constexpr):
    """What `read_unit` stored, or the state of no keys where it did not read the unit."""
    at = unit.to(tl.int64) * num_rows * num_heads + heads_M
    acc = tl.load(ACC + at[:, None] * H + dims[None, :], mask=is_read[:, None] & is_dim[None, :], other=0.0)
    return acc, tl.load(PEAK + at, mask=is_read, other=NOTHING), tl.load(TOTAL + at, mask=is_read, other=0.0)


@triton.jit(do_not_specialize=SHAPES)
def read_all(
    Q, K, V, TABLES, LENGTHS, OWN_K, OWN_V, WIDTHS, OUT,
    kp, ks, kg, vp, vs, vg, scale, table_pages, width, num_groups,
    GROUP: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, S: tl.constexpr, HAS_OWN: tl.constexpr,
    SPLIT: tl.constexpr, SPAN: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """One tile of queries from its first key to its last: the folds of `read_unit` and `merge` without the scratch."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later queries read more: those first
    b, g = (tl.program_id(1) // num_groups).to(tl.int64), tl.program_id(1) % num_groups
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    q, heads_M, is_query, stop_M = _queries(Q, b, g, tile, tl.load(LENGTHS + b), width, num_groups * GROUP, dims,
                                            is_dim, GROUP, H, TILE_M, HAS_OWN)  # fmt: skip
    end = tl.max(stop_M, 0)
    num_splits = tl.cdiv(end, SPLIT)
    acc, peak, total = _none(TILE_M, BLOCK_H)
    for first in range(0, num_splits, SPAN):
        one_acc, one_peak, one_total = _splits(
            q, K + g * kg, V + g * vg, TABLES + b * table_pages, kp, ks, vp, vs, first,
            tl.minimum(first + SPAN, num_splits), end, stop_M, dims, is_dim, scale,
            S, SPLIT, TILE_M, TILE_K, BLOCK_H, BY,
        )  # fmt: skip
        acc, peak, total = _fold(acc, peak, total, one_acc, one_peak, one_total, scale)
    if HAS_OWN:
        block = (b * width * num_groups + g) * H
        one_acc, one_peak, one_total = _own_block(q, OWN_K + block, OWN_V + block, num_groups * H,
                                                  tl.minimum(tl.load(WIDTHS + b), width), dims, is_dim, scale,
                                                  TILE_M, TILE_K, BLOCK_H, BY)  # fmt: skip
        acc, peak, total = _fold(acc, peak, total, one_acc, one_peak, one_total, scale)
    _store(OUT, heads_M, acc, total, is_query, dims, is_dim, H)
