"""The stages that make the bundled model from a recipe and a tokenised corpus: base, rollouts, view.

Each stage reads what the one before wrote into the run's folder, so they can run in one process or in three:

    OUT/tokens/ NAME.npy uint16, the tokenised corpus
    OUT/base/   config.json, model.safetensors (the AR view alone), provenance.json
    OUT/rollouts.safetensors   ids int16 [rows, T], first and last int64 [rows]
    OUT/view/   model.safetensors (`*_diff` alone), provenance.json
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from orthrus.config import OrthrusConfig
from orthrus.datagen.regenerate import OwnRows, rollouts, training_rows
from orthrus.model.modeling import OrthrusLM
from orthrus.training.provenance import provenance, write_provenance
from orthrus.training.recipe import Recipe
from orthrus.training.shards import VOCAB_SIZE, load_shards
from orthrus.training.trainer import Log, base_parameters, held_out_loss, new_base, train_base, train_view


def load_tokens(corpus: Path, name: str, out: Path) -> np.ndarray:
    """The token stream (uint16) of a corpus folder's `name` shards, tokenised once and kept in OUT/tokens.

    Raises `ValueError` when the folder holds no such shards.
    """
    cached = out / "tokens" / f"{name}.npy"
    if not cached.is_file():
        shards = sorted(corpus.glob(f"{name}_*.xz"))
        if not shards:
            raise ValueError(f"{corpus} holds no {name}_*.xz; make it with `python -m orthrus.training.corpus`")
        loaded = load_shards(shards, tokenizer_folder=corpus / "tokenizer", num_workers=os.cpu_count() or 1)
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.save(cached, loaded.tokens)
    return np.load(cached)


def run_base(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Pretrain the base and write OUT/base."""
    folder = out / "base"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = load_tokens(corpus, "train", out)
    model = new_base(recipe.shape, seed=recipe.seed, eos_token_id=VOCAB_SIZE - 1, mask_token_id=VOCAB_SIZE).to(device)
    num_steps = train_base(model, tokens, recipe.base, seed=recipe.seed, log=Log(path=out / "base.jsonl"))
    losses = {name: held_out_loss(model, load_tokens(corpus, name, out)[:400_000]) for name in ("val", "heldout")}
    save_file(
        {name: p.detach().contiguous() for name, p in base_parameters(model).items()}, folder / "model.safetensors"
    )
    model.config.save_pretrained(folder)
    facts = {
        "num_steps": num_steps,
        "train_tokens": len(tokens),
        "train_tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "loss_nats_per_token": losses,
    }
    write_provenance(folder, provenance(recipe, **facts))
    return facts


def load_base(out: Path, device: torch.device) -> OrthrusLM:
    """The base of OUT/base in bf16, its view a copy of its AR projections."""
    config = OrthrusConfig.from_pretrained(out / "base")
    model = OrthrusLM(config).to(torch.bfloat16)
    missing = model.load_state_dict(load_file(out / "base" / "model.safetensors"), strict=False).missing_keys
    assert all("_diff." in name or name == "lm_head.weight" for name in missing), missing
    model.tie_weights()
    model.init_view()
    return model.to(device).eval()


def run_rollouts(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Let the base write the view's training rows: OUT/rollouts.safetensors."""
    model = load_base(out, device)
    # In equal shares, whatever their lengths: shorter streams are repeated, prompts are cut at random places anyway.
    streams = [load_tokens(corpus, name, out) for name in recipe.rollouts.sources]
    longest = max(len(stream) for stream in streams)
    prompts = np.concatenate([np.resize(stream, longest) for stream in streams])
    own, counts = rollouts(model, prompts, recipe.rollouts, seed=recipe.seed)
    save_file({name: getattr(own, name).cpu() for name in ("ids", "first", "last")}, out / "rollouts.safetensors")
    return counts


def run_view(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Train the view on the rollouts and write OUT/view, starting from OUT/view where it exists."""
    model = load_base(out, device)
    folder = out / "view"
    if (folder / "model.safetensors").is_file():
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    folder.mkdir(parents=True, exist_ok=True)
    own = OwnRows(**load_file(out / "rollouts.safetensors", device=str(device)))
    stage = recipe.view
    rows = training_rows(
        own, load_tokens(corpus, "train", out), rows_per_pass=stage.rows_per_pass, real_share=stage.real_share,
        block_size=model.config.block_size, seed=recipe.seed,
    )  # fmt: skip
    num_steps = train_view(model, rows, stage, seed=recipe.seed, log=Log(path=out / "view.jsonl"))
    save_file(
        {name: p.detach().contiguous() for name, p in model.view_parameters().items()}, folder / "model.safetensors"
    )
    facts = {"num_steps": num_steps, "rollout_rows": len(own.ids)}
    write_provenance(folder, provenance(recipe, **facts))
    return facts


STAGES = {"base": run_base, "rollouts": run_rollouts, "view": run_view}
