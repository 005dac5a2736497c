"""The one decoding loop: rows of different lengths, admitted and released at any time, one cycle a step.

Before a cycle each row's cache holds exactly the tokens before its anchor (the last token, not cached yet). A cycle
drafts up to block_size - 1 tokens, keeps A of them and adds one: the correction or the bonus token, the new anchor.
`generate`, the command line, the server and the evaluator are readers of `step`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import MinNewTokensLengthLogitsProcessor

from orthrus.decoding.planner import Planner
from orthrus.decoding.row import Backend, Cycle, Outcome, Processor, Row
from orthrus.decoding.sampling import Sampling
from orthrus.decoding.schedule import Candidate, Schedule, auto_block_size
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import Criteria, FinishReason, StopCheck, Stopping
from orthrus.decoding.survival import Survival


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to decode."""

    prompt_ids: Sequence[int]
    stopping: Stopping
    sampling: Sampling = Sampling()
    logits_processor: Processor | None = None
    """processor(ids [1, n], scores [1, V]) -> scores: applied to both views, position by position, with the prefix the
    position has. It must depend on nothing but its arguments."""
    stopping_criteria: Criteria | None = None
    """criteria(ids [1, n], scores) -> bool tensor, asked at every committed position."""
    drafting: bool = True
    """False decodes one token at a time with the AR view: the same loop at width 0."""
    logprobs: bool = False
    """Whether records carry log-probabilities (of the AR view's logits, before processors and temperature)."""
    logits: bool = False
    """Whether records carry the logits and the processed scores of each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What one row gained in one step."""

    row: int
    token_ids: tuple[int, ...]
    num_drafted: int
    num_accepted: int
    """Drafts among `token_ids`."""
    finish_reason: FinishReason | None
    logprobs: tuple[float, ...] | None
    draft_ms: float
    """This row's share of the draft pass's time; shares of a batch add up to the pass."""
    verify_ms: float
    """This row's share of the verify pass's time; in the record of a prefill, the time of all its passes."""
    draft_ids: tuple[int, ...]
    """What was proposed, accepted or not."""
    logits: Tensor | None = None
    """[n, V] float32 when asked for."""
    scores: Tensor | None = None
    """[n, V] float32 when asked for: the logits after processors and warpers."""


class _Sequence:
    """A row's side of the loop: what the backend does not need to know."""

    def __init__(self, row: Row, request: Request, stop: StopCheck, min_length: Processor | None):
        self.row = row
        self.request = request
        self.stop = stop
        self.min_length = min_length
        self.stats = DecodingStats(block_size=row.block_size)
        self.survival: Survival | None = None
        self.is_finished = False
        self.is_cached = False
        """Whether all before the anchor is cached, so that the row takes part in cycles."""
        self.scores: tuple[Tensor, ...] | None = () if request.logits else None

    @property
    def is_active(self) -> bool:
        return self.is_cached and not self.is_finished

    @property
    def num_new(self) -> int:
        return len(self.row.tokens) - self.row.num_prompt

    @property
    def room(self) -> int:
        """Drafts that the next cycle can use: the token behind them is written too."""
        return self.request.stopping.max_new_tokens - self.num_new - 1 if self.request.drafting else 0

    def plan(self, *, width: int) -> None:
        """Set the next pass's width, of which at most `room` is used, and processors."""
        stopping = self.request.stopping
        self.row.width, self.row.next_width = min(width, self.room), None
        processor = self.request.logits_processor
        if self.min_length is not None and self.num_new < stopping.min_new_tokens:
            processor = self.min_length if processor is None else _chain(processor, self.min_length)
        self.row.processor = processor

    def plan_next(self, width: int) -> None:
        """Set the width of the pass behind the next one, where there will be one even if all is kept."""
        if self.num_new + self.row.width + 1 < self.request.stopping.max_new_tokens:
            # At least one token will be written first.
            self.row.next_width = max(min(width, self.room - 1), 0)


