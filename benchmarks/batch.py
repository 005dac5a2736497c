"""Tokens per second of batches at forced acceptance: plain decoding, each fixed width, and `auto`, in one engine.

    python benchmarks/batch.py                                                 # 8b, batch 1, 4, 16, 64, 1k of context
    python benchmarks/batch.py --batch 64 --tokens-per-cycle 3.7
    python benchmarks/batch.py --model toy --context 40 --batch 1 4 --cycles 32 --device cpu    # does it run; no number

Weights, keys and values are random, which changes no time. How many drafts survive is forced on the device: each draft
of a row survives its predecessors with the chance that makes N the wanted one at the trained block. In every `PERIOD`
cycles each row has the quantiles of that law once, in an order of its own, and every width meets the same ones: in
cycle c row r keeps what survives there or its width, whichever is less. So N is what was wanted without long runs.

The clock is wall time around `Decoder.step`, so all host work of a step is in it: `tokens_per_second` of all rows over
`--cycles` cycles, behind the first ones of these rows. Every table row begins with new rows of the same context. Graphs
of every number of columns that a pass can have are captured before anything is timed, and that none is captured in the
clock is asserted. `auto` knows nothing of the model at first, for each batch and N anew; it decodes `--auto-rounds`
times as many cycles as are timed, each round with new rows, and then is timed like the others, its trials included.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from benchmarks.cycle import TRACE_CYCLES, TRACE_ROWS, ForcedPasses, random_model, survival
from benchmarks.gpu import MODELS, on_device
from torch import nn

from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.row import Cycle, Outcome, Row
from orthrus.decoding.schedule import Experience, experience_of
from orthrus.decoding.stopping import Stopping
from orthrus.engine.engine import EngineBackend
from orthrus.engine.weights import DRAFT_PRECISIONS
from orthrus.evaluation.records import Origin, ResultRecord, here_and_now, to_json

PERIOD = 32
"""Cycles in which a row meets all quantiles of its law; divides what is timed."""
WARM_CYCLES = 3
"""Eager, captured, replayed."""

BlockSize = int | Literal["ar", "auto"]


def row_trace(tokens_per_cycle: float, block_size: int, seed: int) -> list[int]:
    """Drafts that survive in each cycle of a row."""
    rng, chance = random.Random(seed), survival(tokens_per_cycle, block_size)
    quantiles = [math.log((i + 0.5) / PERIOD) / math.log(chance) for i in range(PERIOD)]
    counts = [min(int(quantile), block_size - 1) for quantile in quantiles]
    return [count for _ in range(TRACE_CYCLES // PERIOD) for count in rng.sample(counts, PERIOD)]


class FilledBackend(EngineBackend):
    """The engine, whose prompts are cached by saying so."""

    setting: object = None
    """What `auto` may know of others: those with the same setting."""

    def prefill(self, row: Row, *, num_kept: int = 0, limit: int | None = None) -> Cycle:
        """Keys and values are whatever lies in the row's pages."""
        self.tables.add(row.index)
        self.tables.reserve(row.index, len(row.tokens))
        self.tables.commit(row.index, len(row.tokens))
        return Cycle(outcomes=[Outcome(tokens=[1], drafts=[])], draft_ms=0.0, verify_ms=0.0)

    def experience(self, block_size: int) -> Experience:
        """Of this setting alone."""
        return experience_of(self.model, block_size, self.setting)


class Speed(NamedTuple):
    """What was measured of a batch."""

    tokens_per_second: float
    cycle_ms: float
    tokens_per_cycle: float
    """Of a row."""
    num_drafts: float
    """Asked for in a cycle, on average."""


