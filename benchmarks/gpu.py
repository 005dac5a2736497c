"""What the GPU benchmarks share: Qwen3's published shapes, the clock, and the stream that floors are computed from.

Where there is no GPU, set TRITON_INTERPRET before this is imported.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
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

COLD_BYTES = 256 << 20
"""Bytes of all copies of what is read together, at least: five times the L2 cache of an H200 (50 MiB)."""

MIN_CALLS = 16
"""Calls of one replay, at least: it is long against its launch."""


def in_processes(work: Callable[..., None], shares: Sequence[Any], *others: Any) -> None:
    """work(share, *others) for each share in a process of its own, until all have ended."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(share, *others)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def product_shapes(model: ModelShape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each product of a pass."""
    width, kv_width = model.heads * model.head_dim, model.groups * model.head_dim
    return {
        "qkv": (width + 2 * kv_width, model.hidden),
        "o": (model.hidden, width),
        "gate_up": (2 * model.mlp, model.hidden),
        "down": (model.hidden, model.mlp),
        "head": (model.vocab, model.hidden),
    }


def microseconds(calls: Sequence[Callable[[], Any]], device: torch.device, *, repeats: int = 50) -> float:
    """Median time of one of the calls, all of them run one after another in one graph; once, without a GPU."""
    if device.type != "cuda":
        begun = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begun) / len(calls) * 1e6
    calls = [*calls] * max(1, MIN_CALLS // len(calls))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended))
    return statistics.median(times[2:]) / len(calls) * 1e3


@triton.jit
def read_only(X, OUT, BLOCK: tl.constexpr):
    """Read a block and keep nothing."""
    x = tl.load(X + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    largest = tl.max(x, 0)
    # Never, but without it nothing would have to be read. (Triton's types are not Python's.)
    if largest > 3.0e38:  # pyrefly: ignore
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
