"""Prompts: where they come from, what identifies one, and the order they are answered in.

A prompt is a conversation whose next turn is the model's, or a plain text to continue. It is identified by the SHA-256
of its canonical JSON, and prompts are answered in the order of these hashes: any first n of them are a random sample,
and every run over the same source agrees on who is the n-th.
"""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

FIELDS = ("messages", "prompt", "text")
"""Where a row's prompt stands; the first of these columns that the source has is read."""
KINDS = {".parquet": "parquet", ".jsonl": "json"}
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, kept as its canonical JSON: a list of messages, or a string of plain text."""

    id: str
    canonical: str

    @classmethod
    def of(cls, content: list[dict[str, str]] | str) -> "Prompt":
        """The prompt of a conversation or of a plain text."""
        canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return cls(id=hashlib.sha256(canonical.encode()).hexdigest(), canonical=canonical)

    @property
    def messages(self) -> list[dict[str, str]] | None:
        """The conversation up to the model's turn; None for plain text."""
        content = json.loads(self.canonical)
        return content if isinstance(content, list) else None

    @property
    def text(self) -> str | None:
        """The text to continue; None for a conversation."""
        content = json.loads(self.canonical)
        return content if isinstance(content, str) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSource:
    """Which prompts are read."""

    source: str
    """A .parquet or .jsonl file, a folder or a pattern of such files, or a data set's id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    config: str | None = None
    """Configuration of a Hub data set."""
    split: str | None = None
    """Split of a Hub data set; None is "train"."""
    system: str | None = None
    """System message for conversations that have none."""
    max_prompts: int | None = None
    """Keep the first so many in the order of hashes."""

    def __post_init__(self):
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts must be at least 1, got {self.max_prompts}")
        if self.system is not None and not self.system.strip():
            raise ValueError("system is empty; give some text, or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """What was read: prompts without duplicates in the order of their hashes, and what became of the other rows."""

    prompts: list[Prompt]
    field: str
    """The column they were read from."""
    num_rows: int
    num_duplicates: int
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows without a usable prompt, by reason."""
    commit: str | None = None
    """Commit of a Hub data set, where the Hub said it."""

    @property
    def digest(self) -> str:
        """One hash over all ids in their order."""
        return hashlib.sha256("\n".join(prompt.id for prompt in self.prompts).encode()).hexdigest()


class Unusable(Exception):
    """A row has no usable prompt; the message is the reason it is counted under."""


def read_prompts(source: PromptSource) -> PromptSet:
    """All prompts of a source; `ValueError` where it cannot be read or holds none."""
    files = local_files(source.source)
    for name in ("revision", "config", "split"):
        if files and getattr(source, name) is not None:
            raise ValueError(f"{name} names a part of a Hub data set, but {source.source} is local")
    commit = None if files else hub_commit(source)
    rows = read_rows(source, files, commit)
    found = gather(rows, system=source.system, max_prompts=source.max_prompts, where=source.source)
    return replace(found, commit=commit)


def read_rows(source: PromptSource, files: list[Path] | None, commit: str | None) -> Iterator[Mapping[str, Any]]:
    """The rows of local files, or of a Hub data set at the commit that was found for it."""
    try:
        yield from open_dataset(source, files, commit)
    except StopIteration:  # what an empty file gives; in a generator it would be an error of its own
        raise ValueError(f"{source.source}: there are no rows in it") from None
    except Exception as error:  # whatever the library's readers raise, the file or the data set is what is wrong
        cause = error.__cause__ or error
        where = "" if files else " (no file or folder here, so taken for a data set on the Hub)"
        raise ValueError(f"{source.source}{where}: prompts cannot be read: {type(cause).__name__}: {cause}") from error


def open_dataset(source: PromptSource, files: list[Path] | None, commit: str | None) -> Any:
    """What `datasets` makes of local files or of a Hub id."""
    if files:
        # Streamed: the files are here already, and a copy of them in the library's cache would serve nobody.
        names = [str(file) for file in files]
        return datasets.load_dataset(KINDS[files[0].suffix], data_files=names, split="train", streaming=True)
    return datasets.load_dataset(
        source.source, source.config, revision=commit or source.revision, split=source.split or "train"
    )


