"""Find the fastest tiles of the engine's products on this GPU: lines for `TILES` of `engine/kernels/tiles.py`.

    python benchmarks/tiles.py --model 8b                  # bf16 weights
    python benchmarks/tiles.py --model 8b --precision fp8  # the copies that drafts read
    python benchmarks/tiles.py --model 8b --rows 64 512    # lines for `BY_ROWS`

A choice is timed by what a pass runs (parts of qkv; o and down with residual and norm; gate_up with SwiGLU; the head's
argmax), called for one weight after another, none of them in L2, in one graph. Its time is 2 x that of 32 rows + that
of one row: a cycle and an AR step. With --rows, what stands in the table is cut as it is, and found is how it runs best
for up to so many rows; the most stand for 1,024 and 2,048, of which what a row takes counts. Compiling is spread over
processes, which share Triton's cache.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from benchmarks.gpu import COLD_BYTES, MODELS, in_processes, microseconds, product_shapes
from torch import Tensor

from orthrus.engine.kernels import head, linear
from orthrus.engine.kernels import tiles as cuts
from orthrus.engine.kernels.tiles import ROWS, SHARED_BYTES, TMA_TILE, Execution, Tiles, tiles_of_shape
from orthrus.engine.quantise import quantise_weight

Choice = tuple[Tiles, Execution | None]
"""How a product is cut, and how it runs where that is not what the cut says."""
REPLAYS = 8
FEW_ROWS = {32: 2.0, 1: 1.0}
"""Rows that a choice is timed at, and the weight of each: a cycle and an AR step."""
BY_ROWS = {rows: {rows: 1.0} for rows in ROWS[:-1]} | {ROWS[-1]: {ROWS[-1]: 1 / ROWS[-1], 2048: 1 / 2048}}
"""The same for --rows."""
SPLITS = {"head": (1,), "gate_up": (1, 2), "down": (2, 3, 4, 6, 8), "qkv": (1, 2, 3, 4), "o": (1, 2, 3, 4, 6)}


def choices(name: str, weight_bytes: int) -> Iterator[Tiles]:
    """Tiles that shared memory holds."""
    blocks = (64, 128) if weight_bytes == 2 else (128, 256)
    for block_e, block_k, splits, warps, stages in itertools.product(
        (64, 128), blocks, SPLITS[name], (4, 8), (3, 4, 6)
    ):
        if stages * block_k * (block_e + 32) * weight_bytes <= SHARED_BYTES:
            yield Tiles(block_e, block_k, splits, warps, stages)


def executions(tiles: Tiles, weight_bytes: int, most: int) -> Iterator[Execution]:
    """Ways to run the same cut of a sum, for up to so many rows."""
    for (block_e, warps), stages in itertools.product(((64, 4), (128, 4), (128, 8), (256, 8)), (2, 3, 4, 6)):
        stage_bytes = tiles.BLOCK_K * (block_e + min(most, 128)) * weight_bytes
        if stages * stage_bytes <= SHARED_BYTES and (stages > 2 or 3 * stage_bytes > SHARED_BYTES):
            yield Execution(block_e, warps, stages)
        fetched_bytes = TMA_TILE["BLOCK_K"] * (block_e + TMA_TILE["BLOCK_R"]) * weight_bytes
        if weight_bytes == 2 and most >= 128 and stages * fetched_bytes <= SHARED_BYTES:
            yield Execution(block_e, warps, stages, by_tma=True)


def call(name: str, x_RD: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor, norm: Tensor) -> Any:
    """What a pass runs."""
    if name == "gate_up":
        return linear.swiglu(x_RD, weight, scale_2F=scale)
    if name == "head":
        return head.head_argmax(x_RD, weight, scale_V=scale)
    if name == "qkv":
        return linear.parts(x_RD, weight, scale)
    return linear.linear_and_norm(x_RD, weight, norm_E=norm, eps=1e-6, residual_RE=residual, scale_E=scale)


def choose(key: tuple[int, int, int], tiles: Tiles, execution: Execution | None) -> None:
    """Have products of this shape cut and run like this."""
    cuts.TILES[key] = tiles
    cuts.BY_ROWS[key] = {} if execution is None else dict.fromkeys(ROWS, execution)


def compile_some(work: list[tuple[str, Choice]], is_fp8: bool, row_counts: tuple[int, ...]) -> None:
    """Compile the kernels of these choices, over operands of any size."""
    for name, choice in work:
        weight = torch.zeros(1024, 2048, device="cuda", dtype=torch.bfloat16)
        scale = None
        if is_fp8:
            weight, scale = quantise_weight(weight)
        choose((1024, 2048, weight.element_size()), *choice)
        for rows in row_counts:
            x, residual = (torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16) for n in (2048, 1024))
            try:
                call(name, x, weight, scale, residual, residual[0])
            except Exception as error:  # noqa: BLE001 - one that does not fit is not chosen
                print(f"# {name} {choice}: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()


def compile_all(work: list[tuple[str, Choice]], is_fp8: bool, row_counts: tuple[int, ...], processes: int) -> None:
    """Compile in parallel."""
    in_processes(compile_some, [work[i::processes] for i in range(processes)], is_fp8, row_counts)


def best_tiles(
    name: str, shape: tuple[int, int], tried: list[Choice], *, is_fp8: bool, rows: dict[int, float]
) -> tuple[Choice, list[float]]:
    """The fastest choice, and its microseconds at each number of rows, which `rows` weighs."""
    num_outputs, width = shape
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / width**0.5
    scale = None
    if is_fp8:
        weight, scale = quantise_weight(weight)
    copies = [weight, *(weight.clone() for _ in range(math.ceil(COLD_BYTES / weight.nbytes)))]
    inputs = [torch.randn(count, width, device="cuda", dtype=torch.bfloat16) for count in rows]
    residuals = [torch.randn(count, num_outputs, device="cuda", dtype=torch.bfloat16) for count in rows]
    found = []
    for choice in tried:
        choose((num_outputs, width, weight.element_size()), *choice)
        try:
            us = [
                microseconds([partial(call, name, x, one, scale, r, r[0]) for one in copies], x.device, repeats=REPLAYS)
                for x, r in zip(inputs, residuals, strict=True)
            ]
        except Exception as error:  # noqa: BLE001
            print(f"# {name} {choice}: {type(error).__name__}", flush=True)
            continue
        found.append((sum(weight * one for weight, one in zip(rows.values(), us, strict=True)), choice, us))
    _, choice, us = min(found, key=lambda one: one[0])
    return choice, us


def line(model: str, name: str, key: tuple[int, int, int], found: str, rows: dict[int, float], us: list[float]) -> str:
    """What stands in the tables of `engine/kernels/tiles.py`, and why."""
    num_outputs, width, weight_bytes = key
    times = ", ".join(
        f"{one:.1f} us at {count} ({num_outputs * width * weight_bytes / one * 1e-6:.2f} TB/s, "
        f"{2 * count * num_outputs * width / one * 1e-6:.0f} TFLOP/s)"
        for count, one in zip(rows, us, strict=True)
    )
    return f"    {key}: {found},  # {model} {name}: {times}"


def main() -> None:
    """Print a line of `TILES` or `BY_ROWS` for each product, and all as JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", required=True)
    parser.add_argument("--product", choices=SPLITS, nargs="+", default=list(SPLITS))
    parser.add_argument("--precision", choices=("bf16", "fp8"), nargs="+", default=["bf16"])
    parser.add_argument("--rows", type=int, choices=ROWS, nargs="+", help="lines of BY_ROWS")
    parser.add_argument("--processes", type=int, default=15)
    options = parser.parse_args()
    begun = time.perf_counter()
    cuts.BY_ROWS.clear()  # it would stand in for what is tried
    lines = []
    for precision, most in itertools.product(options.precision, options.rows or (None,)):
        weight_bytes = 1 if precision == "fp8" else 2
        rows = FEW_ROWS if most is None else BY_ROWS[most]
        tried = {}
        for model, name in itertools.product(options.model, options.product):
            key = (*product_shapes(MODELS[model])[name], weight_bytes)
            if most is None:
                some: list[Choice] = [(cut, None) for cut in choices(name, weight_bytes)]
            else:
                tiles = tiles_of_shape(*key)
                some = [(tiles, None), *((tiles, one) for one in executions(tiles, weight_bytes, most))]
            tried[model, name] = list(dict.fromkeys(some))
        work = dict.fromkeys((name, choice) for (_, name), some in tried.items() for choice in some)
        compile_all(list(work), precision == "fp8", tuple(rows)[: 1 if most else None], options.processes)
        print(f"# {precision}, {most or 'few'} rows: compiled at {time.perf_counter() - begun:.0f} s", flush=True)
        for (model, name), some in tried.items():
            shape = product_shapes(MODELS[model])[name]
            (tiles, execution), us = best_tiles(name, shape, some, is_fp8=precision == "fp8", rows=rows)
            found = f"Tiles{tuple(tiles)}"
            if most is not None:
                found = f"{most}: " + ("as in TILES" if execution is None else f"Execution{tuple(execution)}")
            lines.append((*shape, weight_bytes, most, *tiles, execution))
            print(line(model, name, (*shape, weight_bytes), found, rows, us), flush=True)
    print(json.dumps({"tiles": lines, "hardware": torch.cuda.get_device_name()}))


if __name__ == "__main__":
    main()
