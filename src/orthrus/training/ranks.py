"""The processes of one run: `torchrun --nproc-per-node N -m orthrus train ...` makes N ranks, one for each GPU.

Every rank holds the whole model and its own rows; gradients are averaged before each update, so all ranks take the same
step. One process without torchrun is a run of one rank, and nothing here then does anything.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

POLL_SECONDS = 0.1
"""Between two looks for the end of what rank 0 does for all."""
READ_SECONDS = 20.0
"""So long a failing rank 0 stays, for the others to read why."""


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
    # An hour: ranks load and decode at their own pace, and meet behind it.
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


def once(work: Callable[[], Any]) -> Any:
    """Do it on rank 0 while the others wait, however long it takes; where it fails, all ranks end.

    Its result (something that JSON holds) is every rank's. Rank 0 raises what the work raised, the others a
    `RuntimeError` with its message.
    """
    if num_ranks() == 1:
        return work()
    # Through the group's store, not a collective: those have a time limit, and packing may take longer.
    store = _get_default_store()
    if rank() > 0:
        word = take(store, f"once/{rank()}")
        if "failure" in word:
            raise RuntimeError(f"rank 0 failed: {word['failure']}")
        result = word["result"]
    else:
        try:
            result = work()
        except BaseException as error:
            tell(store, {"failure": f"{type(error).__name__}: {error}"})
            raise
        tell(store, {"result": result})
    dist.barrier()
    return result


def tell(store: dist.Store, word: dict[str, Any]) -> None:
    """Leave every other rank a word on how rank 0's work ended; behind a failure, wait until they have read it.

    The store may live in this process, and end with it.
    """
    names = [f"once/{number}" for number in range(1, num_ranks())]
    for name in names:
        store.set(name, json.dumps(word))
    deadline = time.monotonic() + READ_SECONDS
    while "failure" in word and time.monotonic() < deadline and any(store.check([name]) for name in names):
        time.sleep(POLL_SECONDS)


def take(store: dist.Store, name: str) -> dict[str, Any]:
    """Wait for rank 0's word and take it away, so that the next work's is not taken for it."""
    while not store.check([name]):
        time.sleep(POLL_SECONDS)
    word = json.loads(store.get(name))
    store.delete_key(name)
    return word


def from_all(value: str) -> list[str]:
    """Every rank's text, in the order of ranks, on every rank."""
    values = [value]
    if num_ranks() > 1:
        values = [""] * num_ranks()
        dist.all_gather_object(values, value)
    return values
