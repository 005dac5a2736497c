"""The stages that make the bundled model from a recipe and a tokenised corpus: base, unlikelihood, sharpen, counting,
rollouts, view.

Each stage reads what the one before wrote into the run's folder, so they can run in one process or in six:

    OUT/tokens/ NAME-DIGEST.npy uint16, the tokenised corpus
    OUT/base/   the AR view alone, with the tokenizer: a stock base; provenance.json
    OUT/rollouts/ RANK.safetensors   ids int16 [rows, T], first and end int64 [rows]
    OUT/view/   a view file on OUT/base (`orthrus generate --model OUT/view`); provenance.json
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from orthrus.datagen.regenerate import OwnRows, RolloutStage, rollouts
from orthrus.model.checkpoint import load_model
from orthrus.model.export import save_view, whole_folder, write_tensors
from orthrus.model.modeling import OrthrusLM
from orthrus.model.tensors import fingerprint
from orthrus.training.provenance import provenance, write_provenance
from orthrus.training.ranks import num_ranks, once, rank
from orthrus.training.recipe import Recipe, UnlikelihoodStage
from orthrus.training.rows import training_rows
from orthrus.training.shards import end_of_text_id, load_shards, load_tokenizer
from orthrus.training.trainer import Log, Saver, base_parameters, held_out_loss, new_base, train_base, train_view
from orthrus.training.unlikelihood import digit_kinds, train_unlikelihood


def load_tokens(corpus: Path, name: str, out: Path) -> np.ndarray:
    """The token stream (uint16) of a corpus folder's `name` shards, decompressed once and kept in OUT/tokens.

    Raises `ValueError` when the folder holds no such shards.
    """
    shards = sorted(corpus.glob(f"{name}_*.xz"))
    if not shards:
        raise ValueError(f"{corpus} holds no {name}_*.xz; make it with `python -m orthrus.training.corpus`")
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in shards)).hexdigest()
    kept = out / "tokens" / f"{name}-{digest[:12]}.npy"
    once(lambda: None if kept.is_file() else keep_tokens(shards, corpus / "tokenizer", kept))
    return np.load(kept)


def keep_tokens(shards: list[Path], tokenizer: Path, path: Path) -> None:
    """Decompress shards into one array file, which appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".part.npy")
    np.save(staging, load_shards(shards, tokenizer_folder=tokenizer).tokens)
    staging.rename(path)


def corpus_losses(model: OrthrusLM, corpus: Path, out: Path, num_tokens: int = 400_000) -> dict[str, float]:
    """Cross-entropy on the beginnings of the validation and the held-out stream, nats per token."""
    return {name: held_out_loss(model, load_tokens(corpus, name, out)[:num_tokens]) for name in ("val", "heldout")}


