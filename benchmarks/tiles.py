"""Find the fastest tiles of the engine's products on this GPU, each timed inside a whole pass.

    python benchmarks/tiles.py --model 8b                        # lines for `linear.TILES`
    python benchmarks/tiles.py --model 8b --draft-precision fp8  # those of the copies that drafts read

A product alone, timed with nothing around it, says little of a pass: kernels overlap, and what one leaves in L2 another
reads. So a pass of LAYERS layers and the head is captured anew for each choice: 32 positions in the diffusion view and
in the AR view, and one position in the AR view (weighed as much as both, `--ar`). One projection is changed at a time,
from the widest one to the narrowest: first how it is cut, then how far ahead it reads. Compiling is spread over
processes, which share Triton's cache.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.cycle import random_model
from benchmarks.gpu import MODELS
from orthrus.engine.engine import EngineBackend
from orthrus.engine.kernels import head, linear
from orthrus.engine.kernels.linear import SHARED_BYTES, Tiles, tiles_of
from orthrus.engine.passes import Inputs, Shape
from orthrus.engine.weights import DRAFT_PRECISIONS, Matrix

LAYERS = 4
REPLAYS = 12


def cuts(name: str, weight_bytes: int) -> Iterator[Tiles]:
    """How a product may be cut."""
    widths = (64, 128) if weight_bytes == 2 else (128, 256)
    splits = {"head": (1,), "gate_up": (1, 2)}.get(name, (1, 2, 3, 4, 6, 8))
    for block_e, block_k, num_splits, warps in itertools.product((64, 128), widths, splits, (4, 8)):
        stages = max(2, min(4, SHARED_BYTES // 2 // (block_k * (block_e * weight_bytes + 64))))
        yield Tiles(block_e, block_k, num_splits, warps, stages, 1024)


def depths(tiles: Tiles) -> Iterator[Tiles]:
    """How far ahead a product may read."""
    for stages, ahead in itertools.product((2, 3, 4, 5, 6), (0, 256, 512, 1024, 2048, 4096)):
        yield tiles._replace(num_stages=stages, AHEAD=ahead)


def compile_some(choices: list[Tiles], dtype: torch.dtype) -> None:
    """Compile the kernels of these choices, over operands of any size."""
    for tiles in choices:
        weight = torch.zeros(1024, 2048, device="cuda").to(dtype)
        scale = torch.ones(1024, device="cuda") if dtype != torch.bfloat16 else None
        norm = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
        linear.TILES[1024, 2048, weight.element_size()] = tiles
        for rows in (32, 1):
            x = torch.zeros(rows, 2048, device="cuda", dtype=torch.bfloat16)
            try:
                linear.linear_and_norm(x, weight, norm_E=norm, eps=1e-6, scale_E=scale)
                if tiles.SPLITS <= 2:
                    linear.swiglu(x, weight, scale_2F=scale)
                if tiles.SPLITS == 1:
                    head.head_argmax(x, weight, scale_V=scale)
            except Exception as error:  # noqa: BLE001 - one that does not fit is not chosen
                print(f"# {tiles}: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()


def compile_all(choices: list[Tiles], dtype: torch.dtype, processes: int) -> None:
    """Compile in parallel."""
    context = multiprocessing.get_context("spawn")
    shares = [choices[i::processes] for i in range(processes)]
    workers = [context.Process(target=compile_some, args=(share, dtype)) for share in shares if share]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def pass_us(backend: EngineBackend, inputs: dict[str, Inputs], ar_weight: float) -> tuple[float, list[float]]:
    """Microseconds of the passes, weighed, and of each."""
    passes = backend.passes
    found = []
    for name, function in (("wide", passes.draft), ("wide", passes.verify), ("one", passes.verify)):
        own = inputs[name]

        def run(function: Any = function, own: Inputs = own) -> None:
            own.lengths_B.fill_(1024)
            function(own)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(REPLAYS):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(begun.elapsed_time(ended))
        found.append(statistics.median(times[2:]) * 1e3)
    return found[0] + found[1] + ar_weight * found[2], found


def inputs_of(backend: EngineBackend, width: int) -> Inputs:
    """One row of 1,024 cached tokens."""
    inputs = Inputs(Shape(1, width, 32), spare_page=32, like_VD=backend.weights.embedding_VD)
    inputs.write([1], [1024], [width - 1], [list(range(20))])
    return inputs


def main() -> None:
    """Print each step, and lines of `linear.TILES` last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--draft-precision", choices=DRAFT_PRECISIONS)
    parser.add_argument("--ar", type=float, default=1.0, help="weight of a one-position pass")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=200, help="begin no further choice after so many")
    options = parser.parse_args()
    begun = time.perf_counter()
    shape = MODELS[options.model]._replace(layers=LAYERS)
    MODELS["few"] = shape
    model = random_model("few", torch.device("cuda"), 32)
    backend = EngineBackend(model, num_pages=64, draft_precision=options.draft_precision)
    backend.passes.keys_LPSGH.normal_()
    backend.passes.values_LPSGH.normal_()
    inputs = {"wide": inputs_of(backend, 32), "one": inputs_of(backend, 1)}
    view = "diffusion" if options.draft_precision else "ar"
    layer = backend.weights.layers[0]
    matrices: dict[str, Matrix] = {
        "gate_up": layer.mlp[view].gate_up, "down": layer.mlp[view].down, "qkv": layer.attention[view].qkv,
        "o": layer.attention[view].out, "head": backend.weights.head[view],
    }  # fmt: skip
    keys = {name: (*matrix.weight_ED.shape, matrix.weight_ED.element_size()) for name, matrix in matrices.items()}
    dtype = matrices["o"].weight_ED.dtype
    first = {name: list(cuts(name, keys[name][2])) for name in keys}
    compile_all(sorted(set().union(*first.values())), dtype, options.processes)
    print(f"# compiled {len(set().union(*first.values()))} in {time.perf_counter() - begun:.0f} s", flush=True)
    best, each = pass_us(backend, inputs, options.ar)
    print(f"# begin {best:.1f} us {[round(x, 1) for x in each]}", flush=True)

    def attempt(name: str, choices: list[Tiles], best: float) -> float:
        kept = tiles_of(matrices[name].weight_ED)
        for tiles in choices:
            if time.perf_counter() - begun > options.seconds:
                break
            linear.TILES[keys[name]] = tiles
            try:
                found, each = pass_us(backend, inputs, options.ar)
            except Exception as error:  # noqa: BLE001
                print(f"# {name} {tuple(tiles)}: {type(error).__name__}", flush=True)
                continue
            if found < best:
                best, kept = found, tiles
                print(f"# {name} {tuple(tiles)}: {best:.1f} us {[round(x, 1) for x in each]}", flush=True)
        linear.TILES[keys[name]] = kept
        return best

    for name in keys:
        best = attempt(name, first[name], best)
    second = {name: list(depths(tiles_of(matrices[name].weight_ED))) for name in keys}
    compile_all(sorted(set().union(*second.values())), dtype, options.processes)
    print(f"# compiled {len(set().union(*second.values()))} at {time.perf_counter() - begun:.0f} s", flush=True)
    for name in keys:
        best = attempt(name, second[name], best)
    for name, key in keys.items():
        print(f"    {key}: Tiles{tuple(linear.TILES[key])},  # {options.model} {name}")
    print(json.dumps({"model": options.model, "tiles": {name: linear.TILES[key] for name, key in keys.items()}}))


if __name__ == "__main__":
    main()
