"""A run of a view recipe: `orthrus train --config RECIPE --out OUT`, from the files to a view that drafts.

OUT/rows/            the packed training rows (data.py)
OUT/log.jsonl        a line for each report
OUT/checkpoint-N/    what a run is resumed from (checkpoints.py)
OUT/                 when the run is finished: the view file in the base's dtype, and provenance.json
"""

import dataclasses
import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from orthrus.config import OrthrusConfig
from orthrus.datagen.stop import Stop
from orthrus.environment import bundled_or
from orthrus.model.bases import check_base
from orthrus.model.checkpoint import (
    LoadedLM,
    build_config,
    expected_shapes,
    load_model,
    load_tokenizer,
    plan_load,
    read_checkpoint,
)
from orthrus.model.export import save_view, spare_token
from orthrus.model.hub import find_folder
from orthrus.model.modeling import OrthrusLM
from orthrus.model.tensors import read_json
from orthrus.training.acceptance import HeldOutPrompts
from orthrus.training.anchors import Blocks
from orthrus.training.budget import budget, report
from orthrus.training.checkpoints import clear_halves, describe, find_checkpoint, read_run
from orthrus.training.data import PackedDataset, collate, packed_dataset, wait_for
from orthrus.training.documents import unfinished_answers
from orthrus.training.inspect import inspect_row
from orthrus.training.prompts import prompts_of_file
from orthrus.training.provenance import provenance, write_provenance
from orthrus.training.ranks import from_all, num_ranks, once, rank
from orthrus.training.rows import Rows
from orthrus.training.sharding import whole
from orthrus.training.task import ViewTraining, draw_seed
from orthrus.training.view_recipe import BUNDLED_BASE, NOT_THE_RUN, ViewRecipe, passes_per_step, settings_of_run
from orthrus.training.view_trainer import (
    OrthrusTrainer,
    RowOrder,
    num_steps_of,
    say,
    training_arguments,
    world_size,
)

PROVENANCE = "provenance.json"

ROWS = "rows"
"""Folder of the packed rows in OUT."""


def train_view_recipe(recipe: ViewRecipe, out: Path, *, device: torch.device, resume: bool) -> dict[str, Any]:
    """Train a view, or go on training it; returns what the last line of the command says.

    Raises `ValueError` for what cannot be trained so, before anything is loaded where that can be known, and when the
    folder is another run's.
    """
    passes_per_step(recipe.train, world_size())
    check_place(recipe, device)
    check_folders(recipe, out)
    checkpoint = where_to_start(out, resume=resume)
    check_shared(out, checkpoint)
    quiet()
    check_context(recipe)
    tokenizer = load_tokenizer(base_source(recipe), revision=recipe.model.revision)
    config, sizes = plan_base(recipe, tokenizer)
    prompts = read_prompts(recipe, tokenizer, config)
    data = wait_for(out / ROWS / once(lambda: prepare(recipe, tokenizer, out)))
    num_steps = num_steps_of(recipe.train, len(data))
    RowOrder(len(data), recipe.train, seed=recipe.seed, num_steps=num_steps)  # refuses too few rows
    if recipe.evaluation.every and not prompts:
        prompts = held_out_prompts(recipe, data, config)
    args = training_arguments(recipe.train, out, seed=recipe.seed, num_steps=num_steps, device=device)
    model = load_base(recipe, sizes).to(args.device)
    facts = run_facts(recipe, data, model, num_steps=num_steps)
    if checkpoint is not None:
        check_same_run(read_run(checkpoint), facts, checkpoint)
    training = ViewTraining(
        model, recipe.view, isolated=data.isolated, gradient_checkpointing=recipe.train.gradient_checkpointing
    )
    held = HeldOutPrompts(prompts, recipe.evaluation, tokenizer=tokenizer) if recipe.evaluation.every else None
    with Stop("the step in work, then saving") as stop:
        trainer = OrthrusTrainer(
            training, args, settings=recipe.train, rows=data, collate=collate, run_facts=facts, stop=stop,
            callbacks=[held] if held else [],
        )  # fmt: skip
        if held:
            held.trainer = trainer
        before = base_digest(model)
        say(f"{data.describe()}; {num_steps} steps" + (f", going on from {checkpoint.name}" if checkpoint else ""))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return finish(recipe, trainer, out, facts=facts, base_before=before, held=held)


