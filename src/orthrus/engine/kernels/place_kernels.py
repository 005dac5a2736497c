"""The Triton kernel of `engine/kernels/place.py`.

T = heads of a tile, of all N + 2 G: queries, keys, values
"""

# pyrefly: ignore-errors
# Triton's language has Python's grammar and types of its own.

import triton
import triton.language as tl

from orthrus.engine.kernels.overlap import let_next, wait


@triton.jit
def _weights(is_query, QUERY_NORM, KEY_NORM, dims, is_dim):
    """The norm's weight of each head. [T, H]."""
    query = tl.load(QUERY_NORM + dims, mask=is_dim, other=0.0).to(tl.float32)
    key = tl.load(KEY_NORM + dims, mask=is_dim, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], query[None, :], key[None, :])


@triton.jit
def _norm(x, weight, scale_T, dtype):
    """x * scale * weight, rounded to the dtype; in fp32. [T, H]."""
    return (x * scale_T[:, None] * weight).to(dtype).to(tl.float32)


@triton.jit
def _read(QKV, SCALE, BIAS, at, outputs, part_stride, mask, SPLITS: tl.constexpr, dtype):
    """A projection: as it is, or its parts added in order, scaled, biased and rounded. fp32."""
    x = tl.load(QKV + at, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(QKV + split * part_stride + at, mask=mask, other=0.0)
    if SCALE is not None:
        x = x * tl.load(SCALE + outputs, mask=mask, other=0.0)
    if BIAS is not None:
        x = x + tl.load(BIAS + outputs, mask=mask, other=0.0).to(tl.float32)
    return x.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["eps", "table_pages", "width"])
def place(
    QKV, SCALE, BIAS, Q, K, V, TABLES, LENGTHS, COS, SIN, QUERY_NORM, KEY_NORM,
    part_stride, kp, ks, kg, vp, vs, vg, eps, table_pages, width,
    NUM_HEADS: tl.constexpr, NUM_GROUPS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, S: tl.constexpr,
    HAS_NORMS: tl.constexpr, HAS_OWN: tl.constexpr, TILE_T: tl.constexpr, SPLITS: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """A few heads of one position. With HAS_OWN, K and V are buffers [R, G, H] and have no pages."""
    let_next(HOPPER)
    row, heads = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    dims = tl.arange(0, BLOCK_H)
    is_dim = dims < H
    is_query, is_value = heads < NUM_HEADS, heads >= NUM_HEADS + NUM_GROUPS
    dtype = Q.dtype.element_ty
    mask = (heads < NUM_HEADS + 2 * NUM_GROUPS)[:, None] & is_dim[None, :]
    base, own_heads = row * (NUM_HEADS + 2 * NUM_GROUPS) * H, heads[:, None] * H
    position = tl.load(LENGTHS + row // width) + (row % width).to(tl.int32)
    if HAS_OWN:
        k_row, v_row = K + row * NUM_GROUPS * H, V + row * NUM_GROUPS * H
    else:
        page = tl.load(TABLES + row // width * table_pages + position // S).to(tl.int64)
        k_row, v_row = K + page * kp + position % S * ks, V + page * vp + position % S * vs
    angles = position.to(tl.int64) * H + dims
    cos = tl.load(COS + angles, mask=is_dim, other=0.0).to(tl.float32)
    sin = tl.load(SIN + angles, mask=is_dim, other=0.0).to(tl.float32)
    # Each dimension turns together with the one half a head away.
    partners = tl.where(dims < H // 2, dims + H // 2, dims - H // 2)
    if HAS_NORMS:
        weights = _weights(is_query, QUERY_NORM, KEY_NORM, dims, is_dim)
        partner_weights = _weights(is_query, QUERY_NORM, KEY_NORM, partners, is_dim)
    wait(HOPPER)
    raw = _read(QKV, SCALE, BIAS, base + own_heads + dims[None, :], own_heads + dims[None, :], part_stride, mask,
                SPLITS, dtype)  # fmt: skip
    x = raw
    partner = _read(QKV, SCALE, BIAS, base + own_heads + partners[None, :], own_heads + partners[None, :], part_stride,
                    mask, SPLITS, dtype)  # fmt: skip
    if HAS_NORMS:
        scale_T = tl.rsqrt(tl.sum(x * x, 1) / H + eps)
        x = _norm(x, weights, scale_T, dtype)
        partner = _norm(partner, partner_weights, scale_T, dtype)
    turned = tl.where(dims < H // 2, -1.0, 1.0)[None, :] * partner
    turned = (turned * sin[None, :]).to(dtype).to(tl.float32)
    x = ((x * cos[None, :]).to(dtype).to(tl.float32) + turned).to(dtype)
    tl.store(Q + (row * NUM_HEADS + heads[:, None]) * H + dims[None, :], x, mask=mask & is_query[:, None])
    key, value = heads - NUM_HEADS, heads - NUM_HEADS - NUM_GROUPS
    is_key = (key >= 0)[:, None] & (value < 0)[:, None]
    tl.store(k_row + key[:, None] * kg + dims[None, :], x, mask=mask & is_key)
    tl.store(v_row + value[:, None] * vg + dims[None, :], raw.to(dtype), mask=mask & is_value[:, None])
