"""A model's weights spread over all ranks (FSDP2), each layer's gathered while the layer runs.

`accelerate` has its own FSDP2 path; docs/architecture.md says why this one is used instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from orthrus.training.task import ViewTraining


def shard(training: ViewTraining, device: torch.device) -> None:
    """Spread all weights over the ranks, in place: a unit for each layer's step, one for what the layers share.

    The view's fp32 shards are gathered in the base's dtype; their gradients are summed in fp32.
    """
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    base = training.lm.lm_head.weight.dtype
    policy = MixedPrecisionPolicy(param_dtype=base, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for step in training.steps:
        fully_shard(step, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(training, mesh=mesh, mp_policy=policy)


class Sharded(nn.Module):
    """A sharded module as Trainer sees a DDP one: wrapped, so that nobody wraps it again.

    Unlike DDP it has no `no_sync`: gradients are shared out after every micro-batch. FSDP2 would else keep them whole
    in fp32 until the last, 4 bytes a trained parameter on every rank; sharing moves fewer bytes than gathering the
    layers, which every micro-batch does anyway.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module: Any = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self.module(*args, **kwargs)


@contextmanager
def gathered(training: nn.Module) -> Iterator[None]:
    """All weights whole on every rank for a while, for code that calls no step (decoding)."""
    units = [module for module in training.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value on the CPU; where it is spread over ranks, all of them must ask."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a full value into a tensor that may be spread over ranks (every rank has the value)."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            local = distribute_like(value, target)
            target.to_local().copy_(local)
        else:
            target.copy_(value)


def distribute_like(value: Tensor, target: DTensor) -> Tensor:
    """This rank's part of a value that every rank has."""
    size, rank = target.device_mesh.size(), target.device_mesh.get_local_rank()
    parts = torch.chunk(value, size, dim=0)
    return parts[rank].to(target.device) if rank < len(parts) else value[:0].to(target.device)
