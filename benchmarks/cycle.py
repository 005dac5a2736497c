"""Milliseconds of a decoding cycle of the engine at exact Qwen3 shapes, with forced acceptance, beside the floor.

    python benchmarks/cycle.py                                    # 1.7b, 4b and 8b, batch 1, 1k / 8k / 40k of context
    python benchmarks/cycle.py --model 8b --context 1024 --batch 1 4 16 64
    python benchmarks/cycle.py --model toy --context 40 --cycles 3 --device cpu      # does it run; no number

Weights are random and so are the cached keys and values, which changes no time. How many drafts each cycle keeps is
forced on the device, behind the comparison that would decide it, so that commits, rollbacks and new pages are in the
clock: `0`, `1`, all (`31`), or `geometric` (each draft survives with the probability that makes N 8.5). A row is a
median over cycles of the whole host loop's wall time (`cycle_ms`), which a graph's replays alone do not show;
`draft_ms` and `verify_ms` are the passes by CUDA events. `ar_step_ms` is the same verb at width 0.

`floor_ms` is the time of the measured read-only stream for the bytes that must be read: a draft and a verify pass read
all layers in their view, the head and the row's keys and values once each.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from benchmarks.gpu import MODELS, on_device, stream_tbps
from torch import Tensor, nn

from orthrus.config import OrthrusConfig
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.row import Backend, Row
from orthrus.decoding.sampling import Sampling
from orthrus.engine.engine import EngineBackend, page_bytes
from orthrus.engine.passes import Inputs, Passes
from orthrus.engine.weights import DRAFT_PRECISIONS
from orthrus.evaluation.records import Origin, ResultRecord, here_and_now, to_json
from orthrus.model.attention import View

GEOMETRIC_N = 8.5
"""Tokens per cycle of the geometric trace, the published average's order."""
TRACE_CYCLES = 4096
"""Cycles before a trace begins again."""
TRACE_ROWS = 64
"""Rows before they follow the same traces again."""
MAX_SLOTS = 2**20
"""Tokens of keys and values: 155 GB at 8B."""
WARM_CYCLES = 6
"""Eager, captured, and then some."""


def survival(tokens_per_cycle: float, block_size: int) -> float:
    """The probability that each draft survives its predecessors which makes this N, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(middle**k for k in range(block_size))
        low, high = (middle, high) if mean < tokens_per_cycle else (low, middle)
    return low


def trace(name: str, block_size: int) -> list[int]:
    """Accepted drafts of each cycle."""
    if name == "geometric":
        rng, chance = random.Random(0), survival(GEOMETRIC_N, block_size)
        counts = []
        for _ in range(TRACE_CYCLES):
            count = 0
            while count < block_size - 1 and rng.random() < chance:
                count += 1
            counts.append(count)
        return counts
    return [min(int(name), block_size - 1)] * TRACE_CYCLES


class ForcedPasses(Passes):
    """Passes whose verification keeps as many drafts as traces say, read and advanced on the device."""

    forced_RT: Tensor | None = None
    at_1: Tensor

    def force(self, traces: Sequence[Sequence[int]]) -> None:
        """Row r follows trace r modulo their number, from its beginning. Graphs keep the buffers."""
        if self.forced_RT is None:
            device = self.weights.embedding_VD.device
            self.forced_RT = torch.zeros(TRACE_ROWS, TRACE_CYCLES, dtype=torch.long, device=device)
            self.at_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.forced_RT.copy_(torch.tensor([traces[r % len(traces)] for r in range(TRACE_ROWS)]))
        self.rewind()

    def rewind(self) -> None:
        """Begin the traces again."""
        self.at_1.zero_()

    def accept(self, inputs: Inputs, targets_BW: Tensor) -> tuple[Tensor, Tensor]:
        """The comparison, and then what the traces say, no more than each row's width."""
        num_accepted_B, committed_BW = super().accept(inputs, targets_BW)
        if self.forced_RT is None:
            return num_accepted_B, committed_BW
        rows_B = torch.arange(len(num_accepted_B), device=targets_BW.device) % TRACE_ROWS
        kept_B = self.forced_RT[rows_B, self.at_1 % TRACE_CYCLES]
        self.at_1.add_(1)
        forced_B = torch.minimum(kept_B, inputs.widths_B.clamp(min=0))
        return forced_B + 0 * num_accepted_B, committed_BW


