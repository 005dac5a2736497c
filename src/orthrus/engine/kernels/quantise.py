"""Rows in fp8, for products with fp8 weights: one program a row.

R = rows of a pass, D = width
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus.engine.kernels.overlap import follow, overlap
from orthrus.engine.quantise import LARGEST


@triton.jit
def _quantise(X, OUT, SCALES, x_stride, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr, HOPPER: tl.constexpr):
    """One row: its largest number becomes the largest of fp8."""
    follow(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(X + row * x_stride + at, mask=at < width, other=0.0).to(tl.float32)
    # Not below the smallest normal number: a row of zeros stays zero instead of becoming 0 / 0. Quotients are rounded
    # as everybody else rounds them, which Triton's own division does not promise.
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), LARGEST), 1.1754943508222875e-38)
    tl.store(OUT + row * width + at, tl.div_rn(x, scale).to(OUT.dtype.element_ty), mask=at < width)
    tl.store(SCALES + row, scale)


def quantise(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [R, D] and fp32 scales [R]: the bits of `orthrus.engine.quantise.quantise_rows`.

    A row that holds a NaN keeps it, but its scale may be a number.
    """
    num_rows, width = x_RD.shape
    assert x_RD.stride(1) == 1 or width == 1, "a row lies together"
    quantised_RD = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x_RD.device)
    scale_R = torch.empty(num_rows, dtype=torch.float32, device=x_RD.device)
    if num_rows:
        kernel: Any = _quantise
        block = triton.next_power_of_2(width)
        kernel[(num_rows,)](
            x_RD, quantised_RD, scale_R, x_RD.stride(0), width, LARGEST=LARGEST,
            BLOCK=block, num_warps=min(8, max(1, block // 512)), enable_fp_fusion=False, **overlap(x_RD),
        )  # fmt: skip
    return quantised_RD, scale_R
