"""Which pages of the key/value cache belong to whom: host bookkeeping alone, no tensor is touched here.

A page holds the keys and values of `page_slots` consecutive positions, of all layers. A row's slot s (its absolute
position) lies in the row's page s // page_slots; its length counts committed slots, so a rollback is a smaller length.
Pages are shared by counting who holds them: rows with a common prefix, and the index of prefixes (engine/prefix.py).
Whoever writes asks `writable` first, so that a page that others can see is never written.
"""

from collections.abc import Callable, Iterable


class OutOfPages(RuntimeError):
    """More pages are wanted than there are; nothing has changed."""

    def __init__(self, num_wanted: int, num_free: int, num_pages: int):
        super().__init__(
            f"{num_wanted} pages are wanted, {num_free} of {num_pages} are free: release rows, or give the cache more"
        )
        self.num_wanted, self.num_free = num_wanted, num_free


class PagePool:
    """A fixed number of pages, each free or held by a counted number of holders."""

    reclaim: Callable[[int], None] | None = None
    """reclaim(n), called when n more free pages are wanted than there are: whoever keeps pages that nobody needs now
    releases up to n of them."""

    def __init__(self, num_pages: int, page_slots: int):
        for name, value in (("num_pages", num_pages), ("page_slots", page_slots)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_pages, self.page_slots = num_pages, page_slots
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: page 0 goes out first
        self._num_holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def num_holders(self, page: int) -> int:
        """How often a page is held."""
        return self._num_holders[page]

    def num_pages_of(self, num_slots: int) -> int:
        """Pages that hold this many slots."""
        return -(-num_slots // self.page_slots)

    def allocate(self, num_pages: int) -> list[int]:
        """Free pages, each held once from now on; `OutOfPages` when there are fewer."""
        assert num_pages >= 0, f"{num_pages} pages cannot be allocated"
        if num_pages > self.num_free and self.reclaim is not None:
            self.reclaim(num_pages - self.num_free)
        if num_pages > self.num_free:
            raise OutOfPages(num_pages, self.num_free, self.num_pages)
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            assert self._num_holders[page] == 0, f"page {page} was free and held"
            self._num_holders[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Hold pages once more; each must be held already."""
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is free: its content may be anyone's"
            self._num_holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Hold pages once less; those that nobody holds any more are free."""
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is released more often than it was held"
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                self._free.append(page)


class PageTables:
    """The pages of each row, in order of position, and how many of their slots are committed."""

    def __init__(self, pool: PagePool):
        self.pool = pool
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._pages

    def add(self, row: int) -> None:
        """Begin a row without pages."""
        assert row not in self, f"row {row} already has a table"
        self._pages[row], self._lengths[row] = [], 0

    def remove(self, row: int) -> None:
        """Forget a row and give its pages back."""
        self.pool.release(self._pages.pop(row))
        del self._lengths[row]

    def pages(self, row: int) -> list[int]:
        """The row's pages, reserved ones included."""
        return list(self._pages[row])

    def length(self, row: int) -> int:
        """Committed slots of a row."""
        return self._lengths[row]

    def capacity(self, row: int) -> int:
        """Slots of the row's pages."""
        return len(self._pages[row]) * self.pool.page_slots

    def num_missing(self, row: int, num_slots: int) -> int:
        """Pages that `reserve` would allocate."""
        return max(self.pool.num_pages_of(num_slots) - len(self._pages[row]), 0)

    def reserve(self, row: int, num_slots: int) -> None:
        """Give the row pages for this many slots; `OutOfPages` when there are too few, and then none is taken."""
        self._pages[row] += self.pool.allocate(self.num_missing(row, num_slots))

    def commit(self, row: int, num_slots: int) -> None:
        """The next `num_slots` slots, reserved and written, become part of the row."""
        length = self._lengths[row] + num_slots
        assert num_slots >= 0 and length <= self.capacity(row), (
            f"row {row}: {length} slots cannot be committed in {self.capacity(row)} reserved ones"
        )
        self._lengths[row] = length

    def truncate(self, row: int, length: int) -> None:
        """Forget the slots from `length` on; pages wholly behind it, reserved ones included, are given back."""
        assert 0 <= length <= self._lengths[row], f"row {row}: cannot cut {self._lengths[row]} slots to {length}"
        self._lengths[row] = length
        num_kept = self.pool.num_pages_of(length)
        dropped = self._pages[row][num_kept:]
        del self._pages[row][num_kept:]
        self.pool.release(dropped)

    def share(self, row: int, pages: list[int], num_slots: int) -> None:
        """Begin an empty row with pages that others hold, of which it reads the first `num_slots` slots.

        All pages but the last must be filled; the last, too, unless `writable` is asked before the row goes on in it.
        """
        assert not self._pages[row], f"row {row} has pages already: only an empty row can begin with another's"
        assert self.pool.num_pages_of(num_slots) == len(pages), f"{len(pages)} pages do not hold {num_slots} slots"
        self.pool.retain(pages)
        self._pages[row], self._lengths[row] = list(pages), num_slots

    def writable(self, row: int, start: int, end: int) -> list[tuple[int, int]]:
        """Replace pages of slots start .. end - 1 that others hold too by pages of the row's own: (old, new) of each.

        The caller copies old to new before it writes or asks for any other page: until then alone is `old` certain to
        be what it was. `OutOfPages` when there are too few free pages, and then none is replaced.
        """
        assert 0 <= start <= end <= self.capacity(row), f"row {row}: slots {start} .. {end} are not reserved"
        table = self._pages[row]
        first, behind = start // self.pool.page_slots, self.pool.num_pages_of(end) if end > start else 0
        shared = [i for i in range(first, behind) if self.pool.num_holders(table[i]) > 1]
        new = self.pool.allocate(len(shared))
        copies = [(table[i], page) for i, page in zip(shared, new, strict=True)]
        for i, page in zip(shared, new, strict=True):
            table[i] = page
        self.pool.release(old for old, _ in copies)
        return copies
