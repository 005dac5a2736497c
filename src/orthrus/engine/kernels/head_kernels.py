"""The Triton kernels of `head.py`."""

# pyrefly: ignore-errors
# Triton's language has Python's grammar and types of its own.

import triton
import triton.language as tl

from orthrus.engine.kernels.linear_kernels import tma_part, whole_product
from orthrus.engine.kernels.overlap import follow


@triton.jit
def _largest(logits, ids, axis: tl.constexpr):
    """The largest logit along an axis and the lowest id that has it. NaN counts as infinite: it equals no logit."""
    logits = tl.where(logits == logits, logits, float("inf"))
    best = tl.max(logits, axis)
    return best, tl.min(tl.where(logits == tl.expand_dims(best, axis), ids, 2147483647), axis)


@triton.jit(do_not_specialize=["num_rows"])
def tile_largest(
    X, X_SCALE, W, SCALE, VALUES, IDS, x_stride, num_rows, vocab_size, num_tiles, width, per_split,
    SPLITS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
    BY: tl.constexpr, DTYPE: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """The largest logit of one tile of the vocabulary, and its id, for one tile of rows. Into [R, tiles]."""
    follow(HOPPER)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tile = tl.program_id(1)
    # Ids that are not there do as the last, id included: they change neither the largest nor who has it.
    ids = tl.minimum(tile * BLOCK_E + tl.arange(0, BLOCK_E), vocab_size - 1)
    logits = whole_product(X, X_SCALE, W, x_stride, width, per_split, tl.minimum(rows, num_rows - 1), ids, SPLITS,
                           BLOCK_E, BLOCK_R, BLOCK_K, WHOLE, BY)  # fmt: skip
    if SCALE is not None:
        logits = logits * tl.load(SCALE + ids)[:, None]
    _keep_largest(logits, ids, VALUES, IDS, rows, num_rows, tile, num_tiles, DTYPE)


@triton.jit
def _keep_largest(logits, ids, VALUES, IDS, rows, num_rows, tile, num_tiles, DTYPE: tl.constexpr):
    """The largest of a tile's logits [E, R] once rounded, and its id."""
    best, best_id = _largest(logits.to(DTYPE).to(tl.float32), ids[:, None], 0)
    places = rows.to(tl.int64) * num_tiles + tile
    tl.store(VALUES + places, best, mask=rows < num_rows)
    tl.store(IDS + places, best_id, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def tile_largest_by_tma(
    X, W, SCALE, VALUES, IDS, num_rows, vocab_size, num_tiles, num_blocks,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """`tile_largest` for many rows, as `multiply_by_tma` is `multiply`; the sum has one part."""
    follow(HOPPER)
    first_row, tile = tl.program_id(0) * BLOCK_R, tl.program_id(1)
    ids = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    logits = tma_part(X, W, first_row, tile * BLOCK_E, 0, num_blocks, BLOCK_E, BLOCK_R, BLOCK_K)
    if SCALE is not None:
        logits = logits * tl.load(SCALE + tl.minimum(ids, vocab_size - 1))[:, None]
    logits = tl.where((ids < vocab_size)[:, None], logits, -float("inf"))  # 0 was fetched
    _keep_largest(logits, tl.minimum(ids, vocab_size - 1), VALUES, IDS, first_row + tl.arange(0, BLOCK_R), num_rows,
                  tile, num_tiles, DTYPE)  # fmt: skip


@triton.jit
def row_largest(VALUES, IDS, OUT, num_tiles, BLOCK: tl.constexpr, HOPPER: tl.constexpr):
    """The largest of one row's tiles."""
    follow(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    # Tiles that are not there do as the last.
    tiles = row * num_tiles + tl.minimum(tl.arange(0, BLOCK), num_tiles - 1)
    best, best_id = _largest(tl.load(VALUES + tiles), tl.load(IDS + tiles), 0)
    tl.store(OUT + row, best_id.to(tl.int64))
