"""The bundled model's training corpus: deduplicated Python source with a held-out part that no step may see.

Order of work: read and clean every file (`sources.py`), set the held-out modules aside, drop exact and near duplicates
and whatever resembles a held-out module, choose the best documents up to a size, split off a validation set, train
the tokenizer and write compressed shards (`shards.py`).

    python -m orthrus.training.corpus --packages WHEELS --out FOLDER

prints one JSON document as its last line. The list of packages that made the published model is
`recipes/tiny-python_corpus.txt`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orthrus.training.shards import run_parallel, save_tokenizer, text_hash, train_tokenizer, write_shards
from orthrus.training.sources import (
    STDLIB,
    Document,
    RejectedSource,
    SourceFile,
    folder_files,
    is_permissive,
    read_document,
    stdlib_files,
    wheel_files,
    wheel_metadata,
)

__all__ = ["HELD_OUT_MODULES", "Corpus", "CorpusConfig", "build_corpus", "is_held_out", "main"]

HELD_OUT_MODULES = (
    "argparse",
    "bisect",
    "calendar",
    "cmd",
    "colorsys",
    "configparser",
    "csv",
    "difflib",
    "filecmp",
    "fnmatch",
    "fractions",
    "glob",
    "graphlib",
    "heapq",
    "html.parser",
    "json.decoder",
    "pprint",
    "queue",
    "random",
    "sched",
    "shlex",
    "statistics",
    "string",
    "tempfile",
    "textwrap",
    "zipfile",
)
"""Standard library modules on which the bundled model is measured: documented pure Python of varied kinds.
No training step sees them, an older version of them, or a file that shares more than a few lines with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """What is kept. Shares are of bytes unless they say otherwise."""

    max_train_bytes: int = 300_000_000
    """Size of the training and validation text together; 300 MB are 47 MiB of shards."""
    max_package_share: float = 0.03
    """Most that one package may give."""
    max_test_share: float = 0.08
    """Most that test files may give: they repeat themselves."""
    val_share: float = 0.03
    """Share of the packages' files, not bytes, in the validation set."""
    max_seen_share: float = 0.6
    """A file or top-level block is dropped when more of its keyed lines than this were in earlier files."""
    min_distinct_share: float = 0.5
    """A file is dropped when fewer of its keyed lines than this differ from each other."""
    min_block_lines: int = 6
    """Blocks with fewer keyed lines are not judged on their own."""
    max_held_out_triples: int = 6
    """A file with more runs of three lines from held-out modules than this is taken for a copy of one."""
    max_held_out_share: float = 0.1
    """The same as a share of the file's own runs, for small files."""


@dataclass(slots=True)
class Corpus:
    """Documents by use, and why the others were dropped."""

    train: list[Document] = field(default_factory=list)
    val: list[Document] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)
    num_dropped: Counter[str] = field(default_factory=Counter)


def module_name(document: Document) -> str:
    """Dotted name of a module from its path."""
    return document.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_held_out(document: Document) -> bool:
    """Whether the document is one of the held-out standard library modules."""
    return document.package == STDLIB and module_name(document) in HELD_OUT_MODULES


def build_corpus(documents: Iterable[Document], *, config: CorpusConfig) -> Corpus:
    """Sorts documents into training, validation and held-out; among duplicates the first in order is kept."""
    corpus = Corpus()
    candidates = []
    for document in documents:
        (corpus.held_out if is_held_out(document) else candidates).append(document)
    forbidden = held_out_triples(corpus.held_out)
    clean = []
    for document in candidates:
        if resembles_held_out(document, forbidden=forbidden, config=config):
            corpus.num_dropped["held_out"] += 1
        else:
            clean.append(document)
    distinct = deduplicate(clean, config=config, num_dropped=corpus.num_dropped)
    chosen = select(distinct, config=config, num_dropped=corpus.num_dropped)
    for document in chosen:
        (corpus.val if is_validation(document, share=config.val_share) else corpus.train).append(document)
    return corpus


def line_triples(line_keys: np.ndarray) -> np.ndarray:
    """Hashes of all runs of three consecutive keyed lines: specific enough that one match means common origin."""
    keys = line_keys[line_keys != 0]
    if len(keys) < 3:
        return np.empty(0, dtype=np.uint64)
    # Odd multipliers make the order matter; uint64 wraps around.
    return keys[:-2] + keys[1:-1] * np.uint64(0x9E3779B97F4A7C15) + keys[2:] * np.uint64(0xC2B2AE3D27D4EB4F)


