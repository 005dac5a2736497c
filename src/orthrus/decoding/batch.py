"""Prompts decoded greedily in batches, for what drafting did with each: how well a view drafts, not how fast.

B = rows of a batch
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import Stopping

MAX_ROWS = 16
"""Rows of a batch: a cycle's logits are B x block_size x vocabulary numbers, 0.3 GB in fp32 for Qwen3 and 32."""
MAX_SLOTS = 8192
"""Slots of a batch's cache, its longest row times B: 1.2 GB for Qwen3-8B in bf16. A longer row is alone."""
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention on a GPU without cuDNN's kernel, which plans anew for each length."""


@torch.no_grad()
def draft_greedily(
    model: Any, prompts: Sequence[Sequence[int]], *, block_size: int, max_new_tokens: int, eos: frozenset[int]
) -> list[DecodingStats]:
    """What greedy drafting of each prompt took, in the prompts' order; the same as one by one, up to rounding.

    Raises `ValueError` for an empty prompt, or one that fills the model's context.
    """
    stopping, found = Stopping(max_new_tokens=max_new_tokens, eos_token_ids=eos), {}
    num_slots = [len(prompt) + max_new_tokens + block_size for prompt in prompts]
    for batch in batches(num_slots):
        # Not exact: near-ties between a pass of one row and one of many do not matter to how well a view drafts.
        backend = PortableBackend(model, exact=False)
        backend.cache.reserve(max(num_slots[i] for i in batch))  # at once, or it doubles when it grows
        decoder = Decoder(backend, block_size=block_size)
        with sdpa_kernel(KERNELS):
            rows = [decoder.admit(Request(prompt_ids=prompts[i], stopping=stopping)).row for i in batch]
            while decoder.active:
                decoder.step()
        found |= {i: decoder.stats(row) for i, row in zip(batch, rows, strict=True)}
    return [found[i] for i in range(len(prompts))]


def batches(num_slots: Sequence[int]) -> Iterator[list[int]]:
    """The places of rows that need so many slots, longest first, in batches within `MAX_ROWS` and `MAX_SLOTS`."""
    left = sorted(range(len(num_slots)), key=lambda i: -num_slots[i])
    while left:
        size = max(1, min(MAX_ROWS, MAX_SLOTS // num_slots[left[0]]))
        yield left[:size]
        left = left[size:]
