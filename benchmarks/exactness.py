"""The price of exactness: a plain step of the engine beside the fastest one-row steps that owe nobody equal bits.

    python benchmarks/exactness.py                                             # 8b and 1.7b, 1k of context, batch 1
    python benchmarks/exactness.py --model toy --context 40 --device cpu       # does it run; no number

All ways are one plain decoding step of the same weights through the engine's own passes, with other operations:

    engine   the kernels as they are: a row has the same bits among any others
    tuned    the same kernels, with the tiles that are fastest for one row alone (found here, in a short sweep)
    torch    PyTorch's: cuBLAS, its norms and elementwise kernels; heads are placed and attended to by the engine
    gemv     kernels for one row, `gemv.py`, spread as is fastest for each shape (found here)

`graph` is a pass with its argmax and commit, replayed as a graph: a median by CUDA events. `step` is the engine's cycle
at width 0 as its caller sees it: a median of wall times, from return to return. `floor` is what the read-only stream of
`gpu.py` takes for the bytes that a step reads. `apart` is the largest difference of the last hidden states from the
engine's, by their root mean square; a way that is further apart than rounding takes it is marked, and the exit code 1.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from benchmarks.cycle import fill, pass_bytes, random_model, rows_of, run_cycles
from benchmarks.gemv import Spread
from benchmarks.gpu import COLD_BYTES, MODELS, in_processes, microseconds, on_device, product_shapes, stream_tbps

from benchmarks import gemv, tiles
from orthrus.engine import reference
from orthrus.engine.engine import MIN_TABLE_PAGES, EngineBackend, bucket
from orthrus.engine.graphs import Graphs
from orthrus.engine.kernels import place
from orthrus.engine.kernels import tiles as cuts
from orthrus.engine.kernels.tiles import SHARED_BYTES, Tiles
from orthrus.engine.operations import Ops, choose_ops
from orthrus.engine.passes import Inputs, Shape
from orthrus.evaluation.records import Origin, ResultRecord, here_and_now, to_json

WAYS = ("engine", "tuned", "torch", "gemv")
BLOCK_SIZE = 32
"""The model's; a plain step drafts nothing."""
PAGE_SLOTS = 64
SWEEP_REPLAYS = 8
MAX_APART = 0.5
"""Largest difference in root mean squares that rounding explains. An operation in bf16 rounds by 2^-9 at most; some 5
roundings a layer add up as their squares do, to 0.03 over 36 layers, and the largest of 4,096 differences is four times
that. A wrong operation makes hidden states that have nothing to do with the engine's, whose difference is more than 4.
"""
KINDS = {"qkv": "sum", "o": "sum", "gate_up": "swiglu", "down": "sum", "head": "largest"}
"""What `gemv.multiply` calls each product."""
SPLITS = {"head": (1,), "gate_up": (1,), "down": (2, 3, 4, 6), "qkv": (2, 3, 4), "o": (2, 3, 4)}
"""Parts of a sum that the sweep of tiles tries: around those that `tiles.py` finds."""


class Product(NamedTuple):
    """One product of a step, in one way."""

    way: str
    name: str
    shape: tuple[int, int]


Choice = Tiles | Spread
Found = dict[Product, Choice]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What was measured of one way."""

    way: str
    graph_ms: float
    """NaN without a GPU."""
    step_ms: float
    apart: float
    same_token: bool

    @property
    def finite_apart(self) -> float | None:
        """None where a way's hidden states are no numbers, which JSON has no word for."""
        return self.apart if math.isfinite(self.apart) else None


# Choosing tiles and spreads


def present(shape: tuple[int, int]) -> Tiles:
    """The tiles that one row's product runs with as things are."""
    tiles, execution = cuts.tiles_of_shape(*shape, 2), cuts.BY_ROWS.get((*shape, 2), {}).get(cuts.ROWS[0])
    return tiles if execution is None else tiles.run_as(execution)


def choices(product: Product) -> list[Choice]:
    """What the sweep tries."""
    if product.way == "gemv":
        return list(gemv.spreads(KINDS[product.name], product.shape[1]))
    tried = [
        Tiles(block_e, block_k, splits, warps, stages)
        for block_e in (64, 128)
        for block_k in ((64, 128) if SPLITS[product.name] == (1,) else (128,))
        for splits in SPLITS[product.name]
        for warps, stages in ((4, 3), (4, 4), (4, 6), (8, 4))
        if stages * block_k * (block_e + 16) * 2 <= SHARED_BYTES
    ]
    return [*dict.fromkeys([present(product.shape), *tried])]


