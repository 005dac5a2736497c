"""Gumbel noise of sampled rows: the integers of `decoding/sampling.py` in one kernel, not in thirty over [B, T, V].

The numbers under the logarithms are made of 32-bit integers and exact steps, so they are torch's to the bit; the two
logarithms are taken by torch itself.

B = rows, T = positions, V = vocabulary
"""

# pyrefly: ignore-errors
# Triton's language has Python's grammar and types of its own.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus.decoding.sampling import GUMBEL, position_keys

BLOCK = 1024
"""Tokens of a program."""


@triton.jit
def _mix(x):
    """The `lowbias32` finaliser."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _uniforms(KEYS, OUT, num_tokens, BLOCK: tl.constexpr):
    """The uniforms of one position's tokens."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(KEYS + row).to(tl.uint64, bitcast=True)
    bits = tokens.to(tl.uint32) * 0x9E3779B1
    bits = _mix(_mix(bits ^ key.to(tl.uint32)) + (key >> 32).to(tl.uint32))
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    tl.store(OUT + row * num_tokens + tokens, u, mask=tokens < num_tokens)


def gumbel(seeds_B: Tensor, positions_BT: Tensor, num_tokens: int) -> Tensor:
    """Gumbel noise of every token at every position, float32 [B, T, V]."""
    keys_BT = position_keys(seeds_B, positions_BT, GUMBEL).contiguous()
    u = torch.empty(*keys_BT.shape, num_tokens, device=keys_BT.device)
    kernel: Any = _uniforms
    if keys_BT.numel():
        kernel[(keys_BT.numel(), triton.cdiv(num_tokens, BLOCK))](keys_BT, u, num_tokens, BLOCK=BLOCK)
    return u.neg_().log1p_().neg_().log_().neg_()
