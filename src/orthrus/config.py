"""The configuration of a dual-view model: its base's, plus the block it drafts and the token that masks a position.

One class for each family of bases: what stands in the other fields, and what an absent one means, is the family's own.
"""

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Rotary embeddings in which a position's angles are the same in every pass; those of `dynamic` are up to the end of
the model's context."""


@dataclass(kw_only=True, init=False)  # the configuration class that it stands in front of makes the one __init__
class ViewFields:
    """The two numbers that the diffusion view needs, in front of a base's configuration class.

    `block_size` is the number of positions drafted together, the anchor included (32 in the released checkpoints).
    `mask_token_id` stands at every position of a block but the first. In the released checkpoints it is
    len(tokenizer), an unused padded row of the embedding, which is why embeddings are never resized.

    Raises `ValueError` for a block size below 2, a mask token outside the embedding, and what no part of this project
    supports: layers without full attention, rotary embeddings that differ from pass to pass.
    """

    block_size: int = 32
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        base: Any = super()
        base.__post_init__(**kwargs)
        config: Any = self
        if getattr(config, "head_dim", None) is None:  # Qwen2 has no such field, and its heads have always this width
            config.head_dim = config.hidden_size // config.num_attention_heads
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2 (one anchor, one draft), got {self.block_size}")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < config.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is outside the embedding of {config.vocab_size} rows; "
                "it must name an existing row (never resize the embedding)"
            )
        check_layers(config)


def check_layers(config: PreTrainedConfig) -> None:
    """`ValueError` naming the field that gives a layer something else than full attention and fixed rotary angles."""
    layer_types = getattr(config, "layer_types", None)
    if strange := sorted(set(layer_types or ()) - {"full_attention"}):
        raise ValueError(
            f"layer_types: {', '.join(strange)} layers (sliding_window, use_sliding_window) are not supported; "
            "use a base with full attention"
        )
    # Where there are layer_types they decide, and a window beside them means nothing; Mistral's layers never ask them.
    window = getattr(config, "sliding_window", None)
    if window is not None and (layer_types is None or isinstance(config, MistralConfig)):
        raise ValueError(
            f"sliding_window={window}: sliding-window layers are not supported; use a base with full attention"
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"rope_parameters: rope_type {rope_type!r} is not supported, only {', '.join(ROPE_TYPES)}: "
            "a block's pass would turn positions by other angles than passes of one token do"
        )


class OrthrusConfig(ViewFields, Qwen3Config):
    """A `Qwen3Config` with the fields of the view."""

    model_type = "orthrus"


class OrthrusQwen2Config(ViewFields, Qwen2Config):
    """A `Qwen2Config` (Qwen2 and Qwen2.5) with the fields of the view."""

    model_type = "orthrus_qwen2"

    head_dim: int | None = None


class OrthrusLlamaConfig(ViewFields, LlamaConfig):
    """A `LlamaConfig` (Llama, SmolLM, SmolLM2) with the fields of the view."""

    model_type = "orthrus_llama"


class OrthrusMistralConfig(ViewFields, MistralConfig):
    """A `MistralConfig` with the fields of the view; no sliding window unless one is given, which is then refused."""

    model_type = "orthrus_mistral"

    sliding_window: int | None = None
