"""Where the blocks of a training row start, and how wide they are.

Blocks of several widths share a row: short ones give more anchors for the same work, which is where most drafts are
kept or lost, long ones teach the far positions; and a view that has seen all widths drafts well at any block size.

    B = rows, A = anchors (blocks) a row, K = width of a block, Q = positions of all blocks of a row, T = clean tokens
    of a row
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from orthrus.training.rows import Rows


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

    def places(self, anchors_BA: Tensor) -> Tensor:
        """Place in the row of every block position. A block may overhang its row: T and more. [B, Q]."""
        return anchors_BA[:, self.block_Q] + self.offset_Q

    def supervised(self, reply_BT: Tensor, anchors_BA: Tensor) -> Tensor:
        """Whether what q predicts, the token behind place q, is of the anchor's reply; no at last positions. [B, Q].

        An anchor outside all replies has no supervised draft, one that ends its reply has none, and of blocks that
        `sample` repeats in a group all but the first have none: what they say twice is not twice as true.
        """
        target_BQ = self.places(anchors_BA) + 1
        num_clean = reply_BT.shape[1]
        reply_of_anchor_BQ = reply_BT.gather(1, anchors_BA)[:, self.block_Q]
        reply_of_target_BQ = reply_BT.gather(1, target_BQ.clamp(max=num_clean - 1))
        same_BQ = (reply_of_target_BQ == reply_of_anchor_BQ) & (reply_of_anchor_BQ > 0)
        return same_BQ & (target_BQ < num_clean) & ~self.is_last_Q & ~self.repeated(anchors_BA)[:, self.block_Q]

    def repeated(self, anchors_BA: Tensor) -> Tensor:
        """Whether a block stands where the one before it in its group does; groups are sorted. [B, A]."""
        groups = anchors_BA.split([count for _, count in self.groups], dim=1)
        return torch.cat([F.pad(group[:, 1:] == group[:, :-1], (1, 0)) for group in groups], dim=1)

    def inputs(self, rows: Rows, anchors_BA: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
        """Ids (the anchor's own token, then masks) and rotary positions of all blocks. Both [B, Q]."""
        ids_BQ = rows.ids_BT.gather(1, anchors_BA)[:, self.block_Q]
        positions_BQ = rows.positions_BT.gather(1, anchors_BA)[:, self.block_Q] + self.offset_Q
        return torch.where(self.offset_Q == 0, ids_BQ, mask_token_id), positions_BQ

    def sample(self, allowed_BT: Tensor, generator: torch.Generator) -> Tensor:
        """Anchors of all blocks, drawn for each group by `sample_anchors`. [B, A]."""
        drawn = [sample_anchors(allowed_BT, num_anchors=count, generator=generator) for _, count in self.groups]
        return torch.cat(drawn, dim=1)


def sample_anchors(allowed_BT: Tensor, *, num_anchors: int, generator: torch.Generator) -> Tensor:
    """anchors[b] = sorted places drawn without replacement from those allowed in row b. [B, A].

    Where a row has fewer places than anchors, places repeat evenly. A row without any gets anchors at some place that
    is not allowed: its drafts have no weight (`Blocks.supervised`), and finding it out here would stop the device.
    """
    draws_BT = torch.rand(allowed_BT.shape, generator=generator, device=allowed_BT.device)
    order_BT = draws_BT.masked_fill(~allowed_BT, 2.0).argsort(dim=1)
    num_places_B1 = allowed_BT.sum(dim=1, keepdim=True).clamp(min=1)
    picks_BA = torch.arange(num_anchors, device=allowed_BT.device) % num_places_B1
    return order_BT.gather(1, picks_BA).sort(dim=1).values
