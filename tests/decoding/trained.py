"""A model that counts (next = last + step, modulo 23), with a view trained for some seconds to draft it."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthrus.config import OrthrusConfig
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.model.attention import causal_attend, run_layers
from orthrus.model.modeling import is_view_tensor
from tests.decoding.subjects import randomise

MODULUS = 23
BLOCK = 5
LENGTH = 40


def counting(num_rows: int, length: int) -> Tensor:
    """Random rows that count by 1, 2 or 3."""
    start, step = torch.randint(0, MODULUS, (num_rows, 1)), torch.randint(1, 4, (num_rows, 1))
    return (start + step * torch.arange(length)) % MODULUS


@cache
def trained_subject() -> OrthrusForCausalLM:
    """The base learns to count, then its view learns to draft what follows a random anchor."""
    torch.manual_seed(0)
    config = OrthrusConfig(
        vocab_size=MODULUS + 1, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=256, tie_word_embeddings=False, block_size=BLOCK,
        mask_token_id=MODULUS, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = OrthrusForCausalLM(config)
    randomise(model, seed=0, std=0.3)
    base = [parameter for name, parameter in model.named_parameters() if not is_view_tensor(name)]
    optimise(base, 250, lambda: base_loss(model))
    model.init_view()
    optimise(list(model.view_parameters().values()), 700, lambda: view_loss(model))
    return model.eval()


def optimise(parameters: list[nn.Parameter], num_steps: int, loss) -> None:
    optimiser = torch.optim.Adam(parameters, 3e-3)
    for _ in range(num_steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def base_loss(model: OrthrusForCausalLM) -> Tensor:
    ids = counting(16, LENGTH)
    positions = torch.arange(LENGTH).expand(16, -1)
    logits = model.logits(run_layers(model.model, ids, positions, causal_attend, "ar"))
    return F.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())


def view_loss(model: OrthrusForCausalLM) -> Tensor:
    ids = counting(32, LENGTH)
    anchor = int(torch.randint(3, LENGTH - BLOCK, ()))
    prefix: list[tuple[Tensor, Tensor]] = []

    def read_prefix(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prefix.append((k, v))
        return causal_attend(attention, q, k, v)

    def read_block(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = prefix[attention.layer_idx]
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        mixed = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True, scale=attention.scaling)
        return mixed.transpose(1, 2).flatten(2)

    with torch.no_grad():
        run_layers(model.model, ids[:, :anchor], torch.arange(anchor).expand(32, -1), read_prefix, "ar")
    block = torch.full((32, BLOCK), MODULUS)
    block[:, 0] = ids[:, anchor]
    positions = torch.arange(anchor, anchor + BLOCK).expand(32, -1)
    logits = model.logits(run_layers(model.model, block, positions, read_block, "diffusion"))[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, anchor + 1 : anchor + BLOCK].flatten())
