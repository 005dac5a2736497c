"""Reading checkpoints, from a folder or the Hub, in any of three forms.

* *merged*: base tensors and `*_diff` tensors together, as the released checkpoints are. Their `model_type` says
  "qwen3", so the form is told by the tensors, never by that field.
* *view*: `*_diff` tensors alone; config.json names the base by id, revision and fingerprint.
* *base*: no `*_diff` tensors. Refused, unless `start_view=True` asks for a view that copies the AR projections.

Everything that can be wrong is looked for in the files' headers before a weight is used: `ValueError` for a missing or
unexpected tensor, another shape, a broken file, another base. Then transformers' own loader reads the tensors, so its
`dtype`, `device_map` and `quantization_config` work. Only safetensors are read, never pickles.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_accelerate_available

from orthrus.config import OrthrusConfig
from orthrus.model.attention import TWINS
from orthrus.model.bases import FAMILIES, check_base
from orthrus.model.hub import DOWNLOAD_OPTIONS, commit_of, find_folder
from orthrus.model.modeling import OrthrusLM, is_view_tensor
from orthrus.model.tensors import (
    DTYPES,
    EMBEDDING,
    HEAD,
    StoredTensor,
    fingerprint,
    is_ignorable,
    is_same,
    listed,
    read_headers,
    read_json,
)

Form = Literal["merged", "view", "base"]

VIEW_MODEL_TYPE = "orthrus_view"
ORTHRUS_ARCHITECTURES = ("OrthrusLM", "OrthrusForCausalLM")
BASE_FIELDS = ("base_id", "base_revision", "base_fingerprint")
"""Fields of config.json that name a view's base."""
WRITER_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version", "orthrus_version")
DEAD_FIELDS = ("r", "lora_alpha", *WRITER_FIELDS, *BASE_FIELDS)
"""Fields of config.json that say nothing about the model's shape. The LoRA fields of released checkpoints are dead:
their weights are full rank."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseName:
    """Which base a view belongs to."""

    id: str
    """Hub id, or folder; a folder starting with "./" or "../" is looked for from the view's own folder."""
    revision: str | None
    fingerprint: str

    def __str__(self) -> str:
        revision = f"@{self.revision[:12]}" if self.revision else ""
        return f"{self.id}{revision} ({short(self.fingerprint)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What a load did with every tensor; `model.load_report` after `from_pretrained`."""

    consumed: tuple[str, ...] = ()
    """Tensors whose values are in the model."""
    missing: tuple[str, ...] = ()
    """Tensors the files lack: the view's, when `start_view` made them from the AR projections; else the load fails."""
    unexpected: tuple[str, ...] = ()
    """Stored tensors that the model rightly does without: rotary frequencies, a tied LM head. Others fail the load."""
    form: Form = "merged"
    source: str = ""
    """What was asked for: Hub id or folder."""
    revision: str | None = None
    """The Hub commit that was read."""
    folder: Path | None = None
    """Where its files are."""
    base: BaseName | None = None
    """The base that the files name, or were found to be."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint's files: configuration and headers, nothing loaded."""

    source: str
    revision: str | None
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        """Which of the three forms this is, told by its tensors; `model_type` lies in released checkpoints."""
        has_base = any(not is_view_tensor(name) for name in self.tensors)
        if any(is_view_tensor(name) for name in self.tensors):
            return "merged" if has_base else "view"
        return "view" if self.config.get("model_type") == VIEW_MODEL_TYPE else "base"

    def claims_view(self) -> bool:
        """Whether config.json says that there is a diffusion view."""
        return bool(set(self.config.get("architectures") or ()) & set(ORTHRUS_ARCHITECTURES))

    def base_name(self) -> BaseName | None:
        """The base that config.json names."""
        name, print_ = self.config.get("base_id"), self.config.get("base_fingerprint")
        if not isinstance(name, str) or not isinstance(print_, str):
            return None
        return BaseName(id=name, revision=self.config.get("base_revision"), fingerprint=print_)


def short(fingerprint_: str) -> str:
    """A fingerprint for messages."""
    return fingerprint_[: len("sha256:") + 12]


