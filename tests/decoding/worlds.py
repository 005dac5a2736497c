"""Simulated machines and texts for `block_size="auto"`: how fast a policy writes, against every fixed width.

A world draws what drafts are kept and how noisy a measured time is; what is summed up are the true times, so that
a policy decides on noise but is judged without it. `python -m tests.decoding.worlds` prints the table of all worlds.
"""

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orthrus.decoding.planner import Planner, Policy
from orthrus.decoding.schedule import Candidate, Choice, Experience, Schedule
from orthrus.decoding.survival import Survival

BLOCK = 32
FIXED = (0, 3, 7, 15, 31)
"""Widths of the blocks that auto is measured against; 0 is plain decoding."""
PROMPT = 300
"""Tokens before each text."""

Ahead = Literal["never", "guessed", "planned"]
"""Whether a device drafts for the next cycle while the host reads: where this cycle had the widths of the one before,
which are thrown away when the next one has others; or for widths that are chosen a cycle ahead."""

Text = Callable[[int], float]
"""text(tokens written) -> how often a draft behind kept ones is kept there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What passes take, and how well it can be measured."""

    base_ms: float
    free_positions: float
    """Positions up to which a pass costs hardly more than one of a single position."""
    position_ms: float
    """Each position beyond them."""
    draft_share: float = 1.0
    """A draft pass's time over that of a verify pass."""
    noise: float = 0.0
    """Standard deviation of the logarithm of a measured time; 3 in 100 are three times too long as well."""
    device_type: str = "cuda"
    """A cuda machine rounds rows up to powers of two, as the engine does."""
    ahead: Ahead = "never"
    measured_ms: Mapping[int, Sequence[float]] = field(default_factory=dict)
    """What cycles of so many rows take at each of `FIXED`, where that is known."""
    read_ms: float = 0.0
    """What the host takes between two cycles, where the device does not draft meanwhile."""

    def pass_ms(self, rows: int, columns: int) -> float:
        """Of one pass."""
        if self.device_type == "cuda":
            rows = 1 << (rows - 1).bit_length()
        positions = rows * columns
        return self.base_ms * (1 + 0.0003 * positions) + self.position_ms * max(0.0, positions - self.free_positions)

    def cycle_ms(self, rows: int, width: int) -> float:
        """Of a draft pass, unless nothing is drafted, and a verify pass."""
        if (known := self.measured_ms.get(rows)) is not None:
            i = next(i for i, wider in enumerate(FIXED) if wider >= width)
            return known[i]
        return self.pass_ms(rows, width + 1) * (1 + self.draft_share * (width > 0))

    def draft_ms(self, rows: int, width: int) -> float:
        """The draft pass's part."""
        return self.cycle_ms(rows, width) * self.draft_share / (1 + self.draft_share) if width else 0.0

    def measured(self, rng: random.Random, ms: float) -> float:
        """What a clock says of a cycle."""
        if not self.noise:
            return ms
        return ms * rng.lognormvariate(0, self.noise) * (3 if rng.random() < 0.03 else 1)


def cpu(ratio: float, *, noise: float = 0.0) -> Machine:
    """A machine whose pass of 32 positions takes `ratio` times as long as its pass of one."""
    per_position = 7.0 * (ratio - 1) / 31
    return Machine(base_ms=7.0, free_positions=1, position_ms=per_position, noise=noise, device_type="cpu")


def gpu(*, draft_share: float = 1.0, noise: float = 0.0) -> Machine:
    """8B on an H200: 4.6 ms a pass, 0.61 ms more for every 32 positions beyond the ridge."""
    return Machine(
        base_ms=4.6, free_positions=190, position_ms=0.61 / 32, draft_share=draft_share, noise=noise
    )  # fmt: skip


def engine(ahead: Ahead) -> Machine:
    """8B on an H200 as measured at 1k of context (wall time of `benchmarks/batch.py`, drafts made ahead)."""
    times = {
        1: (4.60, 8.98, 9.03, 9.09, 9.31),
        4: (4.73, 9.22, 9.47, 10.70, 14.15),
        16: (5.45, 11.8, 15.3, 21.5, 36.8),
        64: (8.91, 28.6, 44.0, 74.6, 136.8),
    }
    return Machine(
        base_ms=4.6, free_positions=190, position_ms=0.61 / 32, measured_ms=times, ahead=ahead, read_ms=0.3, noise=0.01
    )  # fmt: skip


MACHINES = {
    "engine": engine("planned"),
    "gpu": gpu(),
    "gpu fp8": gpu(draft_share=0.55),
    "gpu noisy": gpu(noise=0.2),
    "bf16 1.5": cpu(1.5),
    "bf16 2.4": cpu(2.4),
    "bf16 noisy": cpu(2.0, noise=0.2),
    "fp32 4": cpu(4.0),
    "fp32 9": cpu(9.0),
    "fp32 noisy": cpu(6.0, noise=0.2),
}


