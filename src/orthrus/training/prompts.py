"""The prompts of evaluation: beginnings of documents that are held out of training, or a file's.

What is held out is a row of the source, whole and with all rows that begin alike, before anything is packed: a prompt
of which another answer is trained on would not be new to the view, and in concatenated rows nothing begins.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from orthrus.training.documents import Document, SourceRow, messages_of

TEXT_PROMPT_TOKENS = 48
"""Tokens of a prompt from a document that is all reply (plain text)."""


class HeldOut:
    """The source rows whose beginnings have the lowest hashes with the seed: a random few, whatever the order."""

    def __init__(self, num_documents: int, *, seed: int):
        self.num_documents, self.seed = num_documents, seed
        self._copies: dict[bytes, list[SourceRow]] = {}

    def leave(self, rows: Iterable[SourceRow]) -> Iterator[Document]:
        """The documents of all other rows; those that begin alike go together.

        A row waits while it is among the lowest so far, so the order shifts. What was held out is known when the reader
        stops, at the end or before it: of the rows read until then.
        """
        for row in rows:
            self._copies.setdefault(self._hash(row), []).append(row)
            if len(self._copies) > self.num_documents:
                for copy in self._copies.pop(max(self._copies)):
                    yield from copy.documents

    @property
    def rows(self) -> list[SourceRow]:
        """What is held out, one of each, in the order of the hashes: the first n are a random sample again."""
        return [copies[0] for _, copies in sorted(self._copies.items())]

    def _hash(self, row: SourceRow) -> bytes:
        return hashlib.blake2b(f"{self.seed}|".encode() + what_begins(row), digest_size=16).digest()


def what_begins(row: SourceRow) -> bytes:
    """What a reply of this row is asked for with: the prompt; of a text, which asks for nothing, all of it."""
    if "prompt_ids" in row.content:
        return np.asarray(row.content["prompt_ids"], dtype=np.int32).tobytes()
    if "messages" in row.content and (before := before_reply(row)):
        return json.dumps([[turn["role"], turn.get("content")] for turn in before]).encode()
    return b"|".join(document.ids.tobytes() for document in row.documents)


def before_reply(row: SourceRow) -> list[dict[str, Any]]:
    """The turns of a conversation up to its first reply."""
    messages = messages_of(row.content["messages"], row.where)
    replies = (number for number, turn in enumerate(messages) if turn["role"] == "assistant")
    return messages[: next(replies, len(messages))]


def beginning(row: SourceRow, tokenizer: PreTrainedTokenizerBase, template_options: dict[str, Any]) -> list[int]:
    """Token ids of a source row up to where its first reply begins, as the base meets them when it is to write it.

    Of a row that is all reply, the first `TEXT_PROMPT_TOKENS`, at most half. Raises `ValueError` where the chat
    template does not ask for a reply there.
    """
    ids, found = row.documents[0].ids.tolist(), []
    if "prompt_ids" in row.content:
        found = ids[: len(row.content["prompt_ids"])]
    elif "messages" in row.content:
        if before := before_reply(row):
            found = asking(before, tokenizer, template_options, where=row.where)
    if len(found) > 1:
        return found
    return ids[: min(TEXT_PROMPT_TOKENS, len(ids) // 2)]


def beginnings(
    rows: Iterable[SourceRow], tokenizer: PreTrainedTokenizerBase, template_options: dict[str, Any]
) -> list[list[int]]:
    """The beginnings of source rows, without those that the chat template makes none of."""
    found = []
    for row in rows:
        try:
            found.append(beginning(row, tokenizer, template_options))
        except ValueError:  # a template may take a conversation whole and not in part: no reason to lose the packing
            continue
    return found


def asking(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template_options: dict[str, Any], *, where: str
) -> list[int]:
    """Token ids of a conversation behind which the base is to reply; `ValueError` where the template refuses it."""
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **template_options
        )
    except Exception as error:  # a template is a program of its own: Jinja's errors, and Python's from inside it
        raise ValueError(f"{where}: the chat template refuses the conversation: {error}") from error


def prompts_of_file(
    path: str, tokenizer: PreTrainedTokenizerBase, num_prompts: int, template_options: dict[str, Any], *, longest: int
) -> list[list[int]]:
    """Token ids of a JSON Lines file's prompts: `prompt`, plain text, or `messages`, a conversation before a reply.

    Raises `ValueError` naming the line that is no prompt, or one of more than `longest` tokens.
    """
    prompts: list[list[int]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"evaluation.prompts: {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip() and len(prompts) < num_prompts:
            where = f"evaluation.prompts: {path}, line {number}"
            prompts.append(prompt_of(line, tokenizer, template_options, where=where))
            if not 0 < len(prompts[-1]) <= longest:
                raise ValueError(
                    f"{where}: the prompt has {len(prompts[-1])} tokens, not 1 .. {longest} (the base's context less "
                    "evaluation.max_new_tokens)"
                )
    if not prompts:
        raise ValueError(f"evaluation.prompts: {path} holds no prompt")
    return prompts


def prompt_of(
    line: str, tokenizer: PreTrainedTokenizerBase, template_options: dict[str, Any], *, where: str
) -> list[int]:
    """Token ids of one line."""
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError(f"{where}: not JSON") from None
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return tokenizer(record["prompt"])["input_ids"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if not tokenizer.chat_template:
            raise ValueError(f"{where}: `messages`, but the base has no chat template")
        return asking(record["messages"], tokenizer, template_options, where=where)
    raise ValueError(f"{where}: needs `prompt` (text) or `messages` (a list)")
