"""The files of a tiny view run: a random base, a text, a recipe."""

import json
import random
from pathlib import Path

from safetensors.torch import load_file

from tests.cli.tiny import write_base

RECIPE = """
kind: view
name: tiny
model: {base: BASE, dtype: float32, block_size: 8}
data: {source: TEXT, row_tokens: 48}
view: {blocks: [[8, 3], [4, 2]]}
train: {num_steps: 6, rows_per_step: 4, rows_per_pass: 1, learning_rate: 1.0e-3, save_steps: 2, log_steps: 1}
evaluation: {every: 3, held_out_documents: 3, num_prompts: 2, max_new_tokens: 10}
"""
STATES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "scheduler.json")


def write_files(folder: Path, **lines: str) -> Path:
    """Base, text and recipe in a folder; the recipe's path."""
    base = write_base(folder / "base")
    words = ["draft", "verify", "block", "anchor", "token", "view", "cache"]
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(words, k=chooser.randint(5, 40))) for _ in range(24)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = RECIPE.replace("BASE", str(base)).replace("TEXT", str(folder / "text.jsonl"))
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"


def same_states(one: Path, other: Path, *, step: int = 6) -> list[str]:
    """What differs between two runs' last checkpoints and views: file and tensor names."""
    wrong = []
    for name in STATES:
        a, b = (run / f"checkpoint-{step}" / name for run in (one, other))
        if name.endswith(".json"):
            wrong += [] if a.read_text() == b.read_text() else [name]
            continue
        x, y = load_file(a), load_file(b)
        assert x.keys() == y.keys(), name
        wrong += [f"{name}: {key}" for key in x if x[key].numpy().tobytes() != y[key].numpy().tobytes()]
    wrong += [] if (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes() else ["view"]
    return wrong
