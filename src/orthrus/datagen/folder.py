"""A run's folder: which prompts are answered, and every answer in exactly one place that survives a kill.

    part-00000.parquet ...   shards, each complete but for prompts that failed (`shards.py`)
    journal.jsonl            finished answers whose shard is not complete yet (`journal.py`)
    failed.jsonl             prompts that were given up, with the reason; the next run tries them again
    manifest.json            what all this was made from and with (`manifest.py`)
    STOP                     put there by the user: finish what is in flight, then leave

An answer goes to the journal first; when all prompts of its shard are settled (answered, or given up) the shard is
written, and only then its answers leave the journal. A kill in between leaves them in both, and the shard counts.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orthrus.datagen.answers import Answer, Failure
from orthrus.datagen.durable import remove_unfinished, write_whole
from orthrus.datagen.journal import Journal, from_line, to_line
from orthrus.datagen.manifest import check_manifest, write_manifest
from orthrus.datagen.prompts import Prompt
from orthrus.datagen.shards import read_ids, shard_path, write_shard


class AnswerFolder:
    """The folder while a run writes it; a context manager that holds its lock.

    `settings` are what every run over this folder must agree on, `facts` what the manifest says besides.
    """

    def __init__(
        self, path: Path, prompts: list[Prompt], *, shard_size: int, settings: dict[str, Any], facts: dict[str, Any]
    ):
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        self.path = path
        self.prompts = prompts
        self._shard_size = shard_size
        self._settings = settings
        self._facts = facts
        self._lock = FileLock(path / ".lock")
        self._journal = Journal(path / "journal.jsonl")
        self._places = {prompt.id: place for place, prompt in enumerate(prompts)}
        self._answered = bytearray(len(prompts))
        self._failed: dict[str, dict[str, Any]] = {}
        self._open: dict[int, dict[int, bytes]] = {}
        """Answers in no shard yet, by shard and place, as the journal's lines: objects take several times as much."""
        self._num_unsettled: list[int] = []
        """Prompts of each shard that are neither answered nor given up by this run."""

    def __enter__(self) -> "AnswerFolder":
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; name a folder to write")
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(f"another run is writing {self.path}; wait for it, or name another folder") from None
        try:
            self._restore()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._journal.close()
            self._write_failed()
            self._write_manifest()
        finally:
            self._lock.release()

    @property
    def stop_file(self) -> Path:
        """The file that asks a run to end."""
        return self.path / "STOP"

    @property
    def num_answered(self) -> int:
        """Prompts with an answer, in shards and journal."""
        return self._answered.count(1)

    @property
    def num_failed(self) -> int:
        """Prompts that were given up and have no answer yet."""
        return len(self._failed)

    def pending(self) -> Iterator[Prompt]:
        """Prompts without an answer; those that an earlier run gave up come last, for they may fail again."""
        given_up = set(self._failed)
        todo = [prompt for place, prompt in enumerate(self.prompts) if not self._answered[place]]
        yield from (prompt for prompt in todo if prompt.id not in given_up)
        yield from (prompt for prompt in todo if prompt.id in given_up)

    def enter(self, result: Answer | Failure) -> None:
        """Keep an answer, or note a failure; a shard that this completes is written."""
        place = self._places[result.id]
        shard = place // self._shard_size
        assert not self._answered[place], f"prompt {result.id} is answered already"
        if isinstance(result, Answer):
            line = to_line(result)
            self._journal.append(line)
            self._keep(place, line)
            self._failed.pop(result.id, None)
        else:
            self._note_failure(result)
        self._num_unsettled[shard] -= 1
        if self._num_unsettled[shard] == 0 and shard in self._open:
            self._seal(shard)

    # What a run finds

    def _restore(self) -> None:
        journal = self._journal.read()
        has_answers = bool(journal) or any(self.path.glob("part-*.parquet"))
        check_manifest(self.path, self._settings, has_answers=has_answers)
        remove_unfinished(self.path)
        if not has_answers:  # before any answer, so that a folder with answers always has one
            self._write_manifest()
        num_shards = -(-len(self.prompts) // self._shard_size)
        for shard in range(num_shards):
            if (path := shard_path(self.path, shard)).exists():
                self._count_shard(path, shard)
        for id_, line in journal.items():
            place = self._places.get(id_)
            if place is not None and not self._answered[place]:
                self._keep(place, line)
        self._journal.replace(self._open_lines())
        self._failed = self._read_failed()
        size = self._shard_size
        self._num_unsettled = [self._answered.count(0, shard * size, (shard + 1) * size) for shard in range(num_shards)]
        for shard in [shard for shard in self._open if self._num_unsettled[shard] == 0]:
            self._seal(shard)

    def _count_shard(self, path: Path, shard: int) -> None:
        for id_ in read_ids(path):
            place = self._places.get(id_)
            if place is None or place // self._shard_size != shard:
                raise ValueError(f"{path} holds prompt {id_}, which does not belong there: name a new folder")
            self._answered[place] = 1

    def _read_failed(self) -> dict[str, dict[str, Any]]:
        path, found = self.path / "failed.jsonl", {}
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with suppress(ValueError, TypeError, KeyError):  # a line that a kill cut short
                entry = json.loads(line)
                place = self._places.get(entry["id"])
                if place is not None and not self._answered[place]:
                    found[entry["id"]] = entry
        return found

    # What a run leaves

    def _keep(self, place: int, line: bytes) -> None:
        self._answered[place] = 1
        self._open.setdefault(place // self._shard_size, {})[place] = line

    def _open_lines(self) -> Iterator[bytes]:
        for lines in self._open.values():
            yield from lines.values()

    def _seal(self, shard: int) -> None:
        answers = [(self.prompts[place], from_line(line)) for place, line in self._open[shard].items()]
        write_shard(shard_path(self.path, shard), answers)
        del self._open[shard]
        self._journal.replace(self._open_lines())
        self._write_manifest()

    def _note_failure(self, failure: Failure) -> None:
        entry = dataclasses.asdict(failure) | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        self._failed[failure.id] = entry
        with open(self.path / "failed.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def _write_failed(self) -> None:
        path = self.path / "failed.jsonl"
        if self._failed:
            lines = [json.dumps(self._failed[id_]) + "\n" for id_ in sorted(self._failed)]
            write_whole(path, lambda file: file.write("".join(lines).encode()))
        elif path.exists():
            os.unlink(path)

    def _write_manifest(self) -> None:
        counts = {
            "prompts": len(self.prompts),
            "answered": self.num_answered,
            "failed": self.num_failed,
            "shards": len(list(self.path.glob("part-*.parquet"))),
            "answers_in_journal": sum(map(len, self._open.values())),
        }
        write_manifest(self.path, settings=self._settings, facts=self._facts | {"counts": counts})
