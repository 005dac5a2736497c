"""When a row ends: end-of-sequence ids, stop strings, criteria and the length limit, position by position.

A cycle commits several tokens at once, and a stop may fall on any of them: `StopCheck.cut` finds the first and says how
many tokens stay. The token that completes a stop stays in the output, as in transformers; what comes after it never
existed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]
Criteria = Callable[[Tensor, Any], Any]
"""criteria(ids [1, n], scores) -> whether a row that reads so ends there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopping:
    """When one row ends."""

    max_new_tokens: int
    """Tokens after the prompt, at most."""
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens that end the row; they stay in the output."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the row once the new tokens' text contains one, wherever token edges fall."""
    min_new_tokens: int = 0
    """Until so many new tokens are written, end-of-sequence ids cannot be chosen."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens must be 0 or more, got {self.min_new_tokens}")
        if any(not text for text in self.stop_strings):
            raise ValueError("stop_strings: an empty string would stop everywhere; remove it")


class StopCheck:
    """One row's stops, asked once a cycle."""

    def __init__(
        self,
        stopping: Stopping,
        *,
        num_prompt: int,
        tokenizer: Any = None,
        criteria: Criteria | None = None,
        device: torch.device | None = None,
    ):
        if stopping.stop_strings and tokenizer is None:
            raise ValueError("stop_strings need a tokenizer: build the Decoder with tokenizer=...")
        self._stopping = stopping
        self._num_prompt = num_prompt
        self._tokenizer = tokenizer
        self._criteria = criteria
        self._device = device
        # A token stands for at least one byte, so a stop string never spans more tokens than it has bytes.
        self._num_span = max((len(text.encode()) for text in stopping.stop_strings), default=0)

    def cut(
        self, tokens: Sequence[int], num_new: int, scores: tuple[Tensor, ...] | None = None
    ) -> tuple[int, FinishReason | None]:
        """How many of the row's last `num_new` tokens stay (at least 1), and why the row ends there, if it does."""
        first = len(tokens) - num_new
        reason: FinishReason | None = None
        kept = num_new
        limit = self._num_prompt + self._stopping.max_new_tokens
        if len(tokens) >= limit:
            kept, reason = limit - first, "length"
        if self._stopping.eos_token_ids:
            for index in range(kept):
                if tokens[first + index] in self._stopping.eos_token_ids:
                    kept, reason = index + 1, "stop"
                    break
        if self._num_span and (index := self._first_stop_string(tokens, first, kept)) is not None:
            kept, reason = index + 1, "stop"
        if self._criteria is not None:
            index = self._first_criterion(self._criteria, tokens[: first + kept], kept, scores)
            if index is not None:
                kept, reason = index + 1, "stop"
        return kept, reason

    def _first_stop_string(self, tokens: Sequence[int], first: int, kept: int) -> int | None:
        begin = max(self._num_prompt, first - self._num_span)
        if not self._has_stop_string(tokens[begin : first + kept]):
            return None
        ends = range(first + 1, first + kept + 1)
        return next(end - first - 1 for end in ends if end == ends[-1] or self._has_stop_string(tokens[begin:end]))

    def _has_stop_string(self, tokens: Sequence[int]) -> bool:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._stopping.stop_strings)

    def _first_criterion(
        self, criteria: Criteria, tokens: Sequence[int], num_new: int, scores: tuple[Tensor, ...] | None
    ) -> int | None:
        ids = torch.tensor([tokens], device=self._device)
        for index in range(num_new):
            num_seen = len(tokens) - num_new + index + 1
            seen_scores = None if scores is None else scores[: num_seen - self._num_prompt]
            verdict = criteria(ids[:, :num_seen], seen_scores)
            if bool(torch.as_tensor(verdict).all()):
                return index
        return None


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the generation config's, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
