"""Where the kernels' tests run: a GPU, or Triton's interpreter with the arithmetic of a GPU.

The interpreter leaves tl.dot to a BLAS, which sums an element in an order that depends on the tile's shape and the
element's place in it, and multiplies the bit patterns of bf16 as integers. It cuts fp32 off to bf16 where a GPU rounds,
misreads bf16's subnormals, and rounds to fp8 without carries, ties to even or a largest number. An MMA sums each
element over k by itself, whatever the tile: tests of bits need that of the interpreter too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ordered_dot(a: Any, b: Any, d: Any, *how: Any) -> Any:
    """d + a . b, one k after the other in fp32."""
    from triton.runtime.interpreter import TensorHandle

    left, right = numbers(a), numbers(b)
    total = d.data.astype(np.float32)
    for k in range(left.shape[1]):
        total = total + left[:, k, None] * right[k]
    return TensorHandle(total, d.dtype.scalar)


HELD_AS_BITS = {"bf16": (torch.bfloat16, torch.uint16), "fp8e4nv": (torch.float8_e4m3fn, torch.uint8)}
"""What numpy has no dtype for: the interpreter's name, torch's, and that of its bits."""


def numbers(handle: Any) -> Any:
    """A tile of the interpreter in fp32. [rows, columns]."""
    if (name := str(handle.dtype.scalar)) not in HELD_AS_BITS:
        return handle.data.astype(np.float32)
    dtype, bits = HELD_AS_BITS[name]
    return torch.from_numpy(np.array(handle.data)).view(bits).view(dtype).float().numpy()


def rounded(source: Any, target: Any) -> Any:
    """fp32 as bits of a dtype that numpy has not: to nearest, ties to even, fp8 saturated, as torch and cvt.rn do."""
    from triton.runtime.interpreter import TensorHandle

    dtype, bits = HELD_AS_BITS[str(target.scalar)]
    # 0-d tensors have no array of their own to be made from.
    converted = torch.from_numpy(np.array(source.data, dtype=np.float32)).to(dtype)
    return TensorHandle(converted.view(bits).numpy(), target.scalar)


@pytest.fixture(autouse=True)
def gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import this into a test module whose kernels multiply matrices or write bf16."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    def rounding(convert: Callable[..., Any]) -> Callable[..., Any]:
        def cast(source: Any, target: Any, *how: Any) -> Any:
            match str(source.dtype.scalar), str(target.scalar):
                case "fp32", name if name in HELD_AS_BITS:
                    return rounded(source, target)
                case name, "fp32" if name in HELD_AS_BITS:
                    return TensorHandle(numbers(source), target.scalar)
            return convert(source, target, *how)

        return cast

    monkeypatch.setattr(interpreter_builder, "create_dot", ordered_dot)
    for name in ("cast_impl", "create_fp_to_fp"):  # the second casts to and from fp8
        monkeypatch.setattr(interpreter_builder, name, rounding(getattr(interpreter_builder, name)))
