"""The model families a view can be built on: one row each, everything else refused by name.

A family is a row here and a configuration class in `config.py`, as long as its layers are built of the parts that
`model/attention.py` knows: q/k norms or none, biases or none, half-split rotary embedding, full attention. The decoder
is the family's own class; the LM head over it is the same code in every family (tests/model/test_families.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3Model

from orthrus.config import (
    OrthrusConfig,
    OrthrusLlamaConfig,
    OrthrusMistralConfig,
    OrthrusQwen2Config,
    check_layers,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What has to be known about a family of base models."""

    name: str
    """For messages."""
    stock_config: type[PreTrainedConfig]
    """transformers' configuration class; its `model_type` is what a merged checkpoint keeps."""
    config: Any
    """The dual-view configuration class, a subclass of the stock one."""
    decoder: type[PreTrainedModel]
    """transformers' decoder, the stack of layers under the LM head."""
    mlp: type[nn.Module]
    """The class of its layers' MLP, down(act(gate(x)) * up(x)): what packed weights may stand in for."""
    required: tuple[str, ...] = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    )  # fmt: skip
    """Fields of config.json without which the shape of the model is unknown."""

    @property
    def model_type(self) -> str:
        """`model_type` of the family's stock checkpoints."""
        return self.stock_config.model_type


ROWS = (
    Family(name="Qwen3", stock_config=Qwen3Config, config=OrthrusConfig, decoder=Qwen3Model, mlp=Qwen3MLP),
    Family(name="Qwen2", stock_config=Qwen2Config, config=OrthrusQwen2Config, decoder=Qwen2Model, mlp=Qwen2MLP),
    Family(name="Llama", stock_config=LlamaConfig, config=OrthrusLlamaConfig, decoder=LlamaModel, mlp=LlamaMLP),
    Family(
        name="Mistral", stock_config=MistralConfig, config=OrthrusMistralConfig, decoder=MistralModel, mlp=MistralMLP
    ),
)

FAMILIES: dict[str, Family] = {name: row for row in ROWS for name in (row.model_type, row.config.model_type)}
"""By `model_type` of config.json: the stock one, and the one that the dual-view configuration saves."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a dual-view model's configuration."""
    return FAMILIES[config.model_type]


def check_base(config: Mapping[str, Any], *, where: str) -> Family:
    """The family of a base's config.json; `ValueError` naming the field where it cannot carry a view.

    Biases are honoured: the twins get them too. Sliding windows and quantised weights are refused.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{where} has model_type {model_type!r}, which is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    if absent := [name for name in family.required if config.get(name) is None]:
        raise ValueError(f"{where}: config.json lacks {', '.join(absent)}, so it describes no {family.name} model")
    if config.get("quantization_config"):
        raise ValueError(f"{where} has quantization_config: a view needs the unquantised checkpoint of this base")
    try:
        # As transformers reads it: a config.json that says nothing of a window may mean one (Mistral).
        check_layers(family.stock_config.from_dict(dict(config)))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: config.json is broken: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return family
