"""One micro-batch of view training as a module: what DDP, FSDP2 and `transformers.Trainer` wrap.

They act when a module is called (gather weights, average gradients), so both passes, anchors and loss are the `forward`
of one module, and each layer's step is the `forward` of another (`forward.LayerStep`). Only the view's parameters
require gradients.

    B = rows, T = tokens of a row, A = anchors, K = block size
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.model.modeling import OrthrusLM
from orthrus.training.forward import LayerStep
from orthrus.training.masters import keep_masters
from orthrus.training.rows import Rows
from orthrus.training.trainer import ViewTask


def draw_seed(seed: int, *, step: int, row: int) -> int:
    """The seed of one row's anchors: a hash of where it stands in the run, so that resuming needs no state.

    `row` counts through the rows of a step, so neither the number of ranks nor the size of a micro-batch matters.
    """
    place = f"{seed}/{step}/{row}".encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1


class ViewTraining(nn.Module):
    """A dual-view model in training."""

    def __init__(self, model: OrthrusLM, settings: Any, *, isolated: bool, gradient_checkpointing: bool = False):
        """`settings` has `blocks` and `objective`; `isolated` is as in `Rows`. The model is on its device already."""
        super().__init__()
        self.isolated = isolated
        keep_masters(model)
        # Not as a submodule: each parameter is to be found once, in its layer's step or in what the layers share.
        self._whole = (model,)
        self.shared = nn.ModuleList([model.model.embed_tokens, model.model.rotary_emb, model.model.norm, model.lm_head])
        self.steps = nn.ModuleList(
            [LayerStep(layer, checkpointed=gradient_checkpointing) for layer in model.model.layers]
        )
        self.task = ViewTask(model, settings, steps=self.steps)

    @property
    def lm(self) -> OrthrusLM:
        """The model itself, for reading weights and for decoding."""
        return self._whole[0]

    def forward(
        self, ids: Tensor, document: Tensor, reply: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of one micro-batch, its weight, and survival of its widest blocks (`ViewTask.weighted`). (), (), [K-1].

        `ids`, `document` and `reply` are [B, T] (training/rows.py); `seeds` decide where the anchors of each row stand.
        """
        rows = Rows(ids, document, reply, isolated=self.isolated)
        loss, weight, survival_J = self.task.weighted(rows, self.anchors(rows, seeds))
        return loss, weight, survival_J.detach()

    def anchors(self, rows: Rows, seeds: Sequence[int]) -> Tensor:
        """Anchors of all blocks, each row's drawn from its own seed. [B, A]."""
        allowed_BT = rows.anchorable_BT
        generators = [torch.Generator(allowed_BT.device).manual_seed(seed) for seed in seeds]
        return torch.cat([self.task.blocks.sample(allowed_BT[b : b + 1], g) for b, g in enumerate(generators)])
