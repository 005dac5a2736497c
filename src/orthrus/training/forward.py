"""The two passes of training: the clean row in the AR view, then all its blocks in the diffusion view.

The AR pass is frozen: it gives each layer's keys and values (what the blocks may read) and the teacher's logits. It is
plainly causal where a row is one document, else causal within each document (`masks.document_mask`). The block pass
attends to [clean keys ; block keys] under `masks.block_training_mask`. On a GPU both masks are intervals, which
`interval_attention` reads; `dense_attend` is its slow, obviously right twin and what other devices run.

One layer is compiled, not the model: its graph serves all layers, so compiling does not grow with depth.

    B = rows, T = clean tokens, A = anchors a row, Q = positions of all blocks of a row, N = heads, G = key/value heads,
    H = head dimension
"""

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orthrus.model.attention import causal_attend, rms_norm, run_layer
from orthrus.model.masks import (
    Intervals,
    block_training_intervals,
    block_training_mask,
    document_intervals,
    document_mask,
)
from orthrus.training.anchors import Blocks

HAS_KERNELS = torch.cuda.is_available() and find_spec("triton") is not None  # Windows has one without the other
if HAS_KERNELS:
    from orthrus.training.interval_attention import interval_attention

Mask = Intervals | Tensor
"""Intervals where there are kernels for them, else booleans [B, T, T] or [B, Q, T + Q]."""
Rope = tuple[Tensor, Tensor]
KeyValues = list[tuple[Tensor, Tensor]]


def ar_layer(layer: nn.Module, hidden_BTD: Tensor, rope: Rope, mask: Mask | None) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of the AR view over clean rows, and its keys and values. [B, T, D], [B, G, T, H] twice."""
    kept: KeyValues = []

    def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((k, v))
        return causal_attend(attention, q, k, v) if mask is None else masked_attend(attention, q, (k, v), None, mask)

    hidden_BTD = run_layer(layer, hidden_BTD, rope, attend, "ar")
    return hidden_BTD, *kept[0]


def block_layer(layer: nn.Module, hidden_BQD: Tensor, rope: Rope, clean: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
    """One layer of the diffusion view over all blocks, reading the clean rows' keys and values. [B, Q, D]."""

    def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attend(attention, q, clean, (k, v), mask)

    return run_layer(layer, hidden_BQD, rope, attend, "diffusion")


def masked_attend(
    attention: nn.Module, q: Tensor, clean: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor] | None, mask: Mask
) -> Tensor:
    """Attention over clean keys and values and, in the block pass, those of the blocks. [B, Q, N * H]."""
    if isinstance(mask, Intervals):
        return interval_attention(q, clean, own, mask, scale=attention.scaling)
    keys, values = clean if own is None else (torch.cat(pair, dim=2) for pair in zip(clean, own, strict=True))
    return dense_attend(attention, q, keys, values, mask)


def dense_attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask_BQS: Tensor) -> Tensor:
    """The same with every key read, under a boolean mask."""
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_BQS[:, None], enable_gqa=True, scale=attention.scaling
    )
    return mixed.transpose(1, 2).flatten(2)


class LayerStep(nn.Module):
    """What training calls for one layer: a module whose `forward` does one layer's step in either view.

    The passes take decoder layers apart instead of calling them, so hooks of the layer itself would not run; those of
    this module do (FSDP2 gathers a layer's weights in them). Gradient checkpointing is per step.
    """

    def __init__(self, layer: nn.Module, *, checkpointed: bool = False):
        super().__init__()
        self.layer = layer
        self.checkpointed = checkpointed

    def forward(self, hidden_BTD: Tensor, run: Callable[[nn.Module, Tensor], Any]) -> Any:
        """run(layer, hidden): its result."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(run, self.layer, hidden_BTD, use_reentrant=False, preserve_rng_state=False)
        return run(self.layer, hidden_BTD)


class Passes:
    """The two passes of one model, with its layer functions compiled where it pays (a GPU)."""

    def __init__(self, model: nn.Module, *, compiled: bool, steps: Iterable[LayerStep] | None = None):
        self.model = model
        self.steps = [LayerStep(layer) for layer in model.model.layers] if steps is None else list(steps)
        # Static shapes: stages differ in theirs, and a graph for any shape is slower than one for each.
        self.compile: Callable[[Callable], Callable] = (
            partial(torch.compile, dynamic=False) if compiled else (lambda function: function)
        )
        self._ar_layer = self.compile(ar_layer)
        self._block_layer = self.compile(block_layer)

    def ar(
        self, ids_BT: Tensor, positions_BT: Tensor | None = None, document_BT: Tensor | None = None
    ) -> tuple[Tensor, KeyValues]:
        """The AR view over clean rows: final hidden states [B, T, D] and each layer's (keys, values).

        Without positions they count through the row; without documents each row is one.
        """
        model, clean = self.model.model, []
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        mask = None if document_BT is None else clean_mask(document_BT)
        hidden_BTD = model.embed_tokens(ids_BT)
        rope = model.rotary_emb(hidden_BTD, positions_BT)
        for step in self.steps:
            hidden_BTD, k, v = step(hidden_BTD, lambda layer, hidden: self._ar_layer(layer, hidden, rope, mask))
            clean.append((k, v))
        return rms_norm(model.norm, hidden_BTD), clean

    def blocks(self, inputs: tuple[Tensor, Tensor], clean: KeyValues, mask: Mask) -> Tensor:
        """The diffusion view over all blocks' (ids, positions): final hidden states [B, Q, D]."""
        model, (ids_BQ, positions_BQ) = self.model.model, inputs
        # The first layer's input needs no gradient; saying otherwise spares compiling a second graph for that layer.
        hidden_BQD = model.embed_tokens(ids_BQ).requires_grad_(torch.is_grad_enabled())
        rope = model.rotary_emb(hidden_BQD, positions_BQ)
        for step, keys_values in zip(self.steps, clean, strict=True):
            run = partial(self._block_step, rope=rope, clean=keys_values, mask=mask)
            hidden_BQD = step(hidden_BQD, run)
        return rms_norm(model.norm, hidden_BQD)

    def _block_step(
        self, layer: nn.Module, hidden_BQD: Tensor, *, rope: Rope, clean: tuple[Tensor, Tensor], mask: Any
    ) -> Tensor:
        return self._block_layer(layer, hidden_BQD, rope, clean, mask)


def clean_mask(document_BT: Tensor) -> Mask:
    """`masks.document_mask` in the form that this device's attention reads."""
    return document_intervals(document_BT) if HAS_KERNELS and document_BT.is_cuda else document_mask(document_BT)


def block_mask(blocks: Blocks, anchors_BA: Tensor, *, num_clean: int, document_BT: Tensor | None = None) -> Mask:
    """`masks.block_training_mask` in the form that this device's attention reads."""
    if HAS_KERNELS and anchors_BA.is_cuda:
        return block_training_intervals(anchors_BA, blocks.block_Q, blocks.offset_Q, document_BT)
    return block_training_mask(anchors_BA, blocks.block_Q, num_clean, document_BT)
