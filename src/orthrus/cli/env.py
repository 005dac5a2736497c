"""`orthrus env`: what a bug report or a published number needs to say about this machine."""

import json
import platform
from typing import Any

from orthrus.cli import options
from orthrus.environment import BUNDLED, cpu_flags, cpu_name, num_cpus, versions


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

    return {
        **versions(),
        "huggingface_hub": huggingface_hub.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": num_cpus(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "bundled_model": str(BUNDLED) if BUNDLED.is_dir() else None,
    }
