"""Pages: none leaked, none written while others see it, lengths right, whatever is asked in whatever order."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orthrus.engine.kv import OutOfPages, PagePool, PageTables

NUM_PAGES, PAGE_SLOTS = 12, 4


class Traffic(RuleBasedStateMachine):
    """Rows that grow, roll back, share and leave, against a cache of which every slot's content is known.

    The content of a slot is the row and position that wrote it; a row must always read what it, or whoever it shares
    with, wrote there.
    """

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, PAGE_SLOTS)
        self.tables = PageTables(self.pool)
        self.memory: dict[tuple[int, int], object] = {}
        self.texts: dict[int, list[object]] = {}
        self.num_rows = self.num_writes = 0

    def some_row(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.texts)))

    @rule()
    def add(self):
        self.tables.add(self.num_rows)
        self.texts[self.num_rows] = []
        self.num_rows += 1

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), num_slots=st.integers(1, 9), num_kept=st.integers(0, 9))
    def write(self, data, num_slots, num_kept):
        """A pass writes slots behind the length, and some of them are committed."""
        row = self.some_row(data)
        start = self.tables.length(row)
        before = self.tables.pages(row), self.pool.num_free
        try:
            self.tables.reserve(row, start + num_slots)
        except OutOfPages as error:
            assert (self.tables.pages(row), self.pool.num_free) == before, "a refused reservation left a trace"
            assert str(error.num_wanted) in str(error) and str(error.num_free) in str(error)
            return
        before = self.tables.pages(row), self.pool.num_free
        try:
            copies = self.tables.writable(row, start, start + num_slots)
        except OutOfPages:
            assert (self.tables.pages(row), self.pool.num_free) == before, "a refused replacement left a trace"
            return
        for old, new in copies:
            for slot in range(PAGE_SLOTS):
                self.memory[new, slot] = self.memory.get((old, slot))
        pages = self.tables.pages(row)
        written = []
        for slot in range(start, start + num_slots):
            assert self.pool.num_holders(pages[slot // PAGE_SLOTS]) == 1, "a page that others see would be written"
            self.num_writes += 1
            self.memory[pages[slot // PAGE_SLOTS], slot % PAGE_SLOTS] = self.num_writes
            written.append(self.num_writes)
        num_kept = min(num_kept, num_slots)
        self.tables.commit(row, num_kept)
        self.texts[row] += written[:num_kept]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data, share):
        row = self.some_row(data)
        length = int(share * self.tables.length(row))
        self.tables.truncate(row, length)
        del self.texts[row][length:]
        assert len(self.tables.pages(row)) == -(-length // PAGE_SLOTS), "pages wholly behind the length are kept"

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), share=st.floats(0, 1))
    def share(self, data, share):
        """A new row begins with part of another's text, which may end within a page."""
        row = self.some_row(data)
        num_slots = int(share * self.tables.length(row))
        self.add()
        new = self.num_rows - 1
        pages = self.tables.pages(row)[: -(-num_slots // PAGE_SLOTS)]
        self.tables.share(new, pages, num_slots)
        self.texts[new] = self.texts[row][:num_slots]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def remove(self, data):
        row = self.some_row(data)
        self.tables.remove(row)
        del self.texts[row]

    @invariant()
    def no_page_is_lost(self):
        held = Counter(page for row in self.texts for page in self.tables.pages(row))
        assert all(self.pool.num_holders(page) == held[page] for page in range(NUM_PAGES))
        assert self.pool.num_free == NUM_PAGES - len(held)

    @invariant()
    def every_row_reads_what_it_wrote(self):
        for row, text in self.texts.items():
            pages = self.tables.pages(row)
            assert self.tables.length(row) == len(text)
            read = [self.memory[pages[slot // PAGE_SLOTS], slot % PAGE_SLOTS] for slot in range(len(text))]
            assert read == text, f"row {row}: a page it reads was written by another"


Traffic.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTraffic = Traffic.TestCase


def test_pages_go_out_once_and_come_back():
    pool = PagePool(3, PAGE_SLOTS)
    first = pool.allocate(2)
    with pytest.raises(OutOfPages, match="2 pages are wanted, 1 of 3 are free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.retain(first)
    pool.release(first)
    assert pool.num_free == 1, "a page that is still held was given back"
    pool.release(first)
    assert pool.num_free == 3 and sorted(pool.allocate(3)) == [0, 1, 2]


def test_a_page_released_twice_is_a_bug():
    pool = PagePool(2, PAGE_SLOTS)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="is free"):
        pool.retain(pages)


def test_reclaim_is_asked_for_what_is_missing():
    pool = PagePool(4, PAGE_SLOTS)
    kept = pool.allocate(3)
    asked = []

    def reclaim(num_pages: int) -> None:
        asked.append(num_pages)
        pool.release([kept.pop() for _ in range(num_pages)])

    pool.reclaim = reclaim
    pool.allocate(3)
    assert asked == [2] and pool.num_free == 0 and len(kept) == 1


def test_committing_beyond_the_reservation_is_a_bug():
    tables = PageTables(PagePool(2, PAGE_SLOTS))
    tables.add(0)
    tables.reserve(0, 3)
    tables.commit(0, 4)
    with pytest.raises(AssertionError, match="cannot be committed"):
        tables.commit(0, 1)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_a_cache_without_pages_or_slots_is_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        PagePool(*sizes)
