"""One micro-batch of view training as a module: what DDP, FSDP2 and `transformers.Trainer` wrap.

They act when a module is called (gather weights, average gradients), so both passes, anchors and loss are the `forward`
of one module, and each layer's step is the `forward` of another (`forward.LayerStep`). Only the view's parameters
require gradients.

    B = rows, T = tokens of a row, A = anchors, K = block size
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.model.modeling import OrthrusLM
from orthrus.training.forward import LayerStep
from orthrus.training.masters import keep_masters
from orthrus.training.rows import Rows
from orthrus.training.trainer import ViewTask


def draw_seed(seed: int, *, step: int, micro_batch: int, rank: int) -> int:
    """The seed of one micro-batch's anchors: a hash of where it stands in the run, so that resuming needs no state."""
    place = f"{seed}/{step}/{micro_batch}/{rank}".encode()
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

    def forward(self, ids: Tensor, document: Tensor, reply: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Loss of one micro-batch, and survival of its widest blocks (`loss.survival`). (), [K-1].

        `ids`, `document` and `reply` are [B, T] (training/rows.py); `seed` decides where the anchors stand.
        """
        rows = Rows(ids, document, reply, isolated=self.isolated)
        generator = torch.Generator(ids.device).manual_seed(seed)
        loss, survival_J = self.task(rows, self.task.blocks.sample(rows.anchorable_BT, generator))
        return loss, survival_J.detach()
