"""What a cycle of so many drafts costs: times of each width, on a level that all share, with what is not known.

Nothing reads a clock: times are given.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

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
