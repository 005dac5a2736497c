"""The Triton kernels of `training/interval_attention.py`.

M and K = queries and keys of a tile; `first` and `stop`, one of each for a query (or a key): what it reads
"""

# pyrefly: ignore-errors
# Triton's language has Python's grammar and types of its own.

import triton
import triton.language as tl


@triton.jit
def _tile(base, places, stride, dims, is_dim, count, WHOLE: tl.constexpr):
    """Rows `places` of a [count, H] matrix, 0 where there is none; WHOLE: all of them are there. [len, H]."""
    pointers = base + places[:, None] * stride + dims[None, :]
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=(places < count)[:, None] & is_dim[None, :], other=0.0)


@triton.jit
def _mix(acc, peak, total, q, keys, values, sk, sv, count, begin, end, first_M, stop_M, dims, is_dim, scale,
         TILE_K: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, BY: tl.constexpr):  # fmt: skip
    """The online softmax over keys begin .. end - 1, whole tiles at a time."""
    for at in range(begin, end, TILE_K):
        places = at + tl.arange(0, TILE_K)
        k = _tile(keys, places, sk, dims, is_dim, count, WHOLE)
        scores = tl.dot(q, tl.trans(k), input_precision=BY) * scale
        if MASKED:
            reads = (places[None, :] >= first_M[:, None]) & (places[None, :] < stop_M[:, None])
            scores = tl.where(reads, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        v = _tile(values, places, sv, dims, is_dim, count, WHOLE)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=BY)
        total, peak = total * fade + tl.sum(weights, 1), new_peak
    return acc, peak, total


@triton.jit
def _slope(acc, q, gradient, lse, delta, keys, values, sk, sv, count, begin, end, first_M, stop_M, dims, is_dim, scale,
           TILE_K: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, BY: tl.constexpr):  # fmt: skip
    """The queries' gradient from keys begin .. end - 1, whole tiles at a time."""
    for at in range(begin, end, TILE_K):
        places = at + tl.arange(0, TILE_K)
        k = _tile(keys, places, sk, dims, is_dim, count, WHOLE)
        v = _tile(values, places, sv, dims, is_dim, count, WHOLE)
        scores = tl.dot(q, tl.trans(k), input_precision=BY) * scale
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            reads = (places[None, :] >= first_M[:, None]) & (places[None, :] < stop_M[:, None])
            weights = tl.where(reads, weights, 0.0)
        slopes = weights * (tl.dot(gradient, tl.trans(v), input_precision=BY) - delta[:, None])
        acc = tl.dot(slopes.to(k.dtype), k, acc, input_precision=BY)
    return acc


