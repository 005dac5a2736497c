"""The journal: finished answers that are in no shard yet, one JSON line each, appended as they come.

A line is handed to the system whole and at once, so a killed process loses none; lines are forced to the disk in small
batches, so a machine that loses power loses the last few. A line that was cut short is recognised and dropped: its
prompt is answered again.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from orthrus.datagen.answers import Answer
from orthrus.datagen.durable import write_whole

SYNC_LINES = 32
SYNC_SECONDS = 1.0


class Journal:
    """An append-only file of answers."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        self._num_unsynced = 0
        self._synced = time.monotonic()

    def read(self) -> dict[str, bytes]:
        """The lines that stand in it whole, by prompt id, in the order they came."""
        found: dict[str, bytes] = {}
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
            if (answer := read_line(line)) is not None and line.endswith(b"\n"):
                found[answer.id] = line
        return found

    def append(self, line: bytes) -> None:
        """Add an answer's line."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if os.write(self._descriptor, line) != len(line):
            raise OSError(f"{self.path}: an answer could not be written whole; is the disk full?")
        self._num_unsynced += 1
        if self._num_unsynced >= SYNC_LINES or time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def replace(self, lines: Iterable[bytes]) -> None:
        """Keep these lines alone; without any the file is removed."""
        self.close()
        if kept := list(lines):
            write_whole(self.path, lambda file: file.writelines(kept))
        else:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Force everything to the disk and close the file; the next append opens it again."""
        if self._descriptor is not None:
            self._sync()
            os.close(self._descriptor)
            self._descriptor = None

    def _sync(self) -> None:
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        self._num_unsynced, self._synced = 0, time.monotonic()


def to_line(answer: Answer) -> bytes:
    """An answer as one line."""
    return json.dumps(dataclasses.asdict(answer), separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes) -> Answer:
    """The answer of a line."""
    return Answer(**json.loads(line))


def read_line(line: bytes) -> Answer | None:
    """The answer of a line, None for a line that was not written whole."""
    try:
        return from_line(line)
    except (ValueError, TypeError):
        return None
