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
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

WIDTHS = (0, 3, 7, 15, 31)
"""Drafts of a cycle that are offered, as far as the block has room for them, and the widest that it has room for."""
CPU_BLOCK_SIZE = 8
"""Positions of a cycle on a CPU where a number has to be chosen: there every row of a pass costs. With the bundled
model in bf16, 8 writes within 4 % of the fastest (4) and leaves room for models that accept more
(docs/benchmarks.md)."""

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
ROWS_AT_ONCE = 16
"""Rows whose expectation is computed anew for a choice, in turn: for all of a large batch it would take as long as
much of a pass."""

STOP_MARGIN = 1.03
"""How much better than plain decoding drafting must look: in doubt, plain."""
TRIAL_SHARE = 0.015
"""Share of the time that trials may lose."""
SAVED_SHARE = 0.1
"""And of the time that drafting saved."""
FIRST_CREDIT = 2.5
"""What trials may lose at first, in plain steps."""
MAX_CREDIT = 3.0
"""What is saved up for trials, in plain steps, unless a single one costs more: a long calm is no reason for many."""
FIRST_WAIT, LAST_WAIT = 3, 48
"""Plain steps between two trials that did not pay, doubled by each."""


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


# --- what it costs -----------------------------------------------------------------------------------------------

Place = tuple[int, int]
"""(doublings of rows, doublings of `LENGTH_UNIT` in the slots that they see): where times were measured."""
LENGTH_UNIT = 512
"""Slots: contexts up to here cost the same as far as the table is concerned, then each doubling is a place."""


