"""The configuration of a dual-view model: its base's, plus the block it drafts and the token that masks a position."""

from transformers import Qwen3Config


class OrthrusConfig(Qwen3Config):
    """A `Qwen3Config` with the two numbers that the diffusion view needs.

    `block_size` is the number of positions drafted together, the anchor included (32 in the released checkpoints).
    `mask_token_id` stands at every position of a block but the first. In the released checkpoints it is
    len(tokenizer), an unused padded row of the embedding, which is why embeddings are never resized.

    Raises `ValueError` for a block size below 2, a mask token outside the embedding, or sliding-window layers, which
    no part of this project supports yet.
    """

    model_type = "orthrus"

    block_size: int = 32
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2 (one anchor, one draft), got {self.block_size}")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is outside the embedding of {self.vocab_size} rows; "
                "it must name an existing row (never resize the embedding)"
            )
        if "sliding_attention" in self.layer_types:
            raise ValueError("layer_types: sliding_attention layers are not supported; use a base with full attention")
