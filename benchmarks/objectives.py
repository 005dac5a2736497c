"""Which objective drafts best? Views of one base trained alike but for the objective, three seeds each.

    python benchmarks/objectives.py --run RUN --steps 400                  # RUN: base and rollouts of `orthrus train`
    python benchmarks/objectives.py --run RUN --only kl --only ce --out kl-ce.json
    python benchmarks/objectives.py --report kl-ce.json --report others.json     # runs of several processes together

Each view starts as a copy of the base's projections and sees the same rows, blocks and anchors as the others of its
seed, for the same number of steps. What counts is N of greedy decoding of held-out prompts at the end, not the loss.
The interval is a 95 % bootstrap over prompts (all seeds of a drawn prompt together); the difference to the published
objective is paired by prompt and seed.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from orthrus.decoding.batch import draft_greedily
from orthrus.evaluation.records import Origin, ResultRecord, here_and_now, read_records, to_json
from orthrus.evaluation.suites import heldout_python_prompts
from orthrus.model.checkpoint import load_model, load_tokenizer
from orthrus.model.modeling import OrthrusLM
from orthrus.training.loss import Objective
from orthrus.training.recipe import ViewStage
from orthrus.training.rows import training_rows
from orthrus.training.stages import mask_id, own_rows
from orthrus.training.trainer import Log, Saver, train_view

OBJECTIVES = {
    "kl": Objective(),
    "ce": Objective(kind="ce"),
    "tv": Objective(kind="tv"),
    "kl_sharp": Objective(temperature=0.5),
    "kl_decay": Objective(decay=12.0),
    "kl_focus": Objective(focus=0.75),
    "kl_bundled": Objective(temperature=0.5, decay=12.0, focus=0.75),
}
"""The first is the published one, which the others are compared with."""

Counts = list[tuple[int, int]]
"""(accepted drafts, cycles) of each prompt."""


def decode(model: OrthrusLM, prompts: list[list[int]], *, block_size: int, max_new_tokens: int) -> Counts:
    """All prompts, greedily."""
    eos = frozenset({model.config.eos_token_id})
    stats = draft_greedily(model, prompts, block_size=block_size, max_new_tokens=max_new_tokens, eos=eos)
    return [(one.num_accepted, one.num_cycles) for one in stats]


def tokens_per_cycle(counts: np.ndarray) -> float:
    """N over all given (accepted, cycles) pairs."""
    accepted, cycles = counts.reshape(-1, 2).sum(axis=0)
    return 1 + accepted / max(1, cycles)


def interval(found: np.ndarray, base: np.ndarray | None = None, *, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap over prompts of N, or of its difference to another objective's. Counts: [seeds, prompts, 2]."""
    generator = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        pick = generator.integers(found.shape[1], size=found.shape[1])
        value = tokens_per_cycle(found[:, pick])
        values.append(value if base is None else value - tokens_per_cycle(base[:, pick]))
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def main() -> None:
    """Train, decode and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--report", type=Path, action="append", help="train nothing, report what --out wrote")
    parser.add_argument("--only", choices=OBJECTIVES, action="append")
    parser.add_argument("--seed", type=int, action="append", help="several; 0, 1 and 2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows-per-step", type=int, default=64)
    parser.add_argument("--rows-per-pass", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="write the records of every run into this JSON file")
    options = parser.parse_args()
    if options.report:
        report(found_in([record for path in options.report for record in read_records(path)]))
        return
    if options.run is None:
        parser.error("--run or --report is needed")
    # Each objective is another graph of the loss.
    torch._dynamo.config.recompile_limit = 64
    device = torch.device(options.device)
    base = options.run / "base"
    model = load_model(
        base, dtype=torch.bfloat16, start_view=True, block_size=32, mask_token_id=mask_id(base)
    ).to(device)  # fmt: skip
    own, tokenizer = own_rows(options.run, device), load_tokenizer(base)
    no_corpus = np.zeros(own.ids.shape[1] + 2, dtype=np.uint16)
    prompts = [tokenizer(prompt.text).input_ids for prompt in heldout_python_prompts(options.num_prompts)]
    records: list[ResultRecord] = []
    origin = here_and_now(device)
    for name in options.only or OBJECTIVES:
        for seed in options.seed or (0, 1, 2):
            stage = ViewStage(
                rows_per_step=options.rows_per_step, rows_per_pass=options.rows_per_pass, num_steps=options.steps,
                learning_rate=options.learning_rate, cooldown_share=0.9, blocks=((32, 12), (16, 40), (8, 128)),
                objective=OBJECTIVES[name],
            )  # fmt: skip
            started = time.perf_counter()
            model.init_view()
            rows = training_rows(own, no_corpus, rows_per_pass=stage.rows_per_pass, real_share=0.0, seed=seed)
            log = Log(stage=f"{name}-{seed}", path=options.run / "objectives.jsonl", every=100)
            train_view(model, rows, stage, seed=seed, log=log, saver=Saver(save=lambda: None))
            counts = decode(model.eval(), prompts, block_size=32, max_new_tokens=options.max_new_tokens)
            records += records_of(options, name, seed, counts, origin)
            line = {"objective": name, "seed": seed, "n": tokens_per_cycle(np.array(counts))}
            print(json.dumps(line | {"seconds": round(time.perf_counter() - started, 1)}), flush=True)
            if options.out:
                options.out.write_text(to_json(records, indent=1) + "\n")
    report(found_in(records))


def records_of(options: argparse.Namespace, name: str, seed: int, counts: Counts, origin: Origin) -> list[ResultRecord]:
    """N of one run, and the counts of its prompts, from which intervals are made."""
    params = {
        "model": str(options.run), "objective": name, "seed": seed, "num_steps": options.steps,
        "rows_per_step": options.rows_per_step, "learning_rate": options.learning_rate, "dtype": "bfloat16",
        "exact": False, "backend": "portable", "block_size": 32, "suite": "heldout_python",
        "num_prompts": options.num_prompts, "max_new_tokens": options.max_new_tokens, "temperature": 0.0,
        "outputs": "all",
    }  # fmt: skip
    accepted, cycles = (list(column) for column in zip(*counts, strict=True))
    numbers = (
        ("tokens_per_cycle", tokens_per_cycle(np.array(counts)), "tokens"),
        ("num_accepted_per_output", accepted, "tokens"),
        ("num_cycles_per_output", cycles, "cycles"),
    )
    return [ResultRecord.of(origin, name=what, value=value, unit=unit, params=params) for what, value, unit in numbers]


def found_in(records: list[ResultRecord]) -> dict[str, list[Counts]]:
    """The counts of every run in records, by objective, the published one first."""
    columns: dict[tuple[str, int], dict[str, list[int]]] = {}
    for record in records:
        if isinstance(record.value, list):
            place = columns.setdefault((record.params["objective"], record.params["seed"]), {})
            place[record.name] = [int(value) for value in record.value]
    found: dict[str, list[Counts]] = {}
    for name, seed in sorted(columns, key=lambda place: (list(OBJECTIVES).index(place[0]), place[1])):
        one = columns[name, seed]
        counts = zip(one["num_accepted_per_output"], one["num_cycles_per_output"], strict=True)
        found.setdefault(name, []).append(list(counts))
    return found


def report(found: dict[str, list[Counts]]) -> None:
    """A line for each objective: N of each seed, N of all with its interval, the paired difference to the first."""
    arrays = {name: np.array(counts) for name, counts in found.items()}
    first = next(iter(arrays))
    for name, counts in arrays.items():
        seeds = " ".join(f"{tokens_per_cycle(one):.2f}" for one in counts)
        low, high = interval(counts)
        line = f"{name:12} seeds {seeds}  N {tokens_per_cycle(counts):.2f} [{low:.2f}, {high:.2f}]"
        if name != first and counts.shape == arrays[first].shape:
            low, high = interval(counts, arrays[first])
            line += f"  against {first} {tokens_per_cycle(counts) - tokens_per_cycle(arrays[first]):+.2f}"
            line += f" [{low:+.2f}, {high:+.2f}]"
        print(line)


if __name__ == "__main__":
    main()
