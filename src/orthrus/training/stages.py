"""The stages that make the bundled model from a recipe and a tokenised corpus: base, rollouts, view.

Each stage reads what the one before wrote into the run's folder, so they can run in one process or in three:

    OUT/tokens/ NAME.npy uint16, the tokenised corpus
    OUT/base/   the AR view alone, with the tokenizer: a stock base; provenance.json
    OUT/rollouts.safetensors   ids int16 [rows, T], first and last int64 [rows]
    OUT/view/   a view file on OUT/base (`orthrus generate --model OUT/view`); provenance.json
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from orthrus.datagen.regenerate import OwnRows, rollouts, training_rows
from orthrus.model.checkpoint import load_model
from orthrus.model.export import save_view, whole_folder, write_tensors
from orthrus.model.modeling import OrthrusLM
from orthrus.training.provenance import provenance, write_provenance
from orthrus.training.recipe import Recipe
from orthrus.training.shards import end_of_text_id, load_shards, load_tokenizer
from orthrus.training.trainer import Log, Saver, base_parameters, held_out_loss, new_base, train_base, train_view


def load_tokens(corpus: Path, name: str, out: Path) -> np.ndarray:
    """The token stream (uint16) of a corpus folder's `name` shards, read once and kept in OUT/tokens.

    Raises `ValueError` when the folder holds no such shards.
    """
    cached = out / "tokens" / f"{name}.npy"
    if not cached.is_file():
        shards = sorted(corpus.glob(f"{name}_*.xz"))
        if not shards:
            raise ValueError(f"{corpus} holds no {name}_*.xz; make it with `python -m orthrus.training.corpus`")
        loaded = load_shards(shards, tokenizer_folder=corpus / "tokenizer")
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.save(cached, loaded.tokens)
    return np.load(cached)


def run_base(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Pretrain the base and write OUT/base."""
    folder = out / "base"
    tokens = load_tokens(corpus, "train", out)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    model = new_base(
        recipe.shape,
        seed=recipe.seed,
        eos_token_id=end_of_text_id(tokenizer),
        # As in the released checkpoints: the first row of the padded embedding that no token uses.
        mask_token_id=tokenizer.get_vocab_size(),
    ).to(device)
    saver = Saver(save=lambda: save_base(model, folder, tokenizer=corpus / "tokenizer"))
    log = Log(path=out / "base.jsonl")
    num_steps = train_base(model, tokens, recipe.base, seed=recipe.seed, log=log, saver=saver)
    losses = {name: held_out_loss(model, load_tokens(corpus, name, out)[:400_000]) for name in ("val", "heldout")}
    facts = {
        "num_steps": num_steps,
        "train_tokens": len(tokens),
        "train_tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "loss_nats_per_token": losses,
    }
    write_provenance(folder, provenance(recipe, **facts))
    return facts


def save_base(model: OrthrusLM, folder: Path, *, tokenizer: Path) -> None:
    """Write the AR view with its tokenizer, all or nothing."""
    with whole_folder(folder, force=True) as staging:
        write_tensors({name: p.detach() for name, p in base_parameters(model).items()}, staging)
        model.config.save_pretrained(staging)
        shutil.copytree(tokenizer, staging, dirs_exist_ok=True)


def load_base(out: Path, device: torch.device) -> OrthrusLM:
    """The base of OUT/base in bf16, its view a copy of its AR projections."""
    return load_model(out / "base", dtype=torch.bfloat16, start_view=True).to(device)


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
    folder = out / "view"
    started = folder.is_dir()
    model = load_model(folder, dtype=torch.bfloat16).to(device) if started else load_base(out, device)
    saver = Saver(save=lambda: save_view(model, folder, base_id=str(out / "base"), force=True))
    own = OwnRows(**load_file(out / "rollouts.safetensors", device=str(device)))
    stage = recipe.view
    rows = training_rows(
        own, load_tokens(corpus, "train", out), rows_per_pass=stage.rows_per_pass, real_share=stage.real_share,
        block_size=model.config.block_size, seed=recipe.seed,
    )  # fmt: skip
    num_steps = train_view(model, rows, stage, seed=recipe.seed, log=Log(path=out / "view.jsonl"), saver=saver)
    facts = {"num_steps": num_steps, "rollout_rows": len(own.ids)}
    write_provenance(folder, provenance(recipe, **facts))
    return facts


STAGES = {"base": run_base, "rollouts": run_rollouts, "view": run_view}
