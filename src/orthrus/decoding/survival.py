"""How many of a cycle's drafts are likely to be kept: of a row, and of the rows of a process together.

S(j) = probability that the first j drafts are all kept; E(w) = 1 + S(1) + ... + S(w), the tokens of a cycle
"""

import math
from collections.abc import Sequence

WIDTHS = (0, 3, 7, 15, 31)
"""Drafts of a cycle that are offered, as far as the block has room for them, and the widest that it has room for."""

MEMORY = 0.9
"""What a row's evidence keeps of its weight from one drafted cycle to the next: it stands for some 10 cycles."""
PLAIN_MEMORY = 0.97
"""The same from one plain step to the next: the text moves on unseen."""
POOL_MEMORY = 0.998
"""The same for all rows together: some 500 cycles of a row."""
PRIOR_RATE = 0.65
"""How often a draft behind kept ones is kept, before anything was seen."""
STRENGTHS = (2.0, 8.0, 48.0)
"""Drafts of evidence that what all rows kept may count as in judging one of them, the middle one at first."""
SCORE_MEMORY = 0.99
"""What the score of each strength keeps of its weight from one cycle to the next."""


def offered_widths(block_size: int) -> tuple[int, ...]:
    """The widths to choose from, ascending, 0 first and block_size - 1 last."""
    return (*(width for width in WIDTHS if width < block_size - 1), block_size - 1)


class Survival:
    """How often drafts are kept, by stretch of the block: the first draft, then those up to each offered width.

    Within a stretch, a draft behind kept ones is kept at one rate. Only drafts whose predecessors were all kept are
    counted, so the rates mean the same whatever the widths were.
    """

    def __init__(self, block_size: int, *, memory: float):
        self._widths = offered_widths(block_size)
        self._edges = sorted({1, *self._widths[1:]})
        self._memory = memory
        self._unit = 1.0
        """What a draft counts now. It grows, so that the older ones count less without being touched."""
        self._kept = [0.0] * len(self._edges)
        """Drafts of each stretch that were kept."""
        self._reached = [0.0] * len(self._edges)
        """Drafts of each stretch all of whose predecessors were kept."""
        self.expected: list[float] | None = None
        """E(w) when it was last computed, of a row with room for all drafts."""

    def fade(self, factor: float) -> None:
        """Let what was seen so far count less."""
        self._unit /= factor
        if self._unit > 1e12:
            self._kept = [kept / self._unit for kept in self._kept]
            self._reached = [reached / self._unit for reached in self._reached]
            self._unit = 1.0

    def enter(self, width: int, num_accepted: int) -> None:
        """A cycle asked for `width` drafts and kept the first `num_accepted`."""
        self.fade(self._memory)
        for i, kept, is_lost in self._stretches(width, num_accepted):
            self._kept[i] += kept * self._unit
            self._reached[i] += (kept + is_lost) * self._unit

    def rates(self, prior: Sequence[float] | None = None, *, strength: float = STRENGTHS[1]) -> list[float]:
        """The rate of each stretch. Its own prior lies between the given one and the rate of the stretch before: a row
        that keeps more than others did is likely to keep more further out too. `strength`: drafts it counts as."""
        found: list[float] = []
        weight = strength * self._unit
        for i, (kept, reached) in enumerate(zip(self._kept, self._reached, strict=True)):
            expected = PRIOR_RATE if prior is None else prior[i]
            if found:
                expected = (expected + found[-1]) / 2
            found.append((kept + weight * expected) / (reached + weight))
        return found

    def expected_tokens(
        self, room: int, prior: Sequence[float] | None = None, *, strength: float = STRENGTHS[1]
    ) -> list[float]:
        """E(w) of each offered width, of which at most `room` drafts are used."""
        found = [1.0]
        tokens = survival = 1.0
        start = 0
        for edge, rate in zip(self._edges, self.rates(prior, strength=strength), strict=True):
            num_drafts = min(edge, room) - start
            if num_drafts > 0:
                power = rate**num_drafts
                # The sum of rate^1 .. rate^n; a rate is below 1 by its prior, but may round to it.
                tokens += survival * (rate * (1 - power) / (1 - rate) if rate < 1 else num_drafts)
                survival *= power
            if edge in self._widths:
                found.append(tokens)
            start = edge
        return found

    def log_likelihood(self, width: int, num_accepted: int, prior: Sequence[float], *, strength: float) -> float:
        """Of what a cycle kept, before it is entered."""
        rates, found = self.rates(prior, strength=strength), 0.0
        for i, kept, is_lost in self._stretches(width, num_accepted):
            rate = min(max(rates[i], 0.002), 0.998)
            found += kept * math.log(rate) + is_lost * math.log(1 - rate)
        return found

    def _stretches(self, width: int, num_accepted: int) -> list[tuple[int, int, bool]]:
        """(number of a stretch that was reached, drafts of it that were kept, whether the next one of it was lost)."""
        found, start = [], 0
        for i, edge in enumerate(self._edges):
            kept = min(num_accepted, edge) - start
            is_lost = num_accepted < min(edge, width)
            found.append((i, kept, is_lost))
            if is_lost or width <= edge:
                break
            start = edge
        return found


class PriorStrength:
    """How much the rows of a process are alike: which of `STRENGTHS` has foretold best what they kept."""

    def __init__(self) -> None:
        self._scores = [0.0] * len(STRENGTHS)
        # In doubt, the middle one.
        self._scores[1] = 0.5

    @property
    def value(self) -> float:
        """Drafts of evidence."""
        return STRENGTHS[self._scores.index(max(self._scores))]

    def enter(self, survival: Survival, width: int, num_accepted: int, prior: Sequence[float]) -> None:
        """A cycle of a row, which its survival has not seen yet."""
        for i, strength in enumerate(STRENGTHS):
            score = survival.log_likelihood(width, num_accepted, prior, strength=strength)
            self._scores[i] = SCORE_MEMORY * self._scores[i] + score
