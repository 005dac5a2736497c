"""Kernels of a pass that begin while the one before them still runs: programmatic dependent launch, from Hopper on.

A kernel says at once that the next may begin (`let_next`), and waits for the last before it reads what that wrote or
writes anything itself (`wait`). Between the two it may read what no kernel of a pass writes: weights of norms, lengths
and tables. Every program of every kernel waits, or a later kernel would not know that an earlier one is done.
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
    return dict(HOPPER=True, launch_pdl=True) if is_hopper(x.device) else dict(HOPPER=False)


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device is a GPU of NVIDIA's from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


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
