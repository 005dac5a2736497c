"""Backends with pages for tests of the scheduler: one whose every bit is known, and the portable one with a budget."""

import hashlib
from collections.abc import Callable

import torch

from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.row import Cycle, Outcome, Row
from orthrus.decoding.schedule import Experience, experience_of
from orthrus.engine.kv import PagePool, PageTables

VOCABULARY = 50


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


class FakeBackend:
    """A model whose state at a slot is a digest of the state before it, the token, and how the slot was computed.

    The next token is a digest of the last state, read through the pages; so whatever is written to a wrong page, shared
    with the wrong text, prefilled by other chunks or replayed in another shape changes the text from there on. With
    `is_invariant` the manner of computing does not count, as for kernels whose rows depend on nothing else.
    """

    device = torch.device("cpu")
    max_positions = 10_000
    exact = looks_ahead = False

    def __init__(
        self,
        num_pages: int,
        *,
        page_slots: int = 4,
        prefill_chunk: int = 8,
        max_block_size: int = 6,
        is_invariant: bool = True,
    ):
        self.tables = PageTables(PagePool(num_pages, page_slots))
        self.prefill_chunk, self.max_block_size, self.is_invariant = prefill_chunk, max_block_size, is_invariant
        self.memory: dict[tuple[int, int], int] = {}
        self.passes: list[tuple[str, int, int]] = []
        """(kind, row, positions) of each prefill, replay and cycle."""

    def _state(self, row: int, slot: int) -> int:
        page_slots = self.tables.pool.page_slots
        return self.memory[self.tables.pages(row)[slot // page_slots], slot % page_slots] if slot >= 0 else 0

    def _write(self, row: int, start: int, tokens: list[int], shape: tuple) -> list[int]:
        """States of slots start, start + 1, ..., written; they are reserved by the scheduler."""
        assert self.tables.capacity(row) >= start + len(tokens), f"row {row}: nothing is reserved for its pass"
        assert not self.tables.writable(row, start, start + len(tokens)), "only full pages are ever shared"
        pages, page_slots, states = self.tables.pages(row), self.tables.pool.page_slots, []
        state = self._state(row, start - 1)
        for slot, token in enumerate(tokens, start):
            state = digest(state, token, None if self.is_invariant else shape)
            self.memory[pages[slot // page_slots], slot % page_slots] = state
            states.append(state)
        return states

    def _next(self, row: Row, state: int, position: int) -> int:
        return digest(state, row.seed, position) % VOCABULARY

    def prefill(self, row: Row, *, num_kept: int = 0, limit: int | None = None) -> Cycle:
        index = row.index
        if index not in self.tables:
            self.tables.add(index)
        assert self.tables.length(index) == num_kept
        num_wanted = len(row.tokens) - row.is_resumed
        state = None
        while (start := self.tables.length(index)) < num_wanted and (limit is None or start - num_kept < limit):
            if start < row.num_prompt:
                end = min(row.num_prompt, (start // self.prefill_chunk + 1) * self.prefill_chunk)
                kind, shape = "prefill", (start, end)
            else:
                end, kind, shape = min(start + row.block_size, num_wanted), "replay", ("verify", row.block_size)
            state = self._write(index, start, row.tokens[start:end], shape)[-1]
            self.tables.commit(index, end - start)
            self.passes.append((kind, index, end - start))
        if state is None or row.is_resumed or self.tables.length(index) < num_wanted:
            return Cycle(outcomes=[], draft_ms=0.0, verify_ms=1.0)
        if row.processor is not None:
            row.processor(torch.tensor([row.tokens]), torch.zeros(1, VOCABULARY))
        token = self._next(row, state, num_wanted)
        return Cycle(outcomes=[Outcome(tokens=[token], drafts=[])], draft_ms=0.0, verify_ms=1.0)

    def cycle(self, rows: list[Row], *, meanwhile: Callable[[], None] | None = None) -> Cycle:
        outcomes = []
        for row in rows:
            start, shape = row.num_cached, ("verify", row.block_size)
            truth = [row.tokens[-1]]
            for state in self._write(row.index, start, truth, shape):
                truth.append(self._next(row, state, start + 1))
            while len(truth) <= row.width + 1:
                state = self._write(row.index, start + len(truth) - 1, truth[-1:], shape)[-1]
                truth.append(self._next(row, state, start + len(truth)))
            num_right = digest(truth[0], start) % (row.width + 1)
            drafts = [t if j < num_right else (t + 1) % VOCABULARY for j, t in enumerate(truth[1 : row.width + 1])]
            # The verify pass, padding included: what is rejected leaves its states behind the length.
            block = [truth[0], *drafts, *[0] * (row.block_size - 1 - row.width)]
            self._write(row.index, start, block, shape)
            self.tables.commit(row.index, num_right + 1)
            self.passes.append(("cycle", row.index, row.width + 1))
            outcomes.append(Outcome(tokens=truth[1 : num_right + 2], drafts=drafts))
        return Cycle(outcomes=outcomes, draft_ms=1.0, verify_ms=1.0)

    def release(self, row: int) -> None:
        if row in self.tables:
            self.tables.remove(row)

    def truncate(self, row: int, length: int) -> None:
        self.tables.truncate(row, length)

    def experience(self, block_size: int) -> Experience:
        return experience_of(self, block_size)

    def length(self, row: int) -> int:
        return self.tables.length(row) if row in self.tables else 0


class BudgetedBackend(PortableBackend):
    """The portable backend with pages that are only counted, so that its rows are preempted like the engine's."""

    def __init__(self, model: torch.nn.Module, num_pages: int, *, page_slots: int = 8, **options):
        super().__init__(model, **options)
        self.tables = PageTables(PagePool(num_pages, page_slots))

    def _count(self, row: int) -> None:
        self.tables.commit(row, super().length(row) - self.tables.length(row))

    def prefill(self, row: Row, *, num_kept: int = 0, limit: int | None = None) -> Cycle:
        cycle = super().prefill(row, num_kept=num_kept, limit=limit)
        self._count(row.index)
        return cycle

    def cycle(self, rows: list[Row], *, meanwhile: Callable[[], None] | None = None) -> Cycle:
        cycle = super().cycle(rows, meanwhile=meanwhile)
        for row in rows:
            self._count(row.index)
        return cycle

    def release(self, row: int) -> None:
        super().release(row)
        if row in self.tables:
            self.tables.remove(row)

    def truncate(self, row: int, length: int) -> None:
        super().truncate(row, length)
        self.tables.truncate(row, length)
