"""The engine that a model keeps between calls: built when it is first wanted, lent to one caller at a time.

A model's engine joins its weights, allocates pages and captures graphs once. It lives as long as the model, which it
does not keep alive, and no longer than the model's weights stay where they are. Pages are as many as a call has needed
so far, or as many as it was told; more make a new engine, whose graphs are captured again. So do drafts that want
another precision: the old engine's memory is freed first, and the new one has as many pages, or as many as fit.
"""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from orthrus.decoding.backends import DraftPrecision
from orthrus.decoding.portable import PREFILL_CHUNK
from orthrus.decoding.row import Row
from orthrus.engine.engine import PAGE_SLOTS, EngineBackend, affordable_bytes, check_context, page_bytes
from orthrus.engine.kv import PagePool, PageTables
from orthrus.engine.weights import check_draft_precision, check_supported, copies_bytes, places_of

FIRST_TOKENS = 4096
"""Pages are made for so many tokens at least, where there is room: short calls then need no second engine."""


class KeptEngine(EngineBackend):
    """An engine that its model can outlive, and that begins each loan without rows."""

    @property
    def model(self) -> nn.Module:  # pyrefly: ignore[bad-override]
        """The model, which the caller keeps alive."""
        model = self._model()
        assert model is not None, "an engine was used behind its model's end"
        return model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = ref(model)

    def begin_loan(self, prefill_chunk: int) -> None:
        """Forget all rows, whatever state an interrupted call left them in."""
        self.prefill_chunk = prefill_chunk
        self.pool = PagePool(self.pool.num_pages, self.pool.page_slots)
        self.tables = PageTables(self.pool)
        self._ahead = None

    def _check(self, row: Row) -> None:
        super()._check(row)
        if self.pool.num_pages_of(row.max_tokens) > self.pool.num_pages:
            raise ValueError(
                f"prompt and max_new_tokens are {row.max_tokens} tokens, the engine's cache holds "
                f"{self.pool.num_pages * self.pool.page_slots}: ask for fewer, or decode with the portable backend"
            )


class Loan:
    """An engine in use: nobody else gets it until `close`."""

    def __init__(self, backend: KeptEngine, closing: ExitStack):
        self.backend = backend
        self._closing = closing

    def close(self) -> None:
        """Give the engine back."""
        self._closing.close()


