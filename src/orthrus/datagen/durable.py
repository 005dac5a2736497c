"""Files that are whole or absent: written under another name, forced to the disk, then renamed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".unfinished"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file by what `write` writes; a kill at any moment leaves the old one or the new one."""
    unfinished = path.with_name(f".{path.name}{SUFFIX}")
    with open(unfinished, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk: a rename is not there for good before that."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for path in folder.glob(f".*{SUFFIX}"):
        path.unlink()
