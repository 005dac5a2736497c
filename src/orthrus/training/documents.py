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
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from orthrus.training.conversations import ConversationEncoder, Pieces

KINDS = {".parquet": "parquet", ".jsonl": "json"}
"""File endings that are read, and `datasets`' word for each."""
LAYOUTS = (("prompt_ids", "response_ids"), ("messages",), ("text",))
"""The columns of each layout; the first that a source has is taken."""
MANIFEST = "manifest.json"
"""In a folder that `orthrus datagen` writes."""
JOURNAL = "journal.jsonl"
"""Beside a manifest: answers whose shard is not complete."""
NO_ANSWERS = (JOURNAL, "failed.jsonl")
"""Beside a manifest: what holds no finished answers."""
MAX_ROW_TOKENS = 2**15 - 1
"""Documents and replies of a row are numbered in 16 bits."""
BATCH_CHARACTERS = 2**20
"""Text that the tokenizer gets in one call: calls cost something, and it may share one out over cores."""
BATCH_ROWS = 1024
"""Rows that are read ahead at most, however little text they hold."""
SHOWN_BAD_ROWS = 5
"""Rows that are named when they are left out; all are counted."""


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
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What happens at a row of the source that cannot be read (no text, a conversation that the template refuses): the
    run ends naming it, or it is left out and counted."""
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


Draft = Document | Pieces
"""A document whose text may still have to be encoded."""


@dataclass(frozen=True, slots=True)
class DraftRow:
    """A row of a source whose documents may still have to be encoded, or why it has none."""

    where: str
    content: dict[str, Any]
    drafts: list[Draft]
    bad: str = ""


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


def unfinished_answers(source: str) -> str | None:
    """What a folder of `orthrus datagen` holds that is not read yet, as a sentence; None for other sources."""
    journal = Path(source).expanduser() / JOURNAL
    if not ((journal.parent / MANIFEST).is_file() and journal.is_file()):
        return None
    with journal.open("rb") as file:
        num_answers = sum(1 for _ in file)
    return (
        f"{num_answers:,} answers in {journal} are left out: their shards are not complete; run the `orthrus datagen` "
        "command to its end to train on them"
    )


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
    return part_of(name, json.dumps(files or asked_for), dataset)


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

    Raises `ValueError` naming the row that cannot be a document and why (under `bad_rows: skip` only where all rows are
    such), or a base that has no chat template.
    """
    first_bad = ""
    for part in parts:
        for row, found in encoded_rows(part, reader_of(part, settings, tokenizer), tokenizer):
            counts["source_rows"] += 1
            bad = row.bad
            if bad and settings.bad_rows == "refuse":
                raise ValueError(f"{bad} (data.bad_rows=skip leaves such rows out)")
            if bad:
                counts["bad_rows"] += 1
                first_bad = first_bad or bad
                if counts["bad_rows"] <= SHOWN_BAD_ROWS:
                    tqdm.write(f"left out: {bad}", file=sys.stderr)
            if settings.anchors == "all":
                found = [Document(document.ids, np.ones_like(document.reply)) for document in found]
            usable = [document for document in found if document.has_anchor]
            counts["documents"] += len(found)
            counts["documents_without_reply"] += len(found) - len(usable)
            if usable:
                yield SourceRow(row.where, row.content, usable)
    if counts["bad_rows"] and counts["bad_rows"] == counts["source_rows"]:
        raise ValueError(f"none of the {counts['bad_rows']:,} rows can be used; the first: {first_bad}")


