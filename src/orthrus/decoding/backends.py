"""Which backend decodes a call: the engine where it can, the portable one elsewhere, and why.

The engine lies above this layer, which therefore knows its name alone and imports it when a call wants it. Without
the package (`trust_remote_code` runs a copy of this file, which lies beside a checkpoint) there is none.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import nn

from orthrus.decoding.portable import PREFILL_CHUNK, PortableBackend
from orthrus.decoding.row import Backend
from orthrus.decoding.sampling import Sampling

BackendName = Literal["auto", "engine", "portable"]
"""What a caller may ask for: "auto" takes the engine on a GPU where it can."""
DraftPrecision = Literal["fp8"]
"""What a second copy of the weights may be in, which drafts alone read."""
KEEPER = "orthrus.engine.keeper"
"""The module that lends a model's engine: `borrow`, `release`, `release_moved`."""
OWN_NAME = "orthrus.decoding.backends"


class Chosen:
    """A backend for one call or one session; `close` (or the end of a `with`) gives it back."""

    def __init__(self, backend: Backend, name: str, *, exact: bool, refusal: str | None = None):
        self.backend, self.name = backend, name
        """`name` is "engine" or "portable"."""
        self.exact = exact
        """Whether committed logits have the same bits with and without drafting."""
        self.refusal = refusal
        """Why "auto" did not take the engine on a GPU; None where it did, or where nobody would have expected it."""
        self.draft_precision: DraftPrecision | None = None
        """What drafts' own copy of the weights is in; None: they read the model's."""
        self.draft_bytes = 0
        """What that copy takes."""
        self._stack = ExitStack()

    @property
    def default_block_size(self) -> Literal["auto"] | None:
        """The block size of a caller who names none: "auto" where no width changes a bit, else the trained one (None).

        That is the engine on a GPU, where a fixed block can be slower than plain decoding, and auto, once it had
        learnt, was within 1 % of the best fixed one (N 8.5, batch 1 and 16: docs/benchmarks.md). Elsewhere a width is
        part of what `exact` fixes, or short texts lost 10 % while auto was learning (docs/experiments.md).
        """
        return "auto" if self.name == "engine" and self.exact else None

    def block_size_for(self, samplings: Iterable[Sampling], *, drafting: bool) -> Literal["auto"] | None:
        """That default, where it cannot change a text: a speculative one depends on widths, hence on the clock.
        Where nothing is drafted nothing is chosen."""
        is_speculative = any(sampling.effective_rule == "speculative" for sampling in samplings)
        return self.default_block_size if drafting and not is_speculative else None

    def __enter__(self) -> "Chosen":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the backend back: its rows are forgotten."""
        self._stack.close()


def choose_backend(
    model: nn.Module,
    *,
    wish: BackendName = "auto",
    row_tokens: Sequence[int],
    exact: bool | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cache_bytes: int | None = None,
    is_elastic: bool = False,
    draft_precision: DraftPrecision | None = None,
    is_drafting: bool = True,
) -> Chosen:
    """A backend for rows of at most so many tokens each, new ones included, all at once.

    `exact` as in `generate`. `cache_bytes`: what the engine's keys and values take; None: what these rows need, which
    is kept for the calls after this one. `is_elastic`: where memory holds fewer tokens, the engine takes what there is,
    and refuses rows that do not fit when they are admitted. `ValueError` for a wish that is not granted, in the words
    of the backend that refuses.

    `draft_precision`: the engine's drafts read a second copy of the weights in it. The portable backend has none, and
    "auto" does not fall back to it then: speed is all that was asked for. Callers that draft nothing
    (`is_drafting=False`) take the engine that there is, with a copy or without.
    """
    check_wish(wish, cache_bytes, draft_precision)
    refusal = None
    if wish == "engine" or (wish == "auto" and is_preferred(model)):
        try:
            if wish == "auto":
                check_attention(model)
            return borrow_engine(
                model, row_tokens=row_tokens, exact=exact, prefill_chunk=prefill_chunk, cache_bytes=cache_bytes,
                is_elastic=is_elastic, draft_precision=draft_precision, is_drafting=is_drafting,
            )  # fmt: skip
        except ValueError as error:
            if wish == "engine":
                raise
            refusal = str(error)
    if draft_precision is not None:
        reason = refusal or f"'auto' takes it on a GPU, this model is on {model.device.type}; ask for backend='engine'"
        raise ValueError(
            f"draft_precision={draft_precision!r} is for the engine alone, which is not used here: {reason}"
        )
    if cache_bytes is not None and refusal is None:  # else the caller is told why the engine is not used
        raise ValueError(
            f"cache_bytes sizes the engine's cache, and the engine is not used here: 'auto' takes it on a GPU, this "
            f"model is on {model.device.type}; leave cache_bytes out"
        )
    portable = PortableBackend(model, exact=exact, prefill_chunk=prefill_chunk)
    return Chosen(portable, "portable", exact=portable.exact, refusal=refusal)


def check_wish(wish: str, cache_bytes: int | None, draft_precision: str | None = None) -> None:
    """`ValueError` for another name, and for a size or a precision of what is not used."""
    if wish not in (names := get_args(BackendName)):
        raise ValueError(f"backend must be one of {', '.join(map(repr, names))}, got {wish!r}")
    if cache_bytes is not None and wish == "portable":
        raise ValueError("cache_bytes sizes the engine's cache and has no effect with backend='portable'")
    if draft_precision not in (None, *(names := get_args(DraftPrecision))):
        raise ValueError(f"draft_precision must be {', '.join(map(repr, names))} or None, got {draft_precision!r}")
    if draft_precision is not None and wish == "portable":
        raise ValueError(f"draft_precision={draft_precision!r} is for the engine alone: leave out backend='portable'")


def is_preferred(model: nn.Module) -> bool:
    """Whether "auto" tries the engine: on a CPU its slow twins would run, which are there for tests."""
    return model.device.type == "cuda"


def check_attention(model: nn.Module) -> None:
    """`ValueError` where somebody chose an attention, which the engine would not run; "sdpa" is what nobody chose."""
    if (name := model.config._attn_implementation) != "sdpa":
        raise ValueError(
            f"attn_implementation {name!r} is run by the portable backend; the engine has an attention of its own: "
            "load the model with 'sdpa', or ask for backend='engine'"
        )


def borrow_engine(model: nn.Module, *, exact: bool | None, **settings: Any) -> Chosen:
    """The model's engine, which nobody else uses until it is given back; `ValueError` naming what it does not do."""
    if __name__ != OWN_NAME:  # two copies of this package's types must not meet
        raise ValueError(
            "the engine is part of the installed package, and this model runs the code of its checkpoint: "
            "load it with orthrus.OrthrusForCausalLM"
        )
    is_exact = model.device.type == "cuda"
    if exact and not is_exact:
        raise ValueError(
            f"exact=True is not kept by the engine on {model.device.type}, where plain torch stands in for its "
            "kernels: decode with the portable backend"
        )
    check_autocast(model.device)
    try:
        loan = import_module(KEEPER).borrow(model, **settings)
    except ImportError as error:
        raise ValueError(f"the engine cannot be imported here ({error}): decode with the portable backend") from None
    chosen = Chosen(loan.backend, "engine", exact=is_exact)
    weights = loan.backend.weights
    chosen.draft_precision, chosen.draft_bytes = weights.draft_precision, weights.draft_bytes
    chosen._stack.callback(loan.close)
    return chosen


def loaded_keeper() -> Any:
    """The engine's keeper if this process ever wanted one; without it no model has an engine."""
    return sys.modules.get(KEEPER) if __name__ == OWN_NAME else None


def check_autocast(device: torch.device) -> None:
    """`ValueError` under autocast, which the engine's kernels do not follow."""
    if torch.is_autocast_enabled(device.type):
        raise ValueError("autocast is on, which the engine does not follow: decode outside of it, or portably")