def finish(
    recipe: ViewRecipe,
    trainer: OrthrusTrainer,
    out: Path,
    *,
    facts: dict[str, Any],
    base_before: str,
    held: HeldOutPrompts | None,
) -> dict[str, Any]:
    """Prove that the base is what it was, write the view, upload it if asked to; what the command's last line says."""
    model, step = trainer.training.lm, trainer.state.global_step
    if base_digest(model) != base_before:
        raise RuntimeError("the frozen base's weights changed in training: nothing was written; this is a bug")
    if step < trainer.state.max_steps:
        say(f"stopped at step {step} and saved {out}/checkpoint-{step}; the same command with --resume goes on from it")
        return {"stopped_at_step": step, "num_steps": trainer.state.max_steps, "out": str(out)}
    result = {"num_steps": step, "num_skipped": trainer.num_skipped, "out": str(out)}
    if held:
        result |= {"n": [[at, round(n, 4)] for at, n in held.n]}
    dtype = getattr(torch, recipe.model.dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in trainer.view_tensors().items()}
    facts = facts | {"step": step, "base_digest_before_and_after": base_before, "result": result}
    once(lambda: write_view(model, out, tensors=tensors, facts=facts))
    if recipe.train.push_to_hub:
        once(lambda: push(recipe, out))
    return result


# --- before anything is loaded -----------------------------------------------------------------------------------


def check_place(recipe: ViewRecipe, device: torch.device) -> None:
    """`ValueError` for a device that Trainer would not use, or a logger that is not installed."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: views are trained on cuda or cpu")
    if world_size() == 1 and device.index not in (None, 0):
        raise ValueError(f"--device {device}: training takes the first GPU it sees; choose with CUDA_VISIBLE_DEVICES")
    for name in recipe.train.report_to:
        if find_spec(name) is None:
            raise ValueError(f"train.report_to: {name} is not installed here: pip install {name}")


def where_to_start(out: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, None for a new run; `ValueError` when the folder holds a run and this is a new one.

    --resume in a folder without a checkpoint starts the run: a job that is always started with it just works.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if is_finished(out):
        what = "a finished view" if (out / PROVENANCE).is_file() else "a checkpoint that no run of this kind wrote"
        raise ValueError(f"--out {out} holds {what}; name another folder")
    found = find_checkpoint(out)
    if found is not None and not resume:
        raise ValueError(f"--out {out} holds {found.name} of a run: add --resume to go on, or name another folder")
    return found


def check_shared(out: Path, checkpoint: Path | None) -> None:
    """`ValueError` when the ranks would go on from different checkpoints: nodes that do not share OUT."""
    found = from_all(describe(checkpoint))
    for number, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"--out {out} is not the same folder everywhere: rank 0 goes on from {found[0]}, rank {number} "
                f"from {other}; give all nodes one shared folder"
            )


def is_finished(out: Path) -> bool:
    """Whether a folder holds a finished view, not only what `--dry-run` leaves."""
    if not (out / "config.json").is_file():
        return False
    return not ((out / PROVENANCE).is_file() and read_json(out / PROVENANCE).get("dry_run"))


def check_folders(recipe: ViewRecipe, out: Path) -> None:
    """`ValueError` for a run among its own data: its log would be read as data when it is resumed."""
    source = Path(recipe.data.source).expanduser()
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--out {out} lies in data.source {source}, where its log would be data; name another folder")


def check_context(recipe: ViewRecipe) -> None:
    """`ValueError` for rows or blocks with positions that the base has not."""
    source = base_source(recipe)
    fields = read_json(find_folder(source, weights=False, revision=recipe.model.revision) / "config.json")
    context = fields.get("max_position_embeddings")
    if isinstance(context, int) and recipe.data.row_tokens > context:
        raise ValueError(f"data.row_tokens {recipe.data.row_tokens} is above the context of {source}, {context} tokens")


def plan_base(recipe: ViewRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[OrthrusConfig, dict[str, Any]]:
    """The configuration of base and view, and the sizes of a view that is started; none where the base brings one.

    Raises `ValueError` for a base that gets no view like this, as far as its files' headers tell: no weight is read.
    """
    settings, source = recipe.model, base_source(recipe)
    checkpoint = read_checkpoint(source, revision=settings.revision)
    if checkpoint.form == "view":
        raise ValueError(f"model.base: {source} is a view file, no base: name the base that it was trained on")
    check_base(checkpoint.config, where=source)
    sizes: dict[str, Any] = {}
    if checkpoint.form == "merged" and not settings.restart_view:
        raise ValueError(f"model.base: {source} has a view already; model.restart_view=true trains a new one")
    if checkpoint.form == "base":
        if settings.restart_view:
            raise ValueError(f"model.restart_view: {source} has no view to leave out")
        mask = settings.mask_token_id
        if mask is None:
            mask = spare_token(source, tokenizer, revision=settings.revision)
        sizes = {"block_size": settings.block_size, "mask_token_id": mask}
    config, _ = build_config(LoadedLM.config_class, checkpoint.config, where=source, **sizes)
    for name in ("block_size", "mask_token_id"):
        if getattr(settings, name) not in (None, getattr(config, name)):
            raise ValueError(f"model.{name}: {source} has {getattr(config, name)}, which stays as it is")
    plan_load(checkpoint.tensors, expected_shapes(LoadedLM, config), where=source, start_view=bool(sizes))
    return config, sizes


def longest_prompt(recipe: ViewRecipe, config: OrthrusConfig) -> int:
    """Tokens that a prompt of evaluation may have; `ValueError` when there is no room for one."""
    context, num_new = config.max_position_embeddings, recipe.evaluation.max_new_tokens
    if num_new >= context:
        raise ValueError(f"evaluation.max_new_tokens {num_new} leaves no room in the base's context, {context} tokens")
    return context - num_new


def read_prompts(recipe: ViewRecipe, tokenizer: PreTrainedTokenizerBase, config: OrthrusConfig) -> list[list[int]]:
    """The prompts of `evaluation.prompts`, none where it names no file or nobody looks."""
    evaluation = recipe.evaluation
    if not evaluation.every:
        return []
    longest = longest_prompt(recipe, config)
    if evaluation.prompts is None:
        return []
    return prompts_of_file(
        evaluation.prompts, tokenizer, evaluation.num_prompts, recipe.data.template_options, longest=longest
    )


def base_source(recipe: ViewRecipe) -> str:
    """Where the base lies."""
    return bundled_or(None) if recipe.model.base == BUNDLED_BASE else recipe.model.base


def quiet() -> None:
    """No loading bars and no library warnings between the lines of a run."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def prepare(recipe: ViewRecipe, tokenizer: PreTrainedTokenizerBase, out: Path) -> str:
    """What one process does for all: make sure that an upload will be possible, pack the rows. Their folder's name."""
    out.mkdir(parents=True, exist_ok=True)
    clear_halves(out)
    if recipe.train.hub_model_id is not None:  # before the data, which may take long
        reach_hub(recipe.train.hub_model_id)
    if left_out := unfinished_answers(recipe.data.source):
        say(left_out)
    return packed_rows(recipe, tokenizer, out).folder.name


