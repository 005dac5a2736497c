"""`block_size="auto"`: how many drafts a cycle asks for, from what cycles of this process took and what they kept.

A pass has as many columns as its widest row, so the rows of a cycle share one width: the one at which the tokens that
they can expect, per millisecond that such a cycle takes, are most. Width 0 is plain decoding. Both factors are measured
and go on being measured: a width that is not in use is tried again now and then, and all such trials together may
lose `PROBE_SHARE` of the time. Widths change what a text costs, never what it says, so nothing here need be right.

    S(j) = probability that the first j drafts are all kept; E(w) = 1 + S(1) + ... + S(w), the tokens of a cycle

Nothing reads a clock: equal times and equal acceptance give equal widths.
"""

import math
import statistics
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

WIDTHS = (0, 3, 7, 15, 31)
"""Drafts of a cycle that are offered, as far as the block has room for them, and the widest that it has room for."""
CPU_BLOCK_SIZE = 8
"""Positions of a cycle on a CPU where a number has to be chosen: there every row of a pass costs. With the bundled
model in bf16, 8 writes within 4 % of the fastest (4) and leaves room for models that accept more
(docs/benchmarks.md)."""

MEMORY = 0.93
"""What a row's evidence keeps of its weight from one cycle to the next: it stands for some 14 cycles."""
POOL_MEMORY = 0.995
"""The same for all rows together: some 200 cycles."""
PRIOR_RATE = 0.8
"""How often a draft behind kept ones is kept, before anything was seen."""
PRIOR_CYCLES = 6.0
"""Cycles of evidence that a prior counts as."""
OLD_EVIDENCE = 0.5
"""What a row's evidence keeps of its weight when drafting is tried after plain steps."""

NUM_TIMES = 9
"""Times of which the running median is taken."""
MIN_TIMES = 2
"""Times without which a width counts as not measured, the first left out: it holds compiling, capturing, allocating."""
MARGIN = 1.05
"""How much better another width must look to be changed to, for estimates are no closer than that."""
STOP_MARGIN = 1.02
"""The same for changing to plain decoding: in doubt, plain."""
PROBE_SHARE = 0.01
"""Share of the time that trials of other widths may lose."""
STALE_CYCLES = 64
"""While drafts are made, a width is timed again after so many cycles without it."""


def offered_widths(block_size: int) -> tuple[int, ...]:
    """The widths to choose from, ascending, 0 first and block_size - 1 last."""
    return (*(width for width in WIDTHS if width < block_size - 1), block_size - 1)


def auto_block_size(trained: int, *, exact: bool, device_type: str) -> int:
    """Positions that the widths of `auto` stay below. In exact mode they are every pass's rows, so they cannot vary."""
    return min(CPU_BLOCK_SIZE, trained) if exact and device_type == "cpu" else trained


# --- what is kept ------------------------------------------------------------------------------------------------


class Survival:
    """How often drafts are kept, by stretch of the block: the first draft, then those up to each offered width.

    Within a stretch, a draft behind kept ones is kept at one rate. Only drafts whose predecessors were all kept are
    counted, so the rates mean the same whatever the widths were.
    """

    def __init__(self, block_size: int, *, memory: float):
        self._widths = offered_widths(block_size)
        self._edges = sorted({1, *self._widths[1:]})
        self._memory = memory
        self._kept = [0.0] * len(self._edges)
        """Drafts of each stretch that were kept, the older ones counting less."""
        self._reached = [0.0] * len(self._edges)
        """Drafts of each stretch all of whose predecessors were kept."""

    def fade(self, factor: float) -> None:
        """Let what was seen so far count less."""
        self._kept = [factor * kept for kept in self._kept]
        self._reached = [factor * reached for reached in self._reached]

    def enter(self, width: int, num_accepted: int) -> None:
        """A cycle asked for `width` drafts and kept the first `num_accepted`."""
        self.fade(self._memory)
        start = 0
        for i, edge in enumerate(self._edges):
            kept = min(max(num_accepted - start, 0), edge - start)
            is_lost_here = start <= num_accepted < min(edge, width)
            self._kept[i] += kept
            self._reached[i] += kept + is_lost_here
            start = edge

    def rates(self, prior: Sequence[float] | None = None) -> list[float]:
        """The rate of each stretch. Its own prior lies between the given one and the rate of the stretch before: a row
        that keeps more than others did is likely to keep more further out too."""
        found: list[float] = []
        for i, (kept, reached) in enumerate(zip(self._kept, self._reached, strict=True)):
            expected = PRIOR_RATE if prior is None else prior[i]
            if found:
                expected = (expected + found[-1]) / 2
            found.append((kept + PRIOR_CYCLES * expected) / (reached + PRIOR_CYCLES))
        return found

    def expected_tokens(self, room: int, prior: Sequence[float] | None = None) -> list[float]:
        """E(w) of each offered width, of which at most `room` drafts are used."""
        found = [1.0]
        tokens = survival = 1.0
        start = 0
        for edge, rate in zip(self._edges, self.rates(prior), strict=True):
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


