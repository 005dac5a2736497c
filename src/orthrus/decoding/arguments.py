"""What `model.generate` takes: every argument is honoured or refused by name, before anything is decoded.

B = rows, T = tokens of a prompt
"""

from types import NoneType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

REFUSED_SETTINGS = {
    "num_beams": 1, "num_beam_groups": 1, "length_penalty": 1, "guidance_scale": 1,
    "early_stopping": False, "diversity_penalty": 0, "constraints": None, "force_words_ids": None, "penalty_alpha": 0,
    "dola_layers": None, "token_healing": False, "low_memory": False, "output_attentions": False,
    "output_hidden_states": False, "cache_implementation": None, "cache_config": None, "max_cache_len": None,
    "compile_config": None, "continuous_batching_config": None, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "speculation_type": None, "use_mtp": None, "is_assistant": False,
}  # fmt: skip
"""Generation settings that block decoding does not support, with the value that means "off"."""

KINDS: dict[str, tuple[type, ...]] = {
    "use_diffusion_mode": (bool,),
    "block_size": (int, str, NoneType),
    "seed": (int, NoneType),
    "exact": (bool, NoneType),
    "generator": (torch.Generator, NoneType),
    "cache_bytes": (int, NoneType),
    "draft_precision": (str, NoneType),
}
"""What this project's own arguments of `generate` may be."""


def check_kinds(**given: Any) -> None:
    """`ValueError` for an argument of another kind, and for two sources of randomness."""
    for name, value in given.items():
        if not isinstance(value, KINDS[name]) or (isinstance(value, bool) and bool not in KINDS[name]):
            raise ValueError(f"generate: {name} must be {' or '.join(k.__name__ for k in KINDS[name])}, got {value!r}")
    if given["seed"] is not None and given["generator"] is not None:
        raise ValueError("generate: give seed or generator, not both")


def check_inputs(ids_BT: Any, mask_BT: Any) -> None:
    """`ValueError` for prompts that are no [rows, tokens] tensor of ids, and for a mask of another shape (which
    transformers drops unread where it is all ones)."""
    if not isinstance(ids_BT, Tensor):
        return  # transformers says what it takes
    if ids_BT.dim() != 2 or ids_BT.dtype not in (torch.int32, torch.int64) or not len(ids_BT):
        raise ValueError(
            f"generate: input_ids must be an int64 tensor [rows, tokens], got {tuple(ids_BT.shape)} of {ids_BT.dtype}"
        )
    if isinstance(mask_BT, Tensor) and mask_BT.shape != ids_BT.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask_BT.shape)}, input_ids has {tuple(ids_BT.shape)}")


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """`ValueError` for keywords that neither stock's generation config nor block decoding knows."""
    known = vars(GenerationConfig())
    for name, value in kwargs.items():
        if name not in known and name not in ("input_ids", "attention_mask", "tokenizer") and value is not None:
            raise ValueError(f"generate: {name} is not an argument of block decoding (not supported, or misspelt)")
    if kwargs.get("use_cache") is False:
        raise ValueError("generate: use_cache=False is not supported; decoding always uses its own cache")


def refuse_settings(default: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """`ValueError` for settings that block decoding does not support; a later source overrides an earlier one."""
    settings: dict[str, Any] = {}
    for source in (vars(default), {} if given is None else vars(given), kwargs):
        settings |= {name: value for name, value in source.items() if value is not None}
    for name, off in REFUSED_SETTINGS.items():
        value = settings.get(name, off)
        if value != off:
            raise ValueError(f"generate: {name}={value!r} is not supported with block decoding")


def check_range(prompts: list[list[int]], num_tokens: int) -> None:
    """`ValueError` for an id without a row in the embedding."""
    for b, prompt in enumerate(prompts):
        if prompt and not (min(prompt) >= 0 and max(prompt) < num_tokens):
            wrong = next(token for token in prompt if not 0 <= token < num_tokens)
            raise ValueError(f"input_ids: row {b} holds token {wrong}, the model's ids are 0 .. {num_tokens - 1}")