def place_of(num_rows: int, num_slots: int) -> Place:
    """Where a cycle of so many rows, the longest of which sees so many slots, stands in the table."""
    return (num_rows - 1).bit_length(), (num_slots // LENGTH_UNIT).bit_length()


def distance(a: Place, b: Place) -> int:
    """How far apart two places are, in doublings."""
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


class Shape(NamedTuple):
    """How a pass's cost grows with its positions n: as (1 + (n / free)^sharpness)^(1 / sharpness)."""

    free: float
    """Positions at which what each of them costs is as much as what the pass costs by itself."""
    sharpness: float
    """1: each position costs from the first on; more: hardly any does before `free`, then all do."""

    def log_price(self, num_positions: int) -> float:
        """The logarithm of the cost."""
        return math.log1p((num_positions / self.free) ** self.sharpness) / self.sharpness


SHAPES = {"cpu": Shape(10.0, 1.0), "cuda": Shape(192.0, 2.0)}
"""What is expected of a device: a GPU computes some hundred positions while it reads the weights."""
FREE_POSITIONS = tuple(2.0**i for i in range(1, 10))
"""Among these and the expected one, `Shape.free` is fitted."""
DRAFT_FACTORS = (1.3, 1.6, 2.0, 2.4)
"""And among these, the time of a cycle over that of its verify pass, of which 2 is expected."""
FREE_DOUBT, FACTOR_DOUBT, FIT_DOUBT = 1.5, 0.3, 0.15
"""Standard deviations: of the first from what is expected, in doublings; of the second, and of costs from the fit, in
their logarithms."""
COST_DOUBT, TIME_DOUBT = 0.4, 0.2
"""The same of the cost of a width that was not measured, and of a single time."""
MAX_TIMES = 32.0
"""Times that the mean of a width's cost stands for, at most."""
FIT_TIMES = 4.0
"""Times as which a width counts in the fit, at most."""
FIT_CYCLES = 32
"""Cycles between two fits, once the widths in use are known."""
CARRIED_SHARE = 0.25
"""Of the weight of what was measured at the nearest place, at a new one."""
COST_MEMORY = 0.998
"""What a width's times keep of their weight with each cycle of another width."""
LEVEL_GAIN = 0.15
"""How fast the level of all widths follows the times of one whose cost is well known."""
SURPRISE, RELIEF = 0.4, 0.7
"""Logarithms. A time so much longer than expected was disturbed: it counts as if it were this, and not at all in a
width's first cycles, which compile and capture. One so much shorter says that the level had been disturbed."""
MAX_SURPRISES = 4
"""Cycles in a row that take much longer than expected: then that is the level."""


def ascending(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The closest values that nowhere fall, by weighted squares: neighbours that fall become their mean."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while blocks and blocks[-1][0] > value:
            before, heavy, many = blocks.pop()
            value, weight = (before * heavy + value * weight) / (heavy + weight), heavy + weight
            count += many
        blocks.append((value, weight, count))
    return [value for value, _, count in blocks for _ in range(count)]


class PlaceCosts:
    """What cycles of each width cost at one place, as logarithms of milliseconds: a level, and what is over it.

    A machine that is slower for a while, or rows that get fewer, change the level alone, so that widths which were
    measured at different times can be compared.
    """

    def __init__(self, num_rows: int, widths: Sequence[int], shape: Shape):
        self.num_rows, self.widths, self.shape = num_rows, widths, shape
        self.num_cycles = 0
        self._level = 0.0
        self._over = [0.0] * len(widths)
        self._weights = [0.0] * len(widths)
        """Times that `_over` stands for, as of the width's last cycle."""
        self._num_surprises = 0
        """Cycles one after the other that took much longer than expected."""
        self._num_seen = [0] * len(widths)
        self._last_cycle = [0] * len(widths)
        self._fitted: list[float] | None = None

    def carry_over(self, other: "PlaceCosts") -> None:
        """Expect what was measured at another place, moved by what more rows are expected to change."""
        for i, width in enumerate(self.widths):
            prices = [self.shape.log_price(rows * (width + 1)) for rows in (other.num_rows, self.num_rows)]
            self._over[i] = other._over[i] + prices[1] - prices[0]
            self._weights[i] = CARRIED_SHARE * min(other.weight(i), FIT_TIMES)

    def weight(self, i: int) -> float:
        """Times that the measured cost of width number i stands for now."""
        return self._weights[i] * COST_MEMORY ** (self.num_cycles - self._last_cycle[i])

    def over_level(self) -> list[float]:
        """What is believed of each width: between the fit, which counts as one time, and what was measured; and no
        width is cheaper than a narrower one, whatever disturbed the times of one of them."""
        if self._fitted is None:
            self._fitted = self._fit()
        weights = [1 + self.weight(i) for i in range(len(self.widths))]
        measured = zip(self._fitted, weights, self._over, strict=True)
        return ascending([(fitted + (weight - 1) * over) / weight for fitted, weight, over in measured], weights)

    def in_plain_steps(self) -> list[float]:
        """The cost of each width's cycle over that of a plain step here."""
        over = self.over_level()
        return [math.exp(log - over[0]) for log in over]

    def doubts(self) -> list[float]:
        """Standard deviation of what is believed of each width."""
        gain = (COST_DOUBT / TIME_DOUBT) ** 2
        return [COST_DOUBT / math.sqrt(1 + gain * self.weight(i)) for i in range(len(self.widths))]

    def enter(self, i: int, milliseconds: float) -> None:
        """A cycle of width number i took so long."""
        time, weight, over = math.log(max(milliseconds, 1e-6)), self.weight(i), self.over_level()[i]
        self.num_cycles += 1
        self._num_seen[i] += 1
        self._last_cycle[i], self._weights[i] = self.num_cycles, weight
        error = time - self._level - over
        self._num_surprises = self._num_surprises + 1 if error > SURPRISE else 0
        is_relief = error < -RELIEF and weight >= max(self._weights)
        if self.num_cycles == 1 or is_relief or self._num_surprises == MAX_SURPRISES:
            self._level += error
            return
        if error > SURPRISE and self._num_seen[i] <= 2:
            return
        self._level += LEVEL_GAIN * weight / (weight + FIT_TIMES) * max(-RELIEF, min(error, SURPRISE))
        own = self._over[i] if weight else over
        self._over[i] = own + max(-RELIEF, min(time - self._level - own, SURPRISE)) / (weight + 1)
        self._weights[i] = min(weight + 1, MAX_TIMES)
        if weight < FIT_TIMES or self.num_cycles % FIT_CYCLES == 0:
            self._fitted = None

    def _fit(self) -> list[float]:
        """The likeliest shape and draft factor: each width's cost over the level by them."""
        known = {i: min(self.weight(i), FIT_TIMES) for i in range(len(self.widths)) if self._weights[i]}
        best, found = math.inf, [0.0]
        for free in (self.shape.free, *FREE_POSITIONS):
            shape = self.shape._replace(free=free)
            prices = [shape.log_price(self.num_rows * (width + 1)) for width in self.widths]
            for factor in DRAFT_FACTORS:
                costs = [prices[0], *(price + math.log(factor) for price in prices[1:])]
                offset, error = self._misfit(costs, known)
                error += (math.log2(free / self.shape.free) / FREE_DOUBT) ** 2
                error += (math.log(factor / 2) / FACTOR_DOUBT) ** 2
                if error < best:
                    best, found = error, [offset + cost for cost in costs]
        return found

    def _misfit(self, costs: Sequence[float], known: dict[int, float]) -> tuple[float, float]:
        """(mean of what was measured over these costs, what is left of it squared, in units of `FIT_DOUBT`)."""
        if not known:
            return 0.0, 0.0
        total = sum(known.values())
        offset = sum(weight * (self._over[i] - costs[i]) for i, weight in known.items()) / total
        left = sum(weight * (self._over[i] - costs[i] - offset) ** 2 for i, weight in known.items())
        return offset, left / FIT_DOUBT**2


class CostTable:
    """Costs of the offered widths, place by place."""

    def __init__(self, widths: Sequence[int]):
        self.shape = SHAPES["cpu"]
        """What is expected of the device."""
        self._widths = widths
        self._places: dict[Place, PlaceCosts] = {}

    def at(self, place: Place) -> PlaceCosts:
        """What is known of a place; at a new one, what is known of the nearest."""
        if place not in self._places:
            known = [other for other in self._places if self._places[other].num_cycles > 2]
            costs = self._places[place] = PlaceCosts(1 << place[0], self._widths, self.shape)
            if known:
                costs.carry_over(self._places[min(known, key=lambda other: distance(place, other))])
        return self._places[place]


# --- the choice --------------------------------------------------------------------------------------------------


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


class Schedule:
    """Chooses the width of each cycle (`choose`) and learns from it (`learn`): strictly in turns."""

    def __init__(self, experience: Experience, *, device_type: str = "cpu"):
        self.experience = experience
        experience.table.shape = SHAPES.get(device_type, SHAPES["cuda"])
        self._current = 0
        """Number of the width that looks best."""
        self._speed = 1.0
        """Tokens of all rows that it writes per plain step's time."""
        self._is_trial = False
        self._num_chosen = 0
        self._num_plain = 0
        """Plain steps since the last trial."""
        self._wait = 0
        """Plain steps until the next one."""

    def new_survival(self) -> Survival:
        """For a new row: no evidence of its own."""
        return Survival(self.experience.block_size, memory=MEMORY)

    def choose(self, candidates: Sequence[Candidate], num_slots: int) -> int:
        """Drafts for each row of the next cycle, as far as its room goes; the longest row sees `num_slots` slots."""
        self._is_trial = False
        self._num_chosen += 1
        if not any(candidate.room for candidate in candidates):
            return 0
        experience = self.experience
        place = experience.table.at(place_of(len(candidates), num_slots))
        costs, tokens = place.in_plain_steps(), self._expected_tokens(candidates)
        speeds = [t / cost for t, cost in zip(tokens, costs, strict=True)]
        best = speeds.index(max(speeds))
        self._current = best if speeds[best] > STOP_MARGIN * speeds[0] else 0
        self._speed = speeds[self._current]
        hoped = [cost * math.exp(-doubt) for cost, doubt in zip(costs, place.doubts(), strict=True)]
        trial, loss = self._trial(tokens, hoped), 0.0
        if trial is not None:
            loss = costs[trial] - tokens[trial] / self._speed
            if loss <= experience.credit:
                self._is_trial, self._num_plain = True, 0
                return experience.widths[trial]
        self._earn(TRIAL_SHARE * costs[self._current], limit=max(MAX_CREDIT, loss))
        return experience.widths[self._current]

    def learn(
        self, candidates: Sequence[Candidate], num_slots: int, widths: Sequence[int], accepted: Sequence[int], ms: float
    ) -> None:
        """The cycle of these rows, at these widths, kept so many drafts of each and took `ms` milliseconds."""
        experience, width = self.experience, max(widths)
        if width in experience.widths:  # near the end of a text others occur
            place = experience.table.at(place_of(len(candidates), num_slots))
            place.enter(experience.widths.index(width), ms)
            if width:
                cost = place.in_plain_steps()[experience.widths.index(width)]
                self._account(cost, len(candidates), len(candidates) + sum(accepted))
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

    def _account(self, cost: float, num_rows: int, num_tokens: int) -> None:
        """A drafted cycle that cost so many plain steps wrote so many tokens: what it lost or saved."""
        if not self._is_trial:
            self._wait = FIRST_WAIT
            self._earn(SAVED_SHARE * max(num_tokens / num_rows - cost, 0.0), limit=MAX_CREDIT)
            return
        # A trial that won pays for the next, so that a better text is soon seen to be one.
        loss = cost - num_tokens / self._speed
        self.experience.credit -= loss
        if self._current:
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

    def _trial(self, tokens: Sequence[float], hoped: Sequence[float]) -> int | None:
        """Number of the width to try next, given the least costs that may be hoped for, in plain steps.

        While nothing is drafted, in due time, the widest of those that cost about as much as the narrowest at which
        keeping all would pay; else the one that may be better than the one in use by most.
        """
        if self._current:
            speeds = [t / cost for t, cost in zip(tokens, hoped, strict=True)]
            speeds[self._current] = 0.0
            best = speeds.index(max(speeds))
            return best if speeds[best] > self._speed else None
        if self._num_plain < self._wait:
            return None
        paying = [i for i, width in enumerate(self.experience.widths) if i and width + 1 > hoped[i] / hoped[0]]
        return max((i for i in paying if hoped[i] <= 1.1 * hoped[paying[0]]), default=None)
