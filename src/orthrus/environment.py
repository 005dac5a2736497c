"""Where this process runs: versions, processor, device, commit, and the bundled model. Imports no torch until asked."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from orthrus import __version__

if TYPE_CHECKING:
    import torch

BUNDLED = Path(__file__).parent / "assets" / "tiny"
"""The model that comes with the package."""

CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "avx512f", "avx2", "asimd", "sve")
"""Instruction sets that decide how fast a pass is; without one of the bf16 ones, bf16 is emulated."""


def bundled_or(model: str | None) -> str:
    """The named checkpoint, or the bundled model for None; `ValueError` where this installation has none."""
    if model is not None and not model.strip():
        raise ValueError("--model is empty; name a checkpoint, or leave it out for the bundled model")
    if model is None and not BUNDLED.is_dir():
        raise ValueError(f"this installation has no bundled model ({BUNDLED}); name a checkpoint with --model")
    return model or str(BUNDLED)


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    import torch
    import transformers

    return {
        "orthrus": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    """The checkout's commit, with -dirty behind it when files differ, or "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def pick_device(name: str | None) -> torch.device:
    """The named device, checked to be there; CUDA where there is one when none is named."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).item()  # "meta" is a device, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def hardware_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with its cores and the instruction sets that matter."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return ", ".join([cpu_name(), f"{num_cpus()} cores", *cpu_flags()])


def num_cpus() -> int | None:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return cpu_field("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets of `CPU_FLAGS` that this processor has."""
    present = set(cpu_field("flags", "Features").split())
    return [flag for flag in CPU_FLAGS if flag in present]


def cpu_field(*names: str) -> str:
    """The first processor's value of the first of these /proc/cpuinfo fields that is there, or nothing."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