def random_model(shape: str, device: torch.device, block_size: int) -> nn.Module:
    """A model of this shape with random weights, made where it is to live."""
    of = MODELS[shape]
    config = OrthrusConfig(
        vocab_size=of.vocab, hidden_size=of.hidden, intermediate_size=of.mlp, num_hidden_layers=of.layers,
        num_attention_heads=of.heads, num_key_value_heads=of.groups, head_dim=of.head_dim, rms_norm_eps=1e-6,
        max_position_embeddings=49_152, rope_theta=1e6, tie_word_embeddings=of.tied, block_size=block_size,
        mask_token_id=of.vocab - 1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return OrthrusForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)


def rows_of(num_rows: int, context: int, block_size: int, width: int, vocab: int) -> list[Row]:
    """Rows of random tokens, all but the anchor cached."""
    rng = random.Random(0)
    return [
        Row(
            index=index, tokens=[rng.randrange(vocab - 1) for _ in range(context + 1)], num_prompt=context,
            max_tokens=49_000, block_size=block_size, sampling=Sampling(), seed=0, width=width, next_width=width,
        )
        for index in range(num_rows)
    ]  # fmt: skip


def fill(backend: EngineBackend, rows: list[Row]) -> None:
    """Rows whose keys and values are whatever lies in their pages."""
    for row in rows:
        if row.index in backend.tables:
            backend.release(row.index)
        backend.tables.add(row.index)
        backend.tables.reserve(row.index, row.num_cached)
        backend.tables.commit(row.index, row.num_cached)


def run_cycles(backend: Backend, rows: list[Row], num_cycles: int) -> dict[str, float]:
    """Medians over cycles, after warm-up. Milliseconds, and tokens of a row's cycle.

    A cycle lasts from the last one's return to its own: a device that works ahead while the host is busy may do so.
    """
    wall, draft, verify, tokens = [], [], [], 0
    last = time.perf_counter()
    for cycle in range(WARM_CYCLES + num_cycles):
        found = backend.cycle(rows)
        for row, outcome in zip(rows, found.outcomes, strict=True):
            row.tokens += outcome.tokens
        now = time.perf_counter()
        if cycle >= WARM_CYCLES:
            wall.append((now - last) * 1e3)
            draft.append(found.draft_ms)
            verify.append(found.verify_ms)
            tokens += sum(len(outcome.tokens) for outcome in found.outcomes)
        last = now
    on_device(backend.device)
    return {
        "cycle_ms": statistics.median(wall),
        "draft_ms": statistics.median(draft),
        "verify_ms": statistics.median(verify),
        "tokens_per_cycle": tokens / num_cycles / len(rows),
    }


def pass_bytes(backend: EngineBackend, rows: list[Row], view: View) -> int:
    """Bytes that a pass in one view must read: its layers, the head, and the rows' keys and values."""
    weights = backend.weights
    num_bytes = weights.head[view].num_bytes
    for layer in weights.layers:
        attention, mlp = layer.attention[view], layer.mlp[view]
        num_bytes += sum(matrix.num_bytes for matrix in (attention.qkv, attention.out, mlp.gate_up, mlp.down))
    return num_bytes + sum(row.num_cached for row in rows) * page_bytes(backend.model, 1)


def prefill_portable(backend: PortableBackend, rows: list[Row]) -> None:
    """The portable backend caches its rows by prefilling them."""
    for row in rows:
        tokens, row.num_prompt = row.tokens, len(row.tokens) - 1
        row.tokens = tokens[:-1]
        backend.prefill(row)
        row.tokens = tokens


