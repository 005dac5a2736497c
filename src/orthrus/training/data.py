"""The data of a training run: packed rows, made once from a source and read from disk as they are needed.

    CACHE/KEY/index.json              settings, counts, fingerprint
    CACHE/KEY/prompts.json            token ids: the beginnings of the documents that are held out (prompts.py)
    CACHE/KEY/rows-00000.safetensors  ids int32, document int16, reply int16, [rows, T] each

KEY is a hash of what the rows are made from: the content of the source, the settings, the tokenizer with its template,
and how many documents are held out by which seed.
A folder appears whole or not at all, so what is there can be trusted.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from orthrus.model.export import whole_folder
from orthrus.training.documents import DataSettings, Part, open_source, read_rows
from orthrus.training.packing import PackedRow, pack
from orthrus.training.prompts import HeldOut, beginnings
from orthrus.training.ranks import rank

FORMAT = 2
"""Goes into every key: rows that another version packed in another way are not found."""
INDEX = "index.json"
PROMPTS = "prompts.json"
SHARD_ROWS = 4096
COLUMNS = ("ids", "document", "reply")
NOT_THE_ROWS = ("source", "revision", "config", "split", "bad_rows")
"""Settings that say where data is taken from, and what happens to what is no data."""
SEEN_WITHIN_S = 60
"""A network disk may show this node only so much later what rank 0 wrote from another."""


class PackedDataset(Dataset):
    """Packed rows on disk, in a fixed order: item i is a dict of `ids`, `document` and `reply`, [T] int32 each.

    Meaning and numbering are those of `rows.Rows`. `fingerprint` is the SHA-256 of all rows, of what was held out and
    of the settings that made them, wherever the source lies. `prompts` are the beginnings of what was held out.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = json.loads((folder / INDEX).read_text())
        self.settings = DataSettings(**index["settings"])
        self.fingerprint: str = index["fingerprint"]
        self.counts: dict[str, int] = index["counts"]
        self.prompts: list[list[int]] = json.loads((folder / PROMPTS).read_text())
        self._open: dict[int, Any] = {}

    @property
    def isolated(self) -> bool:
        """Whether rows hold several documents that must not see one another: what `rows.Rows` is to be told."""
        return self.settings.packing == "isolated"

    def __len__(self) -> int:
        return self.counts["rows"]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard, row = divmod(index % len(self), SHARD_ROWS)
        if shard not in self._open:
            file = safe_open(shard_path(self.folder, shard), framework="pt")
            self._open[shard] = {name: file.get_slice(name) for name in COLUMNS}
        return {name: column[row].int() for name, column in self._open[shard].items()}

    def __getstate__(self) -> dict[str, Any]:
        """Workers of a data loader open the files themselves."""
        return self.__dict__ | {"_open": {}}

    def describe(self) -> str:
        """The counts in one line."""
        counts = Counter(self.counts)
        text = (
            f"{counts['documents']:,} documents from {counts['source_rows']:,} rows of {self.settings.source} in "
            f"{counts['rows']:,} rows of {self.settings.row_tokens:,} tokens; "
            f"{counts['reply_tokens']:,} of {counts['tokens']:,} tokens are replies, {self.padding_share:.1%} padding"
        )
        left_out = ("documents_without_reply", "documents_dropped", "documents_cut", "pieces_without_reply")
        for name in ("bad_rows", *left_out, "held_out"):
            text += f"; {name.replace('_', ' ')}: {counts[name]:,}" if counts[name] else ""
        return text

    @property
    def padding_share(self) -> float:
        """Share of all places that hold no token."""
        return 1 - self.counts["tokens"] / (len(self) * self.settings.row_tokens)


