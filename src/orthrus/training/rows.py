"""Training rows: tokens, the documents they belong to, and the replies in them that a view learns to draft.

A *document* is one text that stands alone: nothing in it may read another document of its row, and its positions count
from 0. A *reply* is a run of tokens inside a document that the base wrote, or should be drafted as if it had: anchors
and drafted tokens stay within one.

    B = rows, T = tokens of a row, R = corpus rows of a micro-batch
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orthrus.datagen.regenerate import OwnRows
from orthrus.model.masks import document_starts

PADDING = -1
"""Document of the tokens that fill a row up."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A micro-batch of training rows."""

    ids_BT: Tensor
    """int64. Padding holds any valid id: no token of a document sees it."""
    document_BT: Tensor
    """int64: which document a token belongs to, counted from 0 within the row; `PADDING` behind the last."""
    reply_BT: Tensor
    """int64: which reply a token belongs to, counted from 1 within the row; 0: none."""
    isolated: bool = True
    """Whether rows may hold several documents. False promises that each is one document, padded behind or not, which
    plain causal attention serves; finding that out from the tensors would stop the device."""

    @classmethod
    def from_batch(cls, batch: Mapping[str, Tensor], *, isolated: bool) -> "Rows":
        """Rows from what `data.collate` returns."""
        return cls(batch["ids"], batch["document"], batch["reply"], isolated)

    @property
    def positions_BT(self) -> Tensor:
        """Place of each token within its document, counted from 0: what rotary embeddings turn by. [B, T]."""
        places_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        if not self.isolated:
            return places_T.expand_as(self.ids_BT)
        return places_T - document_starts(self.document_BT)

    @property
    def anchorable_BT(self) -> Tensor:
        """Where an anchor may stand: on a token of a reply whose next token is of the same reply. [B, T]."""
        anchorable_BT = torch.zeros_like(self.reply_BT, dtype=torch.bool)
        anchorable_BT[:, :-1] = (self.reply_BT[:, :-1] > 0) & (self.reply_BT[:, 1:] == self.reply_BT[:, :-1])
        return anchorable_BT

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device."""
        tensors = (tensor.to(device, non_blocking=True) for tensor in (self.ids_BT, self.document_BT, self.reply_BT))
        return Rows(*tensors, isolated=self.isolated)

    def __len__(self) -> int:
        return len(self.ids_BT)


def one_reply_rows(ids_BT: Tensor, first_B: Tensor, end_B: Tensor) -> Rows:
    """Rows of one document each, whose tokens first[b] .. end[b] - 1 are a reply."""
    places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    reply_BT = (places_T >= first_B[:, None]) & (places_T < end_B[:, None])
    ids_BT = ids_BT.long()
    return Rows(ids_BT, torch.zeros_like(ids_BT), reply_BT.long(), isolated=False)


def training_rows(
    own: OwnRows, tokens: np.ndarray, *, rows_per_pass: int, real_share: float, seed: int
) -> Iterator[Rows]:
    """Endless micro-batches of a base's own rows and, behind them, rows of the corpus.

    The reply of an own row is what the base wrote before any loop; that of a corpus row is all but its first token.
    """
    device, num_tokens = own.ids.device, own.ids.shape[1]
    stream = torch.from_numpy(tokens.astype(np.int32)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    num_real = round(rows_per_pass * real_share)
    num_own = rows_per_pass - num_real
    assert len(own.ids) >= num_own, "fewer rollouts than one micro-batch needs"
    first_R = torch.ones(num_real, dtype=torch.long, device=device)
    end_R = torch.full_like(first_R, num_tokens)
    while True:
        order = torch.randperm(len(own.ids), generator=generator, device=device)
        for pick in order[: len(order) // num_own * num_own].split(num_own):
            starts_R1 = torch.randint(len(stream) - num_tokens, (num_real, 1), generator=generator, device=device)
            real_RT = stream[starts_R1 + torch.arange(num_tokens, device=device)]
            yield one_reply_rows(
                torch.cat([own.ids[pick].int(), real_RT]),
                torch.cat([own.first[pick], first_R]), torch.cat([own.end[pick], end_R]),
            )  # fmt: skip
