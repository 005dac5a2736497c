"""Before the first step: does a block in training compute what it computes in decoding?

A wrong mask or wrong positions never write wrong text, and N of a view that copies the AR view need not fall to 1, so
neither the loss nor N is certain to tell. This is: one block of a training row, computed in training's own pass among
all others, against the same block alone behind its own prefix without any mask, which is what decoding does
(method.md section 2).

    T = tokens of a row, P = tokens of a prefix, K = width of a block, Q = positions of all blocks of a row, D = hidden
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthrus.model.attention import rms_norm, run_layer
from orthrus.training.anchors import Blocks
from orthrus.training.forward import Passes
from orthrus.training.rows import Rows
from orthrus.training.trainer import ViewTask

SAME = 0.99
"""Least cosine between hidden states that are the same but for rounding: bf16 keeps them above 0.999 in the models
tried, a causal block falls to 0.91 and below."""


@torch.no_grad()
def block_alone(model: nn.Module, prefix_P: Tensor, anchor_id: Tensor, *, width: int) -> Tensor:
    """Final hidden states of a block behind its prefix, nothing masked. [K, D]."""
    lm = model.model
    _, clean = Passes(model, compiled=False).ar(prefix_P[None])
    ids_1K = torch.full((1, width), model.config.mask_token_id, device=prefix_P.device)
    ids_1K[0, 0] = anchor_id
    hidden_1KD = lm.embed_tokens(ids_1K)
    places_1K = len(prefix_P) + torch.arange(width, device=prefix_P.device)[None]
    rope = lm.rotary_emb(hidden_1KD, places_1K)
    for layer, (keys, values) in zip(lm.layers, clean, strict=True):

        def attend(
            attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] = (keys, values)
        ) -> Tensor:
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=attention.scaling)
            return mixed.transpose(1, 2).flatten(2)

        hidden_1KD = run_layer(layer, hidden_1KD, rope, attend, "diffusion")
    return rms_norm(lm.norm, hidden_1KD)[0]


@torch.no_grad()
def agreement(task: ViewTask, rows: Rows, anchors_BA: Tensor, *, most_blocks: int = 4) -> float:
    """The lowest cosine, over all positions of a few blocks, between training's hidden states and those of the block
    alone. 1 where no block has a supervised draft and a token before it."""
    blocks: Blocks = task.blocks
    with torch.enable_grad():  # the graph that training compiles anyway
        student_BQD = task.passes(rows, anchors_BA)[1].detach()
    supervised_BQ = blocks.supervised(rows.reply_BT, anchors_BA)
    lowest, num_compared = 1.0, 0
    for b, a in (anchors_BA >= 0).nonzero().tolist():
        places_K = (blocks.block_Q == a).nonzero()[:, 0]
        anchor = int(anchors_BA[b, a])
        start = anchor - int(rows.positions_BT[b, anchor])
        if start == anchor or not bool(supervised_BQ[b, places_K].any()):
            continue
        ids_T = rows.ids_BT[b]
        alone_KD = block_alone(task.model, ids_T[start:anchor], ids_T[anchor], width=len(places_K))
        cosine_K = F.cosine_similarity(alone_KD.float(), student_BQD[b, places_K].float(), dim=-1)
        lowest, num_compared = min(lowest, float(cosine_K.min())), num_compared + 1
        if num_compared == most_blocks:
            break
    return lowest
