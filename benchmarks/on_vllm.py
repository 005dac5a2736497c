"""Decoding by vLLM with this project's plugin, at exact Qwen3 shapes with random weights and forced acceptance.

    python benchmarks/on_vllm.py --model 8b --way ar --out ar.json          # vLLM's own decoding
    python benchmarks/on_vllm.py --model 8b --way 32 --out 32.json          # blocks of 32, whatever the batch
    python benchmarks/on_vllm.py --model 8b --way load --out load.json      # the block that suits the batch
    python benchmarks/on_vllm.py --table ar.json 32.json load.json          # one table of them (or of the engine's)

Each call is one engine of vLLM in a process of its own. Weights are vLLM's random ones ("dummy"). Drafts are computed
and verified as always, and how many are kept is drawn by vLLM ("synthetic" acceptance): each draft survives its
predecessors with the chance that makes N the wanted one at the trained block. Prompts are random tokens.

The clock runs from when every row has written some tokens to when the first row is done: all rows decode, no prompt is
read. `tokens_per_second` counts what arrived in that time; a cycle is an output of a row.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from benchmarks.cycle import survival
from benchmarks.gpu import MODELS

from orthrus.evaluation.records import Origin, ResultRecord, here_and_now, to_json
from orthrus.integrations.vllm import speculative_config
from orthrus.integrations.vllm.block_sizes import BY_ROWS

BLOCK_SIZE = 32
"""The trained one."""
WARM_TOKENS = 24
"""New tokens of each row that pass before the clock starts."""


class Worker:
    """What vLLM's worker process is asked for beside its own."""

    model_runner: Any

    def force(self, conditional_rates: Sequence[float]) -> None:
        """Keep drafts at these rates, each behind kept ones."""
        rates = self.model_runner.rejection_sampler.synthetic_conditional_rates
        rates.copy_(torch.tensor(conditional_rates[: len(rates)], dtype=rates.dtype))

    def runner(self) -> str:
        """Where its runner is from: V1 or V2."""
        return type(self.model_runner).__module__


class Speed(NamedTuple):
    """Of all rows together."""

    tokens_per_second: float
    cycle_ms: float
    tokens_per_cycle: float
    """Of a row."""