# --- finding the files -------------------------------------------------------------------------------------------


def read_checkpoint(source: str | os.PathLike, *, revision: str | None = None, **options: Any) -> Checkpoint:
    """Configuration and tensor headers of a checkpoint."""
    folder = find_folder(source, weights=True, revision=revision, **options)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is no checkpoint")
    return Checkpoint(
        source=str(source),
        revision=commit_of(folder),
        folder=folder,
        config=read_json(folder / "config.json"),
        tensors=read_headers(folder),
    )


def read_base_of(view: Checkpoint, base: str | os.PathLike | None, **options: Any) -> Checkpoint:
    """The base of a view: the given one or the one it names. Refused when the fingerprint is another."""
    named = view.base_name()
    if named is None:
        raise ValueError(f"{view.source} is a view file, but its config.json lacks base_id or base_fingerprint")
    if base is None:
        beside = view.folder / named.id
        is_relative = named.id.startswith(("./", "../"))
        try:
            found = read_checkpoint(beside if is_relative else named.id, revision=named.revision, **options)
        except ValueError as error:
            raise ValueError(f"the base of {view.source} cannot be read ({error}); name it with base=") from error
    else:
        found = read_checkpoint(base, **options)
    if (print_ := fingerprint(found.folder)) != named.fingerprint:
        raise ValueError(
            f"{view.source} was trained on {named}; this base is {found.source} ({short(print_)}): "
            "other weights. Load that base, or train a view for this one"
        )
    return found


# --- configuration -----------------------------------------------------------------------------------------------


def build_config(
    config_class: type[OrthrusConfig], fields: Mapping[str, Any], *, where: str, **overrides: Any
) -> tuple[OrthrusConfig, dict[str, Any]]:
    """The configuration of a config.json, and the overrides it has no field for.

    Raises `ValueError` for a base that cannot carry a view or without `block_size` and `mask_token_id`.
    """
    family = check_base(fields, where=where)
    if not issubclass(config_class, family.config):  # a class of another family, whose defaults are not this base's
        config_class = family.config
    fields = {name: value for name, value in fields.items() if name not in DEAD_FIELDS}
    fields["use_cache"] = True  # Released checkpoints say false, which would only make plain generation quadratic.
    overrides = {name: value for name, value in overrides.items() if value is not None}
    fields |= {name: overrides.pop(name) for name in ("block_size", "mask_token_id") if name in overrides}
    if absent := [name for name in ("block_size", "mask_token_id") if fields.get(name) is None]:
        raise ValueError(
            f"{where}: config.json lacks {' and '.join(absent)}, which the diffusion view was trained with"
        )
    try:
        return config_class.from_dict(fields, return_unused_kwargs=True, **overrides)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: config.json is broken: {error}") from error


def read_generation_config(folder: Path, config: OrthrusConfig) -> GenerationConfig:
    """The base's own generation configuration, nothing invented: EOS from config.json where it names none."""
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    else:
        generation = GenerationConfig.from_model_config(config)
    if generation.eos_token_id is None:
        generation.eos_token_id = config.eos_token_id
    generation.use_cache = True
    generation._from_model_config = False  # Otherwise transformers makes it anew when config.json's fields change.
    return generation


def parse_dtype(
    dtype: str | torch.dtype | None, *, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> torch.dtype:
    """The number format to load in; "auto" and None take config.json's, else that of the stored tensors."""
    if dtype in (None, "auto"):
        stored = next((DTYPES[tensor.dtype] for tensor in tensors.values() if tensor.dtype in DTYPES), torch.float32)
        dtype = fields.get("dtype") or fields.get("torch_dtype") or stored
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES.values())
        raise ValueError(f"dtype {dtype!r} is not one of auto, {names}")
    return found


