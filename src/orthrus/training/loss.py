"""What the view is trained to do: forward KL from the frozen AR view, row by row (method.md section 5, paper eq. 7).

Row j of a block with anchor a predicts position a+j+1, as AR row a+j does: the student's row j is compared with the
teacher's row a+j, for j = 0 .. K-2. The last row of a block predicts nothing.

    B = rows, T = clean tokens, A = anchors, K = block size, V = vocabulary
"""

import torch
from torch import Tensor


def forward_kl(teacher_V: Tensor, student_V: Tensor) -> Tensor:
    """KL(teacher || student) over the last dimension, from logits, in fp32. [...]."""
    teacher_log = teacher_V.float().log_softmax(dim=-1)
    student_log = student_V.float().log_softmax(dim=-1)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(dim=-1)


def position_weights(block_size: int, decay: float | None, device: torch.device) -> Tensor:
    """weight[j] for rows j = 0 .. K-2, mean 1: uniform as published, or exp(-j / decay). [K-1].

    With acceptance a at each position, E[A] = sum_j a^j: an error at position j costs about a^j of the drafts behind,
    so early rows deserve more. a = 0.85 is a decay of 6.
    """
    rows = torch.arange(block_size - 1, device=device, dtype=torch.float32)
    weights = torch.ones_like(rows) if decay is None else torch.exp(-rows / decay)
    return weights / weights.mean()


def teacher_rows(anchors_BA: Tensor, block_size: int) -> Tensor:
    """row[b, a, j] = anchors[b, a] + j, the AR row that student row j of that block is compared with. [B, A, K-1]."""
    return anchors_BA[:, :, None] + torch.arange(block_size - 1, device=anchors_BA.device)


def view_loss(
    teacher_BTV: Tensor, student_BAKV: Tensor, anchors_BA: Tensor, weights_J: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean KL over all supervised rows, and survival[j]: the share of blocks whose rows 0 .. j all have the
    teacher's argmax. (), [K-1].

    On rows that the base wrote greedily, 1 + survival.sum() is N of greedy decoding from a random anchor.
    """
    num_rows, num_anchors, block_size, _ = student_BAKV.shape
    rows_BAJ = teacher_rows(anchors_BA, block_size)
    batch_B11 = torch.arange(num_rows, device=anchors_BA.device)[:, None, None]
    teacher_BAJV = teacher_BTV[batch_B11, rows_BAJ]
    student_BAJV = student_BAKV[:, :, :-1]
    loss = (forward_kl(teacher_BAJV, student_BAJV) * weights_J).mean()
    agree_BAJ = teacher_BTV.argmax(-1)[batch_B11, rows_BAJ] == student_BAJV.argmax(-1)
    return loss, agree_BAJ.float().cumprod(dim=-1).mean(dim=(0, 1))
