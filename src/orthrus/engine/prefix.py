"""Pages of texts seen before, found by what they hold: shared system prompts and earlier turns are not computed twice.

A full page is known by a digest of its parent's digest and its own token ids, so equal keys mean equal text from the
very first token on. The root's digest takes a salt: whatever else decides the bits of a page.

Reuse must give the bits that recomputing would give, hence `quantum`: a reused beginning ends at a multiple of it.

* Where a row's bits depend on nothing but that row (the engine's kernels), a position's keys and values are the same
  whichever pass wrote them, so any page boundary is right, and pages of new tokens may be entered as well.
* Elsewhere the shape of the pass decides. Recomputing prefills in chunks with boundaries at multiples of the chunk;
  reuse up to such a boundary leaves the chunks behind it as they were, and only pages that whole chunks of a prompt
  wrote may be entered: the last, shorter chunk of one prompt is a full one of a longer prompt.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import lcm

from orthrus.engine.kv import PagePool


@dataclass(slots=True)
class _Entry:
    page: int
    parent: bytes
    num_children: int = 0


@dataclass(kw_only=True, slots=True)
class PrefixStats:
    """What reuse saved so far."""

    num_rows: int = 0
    num_tokens: int = 0
    """Tokens of the texts that rows began with."""
    num_reused: int = 0
    """Tokens among them whose pages were found and shared."""
    num_evicted: int = 0
    """Pages given up because the pool ran out."""

    @property
    def hit_rate(self) -> float:
        """Reused / all tokens; 0 before any row began."""
        return self.num_reused / self.num_tokens if self.num_tokens else 0.0

    def count(self, *, num_tokens: int, num_reused: int) -> None:
        """Enter a row that begins."""
        self.num_rows += 1
        self.num_tokens += num_tokens
        self.num_reused += num_reused


class PrefixIndex:
    """Full pages by their text. Each is held once by the index, until the pool runs out and nobody else holds it."""

    def __init__(self, pool: PagePool, *, quantum: int, salt: bytes = b""):
        assert pool.reclaim is None, "the pool has an index already"
        self._pool = pool
        self.quantum = lcm(quantum, pool.page_slots)
        """Slots; a reused beginning ends at a multiple of it, and so does what is entered."""
        self._root = blake2b(salt, digest_size=16).digest()
        # Oldest use first, and a page is used whenever one behind it is: children always stand before their parents.
        self._entries: dict[bytes, _Entry] = {}
        self.stats = PrefixStats()
        pool.reclaim = self._reclaim

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_reclaimable(self) -> int:
        """Pages that the index would give up: those that nobody else holds, nor a page behind them."""
        return sum(1 for _ in self._victims())

    def lookup(self, tokens: Sequence[int], *, limit: int) -> list[int]:
        """The pages of the longest known beginning of `tokens`, at most `limit` slots.

        Nobody but the index need hold them: `PageTables.share` them before anything else is asked of the pool.
        """
        found = []
        for key in self._keys(tokens, min(limit, len(tokens))):
            if key not in self._entries:
                break
            found.append(key)
        page_slots = self._pool.page_slots
        num_slots = len(found) * page_slots // self.quantum * self.quantum
        del found[num_slots // page_slots :]
        self._touch(found)
        return [self._entries[key].page for key in found]

    def insert(self, tokens: Sequence[int], pages: Sequence[int], *, limit: int) -> None:
        """Enter the full pages of a row's first `limit` slots, which the row must hold.

        Where a text is known already the bits are the same: its older page stays if somebody holds it, else it is
        given back for the row's, so that what stands before a page in use is in use too and no page is kept twice.
        """
        keys = list(self._keys(tokens, min(limit, len(tokens))))
        parent = self._root
        for key, page in zip(keys, pages, strict=False):
            entry = self._entries.get(key)
            if entry is None:
                self._pool.retain([page])
                self._entries[key] = _Entry(page, parent)
                if parent in self._entries:
                    self._entries[parent].num_children += 1
            elif self._pool.num_holders(entry.page) == 1:
                self._pool.retain([page])
                self._pool.release([entry.page])
                entry.page = page
            parent = key
        self._touch(keys)

    def clear(self) -> None:
        """Forget everything, as when the weights change."""
        self._pool.release(entry.page for entry in self._entries.values())
        self._entries.clear()

    def _keys(self, tokens: Sequence[int], limit: int) -> Iterator[bytes]:
        """The keys of the full pages of the first `limit` slots, cut to a multiple of the quantum."""
        key, page_slots = self._root, self._pool.page_slots
        for start in range(0, limit // self.quantum * self.quantum, page_slots):
            ids = array("q", tokens[start : start + page_slots])
            key = blake2b(key + ids.tobytes(), digest_size=16).digest()
            yield key

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._entries[key] = self._entries.pop(key)

    def _victims(self) -> Iterator[bytes]:
        """Keys in the order in which they would be given up: least recently used first, no page before its children."""
        num_gone: dict[bytes, int] = {}
        for key, entry in self._entries.items():
            if self._pool.num_holders(entry.page) == 1 and entry.num_children == num_gone.get(key, 0):
                num_gone[entry.parent] = num_gone.get(entry.parent, 0) + 1
                yield key

    def _reclaim(self, num_pages: int) -> None:
        """Give up that many pages, or none where there are fewer: the pool cannot serve the request then anyway."""
        victims = [key for key, _ in zip(self._victims(), range(num_pages), strict=False)]
        if len(victims) < num_pages:
            return
        for key in victims:
            entry = self._entries.pop(key)
            if entry.parent in self._entries:
                self._entries[entry.parent].num_children -= 1
            self._pool.release([entry.page])
        self.stats.num_evicted += num_pages
