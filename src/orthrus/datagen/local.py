"""Answers from this process: the project's one step loop over many rows, drafted where the model has a view."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from orthrus.datagen.answers import Answer, AnswerSettings, Encoder, Enter, Failure
from orthrus.datagen.prompts import Prompt
from orthrus.decoding.decoder import Decoder, Record, Request
from orthrus.decoding.sampling import Sampling
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import Stopping


@dataclass(slots=True)
class OpenRow:
    """A prompt in decoding."""

    prompt: Prompt
    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)


class LocalWriter:
    """A writer that decodes `batch_size` prompts at a time; a finished row makes room for the next prompt."""

    def __init__(
        self,
        decoder: Decoder,
        encoder: Encoder,
        answers: AnswerSettings,
        *,
        max_positions: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        batch_size: int = 16,
        drafting: bool = True,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._decoder = decoder
        self._encoder = encoder
        self._answers = answers
        self._max_positions = max_positions
        # An embedding may have more rows than the tokenizer has tokens. One of those says nothing, and training refuses
        # it: an answer ends before it.
        self._num_tokens = len(encoder.tokenizer)
        self._ending_ids = eos_token_ids | frozenset(range(self._num_tokens, vocab_size))
        self._batch_size = batch_size
        self._drafting = drafting
        self._rows: dict[int, OpenRow] = {}
        self._stats = DecodingStats(block_size=decoder.block_size)

    def facts(self) -> dict[str, Any]:
        """What decoding took."""
        return {"tokens_per_cycle": self._stats.tokens_per_cycle, "cycles": self._stats.num_cycles}

    def write(self, prompts: Iterator[Prompt], enter: Enter, is_stopping: Callable[[], bool]) -> None:
        """Answer prompts until the iterator ends, then finish the rows that are open."""
        while True:
            while len(self._rows) < self._batch_size and (prompt := next(prompts, None)) is not None:
                self._admit(prompt, enter)
            if not self._rows:
                return
            for record in self._decoder.step():
                self._take(record, enter)

    def _admit(self, prompt: Prompt, enter: Enter) -> None:
        try:
            prompt_ids = self._encoder.encode(prompt)
        except Exception as error:  # chat templates raise what they like
            enter(Failure(id=prompt.id, reason=f"the chat template refuses it: {error}", attempts=0))
            return
        room = self._max_positions - len(prompt_ids)
        if not prompt_ids or room < 1:
            reason = f"the prompt has {len(prompt_ids)} tokens, the model's context is {self._max_positions}"
            enter(Failure(id=prompt.id, reason=reason, attempts=1))
            return
        record = self._decoder.admit(self._request(prompt, prompt_ids, room))
        self._rows[record.row] = OpenRow(prompt, prompt_ids)
        self._take(record, enter)

    def _request(self, prompt: Prompt, prompt_ids: list[int], room: int) -> Request:
        settings = self._answers
        return Request(
            prompt_ids=prompt_ids,
            stopping=Stopping(max_new_tokens=min(settings.max_new_tokens, room), eos_token_ids=self._ending_ids),
            sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed_of(prompt.id)),
            drafting=self._drafting,
        )

    def _take(self, record: Record, enter: Enter) -> None:
        """Add a record to its row; a finished row is entered and released."""
        row = self._rows[record.row]
        row.response_ids += record.token_ids
        if record.finish_reason is None:
            return
        self._stats = self._stats.merge(self._decoder.stats(record.row))
        self._decoder.release(record.row)
        del self._rows[record.row]
        finish_reason = record.finish_reason
        if row.response_ids[-1] >= self._num_tokens:
            row.response_ids.pop()
            finish_reason = "length"
        if not row.response_ids:
            reason = "the model's first token is none of its tokenizer's (a padded row of its embedding)"
            enter(Failure(id=row.prompt.id, reason=reason, attempts=1))
            return
        enter(
            Answer(
                id=row.prompt.id,
                prompt_ids=row.prompt_ids,
                response_ids=row.response_ids,
                response=self._encoder.decode(row.response_ids),
                finish_reason=finish_reason,
                ids_from="decoder",
            )
        )
