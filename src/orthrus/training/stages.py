"""The stages that make the bundled model from a recipe and a tokenised corpus: base, unlikelihood, rollouts, view.

Each stage reads what the one before wrote into the run's folder, so they can run in one process or in three:

    OUT/tokens/ NAME.npy uint16, the tokenised corpus
    OUT/base/   the AR view alone, with the tokenizer: a stock base; provenance.json
    OUT/rollouts/ RANK.safetensors   ids int16 [rows, T], first and last int64 [rows]
    OUT/view/   a view file on OUT/base (`orthrus generate --model OUT/view`); provenance.json
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from orthrus.datagen.regenerate import OwnRows, RolloutStage, rollouts, training_rows
from orthrus.model.checkpoint import load_model
from orthrus.model.export import save_view, whole_folder, write_tensors
from orthrus.model.modeling import OrthrusLM
from orthrus.training.provenance import provenance, write_provenance
from orthrus.training.ranks import num_ranks, once, rank
from orthrus.training.recipe import Recipe
from orthrus.training.shards import end_of_text_id, load_shards, load_tokenizer
from orthrus.training.trainer import Log, Saver, base_parameters, held_out_loss, new_base, train_base, train_view
from orthrus.training.unlikelihood import train_unlikelihood


def load_tokens(corpus: Path, name: str, out: Path) -> np.ndarray:
    """The token stream (uint16) of a corpus folder's `name` shards, read once and kept in OUT/tokens.

    Raises `ValueError` when the folder holds no such shards.
    """
    cached = out / "tokens" / f"{name}.npy"
    once(lambda: None if cached.is_file() else cache_tokens(corpus, name, cached))
    return np.load(cached)


def cache_tokens(corpus: Path, name: str, cached: Path) -> None:
    """Decompress a corpus folder's `name` shards into one array file."""
    shards = sorted(corpus.glob(f"{name}_*.xz"))
    if not shards:
        raise ValueError(f"{corpus} holds no {name}_*.xz; make it with `python -m orthrus.training.corpus`")
    loaded = load_shards(shards, tokenizer_folder=corpus / "tokenizer")
    cached.parent.mkdir(parents=True, exist_ok=True)
    np.save(cached, loaded.tokens)


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
    num_steps = train_base(model, tokens, recipe.base, seed=recipe.seed, log=Log(path=out / "base.jsonl"), saver=saver)
    facts = {
        "num_steps": num_steps,
        "train_tokens": len(tokens),
        "train_tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "loss_nats_per_token": corpus_losses(model, corpus, out),
    }
    once(lambda: write_provenance(folder, provenance(recipe, **facts)))
    return facts


def corpus_losses(model: OrthrusLM, corpus: Path, out: Path, num_tokens: int = 400_000) -> dict[str, float]:
    """Cross-entropy on the beginnings of the validation and the held-out stream, nats per token."""
    return {name: held_out_loss(model, load_tokens(corpus, name, out)[:num_tokens]) for name in ("val", "heldout")}


def run_unlikelihood(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Let OUT/base unlearn its loops, and write it again."""
    folder = out / "base"
    model = load_base(out, device)
    tokens, prompts = load_tokens(corpus, "train", out), prompt_stream(recipe.unlikelihood.rollouts, corpus, out)
    log = Log(path=out / "unlikelihood.jsonl")
    looping = train_unlikelihood(model, tokens, prompts, recipe.unlikelihood, seed=recipe.seed, log=log)
    before = json.loads((folder / "provenance.json").read_text())
    facts = {"loss_nats_per_token": corpus_losses(model, corpus, out), **looping}

    def write() -> None:
        save_base(model, folder, tokenizer=corpus / "tokenizer")
        write_provenance(folder, before | {"unlikelihood": facts})

    once(write)
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


def prompt_stream(stage: RolloutStage, corpus: Path, out: Path) -> np.ndarray:
    """The tokens that prompts are cut from: the stage's sources in equal shares, whatever their lengths."""
    streams = [load_tokens(corpus, name, out) for name in stage.sources]
    longest = max(len(stream) for stream in streams)
    # Shorter streams are repeated: prompts are cut at random places anyway.
    return np.concatenate([np.resize(stream, longest) for stream in streams])


def run_rollouts(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Let the base write the view's training rows: OUT/rollouts, one file a rank."""
    model = load_base(out, device)
    own, counts = rollouts(
        model, prompt_stream(recipe.rollouts, corpus, out), recipe.rollouts, seed=recipe.seed + rank()
    )
    folder = out / "rollouts"
    folder.mkdir(exist_ok=True)
    tensors = {name: getattr(own, name).cpu() for name in ("ids", "first", "last")}
    save_file(tensors, folder / f"{rank():02d}.safetensors")
    once(lambda: None)
    return counts


def own_rows(out: Path, device: torch.device) -> OwnRows:
    """This rank's share of the rollouts, whatever the number of ranks that wrote them."""
    files = sorted((out / "rollouts").glob("*.safetensors"))
    if not files:
        raise ValueError(f"{out} has no rollouts: run the stage before this one")
    parts = [load_file(path) for path in files]
    mine = {name: torch.cat([part[name] for part in parts])[rank() :: num_ranks()].to(device) for name in parts[0]}
    return OwnRows(**mine)


def run_view(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Train the view on the rollouts and write OUT/view, starting from OUT/view where it exists."""
    folder = out / "view"
    started = folder.is_dir()
    model = load_model(folder, dtype=torch.bfloat16).to(device) if started else load_base(out, device)
    saver = Saver(save=lambda: save_view(model, folder, base_id=str(out / "base"), force=True))
    own = own_rows(out, device)
    stage = recipe.view
    rows = training_rows(
        own, load_tokens(corpus, "train", out), rows_per_pass=stage.rows_per_pass, real_share=stage.real_share,
        block_size=model.config.block_size, seed=recipe.seed + rank(),
    )  # fmt: skip
    num_steps = train_view(model, rows, stage, seed=recipe.seed, log=Log(path=out / "view.jsonl"), saver=saver)
    facts = {"num_steps": num_steps, "num_ranks": num_ranks(), "rollout_rows_of_rank": len(own.ids)}
    once(lambda: write_provenance(folder, provenance(recipe, **facts)))
    return facts


STAGES = {"base": run_base, "unlikelihood": run_unlikelihood, "rollouts": run_rollouts, "view": run_view}
