"""A recipe: every setting of a training run in one YAML file, read into dataclasses that refuse unknown keys."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orthrus.datagen.regenerate import RolloutStage
from orthrus.training.loss import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The architecture of a base that is trained from nothing (the bundled model)."""

    vocab_size: int = 8192
    hidden_size: int = 512
    intermediate_size: int = 1024
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    block_size: int = 32
    """Positions drafted together, the anchor included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """What one run of optimiser steps needs: `trainer.run_steps`."""

    rows_per_step: int = 128
    """Of all ranks together."""
    rows_per_pass: int = 32
    """Rows of one micro-batch of one rank; the rest of a step is accumulated."""
    num_steps: int = 4000
    max_seconds: float | None = None
    """Wall-clock budget; the learning-rate schedule follows whichever of steps and seconds is further along."""
    learning_rate: float = 2e-3
    """On AdamW's scale; Muon's updates are scaled to match."""
    weight_decay: float = 0.0
    warmup_steps: int = 100
    cooldown_share: float = 0.7
    """Share of the run over which the learning rate falls linearly to zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseStage(Steps):
    """Pretraining of the base by next-token cross-entropy."""

    row_tokens: int = 1024
    rows_per_step: int = 256
    rows_per_pass: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class UnlikelihoodStage:
    """Rounds in which the base writes, and unlearns the loops that it wrote (`training/unlikelihood.py`)."""

    num_rounds: int = 0
    """0: the base stays as it is."""
    steps_per_round: int = 20
    rows_per_step: int = 256
    """Rows of both kinds together: the base's own and the corpus's."""
    own_rows_per_pass: int = 32
    """The base's own rows in one micro-batch of one rank."""
    corpus_rows_per_pass: int = 32
    """Rows of the corpus in one micro-batch of one rank: they keep the base where it was."""
    learning_rate: float = 5e-4
    """At the start; it falls linearly to 0 over all rounds."""
    weight_decay: float = 0.0
    digits_alike: bool = False
    """Whether repeats are looked for with all digits taken for one: counting up is then a loop, too."""
    weight: float = 1.0
    """Of the unlikelihood term against the likelihood term."""
    rollouts: RolloutStage = field(default_factory=RolloutStage)
    """What the base writes in each round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewStage(Steps):
    """Training of the diffusion view by forward KL to the frozen AR view."""

    blocks: tuple[tuple[int, int], ...] = ((32, 64),)
    """[width, blocks of that width a row], one pair for each width; no width above the model's block size."""
    objective: Objective = field(default_factory=Objective)
    """What is minimised; as published unless said otherwise."""
    real_share: float = 0.15
    """Share of training rows that are corpus text instead of the base's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run from corpus to view."""

    name: str
    seed: int = 0
    shape: Shape = field(default_factory=Shape)
    base: BaseStage = field(default_factory=BaseStage)
    unlikelihood: UnlikelihoodStage = field(default_factory=UnlikelihoodStage)
    """At a temperature near 1: the base unlearns its loops."""
    sharpen: UnlikelihoodStage = field(default_factory=UnlikelihoodStage)
    """The same, then, at a low temperature: the base becomes surer of what it prefers."""
    counting: UnlikelihoodStage = field(default_factory=UnlikelihoodStage)
    """The same once more, with all digits taken for one: the base unlearns counting up."""
    rollouts: RolloutStage = field(default_factory=RolloutStage)
    view: ViewStage = field(default_factory=ViewStage)

    def digest(self) -> str:
        """`digest` of this recipe."""
        return digest(self)


def digest(recipe: Any) -> str:
    """The first 12 hex digits of the SHA-256 of all settings: two runs with one digest had one recipe."""
    text = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe of the bundled model's kind and apply `section.key=value` overrides.

    Raises `ValueError` naming the key for an unknown key, a wrong type or an unreadable file.
    """
    return build(Recipe, read_settings(path, overrides), "recipe")


def read_settings(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The plain settings of a YAML recipe with `section.key=value` overrides applied; nothing is checked yet."""
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path} must be a mapping, got {settings!r}")
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} must be section.key=value")
        *sections, last = key.split(".")
        target = settings
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"override {override!r}: {section} is no section of the recipe")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"override {override!r}: the value cannot be read as YAML") from None
    return settings


def build(kind: type, settings: Any, where: str) -> Any:
    """A dataclass from plain settings, nested; every key and type checked, errors naming the key."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where} must be a mapping, got {settings!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(settings) - set(fields), key=str):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    if lacking := [n for n, f in fields.items() if (f.default, f.default_factory) == missing and n not in settings]:
        raise ValueError(f"{where}: the key {lacking[0]!r} is missing")
    return kind(**{name: convert(fields[name].type, value, f"{where}.{name}") for name, value in settings.items()})


def convert(kind: Any, value: Any, where: str) -> Any:
    """One setting as its field's type, or a `ValueError` naming it."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, where)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        item = typing.get_args(kind)[0]
        return tuple(convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind):
            return value
        raise ValueError(f"{where}: must be one of {', '.join(map(str, typing.get_args(kind)))}, got {value!r}")
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # with None, the only union in a recipe
        inner = next(option for option in typing.get_args(kind) if option is not type(None))
        return None if value is None else convert(inner, value, where)
    if kind is float and type(value) in (int, float, str):
        try:  # YAML reads 1e-3, without a dot, as text.
            number = float(value)
        except ValueError:
            number = math.nan  # which, like infinity, would pass every comparison that follows
        if math.isfinite(number):
            return number
    elif type(value) is kind:
        return value
    name = "a list" if typing.get_origin(kind) is tuple else getattr(kind, "__name__", kind)
    raise ValueError(f"{where}: expected {name}, got {value!r}")
