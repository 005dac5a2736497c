"""The Triton kernels of `linear.py`, and the products that `head_kernels.py` shares.

Operands are swapped: weight rows are the M side of the MMA, rows of the pass its N side, so that a tile of few rows
wastes little and a weight is read once. Rows and outputs that are not there do as the last one, and are not stored.
"""

# pyrefly: ignore-errors
# Triton's language has Python's grammar and types of its own.

import triton
import triton.language as tl

from orthrus.engine.kernels.overlap import follow, let_next, wait


@triton.jit
def product(X, X_SCALE, W, x_stride, width, rows_R, outputs_E, begin, end,
            BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
            BY: tl.constexpr):  # fmt: skip
    """The part of weight . x' that inputs begin .. end - 1 make, a block of inputs after the other. fp32 [E, R].

    Parts are scaled, not their sum: who adds them up does not know rows' scales, and has to find the same bits.
    """
    weights = W + outputs_E.to(tl.int64)[:, None] * width
    inputs = X + rows_R.to(tl.int64)[None, :] * x_stride
    acc = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    for at in range(begin, end, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        if WHOLE:
            w, x = tl.load(weights + k[None, :]), tl.load(inputs + k[:, None])
        else:
            w = tl.load(weights + k[None, :], mask=(k < width)[None, :], other=0.0)
            x = tl.load(inputs + k[:, None], mask=(k < width)[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision=BY)
    if X_SCALE is not None:  # rows are quantised
        acc = acc * tl.load(X_SCALE + rows_R)[None, :]
    return acc


@triton.jit
def whole_product(X, X_SCALE, W, x_stride, width, per_split, rows_R, outputs_E, SPLITS: tl.constexpr,
                  BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
                  BY: tl.constexpr):  # fmt: skip
    """weight . x' with the bits that adding the splits' parts in order gives. fp32 [E, R]."""
    total = product(X, X_SCALE, W, x_stride, width, rows_R, outputs_E, 0, tl.minimum(per_split, width),
                    BLOCK_E, BLOCK_R, BLOCK_K, WHOLE, BY)  # fmt: skip
    for split in range(1, SPLITS):  # not unrolled: it would take more registers than there are
        total += product(X, X_SCALE, W, x_stride, width, rows_R, outputs_E,
                         split * per_split, tl.minimum((split + 1) * per_split, width),
                         BLOCK_E, BLOCK_R, BLOCK_K, WHOLE, BY)  # fmt: skip
    return total


@triton.jit
def _finish(total, SCALE, BIAS, RESIDUAL, outputs, residuals, is_stored):
    """total * scale + bias + residual, whichever there are."""
    if SCALE is not None:
        total = total * tl.load(SCALE + outputs)
    if BIAS is not None:
        total = total + tl.load(BIAS + outputs).to(tl.float32)
    if RESIDUAL is not None:
        total = total + tl.load(RESIDUAL + residuals, mask=is_stored, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def multiply(
    X, X_SCALE, W, SCALE, BIAS, RESIDUAL, OUT,
    x_stride, residual_stride, num_rows, num_outputs, width, per_split,
    SPLITS: tl.constexpr, SPREAD: tl.constexpr, GATED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, BY: tl.constexpr,
    HOPPER: tl.constexpr,
):  # fmt: skip
    """One tile of rows by one of weight rows: finished, or (SPREAD) one split's part of it into OUT [SPLITS, R, E].

    GATED: weight rows are num_outputs gates, then as many ups, and a tile is half of each.
    """
    follow(HOPPER)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    read_rows = tl.minimum(rows, num_rows - 1)
    if GATED and not SPREAD:
        HALF: tl.constexpr = BLOCK_E // 2
        lane = tl.arange(0, BLOCK_E)
        gates = tl.minimum(tl.program_id(1) * HALF + lane % HALF, num_outputs - 1)
        read_outputs = gates + lane // HALF * num_outputs
        total = whole_product(X, X_SCALE, W, x_stride, width, per_split, read_rows, read_outputs, SPLITS,
                              BLOCK_E, BLOCK_R, BLOCK_K, WHOLE, BY)  # fmt: skip
        if SCALE is not None:
            total = total * tl.load(SCALE + read_outputs)[:, None]
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, HALF, BLOCK_R]), [1, 2, 0]))
        total = gate * tl.sigmoid(gate) * up
        outputs = tl.program_id(1) * HALF + tl.arange(0, HALF)
    else:
        outputs = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        read_outputs = tl.minimum(outputs, num_outputs - 1)
        if SPREAD:
            split = tl.program_id(2)
            total = product(X, X_SCALE, W, x_stride, width, read_rows, read_outputs,
                            split * per_split, tl.minimum((split + 1) * per_split, width),
                            BLOCK_E, BLOCK_R, BLOCK_K, WHOLE, BY)  # fmt: skip
            OUT += split.to(tl.int64) * num_rows * num_outputs
        else:
            total = whole_product(X, X_SCALE, W, x_stride, width, per_split, read_rows, read_outputs, SPLITS,
                                  BLOCK_E, BLOCK_R, BLOCK_K, WHOLE, BY)  # fmt: skip
            residuals = read_rows.to(tl.int64)[None, :] * residual_stride + read_outputs[:, None]
            total = _finish(total, SCALE, BIAS, RESIDUAL, read_outputs[:, None], residuals,
                            (rows < num_rows)[None, :])  # fmt: skip
    is_stored = (rows < num_rows)[None, :] & (outputs < num_outputs)[:, None]
    places = rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    tl.store(OUT + places, total.to(OUT.dtype.element_ty), mask=is_stored)


