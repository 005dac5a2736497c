"""Microseconds of the engine's products at exact Qwen3 shapes, and TB/s of weight bytes, against torch's matmul.

    python benchmarks/products.py                                         # all models, products and row counts
    python benchmarks/products.py --model 8b --product down --rows 32
    python benchmarks/products.py --model toy --rows 1 32 --device cpu    # through Triton's interpreter: does it run

    torch  x @ weight', bf16 by cuBLAS, and nothing else
    own    what a pass runs, bf16: qkv in parts, which the kernel that places heads adds up; o and down with residual
           and norm; gate_up with SwiGLU; head with its argmax
    fp8    the same over weights in float8_e4m3fn (a draft pass's copies), the rows' quantising included

Calls read one copy of the weight after another, so that none is in L2, in one CUDA graph, as passes run. `bits` says
whether each row count gives its rows the bits that the largest one gives them; of fp8 likewise. What the stream of
`gpu.py` takes for a weight's bytes is the floor. Tiles are found by `tiles.py`.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from benchmarks.gpu import COLD_BYTES, MODELS, microseconds, product_shapes, stream_tbps
from benchmarks.tiles import call

from orthrus.engine.quantise import quantise_weight
from orthrus.evaluation.records import ResultRecord, here_and_now, to_json

PRODUCTS = tuple(product_shapes(MODELS["toy"]))


class Measured(NamedTuple):
    """One product in one way at one number of rows."""

    way: str
    rows: int
    us: float
    tbps: float
    """Weight bytes read in a second."""
    same_bits: bool | None
    """As among the most rows; None for torch's, which are not promised to be."""


def copies(weight: Tensor) -> list[Tensor]:
    """So many of a weight that reading them in turn finds none in L2."""
    count = math.ceil(COLD_BYTES / weight.nbytes) if weight.is_cuda else 2
    return [weight, *(weight.clone() for _ in range(count - 1))]


def as_rows(result: Any) -> Tensor:
    """What a product gives each row: one tensor, parts [S, R, E] added in order, or a tensor and its norm."""
    if isinstance(result, tuple):
        return torch.cat(result, dim=1)
    return reduce(torch.add, result) if result.ndim == 3 else result


def measure(shape: tuple[int, int], name: str, row_counts: list[int], device: torch.device) -> Iterator[Measured]:
    """One product at all numbers of rows."""
    num_outputs, width = shape
    how: dict[str, Any] = dict(device=device, dtype=torch.bfloat16)
    weight = torch.randn(shape, **how) / width**0.5
    x, residual = (torch.randn(max(row_counts), n, **how) for n in (width, num_outputs))
    norm = torch.randn(num_outputs, **how)
    fp8_weight, fp8_scale = quantise_weight(weight)
    ways: dict[str, tuple[list[Tensor], Tensor | None]] = {
        "own": (copies(weight), None),
        "fp8": (copies(fp8_weight), fp8_scale),
    }
    expected = {way: as_rows(call(name, x, of[0], scale, residual, norm)) for way, (of, scale) in ways.items()}
    for rows in row_counts:
        us = microseconds([partial(torch.matmul, x[:rows], one.T) for one in ways["own"][0]], device)
        yield Measured("torch", rows, us, weight.nbytes / us * 1e-6, None)
        for way, (weights, scale) in ways.items():
            run = partial(call, name, x[:rows], scale=scale, residual=residual[:rows], norm=norm)
            us = microseconds([partial(run, weight=one) for one in weights], device)
            same = torch.equal(as_rows(run(weight=weights[0])), expected[way][:rows])
            yield Measured(way, rows, us, weights[0].nbytes / us * 1e-6, same)


def show(model: str, name: str, three: list[Measured]) -> None:
    """One line of the table."""
    cells = [f"{model:>5} {name:>8} {three[0].rows:>5}", *(f"{one.us:>9.1f} {one.tbps:>5.2f}" for one in three)]
    same = [one.same_bits for one in three if one.same_bits is not None]
    print(*cells, f"{three[0].us / three[1].us:>7.2f} {'same' if all(same) else 'OTHER':>6}", sep="  ", flush=True)


def main() -> None:
    """Print the table, and as the last line the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["1.7b", "4b", "8b"])
    parser.add_argument("--product", choices=PRODUCTS, nargs="+", default=list(PRODUCTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128], help="rows of a pass")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    origin = here_and_now(device)
    tbps = stream_tbps(device)
    records = [ResultRecord.of(origin, name="read_stream_tbps", value=tbps, unit="TB/s", params={})]
    print(f"{origin.hardware}: read-only stream {tbps:.2f} TB/s")
    print("model   product  rows   torch us   TB/s     own us   TB/s     fp8 us   TB/s  speed-up   bits")
    for model in options.model:
        shapes = product_shapes(MODELS[model])
        for name in options.product:
            found = list(measure(shapes[name], name, options.rows, device))
            for at in range(0, len(found), 3):
                show(model, name, found[at : at + 3])
            for one in found:
                params = dict(model=model, product=name, rows=one.rows, way=one.way, same_bits=one.same_bits)
                records.append(ResultRecord.of(origin, name="product_us", value=one.us, unit="us", params=params))
    print(to_json(records) if device.type == "cuda" else json.dumps({"records": len(records)}))


if __name__ == "__main__":
    main()