def write_config(folder: Path, shape: str) -> Path:
    """A checkpoint's config.json of this shape, without weights."""
    of = MODELS[shape]
    fields = dict(
        architectures=["OrthrusLM"], model_type="qwen3", vocab_size=of.vocab, hidden_size=of.hidden,
        intermediate_size=of.mlp, num_hidden_layers=of.layers, num_attention_heads=of.heads,
        num_key_value_heads=of.groups, head_dim=max(of.head_dim, 32), rms_norm_eps=1e-6, hidden_act="silu",
        max_position_embeddings=40_960, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=of.tied, attention_bias=False, dtype="bfloat16", block_size=BLOCK_SIZE,
        mask_token_id=of.vocab - 1, bos_token_id=None, eos_token_id=None, use_sliding_window=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def block_size_at(way: str, batch: int) -> int:
    """Positions of a row in a step of so many rows."""
    if way == "load":
        return BY_ROWS[max(rows for rows in BY_ROWS if rows <= batch)]
    return 1 if way == "ar" else int(way)


def make_engine(folder: Path, options: argparse.Namespace) -> Any:
    """vLLM's engine for one way of decoding, with a graph for every batch that is measured."""
    from vllm import LLM

    rows, speculation = max(options.batch), None
    if options.way != "ar":
        size = BY_ROWS if options.way == "load" else int(options.way)
        forced = {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [0.5**k for k in range(1, block_size_at(options.way, 1))],
        }
        speculation = speculative_config(folder, block_size=size, **forced)
    settings: dict[str, Any] = {}
    if not options.eager:
        sizes = sorted({batch * block_size_at(options.way, batch) for batch in options.batch})
        settings["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    return LLM(
        model=str(folder), speculative_config=speculation, load_format="dummy", skip_tokenizer_init=True,
        dtype="float32" if options.device == "cpu" else "bfloat16", 
        max_model_len=max_tokens(options, 32.0) + options.context,
        max_num_seqs=rows, max_num_batched_tokens=8192 + rows * BLOCK_SIZE, enable_prefix_caching=False,
        gpu_memory_utilization=options.memory, enforce_eager=options.eager, seed=0, disable_log_stats=True,
        worker_extension_cls="benchmarks.on_vllm.Worker", **settings,
    )  # fmt: skip


def max_tokens(options: argparse.Namespace, tokens_per_cycle: float) -> int:
    """New tokens of a row, so that it decodes about the wanted cycles."""
    return WARM_TOKENS + int(options.cycles * tokens_per_cycle)


def measure(llm: Any, options: argparse.Namespace, batch: int, num_new: int, name: str) -> Speed:
    """New rows of the same prompts, from where all decode to where the first is done."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, rng = llm.llm_engine, random.Random(0)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    names = [f"{name}-{row}" for row in range(batch)]
    for one in names:
        ids = [rng.randrange(MODELS[options.model].vocab - 1) for _ in range(options.context)]
        engine.add_request(one, {"prompt_token_ids": ids}, sampling)
    written, num_tokens, num_outputs, begun, now = dict.fromkeys(names, 0), 0, 0, None, 0.0
    is_done = False
    while not is_done:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            tokens = len(output.outputs[0].token_ids)
            written[output.request_id.split("|")[0]] += tokens
            if begun is not None and tokens:
                num_tokens, num_outputs = num_tokens + tokens, num_outputs + 1
            is_done |= output.finished
        if begun is None and min(written.values()) >= WARM_TOKENS:
            begun = now
    assert begun is not None and num_outputs, "a row was done before all had begun"
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    seconds = now - begun
    return Speed(num_tokens / seconds, seconds * batch / num_outputs * 1e3, num_tokens / num_outputs)


def parse() -> argparse.Namespace:
    """The command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--way", default="ar", help="ar, a block size, or load")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--tokens-per-cycle", type=float, nargs="+", default=[12.7, 8.5, 3.7])
    parser.add_argument("--cycles", type=int, default=60, help="of a row")
    parser.add_argument("--memory", type=float, default=0.85, help="vLLM's gpu_memory_utilization")
    parser.add_argument("--limit", type=float, default=400.0, metavar="SECONDS", help="nothing is begun later")
    parser.add_argument("--eager", action="store_true", help="without graphs and compiling")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="the records")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only print records that were written")
    options = parser.parse_args()
    if options.way not in ("ar", "load", *map(str, range(2, BLOCK_SIZE + 1))):
        parser.error(f"--way must be ar, load or a block size of 2 .. {BLOCK_SIZE}, got {options.way}")
    return options


def main() -> None:
    """Measure one way at every batch and N, or print what was measured."""
    begun, options = time.perf_counter(), parse()
    if options.table:
        show_table([record for file in options.table for record in json.loads(file.read_text())])
        return
    origin, records = here_and_now(torch.device(options.device)), []
    with TemporaryDirectory() as folder:
        llm = make_engine(write_config(Path(folder), options.model), options)
        (module,) = llm.collective_rpc("runner")
        runner = "V2" if module.endswith(".model_runner") else "V1"
        print(f"# {options.model}, {options.way}: {runner}, ready at {time.perf_counter() - begun:.0f} s", flush=True)
        for batch in options.batch:
            for forced in [None] if options.way == "ar" else options.tokens_per_cycle:
                if time.perf_counter() - begun > options.limit:
                    print(f"# batch {batch}, N {forced}: not measured, --limit is over")
                    continue
                speed = measure_at(llm, options, batch, forced)
                records += records_of(origin, options, runner, batch, forced, speed)
                if options.out is not None:
                    options.out.write_text(to_json(records, indent=1) + "\n")
    print(f"# {time.perf_counter() - begun:.0f} s in all", file=sys.stderr)


