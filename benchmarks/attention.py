"""Microseconds of the engine's attention and of placing heads, at exact Qwen3 shapes, beside a read-only stream.

    python benchmarks/attention.py        # 1.7b and 8b, 1k / 8k / 40k of context, one position and 32, batch 1 and 16
    python benchmarks/attention.py --device cpu --shape toy --context 40 --batch 2 --width 2    # does it run; no number

A line for each pass: its microseconds, the bytes of keys and values it must read, and how long the measured stream
would take for them. Passes are captured once for each of enough copies of the pages to exceed the L2 cache several
times and replayed as one graph, as the layers of a model follow one another; the time is the median over replays. The
stream is the measured one of `gpu.py`. `attend` is the AR view; `attend_draft` also reads
an own block.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import triton
from benchmarks.gpu import COLD_BYTES, MODELS, ModelShape, microseconds, stream_tbps

from orthrus.engine.kernels.attention import attend
from orthrus.engine.kernels.place import place_heads
from orthrus.engine.reference import HeadNorms, Pages, Rotary
from orthrus.evaluation.records import ResultRecord, here_and_now, to_json

PAGE_SLOTS = 64


def layers(context: int, batch: int, width: int, *, model: ModelShape, how: dict[str, Any]) -> list[Pages]:
    """Pages of rows of `context` tokens about to have `width` more, as many times as fill COLD_BYTES."""
    num_groups, head_dim = model.groups, model.head_dim
    table_pages = triton.cdiv(context + width, PAGE_SLOTS)
    size = (batch * table_pages, PAGE_SLOTS, num_groups, head_dim)
    layer_bytes = 2 * batch * table_pages * PAGE_SLOTS * num_groups * head_dim * 2
    count = 1 if how["device"].type == "cpu" else max(1, min(36, COLD_BYTES // layer_bytes))
    tables = torch.randperm(size[0], device=how["device"]).view(batch, table_pages).int()
    lengths = torch.full((batch,), context, dtype=torch.int32, device=how["device"])
    return [Pages(torch.randn(size, **how), torch.randn(size, **how), tables, lengths) for _ in range(count)]


def passes(
    context: int, batch: int, width: int, *, model: ModelShape, how: dict[str, Any]
) -> dict[str, tuple[list[Callable[[], Tensor]], int]]:
    """Each kernel's calls over all copies, and the bytes that one of them must read (and, placing, write)."""
    num_heads, num_groups, head_dim = model.heads, model.groups, model.head_dim
    rows = batch * width
    copies = layers(context, batch, width, model=model, how=how)
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
    parser.add_argument("--shape", choices=MODELS, action="append", help="several: one after the other (1.7b, 8b)")
    parser.add_argument("--context", type=int, action="append", help="tokens in the cache (1024, 8192, 40960)")
    parser.add_argument("--width", type=int, action="append", help="positions of a pass (1, 32)")
    parser.add_argument("--batch", type=int, action="append", help="rows (1, 16)")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    origin = here_and_now(device)
    how: dict[str, Any] = dict(device=device, dtype=torch.bfloat16)
    tbps = stream_tbps(device)
    records = [ResultRecord.of(origin, name="read_stream_tbps", value=tbps, unit="TB/s", params={})]
    print(f"{origin.hardware}: read-only stream {tbps:.2f} TB/s\n")
    print(f"{'shape':6} {'context':>7} {'width':>5} {'batch':>5} {'kernel':12} {'us':>9} {'MB':>9} {'stream us':>9}")
    for shape in options.shape or ("1.7b", "8b"):
        for context in options.context or (1024, 8192, 40_960):
            for batch in options.batch or (1, 16):
                for width in options.width or (1, 32):
                    params = dict(model=shape, context=context, batch=batch, width=width, dtype="bfloat16")
                    timed = passes(context, batch, width, model=MODELS[shape], how=how)
                    for name, (calls, num_bytes) in timed.items():
                        value = microseconds(calls, device, repeats=options.repeats)
                        records.append(
                            ResultRecord.of(origin, name=f"{name}_us", value=value, unit="us", params=params)
                        )
                        print(
                            f"{shape:6} {context:7} {width:5} {batch:5} {name:12} {value:9.1f} {num_bytes / 1e6:9.2f} "
                            f"{num_bytes / tbps / 1e6:9.1f}",
                            flush=True,
                        )
    print(to_json(records) if device.type != "cpu" else json.dumps({"records": len(records)}))


if __name__ == "__main__":
    main()
