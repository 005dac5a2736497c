"""What the view is trained to do: agree with the frozen AR view at each position (method.md section 5, paper eq. 7).

Offset j of a block with anchor a predicts position a+j+1, as AR row a+j does: the student there is compared with the
teacher's row a+j, for j = 0 .. K-2. The last position of a block predicts nothing. Only *supervised* positions count:
those whose token a+j+1 is of the anchor's own reply (`Blocks.supervised`); blocks may overhang a reply or a row.

`view_loss` is the formula; `chunked_view_loss` is the same value and gradient without ever holding all positions'
logits: the head is frozen, so a chunk's gradient with respect to its hidden states is known as soon as its logits are.

    B = rows, T = clean tokens, A = anchors, K = width of a block, Q = positions of all blocks of a row, D = hidden
    width, V = vocabulary
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from orthrus.training.anchors import Blocks
from orthrus.training.rows import Rows

CHUNK_ELEMENTS = 2**27
"""Logits (positions x vocabulary) of a chunk: half a gigabyte in fp32, of which a few copies live at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Which disagreement is minimised, and how much each position counts. The defaults are the published objective."""

    kind: Literal["kl", "ce", "tv"] = "kl"
    """kl: KL(teacher || student). ce: cross-entropy on the row's own next token. tv: total variation, one minus the
    probability that speculative sampling accepts (method.md section 1)."""
    temperature: float = 1.0
    """Of the teacher, in kl and tv. Below 1 it is sharpened towards its argmax, all that greedy acceptance asks for."""
    decay: float | None = None
    """A number d: weight exp(-j / d) for the draft at offset j. None: all offsets alike."""
    focus: float = 0.0
    """Share of a draft's weight that it has only while all drafts before it are right: those behind the first error are
    never kept (first-error-focused training is reported to gain 21 to 76 %: arXiv 2606.11552)."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"objective.temperature must be above 0, got {self.temperature}")
        if self.decay is not None and self.decay <= 0:
            raise ValueError(f"objective.decay must be above 0, or null, got {self.decay}")
        if not 0 <= self.focus <= 1:
            raise ValueError(f"objective.focus must be 0 .. 1, got {self.focus}")


# --- one position ------------------------------------------------------------------------------------------------


def disagreement(objective: Objective, teacher_V: Tensor, student_V: Tensor, target: Tensor) -> Tensor:
    """The objective's value from logits, over the last dimension, in fp32. [...]."""
    student_log = student_V.float().log_softmax(dim=-1)
    if objective.kind == "ce":
        return -student_log.gather(-1, target[..., None])[..., 0]
    teacher_log = (teacher_V.float() / objective.temperature).log_softmax(dim=-1)
    if objective.kind == "kl":
        return (teacher_log.exp() * (teacher_log - student_log)).sum(dim=-1)
    return 0.5 * (teacher_log.exp() - student_log.exp()).abs().sum(dim=-1)


def disagreement_gradient(objective: Objective, teacher_V: Tensor, student_V: Tensor, target: Tensor) -> Tensor:
    """Derivative of `disagreement` by the student's logits, in fp32. [..., V]."""
    q_V = student_V.float().softmax(dim=-1)
    if objective.kind == "ce":
        return q_V - torch.zeros_like(q_V).scatter_(-1, target[..., None], 1.0)
    p_V = (teacher_V.float() / objective.temperature).softmax(dim=-1)
    if objective.kind == "kl":
        return q_V - p_V
    slope_V = 0.5 * (q_V - p_V).sign()
    return q_V * (slope_V - (q_V * slope_V).sum(dim=-1, keepdim=True))


# --- weights of positions ----------------------------------------------------------------------------------------


def alive(blocks: Blocks, agrees_BQ: Tensor) -> Tensor:
    """Whether all positions of q's block before q agree with the teacher, so that q's draft matters. [B, Q]."""
    errors_BQ = (~agrees_BQ).long()
    before_BQ = errors_BQ.cumsum(dim=1) - errors_BQ
    starts_Q = torch.arange(agrees_BQ.shape[1], device=agrees_BQ.device) - blocks.offset_Q
    return before_BQ == before_BQ[:, starts_Q]


