"""The arithmetic of fp8 that the kernels' tests give to Triton's interpreter, and that a GPU has."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.interpreter import DEVICE, gpu_arithmetic  # noqa: F401

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

EVERY_BYTE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
"""All numbers of fp8; bytes 127 and 255 are NaN."""


@triton.jit
def _cast(X, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(OUT + at, tl.load(X + at).to(OUT.dtype.element_ty))


@triton.jit
def _dot(A, B, OUT, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    places = rows * N + columns
    tl.store(OUT + places, tl.dot(tl.load(A + places), tl.load(B + places)))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a kernel casts x to."""
    kernel: Any = _cast
    padded = torch.zeros(triton.next_power_of_2(len(x)), device=DEVICE)
    padded[: len(x)] = x
    out = torch.empty(len(padded), dtype=dtype, device=DEVICE)
    kernel[(1,)](padded, out, N=len(padded))
    return out[: len(x)].cpu()


def points() -> Tensor:
    """fp32 numbers at and around all of fp8, the middles between them, and far beyond."""
    finite = EVERY_BYTE[:127].float()
    middles = (finite[1:] + finite[:-1]) / 2
    near = torch.cat([finite, middles, torch.tensor([464.0, 480.0, 1e9, torch.inf]), torch.logspace(-12, 4, 300)])
    near = torch.cat([near, near.nextafter(torch.tensor(torch.inf)), near.nextafter(torch.tensor(0.0))])
    return torch.cat([near, -near])


def nearest(x: Tensor) -> Tensor:
    """Bytes of the nearest numbers of fp8, of two as near the even one; beyond the largest, the largest."""
    finite = EVERY_BYTE[:127].double()
    distance = (x.abs().double().clamp(max=448)[:, None] - finite).abs()
    is_nearest = distance == distance.min(1, keepdim=True).values
    is_even = torch.arange(127) % 2 == 0
    code = (is_nearest * (1 + is_even)).int().argmax(1)
    return (code + 128 * x.signbit()).to(torch.uint8)


def test_casts_to_fp8_are_to_the_nearest_and_saturate() -> None:
    x = points()
    assert cast(x, torch.float8_e4m3fn).view(torch.uint8).tolist() == nearest(x).tolist()
    assert cast(torch.tensor([torch.nan]), torch.float8_e4m3fn).view(torch.uint8).tolist() == [127]


def test_casts_to_fp8_are_torchs() -> None:
    """Random bits are fp32 numbers of all sizes. Up to 464, where a GPU saturates and torch need not."""
    bits = torch.randint(-(2**31), 2**31, (1 << 16,)).int().view(torch.float32)
    x = torch.cat([bits, torch.randn(1 << 16) * 100])
    x = x[x.abs() <= 464]
    assert torch.equal(cast(x, torch.float8_e4m3fn).view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_products_of_fp8_are_of_its_numbers() -> None:
    """Every finite number of fp8 times one of each size: the rest are zeros, so that nothing is rounded on a GPU."""
    every = EVERY_BYTE.float().nan_to_num().repeat(4).view(32, 32)
    factors = torch.diag(EVERY_BYTE[:127].float()[::4])
    kernel: Any = _dot
    for left, right in ((every, factors), (factors, every)):
        out = torch.empty(32, 32, device=DEVICE)
        kernel[(1,)](*(x.to(torch.float8_e4m3fn).to(DEVICE) for x in (left, right)), out, N=32)
        assert torch.equal(out.cpu(), left @ right)