def main() -> None:
    """Print a table line by line, and as the last line the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["1.7b", "4b", "8b"])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 40_960])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--trace", nargs="+", default=["0", "1", "31", "geometric"])
    parser.add_argument("--cycles", type=int, default=60)
    parser.add_argument("--portable", type=int, default=0, metavar="CYCLES", help="cycles of the portable backend, too")
    parser.add_argument("--draft-precision", choices=DRAFT_PRECISIONS, help="drafts read copies of the weights")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    origin = here_and_now(device)
    tbps = stream_tbps(device)
    records = [ResultRecord.of(origin, name="read_stream_tbps", value=tbps, unit="TB/s", params={})]
    print(f"{origin.hardware}: read-only stream {tbps:.2f} TB/s")
    print(f"{'model':5} {'context':>7} {'batch':>5} {'trace':>9} {'cycle':>8} {'draft':>7} {'verify':>7} {'floor':>7} {'of it':>6} {'N':>6}")  # noqa: E501  # fmt: skip
    for shape in options.model:
        model = random_model(shape, device, options.block_size)
        found = measure_model(model, shape, options, origin, tbps)
        records += found
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(to_json(records) if options.device != "cpu" else json.dumps({"records": len(records)}))


def measure_model(
    model: nn.Module, shape: str, options: argparse.Namespace, origin: Origin, tbps: float
) -> list[ResultRecord]:
    """All contexts, batches and traces of one model."""
    records: list[ResultRecord] = []
    block_size, vocab = options.block_size, MODELS[shape].vocab
    longest = max(options.context) + (options.cycles + WARM_CYCLES) * block_size
    row_counts = [batch for batch in options.batch if batch * longest < MAX_SLOTS]
    if len(row_counts) < len(options.batch):
        print(
            f"# batches of more than {MAX_SLOTS // longest} rows of {longest} tokens are left out: ask for less context"
        )
    if not row_counts:
        return records
    num_pages = max(row_counts) * (longest // 64 + 2)
    backend = EngineBackend(
        model, num_pages=num_pages, draft_precision=options.draft_precision, make_passes=ForcedPasses
    )
    passes = backend.passes
    assert isinstance(passes, ForcedPasses)
    passes.force([[0] * TRACE_CYCLES])
    passes.keys_LPSGH.normal_()
    passes.values_LPSGH.normal_()
    for context in options.context:
        for batch in row_counts:
            for name in ("ar", *options.trace):
                width = 0 if name == "ar" else block_size - 1
                rows = rows_of(batch, context, block_size, width, vocab)
                fill(backend, rows)
                passes.force([trace("0" if name == "ar" else name, block_size)])
                value = run_cycles(backend, rows, options.cycles)
                views: tuple[View, ...] = ("ar",) if name == "ar" else ("diffusion", "ar")
                floor = sum(pass_bytes(backend, rows, view) for view in views) / tbps * 1e-9
                show(shape, context, batch, name, value, floor)
                record = partial(
                    ResultRecord.of, origin, unit="ms",
                    params=dict(model=shape, context=context, batch=batch, block_size=block_size, trace=name,
                                drafting=name != "ar", backend="engine", dtype="bfloat16",
                                draft_precision=options.draft_precision, floor_ms=floor, statistic="median"),
                )  # fmt: skip
                if name == "ar":
                    records.append(record(name="ar_step_ms", value=value["cycle_ms"]))
                else:
                    records += [record(name=key, value=value[key]) for key in ("cycle_ms", "draft_ms", "verify_ms")]
                for row in rows:
                    backend.release(row.index)
            if options.portable and context <= 8192:
                records += measure_portable(model, shape, options, origin, context, batch)
    return records


def measure_portable(
    model: nn.Module, shape: str, options: argparse.Namespace, origin: Origin, context: int, batch: int
) -> list[ResultRecord]:
    """The Hugging Face modules' cycle, which keeps the drafts that are right: with random weights none."""
    records = []
    for name in ("ar", "0"):
        backend = PortableBackend(model, exact=False)
        width = 0 if name == "ar" else options.block_size - 1
        rows = rows_of(batch, context, options.block_size, width, MODELS[shape].vocab)
        prefill_portable(backend, rows)
        value = run_cycles(backend, rows, options.portable)
        show(shape, context, batch, f"{name} port.", value, float("nan"))
        params: dict[str, Any] = dict(
            model=shape, context=context, batch=batch, block_size=options.block_size, trace=name,
            drafting=name != "ar", backend="portable", dtype="bfloat16", statistic="median",
        )  # fmt: skip
        metric = "ar_step_ms" if name == "ar" else "cycle_ms"
        records.append(ResultRecord.of(origin, name=metric, value=value["cycle_ms"], unit="ms", params=params))
        for row in rows:
            backend.release(row.index)
    return records


def show(shape: str, context: int, batch: int, name: str, value: dict[str, float], floor: float) -> None:
    """A line of the table."""
    print(
        f"{shape:5} {context:7} {batch:5} {name:>9} {value['cycle_ms']:8.3f} {value['draft_ms']:7.3f} "
        f"{value['verify_ms']:7.3f} {floor:7.3f} {value['cycle_ms'] / floor:6.2f} {value['tokens_per_cycle']:6.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