class Keeper:
    """One model's engine, if it has one now."""

    def __init__(self) -> None:
        self.engine: KeptEngine | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None

    def lend(
        self, model: nn.Module, row_tokens: Sequence[int], *, prefill_chunk: int, cache_bytes: int | None,
        is_elastic: bool, draft_precision: DraftPrecision | None, is_drafting: bool,
    ) -> Loan:  # fmt: skip
        """See `borrow`. Waits for other threads."""
        with ExitStack() as stack:
            self._acquire()
            stack.callback(self._give_back)
            if model.device.type == "cuda":
                # Triton launches, and events are recorded, where the process is.
                stack.enter_context(torch.cuda.device(model.device))
            # Parameters made into inference tensors could never be trained again.
            with torch.inference_mode(False), torch.no_grad():
                engine = self._engine_for(
                    model, row_tokens, cache_bytes=cache_bytes, is_elastic=is_elastic, draft_precision=draft_precision,
                    is_drafting=is_drafting,
                )  # fmt: skip
            engine.begin_loan(prefill_chunk)
            return Loan(engine, stack.pop_all())

    def drop(self, *, unless_at: dict[str, int] | None = None) -> None:
        """Forget the engine, unless its weights lie there; one that is lent is left to its borrower."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self.engine is not None and self.engine.weights.places != unless_at:
                self._discard()
        finally:
            self._lock.release()

    @property
    def is_lent(self) -> bool:
        """Whether a caller has the engine."""
        return self._lock.locked()

    def _acquire(self) -> None:
        if self._owner == threading.get_ident():  # waiting for oneself would take for ever
            raise ValueError(
                "the model's engine is in use by a call that this one is part of (a streamer or a processor that "
                "generates, or a session that is still open): decode with the portable backend"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def _give_back(self) -> None:
        if self.engine is not None and self.engine.device.type == "cuda":
            # Drafts made ahead may be on their way: the next caller may use another stream, or free what they write to.
            torch.cuda.current_stream(self.engine.device).synchronize()
        self._owner = None
        self._lock.release()

    def _discard(self) -> None:
        is_cuda = self.engine is not None and self.engine.device.type == "cuda"
        self.engine = None
        if is_cuda:
            torch.cuda.empty_cache()

    def _engine_for(
        self, model: nn.Module, row_tokens: Sequence[int], *, cache_bytes: int | None, is_elastic: bool,
        draft_precision: DraftPrecision | None, is_drafting: bool,
    ) -> KeptEngine:  # fmt: skip
        """The engine there is, if it is the model's still, its pages are enough and its drafts are as wanted; else a
        new one in its place. A call without drafts takes an engine of any precision, if it is large enough."""
        if self.engine is not None and not is_current(self.engine, model):
            self._discard()
        num_needed = sum(-(-tokens // PAGE_SLOTS) for tokens in row_tokens)
        num_there, precision_there = 0, None
        if self.engine is not None:
            num_there, precision_there = self.engine.pool.num_pages, self.engine.weights.draft_precision
        if not is_drafting and num_needed <= num_there:
            draft_precision = precision_there
        more_bytes = copies_bytes(model, draft_precision) - copies_bytes(model, precision_there)
        num_pages = (
            self._grown(model, num_needed, num_there, is_elastic=is_elastic, more_bytes=more_bytes)
            if cache_bytes is None
            else fixed_pages(model, num_needed, cache_bytes)
        )
        if self.engine is None or (num_pages, draft_precision) != (num_there, precision_there):
            self._discard()
            self.engine = KeptEngine(model, num_pages=num_pages, page_slots=PAGE_SLOTS, draft_precision=draft_precision)
        return self.engine

    def _grown(self, model: nn.Module, num_needed: int, num_there: int, *, is_elastic: bool, more_bytes: int) -> int:
        """Pages for rows that need so many, of which there are some: those there, or more. Doubled at least, so that
        calls that grow slowly do not make an engine each. `more_bytes`: what drafts' copies are about to take."""
        is_enough = num_needed <= num_there
        if is_enough and more_bytes <= 0:
            return num_there
        wanted = num_there if is_enough else max(num_needed, 2 * num_there, -(-FIRST_TOKENS // PAGE_SLOTS))
        num_free = free_pages(model, more_bytes)
        if num_free is None:
            return wanted
        num_most = max(0, num_free + num_there)
        if num_needed > num_most and not (is_elastic and num_most):
            beside = f" beside {more_bytes} bytes of drafts' own weights" if more_bytes > 0 else ""
            raise ValueError(
                f"these rows may need {num_needed * PAGE_SLOTS} tokens of cache, the GPU's free memory holds "
                f"{num_most * PAGE_SLOTS}{beside}: ask for fewer rows or tokens"
            )
        return min(wanted, num_most)


def is_current(engine: KeptEngine, model: nn.Module) -> bool:
    """Whether the engine still reads the model's weights, and its drafts copies of what they are now."""
    return engine.weights.places == places_of(model) and engine.weights.are_copies_fresh(model)


def free_pages(model: nn.Module, more_bytes: int) -> int | None:
    """Pages that a GPU's free memory holds beside so many bytes, negative where not even those; None on a CPU, whose
    memory is not counted."""
    if model.device.type != "cuda":
        return None
    return (affordable_bytes(model.device) - more_bytes) // page_bytes(model, PAGE_SLOTS)


def fixed_pages(model: nn.Module, num_needed: int, cache_bytes: int) -> int:
    """Pages that a given number of bytes holds; `ValueError` where the rows may need more."""
    each = page_bytes(model, PAGE_SLOTS)
    if (num_pages := cache_bytes // each) < num_needed:
        raise ValueError(
            f"cache_bytes={cache_bytes} holds {max(num_pages, 0) * PAGE_SLOTS} tokens, these rows may need "
            f"{num_needed * PAGE_SLOTS}: give {num_needed * each}, or ask for fewer rows or tokens"
        )
    return num_pages


_keepers: "WeakKeyDictionary[nn.Module, Keeper]" = WeakKeyDictionary()
"""What `borrow` keeps, for as long as the model lives. Not on the model, which people copy and pickle."""


def borrow(
    model: nn.Module,
    *,
    row_tokens: Sequence[int],
    prefill_chunk: int = PREFILL_CHUNK,
    cache_bytes: int | None = None,
    is_elastic: bool = False,
    draft_precision: DraftPrecision | None = None,
    is_drafting: bool = True,
) -> Loan:
    """The model's engine, with pages for rows of so many tokens (prompt and new ones) all at once.

    The other settings are those of `orthrus.decoding.backends.choose_backend`. `ValueError` naming what the engine does
    not compute or has no room for; then the model is as it was.
    """
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
    check_supported(model)
    check_draft_precision(draft_precision, model.device)
    for num_tokens in row_tokens:
        check_context(num_tokens, model.config.max_position_embeddings)
    keeper = _keepers.setdefault(model, Keeper())
    return keeper.lend(
        model, row_tokens, prefill_chunk=prefill_chunk, cache_bytes=cache_bytes, is_elastic=is_elastic,
        draft_precision=draft_precision, is_drafting=is_drafting,
    )  # fmt: skip


def release(model: nn.Module) -> None:
    """Free the pages and graphs of a model's engine; its weights stay joined, which costs nothing.

    `ValueError` while somebody decodes with it.
    """
    keeper = _keepers.get(model)
    if keeper is None:
        return
    if keeper.is_lent:
        raise ValueError("the model's engine is decoding: release it when that is over")
    keeper.drop()


def release_moved(model: nn.Module) -> None:
    """Free the engine of a model whose weights no longer lie where it reads them: it would keep the old ones alive."""
    if (keeper := _keepers.get(model)) is not None:
        keeper.drop(unless_at=places_of(model))
