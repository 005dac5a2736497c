"""`block_size="auto"`: how many drafts a cycle asks for, from what cycles of this process took and what they kept.

A pass has as many columns as its widest row, so the rows of a cycle share one width: the one at which the tokens that
they can expect, per millisecond that such a cycle takes, are most. Width 0 is plain decoding. Both factors are measured
and go on being measured, by trials: a drafted cycle now and then where plain decoding looks best, a width that may be
better than the one in use. What trials lose is paid from a credit, a share of all time and of what drafting saved.
Widths change what a text costs, never what it says, so nothing here need be right.

    S(j) = probability that the first j drafts are all kept; E(w) = 1 + S(1) + ... + S(w), the tokens of a cycle

Nothing reads a clock: equal times and equal acceptance give equal widths.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from orthrus.decoding.costs import SHAPES, CostTable, place_of
from orthrus.decoding.survival import MEMORY, PLAIN_MEMORY, POOL_MEMORY, PriorStrength, Survival, offered_widths

CPU_BLOCK_SIZE = 8
"""Positions of a cycle on a CPU where a number has to be chosen: there every row of a pass costs. With the bundled
model in bf16, 8 writes within 4 % of the fastest (4) and leaves room for models that accept more
(docs/benchmarks.md)."""

ROWS_AT_ONCE = 16
"""Rows whose expectation is computed anew for a choice, in turn: for all of a large batch it would take as long as
much of a pass."""

KNOWN = 1.02
"""What may be hoped for is this much dearer than the doubt about a cost allows, up to what is believed: widths that are
worth nearly the same, at costs that are known well, would otherwise be tried for ever."""
STOP_MARGIN = 1.03
"""How much better than plain decoding drafting must look: in doubt, plain."""
TRIAL_SHARE = 0.015
"""Share of the time that trials may lose."""
SAVED_SHARE = 0.1
"""And of the time that drafting saved."""
FIRST_CREDIT = 2.5
"""What trials may lose at first, in plain steps."""
MAX_CREDIT = 1.5
"""What is saved up for trials, in plain steps, unless a single one costs more: a long calm is no reason for many."""
FIRST_WAIT, LAST_WAIT = 3, 48
"""Plain steps between two trials that did not pay, doubled by each."""


def auto_block_size(trained: int, *, exact: bool, device_type: str) -> int:
    """Positions that the widths of `auto` stay below. In exact mode they are every pass's rows, so they cannot vary."""
    return min(CPU_BLOCK_SIZE, trained) if exact and device_type == "cpu" else trained


class Experience:
    """What a process knows of a model in one setting, and what new rows start from."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.widths = offered_widths(block_size)
        self.pool = Survival(block_size, memory=POOL_MEMORY)
        self.strength = PriorStrength()
        self.table = CostTable(self.widths)
        self.credit = FIRST_CREDIT
        """What trials may lose now, in plain steps."""


_experiences: "WeakKeyDictionary[Any, dict[Hashable, Experience]]" = WeakKeyDictionary()
"""What `experience_of` keeps, for as long as the model lives."""


def experience_of(model: Any, block_size: int, *setting: Hashable) -> Experience:
    """What this process knows of a model in one setting: all that the times of its cycles depend on."""
    key = (block_size, *setting)
    return _experiences.setdefault(model, {}).setdefault(key, Experience(block_size))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the next cycle, as the choice of its width sees it."""

    survival: Survival
    room: int
    """Drafts that it can still use; 0 for a row that does not draft."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A cycle's width, and what it was chosen for."""

    width: int
    """Drafts for each row, as far as its room goes."""
    is_trial: bool = False
    is_plain_best: bool = True
    """Whether plain decoding looked best."""
    speed: float = 1.0
    """Tokens of all rows that the width that looked best writes per plain step's time."""
    cost: float = 0.0
    """Of that width's cycle, in plain steps: a share of it pays for trials."""
    loss: float = 0.0
    """What the trial that is due may lose, in plain steps: so much may be saved up for it."""