def run_base(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Pretrain the base and write OUT/base."""
    tokens = load_tokens(corpus, "train", out)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    model = new_base(
        recipe.shape,
        seed=recipe.seed,
        eos_token_id=end_of_text_id(tokenizer),
        mask_token_id=mask_id(corpus / "tokenizer"),
    ).to(device)
    facts: dict = {
        "train_tokens": len(tokens),
        "train_tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    saver = Saver(save=lambda: save_base(model, out / "base", corpus / "tokenizer", provenance(recipe, **facts)))
    log = Log(stage="base", path=out / "base.jsonl")
    facts["num_steps"] = train_base(model, tokens, recipe.base, seed=recipe.seed, log=log, saver=saver)
    facts["loss_nats_per_token"] = corpus_losses(model, corpus, out)
    once(saver.save)
    return facts


def save_base(model: OrthrusLM, folder: Path, tokenizer: Path, facts: dict) -> None:
    """Write the AR view as a stock Qwen3 checkpoint with its tokenizer and provenance, all or nothing."""
    fields = model.config.to_dict()
    for name in ("model_type", "block_size", "mask_token_id"):
        del fields[name]
    with whole_folder(folder, force=True) as staging:
        write_tensors({name: p.detach() for name, p in base_parameters(model).items()}, staging)
        Qwen3Config(**fields | {"architectures": ["Qwen3ForCausalLM"]}).save_pretrained(staging)
        shutil.copytree(tokenizer, staging, dirs_exist_ok=True)
        write_provenance(staging, facts)


def load_base(recipe: Recipe, out: Path, device: torch.device) -> OrthrusLM:
    """The base of OUT/base in bf16, its view a copy of its AR projections."""
    return load_model(
        out / "base",
        dtype=torch.bfloat16,
        start_view=True,
        block_size=recipe.shape.block_size,
        mask_token_id=mask_id(out / "base"),
    ).to(device)


def mask_id(tokenizer_folder: Path) -> int:
    """As in the released checkpoints: the first row of the padded embedding that no token uses."""
    return load_tokenizer(tokenizer_folder).get_vocab_size()


def run_unlikelihood(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Let OUT/base unlearn its loops, and write it again (`learn_from_itself`)."""
    return learn_from_itself("unlikelihood", recipe.unlikelihood, recipe, corpus, out, device)


def run_sharpen(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Make OUT/base surer of what it prefers, and write it again (`learn_from_itself`).

    The same training at a sampling temperature well below 1. A view must meet its base's choice exactly, near-ties
    included; a base that has fewer of them is easier to draft for (docs/experiments.md, 2026-11-25).
    """
    return learn_from_itself("sharpen", recipe.sharpen, recipe, corpus, out, device)


def run_counting(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Let OUT/base unlearn counting up ("axis7 : int7", "axis8 : int8"), and write it again (`learn_from_itself`).

    What a base does that has unlearnt its loops and become sure of itself, with `digits_alike`.
    """
    return learn_from_itself("counting", recipe.counting, recipe, corpus, out, device)


def learn_from_itself(
    name: str, stage: UnlikelihoodStage, recipe: Recipe, corpus: Path, out: Path, device: torch.device
) -> dict:
    """Train OUT/base on what it writes (`training/unlikelihood.py`), and write it again.

    Raises `ValueError` when it has been through this stage before: its provenance would no longer tell the truth.
    """
    if stage.num_rounds == 0:
        return {}
    before = json.loads((out / "base" / "provenance.json").read_text())
    if name in before:
        raise ValueError(f"{out / 'base'} has been through the {name} stage: train the base again first")
    model = load_base(recipe, out, device)
    tokens, prompts = load_tokens(corpus, "train", out), prompt_stream(stage.rollouts, corpus, out)
    # Another seed for each stage, or the second would see the prompts of the first again.
    seed = recipe.seed + 1_000_000 * list(STAGES).index(name)
    log = Log(stage=name, path=out / f"{name}.jsonl")
    kinds_V = digit_kinds(token_texts(corpus / "tokenizer", model.config.vocab_size)) if stage.digits_alike else None
    looping = train_unlikelihood(model, tokens, prompts, stage, kinds_V=kinds_V, seed=seed, log=log)
    facts = {"loss_nats_per_token": corpus_losses(model, corpus, out), **looping}
    after = before | {name: facts | {"recipe_digest": recipe.digest()}}
    once(lambda: save_base(model, out / "base", corpus / "tokenizer", after))
    return facts


def token_texts(tokenizer_folder: Path, vocab_size: int) -> list[str]:
    """The text of each token id; nothing for rows of the embedding that no token uses."""
    tokenizer = load_tokenizer(tokenizer_folder)
    return [tokenizer.decode([token]) for token in range(vocab_size)]


def prompt_stream(stage: RolloutStage, corpus: Path, out: Path) -> np.ndarray:
    """The tokens that prompts are cut from: the stage's sources in equal shares, whatever their lengths."""
    streams = [load_tokens(corpus, name, out) for name in stage.sources]
    longest = max(len(stream) for stream in streams)
    # Shorter streams are repeated: prompts are cut at random places anyway.
    return np.concatenate([np.resize(stream, longest) for stream in streams])


def run_rollouts(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Let the base write the view's training rows: OUT/rollouts, one file a rank."""
    model, folder = load_base(recipe, out, device), out / "rollouts"
    prompts = prompt_stream(recipe.rollouts, corpus, out)
    own, counts = rollouts(model, prompts, recipe.rollouts, seed=recipe.seed + rank())
    once(lambda: empty(folder))
    tensors = {name: getattr(own, name).cpu() for name in ("ids", "first", "end")}
    save_file(tensors, folder / f"{rank():02d}.safetensors", metadata={"base": fingerprint(out / "base")})
    once(lambda: None)
    return counts


def empty(folder: Path) -> None:
    """Make the folder anew: rollouts of an earlier base must not stay among the new ones."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def own_rows(out: Path, device: torch.device) -> OwnRows:
    """This rank's share of the rollouts, whatever the number of ranks that wrote them.

    Raises `ValueError` where there are none, or another base wrote them.
    """
    files = sorted((out / "rollouts").glob("*.safetensors"))
    if not files:
        raise ValueError(f"{out} has no rollouts: run the stage before this one")
    for path in files:
        with safe_open(path, framework="pt") as file:
            if file.metadata().get("base") != fingerprint(out / "base"):
                raise ValueError(f"{path} was written by another base than {out / 'base'}: run the rollouts again")
            if set(file.keys()) != {"ids", "first", "end"}:
                raise ValueError(f"{path} is not of this version: run the rollouts again")
    parts = [load_file(path) for path in files]
    mine = {name: torch.cat([part[name] for part in parts])[rank() :: num_ranks()].to(device) for name in parts[0]}
    return OwnRows(**mine)


def run_view(recipe: Recipe, corpus: Path, out: Path, device: torch.device) -> dict:
    """Train the view on the rollouts, from a copy of the base's projections, and write OUT/view."""
    model, own, stage = load_base(recipe, out, device), own_rows(out, device), recipe.view
    rows = training_rows(
        own, load_tokens(corpus, "train", out), rows_per_pass=stage.rows_per_pass, real_share=stage.real_share,
        seed=recipe.seed + rank(),
    )  # fmt: skip
    # Relative to the view file, so that the run's folder can be moved.
    saver = Saver(save=lambda: save_view(model, out / "view", base_id="../base", force=True))
    log = Log(stage="view", path=out / "view.jsonl")
    num_steps = train_view(model, rows, stage, seed=recipe.seed, log=log, saver=saver)
    facts = {"num_steps": num_steps, "num_ranks": num_ranks(), "rollout_rows_of_rank": len(own.ids)}
    once(lambda: write_provenance(out / "view", provenance(recipe, **facts)))
    return facts


STAGES = {
    "base": run_base,
    "unlikelihood": run_unlikelihood,
    "sharpen": run_sharpen,
    "counting": run_counting,
    "rollouts": run_rollouts,
    "view": run_view,
}
