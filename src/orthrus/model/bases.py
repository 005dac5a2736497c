"""The model families a view can be built on: one row each, everything else refused by name.

A new family costs a row here and, if its attention layer differs, a line in `model/attention.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What loading has to know about a family of base models."""

    name: str
    """For messages."""
    required: tuple[str, ...]
    """Fields of config.json without which the shape of the model is unknown."""


_QWEN3 = Family(
    name="Qwen3",
    required=("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
)

FAMILIES: dict[str, Family] = {"qwen3": _QWEN3, "orthrus": _QWEN3}
"""By `model_type` of config.json; `orthrus` is what `OrthrusConfig.save_pretrained` writes, the same layers."""


def check_base(config: Mapping[str, Any], *, where: str) -> Family:
    """The family of a base's config.json; `ValueError` naming the field where it cannot carry a view.

    `attention_bias` is honoured: the twins get biases too. Sliding windows and quantised weights are refused.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{where} has model_type {model_type!r}, which is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    if absent := [name for name in family.required if config.get(name) is None]:
        raise ValueError(f"{where}: config.json lacks {', '.join(absent)}, so it describes no {family.name} model")
    if has_sliding_window(config):
        raise ValueError(f"{where} has sliding-window layers (use_sliding_window), which are not supported")
    if config.get("quantization_config"):
        raise ValueError(f"{where} has quantization_config: a view needs the unquantised checkpoint of this base")
    return family


def has_sliding_window(config: Mapping[str, Any]) -> bool:
    """Whether any layer attends to a window only; the fields alone say nothing, stock bases carry them unused."""
    if (layer_types := config.get("layer_types")) is not None:
        return "sliding_attention" in layer_types
    is_on = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
    return bool(is_on and config.get("max_window_layers", 28) < config["num_hidden_layers"])
