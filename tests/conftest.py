"""Small random models that every test module may ask for."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, which reads it when kernels are defined: a CPU runs them in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from orthrus.config import OrthrusConfig  # noqa: E402


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
