"""Microseconds of the engine's attention and of placing heads, at exact Qwen3 shapes, beside a read-only stream.

    python benchmarks/attention.py        # 1.7b and 8b, 1k / 8k / 40k of context, one position and 32, batch 1 and 16
    python benchmarks/attention.py --device cpu --shape toy --context 40 --batch 2 --width 2    # does it run; no number

A line for each pass: its microseconds, the bytes of keys and values it must read, and how long the measured stream
would take for them. Passes are captured once for each of enough copies of the pages to exceed the L2 cache several
times and replayed as one graph, as the layers of a model follow one another; the time is the median over replays. The
stream reads `--stream-bytes` with a kernel that does nothing else. `attend` is the AR view; `attend_draft` also reads
an own block.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import triton
import triton.language as tl

from orthrus.engine.kernels.attention import attend
from orthrus.engine.kernels.place import place_heads
from orthrus.engine.reference import HeadNorms, Pages, Rotary
from orthrus.evaluation.records import ResultRecord, here_and_now, to_json

SHAPES = {"toy": (4, 2, 16), "1.7b": (16, 8, 128), "4b": (32, 8, 128), "8b": (32, 8, 128)}
"""Query heads, key heads, head dimension; 4b and 8b are the same pass."""

PAGE_SLOTS = 64

MIN_CALLS = 16
"""Passes of one replay, at least."""

COLD_BYTES = 256 << 20
"""Bytes of all copies of the pages together: several times the L2 cache of an H200 (50 MiB)."""


@triton.jit
def read_only(X, OUT, BLOCK: tl.constexpr):
    """Read a block and keep nothing."""
    x = tl.load(X + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    largest = tl.max(x, 0)
    if largest > 3.0e38:  # never, but without it nothing would have to be read
        tl.store(OUT, 1.0)


def microseconds(calls: list[Callable[[], Any]], *, repeats: int, device: str) -> float:
    """Median time of one of the calls, all of them run one after another in one graph."""
    if device == "cpu":
        begun = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begun) / len(calls) * 1e6
    calls = calls * max(1, MIN_CALLS // len(calls))  # a replay is long against its launch
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


def stream_tbps(num_bytes: int, *, repeats: int, device: str) -> float:
    """TB/s of reading so many bytes once."""
    block = 8192
    x, out = torch.zeros(num_bytes // 4 // block * block, device=device), torch.zeros(1, device=device)
    kernel: Any = read_only
    call = partial(kernel[(len(x) // block,)], x, out, BLOCK=block, num_warps=8)
    return x.numel() * 4 / microseconds([call], repeats=repeats, device=device) / 1e6


def layers(context: int, batch: int, width: int, *, shape: tuple[int, int, int], how: dict[str, Any]) -> list[Pages]:
    """Pages of rows of `context` tokens about to have `width` more, as many times as fill COLD_BYTES."""
    _, num_groups, head_dim = shape
    table_pages = triton.cdiv(context + width, PAGE_SLOTS)
    size = (batch * table_pages, PAGE_SLOTS, num_groups, head_dim)
    layer_bytes = 2 * batch * table_pages * PAGE_SLOTS * num_groups * head_dim * 2
    count = 1 if how["device"] == "cpu" else max(1, min(36, COLD_BYTES // layer_bytes))
    tables = torch.randperm(size[0], device=how["device"]).view(batch, table_pages).int()
    lengths = torch.full((batch,), context, dtype=torch.int32, device=how["device"])
    return [Pages(torch.randn(size, **how), torch.randn(size, **how), tables, lengths) for _ in range(count)]


def passes(
    context: int, batch: int, width: int, *, shape: tuple[int, int, int], how: dict[str, Any]
) -> dict[str, tuple[list[Callable[[], Tensor]], int]]:
    """Each kernel's calls over all copies, and the bytes that one of them must read (and, placing, write)."""
    num_heads, num_groups, head_dim = shape
    rows = batch * width
    copies = layers(context, batch, width, shape=shape, how=how)
    q = torch.randn(rows, num_heads, head_dim, **how)
    own = torch.randn(rows, num_groups, head_dim, **how), torch.randn(rows, num_groups, head_dim, **how)
    qkv = torch.randn(rows, (num_heads + 2 * num_groups) * head_dim, **how)
    rotary = Rotary(torch.randn(context + width, head_dim, **how), torch.randn(context + width, head_dim, **how))
    norms = HeadNorms(torch.ones(head_dim, **how), torch.ones(head_dim, **how), 1e-6)
    widths = torch.full((batch,), width, dtype=torch.int32, device=how["device"])
    scale, slot_bytes = head_dim**-0.5, 2 * num_groups * head_dim * 2
    draft: dict[str, Any] = dict(width=width, scale=scale, own=own, widths_B=widths)
    place: dict[str, Any] = dict(num_heads=num_heads, width=width)
    return {
        "attend": (
            [partial(attend, q, pages, width=width, scale=scale) for pages in copies],
            batch * (context + width) * slot_bytes,
        ),
        "attend_draft": ([partial(attend, q, pages, **draft) for pages in copies], batch * context * slot_bytes),
        "place": ([partial(place_heads, qkv, pages, rotary, norms, **place) for pages in copies], 2 * qkv.numel() * 2),
    }


def main() -> None:
    """Print a table, and as the last line the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="several: one after the other (1.7b, 8b)")
    parser.add_argument("--context", type=int, action="append", help="tokens in the cache (1024, 8192, 40960)")
    parser.add_argument("--width", type=int, action="append", help="positions of a pass (1, 32)")
    parser.add_argument("--batch", type=int, action="append", help="rows (1, 16)")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--stream-bytes", type=int, default=4 << 30)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    origin = here_and_now(torch.device(options.device))
    how: dict[str, Any] = dict(device=options.device, dtype=torch.bfloat16)
    timing: dict[str, Any] = dict(repeats=options.repeats, device=options.device)
    tbps = stream_tbps(options.stream_bytes if options.device != "cpu" else 1 << 16, **timing)
    records = [ResultRecord.of(origin, name="read_stream_tbps", value=tbps, unit="TB/s", params={})]
    print(f"{origin.hardware}: read-only stream {tbps:.2f} TB/s\n")
    print(f"{'shape':6} {'context':>7} {'width':>5} {'batch':>5} {'kernel':12} {'us':>9} {'MB':>9} {'stream us':>9}")
    for shape in options.shape or ("1.7b", "8b"):
        for context in options.context or (1024, 8192, 40_960):
            for batch in options.batch or (1, 16):
                for width in options.width or (1, 32):
                    params = dict(model=shape, context=context, batch=batch, width=width, dtype="bfloat16")
                    timed = passes(context, batch, width, shape=SHAPES[shape], how=how)
                    for name, (calls, num_bytes) in timed.items():
                        value = microseconds(calls, **timing)
                        records.append(
                            ResultRecord.of(origin, name=f"{name}_us", value=value, unit="us", params=params)
                        )
                        print(
                            f"{shape:6} {context:7} {width:5} {batch:5} {name:12} {value:9.1f} {num_bytes / 1e6:9.2f} "
                            f"{num_bytes / tbps / 1e6:9.1f}",
                            flush=True,
                        )
    print(to_json(records))


if __name__ == "__main__":
    main()