class Schedule:
    """Chooses the width of each cycle (`choose`) and learns from it when it is over (`learn`).

    Who has to know a width before the cycle before it is over chooses it then, and names that cycle's choice.
    """

    def __init__(self, experience: Experience, *, device_type: str = "cpu"):
        self.experience = experience
        experience.table.shape = SHAPES.get(device_type, SHAPES["cuda"])
        self._num_chosen = 0
        self._num_plain = 0
        """Plain steps since the last trial."""
        self._wait = 0
        """Plain steps until the next one."""

    def new_survival(self) -> Survival:
        """For a new row: no evidence of its own."""
        return Survival(self.experience.block_size, memory=MEMORY)

    def choose(self, candidates: Sequence[Candidate], num_slots: int, *, running: Choice | None = None) -> Choice:
        """The next cycle's width; the longest row sees `num_slots` slots.

        `running`: the choice of a cycle that nothing is known of yet.
        """
        self._num_chosen += 1
        if not any(candidate.room for candidate in candidates):
            return Choice(0)
        experience = self.experience
        place = experience.table.at(place_of(len(candidates), num_slots))
        costs, tokens = place.in_plain_steps(), self._expected_tokens(candidates)
        speeds = [t / cost for t, cost in zip(tokens, costs, strict=True)]
        best = speeds.index(max(speeds))
        current = best if speeds[best] > STOP_MARGIN * speeds[0] else 0
        choice = Choice(
            experience.widths[current], is_plain_best=not current, speed=speeds[current], cost=costs[current]
        )
        if running is not None and running.is_trial:  # what it shows comes first
            return choice
        hoped = [cost * math.exp(-doubt) for cost, doubt in zip(costs, place.doubts(), strict=True)]
        trial = self._trial(tokens, costs, hoped, current, choice.speed)
        if trial is None:
            return choice
        loss = costs[trial] - tokens[trial] / choice.speed
        if loss > experience.credit:
            return replace(choice, loss=loss)
        self._num_plain = 0
        return replace(choice, width=experience.widths[trial], is_trial=True)

    def learn(
        self, choice: Choice, candidates: Sequence[Candidate], num_slots: int, widths: Sequence[int],
        accepted: Sequence[int], ms: float,
    ) -> None:  # fmt: skip
        """The cycle of these rows, at these widths, kept so many drafts of each and took `ms` milliseconds."""
        experience, width = self.experience, max(widths)
        if not choice.is_trial:
            self._earn(TRIAL_SHARE * choice.cost, limit=max(MAX_CREDIT, choice.loss))
        if width in experience.widths:  # near the end of a text others occur
            place = experience.table.at(place_of(len(candidates), num_slots))
            place.enter(experience.widths.index(width), ms)
            if width:
                cost = place.in_plain_steps()[experience.widths.index(width)]
                self._account(choice, cost, len(candidates), len(candidates) + sum(accepted))
        if not width:
            self._num_plain += 1
            for candidate in candidates:
                candidate.survival.fade(PLAIN_MEMORY)
            return
        sample = self._num_chosen % len(candidates)
        if widths[sample]:
            survival = candidates[sample].survival
            experience.strength.enter(survival, widths[sample], accepted[sample], experience.pool.rates())
        turns = self._num_turns(candidates)
        for i, (candidate, drafted, num_accepted) in enumerate(zip(candidates, widths, accepted, strict=True)):
            if drafted:
                candidate.survival.enter(drafted, num_accepted)
                if (i + self._num_chosen) % turns == 0:
                    experience.pool.enter(drafted, num_accepted)

    def _account(self, choice: Choice, cost: float, num_rows: int, num_tokens: int) -> None:
        """A drafted cycle that cost so many plain steps wrote so many tokens: what it lost or saved."""
        if not choice.is_trial:
            self._wait = FIRST_WAIT
            self._earn(SAVED_SHARE * max(num_tokens / num_rows - cost, 0.0), limit=MAX_CREDIT)
            return
        # A trial that won pays for the next, so that a better text is soon seen to be one.
        loss = cost - num_tokens / choice.speed
        if loss > 0:
            self.experience.credit -= loss
        else:
            self._earn(-loss, limit=MAX_CREDIT)
        if not choice.is_plain_best:
            return
        if loss <= 0:
            self._wait = 0
        elif loss < (cost - 1) / 2:  # it nearly paid: the text may be a better one
            self._wait = FIRST_WAIT
        else:
            self._wait = min(max(2 * self._wait, FIRST_WAIT), LAST_WAIT)

    def _earn(self, credit: float, *, limit: float) -> None:
        """Add to what trials may lose, up to a limit."""
        self.experience.credit = max(self.experience.credit, min(self.experience.credit + credit, limit))

    def _expected_tokens(self, candidates: Sequence[Candidate]) -> list[float]:
        """Of all rows together, at each width."""
        widths, prior, strength = self.experience.widths, self.experience.pool.rates(), self.experience.strength.value
        turns = self._num_turns(candidates)
        found = []
        for i, candidate in enumerate(candidates):
            survival, room = candidate.survival, candidate.room
            if room < widths[-1]:
                found.append(survival.expected_tokens(room, prior, strength=strength))
                continue
            if survival.expected is None or (i + self._num_chosen) % turns == 0:
                survival.expected = survival.expected_tokens(room, prior, strength=strength)
            found.append(survival.expected)
        return [sum(tokens) for tokens in zip(*found, strict=True)]

    def _num_turns(self, candidates: Sequence[Candidate]) -> int:
        """Cycles in which the more costly part of the work comes round to every row."""
        return -(-len(candidates) // ROWS_AT_ONCE)

    def _trial(
        self, tokens: Sequence[float], costs: Sequence[float], hoped: Sequence[float], current: int, speed: float
    ) -> int | None:
        """Number of the width to try next, given what they cost and the least that may be hoped for, in plain steps.

        The one that may be better than the one in use by most. While nothing is drafted, in due time; and where none
        seems better, the widest of those that cost about as much as the narrowest at which keeping all would pay.
        """
        if not current and self._num_plain < self._wait:
            return None
        likely = [min(cost, KNOWN * hope) for cost, hope in zip(costs, hoped, strict=True)]
        speeds = [t / cost for t, cost in zip(tokens, likely, strict=True)]
        speeds[current] = 0.0
        best = speeds.index(max(speeds))
        if speeds[best] > (speed if current else STOP_MARGIN * speed):
            return best
        if current:
            return None
        paying = [i for i, width in enumerate(self.experience.widths) if i and width + 1 > hoped[i] / hoped[0]]
        return max((i for i in paying if hoped[i] <= 1.1 * hoped[paying[0]]), default=None)
