"""One sequence in decoding as a backend sees it, and what a backend answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from orthrus.decoding.sampling import Sampling
from orthrus.decoding.schedule import Experience

Processor = Callable[[Tensor, Tensor], Tensor]
"""processor(ids [1, n], scores [1, V]) -> scores [1, V]: the scores of the token that follows those ids."""


@dataclass(kw_only=True, slots=True)
class Row:
    """A sequence: the tokens so far (the last is the anchor, not cached yet) and how its next ones are chosen."""

    index: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    """Prompt and new tokens together, at most; a backend may size its cache by it."""
    block_size: int
    sampling: Sampling
    seed: int
    width: int = 0
    """Drafts wanted in the next cycle, 0 .. block_size - 1; 0 is plain AR decoding."""
    next_width: int | None = None
    """Drafts that the cycle behind it will want, at most; None: not known yet, or there may be no such cycle."""
    processor: Processor | None = None
    wants_logprobs: bool = False
    wants_logits: bool = False

    @property
    def num_cached(self) -> int:
        """Tokens before the anchor: the length that the row's cache must have before a cycle."""
        return len(self.tokens) - 1

    @property
    def is_resumed(self) -> bool:
        """Whether a prefill finds new tokens: the row was preempted, and its last token is an anchor already."""
        return len(self.tokens) > self.num_prompt


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What one pass or cycle decided for one row."""

    tokens: list[int]
    """Accepted drafts, then the correction or bonus token."""
    drafts: list[int]
    """Everything that was proposed, accepted or not."""
    logprobs: list[float] | None = None
    """log p of each token under the AR view's own logits, before processors and temperature."""
    logits: Tensor | None = None
    """The AR view's logits of each token, float32 [n, V], when wanted."""
    scores: Tensor | None = None
    """The same after processors and warpers."""

    @property
    def num_accepted(self) -> int:
        """Drafts kept."""
        return len(self.tokens) - 1


@dataclass(kw_only=True, slots=True)
class Cycle:
    """The outcomes of one cycle, in the order the rows were given in, and the time of its passes."""

    outcomes: list[Outcome]
    """Empty after a prefill that chose nothing."""
    draft_ms: float
    verify_ms: float


class Backend(Protocol):
    """What the loop needs from whoever runs the model."""

    max_block_size: int
    max_positions: int
    prefill_chunk: int
    """Prompt tokens of one prefill pass: passes begin and end at its absolute multiples, however a prompt is cut up."""
    exact: bool
    """Whether every AR pass of a row has block_size positions, whatever its width: one shape, hence one row's bits."""

    looks_ahead: bool
    """Whether it drafts for the cycle behind the one asked for, of `Row.next_width`: then widths are planned ahead."""

    @property
    def device(self) -> torch.device:
        """Where the backend's tensors live."""
        ...

    def prefill(self, row: Row, *, num_kept: int = 0, limit: int | None = None) -> Cycle:
        """Cache the row's tokens (the first `num_kept` are cached already) and choose the one that follows them.

        With a `limit` no pass begins once so many tokens are cached by this call, and where some are left nothing is
        chosen: the cycle has no outcomes. A row that has new tokens was preempted: its prompt is prefilled by the same
        passes, its new tokens but the anchor are replayed in passes of the verify pass's shape, so that what is cached
        has the bits it had, and nothing is chosen.
        """
        ...

    def cycle(self, rows: list[Row], *, meanwhile: Callable[[], None] | None = None) -> Cycle:
        """Draft `row.width` tokens for each row, verify, accept, and commit A + 1 positions of each row's cache.

        `meanwhile`, for a backend that looks ahead, is called once while the device verifies: it may set `next_width`.
        """
        ...

    def release(self, row: int) -> None:
        """Forget a row, if it is known."""

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's cached tokens from `length` on."""

    def length(self, row: int) -> int:
        """Cached tokens of a row, 0 where it is not known."""
        ...

    def experience(self, block_size: int) -> Experience:
        """What this process knows of the model as it is run here (`experience_of`)."""
