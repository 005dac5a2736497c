"""The processes of one run: `torchrun --nproc-per-node N -m orthrus train ...` makes N ranks, one for each GPU.

Every rank holds the whole model and its own rows; gradients are averaged before each update, so all ranks take the same
step. One process without torchrun is a run of one rank, and nothing here then does anything.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def choose_gpu() -> None:
    """Make this rank's GPU the current one. To be called before anything is put on "cuda": a process that has touched
    another's keeps half a gigabyte there."""
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return
    number, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= num_gpus:
        raise ValueError(f"torchrun started process {number + 1} here, for {num_gpus} GPUs: lower --nproc-per-node")
    torch.cuda.set_device(number)


def join_ranks(device: torch.device) -> torch.device:
    """Enter the process group that torchrun describes, if it does; the device of this rank."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        choose_gpu()
        device = torch.device("cuda", torch.cuda.current_device())
    # An hour: the others wait while rank 0 packs the data of a run.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return device


def leave_ranks() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their means over all ranks, in one exchange."""
    if num_ranks() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= num_ranks()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def agree(value: float, device: torch.device) -> float:
    """Rank 0's value on every rank: what decides when to stop must not differ between them."""
    if num_ranks() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return shared.item()


def once(work: Callable[[], None]) -> None:
    """Do it on rank 0 while the others wait."""
    if rank() == 0:
        work()
    if num_ranks() > 1:
        dist.barrier()
