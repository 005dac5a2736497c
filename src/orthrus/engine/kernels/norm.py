"""RMS norm: one program a row, whose block is the row's width, so that its sum has one order.

R = rows of a pass, D = hidden width
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from orthrus.engine.kernels.overlap import follow, overlap


@triton.jit
def _rms_norm(X, WEIGHT, OUT, x_stride, width, eps, BLOCK: tl.constexpr, HOPPER: tl.constexpr):
    """One row."""
    follow(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(X + row * x_stride + at, mask=at < width, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + at, mask=at < width, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(OUT + row * width + at, (normed * weight).to(OUT.dtype.element_ty), mask=at < width)


def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in fp32, rounded once. [R, D]."""
    num_rows, width = x_RD.shape
    if (x_RD.stride(1) != 1 and width > 1) or weight_D.shape != (width,) or not weight_D.is_contiguous():
        raise ValueError(
            f"rows of {width} numbers that lie together need a weight of [{width}], got strides "
            f"{x_RD.stride()} and a weight of {list(weight_D.shape)}"
        )
    out = x_RD.new_empty(num_rows, width)
    if num_rows:
        kernel: Any = _rms_norm
        block = triton.next_power_of_2(width)
        kernel[(num_rows,)](
            x_RD, weight_D, out, x_RD.stride(0), width, eps,
            BLOCK=block, num_warps=min(8, max(1, block // 512)), enable_fp_fusion=False, **overlap(x_RD),
        )  # fmt: skip
    return out