def steady(rate: float) -> Text:
    return lambda written: rate


def switching(low: float, high: float, first: int, second: int) -> Text:
    """`first` tokens at the low rate, then `second` at the high one, and again."""
    return lambda written: low if written % (first + second) < first else high


RATES = {"N 12.7": 0.929, "N 8.5": 0.885, "N 3.7": 0.73, "N 2.0": 0.5, "N 1.3": 0.23, "N 1.0": 0.02}
TEXTS: dict[str, list[Text]] = {
    **{name: [steady(rate)] for name, rate in RATES.items()},
    "300/300": [switching(0.02, 0.929, 300, 300)],
    "100/100": [switching(0.1, 0.885, 100, 100)],
    "20/200": [switching(0.02, 0.929, 20, 200)],
    "100/20": [switching(0.02, 0.929, 100, 20)],
    "mixed": [steady(0.929), steady(0.02), steady(0.73), steady(0.3)],
    "mixed 1/4": [steady(0.929), steady(0.02), steady(0.02), steady(0.02)],
}


class Fixed:
    """The policy of a fixed block size."""

    def __init__(self, width: int):
        self.width = width

    def new_survival(self) -> Survival:
        return Survival(BLOCK, memory=1.0)

    def choose(self, candidates: Sequence[Candidate], num_slots: int, *, running: Choice | None = None) -> Choice:
        return Choice(self.width)

    def learn(
        self, choice: Choice, candidates: Sequence[Candidate], num_slots: int, widths: Sequence[int],
        accepted: Sequence[int], ms: float,
    ) -> None:  # fmt: skip
        pass


@dataclass(slots=True, eq=False)
class _Row:
    text: Text
    survival: Survival
    written: int = 0


