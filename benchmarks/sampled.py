"""Milliseconds of the engine's cycles whose rows argmax alone does not decide, beside greedy ones.

    python benchmarks/sampled.py                                  # 1.7b and 8b, batch 1 and 8, 1k of context
    python benchmarks/sampled.py --model toy --context 40 --cycles 3 --device cpu      # does it run; no number

Weights are random and so are the cached keys and values, and drafts are kept as they come, which is hardly ever: what
is accepted changes no shape, and hence little but the host's share. Logits of random weights are flat, the hard case
for top-p alone. A row of the table is a median over cycles of the whole host loop's wall time, from return to return:
with drafts (`cycle_ms`), and at width 0 (`ar_step_ms`). `draft_ms` and `verify_ms` are the passes with what is chosen
behind them. "more" is the most that was allocated at once beyond what lay there before, in MB.

Every way has the process's engine to itself in turn; the first of each batch also pays for what is captured.
"""

import argparse
import json
from typing import Any, NamedTuple

import torch
from benchmarks.cycle import fill, random_model, rows_of, run_cycles
from benchmarks.gpu import MODELS
from torch import nn

from orthrus.decoding.sampling import Sampling
from orthrus.engine.engine import EngineBackend
from orthrus.evaluation.records import Origin, ResultRecord, here_and_now, to_json


class Way(NamedTuple):
    """How rows are decoded."""

    sampling: Sampling
    wants_logprobs: bool = False


def sampled(**others: Any) -> Sampling:
    """A usual setting."""
    settings: dict[str, Any] = dict(temperature=0.8, top_p=0.95, top_k=50)
    return Sampling(**settings | others)


WAYS = {
    "greedy": Way(Sampling()),
    "greedy, logprobs": Way(Sampling(), True),
    "speculative": Way(sampled(rule="speculative")),
    "coupled": Way(sampled(rule="coupled")),
    "speculative, top-p alone": Way(sampled(rule="speculative", top_k=0)),
    "coupled, top-p alone": Way(sampled(rule="coupled", top_k=0)),
    "speculative, temperature alone": Way(sampled(rule="speculative", top_k=0, top_p=1.0)),
    "coupled, temperature alone": Way(sampled(rule="coupled", top_k=0, top_p=1.0)),
}
"""Temperature 0.8, top-p 0.95 and top-k 50 unless the name says otherwise."""


def main() -> None:
    """Print a table line by line, and as the last line the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["1.7b", "8b"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--way", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--cycles", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    origin = here_and_now(device)
    print(f"{origin.hardware}: {options.context} of context, block size {options.block_size}")
    print(f"{'model':5} {'batch':>5} {'way':30} {'cycle':>8} {'draft':>8} {'verify':>8} {'step':>8} {'of greedy':>9} {'more':>7}")  # noqa: E501  # fmt: skip
    records: list[ResultRecord] = []
    for shape in options.model:
        model = random_model(shape, device, options.block_size)
        records += measure_model(model, shape, options, origin)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(to_json(records) if options.device != "cpu" else json.dumps({"records": len(records)}))


def measure_model(model: nn.Module, shape: str, options: argparse.Namespace, origin: Origin) -> list[ResultRecord]:
    """All batches and ways of one model."""
    longest = options.context + (options.cycles + 8) * options.block_size
    backend = EngineBackend(model, num_pages=max(options.batch) * (longest // 64 + 2))
    backend.passes.keys_LPSGH.normal_()
    backend.passes.values_LPSGH.normal_()
    records: list[ResultRecord] = []
    for batch in options.batch:
        greedy_ms = float("nan")
        for name in options.way:
            drafted, peak = measure(backend, WAYS[name], shape, options, batch, options.block_size - 1)
            plain, _ = measure(backend, WAYS[name], shape, options, batch, 0)
            greedy_ms = drafted["cycle_ms"] if name == "greedy" else greedy_ms
            print(
                f"{shape:5} {batch:5} {name:30} {drafted['cycle_ms']:8.3f} {drafted['draft_ms']:8.3f} "
                f"{drafted['verify_ms']:8.3f} {plain['cycle_ms']:8.3f} {drafted['cycle_ms'] / greedy_ms:9.2f} "
                f"{peak / 1e6:7.0f}",
                flush=True,
            )
            params = dict(
                model=shape, context=options.context, batch=batch, block_size=options.block_size, way=name,
                backend="engine", dtype="bfloat16", statistic="median", peak_bytes=peak,
            )  # fmt: skip
            values = [(key, drafted[key], True) for key in ("cycle_ms", "draft_ms", "verify_ms")]
            for key, value, is_drafting in (*values, ("ar_step_ms", plain["cycle_ms"], False)):
                records.append(
                    ResultRecord.of(origin, name=key, value=value, unit="ms", params=params | {"drafting": is_drafting})
                )
    return records


def measure(
    backend: EngineBackend, way: Way, shape: str, options: argparse.Namespace, batch: int, width: int
) -> tuple[dict[str, float], int]:
    """`run_cycles` of rows that are decoded this way, and the most bytes allocated beyond what there was (on a GPU)."""
    rows = rows_of(batch, options.context, options.block_size, width, MODELS[shape].vocab)
    for row in rows:
        row.sampling, row.seed, row.wants_logprobs = way.sampling, row.index, way.wants_logprobs
    fill(backend, rows)
    is_cuda, before = backend.device.type == "cuda", 0
    if is_cuda:
        torch.cuda.synchronize(backend.device)
        torch.cuda.reset_peak_memory_stats(backend.device)
        before = torch.cuda.memory_allocated(backend.device)
    value = run_cycles(backend, rows, options.cycles)
    peak = torch.cuda.max_memory_allocated(backend.device) - before if is_cuda else 0
    for row in rows:
        backend.release(row.index)
    return value, peak


if __name__ == "__main__":
    main()
