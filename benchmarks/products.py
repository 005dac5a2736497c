"""Microseconds of the engine's products at exact Qwen3 shapes, and TB/s of weight bytes, against torch's matmul.

    python benchmarks/products.py                                  # all models, projections and row counts
    python benchmarks/products.py --model 8b --projection down --rows 32 --tiles         # find better tiles
    python benchmarks/products.py --model toy --rows 1 32 --device cpu    # through Triton's interpreter: does it run

    torch  x @ weight', bf16 by cuBLAS, and nothing else
    own    what a pass runs, bf16: qkv; o and down with the residual added; gate_up with SwiGLU; head with its argmax
    fp8    the same over weights in float8_e4m3fn with a scale for each output (a draft pass's copy); no head

Every call reads another copy of the weight, so that none is in L2, and calls run inside a CUDA graph, as a pass runs
them: a figure is the median over replays of a replay's time, divided by its calls. `bits` says whether each row count
gives its rows the bits that the largest one gives them. `stream` is a plain sum over memory, this run's ceiling.

--tiles tries tiles for each shape at the given row counts (32), and prints the fastest as lines of `linear.TILES`.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import triton
from triton.runtime.errors import OutOfResources

from orthrus.engine.kernels import linear
from orthrus.engine.kernels.head import head_argmax
from orthrus.engine.kernels.linear import Tiles
from orthrus.engine.quantise import quantise_weight

MODELS = {
    "toy": dict(hidden=64, heads=4, kv=2, mlp=96, head_dim=16, vocab=200),
    "1.7b": dict(hidden=2048, heads=16, kv=8, mlp=6144, head_dim=128, vocab=151_936),
    "4b": dict(hidden=2560, heads=32, kv=8, mlp=9728, head_dim=128, vocab=151_936),
    "8b": dict(hidden=4096, heads=32, kv=8, mlp=12_288, head_dim=128, vocab=151_936),
}
"""Published configurations of Qwen3, and one that runs anywhere."""

PROJECTIONS = ("qkv", "o", "gate_up", "down", "head")

COLD_BYTES = 256 << 20
"""What the copies of a weight take together, at least: five times the L2 of an H200."""

REPLAYS = 30

Call = Callable[[Tensor, Tensor], Tensor]


class Product(NamedTuple):
    """One projection of one model at one number of rows."""

    model: str
    projection: str
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        of = MODELS[self.model]
        width = of["heads"] * of["head_dim"]
        return {
            "qkv": (width + 2 * of["kv"] * of["head_dim"], of["hidden"]),
            "o": (of["hidden"], width),
            "gate_up": (2 * of["mlp"], of["hidden"]),
            "down": (of["hidden"], of["mlp"]),
            "head": (of["vocab"], of["hidden"]),
        }[self.projection]

    def call(self, residual_RE: Tensor | None, scale_E: Tensor | None) -> Call:
        """What a pass runs for it."""
        if self.projection == "gate_up":
            return partial(linear.swiglu, scale_2F=scale_E)
        if self.projection == "head":
            return head_argmax
        return partial(linear.linear, residual_RE=residual_RE, scale_E=scale_E)


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Median time of a call of `run`, replayed from a CUDA graph where there is one."""
    if device == "cpu":
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e3
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    times = []
    for replay in range(REPLAYS + 3):
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        if replay >= 3:
            times.append(begun.elapsed_time(ended))
    return statistics.median(times)


def per_call(call: Call, x_RD: Tensor, weights: list[Tensor]) -> dict[str, float]:
    """Microseconds of a call and TB/s of weight bytes, over weights that are not in L2."""
    # Few copies are of large weights; a replay of several calls is long against its launch.
    order = weights * max(1, math.ceil(8 / len(weights)) if x_RD.is_cuda else 1)

    def all_copies() -> None:
        for weight in order:
            call(x_RD, weight)

    us = milliseconds(all_copies, x_RD.device.type) * 1e3 / len(order)
    return {"us": us, "tb_per_second": weights[0].nbytes / us * 1e-6}


def copies(weight: Tensor, device: str) -> list[Tensor]:
    """So many of a weight that reading them in turn finds none in L2."""
    count = math.ceil(COLD_BYTES / weight.nbytes) if device == "cuda" else 2
    return [weight, *(weight.clone() for _ in range(count - 1))]


