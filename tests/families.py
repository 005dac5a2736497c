"""The families of bases as the tests see them: a tiny variant for each way in which their layers differ."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from orthrus.model.bases import FAMILIES, Family
from orthrus.model.modeling import is_view_tensor

THETA = 10000.0

VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3-bias": {"model_type": "qwen3", "attention_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-yarn": {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-bias": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16, "num_key_value_heads": 1},
    "mistral-dynamic": {
        "model_type": "mistral", "sliding_window": None,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0},
    },
}  # fmt: skip
"""Fields of config.json that differ from the shape a test starts from. No `head_dim` where the family has its default
of hidden_size / num_attention_heads; Qwen3's is another."""

OTHERS = [name for name in VARIANTS if not name.startswith("qwen3")]
ONE_EACH = ["qwen2-yarn", "llama3", "mistral"]
"""One variant of every family but Qwen3."""


def family(variant: str) -> Family:
    """The row of a variant's family."""
    return FAMILIES[VARIANTS[variant]["model_type"]]


def stock_class(variant: str) -> str:
    """The name of transformers' own causal LM of this variant."""
    return family(variant).decoder.__name__.removesuffix("Model") + "ForCausalLM"


def fields_of(variant: str, shape: dict[str, Any]) -> dict[str, Any]:
    """The shape's fields with the variant's in their place; what is Qwen3's alone is left out for the others."""
    stock = family(variant).stock_config
    own = {"head_dim": shape.get("head_dim")} if stock.model_type == "qwen3" else {}
    known = vars(stock()).keys() - {"head_dim", "sliding_window"}
    fields = {name: value for name, value in shape.items() if name in known} | own | VARIANTS[variant]
    return {name: value for name, value in fields.items() if name != "model_type"}


def dual_config(variant: str, shape: dict[str, Any], **view: Any) -> Any:
    """The configuration of a dual-view model of this variant."""
    return family(variant).config(**fields_of(variant, shape), **view)


def stock_twin(model: nn.Module, variant: str, shape: dict[str, Any], **more: Any) -> Any:
    """transformers' own model of this variant with the AR weights of `model`; its configuration never saw ours."""
    config = family(variant).stock_config(**fields_of(variant, shape), **more)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation).eval()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if not is_view_tensor(name)})
    return twin


@torch.no_grad()
def randomise_vectors(model: nn.Module, seed: int, std: float = 0.3) -> None:
    """Add noise to every bias and norm: an initial bias of 0 and a norm of 1 hide whoever forgets them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
