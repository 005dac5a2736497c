"""Where an artefact came from: commit, versions, command, recipe and data, kept beside it as provenance.json."""

import dataclasses
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from orthrus.training.recipe import Recipe


def provenance(recipe: Recipe, **facts: Any) -> dict[str, Any]:
    """What is known here and now about a run of this recipe, plus the run's own facts."""
    return {
        "commit": commit(),
        "command": sys.argv,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": dataclasses.asdict(recipe),
        "recipe_digest": recipe.digest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        **facts,
    }


def commit() -> str:
    """The checkout's commit, with -dirty behind it when files differ, or "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_provenance(folder: Path, facts: dict[str, Any]) -> None:
    """Write provenance.json into a checkpoint folder."""
    (folder / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n")
