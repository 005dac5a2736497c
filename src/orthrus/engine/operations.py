"""Who computes a pass: the kernels on a GPU, their slow twins elsewhere. The one place that decides.

The kernels give a row the same bits whatever else is in the pass, the twins do so only up to rounding: a CPU's products
sum in an order that depends on the number of rows.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.engine import reference

KERNEL_FILES = {
    "rms_norm": "norm",
    "linear": "linear",
    "linear_and_norm": "linear",
    "swiglu": "linear",
    "head_argmax": "head",
    "project_heads": "place",
    "attend": "attention",
    "gumbel": "noise",
}
"""The module of `engine/kernels` that holds each operation."""


class Ops(NamedTuple):
    """The operations of a pass; contracts in `engine/reference.py`."""

    rms_norm: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    linear_and_norm: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]
    head_argmax: Callable[..., Tensor]
    project_heads: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    gumbel: Callable[..., Tensor]


def choose_ops(device: torch.device) -> Ops:
    """The kernels on CUDA, the twins on any other device."""
    return kernel_ops() if device.type == "cuda" else reference_ops()


def reference_ops() -> Ops:
    """The twins in plain torch."""
    return Ops(**{name: getattr(reference, name) for name in KERNEL_FILES})


def kernel_ops() -> Ops:
    """The kernels; imported here, because Triton is not there without a GPU or a developer's environment."""
    modules = {file: import_module(f"orthrus.engine.kernels.{file}") for file in set(KERNEL_FILES.values())}
    return Ops(**{name: getattr(modules[file], name) for name, file in KERNEL_FILES.items()})
