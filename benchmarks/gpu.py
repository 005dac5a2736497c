"""What the GPU benchmarks share: Qwen3's published shapes, and the read-only stream that floors are computed from."""

import statistics
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class ModelShape(NamedTuple):
    """The widths of a model."""

    layers: int
    hidden: int
    heads: int
    groups: int
    mlp: int
    head_dim: int
    vocab: int
    tied: bool


MODELS = {
    "toy": ModelShape(2, 64, 4, 2, 96, 16, 200, True),
    "1.7b": ModelShape(28, 2048, 16, 8, 6144, 128, 151_936, True),
    "4b": ModelShape(36, 2560, 32, 8, 9728, 128, 151_936, True),
    "8b": ModelShape(36, 4096, 32, 8, 12_288, 128, 151_936, False),
}
"""Published configurations of Qwen3, and one that runs anywhere."""


@triton.jit
def read_only(X, OUT, BLOCK: tl.constexpr):
    """Read a block and keep nothing."""
    x = tl.load(X + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    largest = tl.max(x, 0)
    if largest > 3.0e38:  # never, but without it nothing would have to be read
        tl.store(OUT, 1.0)


def on_device(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stream_tbps(device: torch.device, num_bytes: int = 4 << 30) -> float:
    """TB/s of reading so many bytes once with a kernel that does nothing else; not a number without a GPU."""
    if device.type != "cuda":
        return float("nan")
    block = 8192
    x, out = torch.randn(num_bytes // 4, device=device), torch.zeros(1, device=device)
    kernel: Any = read_only
    times = []
    for _ in range(23):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        kernel[(len(x) // block,)](x, out, BLOCK=block, num_warps=8)
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended))
    return x.nbytes / statistics.median(times[3:]) * 1e-9