def position_weights(objective: Objective, blocks: Blocks, supervised_BQ: Tensor, agrees_BQ: Tensor) -> Tensor:
    """weight[b, q] = exp(-offset / decay) * (1 - focus + focus * alive[b, q]) where supervised, else 0. [B, Q]."""
    weights_BQ = 1.0 - objective.focus + objective.focus * alive(blocks, agrees_BQ)
    if objective.decay is not None:
        weights_BQ = weights_BQ * torch.exp(-blocks.offset_Q / objective.decay)
    return weights_BQ * supervised_BQ


def target_tokens(ids_BT: Tensor, places_BQ: Tensor) -> Tensor:
    """The row's own token behind each place; where there is none, some token that is never compared. [B, Q]."""
    return ids_BT.gather(1, (places_BQ + 1).clamp(max=ids_BT.shape[1] - 1))


def weighted_mean(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight, and 0 where nothing has weight: a micro-batch without a reply teaches nothing. ()."""
    return total / torch.where(weight > 0, weight, 1.0)


# --- a micro-batch -----------------------------------------------------------------------------------------------


def view_loss(
    objective: Objective, blocks: Blocks, rows: Rows, anchors_BA: Tensor, teacher_BTV: Tensor, student_BQV: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean of the objective over supervised positions, and which positions have the teacher's argmax.

    (), [B, Q]. Without any supervised position the mean is 0, and so is its gradient.
    """
    places_BQ = blocks.places(anchors_BA)
    teacher_BQV = teacher_rows(teacher_BTV, places_BQ)
    agrees_BQ = teacher_BQV.argmax(-1) == student_BQV.argmax(-1)
    weights_BQ = position_weights(objective, blocks, blocks.supervised(rows.reply_BT, anchors_BA), agrees_BQ)
    values_BQ = disagreement(objective, teacher_BQV, student_BQV, target_tokens(rows.ids_BT, places_BQ))
    return weighted_mean((values_BQ * weights_BQ).sum(), weights_BQ.sum()), agrees_BQ


def teacher_rows(teacher_BTX: Tensor, places_BQ: Tensor) -> Tensor:
    """The teacher's values at each place; at places behind the row its last, which are never compared. [B, Q, X]."""
    batch_B1 = torch.arange(len(places_BQ), device=places_BQ.device)[:, None]
    return teacher_BTX[batch_B1, places_BQ.clamp(max=teacher_BTX.shape[1] - 1)]


Chunk = tuple[Tensor, Tensor, Tensor, Tensor]
"""Sum of weighted values (), sum of weights (), agreement [B, Q], derivative by the hidden states [B, Q, D]."""


def chunk_loss(
    objective: Objective, blocks: Blocks, places_BQ: Tensor, target_BQ: Tensor, supervised_BQ: Tensor,
    teacher_BTV: Tensor, hidden_BQD: Tensor, head_VD: Tensor,
) -> Chunk:  # fmt: skip
    """One chunk of `chunked_view_loss`: whole blocks of some rows."""
    student_BQV = hidden_BQD @ head_VD.T
    # The teacher's argmax once for each clean place, not once for each block position that looks at it.
    agrees_BQ = teacher_rows(teacher_BTV.argmax(-1), places_BQ) == student_BQV.argmax(-1)
    weights_BQ = position_weights(objective, blocks, supervised_BQ, agrees_BQ)
    teacher_BQV = teacher_rows(teacher_BTV, places_BQ)
    values_BQ = disagreement(objective, teacher_BQV, student_BQV, target_BQ)
    slopes_BQV = disagreement_gradient(objective, teacher_BQV, student_BQV, target_BQ) * weights_BQ[..., None]
    return (values_BQ * weights_BQ).sum(), weights_BQ.sum(), agrees_BQ, slopes_BQV.to(head_VD.dtype) @ head_VD


class ChunkedLoss(torch.autograd.Function):
    """`view_loss` over hidden states, one chunk of logits at a time; the gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BQD: Tensor,
        objective: Objective,
        blocks: Blocks,
        rows: Rows,
        anchors_BA: Tensor,
        teacher_BTD: Tensor,
        head_VD: Tensor,
        one_chunk: Callable[..., Chunk],
        max_elements: int,
    ) -> tuple[Tensor, Tensor]:
        """Loss () and agreement [B, Q]."""
        places_BQ = blocks.places(anchors_BA)
        target_BQ = target_tokens(rows.ids_BT, places_BQ)
        supervised_BQ = blocks.supervised(rows.reply_BT, anchors_BA)
        agrees_BQ = torch.empty_like(supervised_BQ)
        slopes_BQD = torch.empty_like(hidden_BQD)
        total, weight = hidden_BQD.new_zeros((), dtype=torch.float32), hidden_BQD.new_zeros((), dtype=torch.float32)
        for some in row_chunks(len(places_BQ), places_BQ.shape[1] * len(head_VD), max_elements):
            teacher_bTV = teacher_BTD[some] @ head_VD.T
            for part in blocks.chunks(max(1, max_elements // (len(head_VD) * len(teacher_bTV)))):
                at = (some, part.where)
                value, share, agrees_BQ[at], slopes_BQD[at] = one_chunk(
                    objective, part, places_BQ[at], target_BQ[at], supervised_BQ[at], teacher_bTV, hidden_BQD[at],
                    head_VD,
                )  # fmt: skip
                total, weight = total + value, weight + share
        ctx.save_for_backward(slopes_BQD, weight)
        ctx.mark_non_differentiable(agrees_BQ)
        return weighted_mean(total, weight), agrees_BQ

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradient, scaled."""
        slopes_BQD, weight = ctx.saved_tensors
        return (slopes_BQD * weighted_mean(gradients[0], weight), *[None] * 8)


def row_chunks(num_rows: int, row_elements: int, max_elements: int) -> Iterator[slice]:
    """Slices of as many rows as fit into a chunk, at least one."""
    step = max(1, max_elements // row_elements)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def chunked_view_loss(
    objective: Objective,
    blocks: Blocks,
    rows: Rows,
    anchors_BA: Tensor,
    teacher_BTD: Tensor,
    student_BQD: Tensor,
    head_VD: Tensor,
    *,
    one_chunk: Callable[..., Chunk] = chunk_loss,
    max_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """`view_loss` from both views' hidden states and the frozen head: the same loss, agreement and gradient.

    `one_chunk` is `chunk_loss`, or that compiled. The teacher is projected once for each clean position, however many
    blocks compare themselves with it.
    """
    return ChunkedLoss.apply(
        student_BQD, objective, blocks, rows, anchors_BA, teacher_BTD, head_VD, one_chunk, max_elements
    )


def survival(blocks: Blocks, supervised_BQ: Tensor, agrees_BQ: Tensor) -> Tensor:
    """survival[j]: of the widest blocks whose offset j is supervised, the share whose offsets 0 .. j all have the
    teacher's argmax; 0 where there is no such block. [K-1].

    On rows that the base wrote greedily, 1 + survival.sum() is N of greedy decoding from a random anchor.
    """
    widest = max(range(len(blocks.groups)), key=lambda group: blocks.groups[group][0])
    agrees_BAJ, supervised_BAJ = (blocks.split(x_BQ)[widest][..., :-1] for x_BQ in (agrees_BQ, supervised_BQ))
    # Supervised offsets come first in a block, so all before a supervised one are supervised too.
    lives_BAJ = agrees_BAJ.long().cumprod(dim=-1) * supervised_BAJ
    return lives_BAJ.sum(dim=(0, 1)) / supervised_BAJ.sum(dim=(0, 1)).clamp(min=1)
