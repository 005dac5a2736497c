"""Shards: Parquet files of answers. Shard k holds prompts k * S .. (k + 1) * S - 1 of the hash order, in that order.

What a shard holds is a function of its prompts' answers alone, so a run that was killed and started again writes the
bytes that an undisturbed one writes. A shard with failed prompts lacks their rows; once they are answered it is written
anew.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orthrus.datagen.answers import Answer
from orthrus.datagen.durable import write_whole
from orthrus.datagen.prompts import Prompt

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("prompt_text", pa.string()),
        ("response", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("ids_from", pa.string()),
    ]
)
"""`messages` is null for a prompt of plain text, `prompt_text` for a conversation."""


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"part-{shard:05}.parquet"


def read_ids(path: Path) -> list[str]:
    """The ids of a shard's prompts."""
    return read_table(path, ["id"])["id"].to_pylist()


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A shard, or some of its columns."""
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is broken ({error}): delete it, and its prompts are answered again") from error


def write_shard(path: Path, answers: Iterable[tuple[Prompt, Answer]]) -> None:
    """Write answers beside those that the shard holds already, all in the order of ids."""
    rows = read_table(path).to_pylist() if path.exists() else []
    rows += [to_row(prompt, answer) for prompt, answer in answers]
    rows.sort(key=lambda row: row["id"])
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    write_whole(path, lambda file: pq.write_table(table, file, compression="zstd"))


def to_row(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """A prompt and its answer as a row of a shard."""
    return {
        "id": prompt.id,
        "messages": prompt.messages,
        "prompt_text": prompt.text,
        "response": answer.response,
        "prompt_ids": answer.prompt_ids,
        "response_ids": answer.response_ids,
        "finish_reason": answer.finish_reason,
        "ids_from": answer.ids_from,
    }
