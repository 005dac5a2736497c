"""Documents for training, read from what people have: the base's own answers, conversations, or plain text.

A source is a set of local Parquet or JSONL files, or a data set on the Hub. Its columns decide how a row of it becomes
documents:

    prompt_ids, response_ids   what `orthrus datagen` writes: the reply is the response, token for token
    messages                   a conversation, through the base's chat template: the replies are the assistant's turns
    text                       a text that stands alone: all of it is the reply
"""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orthrus.training.conversations import ConversationEncoder

KINDS = {".parquet": "parquet", ".jsonl": "json"}
"""File endings that are read, and `datasets`' word for each."""
LAYOUTS = (("prompt_ids", "response_ids"), ("messages",), ("text",))
"""The columns of each layout; the first that a source has is taken."""
MANIFEST = "manifest.json"
"""In a folder that `orthrus datagen` writes."""
NO_ANSWERS = ("journal.jsonl", "failed.jsonl")
"""Beside a manifest: answers whose shard is not complete, and prompts without one."""
MAX_ROW_TOKENS = 2**15 - 1
"""Documents and replies of a row are numbered in 16 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Which data a view is trained on, and how it is put into rows."""

    source: str
    """A .parquet or .jsonl file, a folder of such files, a pattern of them (DATA/part-*.parquet), or the id of a data
    set on the Hub."""
    revision: str | None = None
    """Commit, tag or branch of a data set on the Hub; null: its newest."""
    config: str | None = None
    """Configuration of a data set on the Hub that has several."""
    split: str | None = None
    """Split of a data set on the Hub; null: train."""
    row_tokens: int = 2048
    """Tokens of a row; as published."""
    packing: Literal["isolated", "concatenated"] = "isolated"
    """isolated: documents of a row do not see one another, and positions count from 0 in each. concatenated: a row is
    one document, whatever was put into it; as published."""
    anchors: Literal["assistant", "all"] = "assistant"
    """Where blocks may start, and what they may be asked for: the replies, or every token (as published)."""
    long_documents: Literal["cut", "drop"] = "cut"
    """What happens to a document that is longer than a row."""
    max_rows: int | None = None
    """Stop after so many rows; null: all of the source."""
    template_options: dict = field(default_factory=lambda: {"enable_thinking": False})
    """What the chat template is told beside the messages; {enable_thinking: false} unless given, as published."""

    def __post_init__(self):
        if not self.source:
            raise ValueError("data.source is empty: name files, a folder, or a data set on the Hub")
        if not 2 <= self.row_tokens <= MAX_ROW_TOKENS:
            raise ValueError(f"data.row_tokens must be 2 .. {MAX_ROW_TOKENS}, got {self.row_tokens}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"data.max_rows must be at least 1, or null, got {self.max_rows}")


@dataclass(frozen=True, slots=True)
class Document:
    """A text that stands alone."""

    ids: np.ndarray
    """[tokens] int32."""
    reply: np.ndarray
    """[tokens] int16: which reply a token belongs to, from 1; 0: none. Neighbouring replies have different numbers."""

    def __len__(self) -> int:
        return len(self.ids)

    def piece(self, start: int, end: int) -> "Document":
        """A part of the document."""
        return Document(self.ids[start:end], self.reply[start:end])

    @property
    def has_anchor(self) -> bool:
        """Whether two neighbouring tokens are of one reply: an anchor and its first target."""
        return bool(((self.reply[1:] == self.reply[:-1]) & (self.reply[1:] > 0)).any())


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row of a source and what it becomes."""

    where: str
    """Where it stands, for messages."""
    content: dict[str, Any]
    """Its columns, those of one of `LAYOUTS`."""
    documents: list[Document]
    """At least one, each with an anchor."""


# --- where the rows come from ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file of a source, or all of a data set on the Hub."""

    name: str
    identity: str
    """Changes with the content."""
    rows: Iterable[dict[str, Any]]
    columns: tuple[str, ...]


def open_source(settings: DataSettings) -> list[Part]:
    """The parts of a source in order, none of them read yet.

    Raises `ValueError` naming what is not there, is empty, cannot be read or has none of the known layouts.
    """
    files = local_files(settings.source)
    if files is None:
        return [hub_part(settings)]
    if given := [name for name in ("revision", "config", "split") if getattr(settings, name) is not None]:
        raise ValueError(f"data.{given[0]} is for a data set on the Hub; data.source {settings.source!r} is local")
    return [file_part(path) for path in files]


def local_files(source: str) -> list[Path] | None:
    """The files that a source names, sorted; None where it can only be a data set on the Hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = folder_files(path)
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        looks_local = source.startswith((".", "/", "~")) or path.suffix in KINDS or glob.has_magic(source)
        if not found and not looks_local and source.count("/") <= 1:
            return None
    if not found:
        raise ValueError(f"data.source: {source!r} names no .parquet or .jsonl file")
    if strange := [file for file in found if file.suffix not in KINDS]:
        raise ValueError(f"data.source: {strange[0]} is neither .parquet nor .jsonl")
    return found


def folder_files(folder: Path) -> list[Path]:
    """The files of a folder and the folders in it, sorted, without those whose name begins with a dot."""
    found = sorted(folder.rglob("*"))
    found = [file for file in found if file.is_file()]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    tables, lines = ([file for file in found if file.suffix == suffix] for suffix in KINDS)
    if (folder / MANIFEST).is_file():
        answers = [file for file in lines if file.name not in NO_ANSWERS]
        if not tables and len(answers) < len(lines):
            raise ValueError(
                f"data.source: {folder} holds no finished shard of answers: run its `orthrus datagen` command again"
            )
        return tables or answers
    if tables and lines:
        raise ValueError(
            f"data.source: {folder} holds .parquet and .jsonl files: name one kind, as in {folder}/*.jsonl"
        )
    return tables or lines


def file_part(path: Path) -> Part:
    """A local file, read as a stream: nothing of it is kept elsewhere."""
    if path.stat().st_size == 0:
        raise ValueError(f"data.source: {path} is empty")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A name is a pattern to `datasets`, so what would be special in one is escaped.
    files = [glob.escape(str(path))]
    dataset = load(str(path), KINDS[path.suffix], data_files=files, split="train", streaming=True)
    return part_of(str(path), digest, dataset)


def hub_part(settings: DataSettings) -> Part:
    """A data set on the Hub, downloaded into `datasets`' own cache."""
    name = f"{settings.source} (no file or folder here, so taken for a data set on the Hub)"
    dataset = load(name, settings.source, settings.config, revision=settings.revision, split=settings.split or "train")
    # The files of `datasets`' cache lie under a name that has the data set's commit in it.
    files = [file["filename"] for file in dataset.cache_files]
    asked_for = [settings.source, settings.revision, settings.config, settings.split]
    return part_of(name, json.dumps([asked_for, files]), dataset)


def load(name: str, *arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, its errors as one line."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "reading training data needs the package datasets: pip install 'orthrus-llm[train]'"
        ) from error
    with reading(name, "cannot be read"):
        return datasets.load_dataset(*arguments, **options)


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Whatever `datasets` and what lies under it raise, as a `ValueError` naming the source."""
    try:
        yield
    except StopIteration:  # what an empty file gives
        raise ValueError(f"data.source: {name} holds no rows") from None
    except Exception as error:  # pyarrow's, datasets' and the network's errors share no class
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"data.source: {name} {what}: {reason}") from error


def part_of(name: str, identity: str, dataset: Any) -> Part:
    """A part with the columns of its layout and no others."""
    with reading(name, "cannot be read"):
        columns = tuple(dataset.column_names or next(iter(dataset)))
    for layout in LAYOUTS:
        if set(layout) <= set(columns):
            return Part(name=name, identity=identity, rows=dataset.select_columns(list(layout)), columns=layout)
    raise ValueError(
        f"data.source: {name} has the columns {', '.join(columns)}; needed are prompt_ids and response_ids, or "
        "messages, or text"
    )


def rows_of(part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) for every row of a part."""
    rows, number = iter(part.rows), 0
    while True:
        with reading(part.name, f"cannot be read behind row {number}"):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield f"data.source: {part.name}, row {number}", row


# --- what a row holds --------------------------------------------------------------------------------------------


def read_rows(parts: list[Part], settings: DataSettings, tokenizer: Any, counts: Counter[str]) -> Iterator[SourceRow]:
    """All rows of a source that hold a document, in order; what they were, and what was left out, is counted.

    Raises `ValueError` naming the row that cannot be a document, or a base that has no chat template.
    """
    for part in parts:
        encode = encoder_of(part, settings, tokenizer)
        for where, row in rows_of(part):
            counts["source_rows"] += 1
            if missing := [name for name in part.columns if row[name] is None]:
                raise ValueError(f"{where}: {missing[0]} is missing")
            found = list(encode(row, where))
            if settings.anchors == "all":
                found = [Document(document.ids, np.ones_like(document.reply)) for document in found]
            usable = [document for document in found if document.has_anchor]
            counts["documents"] += len(found)
            counts["documents_without_reply"] += len(found) - len(usable)
            if usable:
                yield SourceRow(where, row, usable)


def encoder_of(
    part: Part, settings: DataSettings, tokenizer: Any
) -> Callable[[dict[str, Any], str], Iterable[Document]]:
    """The function that makes documents of a part's rows."""
    if part.columns == ("prompt_ids", "response_ids"):
        return lambda row, where: [ids_document(row, where, num_ids=len(tokenizer))]
    if part.columns == ("text",):
        return lambda row, where: [text_document(row, where, tokenizer)]
    if not tokenizer.chat_template:
        raise ValueError(f"data.source: {part.name} has conversations, and the base's tokenizer has no chat template")
    conversations = ConversationEncoder(tokenizer, settings.template_options)

    def encode(row: dict[str, Any], where: str) -> Iterator[Document]:
        messages = messages_of(row["messages"], where)
        # Every token counts: one document, whatever the template does to earlier turns.
        encoded = conversations.whole if settings.anchors == "all" else conversations.replies
        for ids, reply in encoded(messages, where):
            yield Document(np.asarray(ids, dtype=np.int32), np.asarray(reply, dtype=np.int16))

    return encode


def ids_document(row: dict[str, Any], where: str, *, num_ids: int) -> Document:
    """A prompt and the base's answer, as token ids."""
    try:
        prompt, response = (np.asarray(row[name], dtype=np.int32) for name in ("prompt_ids", "response_ids"))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: prompt_ids and response_ids must be lists of token ids: {error}") from error
    ids = np.concatenate([prompt, response])
    if ids.ndim != 1 or (len(ids) and not 0 <= ids.min() <= ids.max() < num_ids):
        raise ValueError(f"{where}: a token id is not in 0 .. {num_ids - 1}: another base's tokenizer wrote it")
    return Document(ids, np.repeat(np.array([0, 1], dtype=np.int16), [len(prompt), len(response)]))


def text_document(row: dict[str, Any], where: str, tokenizer: Any) -> Document:
    """A plain text, as the base's tokenizer encodes it by itself."""
    if not isinstance(row["text"], str):
        raise ValueError(f"{where}: text must be a string, got {type(row['text']).__name__}")
    ids = np.asarray(tokenizer(row["text"])["input_ids"], dtype=np.int32)
    return Document(ids, np.ones(len(ids), dtype=np.int16))


def messages_of(content: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a conversation, given as a list or as its JSON; keys without a value are left out."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{where}: messages is a string that is no JSON: {error}") from error
    if not isinstance(content, list) or not all(isinstance(turn, dict) and turn.get("role") for turn in content):
        raise ValueError(f"{where}: messages must be a list of {{role, content}}")
    # Tables fill a key that some message has with nulls in all others, and templates ask whether it is there.
    return [{key: value for key, value in turn.items() if value is not None} for turn in content]