def compiled_as(product: Product, choice: Choice) -> tuple[Any, ...]:
    """What a choice's kernels depend on: choices that share it need compiling but once."""
    if isinstance(choice, Spread):
        return (*product, *choice._replace(per_processor=min(choice.per_processor, 1)))
    if product.name in ("o", "down"):  # the norm behind them knows outputs and parts
        return (product.way, "norm", product.shape[0], *choice)
    return (product.way, product.name, *choice._replace(SPLITS=min(choice.SPLITS, 2)))


def call(product: Product, choice: Choice, x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor) -> Any:
    """What a step runs; residual and norm as wide as the outputs."""
    if isinstance(choice, Tiles):
        cuts.TILES[(*product.shape, weight.element_size())] = choice
        return tiles.call(product.name, x, weight, None, residual, norm)
    kind = KINDS[product.name]
    if product.name in ("o", "down"):
        return gemv.multiply(x, weight, choice, kind=kind, residual_RE=residual)
    return gemv.multiply(gemv.Unnormed(x, x[0], 1e-6), weight, choice, kind=kind)


def operands(product: Product, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, weight, residual and norm of a product."""
    (num_outputs, width), how = product.shape, dict(device=device, dtype=torch.bfloat16)
    weight = torch.empty(num_outputs, width, **how).normal_(std=width**-0.5)  # pyrefly: ignore
    x, residual = (torch.randn(1, n, **how) for n in (width, num_outputs))  # pyrefly: ignore
    return x, weight, residual, residual[0].clone()


def compile_some(work: list[tuple[Product, Choice]], device: torch.device) -> None:
    """Compile the kernels of these choices."""
    cuts.BY_ROWS.clear()
    for product in dict.fromkeys(product for product, _ in work):
        given = operands(product, device)
        for choice in (choice for one, choice in work if one == product):
            try:
                call(product, choice, *given)
            except Exception as error:  # noqa: BLE001 - one that does not fit is not chosen
                print(f"# {product.way} {product.name} {tuple(choice)}: {type(error).__name__}", flush=True)
    on_device(device)


def compile_all(work: list[tuple[Product, Choice]], device: torch.device, num_processes: int) -> None:
    """Compile in parallel; Triton's cache on disk is shared."""
    unique = list({compiled_as(product, choice): (product, choice) for product, choice in work}.values())
    unique.sort(key=lambda one: one[0].shape)  # a process meets few shapes
    size = math.ceil(len(unique) / num_processes)
    in_processes(compile_some, [unique[at : at + size] for at in range(0, len(unique), size)], device)


def fastest(product: Product, tried: Sequence[Choice], device: torch.device) -> tuple[Choice, float]:
    """The fastest choice over weights that are not in L2, and its microseconds."""
    x, weight, residual, norm = operands(product, device)
    count = math.ceil(COLD_BYTES / weight.nbytes) if device.type == "cuda" else 0
    weights = [weight, *(weight.clone() for _ in range(count))]
    found = []
    for choice in tried:
        calls = [partial(call, product, choice, x, one, residual, norm) for one in weights]
        try:
            found.append((microseconds(calls, device, repeats=SWEEP_REPLAYS), choice))
        except Exception as error:  # noqa: BLE001
            print(f"# {product.way} {product.name} {tuple(choice)}: {type(error).__name__}", flush=True)
    us, choice = min(found)
    return choice, us


@contextmanager
def restored_tiles() -> Iterator[None]:
    """Put the tables of `engine/kernels/tiles.py` back as they were."""
    tables: tuple[dict[Any, Any], ...] = (cuts.TILES, cuts.BY_ROWS)
    kept = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, before in zip(tables, kept, strict=True):
            table.clear()
            table.update(before)


def sweep(models: Sequence[str], ways: Sequence[str], device: torch.device, num_processes: int) -> Found:
    """The fastest choice for each product of these ways; on a CPU the last, which is tried once."""
    begun = time.perf_counter()
    shapes = {(name, shape): None for model in models for name, shape in product_shapes(MODELS[model]).items()}
    products = [Product(way, *of) for way in ways if way in ("tuned", "gemv") for of in shapes]
    tried = {product: choices(product) for product in products}
    found: Found = {}
    with restored_tiles():
        cuts.BY_ROWS.clear()  # it would stand in for what is tried
        if device.type == "cuda":
            compile_all([(product, one) for product, some in tried.items() for one in some], device, num_processes)
            print(f"# compiled at {time.perf_counter() - begun:.0f} s", flush=True)
        for product, some in tried.items():
            found[product], us = fastest(product, some if device.type == "cuda" else some[-1:], device)
            tbps = product.shape[0] * product.shape[1] * 2 / us * 1e-6
            print(
                f"# {product.way} {product.name} {product.shape}: {tuple(found[product])} {us:.1f} us, {tbps:.2f} TB/s"
            )
    print(f"# swept at {time.perf_counter() - begun:.0f} s", flush=True)
    return found


# The ways


def torch_ops(device: torch.device) -> Ops:
    """PyTorch's own kernels, in bf16 throughout; the engine's place heads and attend."""
    place_heads = place.place_heads if device.type == "cuda" else reference.place_heads

    def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x_RD, weight_D.shape, weight_D, eps)

    def linear_and_norm(x_RD: Tensor, weight_ED: Tensor, *, norm_E: Tensor, eps: float, **after: Any) -> Any:
        out = torch.addmm(after["residual_RE"], x_RD, weight_ED.T)
        return out, rms_norm(out, norm_E, eps)

    def swiglu(x_RD: Tensor, weight_2FD: Tensor, **none: Any) -> Tensor:
        gate, up = F.linear(x_RD, weight_2FD).chunk(2, dim=-1)
        return F.silu(gate) * up

    def head_argmax(x_RD: Tensor, weight_VD: Tensor, **none: Any) -> Tensor:
        return F.linear(x_RD, weight_VD).argmax(dim=-1)

    def project_heads(x_RD: Tensor, qkv_ED: Tensor, *places: Any, num_heads: int, width: int, **none: Any) -> Tensor:
        return place_heads(F.linear(x_RD, qkv_ED), *places, num_heads=num_heads, width=width)

    return choose_ops(device)._replace(
        rms_norm=rms_norm, linear_and_norm=linear_and_norm, swiglu=swiglu, head_argmax=head_argmax,
        project_heads=project_heads,
    )  # fmt: skip


