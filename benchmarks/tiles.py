"""Find the fastest tiles of the engine's products on this GPU: lines for `linear.TILES`.

    python benchmarks/tiles.py --model 8b                  # bf16 weights
    python benchmarks/tiles.py --model 8b --precision fp8  # the copies that drafts read

A choice is timed by what a pass runs (parts of qkv; o and down with residual and norm; gate_up with SwiGLU; the head's
argmax), called for one weight after another, none of them in L2, in one graph. Its time is 2 x that of 32 rows + that
of one row: a cycle and an AR step. Compiling is spread over processes, which share Triton's cache.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from benchmarks.gpu import COLD_BYTES, MODELS, microseconds, product_shapes
from torch import Tensor

from orthrus.engine.kernels import head, linear
from orthrus.engine.kernels.linear import SHARED_BYTES, Tiles
from orthrus.engine.quantise import quantise_weight

REPLAYS = 8
SPLITS = {"head": (1,), "gate_up": (1, 2), "down": (2, 3, 4, 6, 8), "qkv": (1, 2, 3, 4), "o": (1, 2, 3, 4, 6)}


def choices(name: str, weight_bytes: int) -> Iterator[Tiles]:
    """Tiles that shared memory holds."""
    blocks = (64, 128) if weight_bytes == 2 else (128, 256)
    for block_e, block_k, splits, warps, stages in itertools.product(
        (64, 128), blocks, SPLITS[name], (4, 8), (3, 4, 6)
    ):
        if stages * block_k * (block_e + 32) * weight_bytes <= SHARED_BYTES:
            yield Tiles(block_e, block_k, splits, warps, stages)


def call(name: str, x_RD: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor, norm: Tensor) -> Any:
    """What a pass runs."""
    if name == "gate_up":
        return linear.swiglu(x_RD, weight, scale_2F=scale)
    if name == "head":
        return head.head_argmax(x_RD, weight, scale_V=scale)
    if name == "qkv":
        return linear.parts(x_RD, weight, scale)
    return linear.linear_and_norm(x_RD, weight, norm_E=norm, eps=1e-6, residual_RE=residual, scale_E=scale)


def compile_some(work: list[tuple[str, Tiles]], is_fp8: bool) -> None:
    """Compile the kernels of these choices, over operands of any size."""
    for name, tiles in work:
        weight = torch.zeros(1024, 2048, device="cuda", dtype=torch.bfloat16)
        scale = None
        if is_fp8:
            weight, scale = quantise_weight(weight)
        linear.TILES[1024, 2048, weight.element_size()] = tiles
        for rows in (32, 1):
            x, residual = (torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16) for n in (2048, 1024))
            try:
                call(name, x, weight, scale, residual, residual[0])
            except Exception as error:  # noqa: BLE001 - one that does not fit is not chosen
                print(f"# {name} {tuple(tiles)}: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()


def compile_all(work: list[tuple[str, Tiles]], is_fp8: bool, processes: int) -> None:
    """Compile in parallel."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_some, args=(work[i::processes], is_fp8)) for i in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def best_tiles(name: str, shape: tuple[int, int], is_fp8: bool) -> tuple[Tiles, list[float]]:
    """The fastest choice and its microseconds at 32 rows and at one."""
    num_outputs, width = shape
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / width**0.5
    scale = None
    if is_fp8:
        weight, scale = quantise_weight(weight)
    copies = [weight, *(weight.clone() for _ in range(math.ceil(COLD_BYTES / weight.nbytes)))]
    inputs = [torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for rows in (32, 1)]
    residuals = [torch.randn(rows, num_outputs, device="cuda", dtype=torch.bfloat16) for rows in (32, 1)]
    found = []
    for tiles in choices(name, weight.element_size()):
        linear.TILES[num_outputs, width, weight.element_size()] = tiles
        try:
            us = [
                microseconds([partial(call, name, x, one, scale, r, r[0]) for one in copies], x.device, repeats=REPLAYS)
                for x, r in zip(inputs, residuals, strict=True)
            ]
        except Exception as error:  # noqa: BLE001
            print(f"# {name} {tuple(tiles)}: {type(error).__name__}", flush=True)
            continue
        found.append((2 * us[0] + us[1], tiles, us))
    _, tiles, us = min(found)
    return tiles, us


def main() -> None:
    """Print a line of `linear.TILES` for each product, and all as JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", required=True)
    parser.add_argument("--product", choices=SPLITS, nargs="+", default=list(SPLITS))
    parser.add_argument("--precision", choices=("bf16", "fp8"), nargs="+", default=["bf16"])
    parser.add_argument("--processes", type=int, default=15)
    options = parser.parse_args()
    begun = time.perf_counter()
    lines = []
    for precision in options.precision:
        weight_bytes = 1 if precision == "fp8" else 2
        work = [(name, tiles) for name in options.product for tiles in choices(name, weight_bytes)]
        unique = {(name, tiles._replace(SPLITS=min(tiles.SPLITS, 2))): (name, tiles) for name, tiles in work}
        compile_all(list(unique.values()), precision == "fp8", options.processes)
        print(f"# {precision}: compiled at {time.perf_counter() - begun:.0f} s", flush=True)
        for model in options.model:
            for name, shape in product_shapes(MODELS[model]).items():
                if name not in options.product:
                    continue
                tiles, us = best_tiles(name, shape, precision == "fp8")
                num_bytes = shape[0] * shape[1] * weight_bytes
                lines.append((*shape, weight_bytes, *tiles))
                print(
                    f"    {(*shape, weight_bytes)}: Tiles{tuple(tiles)},  # {model} {name}: {us[0]:.1f} us at 32 rows, "
                    f"{num_bytes / us[0] * 1e-6:.2f} TB/s; {us[1]:.1f} at 1",
                    flush=True,
                )
    print(json.dumps({"tiles": lines, "hardware": torch.cuda.get_device_name()}))


if __name__ == "__main__":
    main()