def random_weight(shape: tuple[int, int], device: str) -> Tensor:
    """Numbers of the size that a trained weight has, in bf16."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5


def operands(product: Product, device: str) -> tuple[Tensor, Tensor | None]:
    """Rows, and the residual where a pass adds one."""
    num_outputs, width = product.shape
    x_RD = torch.randn(product.rows, width, device=device, dtype=torch.bfloat16)
    if product.projection not in ("o", "down"):
        return x_RD, None
    return x_RD, torch.randn(product.rows, num_outputs, device=device, dtype=torch.bfloat16)


def measure(model: str, projection: str, row_counts: list[int], device: str) -> Iterator[dict]:
    """One record for each number of rows."""
    most = Product(model, projection, max(row_counts))
    weight = random_weight(most.shape, device)
    weights = copies(weight, device)
    fp8_weight, scale = quantise_weight(weight)
    fp8_weights = copies(fp8_weight, device)
    everyone, all_residuals = operands(most, device)
    expected = most.call(all_residuals, None)(everyone, weight)
    for rows in row_counts:
        product = Product(model, projection, rows)
        x_RD, residual = everyone[:rows], None if all_residuals is None else all_residuals[:rows]
        own = product.call(residual, None)
        record: dict[str, Any] = {
            "model": model,
            "projection": projection,
            "rows": rows,
            "torch": per_call(lambda x, weight: x @ weight.T, x_RD, weights),
            "own": per_call(own, x_RD, weights),
            "fp8": None,
            "same_bits": torch.equal(own(x_RD, weight), expected[:rows]) if device == "cuda" else None,
        }
        if projection != "head":
            record["fp8"] = per_call(product.call(residual, scale), x_RD, fp8_weights)
        yield record


def candidates(width: int) -> Iterator[Tiles]:
    """Tiles worth trying for so many inputs: each part of a sum has at least two blocks."""
    for block_e, block_k, splits, warps, stages in itertools.product(
        (64, 128), (64, 128, 256), (1, 2, 4, 8), (4, 8), (3, 4, 5, 6)
    ):
        if splits == 1 or width >= 2 * splits * block_k:
            yield Tiles(block_e, block_k, splits, warps, stages)


def sweep(model: str, projection: str, row_counts: list[int], device: str, *, is_fp8: bool) -> dict:
    """The fastest tiles for one shape and dtype over the row counts together, beside those in use."""
    product = Product(model, projection, max(row_counts))
    weight, scale = random_weight(product.shape, device), None
    if is_fp8:
        weight, scale = quantise_weight(weight)
    weights = copies(weight, device)
    key = *product.shape, weight.element_size()
    in_use = linear.tiles_of(weight)
    before = linear.TILES.get(key)
    inputs = [(rows, *operands(Product(model, projection, rows), device)) for rows in row_counts]
    times: dict[Tiles, float] = {}
    tried = [in_use, *candidates(product.shape[1])]
    for tiles in tried if device == "cuda" else tried[:3]:
        linear.TILES[key] = tiles
        widest = inputs[row_counts.index(max(row_counts))][1]
        if tiles != in_use and linear.settings(widest, weight, tiles)["num_stages"] < tiles.num_stages:
            continue  # shared memory holds fewer blocks, and those tiles have a turn of their own
        try:
            times[tiles] = sum(
                per_call(Product(model, projection, rows).call(residual, scale), x_RD, weights)["us"]
                for rows, x_RD, residual in inputs
            )
        except OutOfResources as error:
            print(f"  {tiles}: {error}", file=sys.stderr)
    linear.TILES.pop(key)
    if before is not None:
        linear.TILES[key] = before
    best = min(times, key=lambda tiles: times[tiles])
    gain = times[in_use] / times[best]
    note = f"{times[best] / len(inputs):.1f} us, {gain:.2f}x of {tuple(in_use)}"
    print(f"    {key}: Tiles{tuple(best)},  # {model} {projection}: {note}", flush=True)
    return {"model": model, "projection": projection, "key": key, "tiles": best, "us": times[best], "gain": gain}


def stream(device: str) -> float:
    """TB/s of a sum over memory that no cache holds."""
    numbers = torch.ones(1 << (30 if device == "cuda" else 20), device=device)
    return numbers.nbytes / milliseconds(numbers.sum, device) * 1e-9


def show(record: dict) -> None:
    """One line of the table."""
    cells = [f"{record['model']:>5} {record['projection']:>8} {record['rows']:>5}"]
    for name in ("torch", "own", "fp8"):
        figures = record[name]
        cells.append(f"{figures['us']:>9.1f} {figures['tb_per_second']:>5.2f}" if figures else " " * 15)
    bits = {True: "same", False: "OTHER", None: "-"}[record["same_bits"]]
    print(*cells, f"{record['torch']['us'] / record['own']['us']:>7.2f} {bits:>6}", sep="  ", flush=True)


def main() -> None:
    """Print the table, or the tiles, and one JSON document as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["1.7b", "4b", "8b"])
    parser.add_argument("--projection", choices=PROJECTIONS, nargs="+", default=list(PROJECTIONS))
    parser.add_argument("--rows", type=int, nargs="+", help="rows of a pass (1 8 16 32 64 128; with --tiles 32)")
    parser.add_argument("--tiles", action="store_true", help="find the fastest tiles of each shape")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    row_counts = options.rows or ([32] if options.tiles else [1, 8, 16, 32, 64, 128])
    shapes = list(itertools.product(options.model, options.projection))
    torch.manual_seed(0)
    found: dict[str, Any] = {"stream_tb_per_second": stream(options.device)}
    print(f"stream {found['stream_tb_per_second']:.2f} TB/s")
    if options.tiles:
        found["tiles"] = [
            sweep(*shape, row_counts, options.device, is_fp8=is_fp8)
            for shape in shapes
            for is_fp8 in ((False,) if shape[1] == "head" else (False, True))
        ]
    else:
        print("model  projection  rows     torch us  TB/s      own us  TB/s      fp8 us  TB/s  speed-up   bits")
        found["products"] = []
        for shape in shapes:
            for record in measure(*shape, row_counts, options.device):
                show(record)
                found["products"].append(record)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps({"command": sys.argv, "hardware": where, **versions, **found}))


if __name__ == "__main__":
    main()
