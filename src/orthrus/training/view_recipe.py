"""The recipe of a view for a base that exists: model, data, what is trained, how, and how it is looked at meanwhile.

It is told from the bundled model's recipe (`recipe.Recipe`) by the line `kind: view`. What cannot work is refused by
name while the file is read, before anything is loaded.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orthrus.training.documents import DataSettings
from orthrus.training.loss import Objective
from orthrus.training.recipe import Recipe, build, digest, read_settings

BUNDLED_BASE = "bundled"
"""As `model.base`: the AR view of the model that comes with the package."""


def at_least(section: str, settings: Any, least: float, *names: str) -> None:
    """`ValueError` naming the first of these fields that is below `least`."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value < least:
            raise ValueError(f"{section}.{name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which base gets a view."""

    base: str
    """Hub id or folder of a supported base; "bundled" for the AR view of the bundled model."""
    revision: str | None = None
    """Commit or tag on the Hub."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen base and of all computation; the view's own weights are trained in fp32 (training/masters.py)."""
    block_size: int = 32
    """Positions drafted together at most, the anchor included."""
    mask_token_id: int | None = None
    """The token at all positions of a block but the first. None: len(tokenizer), an unused row of the embedding."""
    restart_view: bool = False
    """Whether a base that brings a view is taken without it, the new view starting from the AR projections."""

    def __post_init__(self):
        if not self.base.strip():
            raise ValueError("model.base is empty: name a Hub id or a folder")
        at_least("model", self, 2, "block_size")
        at_least("model", self, 0, "mask_token_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSettings:
    """What a micro-batch teaches."""

    blocks: tuple[tuple[int, int], ...] = ((32, 256),)
    """[width, blocks of that width a row], one pair for each width; no width above `model.block_size`."""
    objective: Objective = field(default_factory=Objective)
    """As published unless said otherwise."""

    def __post_init__(self):
        if not self.blocks:
            raise ValueError("view.blocks is empty: give at least one [width, number] pair")
        for pair in self.blocks:
            if len(pair) != 2 or pair[0] < 2 or pair[1] < 1:
                raise ValueError(f"view.blocks: {list(pair)} is no [width of at least 2, number of at least 1]")
        widths = [width for width, _ in self.blocks]
        if twice := [width for width in widths if widths.count(width) > 1]:
            raise ValueError(f"view.blocks names width {twice[0]} twice: add the numbers up in one pair")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """The optimiser, its schedule, and what is kept of a run."""

    num_steps: int | None = None
    """Optimiser steps; or give `num_epochs`."""
    num_epochs: float | None = None
    """Passes over the data; or give `num_steps`."""
    rows_per_step: int = 128
    """Of all ranks together."""
    rows_per_pass: int = 1
    """Rows of one micro-batch of one rank; the rest of a step is accumulated."""
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls behind the warm-up."""
    warmup_share: float = 0.05
    """Share of all steps over which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Whether the block pass forgets what is inside layers and computes it again: less memory, a third more time."""
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    """With several ranks: every rank holds all weights, or they are spread over the ranks."""
    log_steps: int = 10
    save_steps: int = 500
    keep_checkpoints: int = 2
    max_skipped_steps: int = 10
    """So many steps in a row without a finite gradient end the run with an error."""
    data_workers: int = 0
    """Processes that read rows ahead; 0: none."""
    report_to: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ()
    """Where metrics go besides the terminal and OUT/log.jsonl; each needs its package."""
    push_to_hub: bool = False
    """Whether the finished view is uploaded."""
    hub_model_id: str | None = None
    """Where to: owner/name."""

    def __post_init__(self):
        at_least("train", self, 1, "num_steps", "rows_per_step", "rows_per_pass", "log_steps", "save_steps")
        at_least("train", self, 1, "keep_checkpoints", "max_skipped_steps")
        at_least("train", self, 0, "weight_decay", "data_workers", "warmup_share")
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("train: give either num_steps or num_epochs, the other being null")
        for name in ("num_epochs", "learning_rate", "max_grad_norm"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"train.{name} must be above 0, got {value}")
        if self.warmup_share > 1:
            raise ValueError(f"train.warmup_share is a share of all steps, at most 1, got {self.warmup_share}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must be two numbers from 0 to below 1, got {list(self.betas)}")
        if self.rows_per_step % self.rows_per_pass:
            raise ValueError(
                f"train.rows_per_step {self.rows_per_step} must be a multiple of train.rows_per_pass "
                f"{self.rows_per_pass}"
            )
        if self.push_to_hub != (self.hub_model_id is not None):
            raise ValueError("train.push_to_hub and train.hub_model_id go together: give both or neither")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """Real greedy decoding of held-out prompts while training goes on."""

    every: int = 500
    """Steps between two looks; 0: never."""
    held_out_documents: int = 16
    """Documents (whole rows of the source) that the seed draws and that are never trained on, not even when nobody
    looks; prompts are their beginnings."""
    prompts: str | None = None
    """A JSON Lines file of prompts (`prompt`: text, or `messages`) in place of held-out documents' beginnings."""
    num_prompts: int = 16
    max_new_tokens: int = 128
    warn_after: int = 1000
    """From this step on, N below `warn_below`, or no higher than before training, is called what it is, with its usual
    causes."""
    warn_below: float = 1.2

    def __post_init__(self):
        at_least("evaluation", self, 0, "every", "held_out_documents", "warn_after")
        at_least("evaluation", self, 1, "num_prompts", "max_new_tokens", "warn_below")
        if self.every and not self.held_out_documents and self.prompts is None:
            raise ValueError("evaluation.every needs prompts: give evaluation.held_out_documents or evaluation.prompts")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewRecipe:
    """One run from a base to a view."""

    name: str
    kind: Literal["view"]
    seed: int = 0
    model: ModelSettings
    data: DataSettings
    view: ViewSettings = field(default_factory=ViewSettings)
    train: TrainSettings
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self):
        if wide := [width for width, _ in self.view.blocks if width > self.model.block_size]:
            raise ValueError(f"view.blocks: width {wide[0]} is above model.block_size {self.model.block_size}")
        if self.data.row_tokens <= self.model.block_size:
            raise ValueError(
                f"data.row_tokens {self.data.row_tokens} must be above model.block_size {self.model.block_size}"
            )

    def digest(self) -> str:
        """`recipe.digest` of this recipe."""
        return digest(self)


def load_any_recipe(path: str | Path, overrides: list[str] | None = None) -> "Recipe | ViewRecipe":
    """The recipe in a file, of the kind it says it is; `ValueError` naming whatever is wrong with it."""
    settings = read_settings(path, overrides)
    if "kind" not in settings and not {"model", "data", "train"}.isdisjoint(settings):
        raise ValueError(f"recipe {path}: the line `kind: view` is missing")
    return build(ViewRecipe if "kind" in settings else Recipe, settings, "recipe")


def passes_per_step(train: TrainSettings, num_ranks: int) -> int:
    """Micro-batches of each rank in a step; `ValueError` when the ranks cannot share its rows, or shard nothing."""
    passes, rest = divmod(train.rows_per_step, train.rows_per_pass * num_ranks)
    if rest:
        raise ValueError(
            f"train.rows_per_step {train.rows_per_step} must be a multiple of train.rows_per_pass "
            f"{train.rows_per_pass} x {num_ranks} ranks"
        )
    if train.sharding == "fsdp2" and num_ranks == 1:
        raise ValueError(
            "train.sharding fsdp2 spreads weights over ranks, and this is one: use torchrun (--ranks N with --dry-run) "
            "or ddp"
        )
    return passes


NOT_THE_RUN = frozenset({
    "name", "model.base", "model.revision",
    "data.source", "data.revision", "data.config", "data.split", "data.bad_rows",
    "train.log_steps", "train.save_steps", "train.keep_checkpoints", "train.data_workers", "train.report_to",
    "train.push_to_hub", "train.hub_model_id", "train.max_skipped_steps",
    "evaluation.every", "evaluation.prompts", "evaluation.num_prompts", "evaluation.max_new_tokens",
    "evaluation.warn_after", "evaluation.warn_below",
})  # fmt: skip
"""Settings that may change when a run is resumed: they do not reach a weight. Where data and base are taken from may
change too: it is their fingerprints that must be the same."""


def settings_of_run(recipe: ViewRecipe) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted name: what resuming must find unchanged."""
    return {name: value for name, value in flat(dataclasses.asdict(recipe)).items() if name not in NOT_THE_RUN}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names, tuples as lists."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = as_lists(value)
    return found


def as_lists(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    return [as_lists(item) for item in value] if isinstance(value, tuple | list) else value
