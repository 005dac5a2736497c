"""What the view is trained to do: forward KL from the frozen AR view (method.md section 5, paper eq. 7).

Offset j of a block with anchor a predicts position a+j+1, as AR row a+j does: the student there is compared with the
teacher's row a+j, for j = 0 .. K-2. The last position of a block predicts nothing.

    B = rows, T = clean tokens, A = anchors, K = width of a block, Q = positions of all blocks of a row, V = vocabulary
"""

import torch
from torch import Tensor

from orthrus.training.anchors import Blocks


def forward_kl(teacher_V: Tensor, student_V: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher at this temperature || student) over the last dimension, from logits, in fp32. [...].

    Below 1 the teacher is sharpened towards its argmax, which is all that greedy acceptance asks for.
    """
    teacher_log = (teacher_V.float() / temperature).log_softmax(dim=-1)
    student_log = student_V.float().log_softmax(dim=-1)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(dim=-1)


def alive(blocks: Blocks, agrees_BQ: Tensor) -> Tensor:
    """1 where all positions of the block before q agree with the teacher, else 0: whether q's draft matters. [B, Q]."""
    parts = []
    for agrees_BAK in blocks.split(agrees_BQ.float()):
        before_BAK = torch.cat([torch.ones_like(agrees_BAK[..., :1]), agrees_BAK[..., :-1]], dim=-1)
        parts.append(before_BAK.cumprod(dim=-1).flatten(1))
    return torch.cat(parts, dim=1)


def position_weights(blocks: Blocks, alive_BQ: Tensor, *, decay: float | None, focus: float) -> Tensor:
    """weight[b, q] = exp(-offset / decay) * (1 - focus + focus * alive[b, q]), 0 at last positions. [B, Q].

    `decay` None and `focus` 0 are the published uniform loss. A draft behind the first wrong one is never kept, so
    `focus` (0 .. 1) is the share of the loss that looks at drafts up to the first error only.
    """
    weights_BQ = 1.0 - focus + focus * alive_BQ
    if decay is not None:
        weights_BQ = weights_BQ * torch.exp(-blocks.offset_Q / decay)
    return weights_BQ * ~blocks.is_last_Q


def view_loss(
    blocks: Blocks,
    teacher_BTV: Tensor,
    student_BQV: Tensor,
    anchors_BA: Tensor,
    *,
    decay: float | None,
    focus: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Weighted mean KL over all positions, and which positions have the teacher's argmax. (), [B, Q]."""
    rows_BQ = blocks.positions(anchors_BA)
    batch_B1 = torch.arange(len(rows_BQ), device=rows_BQ.device)[:, None]
    agrees_BQ = teacher_BTV.argmax(-1)[batch_B1, rows_BQ] == student_BQV.argmax(-1)
    weights_BQ = position_weights(blocks, alive(blocks, agrees_BQ), decay=decay, focus=focus)
    kl_BQ = forward_kl(teacher_BTV[batch_B1, rows_BQ], student_BQV, temperature)
    return (kl_BQ * weights_BQ).sum() / weights_BQ.sum(), agrees_BQ


def survival(blocks: Blocks, agrees_BQ: Tensor) -> Tensor:
    """survival[j]: share of the widest blocks whose offsets 0 .. j all have the teacher's argmax. [K-1].

    On rows that the base wrote greedily, 1 + survival.sum() is N of greedy decoding from a random anchor.
    """
    widest = max(range(len(blocks.groups)), key=lambda group: blocks.groups[group][0])
    agrees_BAK = blocks.split(agrees_BQ)[widest]
    return agrees_BAK[..., :-1].float().cumprod(dim=-1).mean(dim=(0, 1))