# --- what a run is made of ---------------------------------------------------------------------------------------


def packed_rows(recipe: ViewRecipe, tokenizer: PreTrainedTokenizerBase, out: Path) -> PackedDataset:
    """The rows to train on; the documents that evaluation holds out are not in them."""
    return packed_dataset(
        recipe.data, tokenizer, cache=out / ROWS, num_held_out=recipe.evaluation.held_out_documents, seed=recipe.seed
    )


def held_out_prompts(recipe: ViewRecipe, data: PackedDataset, config: OrthrusConfig) -> list[list[int]]:
    """Beginnings of held-out documents, those that are no longer than a row: training knows no later positions."""
    longest = min(recipe.data.row_tokens, longest_prompt(recipe, config))
    found = [prompt for prompt in data.prompts if len(prompt) <= longest]
    if not found:
        raise ValueError(
            f"evaluation.held_out_documents: the reply of none of the {data.counts['held_out']} begins within "
            f"{longest} tokens: hold out more, or give evaluation.prompts"
        )
    return found[: recipe.evaluation.num_prompts]


def load_base(recipe: ViewRecipe, sizes: dict[str, Any]) -> OrthrusLM:
    """The base in the recipe's dtype, its view a copy of its AR projections; `sizes` are `plan_base`'s."""
    dtype, revision = getattr(torch, recipe.model.dtype), recipe.model.revision
    model = load_model(base_source(recipe), revision=revision, dtype=dtype, start_view=bool(sizes), **sizes)
    if not sizes:
        model.init_view()
    return model


def run_facts(recipe: ViewRecipe, data: PackedDataset, model: Any, *, num_steps: int) -> dict[str, Any]:
    """Where a run's results come from, and what resuming it must find again."""
    base = model.load_report.base
    print_ = base.fingerprint if base is not None else None
    return provenance(
        recipe, settings=settings_of_run(recipe), data_fingerprint=data.fingerprint, base_fingerprint=print_,
        num_ranks=num_ranks(), run_steps=num_steps,
    )  # fmt: skip