class Bench:
    """Batches of one size over one engine."""

    def __init__(self, backend: FilledBackend, options: argparse.Namespace, batch: int):
        self.backend, self.options, self.batch = backend, options, batch
        passes = backend.passes
        assert isinstance(passes, ForcedPasses)
        self.passes = passes

    def capture(self) -> None:
        """Every number of columns once."""
        self.passes.force([[0] * TRACE_CYCLES])
        num_columns = 1
        while num_columns < self.options.block_size:
            self.run_round("ar" if num_columns == 1 else num_columns, num_cycles=0)
            num_columns *= 2
        self.run_round(self.options.block_size, num_cycles=0)

    def measure(self, block_size: BlockSize) -> Speed:
        """One row of the table."""
        decoder = self._decoder(block_size)
        for _ in range(self.options.auto_rounds if block_size == "auto" else 0):
            self.run_round(block_size, num_cycles=self.options.cycles, decoder=decoder)
        return self.run_round(block_size, num_cycles=self.options.cycles, decoder=decoder)

    def run_round(self, block_size: BlockSize, *, num_cycles: int, decoder: Decoder | None = None) -> Speed:
        """New rows, first cycles, and so many in the clock."""
        decoder = self._decoder(block_size) if decoder is None else decoder
        rows = [decoder.admit(r).row for r in self._requests(block_size != "ar")]
        for _ in range(WARM_CYCLES):
            decoder.step()
        self.passes.rewind()
        num_captured = len(self.backend.graphs.captured)
        on_device(self.backend.device)
        num_tokens = num_drafted = 0
        begun = time.perf_counter()
        for _ in range(num_cycles):
            for record in decoder.step():
                num_tokens += len(record.token_ids)
                num_drafted += record.num_drafted
        on_device(self.backend.device)
        seconds = time.perf_counter() - begun
        assert not num_cycles or len(self.backend.graphs.captured) == num_captured, (
            "a graph was captured in the clock: rows grew into tables of another size, choose another --context"
        )
        for row in rows:
            decoder.release(row)
        num_steps = max(num_cycles, 1)
        of_row = num_steps * self.batch
        return Speed(num_tokens / seconds, seconds / num_steps * 1e3, num_tokens / of_row, num_drafted / of_row)

    def _decoder(self, block_size: BlockSize) -> Decoder:
        return Decoder(self.backend, block_size=None if block_size == "ar" else block_size)

    def _requests(self, drafting: bool) -> list[Request]:
        options, vocab = self.options, MODELS[self.options.model].vocab
        rng = random.Random(0)
        stopping = Stopping(max_new_tokens=num_new(options))
        return [
            Request(
                prompt_ids=[rng.randrange(vocab - 1) for _ in range(options.context)],
                stopping=stopping,
                drafting=drafting,
            )
            for _ in range(self.batch)
        ]


def num_new(options: argparse.Namespace) -> int:
    """More tokens than a round can write."""
    return (WARM_CYCLES + options.cycles + 2) * options.block_size


