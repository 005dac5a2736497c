"""The tokenizer of the bundled model and the compressed token shards it is trained from.

A *shard* is an xz file of little-endian uint16 token ids, documents one after the other. Tokens of this vocabulary
compress to 6 % fewer bytes than their text, and decoding them gives the text back. The shards are independent, so a
pool of processes reads them in parallel.

The vocabulary has 8,184 entries: 8,183 of a byte-level BPE and `<|endoftext|>`, the last one, which ends every
document. The mask token is not part of it: as in the released checkpoints its id is `len(tokenizer)`, an unused row of
the embedding, which is padded to 8,192 rows.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
"""Last token of every document; also the end-of-sequence and padding token."""

VOCAB_SIZE = 8_184
"""Entries of the tokenizer, `<|endoftext|>` included; also the id of the mask token."""

NUM_EMBEDDING_ROWS = 8_192
"""Rows of the model's embedding."""

MAX_LENGTH_TOKENS = 2_048
"""Longest sequence the bundled model is trained on."""

PRETOKEN_PATTERN = "|".join(
    [
        r" ?__\p{L}+__",  # dunder names are one piece: `__init__` would be three
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with the blank, dot, underscore or bracket before it
        r" ?\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}]+",
        r"(?:\r?\n)+[ \t]*",  # a line break and the next line's indentation are one piece
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Pieces that BPE merges stay within (Oniguruma); what no branch matches is a piece of its own, so nothing is lost."""

XZ_FILTERS = ({"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 1, "pb": 1},)
"""lp and pb 1: ids are 2 bytes, and the high byte has another distribution than the low one."""


@dataclass(frozen=True, slots=True)
class TokenCorpus:
    """Tokenised documents in training order."""

    tokens: np.ndarray
    """[number of tokens] uint16; every document ends with `<|endoftext|>`."""
    starts: np.ndarray
    """[number of documents] int64: index of each document's first token."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token array, hexadecimal."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE with `vocab_size` entries, `<|endoftext|>` being the last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Added last, so that its id is not 0, which much code takes for "no such token".
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the two files that `AutoTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    end = {"content": END_OF_TEXT, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "added_tokens_decoder": {str(end_id): end | {"special": True}},
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": MAX_LENGTH_TOKENS,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer for encoding documents: `<|endoftext|>` written out in a source file is ordinary text to it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of `<|endoftext|>`; `ValueError` for a tokenizer that lacks it."""
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    if end_id is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}: it was not made for this corpus")
    return end_id


def encode_texts(texts: Sequence[str], tokenizer_folder: Path) -> np.ndarray:
    """Tokens of the texts one after the other, each followed by `<|endoftext|>`. uint16."""
    tokenizer = load_tokenizer(Path(tokenizer_folder))
    end_id = end_of_text_id(tokenizer)
    arrays = [np.array([*encoding.ids, end_id], dtype="<u2") for encoding in tokenizer.encode_batch_fast(texts)]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype="<u2")


def partition(texts: Sequence[str], *, num_shards: int) -> list[list[str]]:
    """Splits into consecutive parts of about equal length; neighbours resemble each other, which xz exploits."""
    ends = np.cumsum([len(text) for text in texts])
    shards = [[] for _ in range(num_shards)]
    for text, end in zip(texts, ends, strict=True):
        shards[min((end - 1) * num_shards // ends[-1], num_shards - 1)].append(text)
    return shards


def write_shard(path: Path, texts: Sequence[str], tokenizer_folder: Path) -> int:
    """Writes one shard and returns its number of tokens."""
    tokens = encode_texts(texts, tokenizer_folder)
    path.write_bytes(lzma.compress(tokens.tobytes(), format=lzma.FORMAT_XZ, filters=list(XZ_FILTERS)))
    return len(tokens)


def write_shards(
    texts: Sequence[str], *, folder: Path, name: str, num_shards: int, tokenizer_folder: Path, num_workers: int = 1
) -> tuple[list[Path], int]:
    """Writes `name_00.xz`, `name_01.xz`, ...; returns their paths and the number of tokens. Empty ones are left out."""
    parts = [part for part in partition(texts, num_shards=num_shards) if part]
    paths = [folder / f"{name}_{index:02d}.xz" for index in range(len(parts))]
    folder.mkdir(parents=True, exist_ok=True)
    counts = run_parallel(write_shard, paths, parts, [tokenizer_folder] * len(paths), num_workers=num_workers)
    return paths, sum(counts)


def read_shard(path: Path) -> np.ndarray:
    """Tokens of one shard. uint16."""
    return np.frombuffer(lzma.decompress(Path(path).read_bytes()), dtype="<u2")


def load_shards(paths: Sequence[Path], *, tokenizer_folder: Path, num_workers: int = 1) -> TokenCorpus:
    """Documents of the shards in the order of their hashes: always the same order, whatever the sharding, and mixed."""
    end_id = end_of_text_id(load_tokenizer(Path(tokenizer_folder)))
    shards = run_parallel(read_shard, paths, num_workers=num_workers)
    documents = [document for tokens in shards for document in split_documents(tokens, end_id=end_id)]
    documents.sort(key=document_hash)
    starts = np.cumsum([0, *(len(document) for document in documents)], dtype=np.int64)[:-1]
    return TokenCorpus(np.concatenate(documents), starts)


def split_documents(tokens: np.ndarray, *, end_id: int) -> list[np.ndarray]:
    """The documents of a token stream, each with the `<|endoftext|>` that ends it."""
    ends = np.flatnonzero(tokens == end_id) + 1
    if len(ends) == 0 or ends[-1] != len(tokens):
        raise ValueError(f"a shard must end with token {end_id} (<|endoftext|>): is it of another tokenizer?")
    return np.split(tokens, ends[:-1])


def document_hash(tokens: np.ndarray) -> bytes:
    """Hash that is the same in every run and on every machine."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def text_hash(text: str) -> int:
    """64-bit hash that is the same in every run and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def run_parallel(function, *columns: Sequence, num_workers: int) -> list:
    """Results of `function(*row)` for the rows of the columns, in order; one worker means in this process."""
    if num_workers <= 1:
        return [function(*row) for row in zip(*columns, strict=True)]
    # Spawned, not forked: the caller may hold CUDA or thread pools, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        return list(pool.map(function, *columns))