# --- what it costs -----------------------------------------------------------------------------------------------

Place = tuple[int, int]
"""(rows of the cycle, doublings of `LENGTH_UNIT` in the slots that it sees): where a time was measured."""
LENGTH_UNIT = 512
"""Slots: contexts up to here cost the same as far as the table is concerned, then each doubling is a place."""


def place_of(num_rows: int, num_slots: int) -> Place:
    """Where a cycle of so many rows, the longest of which sees so many slots, stands in the table."""
    return num_rows, (num_slots // LENGTH_UNIT).bit_length()


def distance(a: Place, b: Place) -> float:
    """How far apart two places are, in doublings."""
    return abs(math.log2(a[0] / b[0])) + abs(a[1] - b[1])


@dataclass(slots=True)
class Times:
    """Recent times of one width at one place."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_TIMES))
    median: float | None = None
    """Milliseconds; None until measured."""
    num_seen: int = 0
    last_cycle: int = 0
    """Number of the place's cycle that ran this width last."""

    def enter(self, milliseconds: float, cycle: int) -> None:
        """One more; the first is not kept, and after a long pause only the latest is."""
        self.num_seen += 1
        if self.recent and cycle - self.last_cycle >= STALE_CYCLES:
            self.recent = deque([self.recent[-1]], maxlen=NUM_TIMES)
        self.last_cycle = cycle
        if self.num_seen > 1:
            self.recent.append(milliseconds)
            # The lower one of two: what disturbs a measurement makes it longer.
            self.median = statistics.median_low(self.recent) if len(self.recent) >= MIN_TIMES else None


class CostTable:
    """Milliseconds of a cycle at each offered width, place by place."""

    def __init__(self, widths: Sequence[int]):
        self._widths = widths
        self._times: dict[Place, dict[int, Times]] = {}
        self._num_cycles: dict[Place, int] = {}

    def enter(self, place: Place, width: int, milliseconds: float) -> None:
        """A cycle whose widest row asked for `width` drafts took so long. Widths that are not offered (near the end of
        a text) are left out."""
        if width not in self._widths:
            return
        self._num_cycles[place] = self._num_cycles.get(place, 0) + 1
        times = self._times.setdefault(place, {}).setdefault(width, Times())
        times.enter(milliseconds, self._num_cycles[place])

    def costs(self, place: Place) -> dict[int, float]:
        """The cost of each width there, in the units of the nearest place where anything was measured.

        What was not measured there is carried over from the nearest place that has it, scaled by what both have. What
        was measured nowhere is taken to go on as from the two narrower drafting widths before it, or as the one before
        it where there are not two: it is tried if that would be worth it. Plain steps come first that way: unmeasured,
        they cost nothing.
        """
        known: dict[int, float] = {}
        for other in sorted(self._times, key=lambda other: distance(place, other)):
            theirs = self._medians(other)
            shared = known.keys() & theirs.keys()
            if shared or not known:
                scale = statistics.median(known[width] / theirs[width] for width in shared) if shared else 1.0
                known |= {width: scale * ms for width, ms in theirs.items() if width not in known}
        for i, width in enumerate(self._widths):
            if width not in known:
                known[width] = self._extrapolated(i, known)
        return known

    def _extrapolated(self, i: int, known: dict[int, float]) -> float:
        """The cost of width number i from those of all narrower ones."""
        if i < 3:
            return known[self._widths[i - 1]] if i else 0.0
        first, second, wanted = self._widths[i - 2 : i + 1]
        slope = max(known[second] - known[first], 0.0) / (second - first)
        return known[second] + slope * (wanted - second)

    def stalest(self, place: Place, current: int) -> int | None:
        """The offered width, but the current one, that ran longest ago there, if that is `STALE_CYCLES` or more."""
        now, times = self._num_cycles.get(place, 0), self._times.get(place, {})
        ages = {width: now - (times[width].last_cycle if width in times else 0) for width in self._widths}
        del ages[current]
        width = max(ages, key=lambda width: ages[width])
        return width if ages[width] >= STALE_CYCLES else None

    def _medians(self, place: Place) -> dict[int, float]:
        return {width: times.median for width, times in self._times[place].items() if times.median is not None}


# --- the choice --------------------------------------------------------------------------------------------------


class Experience:
    """What a process knows of a model in one setting, and what new rows start from."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.widths = offered_widths(block_size)
        self.pool = Survival(block_size, memory=POOL_MEMORY)
        self.table = CostTable(self.widths)
        self.credit_ms = 0.0
        """Time that trials may lose now."""


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


class Schedule:
    """Chooses the width of each cycle (`choose`) and learns from it (`learn`): strictly in turns."""

    def __init__(self, experience: Experience):
        self.experience = experience
        self._current = 0
        self._trial_cost: tuple[float, float] | None = None
        """While a trial runs: its milliseconds by the table, and the tokens per millisecond it is weighed against."""

    def new_survival(self) -> Survival:
        """For a new row: no evidence of its own."""
        return Survival(self.experience.block_size, memory=MEMORY)

    def choose(self, candidates: Sequence[Candidate], num_slots: int) -> int:
        """Drafts for each row of the next cycle, as far as its room goes; the longest row sees `num_slots` slots."""
        self._trial_cost = None
        if not any(candidate.room for candidate in candidates):
            return 0
        place = place_of(len(candidates), num_slots)
        costs = self.experience.table.costs(place)
        if not costs[0]:
            return 0
        tokens = self._expected_tokens(candidates)
        speeds = {width: tokens[width] / costs[width] for width in costs}
        best = max(speeds, key=lambda width: speeds[width])
        if speeds[best] > (MARGIN if best else STOP_MARGIN) * speeds[self._current]:
            self._current = best
        trial = self._trial(place, costs)
        if trial is not None:
            speed = speeds[self._current]
            if costs[trial] - tokens[trial] / speed <= self.experience.credit_ms:
                self._trial_cost = costs[trial], speed
                return trial
        # More than one trial is not saved up for: a long calm is no reason for many trials at once.
        saved = self.experience.credit_ms + PROBE_SHARE * costs[self._current]
        self.experience.credit_ms = min(saved, max(costs.values()))
        return self._current

    def learn(
        self, candidates: Sequence[Candidate], num_slots: int, widths: Sequence[int], accepted: Sequence[int], ms: float
    ) -> None:
        """The cycle of these rows, at these widths, kept so many drafts of each and took `ms` milliseconds."""
        self.experience.table.enter(place_of(len(candidates), num_slots), max(widths), ms)
        if self._trial_cost is not None:
            cost_ms, speed = self._trial_cost
            # What it lost or won; a trial that won pays for the next, so that a better text is soon seen to be one.
            self.experience.credit_ms -= cost_ms - (len(candidates) + sum(accepted)) / speed
        for candidate, width, num_accepted in zip(candidates, widths, accepted, strict=True):
            if not width:
                continue
            if self._trial_cost is not None and not self._current:
                # The row's evidence is from before many plain steps; where now all is kept, from another text.
                candidate.survival.fade(0.0 if num_accepted == width else OLD_EVIDENCE)
            candidate.survival.enter(width, num_accepted)
            self.experience.pool.enter(width, num_accepted)

    def _expected_tokens(self, candidates: Sequence[Candidate]) -> dict[int, float]:
        """Of all rows together, at each width."""
        widths, prior = self.experience.widths, self.experience.pool.rates()
        sums = dict.fromkeys(widths, 0.0)
        for candidate in candidates:
            for width, tokens in zip(widths, candidate.survival.expected_tokens(candidate.room, prior), strict=True):
                sums[width] += tokens
        return sums

    def _trial(self, place: Place, costs: dict[int, float]) -> int | None:
        """The width to try next: while nothing is drafted, the narrowest at which keeping all would pay."""
        if self._current:
            return self.experience.table.stalest(place, self._current)
        drafting = self.experience.widths[1:]
        return next((width for width in drafting if (width + 1) * costs[0] > costs[width]), drafting[0])