def check_prompt(num_tokens: int, max_positions: int) -> None:
    """`ValueError` for a prompt of no tokens, and for one that leaves no room in the model's context."""
    if not num_tokens:
        raise ValueError("the prompt is empty; decoding needs at least one token")
    if num_tokens >= max_positions:
        raise ValueError(f"the prompt has {num_tokens} tokens, the model's context is {max_positions}: shorten it")


def check_block_size(block_size: Any, largest: int) -> None:
    """`ValueError` for what is neither None, "auto" nor a number of positions that the model was trained for."""
    is_number = isinstance(block_size, int) and 2 <= block_size <= largest
    if not (is_number or block_size is None or block_size == "auto"):
        raise ValueError(f"block_size must be 2 .. {largest} (the trained size) or 'auto', got {block_size!r}")


def _chain(first: Processor, second: Processor) -> Processor:
    return lambda ids, scores: second(ids, first(ids, scores))


class Decoder:
    """Rows in decoding over one backend."""

    def __init__(
        self,
        backend: Backend,
        *,
        block_size: int | Literal["auto"] | None = None,
        tokenizer: Any = None,
    ):
        """`block_size` is the positions of every cycle, the trained number by default; with "auto" each cycle's width
        is chosen by what cycles took and kept (`decoding/schedule.py`)."""
        largest = backend.max_block_size
        check_block_size(block_size, largest)
        self._planner: Planner | None = None
        if block_size == "auto":
            block_size = auto_block_size(largest, exact=backend.exact, device_type=backend.device.type)
            self._planner = Planner(Schedule(backend.experience(block_size), device_type=backend.device.type))
        block_size = largest if block_size is None else block_size
        self.block_size = block_size
        self._backend = backend
        self._tokenizer = tokenizer
        self._sequences: dict[int, _Sequence] = {}
        self._num_begun = 0

    @property
    def is_auto(self) -> bool:
        """Whether each cycle's width is chosen."""
        return self._planner is not None

    @property
    def active(self) -> set[int]:
        """Rows that the next step decodes: prefilled and not finished."""
        return {index for index, sequence in self._sequences.items() if sequence.is_active}

    @property
    def waiting(self) -> set[int]:
        """Rows that `prefill` has to bring to their end before they are decoded: begun or preempted."""
        return {index for index, sequence in self._sequences.items() if not sequence.is_cached}

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens of one prefill pass of the backend."""
        return self._backend.prefill_chunk

    def num_cached(self, row: int) -> int:
        """Tokens of the row that the backend's cache holds."""
        return self._backend.length(row)

    def stats(self, row: int) -> DecodingStats:
        """What decoding this row took so far."""
        return self._sequences[row].stats

    def tokens(self, row: int) -> list[int]:
        """The row's prompt and committed tokens."""
        return list(self._sequences[row].row.tokens)

    def admit(self, request: Request, *, reuse_row: int | None = None) -> Record:
        """Prefill a request; the record carries its first token and its row.

        `reuse_row` names a finished, unreleased row: the longest prefix that its cache shares with the prompt is kept
        and only the rest is prefilled.
        """
        num_kept = 0 if reuse_row is None else self._shared_prefix(request, reuse_row)
        index = self._begin(request, reuse_row)
        record = self._prefill(self._sequences[index], num_kept=num_kept, limit=None)
        assert record is not None, f"row {index}: a prefill without limit chose nothing"
        return record

    def begin(self, request: Request) -> int:
        """Take a request in without computing anything; rows are numbered in this order. `prefill` does the work."""
        return self._begin(request, None)

    def prefill(self, row: int, *, limit: int | None = None) -> Record | None:
        """Go on with a waiting row from what its cache holds, until `limit` more tokens are cached (whole passes, at
        least one); a record once its first token is chosen. A preempted row has none to choose; it is active then.
        """
        sequence = self._sequences[row]
        assert not sequence.is_cached, f"row {row} is prefilled already"
        return self._prefill(sequence, num_kept=self._backend.length(row), limit=limit)

    def preempt(self, row: int) -> None:
        """Give an unfinished row's cache back. It waits for `prefill`, and then goes on with the text it would have
        written."""
        sequence = self._sequences[row]
        assert not sequence.is_finished, f"row {row} is finished: release it"
        self._backend.release(row)
        sequence.is_cached = False

    def step(self) -> list[Record]:
        """One cycle for all active rows; a record for each, in order of admission."""
        sequences = [sequence for sequence in self._sequences.values() if sequence.is_active]
        if not sequences:
            return []
        for sequence in sequences:
            row = sequence.row
            assert self._backend.length(row.index) == row.num_cached, (
                f"row {row.index}: {self._backend.length(row.index)} cached tokens, {row.num_cached} before the anchor"
            )
        cycle = self._run_cycle(sequences)
        return [
            self._advance(sequence, outcome, cycle, num_rows=len(sequences))
            for sequence, outcome in zip(sequences, cycle.outcomes, strict=True)
        ]

    def release(self, row: int) -> None:
        """Forget a row, finished or not."""
        if row not in self._sequences:
            raise ValueError(f"row {row} is not admitted")
        if self._planner is not None:
            self._planner.learn()
        del self._sequences[row]
        self._backend.release(row)

    def stream(self, request: Request, *, reuse_row: int | None = None) -> Iterator[Record]:
        """Decode one request to its end; the row is released when the iteration ends, however it ends."""
        record = self.admit(request, reuse_row=reuse_row)
        try:
            yield record
            while record.finish_reason is None:
                record = next(r for r in self.step() if r.row == record.row)
                yield record
        finally:
            self.release(record.row)

    def _begin(self, request: Request, reuse_row: int | None) -> int:
        index = self._num_begun if reuse_row is None else reuse_row
        self._sequences[index] = self._new_sequence(request, index)
        self._num_begun += reuse_row is None
        return index

    def _prefill(self, sequence: _Sequence, *, num_kept: int, limit: int | None) -> Record | None:
        row = sequence.row
        sequence.plan(width=0)
        try:
            cycle = self._backend.prefill(row, num_kept=num_kept, limit=limit)
        except BaseException:
            # A prefill that fails (a processor may raise) leaves no half-admitted row behind.
            self.release(row.index)
            raise
        sequence.stats.prefill_ms += cycle.verify_ms
        if cycle.outcomes:
            sequence.is_cached = True
            return self._advance(sequence, cycle.outcomes[0], cycle, num_rows=1, is_prefill=True)
        sequence.is_cached = row.is_resumed and self._backend.length(row.index) == row.num_cached
        return None

    def _run_cycle(self, sequences: list[_Sequence]) -> Cycle:
        """One cycle of the backend, at the fixed width or at the one that the schedule chooses and learns from.

        A backend that looks ahead is told the width of the cycle after it, too, so that one is chosen without knowing
        what this one keeps, while the device is busy with it. Other rows than were planned for are chosen for at once.
        """
        rows, planner = [sequence.row for sequence in sequences], self._planner
        if planner is None:
            for sequence in sequences:
                sequence.plan(width=self.block_size - 1)
                sequence.plan_next(self.block_size - 1)
            return self._backend.cycle(rows)
        candidates = []
        for sequence in sequences:
            sequence.survival = sequence.survival or planner.policy.new_survival()
            candidates.append(Candidate(sequence.survival, sequence.room))
        # An exact pass sees all slots that its row will need.
        num_slots = max(row.max_tokens if self._backend.exact else row.num_cached for row in rows)
        batch = tuple(row.index for row in rows)
        choice = planner.choose(batch, candidates, num_slots)
        for sequence in sequences:
            sequence.plan(width=choice.width)

        def plan_next() -> None:
            after = planner.plan(batch, candidates, num_slots, choice)
            for sequence in sequences:
                sequence.plan_next(after.width)

        looks_ahead = self._backend.looks_ahead
        cycle = self._backend.cycle(rows, meanwhile=plan_next if looks_ahead else None)
        widths, accepted = [row.width for row in rows], [outcome.num_accepted for outcome in cycle.outcomes]
        planner.note(choice, candidates, num_slots, widths, accepted, cycle.draft_ms + cycle.verify_ms)
        if not looks_ahead:
            planner.learn()
        return cycle

    def _new_sequence(self, request: Request, index: int) -> _Sequence:
        prompt = list(request.prompt_ids)
        check_prompt(len(prompt), self._backend.max_positions)
        sampling, stopping = request.sampling, request.stopping
        seed = 0
        if sampling.effective_rule != "greedy":
            seed = int(torch.randint(2**63 - 1, ())) if sampling.seed is None else sampling.seed
        row = Row(
            index=index,
            tokens=prompt,
            num_prompt=len(prompt),
            max_tokens=len(prompt) + stopping.max_new_tokens,
            block_size=self.block_size,
            sampling=sampling,
            seed=seed,
            wants_logprobs=request.logprobs,
            wants_logits=request.logits,
        )
        stop = StopCheck(
            stopping,
            num_prompt=len(prompt),
            tokenizer=self._tokenizer,
            criteria=request.stopping_criteria,
            device=self._backend.device,
        )
        min_length = None
        if stopping.min_new_tokens and stopping.eos_token_ids:
            eos = sorted(stopping.eos_token_ids)
            min_length = MinNewTokensLengthLogitsProcessor(
                len(prompt), stopping.min_new_tokens, eos, device=self._backend.device
            )
        return _Sequence(row, request, stop, min_length)

    def _shared_prefix(self, request: Request, row: int) -> int:
        """Cached tokens of a finished row that the prompt begins with, at most all but its last."""
        if row not in self._sequences:
            raise ValueError(f"reuse_row: row {row} is not admitted")
        if not self._sequences[row].is_finished:
            raise ValueError(f"reuse_row: row {row} is not finished")
        cached = self._sequences[row].row.tokens[: self._backend.length(row)]
        limit = min(len(cached), len(request.prompt_ids) - 1)
        return next((i for i in range(limit) if cached[i] != request.prompt_ids[i]), max(limit, 0))

    def _advance(
        self, sequence: _Sequence, outcome: Outcome, cycle: Cycle, *, num_rows: int, is_prefill: bool = False
    ) -> Record:
        """Enter a row's outcome: cut at a stop, roll the cache back to before the anchor, count, report."""
        row = sequence.row
        row.tokens.extend(outcome.tokens)
        if sequence.scores is not None and outcome.scores is not None:
            sequence.scores += tuple(outcome.scores.unsqueeze(1).unbind(0))
        num_kept, reason = sequence.stop.cut(row.tokens, len(outcome.tokens), sequence.scores)
        num_cut = len(outcome.tokens) - num_kept
        if num_cut:
            del row.tokens[-num_cut:]
            self._backend.truncate(row.index, row.num_cached)
        sequence.is_finished = reason is not None
        # A cut before the last token drops the bonus first, then drafts.
        num_accepted = min(outcome.num_accepted, num_kept)
        draft_ms, verify_ms = cycle.draft_ms / num_rows, cycle.verify_ms / num_rows
        if is_prefill:
            verify_ms = sequence.stats.prefill_ms
            sequence.stats.count_prefill(num_tokens=num_kept)
        else:
            sequence.stats.count_cycle(
                num_drafted=row.width,
                num_accepted=num_accepted,
                num_tokens=num_kept,
                draft_ms=draft_ms,
                verify_ms=verify_ms,
            )
        return Record(
            row=row.index,
            token_ids=tuple(row.tokens[-num_kept:]),
            num_drafted=0 if is_prefill else row.width,
            num_accepted=num_accepted,
            finish_reason=reason,
            logprobs=None if outcome.logprobs is None else tuple(outcome.logprobs[:num_kept]),
            draft_ms=draft_ms,
            verify_ms=verify_ms,
            draft_ids=tuple(outcome.drafts),
            logits=None if outcome.logits is None else outcome.logits[:num_kept],
            scores=None if outcome.scores is None else outcome.scores[:num_kept],
        )