@triton.jit
def _tma_product(X, W, first_row, first_output, num_blocks, split_blocks,
                 BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The sum of the parts that `split_blocks` blocks of inputs make each. fp32 [E, R].

    One loop over all blocks, or the first blocks of a part would not be on their way while the part before it ends.
    """
    total = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    left = split_blocks
    for block in range(0, num_blocks):
        w, x = W.load([first_output, block * BLOCK_K]), X.load([first_row, block * BLOCK_K])
        acc = tl.dot(w, x.T, acc)
        left -= 1
        if left == 0:
            total += acc
            acc = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
            left = split_blocks
    return total + acc  # a last part may be shorter; 0 is added exactly, to a sum that is never -0


@triton.jit
def tma_part(X, W, first_row, first_output, begin, end,
             BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The part that blocks begin .. end - 1 of inputs make. fp32 [E, R]."""
    acc = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    for block in range(begin, end):
        w, x = W.load([first_output, block * BLOCK_K]), X.load([first_row, block * BLOCK_K])
        acc = tl.dot(w, x.T, acc)
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "split_blocks"])
def multiply_by_tma(
    X, W, SCALE, BIAS, RESIDUAL, OUT,
    residual_stride, num_rows, num_outputs, num_blocks, split_blocks,
    SPLITS: tl.constexpr, SPREAD: tl.constexpr, GATED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """`multiply` for many rows, bit for bit. X and W are descriptors of tiles, which the tensor memory accelerator
    fetches (0 beyond an edge); gates and ups, of one part only, are two products of half of BLOCK_E."""
    follow(HOPPER)
    first_row = tl.program_id(0) * BLOCK_R
    rows = first_row + tl.arange(0, BLOCK_R)
    TILE_E: tl.constexpr = BLOCK_E // 2 if GATED else BLOCK_E
    first_output = tl.program_id(1) * TILE_E
    outputs = first_output + tl.arange(0, TILE_E)
    read_outputs = tl.minimum(outputs, num_outputs - 1)
    if GATED:
        gate = tl.zeros([TILE_E, BLOCK_R], tl.float32)
        up = tl.zeros([TILE_E, BLOCK_R], tl.float32)
        for block in range(0, num_blocks):
            x = X.load([first_row, block * BLOCK_K]).T
            gate = tl.dot(W.load([first_output, block * BLOCK_K]), x, gate)
            up = tl.dot(W.load([num_outputs + first_output, block * BLOCK_K]), x, up)
        if SCALE is not None:
            gate = gate * tl.load(SCALE + read_outputs)[:, None]
            up = up * tl.load(SCALE + num_outputs + read_outputs)[:, None]
        total = gate * tl.sigmoid(gate) * up
    elif SPREAD:
        split = tl.program_id(2)
        total = tma_part(X, W, first_row, first_output, split * split_blocks,
                         tl.minimum((split + 1) * split_blocks, num_blocks), BLOCK_E, BLOCK_R, BLOCK_K)  # fmt: skip
        OUT += split.to(tl.int64) * num_rows * num_outputs
    else:
        if SPLITS == 1:
            total = tma_part(X, W, first_row, first_output, 0, num_blocks, BLOCK_E, BLOCK_R, BLOCK_K)
        else:
            total = _tma_product(X, W, first_row, first_output, num_blocks, split_blocks, BLOCK_E, BLOCK_R, BLOCK_K)
        residuals = rows.to(tl.int64)[None, :] * residual_stride + read_outputs[:, None]
        total = _finish(total, SCALE, BIAS, RESIDUAL, read_outputs[:, None], residuals, (rows < num_rows)[None, :])
    is_stored = (rows < num_rows)[None, :] & (outputs < num_outputs)[:, None]
    places = rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    tl.store(OUT + places, total.to(OUT.dtype.element_ty), mask=is_stored)


@triton.jit
def _add_up(parts, part_stride, is_stored, SPLITS: tl.constexpr):
    """The parts of a sum, first to last."""
    total = tl.load(parts, mask=is_stored, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * part_stride, mask=is_stored, other=0.0)
    return total


@triton.jit
def add_up(
    PARTS, SCALE, BIAS, RESIDUAL, OUT,
    residual_stride, part_stride, num_outputs,
    SPLITS: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Add the splits' parts [SPLITS, R, E] of one row in order, and finish."""
    follow(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_stored = outputs < num_outputs
    read_outputs = tl.minimum(outputs, num_outputs - 1)
    if GATED:
        parts = PARTS + row * 2 * num_outputs + outputs
        gate = _add_up(parts, part_stride, is_stored, SPLITS)
        up = _add_up(parts + num_outputs, part_stride, is_stored, SPLITS)
        if SCALE is not None:
            gate = gate * tl.load(SCALE + read_outputs)
            up = up * tl.load(SCALE + num_outputs + read_outputs)
        total = gate * tl.sigmoid(gate) * up
    else:
        total = _add_up(PARTS + row * num_outputs + outputs, part_stride, is_stored, SPLITS)
        total = _finish(total, SCALE, BIAS, RESIDUAL, read_outputs, row * residual_stride + outputs, is_stored)
    tl.store(OUT + row * num_outputs + outputs, total.to(OUT.dtype.element_ty), mask=is_stored)


@triton.jit
def add_up_and_norm(
    PARTS, SCALE, BIAS, RESIDUAL, WEIGHT, OUT, NORMED,
    residual_stride, part_stride, num_outputs, eps,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Add one row's parts [SPLITS, R, E] in order and finish, as `add_up`, then the RMS norm of what was stored."""
    let_next(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.arange(0, BLOCK)
    is_stored = outputs < num_outputs
    read_outputs = tl.minimum(outputs, num_outputs - 1)
    weight = tl.load(WEIGHT + read_outputs).to(tl.float32)
    wait(HOPPER)
    total = _add_up(PARTS + row * num_outputs + outputs, part_stride, is_stored, SPLITS)
    total = _finish(total, SCALE, BIAS, RESIDUAL, read_outputs, row * residual_stride + outputs, is_stored)
    rounded = total.to(OUT.dtype.element_ty)
    tl.store(OUT + row * num_outputs + outputs, rounded, mask=is_stored)
    x = tl.where(is_stored, rounded.to(tl.float32), 0.0)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / num_outputs + eps) * weight
    tl.store(NORMED + row * num_outputs + outputs, normed.to(NORMED.dtype.element_ty), mask=is_stored)