def ops_of(way: str, found: Found, device: torch.device) -> Ops:
    """The operations of a way; on a CPU the engine's twins stand in for its kernels."""
    if way == "torch":
        return torch_ops(device)
    if way == "gemv":
        chosen = {(*product.shape, KINDS[product.name]): choice for product, choice in found.items()
                  if product.way == "gemv"}  # fmt: skip

        def spread_of(weight_ED: Tensor, kind: str) -> Any:
            return chosen[len(weight_ED), weight_ED.shape[1], kind]

        return gemv.one_row_ops(spread_of)
    return choose_ops(device)


@contextmanager
def tiles_of_way(way: str, found: Found) -> Iterator[None]:
    """The tables of tiles as a way wants them."""
    with restored_tiles():
        if way == "tuned":
            cuts.BY_ROWS.clear()
            cuts.TILES.update({(*p.shape, 2): choice for p, choice in found.items() if isinstance(choice, Tiles)})
        yield


# One model


def make_backend(model: nn.Module, ops: Ops, context: int, num_steps: int) -> EngineBackend:
    """A backend with one row's pages, all ways' with the same keys and values in them."""
    num_pages = 2 * (math.ceil((context + num_steps) / PAGE_SLOTS) + 2)
    backend = EngineBackend(model, num_pages=num_pages, page_slots=PAGE_SLOTS, ops=ops)
    generator = torch.Generator(backend.device).manual_seed(0)
    backend.passes.keys_LPSGH.normal_(generator=generator)
    backend.passes.values_LPSGH.normal_(generator=generator)
    return backend


def one_row(backend: EngineBackend, context: int, num_steps: int, vocab: int) -> Inputs:
    """Buffers with a row of random tokens in them, and pages for so many steps."""
    (row,) = rows = rows_of(1, context, BLOCK_SIZE, 0, vocab)
    fill(backend, rows)
    backend.tables.reserve(row.index, context + num_steps)
    pages = backend.tables.pages(row.index)
    shape = Shape(1, 1, bucket(max(len(pages), MIN_TABLE_PAGES)))
    inputs = Inputs(shape, spare_page=backend.pool.num_pages, like_VD=backend.weights.embedding_VD)
    inputs.write([row.tokens[-1]], [context], [0], [pages])
    return inputs


@torch.inference_mode()
def look(backend: EngineBackend, context: int, vocab: int) -> tuple[Tensor, int]:
    """The hidden states of one step, normed, and its token. [D]."""
    inputs = one_row(backend, context, 1, vocab)
    inputs.ids_BW[:, 0] = inputs.anchors_B
    hidden: Any = backend.passes.run("ar", inputs)
    token = backend.passes.ops.head_argmax(hidden, backend.weights.head["ar"].weight_ED)
    normed = hidden.normed() if isinstance(hidden, gemv.Unnormed) else hidden
    return normed[0].float(), int(token)