def hub_commit(source: PromptSource) -> str | None:
    """The commit that a Hub data set's revision stands for; None where the Hub cannot be asked."""
    try:
        return huggingface_hub.HfApi().dataset_info(source.source, revision=source.revision).sha
    except Exception:  # no network, an offline mode, no such id: reading it may still succeed, and else says why
        return None


def local_files(source: str) -> list[Path] | None:
    """The Parquet or JSONL files that a path, folder or pattern names; None where it is a Hub id instead."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for suffix in KINDS for file in path.rglob(f"*{suffix}"))
    elif path.is_file():
        files = [path]
    else:
        files = sorted(map(Path, glob.glob(str(path), recursive=True)))
        is_pattern = glob.has_magic(source)
        if not files and not is_pattern and path.suffix not in KINDS and not source.startswith((".", "/", "~")):
            return None
    if not files:
        raise FileNotFoundError(f"{source}: no .parquet or .jsonl file there")
    suffixes = {file.suffix for file in files}
    if unknown := sorted(suffixes - set(KINDS)):
        raise ValueError(f"{source}: {unknown[0] or 'no ending'} is not read; give .parquet or .jsonl files")
    if len(suffixes) > 1:
        raise ValueError(f"{source} holds .parquet and .jsonl files; name one kind with a pattern")
    return files


def gather(rows: Iterable[Mapping[str, Any]], *, system: str | None, max_prompts: int | None, where: str) -> PromptSet:
    """Prompts of rows, without duplicates, in the order of their hashes."""
    column, num_rows = None, 0
    found: dict[str, Prompt] = {}
    dropped: Counter[str] = Counter()
    num_duplicates = 0
    for row in rows:
        num_rows += 1
        column = column or pick_column(row, system=system, where=where)
        try:
            prompt = Prompt.of(read_content(row.get(column), column, system))
        except Unusable as reason:
            dropped[str(reason)] += 1
            continue
        num_duplicates += prompt.id in found
        found.setdefault(prompt.id, prompt)
    if not found or column is None:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items())
        raise ValueError(f"{where} holds no prompt ({num_rows} rows{': ' + reasons if reasons else ''})")
    prompts = [found[id_] for id_ in sorted(found)]
    return PromptSet(
        prompts=prompts[:max_prompts],
        field=column,
        num_rows=num_rows,
        num_duplicates=num_duplicates,
        dropped=dict(sorted(dropped.items())),
    )


def pick_column(row: Mapping[str, Any], *, system: str | None, where: str) -> str:
    """The column that holds the prompts."""
    column = next((name for name in FIELDS if name in row), None)
    if column is None:
        raise ValueError(f"{where}: rows have none of the columns {', '.join(FIELDS)}, only {', '.join(row)}")
    if column == "text" and system is not None:
        raise ValueError(f"{where}: a system message needs conversations, and its column `text` is plain text")
    return column


def read_content(value: Any, column: str, system: str | None) -> list[dict[str, str]] | str:
    """A row's prompt: the messages up to the model's turn, or the text to continue."""
    if column == "text":
        if not isinstance(value, str) or not value:
            raise Unusable("empty or not text")
        return value
    if column == "prompt" and isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise Unusable("not a list of messages")
    messages = list(plain_messages(value))
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise Unusable("no user's turn to answer")
    if not messages[-1]["content"].strip():
        raise Unusable("the turn to answer is empty")
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def plain_messages(messages: list[Any]) -> Iterator[dict[str, str]]:
    """Messages of role and content alone; what is more than text cannot be kept, so it is not accepted."""
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise Unusable("a message without a known role")
        if not isinstance(message.get("content"), str):
            raise Unusable("a message whose content is not text")
        # Tables give every message every column: what is None or empty is not there.
        if any(value for name, value in message.items() if name not in ("role", "content")):
            raise Unusable("a message with more than role and content, such as tool calls")
        yield {"role": message["role"], "content": message["content"]}