def measure_at(llm: Any, options: argparse.Namespace, batch: int, forced: float | None) -> Speed:
    """One batch at one N, printed."""
    written = 1.0
    if forced is not None:
        rate = survival(forced, BLOCK_SIZE)
        llm.collective_rpc("force", args=([rate] * (BLOCK_SIZE - 1),))
        written = tokens_per_cycle(forced, block_size_at(options.way, batch))
    # Rows whose prompts come first decode beside the others' prompts, and must not be done before those begin.
    num_new = max_tokens(options, max(written, 2.0))
    speed = measure(llm, options, batch, num_new, f"{batch}-{forced}")
    cells = f"{speed.tokens_per_second:8.0f} tokens/s {speed.cycle_ms:7.2f} ms {speed.tokens_per_cycle:5.2f}"
    print(f"{options.model} {options.way:>4} batch {batch:2} N {forced or 1:4} {cells}", flush=True)
    return speed


def tokens_per_cycle(forced: float, block_size: int) -> float:
    """What a block of this size writes where the trained one writes `forced`."""
    return sum(survival(forced, BLOCK_SIZE) ** k for k in range(block_size))


def records_of(
    origin: Origin, options: argparse.Namespace, runner: str, batch: int, forced: float | None, speed: Speed
) -> list[ResultRecord]:
    """What one batch at one N came to."""
    params = dict(
        model=options.model, context=options.context, batch=batch, way=options.way, backend="vllm", runner=runner,
        block_size=None if forced is None else block_size_at(options.way, batch), drafting=forced is not None,
        dtype="bfloat16", forced_tokens_per_cycle=forced, vllm=version("vllm"), graphs=not options.eager,
    )  # fmt: skip
    values = [("tokens_per_second", speed.tokens_per_second, "tokens/s")]
    values.append(("ar_step_ms" if forced is None else "cycle_ms", speed.cycle_ms, "ms"))
    if forced is not None:
        values.append(("tokens_per_cycle", speed.tokens_per_cycle, "tokens"))
    return [ResultRecord.of(origin, name=name, value=value, unit=unit, params=params) for name, value, unit in values]


def show_table(records: Sequence[dict[str, Any]]) -> None:
    """A line for each model, batch and N: tokens per second that each way's cycles are worth there, against plain
    decoding by the same program."""
    rates: dict[tuple[str, int, float | None], dict[str, float]] = {}
    for record in records:
        p, n = record["params"], record["params"]["forced_tokens_per_cycle"]
        way = p["way"] if p["backend"] == "vllm" else "ar" if n is None else str(p["block_size"])
        name = f"{p['backend']} {p.get('runner', '')} {way}".replace("  ", " ")
        if record["name"] == "ar_step_ms":
            rates.setdefault((p["model"], p["batch"], None), {})[name] = p["batch"] / record["value"] * 1e3
        elif record["name"] == "cycle_ms" and p["backend"] == "vllm":
            written = tokens_per_cycle(n, p["block_size"])
            rates.setdefault((p["model"], p["batch"], n), {})[name] = p["batch"] * written / record["value"] * 1e3
        elif record["name"] == "tokens_per_second" and p["backend"] != "vllm" and n is not None:
            rates.setdefault((p["model"], p["batch"], n), {})[name] = record["value"]
    ways = sorted({way for found in rates.values() for way in found})
    print("| model | batch | N | " + " | ".join(ways) + " |\n" + "|---" * (3 + len(ways)) + "|")
    for (model, batch, n), found in sorted(
        rates.items(), key=lambda item: (item[0][0], item[0][1], -(item[0][2] or 99))
    ):
        plain = rates.get((model, batch, None), {})
        cells = []
        for way in ways:
            base = plain.get(" ".join([*way.split()[:-1], "ar"]))
            ratio = f" ({found[way] / base:.2f})" if way in found and base and n is not None else ""
            cells.append(f"{found[way]:,.0f}{ratio}" if way in found else "")
        print(f"| {model} | {batch} | {n or 'plain'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
