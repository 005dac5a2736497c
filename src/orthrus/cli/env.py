"""`orthrus env`: what a bug report or a published number needs to say about this machine."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from orthrus.cli import options

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "asimd", "sve")
"""Instruction sets that decide how fast a pass is; without one of the bf16 ones, bf16 is emulated."""


def env(as_json: options.Json = False) -> None:
    """Show versions, devices and settings."""
    facts = environment()
    if as_json:
        print(json.dumps(facts), flush=True)
        return
    for name, value in facts.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name:18} {'-' if shown in (None, '') else shown}")


def environment() -> dict[str, Any]:
    """The facts, by name."""
    import huggingface_hub
    import torch

    from orthrus.cli.session import versions

    return {
        **versions(),
        "huggingface_hub": huggingface_hub.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "bundled_model": str(options.BUNDLED) if options.BUNDLED.is_dir() else None,
    }


def cpu_field(*names: str) -> str:
    """The first processor's value of the first among these /proc/cpuinfo fields, or nothing."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return cpu_field("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets of `CPU_FLAGS` that this processor has."""
    present = set(cpu_field("flags", "Features").split())
    return [flag for flag in CPU_FLAGS if flag in present]