def check_same_run(stored: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """`ValueError` naming what is not as it was when the run began."""
    before, after = stored["settings"], now["settings"]
    for name in sorted((before.keys() | after.keys()) - NOT_THE_RUN):
        if (was := before.get(name)) != (is_ := after.get(name)):
            raise ValueError(f"--resume: {checkpoint} was trained with {name} {was!r}, this recipe says {is_!r}")
    for name, what in (
        ("data_fingerprint", "other data (data.source)"),
        ("base_fingerprint", "another base (model.base)"),
        ("num_ranks", "another number of ranks"),
        ("run_steps", "another number of steps"),
    ):
        if stored[name] != now[name]:
            raise ValueError(f"--resume: {checkpoint} is of a run on {what}: {stored[name]} then, {now[name]} now")


def base_digest(model: OrthrusLM) -> str:
    """SHA-256 of all weights that are not the view's, on rank 0; where they are spread over ranks, all must ask."""
    digest = hashlib.sha256()
    view = model.view_parameters()
    for name, parameter in sorted(model.named_parameters()):
        if name in view:
            continue
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if rank() == 0:
            digest.update(name.encode())
            data: Any = whole(value).contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(data)
    return digest.hexdigest()


# --- what a run leaves -------------------------------------------------------------------------------------------


def write_view(model: OrthrusLM, out: Path, *, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the view file into OUT, beside the run's checkpoints; config.json, which makes it one, comes last."""
    staging = out / ".view.part"
    shutil.rmtree(staging, ignore_errors=True)
    (out / "config.json").unlink(missing_ok=True)
    save_view(model, staging, tensors=tensors)
    write_provenance(staging, facts)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(out / path.name)
    staging.rmdir()


def reach_hub(repo_id: str) -> None:
    """Make the repository that the view goes to, now: a missing token is better known before a day of training."""
    try:
        huggingface_hub.create_repo(repo_id, exist_ok=True)
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"train.hub_model_id: {repo_id} cannot be written to: {reason}") from error


def push(recipe: ViewRecipe, out: Path) -> None:
    """Upload the finished view: its files and nothing else of the run's folder."""
    assert recipe.train.hub_model_id is not None
    huggingface_hub.upload_folder(
        repo_id=recipe.train.hub_model_id, folder_path=out,
        allow_patterns=["config.json", "*.safetensors", "*.index.json", "README.md", PROVENANCE],
        ignore_patterns=["checkpoint-*/*", "rows/*"], commit_message=f"View trained by recipe {recipe.name}",
    )  # fmt: skip


# --- without training --------------------------------------------------------------------------------------------


def dry_run(recipe: ViewRecipe, out: Path, *, num_ranks: int | None = None) -> dict[str, Any]:
    """Build the model, print what a run on so many ranks (this one's) would need, write the untrained view to OUT."""
    num_ranks = world_size() if num_ranks is None else num_ranks
    passes_per_step(recipe.train, num_ranks)
    check_folders(recipe, out)
    if where_to_start(out, resume=True) is not None:
        raise ValueError(f"--dry-run: --out {out} holds a run's checkpoints; name another folder")
    quiet()
    check_context(recipe)
    source = base_source(recipe)
    _, sizes = plan_base(recipe, load_tokenizer(source, revision=recipe.model.revision))
    model = load_base(recipe, sizes)
    found = budget(recipe, model.config, num_ranks=num_ranks)
    say(report(found, recipe, num_ranks=num_ranks))
    facts = provenance(recipe, dry_run=True, settings=settings_of_run(recipe))
    out.mkdir(parents=True, exist_ok=True)
    write_view(model, out, tensors=dict(model.view_parameters()), facts=facts)
    return dataclasses.asdict(found) | {"total_bytes": found.total_bytes, "out": str(out)}


def show_row(recipe: ViewRecipe, out: Path, number: int) -> None:
    """Print one training row as `inspect.inspect_row` shows it, with anchors as a first step would draw them."""
    quiet()
    tokenizer = load_tokenizer(base_source(recipe), revision=recipe.model.revision)
    out.mkdir(parents=True, exist_ok=True)
    data = packed_rows(recipe, tokenizer, out)
    if not 0 <= number < len(data):
        raise ValueError(f"--inspect: row {number} is not in 0 .. {len(data) - 1}")
    rows, blocks = Rows.from_batch(collate([data[number]]), isolated=data.isolated), Blocks.of(recipe.view.blocks)
    generator = torch.Generator().manual_seed(draw_seed(recipe.seed, step=0, row=0))
    anchors_1A = blocks.sample(rows.anchorable_BT, generator)
    console = Console(soft_wrap=True, highlight=False)
    console.print(inspect_row(rows, tokenizer, blocks, anchors_1A, coloured=console.is_terminal))
