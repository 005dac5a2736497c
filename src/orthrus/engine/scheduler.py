"""Continuous batching: requests join and leave between cycles of one decoder.

A step is one cycle of all rows that are decoded, then prefill passes within what is left of the step's budget, so a
long prompt delays a cycle by a bounded amount, and a busy batch never stops prompts altogether (one pass a step is
always run). Requests are served in the order of submission: nobody is admitted before one that came earlier, so a
stream of short prompts cannot starve a long one.

A request is admitted when the cache has pages for its tokens and a block. Decoding may still run out of pages: then the
youngest request gives all of its pages back and waits again, at the head of the queue. It is prefilled and replayed so
that its cache has the bits it had (`Backend.prefill`), hence its text is the one it would have written. The oldest
never gives way, and any request alone fits (`submit` refuses others), so every request comes to its end.
"""

from bisect import insort

from orthrus.decoding.decoder import Decoder, Record, Request
from orthrus.decoding.stats import DecodingStats
from orthrus.engine.kv import OutOfPages, PageTables
from orthrus.engine.prefix import PrefixIndex


class Scheduler:
    """A queue in front of a decoder, which is the scheduler's alone. A request's id is its row.

    `tables` are those of the decoder's backend, which adds a row that has none, commits and truncates rows, and removes
    those it releases; without them memory is taken as unlimited. `prefix` is an index over the same pool.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        tables: PageTables | None = None,
        prefix: PrefixIndex | None = None,
        max_rows: int = 64,
        step_tokens: int = 1024,
        reuses_new_tokens: bool = False,
    ):
        for name, value in (("max_rows", max_rows), ("step_tokens", step_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        assert prefix is None or tables is not None, "a prefix index needs the tables of its pool"
        self._decoder, self._tables, self._prefix = decoder, tables, prefix
        self.max_rows = max_rows
        """Rows admitted at once."""
        self.step_tokens = step_tokens
        """Positions of a step: a block for each row of the cycle, and prompts with the rest (the last prefill pass may
        go beyond, and one is always run)."""
        self.reuses_new_tokens = reuses_new_tokens
        """Whether pages of new tokens may be entered in `prefix`: the backend's bits must not depend on the pass."""
        self.num_preemptions = 0
        self.failed: dict[int, Exception] = {}
        """Requests that the last step ended because their prefill raised (a processor may), and what it raised."""
        self._queue: list[int] = []  # in order of id: a preempted row is older than all that wait
        self._running: list[int] = []  # in order of id: at most the last is not prefilled yet
        self._num_prompt: dict[int, int] = {}
        self._ended: dict[int, DecodingStats] = {}
        self._is_blocked = False  # the first of the queue found too few pages, and nobody has left since

    @property
    def num_waiting(self) -> int:
        """Requests that are not admitted, or not any more."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._queue and not self._running

    def submit(self, request: Request) -> int:
        """Queue a request; its id. `ValueError` for one that can never be served."""
        num_prompt = len(request.prompt_ids)
        if self._tables is not None:
            pool = self._tables.pool
            num_slots = num_prompt + request.stopping.max_new_tokens + self._decoder.block_size
            if pool.num_pages_of(num_slots) > pool.num_pages:
                raise ValueError(
                    f"prompt, max_new_tokens and a block are {num_slots} tokens, the cache holds "
                    f"{pool.num_pages * pool.page_slots}: ask for fewer, or give the cache more memory"
                )
        row = self._decoder.begin(request)
        self._num_prompt[row] = num_prompt
        self._queue.append(row)
        return row

    def cancel(self, request: int) -> bool:
        """Forget a request between steps; False where it is over already."""
        if request in self._queue:
            self._queue.remove(request)
        elif request in self._running:
            self._enter_pages(request)
            self._running.remove(request)
        else:
            return False
        self._decoder.release(request)
        self._forget(request)
        return True

    def stats(self, request: int) -> DecodingStats:
        """What decoding a request took so far; for one that has ended until the next step."""
        return self._ended[request] if request in self._ended else self._decoder.stats(request)

    def step(self) -> dict[int, Record]:
        """One cycle and some prefill: what each request gained, by id, at most one record each.

        Read `failed` beside it. An error of the cycle itself is raised: it cannot be told whose it is.
        """
        self._ended, self.failed = {}, {}
        self._make_room()
        records = {record.row: record for record in self._decoder.step()}
        budget = self.step_tokens - sum(record.num_drafted + 1 for record in records.values())
        for record in records.values():
            self._end_if_finished(record)
        self._prefill(max(budget, 1), records)
        return records

    def _make_room(self) -> None:
        """Reserve a block for each row of the coming cycle, the oldest first, at the cost of the youngest."""
        if self._tables is None:
            return
        active = self._decoder.active
        for row in [row for row in self._running if row in active]:
            while row in self._running:
                try:
                    self._tables.reserve(row, self._decoder.num_cached(row) + self._decoder.block_size)
                    break
                except OutOfPages:
                    self._preempt(self._running[-1])

    def _preempt(self, row: int) -> None:
        self._enter_pages(row)
        self._running.remove(row)
        self._decoder.preempt(row)
        insort(self._queue, row)
        self._is_blocked = False
        self.num_preemptions += 1

    def _prefill(self, budget: int, records: dict[int, Record]) -> None:
        """Prefill passes in order of submission until the budget is spent or nobody can be admitted."""
        while budget > 0:
            row = self._running[-1] if self._running and self._running[-1] in self._decoder.waiting else self._admit()
            if row is None:
                return
            num_before = self._decoder.num_cached(row)
            try:
                record = self._decoder.prefill(row, limit=budget)
            except BaseException as error:  # the decoder has released the row
                self._running.remove(row)
                self._forget(row)
                if not isinstance(error, Exception):
                    raise
                self.failed[row] = error
                continue
            if record is not None:
                records[row] = record
            num_new = self._decoder.num_cached(row) - num_before
            is_waiting = row in self._decoder.waiting
            assert num_new > 0 or not is_waiting, f"request {row}: its prefill does not go on"
            budget -= max(num_new, 1)
            if not is_waiting:
                self._enter_pages(row)
            if record is not None:
                self._end_if_finished(record)

    def _admit(self) -> int | None:
        """Give the first of the queue a row and pages for its tokens and a block, or nobody where they are missing."""
        if not self._queue or len(self._running) == self.max_rows or self._is_blocked:
            return None
        row = self._queue[0]
        if self._tables is not None and not self._take_pages(row, self._tables):
            self._is_blocked = True
            return None
        del self._queue[0]
        self._running.append(row)
        return row

    def _take_pages(self, row: int, tables: PageTables) -> bool:
        tokens = self._decoder.tokens(row)
        num_slots = len(tokens) + self._decoder.block_size
        tables.add(row)
        num_available = tables.pool.num_free
        if self._prefix is not None:
            pages = self._prefix.lookup(tokens, limit=len(tokens) - 1)
            tables.share(row, pages, len(pages) * tables.pool.page_slots)
            num_available += self._prefix.num_reclaimable
        # A page to spare for each row in decoding, lest the new one is preempted as soon as it is prefilled.
        if num_available < tables.num_missing(row, num_slots) + len(self._running):
            tables.remove(row)
            return False
        tables.reserve(row, num_slots)
        if self._prefix is not None:
            self._prefix.stats.count(num_tokens=len(tokens), num_reused=tables.length(row))
        return True

    def _enter_pages(self, row: int) -> None:
        """Enter a row's full pages in the index of prefixes."""
        if self._prefix is None or self._tables is None:
            return
        num_cached = self._decoder.num_cached(row)
        limit = num_cached if self.reuses_new_tokens else min(num_cached, self._num_prompt[row])
        self._prefix.insert(self._decoder.tokens(row), self._tables.pages(row), limit=limit)

    def _end_if_finished(self, record: Record) -> None:
        if record.finish_reason is None:
            return
        self._enter_pages(record.row)
        self._running.remove(record.row)
        self._ended[record.row] = self._decoder.stats(record.row)
        self._decoder.release(record.row)
        self._forget(record.row)

    def _forget(self, row: int) -> None:
        del self._num_prompt[row]
        self._is_blocked = False
