"""The Triton kernels of `engine/kernels/attention.py`, which says what splits are.

M and K = query heads and keys of a tile; U = parts in the scratch: splits, and the block's own keys behind them.
The state of a softmax is (acc, peak, total): values mixed by 2^(score * scale - peak), the largest scaled score, and
the sum of those powers.
"""

# pyrefly: ignore-errors
# Triton's language has Python's grammar and types of its own.

import triton
import triton.language as tl

from orthrus.engine.kernels.overlap import follow, let_next, wait

NOTHING = tl.constexpr(-1.0e30)
"""The peak of no keys. Finite, so that scores of -inf below it are weights of exactly 0 and not NaN."""

SHAPES = ["table_pages", "num_rows", "width", "num_groups", "num_heads", "num_tiles", "num_splits"]
"""Arguments that no kernel is compiled anew for: passes of one position and of many run the same instructions."""


@triton.jit
def _fold(acc, peak, total, later_acc, later_peak, later_total):
    """The softmax of two sets of keys. Exact where either has none.

    Products and sums are spelled as fma: what a compiler may contract, two kernels could round differently.
    """
    top = tl.maximum(peak, later_peak)
    fade, join = tl.exp2(peak - top), tl.exp2(later_peak - top)
    acc = tl.fma(later_acc, tl.broadcast_to(join[:, None], later_acc.shape), acc * fade[:, None])
    return acc, top, tl.fma(later_total, join, total * fade)


@triton.jit
def _none(TILE_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """The state of no keys."""
    acc = tl.zeros([TILE_M, BLOCK_H], tl.float32)
    return acc, tl.full([TILE_M], NOTHING, tl.float32), tl.zeros([TILE_M], tl.float32)


@triton.jit
def _octave(split, FIRST: tl.constexpr, SHARE: tl.constexpr, DOUBLINGS: tl.constexpr):
    """How often the size of a split has doubled: it begins at (split - SHARE * octave) * (FIRST << octave)."""
    return tl.minimum(tl.maximum(split // SHARE - 1, 0), DOUBLINGS)


@triton.jit
def _num_splits(end, FIRST: tl.constexpr, SHARE: tl.constexpr, DOUBLINGS: tl.constexpr):
    """Splits that begin below `end`."""
    octave = 0
    for i in tl.static_range(1, DOUBLINGS + 1):
        octave += (end > (SHARE * FIRST << i)).to(tl.int32)
    size = FIRST << octave
    return SHARE * octave + (end + size - 1) // size


@triton.jit
def _page(TABLE, at, table_pages, is_own, S: tl.constexpr, TILE_K: tl.constexpr):
    """The page of each slot of a tile; one number where a tile lies within a page. An own block is its own table.

    Needs no length, so that it is looked up while the length is; a page behind a row's last is never read.
    """
    index = (at if S % TILE_K == 0 else at + tl.arange(0, TILE_K)) // S
    page = tl.load(TABLE + tl.minimum(index, table_pages - 1))
    return tl.where(is_own, index, page).to(tl.int64)


@triton.jit
def _at(X, page, at, page_stride, stride, dims, S: tl.constexpr, TILE_K: tl.constexpr):
    """Where the keys or values of a tile's slots are. A tile within a page has one 64-bit address and small offsets."""
    i = tl.arange(0, TILE_K)
    if S % TILE_K == 0:
        return X + page * page_stride + ((at % S + i)[:, None] * stride + dims[None, :])
    else:
        return (X + page * page_stride + (at + i) % S * stride)[:, None] + dims[None, :]


@triton.jit
def _add_tile(acc, peak, total, q, k, v, slots, stop_M, scale, MASKED: tl.constexpr, BY: tl.constexpr):
    """A state with a tile of keys in it; MASKED: of which a query sees those below its `stop`."""
    scores = tl.dot(q, tl.trans(k), input_precision=BY)
    if MASKED:
        scores = tl.where(slots[None, :] < stop_M[:, None], scores, -float("inf"))
    top = tl.maximum(peak, tl.max(scores, 1) * scale)
    shift = tl.broadcast_to(-top[:, None], scores.shape)
    weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, scale, tl.float32), shift))
    fade = tl.exp2(peak - top)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=BY)
    return acc, top, tl.fma(total, fade, tl.sum(weights, 1))


