"""The Triton kernels of `gemv.py`, which says what they are for.

E = outputs, K = inputs that a program loads at once, M = query heads of a tile, T, N, H as in `gemv.py`
"""

# pyrefly: ignore-errors
# Triton's language has Python's grammar and types of its own.

import triton
import triton.language as tl

from orthrus.engine.kernels.attention_kernels import NOTHING
from orthrus.engine.kernels.overlap import let_next, wait


@triton.jit
def _weights(W, block, chunk, num_blocks, num_gates, MANY: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr,
             BLOCK_E: tl.constexpr, REPEATS: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A chunk of the weights of a block's outputs; nothing is read behind the last block. [E, REPEATS, K].

    GATED: half of the block are gates, half their ups.
    """
    lane = tl.arange(0, BLOCK_E)
    if GATED:
        HALF: tl.constexpr = BLOCK_E // 2
        outputs = block * HALF + lane % HALF + lane // HALF * num_gates
    else:
        outputs = block * BLOCK_E + lane
    is_there = (block * BLOCK_E + lane < num_blocks * BLOCK_E)[:, None, None]
    k = _inputs_of(chunk, REPEATS, BLOCK_K)[None]
    at = W + outputs.to(tl.int64)[:, None, None] * WIDTH + k
    WHOLE: tl.constexpr = WIDTH % (REPEATS * BLOCK_K) == 0
    if WHOLE:
        if MANY:
            return tl.load(at, mask=is_there, other=0.0, eviction_policy="evict_first")
        else:
            return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=(k < WIDTH) & is_there, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs_of(chunk, REPEATS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which inputs a chunk has: thread by thread 8 neighbours, REPEATS times. [REPEATS, K]."""
    return (chunk * REPEATS + tl.arange(0, REPEATS)[:, None]) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _inputs(X, chunk, WIDTH: tl.constexpr, REPEATS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A chunk of a row, or of a norm's weight, in fp32. [1, REPEATS, K]."""
    k = _inputs_of(chunk, REPEATS, BLOCK_K)[None]
    WHOLE: tl.constexpr = WIDTH % (REPEATS * BLOCK_K) == 0
    if WHOLE:
        return tl.load(X + k).to(tl.float32)
    else:
        return tl.load(X + k, mask=k < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def multiply_one(
    X, NORM, W, RESIDUAL, OUT, IDS, num_outputs, num_blocks, eps,
    KIND: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_E: tl.constexpr, REPEATS: tl.constexpr,
    BLOCK_K: tl.constexpr, MANY: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """norm(x) . weight' of one row, of which a program makes every num_programs-th block of outputs.

    KIND "sum": + residual, to OUT [E]. "swiglu": silu(gates) * ups, to OUT [F]. "largest": the largest of the program's
    outputs and who it is, to OUT and IDS [programs]. MANY: programs have more than one block, and read the next one's
    weights while they add up. NORM, RESIDUAL: may be None.
    """
    let_next(HOPPER)
    GATED: tl.constexpr = KIND == "swiglu"
    w = _weights(W, tl.program_id(0), 0, num_blocks, num_outputs, MANY, GATED, WIDTH, BLOCK_E, REPEATS, BLOCK_K)
    if NORM is not None and CHUNKS == 1:
        norm = _inputs(NORM, 0, WIDTH, REPEATS, BLOCK_K)
    wait(HOPPER)
    factor = 1.0
    if CHUNKS == 1:
        x = _inputs(X, 0, WIDTH, REPEATS, BLOCK_K)
        if NORM is not None:
            factor = tl.rsqrt(tl.sum(tl.reshape(x * x, [REPEATS * BLOCK_K]), 0) / WIDTH + eps)
            x = x * norm
    elif NORM is not None:
        squares = tl.zeros([1, BLOCK_K], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            x = _inputs(X, chunk, WIDTH, REPEATS, BLOCK_K)
            squares += tl.sum(x * x, 1)
        factor = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / WIDTH + eps)
    best, best_id = -float("inf"), 0
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        acc = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            if chunk + 1 < CHUNKS:
                later = _weights(W, block, chunk + 1, num_blocks, num_outputs, False, GATED, WIDTH,
                                 BLOCK_E, REPEATS, BLOCK_K)  # fmt: skip
            elif MANY:
                later = _weights(W, block + tl.num_programs(0), 0, num_blocks, num_outputs, True, GATED, WIDTH,
                                 BLOCK_E, REPEATS, BLOCK_K)  # fmt: skip
            else:
                later = w
            if CHUNKS > 1:
                x = _inputs(X, chunk, WIDTH, REPEATS, BLOCK_K)
                if NORM is not None:
                    x = x * _inputs(NORM, chunk, WIDTH, REPEATS, BLOCK_K)
            acc += tl.sum(w.to(tl.float32) * x, 1)
            w = later
        total = tl.sum(acc, 1) * factor
        outputs = block * BLOCK_E + tl.arange(0, BLOCK_E)
        if KIND == "swiglu":
            HALF: tl.constexpr = BLOCK_E // 2
            gate, up = tl.split(tl.permute(tl.reshape(total, [2, HALF]), [1, 0]))
            outputs = block * HALF + tl.arange(0, HALF)
            tl.store(OUT + outputs, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty))
        elif KIND == "largest":
            logits = total.to(X.dtype.element_ty).to(tl.float32)
            top = tl.max(logits, 0)
            top_id = tl.min(tl.where(logits == top, outputs, 2147483647), 0)
            best_id = tl.where(top > best, top_id, best_id)  # blocks ascend: the first of equals stays
            best = tl.maximum(best, top)
        else:
            if RESIDUAL is not None:
                total += tl.load(RESIDUAL + outputs).to(tl.float32)
            tl.store(OUT + outputs, total.to(OUT.dtype.element_ty))
    if KIND == "largest":
        tl.store(OUT + tl.program_id(0), best)
        tl.store(IDS + tl.program_id(0), best_id)


@triton.jit
def _turned(QKV, at, NORM, cos, sin, dims, eps, H: tl.constexpr, HAS_NORMS: tl.constexpr):
    """Heads at these places, normed and rotated. fp32 [heads, H]."""
    partners = tl.where(dims < H // 2, dims + H // 2, dims - H // 2)
    x = tl.load(QKV + at[:, None] + dims[None, :]).to(tl.float32)
    partner = tl.load(QKV + at[:, None] + partners[None, :]).to(tl.float32)
    if HAS_NORMS:
        factor = tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
        x = x * factor * tl.load(NORM + dims).to(tl.float32)[None, :]
        partner = partner * factor * tl.load(NORM + partners).to(tl.float32)[None, :]
    return x * cos[None, :] + tl.where(dims < H // 2, -1.0, 1.0)[None, :] * partner * sin[None, :]


@triton.jit
def read_tile(
    QKV, K, V, TABLE, LENGTHS, COS, SIN, QUERY_NORM, KEY_NORM, ACC, PEAK, TOTAL,
    kp, ks, kg, vp, vs, vg, eps, scale,
    NUM_HEADS: tl.constexpr, NUM_GROUPS: tl.constexpr, H: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr,
    TILE_M: tl.constexpr, HAS_NORMS: tl.constexpr, DOT: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """One key head's queries over a tile of slots; whose tile has the row's end, stores the new key and value, too.

    The state, as `attention_kernels.py` has it, to [T, N, H] and [T, N].
    """
    let_next(HOPPER)
    tile, g = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = NUM_HEADS // NUM_GROUPS
    dims = tl.arange(0, H)
    length = tl.load(LENGTHS)
    slots = tile * SLOTS + tl.arange(0, SLOTS)
    is_old = slots < length
    page = tl.load(TABLE + slots // S, mask=is_old, other=0).to(tl.int64)
    k = tl.load(K + g * kg + (page * kp + slots % S * ks)[:, None] + dims[None, :], mask=is_old[:, None], other=0.0)
    v = tl.load(V + g * vg + (page * vp + slots % S * vs)[:, None] + dims[None, :], mask=is_old[:, None], other=0.0)
    cos, sin = tl.load(COS + length * H + dims).to(tl.float32), tl.load(SIN + length * H + dims).to(tl.float32)
    new_page = tl.load(TABLE + length // S).to(tl.int64)
    wait(HOPPER)
    if tile * SLOTS <= length:
        lane = tl.arange(0, TILE_M)
        heads = g * GROUP + tl.minimum(lane, GROUP - 1)
        q = _turned(QKV, heads * H, QUERY_NORM, cos, sin, dims, eps, H, HAS_NORMS).to(k.dtype)
        scores = tl.where(is_old[None, :], tl.dot(q.to(DOT), tl.trans(k.to(DOT))) * scale, -float("inf"))
        peak = tl.maximum(tl.max(scores, 1), NOTHING)
        weights = tl.exp2(scores - peak[:, None])
        total = tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype).to(DOT), v.to(DOT))
        if tile == length // SLOTS:
            one = tl.arange(0, 1)
            new_k = _turned(QKV, (NUM_HEADS + g + one) * H, KEY_NORM, cos, sin, dims, eps, H, HAS_NORMS).to(k.dtype)
            new_v = tl.load(QKV + (NUM_HEADS + NUM_GROUPS + g + one)[:, None] * H + dims[None, :])
            tl.store(K + g * kg + new_page * kp + length % S * ks + dims[None, :], new_k)
            tl.store(V + g * vg + new_page * vp + length % S * vs + dims[None, :], new_v)
            score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
            top = tl.maximum(peak, score)
            fade, join = tl.exp2(peak - top), tl.exp2(score - top)
            acc = acc * fade[:, None] + join[:, None] * new_v.to(tl.float32)
            peak, total = top, total * fade + join
        to = tile * NUM_HEADS + heads
        tl.store(ACC + to[:, None] * H + dims[None, :], acc, mask=(lane < GROUP)[:, None])
        tl.store(PEAK + to, peak, mask=lane < GROUP)
        tl.store(TOTAL + to, total, mask=lane < GROUP)


@triton.jit
def merge_tiles(
    ACC, PEAK, TOTAL, LENGTHS, OUT,
    NUM_HEADS: tl.constexpr, H: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """The states of one head's tiles, folded."""
    let_next(HOPPER)
    head, tiles, dims = tl.program_id(0), tl.arange(0, TILES), tl.arange(0, H)
    is_there = tiles <= tl.load(LENGTHS) // SLOTS
    wait(HOPPER)
    at = tiles * NUM_HEADS + head
    peak = tl.load(PEAK + at, mask=is_there, other=NOTHING)
    total = tl.load(TOTAL + at, mask=is_there, other=0.0)
    acc = tl.load(ACC + at[:, None] * H + dims[None, :], mask=is_there[:, None], other=0.0)
    fade = tl.exp2(peak - tl.max(peak, 0))
    mixed = tl.sum(acc * fade[:, None], 0) / tl.sum(total * fade, 0)
    tl.store(OUT + head * H + dims, mixed.to(OUT.dtype.element_ty))
