"""Small random models that every test module may ask for."""

import pytest
import torch

from orthrus.config import OrthrusConfig


@pytest.fixture(scope="session")
def tiny_config() -> OrthrusConfig:
    """A two-layer dual-view configuration that any test can afford."""
    return OrthrusConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True,
        block_size=8, mask_token_id=96, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