@triton.jit
def _read(q, K, V, TABLE, table_pages, page, kp, ks, vp, vs, first, last, stop_M, low, is_own, dims, is_dim, scale,
          S: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
          BY: tl.constexpr):  # fmt: skip
    """The state of the keys at slots first .. last - 1, of which a query sees those below its `stop`.

    Tiles that all queries see are read without masks, the rest with; on those both compute the same. A tile's page is
    looked up one tile ahead: keys are copied ahead only if their addresses wait for no load.
    """
    acc, peak, total = _none(TILE_M, BLOCK_H)
    some = first + tl.maximum(tl.minimum(low, last) - first, 0) // TILE_K * TILE_K
    for at in range(first, some, TILE_K):
        if H == BLOCK_H:
            k = tl.load(_at(K, page, at, kp, ks, dims, S, TILE_K))
            v = tl.load(_at(V, page, at, vp, vs, dims, S, TILE_K))
        else:
            k = tl.load(_at(K, page, at, kp, ks, dims, S, TILE_K), mask=is_dim[None, :], other=0.0)
            v = tl.load(_at(V, page, at, vp, vs, dims, S, TILE_K), mask=is_dim[None, :], other=0.0)
        acc, peak, total = _add_tile(acc, peak, total, q, k, v, at + tl.arange(0, TILE_K), stop_M, scale, False, BY)
        page = _page(TABLE, at + TILE_K, table_pages, is_own, S, TILE_K)
    for at in range(some, last, TILE_K):
        slots = at + tl.arange(0, TILE_K)
        is_there = (slots < last)[:, None] & is_dim[None, :]
        k = tl.load(_at(K, page, at, kp, ks, dims, S, TILE_K), mask=is_there, other=0.0)
        v = tl.load(_at(V, page, at, vp, vs, dims, S, TILE_K), mask=is_there, other=0.0)
        acc, peak, total = _add_tile(acc, peak, total, q, k, v, slots, stop_M, scale, True, BY)
        page = _page(TABLE, at + TILE_K, table_pages, is_own, S, TILE_K)
    return acc, peak, total


