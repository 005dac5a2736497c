"""When the widths of cycles are chosen: at once, or a cycle ahead while the device is busy.

A backend that drafts ahead has to know the width of the cycle behind the one that it runs. It is chosen then, without
knowing what the running one keeps, and holds as long as the rows are those that it was chosen for. What a cycle showed
is learnt no later than it is needed, so the choices are those of learning at once.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Protocol

from orthrus.decoding.schedule import Candidate, Choice
from orthrus.decoding.survival import Survival


class Policy(Protocol):
    """What chooses widths and learns from cycles: `Schedule`."""

    def new_survival(self) -> Survival:
        """For a new row."""
        ...

    def choose(self, candidates: Sequence[Candidate], num_slots: int, *, running: Choice | None = None) -> Choice:
        """As `Schedule.choose`."""
        ...

    def learn(
        self, choice: Choice, candidates: Sequence[Candidate], num_slots: int, widths: Sequence[int],
        accepted: Sequence[int], ms: float,
    ) -> None:  # fmt: skip
        """As `Schedule.learn`."""


class Planner:
    """The choices of one decoder's cycles; `batch` is whatever tells its rows from others."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self._planned: tuple[Hashable, Choice] | None = None
        """Rows, and the choice that was made for the cycle after their last one."""
        self._learn_last: Callable[[], None] | None = None
        """Learns from the last cycle."""

    def choose(self, batch: Hashable, candidates: Sequence[Candidate], num_slots: int) -> Choice:
        """The next cycle's choice: the planned one, if it was for these rows."""
        planned, self._planned = self._planned, None
        if planned is not None and planned[0] == batch:
            return planned[1]
        self.learn()
        return self.policy.choose(candidates, num_slots)

    def plan(self, batch: Hashable, candidates: Sequence[Candidate], num_slots: int, running: Choice) -> Choice:
        """The choice for the cycle behind the one of these rows that runs at `running`."""
        self.learn()
        after = self.policy.choose(candidates, num_slots, running=running)
        self._planned = batch, after
        return after

    def note(
        self, choice: Choice, candidates: Sequence[Candidate], num_slots: int, widths: Sequence[int],
        accepted: Sequence[int], ms: float,
    ) -> None:  # fmt: skip
        """Keep what a cycle showed until it is learnt from. Arguments as `Schedule.learn`."""
        self._learn_last = partial(self.policy.learn, choice, candidates, num_slots, widths, accepted, ms)

    def learn(self) -> None:
        """Learn from the last cycle, unless that is done."""
        learn, self._learn_last = self._learn_last, None
        if learn is not None:
            learn()