@torch.inference_mode()
def graph_ms(backend: EngineBackend, context: int, num_steps: int, vocab: int) -> float:
    """Median time of a replay of `verify`; NaN without a GPU, where it runs once."""
    inputs = one_row(backend, context, num_steps + 3, vocab)
    graphs = Graphs.on(backend.device)  # the backend's own know this shape by other buffers
    step: Callable[[], None] = partial(graphs.run, backend.passes.verify, inputs)
    for _ in range(3 if backend.device.type == "cuda" else 1):  # as it is, captured, replayed
        step()
    if backend.device.type != "cuda":
        return math.nan
    times = []
    for _ in range(num_steps):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        step()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended))
    return statistics.median(times)


def measure_way(
    model: nn.Module, shape: str, way: str, found: Found, expected: tuple[Tensor, int] | None, *, context: int,
    num_steps: int,
) -> tuple[Step, tuple[Tensor, int]]:  # fmt: skip
    """Both times of one way, and what a step gives, beside what the engine's gave."""
    vocab = MODELS[shape].vocab
    with tiles_of_way(way, found):
        backend = make_backend(model, ops_of(way, found, model.device), context, num_steps + 16)
        seen = look(backend, context, vocab)
        hidden_D, token = expected or seen
        apart = ((seen[0] - hidden_D).abs().max() / hidden_D.pow(2).mean().sqrt()).item()
        graph = graph_ms(backend, context, num_steps, vocab)
        rows = rows_of(1, context, BLOCK_SIZE, 0, vocab)
        fill(backend, rows)
        step = run_cycles(backend, rows, num_steps)["cycle_ms"]
        on_device(backend.device)
    return Step(way=way, graph_ms=graph, step_ms=step, apart=apart, same_token=seen[1] == token), seen


def measure_model(
    shape: str, options: argparse.Namespace, found: Found, origin: Origin, tbps: float
) -> tuple[list[ResultRecord], bool]:
    """Records of all ways of one model, and whether all agree with the engine."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = random_model(shape, device, BLOCK_SIZE)
    rows = rows_of(1, options.context, BLOCK_SIZE, 0, MODELS[shape].vocab)
    floor = pass_bytes(make_backend(model, choose_ops(device), 1, 1), rows, "ar") / tbps * 1e-9
    expected, steps = None, []
    for way in ("engine", *(way for way in options.way if way != "engine")):
        step, seen = measure_way(model, shape, way, found, expected, context=options.context, num_steps=options.steps)
        expected = expected or seen
        steps.append(step)
        show(shape, options.context, step, floor)
    right = [step for step in steps if step.apart <= MAX_APART]
    for clock in ("graph_ms", "step_ms"):
        best = min(right, key=attrgetter(clock), default=steps[0])
        price = getattr(steps[0], clock) / getattr(best, clock)
        print(f"# {shape}, {clock}: the engine's is {price:.3f} times that of the fastest way, {best.way}", flush=True)
    shared = dict(model=shape, context=options.context, batch=1, drafting=False, backend="engine", dtype="bfloat16",
                  floor_ms=floor, statistic="median")  # fmt: skip
    records = [
        ResultRecord.of(
            origin, name="one_row_step_ms", value=value, unit="ms",
            params=shared | dict(way=step.way, clock=clock, apart=step.finite_apart, same_token=step.same_token),
        )
        for step in steps
        for clock, value in (("graph", step.graph_ms), ("step", step.step_ms))
    ]  # fmt: skip
    return records, len(right) == len(steps)


def show(shape: str, context: int, step: Step, floor: float) -> None:
    """A line of the table."""
    print(
        f"{shape:5} {context:7} {step.way:>7} {step.graph_ms:8.3f} {step.step_ms:8.3f} {floor:7.3f} "
        f"{step.step_ms / floor:6.2f} {step.apart:8.4f} {'same' if step.same_token else 'other':>6}"
        f"{'' if step.apart <= MAX_APART else '  NOT THE SAME STEP'}",
        flush=True,
    )


def main() -> None:
    """Print the choices, a table, and as the last line the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["8b", "1.7b"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--way", choices=WAYS, nargs="+", default=list(WAYS), help="beside the engine's")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, default=15, help="that compile")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    origin = here_and_now(device)
    found = sweep(options.model, options.way, device, options.processes)
    tbps = stream_tbps(device)
    records = [ResultRecord.of(origin, name="read_stream_tbps", value=tbps, unit="TB/s", params={})]
    print(f"{origin.hardware}: read-only stream {tbps:.2f} TB/s")
    print("model context     way    graph     step   floor  of it    apart  token")
    is_right = True
    for shape in options.model:
        of_model, agrees = measure_model(shape, options, found, origin, tbps)
        records, is_right = [*records, *of_model], is_right and agrees
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(to_json(records) if device.type == "cuda" else json.dumps({"records": len(records), "agree": is_right}))
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