@triton.jit
def _walk(first_M, stop_M, TILE_K: tl.constexpr):
    """Where a tile of queries begins to read, where all of them read every key, from where no longer, and the end."""
    begin = tl.min(first_M, 0) // TILE_K * TILE_K
    end = tl.max(stop_M, 0)
    all_begin = tl.minimum(tl.cdiv(tl.max(first_M, 0), TILE_K) * TILE_K, tl.cdiv(end, TILE_K) * TILE_K)
    all_end = tl.maximum(all_begin, tl.min(stop_M, 0) // TILE_K * TILE_K)
    return begin, all_begin, all_end, end


@triton.jit
def forward(
    Q, CK, CV, OK, OV, OUT, LSE, FIRST, STOP, OWN_FIRST, OWN_STOP,
    qb, qn, qq, ckb, ckg, ckt, cvb, cvg, cvt, okb, okg, okt, ovb, ovg, ovt,
    num_heads, num_queries, num_clean, scale,
    GROUP: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, HAS_OWN: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: mixed values and log2 of the softmax's sum."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later queries read more: those first
    b, n = (tl.program_id(1) // num_heads).to(tl.int64), tl.program_id(1) % num_heads
    g = n // GROUP
    places = tile * TILE_M + tl.arange(0, TILE_M)
    rows = tl.minimum(places, num_queries - 1)  # queries that are not there do as the last, and are not stored
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    WHOLE: tl.constexpr = H == BLOCK_H
    q = _tile(Q + b * qb + n * qn, rows, qq, dims, is_dim, num_queries, WHOLE)
    acc = tl.zeros([TILE_M, BLOCK_H], tl.float32)
    peak = tl.full([TILE_M], -1.0e30, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    first, stop = tl.load(FIRST + b * num_queries + rows), tl.load(STOP + b * num_queries + rows)
    begin, all_begin, all_end, end = _walk(first, stop, TILE_K)
    keys, values = CK + b * ckb + g * ckg, CV + b * cvb + g * cvg
    acc, peak, total = _mix(acc, peak, total, q, keys, values, ckt, cvt, num_clean, begin, all_begin,
                            first, stop, dims, is_dim, scale, TILE_K, True, False, BY)  # fmt: skip
    acc, peak, total = _mix(acc, peak, total, q, keys, values, ckt, cvt, num_clean, all_begin, all_end,
                            first, stop, dims, is_dim, scale, TILE_K, False, WHOLE, BY)  # fmt: skip
    acc, peak, total = _mix(acc, peak, total, q, keys, values, ckt, cvt, num_clean, all_end, end,
                            first, stop, dims, is_dim, scale, TILE_K, True, False, BY)  # fmt: skip
    if HAS_OWN:
        first, stop = tl.load(OWN_FIRST + rows), tl.load(OWN_STOP + rows)
        acc, peak, total = _mix(acc, peak, total, q, OK + b * okb + g * okg, OV + b * ovb + g * ovg, okt, ovt,
                                num_queries, tl.min(first, 0), tl.max(stop, 0), first, stop, dims, is_dim, scale,
                                TILE_K, True, False, BY)  # fmt: skip
    is_query = places < num_queries
    out = OUT + ((b * num_queries + places[:, None]) * num_heads + n) * H + dims[None, :]
    tl.store(out, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=is_query[:, None] & is_dim[None, :])
    tl.store(LSE + (b * num_heads + n) * num_queries + places, peak + tl.log2(total), mask=is_query)


@triton.jit
def backward_queries(
    Q, CK, CV, OK, OV, OUT, GRADIENT, LSE, DELTA, DQ, FIRST, STOP, OWN_FIRST, OWN_STOP,
    qb, qn, qq, ckb, ckg, ckt, cvb, cvg, cvt, okb, okg, okt, ovb, ovg, ovt,
    num_heads, num_queries, num_clean, scale, slope_scale,
    GROUP: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, HAS_OWN: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: their gradient, and sum(out * gradient), which `backward_keys` reads."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, n = (tl.program_id(1) // num_heads).to(tl.int64), tl.program_id(1) % num_heads
    g = n // GROUP
    places = tile * TILE_M + tl.arange(0, TILE_M)
    rows = tl.minimum(places, num_queries - 1)
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    WHOLE: tl.constexpr = H == BLOCK_H
    q = _tile(Q + b * qb + n * qn, rows, qq, dims, is_dim, num_queries, WHOLE)
    mixed = (b * num_queries * num_heads + n) * H
    gradient = _tile(GRADIENT + mixed, rows, num_heads * H, dims, is_dim, num_queries, WHOLE)
    out = _tile(OUT + mixed, rows, num_heads * H, dims, is_dim, num_queries, WHOLE)
    delta = tl.sum(out.to(tl.float32) * gradient.to(tl.float32), 1)
    is_query = places < num_queries
    tl.store(DELTA + (b * num_heads + n) * num_queries + places, delta, mask=is_query)
    lse = tl.load(LSE + (b * num_heads + n) * num_queries + rows)
    acc = tl.zeros([TILE_M, BLOCK_H], tl.float32)
    first, stop = tl.load(FIRST + b * num_queries + rows), tl.load(STOP + b * num_queries + rows)
    begin, all_begin, all_end, end = _walk(first, stop, TILE_K)
    keys, values = CK + b * ckb + g * ckg, CV + b * cvb + g * cvg
    acc = _slope(acc, q, gradient, lse, delta, keys, values, ckt, cvt, num_clean, begin, all_begin,
                 first, stop, dims, is_dim, scale, TILE_K, True, False, BY)  # fmt: skip
    acc = _slope(acc, q, gradient, lse, delta, keys, values, ckt, cvt, num_clean, all_begin, all_end,
                 first, stop, dims, is_dim, scale, TILE_K, False, WHOLE, BY)  # fmt: skip
    acc = _slope(acc, q, gradient, lse, delta, keys, values, ckt, cvt, num_clean, all_end, end,
                 first, stop, dims, is_dim, scale, TILE_K, True, False, BY)  # fmt: skip
    if HAS_OWN:
        first, stop = tl.load(OWN_FIRST + rows), tl.load(OWN_STOP + rows)
        acc = _slope(acc, q, gradient, lse, delta, OK + b * okb + g * okg, OV + b * ovb + g * ovg, okt, ovt,
                     num_queries, tl.min(first, 0), tl.max(stop, 0), first, stop, dims, is_dim, scale,
                     TILE_K, True, False, BY)  # fmt: skip
    into = DQ + mixed + places[:, None] * num_heads * H + dims[None, :]
    tl.store(into, (acc * slope_scale).to(DQ.dtype.element_ty), mask=is_query[:, None] & is_dim[None, :])


@triton.jit
def backward_keys(
    Q, OK, OV, GRADIENT, LSE, DELTA, DK, DV, OWN_FIRST, OWN_STOP,
    qb, qn, qq, okb, okg, okt, ovb, ovg, ovt,
    num_heads, num_queries, scale, slope_scale,
    GROUP: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """One tile of block keys of one key/value head: gradients of keys and values, from the queries of their blocks."""
    num_groups = num_heads // GROUP
    b, g = (tl.program_id(1) // num_groups).to(tl.int64), tl.program_id(1) % num_groups
    places = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    rows = tl.minimum(places, num_queries - 1)
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    WHOLE: tl.constexpr = H == BLOCK_H
    k = _tile(OK + b * okb + g * okg, rows, okt, dims, is_dim, num_queries, WHOLE)
    v = _tile(OV + b * ovb + g * ovg, rows, ovt, dims, is_dim, num_queries, WHOLE)
    first, stop = tl.load(OWN_FIRST + rows), tl.load(OWN_STOP + rows)
    dk = tl.zeros([TILE_K, BLOCK_H], tl.float32)
    dv = tl.zeros([TILE_K, BLOCK_H], tl.float32)
    for n in range(g * GROUP, (g + 1) * GROUP):
        mixed = (b * num_queries * num_heads + n) * H
        sums = (b * num_heads + n) * num_queries
        for at in range(tl.min(first, 0), tl.max(stop, 0), TILE_M):
            queries = at + tl.arange(0, TILE_M)
            q = _tile(Q + b * qb + n * qn, queries, qq, dims, is_dim, num_queries, False)
            gradient = _tile(GRADIENT + mixed, queries, num_heads * H, dims, is_dim, num_queries, False)
            lse = tl.load(LSE + sums + queries, mask=queries < num_queries, other=0.0)
            delta = tl.load(DELTA + sums + queries, mask=queries < num_queries, other=0.0)
            weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=BY) * scale - lse[None, :])
            reads = (queries[None, :] >= first[:, None]) & (queries[None, :] < stop[:, None])
            weights = tl.where(reads, weights, 0.0)
            dv = tl.dot(weights.to(v.dtype), gradient, dv, input_precision=BY)
            slopes = weights * (tl.dot(v, tl.trans(gradient), input_precision=BY) - delta[None, :])
            dk = tl.dot(slopes.to(k.dtype), q, dk, input_precision=BY)
    stored = (places < num_queries)[:, None] & is_dim[None, :]
    into = ((b * num_queries + places[:, None]) * num_groups + g) * H + dims[None, :]
    tl.store(DK + into, (dk * slope_scale).to(DK.dtype.element_ty), mask=stored)
    tl.store(DV + into, dv.to(DV.dtype.element_ty), mask=stored)
