"""Records of measured numbers: what was measured, on what, by which command, at which commit.

A results file is a JSON list of records. `docs/benchmarks.md` defines every name; a name never gets a second meaning.
"""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from orthrus.environment import CPU_FLAGS, commit, hardware_name, versions


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What all numbers of one run share."""

    hardware: str
    versions: dict[str, str]
    commit: str
    command: str
    date: str
    """UTC, to the second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultRecord:
    """One number with what it depends on."""

    name: str
    """As defined in docs/benchmarks.md."""
    value: float | list[float] | list[int]
    unit: str
    params: dict[str, Any]
    """What the value depends on: model, dtype, block_size, drafting, ..."""
    hardware: str
    versions: dict[str, str]
    commit: str
    command: str
    date: str

    @classmethod
    def of(cls, origin: Origin, *, name: str, value: Any, unit: str, params: dict[str, Any]) -> "ResultRecord":
        """A record of a number that was measured in a run."""
        return cls(name=name, value=value, unit=unit, params=params, **asdict(origin))


def here_and_now(device: torch.device) -> Origin:
    """The origin of numbers measured by this process on this device."""
    return Origin(
        hardware=hardware_name(device),
        versions=versions(),
        commit=commit(),
        command=command_line(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def model_name(source: str) -> str:
    """The name that records carry: a folder's own, a Hub id in full."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def command_line() -> str:
    """The command that runs this process, with the module's name in place of its file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def to_json(records: Sequence[ResultRecord], *, indent: int | None = None) -> str:
    """The JSON list; a value that is no number (NaN, infinity) is an error."""
    return json.dumps([asdict(record) for record in records], allow_nan=False, indent=indent)


def read_records(path: Path | str) -> list[ResultRecord]:
    """The records of a results file; `ValueError` names a record whose fields are not the right ones."""
    records = []
    for number, fields in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))):
        try:
            records.append(ResultRecord(**fields))
        except TypeError as error:
            raise ValueError(f"{path}, record {number}: {error}") from None
    return records


def check_writable(out: Path) -> None:
    """`ValueError` where `write_records` could not write to `out`, to be known before hours are measured.

    Tries it: permissions alone do not tell a read-only folder, or one of the system's own. Leaves nothing behind.
    """
    is_file = out.suffix == ".json"
    try:
        if is_file and out.exists():
            out.open("ab").close()
        else:
            folders = out.parents if is_file else (out, *out.parents)
            TemporaryFile(dir=next(folder for folder in folders if folder.exists())).close()
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None


def write_records(records: Sequence[ResultRecord], out: Path, *, theme: str) -> Path:
    """Write a results file: `out` itself when it ends in .json, else <theme>_<hardware>_<date>.json in that folder."""
    path = out if out.suffix == ".json" else out / results_name(records[0], theme=theme)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(records, indent=1) + "\n", encoding="utf-8")
    return path


def results_name(record: ResultRecord, *, theme: str) -> str:
    """<theme>_<hardware>_<date>.json, the hardware without its instruction sets."""
    hardware = ", ".join(part for part in record.hardware.split(", ") if part not in CPU_FLAGS)
    return "_".join([*(slug(part) for part in (theme, hardware)), record.date[:10]]) + ".json"


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