class _Loop:
    """The step loop over a machine, as `Decoder` and a backend are."""

    def __init__(self, policy: Policy, machine: Machine, rng: random.Random):
        self.planner, self.machine, self.rng = Planner(policy), machine, rng
        self._last: tuple[list[_Row], list[int]] = ([], [])
        """Rows and widths of the last cycle."""
        self._drafted: tuple[list[_Row], list[int]] | None = None
        """What was drafted for ahead."""

    def cycle(self, rows: Sequence[_Row], rooms: Sequence[int], kept: Callable[[int, int], int]) -> tuple[int, float]:
        """(width, true milliseconds); row i keeps kept(i, drafted)."""
        candidates = [Candidate(row.survival, room) for row, room in zip(rows, rooms, strict=True)]
        num_slots, after, batch = PROMPT + max(row.written for row in rows), None, tuple(rows)
        choice = self.planner.choose(batch, candidates, num_slots)
        if self.machine.ahead == "planned":
            after = self.planner.plan(batch, candidates, num_slots, choice)
        used = [min(choice.width, room) for room in rooms]
        accepted = [kept(i, width) for i, width in enumerate(used)]
        ms = self.machine.cycle_ms(len(rows), max(used))
        self.planner.note(choice, candidates, num_slots, used, accepted, self.machine.measured(self.rng, ms))
        self.planner.learn()
        for row, num_kept in zip(rows, accepted, strict=True):
            row.written += num_kept + 1
        ms += self._lost_ms(rows, used)
        if after is not None:
            left = [room - num_kept - 1 for room, num_kept in zip(rooms, accepted, strict=True)]
            can_end = any(room <= width for room, width in zip(rooms, used, strict=True))
            self._drafted = None if can_end or not after.width else (list(rows), [min(after.width, n) for n in left])
        return choice.width, ms

    def _lost_ms(self, rows: Sequence[_Row], used: list[int]) -> float:
        """For what was drafted in vain before this cycle, and for a host that is waited for."""
        batch, drafted = (list(rows), used), self._drafted
        lost = 0.0
        if drafted is not None and drafted != batch:
            lost += self.machine.draft_ms(len(drafted[0]), max(drafted[1]))
        if max(used) and drafted != batch:
            lost += self.machine.read_ms
        if self.machine.ahead == "guessed":
            self._drafted = batch if max(used) and batch == self._last else None
        self._last = batch
        return lost


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is to be written: `rows` rows of these kinds, in turn, `tokens` tokens each."""

    texts: Sequence[Text]
    rows: int
    tokens: int
    is_open: bool = False
    """Whether a finished row's place is taken by a new one of its kind, until `tokens` are written on average; else
    rows get fewer and fewer."""


def run(policy: Policy, machine: Machine, load: Load, *, seed: int, widths: list[int] | None = None) -> float:
    """True milliseconds a token; the width of each cycle is appended to `widths`."""
    rng = random.Random(seed)
    active = [_Row(load.texts[i % len(load.texts)], policy.new_survival()) for i in range(load.rows)]
    loop = _Loop(policy, machine, rng)
    written, ms = 0, 0.0
    while written < load.rows * load.tokens and active:
        before = sum(row.written for row in active)
        rooms = [load.tokens - row.written - 1 for row in active]
        rates = [row.text(row.written) for row in active]
        width, cycle_ms = loop.cycle(active, rooms, lambda i, drafted, rates=rates: _kept(rng, rates[i], drafted))
        ms += cycle_ms
        written += sum(row.written for row in active) - before
        if widths is not None:
            widths.append(width)
        if load.is_open:
            active = [row if row.written < load.tokens else _Row(row.text, policy.new_survival()) for row in active]
        else:
            active = [row for row in active if row.written < load.tokens]
    return ms / written


PERIOD = 32
"""Cycles in which a row meets all quantiles of its law once."""


def quantiles(rate: float, rng: random.Random) -> list[int]:
    """Drafts that survive in each of these cycles, in an order of its own, as in `benchmarks/batch.py`."""
    found = [math.log((i + 0.5) / PERIOD) / math.log(rate) for i in range(PERIOD)]
    return rng.sample([min(int(q), BLOCK - 1) for q in found], PERIOD)


def rounds(
    policy: Policy,
    machine: Machine,
    rate: float,
    *,
    rows: int,
    num_rounds: int,
    seed: int,
    widths: list[int] | None = None,
) -> float:
    """True milliseconds a token in the last of these rounds: new rows each, 3 cycles and 32 in the clock. Tokens are
    those that its widths keep on average, whatever the luck of 32 cycles was."""
    rng = random.Random(seed)
    loop = _Loop(policy, machine, rng)
    traces = [quantiles(rate, rng) for _ in range(rows)]
    mean = {width: 1 + sum(min(kept, width) for kept in traces[0]) / PERIOD for width in FIXED}
    ms = written = 0.0
    for _ in range(num_rounds):
        active = [_Row(steady(rate), policy.new_survival()) for _ in range(rows)]
        for cycle in range(3 + PERIOD):
            if cycle == 3:
                ms = written = 0.0
            width, cycle_ms = loop.cycle(
                active, [10**6] * rows, lambda i, drafted, at=(cycle - 3) % PERIOD: min(traces[i][at], drafted)
            )
            ms, written = ms + cycle_ms, written + rows * mean[width]
            if widths is not None:
                widths.append(width)
    return ms / written


def _kept(rng: random.Random, rate: float, width: int) -> int:
    return next((j for j in range(width) if rng.random() >= rate), width)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Speed of auto over those of plain decoding and of the best fixed width, which may be 0: means over seeds."""

    cold: tuple[float, float]
    """In a process that has written nothing yet."""
    warm: tuple[float, float]
    """In one that has written the same load, other texts of the same kinds, once before."""
    best_width: int


def judge(machine: Machine, load: Load, *, seeds: int) -> Verdict:
    """Auto against every fixed width."""
    numbers = range(seeds)
    fixed = {width: sum(run(Fixed(width), machine, load, seed=i) for i in numbers) / seeds for width in FIXED[1:]}
    fixed[0] = run(Fixed(0), machine, load, seed=0)
    cold = warm = 0.0
    for i in numbers:
        experience = Experience(BLOCK)
        cold += run(Schedule(experience, device_type=machine.device_type), machine, load, seed=i) / seeds
        warm += run(Schedule(experience, device_type=machine.device_type), machine, load, seed=1000 + i) / seeds
    best = min(fixed, key=lambda width: fixed[width])
    return Verdict((fixed[0] / cold, fixed[best] / cold), (fixed[0] / warm, fixed[best] / warm), best)


def main(names: Sequence[str]) -> None:
    """A line for each of these machines (all, if none is named), batch and text."""
    print("auto over plain decoding / over the best fixed width (which); cold and warm, 200 and 2,000 tokens a row")
    for name in names or list(MACHINES):
        for rows in (1, 4, 16, 64):
            for text, texts in TEXTS.items():
                cells = []
                for tokens, num_tokens in ((200, 16000), (2000, 24000)):
                    load = Load(texts=texts, rows=rows, tokens=tokens, is_open=len(texts) > 1)
                    verdict = judge(MACHINES[name], load, seeds=-(-num_tokens // (rows * tokens)))
                    cells += [f"{plain:6.3f} / {best:5.3f}" for plain, best in (verdict.cold, verdict.warm)]
                    cells.append(f"({verdict.best_width:2})")
                print(f"{name:11}{rows:3} {text:10}", *cells, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
