"""Where an artefact came from: commit, versions, command, recipe and data, kept beside it as provenance.json."""

import dataclasses
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orthrus.environment import commit, hardware_name, pick_device, versions


def provenance(recipe: Any, **facts: Any) -> dict[str, Any]:
    """What is known here and now about a run of this recipe, plus the run's own facts."""
    return {
        "commit": commit(),
        "command": sys.argv,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": dataclasses.asdict(recipe),
        "recipe_digest": recipe.digest(),
        "versions": versions(),
        "hardware": hardware_name(pick_device(None)),
        **facts,
    }


def write_provenance(folder: Path, facts: dict[str, Any]) -> None:
    """Write provenance.json into a checkpoint folder."""
    (folder / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n")
