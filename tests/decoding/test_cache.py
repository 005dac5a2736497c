"""The cache against a dictionary: whatever is committed stays, wherever strips and capacities move."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orthrus.decoding.cache import SLOT_QUANTUM, Cache


class CacheMachine(RuleBasedStateMachine):
    """Admit, write, commit, truncate and remove rows in any order."""

    def __init__(self):
        super().__init__()
        self.cache = Cache(2, 1, 1, dtype=torch.float64, device=torch.device("cpu"))
        self.truth: dict[int, list[float]] = {}
        self.next_row = 0
        self.next_value = 1.0

    @rule()
    def add(self):
        if len(self.truth) < 5:
            self.cache.add(self.next_row)
            self.truth[self.next_row] = []
            self.next_row += 1

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def cycle(self, data: st.DataObject):
        rows = data.draw(st.permutations(sorted(self.truth)))[: data.draw(st.integers(1, len(self.truth)))]
        width = data.draw(st.sampled_from([1, 4, SLOT_QUANTUM + 3]))
        self.cache.reserve(max(self.cache.length(row) for row in rows) + width)
        strips = self.cache.arrange(rows)
        for offset, row in enumerate(rows):
            values = [self.next_value + i for i in range(width)]
            self.next_value += width
            start = self.cache.length(row)
            for layer in range(2):
                self.cache.keys[layer][strips][offset, 0, start : start + width, 0] = torch.tensor(values)
                self.cache.values[layer][strips][offset, 0, start : start + width, 0] = -torch.tensor(values)
            kept = data.draw(st.integers(0, width))
            self.cache.commit(row, kept)
            self.truth[row] += values[:kept]

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject):
        row = data.draw(st.sampled_from(sorted(self.truth)))
        length = data.draw(st.integers(0, len(self.truth[row])))
        self.cache.truncate(row, length)
        del self.truth[row][length:]

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def remove(self, data: st.DataObject):
        row = data.draw(st.sampled_from(sorted(self.truth)))
        self.cache.remove(row)
        del self.truth[row]

    @invariant()
    def rows_hold_what_was_committed(self):
        for row, expected in self.truth.items():
            assert self.cache.length(row) == len(expected)
            strip = self.cache.arrange([row])
            for layer in range(2):
                assert self.cache.keys[layer][strip][0, 0, : len(expected), 0].tolist() == expected
                assert self.cache.values[layer][strip][0, 0, : len(expected), 0].tolist() == [-x for x in expected]


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_growth_is_amortised_and_in_quanta():
    cache = Cache(1, 1, 1, dtype=torch.float32, device=torch.device("cpu"))
    cache.add(0)
    sizes = set()
    for length in range(1, 1000):
        cache.reserve(length)
        sizes.add(cache.num_slots)
    assert len(sizes) < 8 and all(size % SLOT_QUANTUM == 0 for size in sizes)


def test_cutting_more_than_there_is_is_a_bug():
    cache = Cache(1, 1, 1, dtype=torch.float32, device=torch.device("cpu"))
    cache.add(0)
    with pytest.raises(AssertionError, match="cannot cut"):
        cache.truncate(0, 1)