@triton.jit
def _queries(b, g, tile, length, width, num_heads,
             GROUP: tl.constexpr, TILE_M: tl.constexpr, HAS_OWN: tl.constexpr):  # fmt: skip
    """A tile of the width * GROUP query heads that share a key head: their places among all R * N, which of them there
    are, where in the pages each stops seeing, and the first and the last of these places, which reducing a tile would
    find with two barriers. Those that are not there do as the last."""
    places, end = tile * TILE_M + tl.arange(0, TILE_M), width * GROUP - 1
    rows = tl.minimum(places, end)
    heads_M = (b * width + rows // GROUP) * num_heads + g * GROUP + rows % GROUP
    if HAS_OWN:
        stop_M, low, high = length + rows * 0, length, length
    else:
        stop_M = length + rows // GROUP + 1
        low = length + tl.minimum(tile * TILE_M, end) // GROUP + 1
        high = length + tl.minimum(tile * TILE_M + TILE_M - 1, end) // GROUP + 1
    return heads_M, places < width * GROUP, stop_M, low, high


@triton.jit
def _store(OUT, heads_M, acc, total, is_query, dims, is_dim, H: tl.constexpr):
    """Mixed values, rounded once; 0 where there was no key (padding of a batch)."""
    mixed = acc / tl.where(total > 0, total, 1.0)[:, None]
    out = OUT + heads_M[:, None] * H + dims[None, :]
    tl.store(out, mixed.to(OUT.dtype.element_ty), mask=is_query[:, None] & is_dim[None, :])


@triton.jit
def _part(part, num_splits, K, V, OWN_K, OWN_V, WIDTHS, kp, ks, kg, vp, vs, vg, b, g, width, num_groups,
          stop_M, low, high, FIRST: tl.constexpr, SHARE: tl.constexpr, DOUBLINGS: tl.constexpr, H: tl.constexpr,
          S: tl.constexpr, HAS_OWN: tl.constexpr):  # fmt: skip
    """Where a part's keys lie: a split of the pages, or, behind all splits, the block's own as pages in a row."""
    octave = _octave(part, FIRST, SHARE, DOUBLINGS)
    size = FIRST << octave
    first = (part - SHARE * octave) * size
    K += g * kg
    V += g * vg
    is_own = part < 0  # never
    if HAS_OWN:
        is_own = part == num_splits
        own_stride = num_groups * H
        block = b * width * own_stride + g * H
        K, V = tl.where(is_own, OWN_K + block, K), tl.where(is_own, OWN_V + block, V)
        kp, ks = tl.where(is_own, own_stride * S, kp), tl.where(is_own, own_stride, ks)
        vp, vs = tl.where(is_own, own_stride * S, vp), tl.where(is_own, own_stride, vs)
        first, size = tl.where(is_own, 0, first), tl.where(is_own, width, size)
        stop = tl.minimum(tl.load(WIDTHS + b), width)
        stop_M, low, high = tl.where(is_own, stop, stop_M), tl.where(is_own, stop, low), tl.where(is_own, stop, high)
    return K, V, kp, ks, vp, vs, first, tl.minimum(first + size, high), stop_M, low, is_own


@triton.jit(do_not_specialize=SHAPES)
def read_part(
    Q, K, V, TABLES, LENGTHS, OWN_K, OWN_V, WIDTHS, ACC, PEAK, TOTAL,
    kp, ks, kg, vp, vs, vg, scale, table_pages, num_rows, width, num_groups, num_tiles, num_splits,
    GROUP: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, S: tl.constexpr, HAS_OWN: tl.constexpr,
    FIRST: tl.constexpr, SHARE: tl.constexpr, DOUBLINGS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, BY: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """One part of one tile of queries: its state to the scratch, [U, R * N, H] and [U, R * N]. Part num_splits: own."""
    let_next(HOPPER)
    program = tl.num_programs(1) - 1 - tl.program_id(1)  # later splits are larger: those first
    tile, part = program % num_tiles, program // num_tiles
    b, g = (tl.program_id(0) // num_groups).to(tl.int64), tl.program_id(0) % num_groups
    num_heads = num_groups * GROUP
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    heads_M, is_query, stop_M, low, high = _queries(b, g, tile, tl.load(LENGTHS + b), width, num_heads,
                                                    GROUP, TILE_M, HAS_OWN)  # fmt: skip
    K, V, kp, ks, vp, vs, first, last, stop_M, low, is_own = _part(
        part, num_splits, K, V, OWN_K, OWN_V, WIDTHS, kp, ks, kg, vp, vs, vg, b, g, width, num_groups,
        stop_M, low, high, FIRST, SHARE, DOUBLINGS, H, S, HAS_OWN,
    )  # fmt: skip
    TABLE = TABLES + b * table_pages
    page = _page(TABLE, first, table_pages, is_own, S, TILE_K)
    wait(HOPPER)
    q = tl.load(Q + heads_M[:, None] * H + dims[None, :], mask=is_dim[None, :], other=0.0)
    acc, peak, total = _read(q, K, V, TABLE, table_pages, page, kp, ks, vp, vs, first, last, stop_M, low, is_own,
                             dims, is_dim, scale, S, TILE_M, TILE_K, H, BLOCK_H, BY)  # fmt: skip
    to = part * num_rows * num_heads + heads_M
    if (first < last) | is_own:
        tl.store(ACC + to[:, None] * H + dims[None, :], acc, mask=is_query[:, None] & is_dim[None, :])
        tl.store(PEAK + to, peak, mask=is_query)
        tl.store(TOTAL + to, total, mask=is_query)


@triton.jit(do_not_specialize=SHAPES)
def merge(
    ACC, PEAK, TOTAL, LENGTHS, OUT, num_rows, width, num_heads, num_splits,
    H: tl.constexpr, BLOCK_H: tl.constexpr, HAS_OWN: tl.constexpr, FIRST: tl.constexpr, SHARE: tl.constexpr,
    DOUBLINGS: tl.constexpr, TILE_M: tl.constexpr, AHEAD: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """A tile of query heads: the states of splits folded in ascending order, the own block's last.

    AHEAD states are loaded at a time, so that a row waits for memory once for as many.
    """
    let_next(HOPPER)
    heads_M = (tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    is_head = heads_M < num_rows * num_heads
    row_M = tl.where(is_head, heads_M // num_heads, 0)
    stop_M = tl.load(LENGTHS + row_M // width) + (row_M * 0 if HAS_OWN else row_M % width + 1)
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    wait(HOPPER)
    acc, peak, total = _none(TILE_M, BLOCK_H)
    if HAS_OWN:  # loaded with the first of the others, folded last
        own_acc, own_peak, own_total = _state(ACC, PEAK, TOTAL, num_splits, num_rows, num_heads, heads_M,
                                              is_head, dims, is_dim, H)  # fmt: skip
    for first in range(0, _num_splits(tl.max(stop_M, 0), FIRST, SHARE, DOUBLINGS), AHEAD):
        for i in tl.static_range(AHEAD):
            octave = _octave(first + i, FIRST, SHARE, DOUBLINGS)
            is_read = is_head & ((first + i - SHARE * octave) * (FIRST << octave) < stop_M)
            later_acc, later_peak, later_total = _state(ACC, PEAK, TOTAL, first + i, num_rows, num_heads, heads_M,
                                                        is_read, dims, is_dim, H)  # fmt: skip
            acc, peak, total = _fold(acc, peak, total, later_acc, later_peak, later_total)
    if HAS_OWN:
        acc, peak, total = _fold(acc, peak, total, own_acc, own_peak, own_total)
    _store(OUT, heads_M, acc, total, is_head, dims, is_dim, H)


@triton.jit
def _state(ACC, PEAK, TOTAL, part, num_rows, num_heads, heads_M, is_read, dims, is_dim, H: tl.constexpr):
    """What `read_part` stored, or the state of no keys where a query sees none of the part's."""
    at = part * num_rows * num_heads + heads_M
    acc = tl.load(ACC + at[:, None] * H + dims[None, :], mask=is_read[:, None] & is_dim[None, :], other=0.0)
    return acc, tl.load(PEAK + at, mask=is_read, other=NOTHING), tl.load(TOTAL + at, mask=is_read, other=0.0)


@triton.jit(do_not_specialize=SHAPES)
def read_all(
    Q, K, V, TABLES, LENGTHS, OWN_K, OWN_V, WIDTHS, OUT,
    kp, ks, kg, vp, vs, vg, scale, table_pages, width, num_groups,
    GROUP: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, S: tl.constexpr, HAS_OWN: tl.constexpr,
    FIRST: tl.constexpr, SHARE: tl.constexpr, DOUBLINGS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, BY: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """One tile of queries from its first key to its last: the folds of `merge` without the scratch."""
    follow(HOPPER)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later queries read more: those first
    b, g = (tl.program_id(1) // num_groups).to(tl.int64), tl.program_id(1) % num_groups
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    heads_M, is_query, stop_M, low, high = _queries(b, g, tile, tl.load(LENGTHS + b), width, num_groups * GROUP,
                                                    GROUP, TILE_M, HAS_OWN)  # fmt: skip
    q = tl.load(Q + heads_M[:, None] * H + dims[None, :], mask=is_dim[None, :], other=0.0)
    TABLE = TABLES + b * table_pages
    num_splits = _num_splits(high, FIRST, SHARE, DOUBLINGS)
    acc, peak, total = _none(TILE_M, BLOCK_H)
    for part in range(0, num_splits + HAS_OWN):
        k_part, v_part, kp_, ks_, vp_, vs_, first, last, stop_, low_, is_own = _part(
            part, num_splits, K, V, OWN_K, OWN_V, WIDTHS, kp, ks, kg, vp, vs, vg, b, g, width, num_groups,
            stop_M, low, high, FIRST, SHARE, DOUBLINGS, H, S, HAS_OWN,
        )  # fmt: skip
        page = _page(TABLE, first, table_pages, is_own, S, TILE_K)
        one_acc, one_peak, one_total = _read(q, k_part, v_part, TABLE, table_pages, page, kp_, ks_, vp_, vs_, first,
                                             last, stop_, low_, is_own, dims, is_dim, scale, S, TILE_M, TILE_K,
                                             H, BLOCK_H, BY)  # fmt: skip
        acc, peak, total = _fold(acc, peak, total, one_acc, one_peak, one_total)
    _store(OUT, heads_M, acc, total, is_query, dims, is_dim, H)
