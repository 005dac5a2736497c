"""The index of pages: what it finds is what was entered, and it never keeps a page from those who need one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus.engine.kv import OutOfPages, PagePool, PageTables
from orthrus.engine.prefix import PrefixIndex

PAGE_SLOTS = 4


class Rig:
    """A pool, its tables and an index; texts are entered as a row that has been prefilled and released."""

    def __init__(self, num_pages: int = 20, quantum: int = 1):
        self.pool = PagePool(num_pages, PAGE_SLOTS)
        self.tables = PageTables(self.pool)
        self.index = PrefixIndex(self.pool, quantum=quantum)
        self.num_rows = 0

    def begin(self, tokens: list[int]) -> int:
        """A row that holds `tokens`, beginning with what the index knows."""
        row = self.num_rows = self.num_rows + 1
        self.tables.add(row)
        pages = self.index.lookup(tokens, limit=len(tokens) - 1)
        self.tables.share(row, pages, len(pages) * PAGE_SLOTS)
        self.index.stats.count(num_tokens=len(tokens), num_reused=self.tables.length(row))
        self.tables.reserve(row, len(tokens))
        self.tables.commit(row, len(tokens) - self.tables.length(row))
        return row

    def enter(self, tokens: list[int]) -> list[int]:
        row = self.begin(tokens)
        pages = self.tables.pages(row)
        self.index.insert(tokens, pages, limit=len(tokens))
        self.tables.remove(row)
        return pages


def test_the_longest_known_beginning_is_found():
    rig = Rig()
    text = list(range(14))
    pages = rig.enter(text)
    assert rig.index.lookup(text, limit=13) == pages[:3], "the last page is not full"
    assert rig.index.lookup([*text[:9], 99, 98, 97, 96], limit=12) == pages[:2]
    assert rig.index.lookup(text, limit=11) == pages[:2], "a page beyond the limit was taken"
    assert rig.index.lookup([99, *text[1:]], limit=13) == []
    # Equal tokens in a page are not enough: what stands before them decides its keys and values.
    assert rig.index.lookup([*range(50, 54), *text[4:]], limit=13) == []
    rig.begin([*text[:9], 99, 98])
    assert rig.index.stats.hit_rate == 8 / (14 + 11)


def test_another_salt_knows_nothing():
    pools = PagePool(4, PAGE_SLOTS), PagePool(4, PAGE_SLOTS)
    one, other = (PrefixIndex(pool, quantum=1, salt=salt) for pool, salt in zip(pools, (b"a", b"b"), strict=True))
    assert list(one._keys([1, 2, 3, 4], 4)) != list(other._keys([1, 2, 3, 4], 4))


@pytest.mark.parametrize("quantum", [8, 6])
def test_reuse_ends_at_a_boundary_of_chunks(quantum: int):
    """A quantum that pages do not divide counts by the multiples that both have."""
    rig = Rig(quantum=quantum)
    boundary = {8: 8, 6: 12}[quantum]
    text = list(range(31))
    pages = rig.enter(text)
    assert len(rig.index) == 31 // boundary * boundary // PAGE_SLOTS, "pages behind the last whole chunk were entered"
    for limit in range(31):
        found = rig.index.lookup(text, limit=limit)
        assert found == pages[: limit // boundary * boundary // PAGE_SLOTS]
    changed = [*text[:20], 99, *text[21:]]
    assert len(rig.index.lookup(changed, limit=30)) * PAGE_SLOTS == 20 // boundary * boundary


def test_pages_give_way_oldest_first_and_from_the_end():
    rig = Rig(num_pages=6)
    first, second = list(range(12)), list(range(50, 62))
    first_pages, second_pages = rig.enter(first), rig.enter(second)
    rig.index.lookup(first, limit=12)  # used later than the second
    rig.pool.release(rig.pool.allocate(1))
    assert rig.index.lookup(second, limit=12) == second_pages[:2], "a page went before the one behind it"
    rig.index.lookup(first, limit=12)
    held = rig.pool.allocate(4)
    assert set(held) == {*second_pages, first_pages[2]}
    assert rig.index.lookup(first, limit=12) == first_pages[:2]
    assert rig.index.stats.num_evicted == 4


def test_a_page_that_a_row_holds_is_never_given_up():
    rig = Rig(num_pages=6)
    text = list(range(12))
    rig.enter(text)
    row = rig.begin(text)  # shares two pages: the last token is always computed
    assert rig.index.num_reclaimable == 1 and rig.pool.num_free == 2
    known = len(rig.index)
    with pytest.raises(OutOfPages):
        rig.pool.allocate(4)
    assert len(rig.index) == known, "pages were given up for a request that could not be served"
    rig.pool.allocate(3)
    assert rig.tables.pages(row)[:2] == rig.index.lookup(text, limit=12)


def test_a_page_stays_while_one_behind_it_is_held():
    """Two rows computed the same beginning at once; the index keeps the pages of one, the next page is the other's."""
    rig = Rig()
    text = list(range(12))
    row, other = rig.begin(text), rig.begin(text[:8])
    rig.index.insert(text[:8], rig.tables.pages(other), limit=8)
    rig.index.insert(text, rig.tables.pages(row), limit=12)
    rig.tables.remove(other)
    assert len(rig.index) == 3
    assert rig.index.num_reclaimable == 0, "a page would go before the one behind it, which could not be found any more"
    rig.tables.remove(row)
    assert rig.index.num_reclaimable == 3


def test_a_page_computed_again_takes_the_place_of_one_that_nobody_holds():
    rig = Rig()
    text = list(range(8))
    rig.enter(text)
    row = rig.begin(text)  # its last token is always computed, so its second page is its own
    rig.index.insert(text, rig.tables.pages(row), limit=8)
    assert rig.index.lookup(text, limit=8) == rig.tables.pages(row)
    assert rig.pool.num_free == 18, "the same text is kept twice"


WORDS = st.lists(st.sampled_from([[1] * 4, [2] * 4, [3] * 3, [1] * 5]), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    moves=st.lists(st.tuples(WORDS, st.booleans()), max_size=25),
    num_pages=st.integers(8, 16),
    quantum=st.sampled_from([1, 8]),
)
def test_found_pages_hold_the_text_and_none_is_lost(moves, num_pages, quantum):
    """Random texts over few words: what is found was written for exactly that beginning, whatever was evicted."""
    rig = Rig(num_pages, quantum)
    written: dict[int, tuple[int, ...]] = {}
    alive: list[int] = []
    for words, stays in moves:
        text = [token for word in words for token in word]
        try:
            row = rig.begin(text)
        except OutOfPages:
            rig.tables.remove(rig.num_rows)
            while alive:
                rig.tables.remove(alive.pop())
            continue
        pages = rig.tables.pages(row)
        num_found = next((i for i, p in enumerate(pages) if written.get(p) != tuple(text[: (i + 1) * 4])), len(pages))
        for i in range(num_found, len(pages)):
            assert rig.pool.num_holders(pages[i]) == 1, "a page of another text was found"
            written[pages[i]] = tuple(text[: (i + 1) * 4])
        rig.index.insert(text, pages, limit=len(text))
        if stays:
            alive.append(row)
        else:
            rig.tables.remove(row)
        order = list(rig.index._entries)
        for at, key in enumerate(order):
            parent = rig.index._entries[key].parent
            assert parent == rig.index._root or order.index(parent) > at, "a page is older than one behind it"
    while alive:
        rig.tables.remove(alive.pop())
    assert rig.index.num_reclaimable == len(rig.index) == num_pages - rig.pool.num_free
    rig.index.clear()
    assert rig.pool.num_free == num_pages
