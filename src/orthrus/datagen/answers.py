"""Answers: what is asked of a writer, what it gives back for a prompt, and how text becomes token ids.

A writer is whoever answers prompts: a server (`endpoint.py`) or this process (`local.py`). It takes prompts from an
iterator for as long as that gives any, and enters a result for each; prompts it gives back unanswered stay open.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from orthrus.datagen.prompts import Prompt

FinishReason = Literal["stop", "length"]
IdsFrom = Literal["decoder", "server", "text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSettings:
    """What decides an answer beside the model and the prompt."""

    max_new_tokens: int = 2048
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this probability."""
    seed: int = 0
    """Each prompt has its own seed, made from this one and its id."""
    enable_thinking: bool = False
    """Given to the chat template. Published training data is non-thinking."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must be a number, 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def seed_of(self, prompt_id: str) -> int:
        """A prompt's own seed, 31 bits, which every server takes: it depends on neither order nor batch."""
        return int(hashlib.sha256(f"{self.seed}:{prompt_id}".encode()).hexdigest()[:8], 16) >> 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A finished answer; nothing in it depends on when or beside whom it was written."""

    id: str
    """The prompt's."""
    prompt_ids: list[int]
    response_ids: list[int]
    """The new tokens, with the token that ended them."""
    response: str
    """Their text, without special tokens."""
    finish_reason: FinishReason
    ids_from: IdsFrom
    """Who gave `response_ids`: this process's decoder, the server, or the tokenizer, read from the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A prompt that this run could not have answered."""

    id: str
    reason: str
    attempts: int


Enter = Callable[[Answer | Failure], None]


class Writer(Protocol):
    """Whoever answers prompts."""

    def write(self, prompts: Iterator[Prompt], enter: Enter, is_stopping: Callable[[], bool]) -> None:
        """Answer prompts until the iterator ends; once `is_stopping`, wait for nothing but what is being written."""
        ...

    def facts(self) -> dict[str, Any]:
        """What there is to say about the work done."""
        ...


class Encoder:
    """Prompts and answers as token ids of one tokenizer."""

    def __init__(self, tokenizer: Any, *, name: str, enable_thinking: bool):
        self.tokenizer = tokenizer
        self._name = name
        self._enable_thinking = enable_thinking

    def check(self, prompt: Prompt) -> None:
        """Refuse conversations for a tokenizer without a chat template, before anything is asked."""
        if prompt.messages is not None and not self.tokenizer.chat_template:
            raise ValueError(f"{self._name} has no chat template; give prompts as plain text, in a column `text`")

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt up to where the model's turn begins."""
        if (text := prompt.text) is not None:
            return self.tokenizer(text)["input_ids"]
        return self.tokenizer.apply_chat_template(
            prompt.messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            enable_thinking=self._enable_thinking,
        )

    def encode_answer(self, text: str, finish_reason: FinishReason) -> list[int]:
        """Token ids of an answer's text; the end-of-sequence token, which texts do not show, behind a finished one."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return [*ids, end] if finish_reason == "stop" and end is not None else ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids without the special ones."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