def collate(items: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items of a `PackedDataset` as a batch for `Rows.from_batch`: `ids`, `document` and `reply`, [B, T] int64 each."""
    items = list(items)
    return {name: torch.stack([item[name] for item in items]).long() for name in COLUMNS}


def packed_dataset(
    settings: DataSettings, tokenizer: Any, *, cache: Path, num_held_out: int = 0, seed: int = 0
) -> PackedDataset:
    """The packed rows of a source without `num_held_out` of its documents, from the cache or made now.

    For one rank to do; the others `wait_for` the folder. Raises `ValueError` naming what is wrong with the source, or
    that nothing in it can be learnt from.
    """
    parts, held_out = open_source(settings), HeldOut(num_held_out, seed=seed)
    folder = cache / cache_key(parts, settings, tokenizer, held_out)
    if not (folder / INDEX).is_file():
        with whole_folder(folder, force=False) as staging:
            write_rows(parts, settings, tokenizer, held_out, staging)
    return PackedDataset(folder)


def wait_for(folder: Path) -> PackedDataset:
    """The rows that rank 0 packed, as soon as they are seen here; `ValueError` when they never are."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not (folder / INDEX).is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"rank {rank()} does not see the rows that rank 0 packed ({folder}): give all nodes one shared --out"
            )
        time.sleep(min(1, SEEN_WITHIN_S))
    return PackedDataset(folder)


def write_rows(parts: list[Part], settings: DataSettings, tokenizer: Any, held_out: HeldOut, folder: Path) -> None:
    """Read, pack and write all rows, the prompts of what is held out, and the index behind them."""
    counts: Counter[str] = Counter()
    documents = held_out.leave(read_rows(parts, settings, tokenizer, counts))
    bar = tqdm(documents, desc="packing", unit=" documents", disable=None)
    rows = pack(bar, settings, counts)
    digest = hashlib.sha256(json.dumps(settings_of(settings), sort_keys=True).encode())
    for number, shard in enumerate(shards(rows)):
        columns = {name: np.stack([getattr(row, name) for row in shard]) for name in COLUMNS}
        for column in columns.values():
            digest.update(column.tobytes())
        save_file(columns, shard_path(folder, number))
    bar.close()
    for row in held_out.rows:
        for document in row.documents:
            digest.update(document.ids.tobytes())
    counts["held_out"] = len(held_out.rows)
    if counts["bad_rows"]:
        tqdm.write(f"{counts['bad_rows']:,} rows left out (data.bad_rows: skip)", file=sys.stderr)
    if not counts["rows"]:
        raise ValueError(
            f"data.source: nothing to learn from in {settings.source}: {counts['source_rows']:,} rows, "
            f"{counts['documents_without_reply']:,} documents without a reply of two tokens, "
            f"{counts['documents_dropped']:,} dropped as too long, {counts['pieces_without_reply']:,} such pieces, "
            f"{counts['bad_rows']:,} bad rows, {counts['held_out']:,} held out (evaluation.held_out_documents)"
        )
    prompts = beginnings(held_out.rows, tokenizer, settings.template_options)
    (folder / PROMPTS).write_text(json.dumps(prompts) + "\n")
    index = {"settings": dataclasses.asdict(settings), "counts": dict(counts), "fingerprint": digest.hexdigest()}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shards(rows: Iterator[PackedRow]) -> Iterator[list[PackedRow]]:
    """Rows in lists of at most `SHARD_ROWS`."""
    while shard := list(islice(rows, SHARD_ROWS)):
        yield shard


def shard_path(folder: Path, number: int) -> str:
    """Where a shard lies."""
    return str(folder / f"rows-{number:05d}.safetensors")


def settings_of(settings: DataSettings) -> dict[str, Any]:
    """The settings that decide how rows are made. Where the source is taken from does not: data that moved, or whose
    newest revision was given a name, is the same data."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_THE_ROWS}


def cache_key(parts: list[Part], settings: DataSettings, tokenizer: Any, held_out: HeldOut) -> str:
    """What rows are made from, as a name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    made_from = [
        FORMAT, SHARD_ROWS, settings_of(settings), settings.bad_rows, [part.identity for part in parts], vocabulary,
        tokenizer.chat_template, [held_out.num_documents, held_out.seed if held_out.num_documents else 0],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]