def given_fields(config: PreTrainedConfig, options: dict[str, Any], *, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration object that the caller made; its attention implementation joins the options.

    `stored` is the checkpoint's own config.json, which must be of the same family.
    """
    given, own = config.model_type, stored.get("model_type")
    if own in FAMILIES and FAMILIES.get(given) is not FAMILIES[own]:
        raise ValueError(f"config is a {type(config).__name__} ({given}), but the checkpoint is of the family {own}")
    if (attention := getattr(config, "_attn_implementation", None)) is not None:
        options.setdefault("attn_implementation", attention)
    return config.to_dict()


# --- what goes where ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Which stored tensor becomes which of the model's, and what is left over on either side."""

    tensors: dict[str, StoredTensor]
    """By the model's own names; a view that is started has its AR projections' tensors."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def plan_load(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], *, where: str, start_view: bool
) -> LoadPlan:
    """Match stored tensors with the model's shapes; `ValueError` naming the tensors that do not fit."""
    tensors = {name: tensor for name, tensor in stored.items() if name in expected}
    spare = {name: tensor for name, tensor in stored.items() if name not in expected}
    check_tied_head(tensors, spare, where=where)
    unexpected = tuple(sorted(name for name in spare))
    if strange := [name for name in unexpected if not is_ignorable(name) and name != HEAD]:
        raise ValueError(f"{where} holds tensors that this model does not have: {listed(strange)}")
    missing = tuple(sorted(set(expected) - set(tensors)))
    if start_view:
        copies = {view_name(name): tensor for name, tensor in tensors.items()}
        tensors |= {name: copies[name] for name in missing if name in copies}
    if lacking := sorted(set(expected) - set(tensors)):
        raise ValueError(f"{where} lacks {len(lacking)} tensors: {listed(lacking)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{where}: {name} has shape {list(tensor.shape)}, config.json asks for {list(expected[name])}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{where}: {name} is stored as {tensor.dtype}; quantised checkpoints are not read")
    return LoadPlan(tensors=tensors, missing=missing, unexpected=unexpected)


def check_tied_head(tensors: dict[str, StoredTensor], spare: dict[str, StoredTensor], *, where: str) -> None:
    """Settle an LM head stored although config.json ties it: a copy is left out, a lone one is the embedding."""
    if HEAD not in spare:
        return
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = spare.pop(HEAD)
    elif not is_same(spare[HEAD], tensors[EMBEDDING]):
        raise ValueError(f"{where}: config.json ties {HEAD} to the embedding, but the stored tensors differ")


def expected_shapes(model_class: type[OrthrusLM], config: OrthrusConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration must have."""
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def view_name(name: str) -> str | None:
    """The view's tensor that starts as a copy of this one; None where the view has none."""
    module, _, leaf = name.rpartition(".")
    return f"{module}_diff.{leaf}" if module.endswith(tuple(f".self_attn.{twin}" for twin in TWINS)) else None


def check_numbers(model: nn.Module, *, where: str) -> None:
    """Refuse weights that are not finite: they would give text, only no sense. One pass, no copies."""
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        if data.is_meta or not data.is_floating_point() or data.dtype.itemsize < 2 or data.numel() == 0:
            continue
        low, high = torch.aminmax(data)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(
                f"{where}: {name} holds NaN or infinite values (as {data.dtype}); the checkpoint is broken"
            )


# --- loading -----------------------------------------------------------------------------------------------------


class OrthrusCheckpointMixin:
    """`from_pretrained` for a dual-view model, in front of transformers' own."""

    load_report: LoadReport
    """What the load did; only models from `from_pretrained` have it."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        base: str | os.PathLike | None = None,
        start_view: bool = False,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint in any form, from a folder or the Hub; other keywords are transformers' own.

        `base` names a view file's base when it lies elsewhere than the view says; for a merged checkpoint it is the
        base it must have been made from. `start_view` accepts a stock base and copies its projections into a view.
        Raises `ValueError` for whatever is wrong with the checkpoint, before any weight is used.
        """
        refuse_options(kwargs)
        hub = {name: kwargs.pop(name) for name in DOWNLOAD_OPTIONS if name in kwargs}
        with_info = kwargs.pop("output_loading_info", False)
        dtype = dtype if dtype is not None else kwargs.pop("torch_dtype", None)
        kwargs.pop("torch_dtype", None)
        checkpoint = read_checkpoint(pretrained_model_name_or_path, revision=revision, **hub)
        home, report = settle_form(checkpoint, base=base, start_view=start_view, **hub)
        fields = given_fields(config, kwargs, stored=home.config) if config is not None else home.config
        if checkpoint.form == "view":
            fields = fields | {name: checkpoint.config.get(name) for name in ("block_size", "mask_token_id")}
        model_class: Any = cls  # with transformers' PreTrainedModel behind this mixin
        built, kwargs = build_config(model_class.config_class, fields, where=checkpoint.source, **kwargs)
        built.architectures = [cls.__name__]
        kwargs.setdefault("generation_config", read_generation_config(home.folder, built))
        stored = {n: t for n, t in home.tensors.items() if home is checkpoint or not is_view_tensor(n)}
        stored |= checkpoint.tensors if home is not checkpoint else {}
        built.dtype = parse_dtype(dtype, fields=fields, tensors=home.tensors)
        device_map, device = device_without_accelerate(device_map)
        with ExitStack() as files, clear_import_errors(checkpoint.source):
            plan = plan_load(
                stored, expected_shapes(model_class, built), where=checkpoint.source, start_view=start_view
            )
            slices = open_tensors(plan.tensors, files)
            loader: Any = super()
            model, info = loader.from_pretrained(
                None, *model_args, config=built, state_dict=slices, dtype=built.dtype, device_map=device_map,
                output_loading_info=True, **kwargs,
            )  # fmt: skip
        model = finish(model, checkpoint, is_new_view=bool(plan.missing), device=device)
        consumed = tuple(sorted(set(plan.tensors) - set(plan.missing)))
        model.load_report = replace(report, consumed=consumed, missing=plan.missing, unexpected=plan.unexpected)
        return (model, info) if with_info else model


def refuse_options(options: dict[str, Any]) -> None:
    """Refuse transformers' options that would be ignored here, and drop those that mean nothing."""
    for name in ("subfolder", "variant", "gguf_file", "state_dict", "ignore_mismatched_sizes", "key_mapping"):
        if options.pop(name, None):
            raise ValueError(f"{name} is not supported by Orthrus checkpoints")
    if options.pop("use_safetensors", None) is False:
        raise ValueError("use_safetensors=False is not supported: only safetensors are read, never pickles")
    # AutoModel's bookkeeping; the class is already chosen, and code comes from it alone.
    for name in ("trust_remote_code", "code_revision", "_from_auto", "_commit_hash", "adapter_kwargs", "proxies"):
        options.pop(name, None)


@contextmanager
def clear_import_errors(where: str) -> Iterator[None]:
    """An option that needs an absent package (flash attention, a quantiser) is the user's to change: `ValueError`."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{where} cannot be loaded with these options here: {error}") from error


def settle_form(
    checkpoint: Checkpoint, *, base: str | os.PathLike | None, start_view: bool, **options: Any
) -> tuple[Checkpoint, LoadReport]:
    """The checkpoint that base tensors and configuration come from (itself, or a view's base), and what is known."""
    name, home = checkpoint.base_name(), checkpoint
    if checkpoint.form == "view":
        home = read_base_of(checkpoint, base, **options)
    elif checkpoint.form == "base":
        if not start_view:
            claim = " although its config.json says OrthrusLM" if checkpoint.claims_view() else ""
            raise ValueError(
                f"{checkpoint.source} has no diffusion view, its *_diff tensors are missing{claim}: start one with "
                f"`orthrus convert {checkpoint.source} OUT`, or name a checkpoint that has one"
            )
        print_ = fingerprint(checkpoint.folder)
        name = BaseName(id=portable_id(checkpoint), revision=checkpoint.revision, fingerprint=print_)
    if checkpoint.form != "base" and start_view:
        raise ValueError(f"{checkpoint.source} already has a diffusion view; start_view would throw it away")
    if checkpoint.form != "view" and base is not None:
        other = read_checkpoint(base, **options)
        if fingerprint(other.folder) != fingerprint(checkpoint.folder):
            raise ValueError(f"{checkpoint.source} was not made from {base}: their base tensors differ")
    report = LoadReport(
        form=checkpoint.form, source=checkpoint.source, revision=checkpoint.revision,
        folder=checkpoint.folder, base=name,
    )  # fmt: skip
    return home, report


def portable_id(checkpoint: Checkpoint) -> str:
    """How another checkpoint should name this one: its Hub id, or its folder's full path."""
    return checkpoint.source if checkpoint.revision else str(checkpoint.folder.resolve())


def open_tensors(tensors: Mapping[str, StoredTensor], files: ExitStack) -> dict[str, Any]:
    """Slices that transformers' loader reads when it needs them, as it makes them itself from a file."""
    opened: dict[Path, Any] = {}
    for file in {tensor.file for tensor in tensors.values()}:
        try:
            opened[file] = files.enter_context(safe_open(file, framework="pt", device="cpu"))
        except SafetensorError as error:
            raise ValueError(f"{file} is broken: {error}") from error
    return {name: opened[tensor.file].get_slice(tensor.name) for name, tensor in tensors.items()}


def device_without_accelerate(device_map: Any) -> tuple[Any, torch.device | None]:
    """transformers wants the accelerate package for any `device_map`; for one device this does without it."""
    if device_map is None or is_accelerate_available():
        return device_map, None
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    try:
        return None, torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(f"device_map={device_map!r} needs `pip install accelerate`; name one device instead") from None


def finish(model: Any, checkpoint: Checkpoint, *, is_new_view: bool, device: torch.device | None) -> Any:
    """Check the numbers, name the model after its checkpoint, and put it where it was asked to be."""
    if is_new_view:
        # One stored tensor was read for both views, possibly into the same memory: training must move only one.
        for parameter in model.view_parameters().values():
            parameter.data = parameter.data.clone()
    check_numbers(model, where=checkpoint.source)
    model.config.name_or_path = model.name_or_path = checkpoint.source
    return model.to(device) if device is not None else model


class LoadedLM(OrthrusCheckpointMixin, OrthrusLM):
    """What `load_model` returns by default: both views and the base's forward, without this project's `generate`."""


def load_model(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    base: str | os.PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    start_view: bool = False,
    model_class: type = LoadedLM,
    **options: Any,
) -> Any:
    """Load a checkpoint in any form onto one device, ready for inference; `from_pretrained` says what is refused."""
    on_device = {} if device is None or torch.device(device).type == "cpu" else {"device_map": device}
    return model_class.from_pretrained(
        source, revision=revision, base=base, dtype=dtype, attn_implementation=attn_implementation,
        start_view=start_view, **on_device, **options,
    )  # fmt: skip


# --- tokenizer ---------------------------------------------------------------------------------------------------


def load_tokenizer(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    base: str | os.PathLike | None = None,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, or its base's; a missing chat template is taken from the base where that is known.

    Raises `ValueError` when neither has a tokenizer.
    """
    folder = find_folder(source, weights=False, revision=revision, **options)
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None and tokenizer.chat_template:
        return tokenizer
    fallback = base_folder(folder, base, is_needed=tokenizer is None, **options)
    base_tokenizer = read_tokenizer(fallback) if fallback is not None else None
    if tokenizer is None:
        tokenizer = base_tokenizer
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer, and neither has its base; name one with base=")
    if base_tokenizer is not None and not tokenizer.chat_template:
        tokenizer.chat_template = base_tokenizer.chat_template
    return tokenizer


def base_folder(folder: Path, base: str | os.PathLike | None, *, is_needed: bool, **options: Any) -> Path | None:
    """Where the base's small files are: the given base, else the one config.json names; None when it is not there."""
    if base is not None:
        return find_folder(base, weights=False, **options)
    fields = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(name := fields.get("base_id"), str):
        return None
    source = str(folder / name) if name.startswith(("./", "../")) else name
    try:
        return find_folder(source, weights=False, revision=fields.get("base_revision"), **options)
    except ValueError:
        if is_needed:
            raise
        return None


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored in a folder, None when there is none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        # The configuration is given so that config.json's model_type and auto_map are not consulted.
        return AutoTokenizer.from_pretrained(folder, config=OrthrusConfig())
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