def encoded_rows(part: Part, read: "Reader", tokenizer: Any) -> Iterator[tuple[DraftRow, list[Document]]]:
    """Every row of a part with its documents, the texts of many rows encoded in one call."""
    special = part.columns == ("text",)  # in conversations the template has written them
    waiting: list[DraftRow] = []
    num_characters = 0
    for where, row in rows_of(part):
        try:
            if missing := [name for name in part.columns if row[name] is None]:
                raise ValueError(f"{where}: {missing[0]} is missing")
            waiting.append(DraftRow(where, row, read(row, where)))
        except ValueError as error:
            waiting.append(DraftRow(where, row, [], str(error)))
        num_characters += sum(len(text) for pieces in texts_of(waiting[-1].drafts) for text, _ in pieces)
        if num_characters >= BATCH_CHARACTERS or len(waiting) == BATCH_ROWS:
            yield from encode_rows(waiting, tokenizer, special=special)
            waiting, num_characters = [], 0
    yield from encode_rows(waiting, tokenizer, special=special)


def encode_rows(rows: list[DraftRow], tokenizer: Any, *, special: bool) -> Iterator[tuple[DraftRow, list[Document]]]:
    """The rows with all their texts encoded; `special`: with the special tokens that the tokenizer adds to a text."""
    made = iter(encode_pieces([pieces for row in rows for pieces in texts_of(row.drafts)], tokenizer, special=special))
    for row in rows:
        yield row, [draft if isinstance(draft, Document) else next(made) for draft in row.drafts]


def texts_of(drafts: list[Draft]) -> list[Pieces]:
    """Those documents that are text still."""
    return [draft for draft in drafts if not isinstance(draft, Document)]


def encode_pieces(documents: list[Pieces], tokenizer: Any, *, special: bool) -> list[Document]:
    """Documents from their pieces of text, in one call of the tokenizer."""
    texts = [text for pieces in documents for text, _ in pieces]
    # A document may well be longer than the base's context: `verbose` would say so for the first.
    ids = iter(tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else ())
    made = []
    for pieces in documents:
        parts = [next(ids) for _ in pieces]
        reply = np.repeat(np.array([reply for _, reply in pieces], dtype=np.int16), [len(part) for part in parts])
        made.append(Document(np.fromiter(chain.from_iterable(parts), dtype=np.int32, count=len(reply)), reply))
    return made


Reader = Callable[[dict[str, Any], str], list[Draft]]
"""(row, where it stands) to what it holds; `ValueError` for a row that holds nothing of the kind."""


def reader_of(part: Part, settings: DataSettings, tokenizer: Any) -> Reader:
    """The function that finds the documents of a part's rows."""
    if part.columns == ("prompt_ids", "response_ids"):
        return lambda row, where: [ids_document(row, where, num_ids=len(tokenizer))]
    if part.columns == ("text",):
        return lambda row, where: [[(text_of(row["text"], where), 1)]]
    if not tokenizer.chat_template:
        raise ValueError(f"data.source: {part.name} has conversations, and the base's tokenizer has no chat template")
    conversations = ConversationEncoder(tokenizer, settings.template_options)
    # Where every token counts, one document, whatever the template does to earlier turns.
    pieces_of = conversations.whole if settings.anchors == "all" else conversations.replies

    def read(row: dict[str, Any], where: str) -> list[Draft]:
        documents = pieces_of(messages_of(row["messages"], where), where)
        return [[(text_of(text, where), reply) for text, reply in pieces] for pieces in documents]

    return read


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


def text_of(text: Any, where: str) -> str:
    """A text that can be encoded."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: the text holds half a character (a lone surrogate)") from None
    return text


def messages_of(content: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a conversation, given as a list or as its JSON; keys without a value are left out."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{where}: messages is a string that is no JSON: {error}") from error
    if not isinstance(content, list) or not all(isinstance(turn, dict) and turn.get("role") for turn in content):
        raise ValueError(f"{where}: messages must be a list of {{role, content}}")
    for number, turn in enumerate(content, start=1):
        if not isinstance(turn.get("content", ""), str | None):
            kind = type(turn["content"]).__name__
            raise ValueError(f"{where}: the content of message {number} must be text, got {kind}")
    # Tables fill a key that some message has with nulls in all others, and templates ask whether it is there.
    return [{key: value for key, value in turn.items() if value is not None} for turn in content]
