"""The key/value cache that both views read: one slot for each absolute position, one strip for each row.

Rows are left-aligned (slot = position), so padding never enters and rows of any lengths share the tensors. A pass
writes its T positions at slots [length, length + T) and moves no length: the draft pass therefore leaves no trace, the
verify pass overwrites it, and `commit` alone makes positions part of the text. Whatever lies beyond a length is noise
that every mask hides and the next pass overwrites.

    L = layers, B = rows, G = key/value heads, S = slots, H = head dimension
"""

import torch
from torch import Tensor

SLOT_QUANTUM = 64
"""Capacities are multiples of this many slots."""


class Cache:
    """Keys and values of all layers for any number of rows; lengths live on the host."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device):
        self._shape = (num_heads, head_dim)
        self._strips: list[int] = []  # strip i of the tensors belongs to row self._strips[i]
        self._lengths: dict[int, int] = {}
        empty = torch.zeros(0, num_heads, 0, head_dim, dtype=dtype, device=device)
        self.keys: list[Tensor] = [empty] * num_layers
        self.values: list[Tensor] = [empty] * num_layers

    @property
    def num_slots(self) -> int:
        """Slots of every strip."""
        return self.keys[0].shape[2]

    def length(self, row: int) -> int:
        """Committed tokens of a row."""
        return self._lengths[row]

    def __contains__(self, row: int) -> bool:
        return row in self._lengths

    def add(self, row: int) -> None:
        """Give a new row a strip, growing the tensors when none is free."""
        assert row not in self._lengths, f"row {row} already has a strip"
        if len(self._strips) == self.keys[0].shape[0]:
            self._resize(max(1, 2 * len(self._strips)), self.num_slots)
        self._strips.append(row)
        self._lengths[row] = 0

    def remove(self, row: int) -> None:
        """Take a row's strip away; the last strip moves into its place."""
        last = self._strips[-1]
        self._swap(self._strips.index(row), len(self._strips) - 1)
        assert last in self._lengths
        self._strips.pop()
        del self._lengths[row]

    def reserve(self, num_slots: int) -> None:
        """Make every strip at least this long; the tensors at least double, so growth is amortised."""
        if num_slots > self.num_slots:
            target = max(num_slots, 2 * self.num_slots)
            self._resize(self.keys[0].shape[0], -(-target // SLOT_QUANTUM) * SLOT_QUANTUM)

    def arrange(self, rows: list[int]) -> slice:
        """Move the strips of `rows` next to each other, in that order, and say where they lie: a view, never a copy."""
        if len(rows) == 1:
            at = self._strips.index(rows[0])
            return slice(at, at + 1)
        for target, row in enumerate(rows):
            if self._strips[target] != row:
                self._swap(target, self._strips.index(row))
        return slice(0, len(rows))

    def commit(self, row: int, num_tokens: int) -> None:
        """The first `num_tokens` positions that the last pass wrote become part of the row."""
        self._lengths[row] += num_tokens
        assert self._lengths[row] <= self.num_slots, f"row {row}: committed beyond its slots"

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens from `length` on."""
        assert 0 <= length <= self._lengths[row], f"row {row}: cannot cut {self._lengths[row]} tokens to {length}"
        self._lengths[row] = length

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[[a, b]] = tensor[[b, a]]
        self._strips[a], self._strips[b] = self._strips[b], self._strips[a]

    def _resize(self, num_strips: int, num_slots: int) -> None:
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(num_strips, self._shape[0], num_slots, self._shape[1])
                new[: old.shape[0], :, : old.shape[2]] = old
                tensors[layer] = new
