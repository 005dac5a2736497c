"""Where the blocks of a training row start, and how wide they are.

Blocks of several widths share a row: short ones give more anchors for the same work, which is where most drafts are
kept or lost, long ones teach the far positions; and a view that has seen all widths drafts well at any block size.

    B = rows, A = anchors (blocks) a row, K = width of a block, Q = positions of all blocks of a row, T = clean tokens
    of a row, P = places in it
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of each row: for every position q of all of them, which block it is in and where. Groups of one width
    follow one another."""

    groups: tuple[tuple[int, int], ...]
    """(width K, blocks of that width) of each group."""
    block_Q: Tensor
    """Block of each position, counted from 0 through all groups."""
    offset_Q: Tensor
    """Place of each position in its block, 0 for the anchor."""
    is_last_Q: Tensor
    """The last position of a block predicts nothing."""
    where: slice = field(default_factory=lambda: slice(None))
    """Which positions of the row's these are: a part of a row's blocks knows its place."""

    @classmethod
    def of(cls, groups: tuple[tuple[int, int], ...], device: torch.device | None = None) -> "Blocks":
        """Blocks from their (width, count) groups."""
        widths_A = torch.cat([torch.full((count,), width) for width, count in groups])
        block_Q = torch.arange(len(widths_A)).repeat_interleave(widths_A)
        offset_Q = torch.cat([torch.arange(width).repeat(count) for width, count in groups])
        is_last_Q = offset_Q == widths_A[block_Q] - 1
        return cls(groups, block_Q.to(device), offset_Q.to(device), is_last_Q.to(device))

    def split(self, x_BQ: Tensor) -> list[Tensor]:
        """The positions by group: [B, blocks of the group, K] each."""
        parts = x_BQ.split([width * count for width, count in self.groups], dim=1)
        return [part.unflatten(1, (count, width)) for part, (width, count) in zip(parts, self.groups, strict=True)]

    def chunks(self, max_positions: int) -> "Iterator[Blocks]":
        """The blocks in parts of at most so many positions (at least one block), in order."""
        if max_positions >= len(self.block_Q):
            yield self
            return
        start = block = 0
        for width, count in self.groups:
            step = max(1, max_positions // width)
            for done in range(0, count, step):
                taken = min(step, count - done)
                where = slice(start, start + taken * width)
                yield Blocks(
                    ((width, taken),),
                    self.block_Q[where] - block, self.offset_Q[where], self.is_last_Q[where], where,
                )  # fmt: skip
                start, block = where.stop, block + taken

    def positions(self, anchors_BA: Tensor) -> Tensor:
        """Absolute position of every block position. [B, Q]."""
        return anchors_BA[:, self.block_Q] + self.offset_Q

    def inputs(self, ids_BT: Tensor, anchors_BA: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
        """Ids (the anchor's own token, then masks) and absolute positions of all blocks. Both [B, Q]."""
        ids_BQ = ids_BT.gather(1, anchors_BA)[:, self.block_Q]
        return torch.where(self.offset_Q == 0, ids_BQ, mask_token_id), self.positions(anchors_BA)

    def sample(self, first_B: Tensor, last_B: Tensor, num_clean: int, generator: torch.Generator) -> Tensor:
        """Anchors of all blocks, drawn for each group by `sample_anchors`. [B, A]."""
        drawn = [
            sample_anchors(first_B, last_B, num_clean=num_clean, num_anchors=count, generator=generator)
            for _, count in self.groups
        ]
        return torch.cat(drawn, dim=1)


def sample_anchors(
    first_B: Tensor, last_B: Tensor, *, num_clean: int, num_anchors: int, generator: torch.Generator
) -> Tensor:
    """anchors[b] = sorted positions drawn without replacement from first[b] .. last[b], both included. [B, A].

    Where a row has fewer places than anchors, places repeat evenly. 0 <= first <= last < num_clean, unchecked: reading
    them would stop the device.
    """
    places_P = torch.arange(num_clean, device=first_B.device)
    outside_BP = (places_P < first_B[:, None]) | (places_P > last_B[:, None])
    draws_BP = torch.rand(outside_BP.shape, generator=generator, device=first_B.device)
    order_BP = draws_BP.masked_fill(outside_BP, 2.0).argsort(dim=1)
    num_places_B1 = (last_B - first_B + 1)[:, None]
    picks_BA = torch.arange(num_anchors, device=first_B.device) % num_places_B1
    return order_BP.gather(1, picks_BA).sort(dim=1).values