def parse() -> argparse.Namespace:
    """The command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens-per-cycle", type=float, nargs="+", default=[12.7, 8.5, 3.7])
    parser.add_argument("--width", type=int, nargs="+", default=[2, 4, 6, 8, 12, 16, 24, 32], help="block sizes")
    parser.add_argument("--block-size", type=int, default=32, help="trained")
    parser.add_argument("--cycles", type=int, default=PERIOD, help=f"in the clock, a multiple of {PERIOD}")
    parser.add_argument("--auto-rounds", type=int, default=4, help="rounds in which auto learns before it is timed")
    parser.add_argument(
        "--limit", type=float, default=150.0, metavar="SECONDS", help="nothing is begun later than this"
    )
    parser.add_argument("--draft-precision", choices=DRAFT_PRECISIONS, help="drafts read copies of the weights")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.cycles % PERIOD or options.cycles < 1:
        parser.error(f"--cycles must be a multiple of {PERIOD}, got {options.cycles}")
    if max(options.batch) > TRACE_ROWS:
        parser.error(f"--batch: at most {TRACE_ROWS} rows have traces of their own, got {max(options.batch)}")
    if not all(2 <= width <= options.block_size for width in options.width):
        parser.error(f"--width must be 2 .. {options.block_size}, got {options.width}")
    return options


def make_backend(model: nn.Module, options: argparse.Namespace) -> FilledBackend:
    """Pages for the largest batch, filled with noise."""
    num_pages = max(options.batch) * ((options.context + num_new(options)) // 64 + 1)
    backend = FilledBackend(
        model, num_pages=num_pages, draft_precision=options.draft_precision, make_passes=ForcedPasses
    )
    backend.passes.keys_LPSGH.normal_()
    backend.passes.values_LPSGH.normal_()
    return backend


def main() -> None:
    """Print tables as they are measured, and as the last line the records."""
    begun = time.perf_counter()
    options = parse()
    device = torch.device(options.device)
    origin = here_and_now(device)
    backend = make_backend(random_model(options.model, device, options.block_size), options)
    print(f"{origin.hardware}, {options.model}, {options.context} tokens of context", flush=True)
    records: list[ResultRecord] = []
    ways: list[BlockSize] = [*options.width, "auto"]
    for batch in options.batch:
        if time.perf_counter() - begun > options.limit:
            print(f"batch {batch}: not measured, --limit {options.limit:g} s is over")
            continue
        bench = Bench(backend, options, batch)
        bench.capture()
        plain = bench.measure("ar")
        records += records_of(origin, options, batch, None, "ar", plain, plain)
        show_head(batch, plain, ways)
        for tokens_per_cycle in options.tokens_per_cycle:
            bench.passes.force([row_trace(tokens_per_cycle, options.block_size, r) for r in range(TRACE_ROWS)])
            backend.setting = (batch, tokens_per_cycle)
            found: dict[BlockSize, Speed] = {}
            for way in ways:
                if time.perf_counter() - begun < options.limit:
                    found[way] = bench.measure(way)
                    records += records_of(origin, options, batch, tokens_per_cycle, way, found[way], plain)
            show(tokens_per_cycle, found, ways, plain)
    print(f"{time.perf_counter() - begun:.0f} s in all", file=sys.stderr)
    print(to_json(records) if device.type != "cpu" else json.dumps({"records": len(records)}))


def records_of(
    origin: Origin,
    options: argparse.Namespace,
    batch: int,
    forced: float | None,
    way: BlockSize,
    speed: Speed,
    plain: Speed,
) -> list[ResultRecord]:
    """One row of the table."""
    drafting = way != "ar"
    params = dict(
        model=options.model, context=options.context, batch=batch, block_size=way if drafting else None,
        drafting=drafting, backend="engine", dtype="bfloat16", draft_precision=options.draft_precision,
        forced_tokens_per_cycle=forced, timed_cycles=options.cycles,
    )  # fmt: skip
    values = [("tokens_per_second", speed.tokens_per_second, "tokens/s")]
    values.append(("cycle_ms" if drafting else "ar_step_ms", speed.cycle_ms, "ms"))
    if drafting:
        params["mean_drafts"] = speed.num_drafts
        values.append(("tokens_per_cycle", speed.tokens_per_cycle, "tokens"))
        values.append(("speedup_total", speed.tokens_per_second / plain.tokens_per_second, "ratio"))
    return [
        ResultRecord.of(
            origin, name=name, value=value, unit=unit,
            params=params | ({"reference": "ar"} if name == "speedup_total" else {}),
        )
        for name, value, unit in values
    ]  # fmt: skip


def show_head(batch: int, plain: Speed, ways: Sequence[BlockSize]) -> None:
    """What a batch's table begins with."""
    print(f"\nbatch {batch}: plain decoding {plain.tokens_per_second:.1f} tokens/s, {plain.cycle_ms:.3f} ms a step")
    print(f"{'N':>5} {'block size':>10}" + "".join(f"{way:>9}" for way in ways) + f"{'auto / best':>13}", flush=True)


def show(forced: float, found: dict[BlockSize, Speed], ways: Sequence[BlockSize], plain: Speed) -> None:
    """All widths at one N; a dash for what was not measured."""
    lines = {
        "tokens/s": ("9.0f", lambda speed: speed.tokens_per_second),
        "x plain": ("9.2f", lambda speed: speed.tokens_per_second / plain.tokens_per_second),
        "cycle ms": ("9.2f", lambda speed: speed.cycle_ms),
        "kept + 1": ("9.2f", lambda speed: speed.tokens_per_cycle),
        "drafts": ("9.1f", lambda speed: speed.num_drafts),
    }
    for name, (form, of) in lines.items():
        cells = "".join(f"{of(found[way]):{form}}" if way in found else f"{'-':>9}" for way in ways)
        print(f"{forced:5} {name:>10}{cells}{auto_against_best(found) if name == 'tokens/s' else ''}")
    sys.stdout.flush()


def auto_against_best(found: dict[BlockSize, Speed]) -> str:
    """Speed of auto / of the fastest fixed width, and which that is; nothing where some were not measured."""
    fixed = {way: speed.tokens_per_second for way, speed in found.items() if way != "auto"}
    if "auto" not in found or not fixed:
        return ""
    best = max(fixed, key=lambda way: fixed[way])
    return f"{found['auto'].tokens_per_second / fixed[best]:8.3f} ({best})"


if __name__ == "__main__":
    main()