def held_out_triples(held_out: Iterable[Document]) -> np.ndarray:
    """Sorted distinct line triples of the held-out modules."""
    triples = [line_triples(document.line_keys) for document in held_out]
    return np.unique(np.concatenate(triples)) if triples else np.empty(0, dtype=np.uint64)


def resembles_held_out(document: Document, *, forbidden: np.ndarray, config: CorpusConfig) -> bool:
    """Whether the document is a copy, backport or other version of a held-out module, by name path or by content."""
    triples = line_triples(document.line_keys)
    num_shared = int(np.isin(triples, forbidden).sum())
    return num_shared > config.max_held_out_triples or num_shared > config.max_held_out_share * len(triples)


def deduplicate(documents: Iterable[Document], *, config: CorpusConfig, num_dropped: Counter[str]) -> list[Document]:
    """Drops exact copies, near copies and self-repeating files, and cuts copied blocks out of the others."""
    seen_texts: set[int] = set()
    seen_keys: set[int] = set()
    kept = []
    for document in documents:
        reason = duplicate_reason(document, seen_texts=seen_texts, seen_keys=seen_keys, config=config)
        seen_texts.add(text_hash(document.text))
        if reason:
            num_dropped[reason] += 1
            continue
        trimmed = without_seen_blocks(document, seen_keys=seen_keys, config=config)
        num_dropped["copied_block"] += len(document.blocks) - len(trimmed.blocks)
        seen_keys.update(document.line_keys.tolist())
        kept.append(trimmed)
    return kept


def duplicate_reason(
    document: Document, *, seen_texts: set[int], seen_keys: set[int], config: CorpusConfig
) -> str | None:
    """Why the whole document is dropped, None if it is not."""
    if text_hash(document.text) in seen_texts:
        return "exact_duplicate"
    keys = keyed_lines(document.line_keys)
    if len(keys) == 0 or len(set(keys)) < config.min_distinct_share * len(keys):
        return "repetitive"
    if seen_share(keys, seen_keys=seen_keys) > config.max_seen_share:
        return "near_duplicate"
    return None


def keyed_lines(line_keys: np.ndarray) -> list[int]:
    """Keys of the lines that have one."""
    return line_keys[line_keys != 0].tolist()


def seen_share(keys: Sequence[int], *, seen_keys: set[int]) -> float:
    """Share of the keys that earlier documents had."""
    return sum(key in seen_keys for key in keys) / len(keys)


def without_seen_blocks(document: Document, *, seen_keys: set[int], config: CorpusConfig) -> Document:
    """The document without the top-level functions and classes whose lines earlier documents had."""
    copied = []
    for start, end in document.blocks:
        keys = keyed_lines(document.line_keys[start:end])
        if len(keys) >= config.min_block_lines and seen_share(keys, seen_keys=seen_keys) > config.max_seen_share:
            copied.append((start, end))
    if not copied:
        return document
    lines = document.text.split("\n")
    is_copied = np.zeros(len(lines), dtype=bool)
    for start, end in copied:
        is_copied[start:end] = True
    text = "\n".join(line for line, drop in zip(lines, is_copied, strict=True) if not drop)
    blocks = tuple(block for block in document.blocks if block not in copied)
    return Document(
        document.package, document.path, squeeze_blank_lines(text), document.line_keys, blocks, document.quality
    )


def squeeze_blank_lines(text: str) -> str:
    """The text with at most two blank lines in a row, as where a block was cut out."""
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    return text.strip("\n") + "\n"


def select(documents: Sequence[Document], *, config: CorpusConfig, num_dropped: Counter[str]) -> list[Document]:
    """The best documents within the size and the shares, in the order given; the standard library is taken whole."""
    by_rank = sorted(documents, key=lambda d: (d.package != STDLIB, -d.quality, text_hash(d.name)))
    used_bytes: Counter[str] = Counter()
    chosen = set()
    for document in by_rank:
        groups = {"all": 1.0, f"package {document.package}": config.max_package_share}
        if document.is_test:
            groups["tests"] = config.max_test_share
        size = document.num_bytes
        full = [g for g, share in groups.items() if used_bytes[g] + size > share * config.max_train_bytes]
        if full:
            num_dropped["over_" + full[0].split()[0]] += 1
            continue
        used_bytes.update(dict.fromkeys(groups, size))
        chosen.add(document.name)
    return [document for document in documents if document.name in chosen]


