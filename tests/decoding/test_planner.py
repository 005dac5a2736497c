"""What is chosen when, and that nothing is chosen before what it may know is learnt."""

from collections.abc import Sequence

from orthrus.decoding.planner import Planner
from orthrus.decoding.schedule import Candidate, Choice
from orthrus.decoding.survival import Survival


class Log:
    """A policy that numbers its choices and writes down what it is asked, with the cycle that ran meanwhile."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int | None]] = []

    def new_survival(self) -> Survival:
        return Survival(4, memory=1.0)

    def choose(self, candidates: Sequence[Candidate], num_slots: int, *, running: Choice | None = None) -> Choice:
        self.events.append(("choose", None if running is None else running.width))
        return Choice(sum(name == "choose" for name, _ in self.events))

    def learn(
        self, choice: Choice, candidates: Sequence[Candidate], num_slots: int, widths: Sequence[int],
        accepted: Sequence[int], ms: float,
    ) -> None:  # fmt: skip
        self.events.append(("learn", choice.width))


def run_cycles(batches: str, *, ahead: bool) -> tuple[list[tuple[str, int | None]], list[int]]:
    """What a policy was asked over cycles of these batches, and the width of each."""
    log, widths = Log(), []
    planner = Planner(log)
    for batch in batches:
        choice = planner.choose(batch, [], 0)
        if ahead:
            planner.plan(batch, [], 0, choice)
        widths.append(choice.width)
        planner.note(choice, [], 0, [], [], 1.0)
        if not ahead:
            planner.learn()
    planner.learn()
    planner.learn()  # a second time there is nothing
    return log.events, widths


def test_a_cycle_at_a_time_is_chosen_and_learnt_in_turn():
    events, widths = run_cycles("aab", ahead=False)
    assert events == [("choose", None), ("learn", 1), ("choose", None), ("learn", 2), ("choose", None), ("learn", 3)]
    assert widths == [1, 2, 3]


def test_a_plan_is_made_while_its_cycle_runs_and_knows_the_one_before():
    events, widths = run_cycles("aaa", ahead=True)
    assert events == [
        ("choose", None), ("choose", 1), ("learn", 1), ("choose", 2), ("learn", 2), ("choose", 3), ("learn", 3)
    ]  # fmt: skip
    assert widths == [1, 2, 3]


def test_other_rows_are_chosen_for_at_once_with_all_that_was_learnt():
    events, widths = run_cycles("ab", ahead=True)
    assert events == [("choose", None), ("choose", 1), ("learn", 1), ("choose", None), ("choose", 3), ("learn", 3)]
    assert widths == [1, 3], "the plan was for other rows"
