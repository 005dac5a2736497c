"""Text from tokens as they arrive, never half a character.

A byte-level token may hold a part of a UTF-8 character, and a word-piece tokenizer may drop the first space of whatever
it decodes. So a token is decoded together with the ones before it, back to the last point where the text was whole,
and what ends in a replacement character waits for the tokens that complete it.
"""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not yet one."""


class Detokenizer:
    """Turns a growing list of token ids into text piece by piece; all pieces together are the text of all ids."""

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []
        self._num_shown = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; the text that is certain now and was not before, perhaps empty."""
        return "".join(self._push(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """The rest, with replacement characters for bytes that never became a character; then start afresh."""
        rest = self._pending_text()[self._num_shown :]
        self._context, self._pending, self._num_shown = [], [], 0
        return rest

    def _push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._pending_text()
        whole = text.rstrip(REPLACEMENT)
        piece = whole[self._num_shown :]
        if len(whole) == len(text):
            self._context, self._pending, self._num_shown = self._pending, [], 0
        else:
            self._num_shown = max(self._num_shown, len(whole))
        return piece

    def _pending_text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