def is_validation(document: Document, *, share: float) -> bool:
    """Whether a package's document is in the validation set: decided by its name, so it stays when others change."""
    return document.package != STDLIB and text_hash(document.name) % 10_000 < share * 10_000


def read_documents(sources: Iterable[SourceFile]) -> tuple[list[Document], Counter[str]]:
    """Documents of the readable sources, and the number of the others by reason."""
    documents, num_dropped = [], Counter()
    for source in sources:
        try:
            documents.append(read_document(source))
        except RejectedSource as reason:
            num_dropped[str(reason)] += 1
    return documents, num_dropped


def read_package(path: Path) -> tuple[list[Document], Counter[str]]:
    """Documents of one wheel or unpacked package; nothing of a wheel whose licence is not permissive."""
    if path.suffix != ".whl":
        return read_documents(folder_files(path, package=path.name.lower()))
    if not is_permissive(wheel_metadata(path)):
        return [], Counter(package_licence=1)
    return read_documents(wheel_files(path))


def read_all(packages: Path, *, num_workers: int) -> tuple[list[Document], Counter[str]]:
    """Documents of the standard library, then of the packages in order of name."""
    documents, num_dropped = read_documents(stdlib_files())
    paths = sorted(path for path in packages.iterdir() if path.suffix == ".whl" or path.is_dir())
    for package_documents, package_dropped in run_parallel(read_package, paths, num_workers=num_workers):
        documents += package_documents
        num_dropped += package_dropped
    return documents, num_dropped


def tokenizer_sample(documents: Sequence[Document], *, max_bytes: int = 50_000_000) -> Iterable[str]:
    """Every n-th training text, n chosen so that the sample has about `max_bytes`."""
    stride = max(1, sum(document.num_bytes for document in documents) // max_bytes)
    return (document.text for document in documents[::stride])


def parts_of(corpus: Corpus) -> dict[str, list[Document]]:
    """Documents by the name of the files that hold them."""
    return {"train": corpus.train, "val": corpus.val, "heldout": corpus.held_out}


def write_corpus(corpus: Corpus, *, out: Path, num_shards: int, num_workers: int) -> dict[str, int]:
    """Writes `tokenizer/` and the shards of the three parts; returns their numbers of tokens."""
    save_tokenizer(train_tokenizer(tokenizer_sample(corpus.train)), out / "tokenizer")
    num_tokens = {}
    for name, documents in parts_of(corpus).items():
        _, num_tokens[name] = write_shards(
            [document.text for document in documents],
            folder=out,
            name=name,
            num_shards=num_shards if name == "train" else 1,
            tokenizer_folder=out / "tokenizer",
            num_workers=num_workers,
        )
    return num_tokens


def report(corpus: Corpus, *, out: Path, num_tokens: dict[str, int]) -> dict:
    """Counts, and SHA-256 of the tokenizer and the shards in order of name."""
    digest = hashlib.sha256()
    paths = [out / "tokenizer" / "tokenizer.json", *sorted(out.glob("*.xz"))]
    for path in paths:
        digest.update(path.read_bytes())
    packages = Counter()
    for document in corpus.train:
        packages[document.package] += document.num_bytes
    return {
        "num_files": {name: len(documents) for name, documents in parts_of(corpus).items()},
        "text_bytes": {name: sum(d.num_bytes for d in documents) for name, documents in parts_of(corpus).items()},
        "num_tokens": num_tokens,
        "written_bytes": sum(path.stat().st_size for path in paths),
        "test_bytes": sum(d.num_bytes for d in corpus.train if d.is_test),
        "dropped": dict(corpus.num_dropped.most_common()),
        "package_bytes": dict(packages.most_common()),
        "sha256": digest.hexdigest(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: builds the corpus and prints the report as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m orthrus.training.corpus", description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of wheels and unpacked packages")
    parser.add_argument("--out", type=Path, required=True, help="folder to write tokenizer/ and the shards to")
    parser.add_argument("--max-train-bytes", type=int, default=CorpusConfig().max_train_bytes)
    parser.add_argument("--num-shards", type=int, default=16, help="shards of the training text")
    parser.add_argument("--num-workers", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    documents, num_rejected = read_all(options.packages, num_workers=options.num_workers)
    corpus = build_corpus(documents, config=CorpusConfig(max_train_bytes=options.max_train_bytes))
    corpus.num_dropped += num_rejected
    num_tokens = write_corpus(corpus, out=options.out, num_shards=options.num_shards, num_workers=options.num_workers)
    result = report(corpus, out=options.out, num_tokens=num_tokens)
    (options.out / "manifest.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
