"""Kernels of a pass that begin while the one before them still runs: programmatic dependent launch, from Hopper on.

A kernel says at once that the next may begin (`let_next`), and waits for the last before it reads what that wrote or
writes anything itself (`wait`). Between the two it may only ask for what no kernel writes: weights, into the L2 cache.
Every program of every kernel waits, or a later kernel would not know that an earlier one is done.
"""

# pyrefly: ignore-errors
# Triton's language has Python's grammar and types of its own.

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def overlap(x: Tensor) -> dict[str, bool]:
    """The arguments of a kernel's launch that say whether it overlaps, on the device where `x` is."""
    return dict(HOPPER=True, launch_pdl=True) if x.is_cuda and _has_overlap(x.device) else dict(HOPPER=False)


@cache
def _has_overlap(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def let_next(HOPPER: tl.constexpr):
    """The next kernel may begin."""
    if HOPPER:
        gdc_launch_dependents()


@triton.jit
def wait(HOPPER: tl.constexpr):
    """What the kernels before this one wrote is there, and nobody reads what this one will write over."""
    if HOPPER:
        gdc_wait()


@triton.jit
def follow(HOPPER: tl.constexpr):
    """Both, for a kernel that has nothing to do ahead."""
    let_next(HOPPER)
    wait(HOPPER)


@triton.jit
def fetch_rows(rows, num_bytes, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Ask for the first PIECES * PIECE of `num_bytes` bytes that lie at each of these addresses. int64 [E]."""
    at = tl.arange(0, PIECES) * PIECE
    size = tl.minimum(tl.maximum(num_bytes - at, 0), PIECE)[None, :] + (rows * 0).to(tl.int32)[:, None]
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.ne.u32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [rows[:, None] + at[None, :], size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
