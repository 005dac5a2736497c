"""The manifest: what a folder of answers was made from and with, and the refusal to go on with anything else."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from orthrus import __version__
from orthrus.datagen.durable import write_whole

NAME = "manifest.json"
FORMAT = "orthrus-datagen-1"
PACKAGES = ("datasets", "pyarrow", "httpx2", "torch", "transformers")


def write_manifest(folder: Path, *, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the manifest; `settings` are what a later run must agree with."""
    document = {"format": FORMAT, "settings": settings, "versions": installed_versions(), **facts}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / NAME, lambda file: file.write(text.encode()))


def check_manifest(folder: Path, settings: dict[str, Any], *, has_answers: bool) -> None:
    """Refuse a folder that holds something else, or answers made with other settings, naming the first difference.

    Settings that no answer was made with bind nobody: a misspelt model's name can simply be given again.
    """
    path = folder / NAME
    if not path.exists():
        strange = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        if strange:
            raise ValueError(f"{folder} is not empty and holds no {NAME}: name a new folder")
        return
    try:
        document = json.loads(path.read_bytes())
        begun = document["settings"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if document.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {document.get('format')!r}, this version writes {FORMAT}")
    if not has_answers:
        return
    given = json.loads(json.dumps(settings))
    for name in [*settings, *(name for name in begun if name not in settings)]:
        if begun.get(name) != given.get(name):
            raise ValueError(
                f"{folder} was begun with {name} {shown(begun.get(name))}, this run has {shown(given.get(name))}: "
                "repeat that setting, or name a new folder"
            )


def shown(value: Any) -> str:
    """A setting's value as messages show it."""
    return json.dumps(value, ensure_ascii=False)


def installed_versions() -> dict[str, str]:
    """Versions of what a run may depend on, without importing any of it."""
    found = {"orthrus": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
