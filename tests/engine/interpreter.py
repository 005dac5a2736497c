"""Where the kernels' tests run: a GPU, or Triton's interpreter with the arithmetic of a GPU.

The interpreter leaves tl.dot to a BLAS, which sums an element in an order that depends on the tile's shape and the
element's place in it, and multiplies the bit patterns of bf16 as integers; and it cuts fp32 off to bf16 instead of
rounding. An MMA sums each element over k by itself, whatever the tile: tests of bits need that of the interpreter too.
"""

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


def numbers(handle: Any) -> Any:
    """A tile of the interpreter in fp32; it holds bf16 as its bits. [rows, columns]."""
    if str(handle.dtype.scalar) == "bf16":
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


@pytest.fixture(autouse=True)
def gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import this into a test module whose kernels multiply matrices or write bf16."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    cast = interpreter_builder.cast_impl

    def rounding_cast(source: Any, target: Any) -> Any:
        if (str(source.dtype.scalar), str(target.scalar)) != ("fp32", "bf16"):
            return cast(source, target)
        # 0-d tensors have no array of their own to be made from.
        rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), target.scalar)

    monkeypatch.setattr(interpreter_builder, "create_dot", ordered_dot)
    monkeypatch.setattr(interpreter_builder, "cast_impl", rounding_cast)
