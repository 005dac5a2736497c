"""What the view is trained to do: every objective against its formula, and the fast form against the slow one."""

import math

import pytest
import torch

from orthrus.training.anchors import Blocks
from orthrus.training.loss import (
    Objective,
    alive,
    chunked_view_loss,
    disagreement,
    disagreement_gradient,
    survival,
    view_loss,
)
from orthrus.training.rows import Rows

BLOCKS = Blocks.of(((8, 2), (4, 3)))
WIDTHS = [8, 8, 4, 4, 4]
OBJECTIVES = [
    Objective(),
    Objective(kind="kl", temperature=0.5, decay=5.0, focus=0.7),
    Objective(kind="ce", focus=1.0),
    Objective(kind="tv", decay=3.0),
]


REPLIES = torch.tensor([[0, *[1] * 10, *[0] * 3, *[2] * 4, *[3] * 20, 0, 0], [0] * 36 + [1] * 4])
"""Replies that touch, that end their row, that are shorter than a block."""


def micro_batch(num_ids: int = 3) -> tuple[Rows, torch.Tensor]:
    """Two rows and their anchors; many drafts lie behind their reply and have no weight."""
    ids = torch.randint(0, num_ids, (2, 40))
    rows = Rows(ids, torch.zeros_like(ids), REPLIES)
    return rows, BLOCKS.sample(rows.anchorable_BT, torch.Generator().manual_seed(1))


def value(objective: Objective, teacher: torch.Tensor, student: torch.Tensor, target: int) -> float:
    """The objective at one position, written out."""
    p, q = (teacher / objective.temperature).softmax(-1), student.softmax(-1)
    if objective.kind == "ce":
        return -float(q[target].log())
    if objective.kind == "kl":
        return float((p * (p / q).log()).sum())
    return 1.0 - float(torch.minimum(p, q).sum())  # what speculative sampling rejects


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_equals_the_sum_written_out(objective: Objective) -> None:
    rows, anchors = micro_batch()
    teacher, student = torch.randn(2, 40, 3), torch.randn(2, 28, 3)
    loss, agrees = view_loss(objective, BLOCKS, rows, anchors, teacher, student)
    total, weights, lived, counted, left_out = 0.0, 0.0, torch.zeros(7), torch.zeros(7), 0
    for b in range(2):
        for a, width in enumerate(WIDTHS):
            is_alive = True
            for j in range(width - 1):
                at, q = int(anchors[b, a]) + j, sum(WIDTHS[:a]) + j
                if at + 1 >= 40 or REPLIES[b, at + 1] != REPLIES[b, anchors[b, a]]:
                    left_out += 1
                    continue
                weight = 1 - objective.focus + objective.focus * is_alive
                weight *= 1.0 if objective.decay is None else math.exp(-j / objective.decay)
                total += weight * value(objective, teacher[b, at], student[b, q], int(rows.ids_BT[b, at + 1]))
                weights += weight
                is_alive = is_alive and bool(teacher[b, at].argmax() == student[b, q].argmax())
                lived[j] += is_alive and width == 8
                counted[j] += width == 8
    assert left_out > 10, "the test must have drafts without weight"
    assert float(loss) == pytest.approx(total / weights, rel=1e-5)
    supervised = BLOCKS.supervised(rows.reply_BT, anchors)
    torch.testing.assert_close(survival(BLOCKS, supervised, agrees), lived / counted.clamp(min=1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_in_closed_form_is_autograds(objective: Objective) -> None:
    teacher, student = torch.randn(5, 11), torch.randn(5, 11, requires_grad=True)
    target = torch.randint(0, 11, (5,))
    disagreement(objective, teacher, student, target).sum().backward()
    closed = disagreement_gradient(objective, teacher, student.detach(), target)
    torch.testing.assert_close(closed, student.grad)


@pytest.mark.parametrize("max_elements", [1, 11 * 9, 11 * 28, 11 * 60, 10**9])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_of_any_size_give_the_loss_and_the_gradient_of_all_at_once(
    objective: Objective, max_elements: int
) -> None:
    rows, anchors = micro_batch(11)
    head, teacher = torch.randn(11, 6), torch.randn(2, 40, 6)
    slow, fast = (torch.randn(2, 28, 6, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    expected, agreed = view_loss(objective, BLOCKS, rows, anchors, teacher @ head.T, slow @ head.T)
    (expected * 3).backward()
    loss, agrees = chunked_view_loss(
        objective, BLOCKS, rows, anchors, teacher, fast, head, max_elements=max_elements
    )  # fmt: skip
    (loss * 3).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(fast.grad, slow.grad)
    assert torch.equal(agrees, agreed)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_micro_batch_without_a_reply_has_no_loss_and_no_gradient(objective: Objective) -> None:
    ids = torch.randint(0, 11, (2, 40))
    rows = Rows(ids, torch.zeros_like(ids), torch.zeros_like(ids))
    anchors = BLOCKS.sample(rows.anchorable_BT, torch.Generator().manual_seed(1))
    head, teacher = torch.randn(11, 6), torch.randn(2, 40, 6)
    slow, fast = (torch.randn(2, 28, 6).requires_grad_() for _ in range(2))
    losses = [
        view_loss(objective, BLOCKS, rows, anchors, teacher @ head.T, slow @ head.T),
        chunked_view_loss(objective, BLOCKS, rows, anchors, teacher, fast, head, max_elements=100),
    ]
    for (loss, agrees), hidden in zip(losses, (slow, fast), strict=True):
        loss.backward()
        assert loss == 0 and hidden.grad is not None
        assert not hidden.grad.any(), "nothing is supervised: NaN here ends a run"
        assert not survival(BLOCKS, BLOCKS.supervised(rows.reply_BT, anchors), agrees).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_row_without_a_reply_leaves_the_loss_of_the_others(objective: Objective) -> None:
    rows, anchors = micro_batch()
    teacher, student = torch.randn(2, 40, 3), torch.randn(2, 28, 3)
    alone = view_loss(objective, BLOCKS, row(rows, 0), anchors[:1], teacher[:1], student[:1])[0]
    silent = Rows(rows.ids_BT, rows.document_BT, torch.stack([REPLIES[0], torch.zeros_like(REPLIES[0])]))
    anchors = torch.cat([anchors[:1], BLOCKS.sample(silent.anchorable_BT, torch.Generator())[1:]])
    torch.testing.assert_close(view_loss(objective, BLOCKS, silent, anchors, teacher, student)[0], alone)


def row(rows: Rows, b: int) -> Rows:
    """One of the rows."""
    return Rows(rows.ids_BT[b : b + 1], rows.document_BT[b : b + 1], rows.reply_BT[b : b + 1])


def test_chunks_are_whole_blocks_in_order() -> None:
    for size in (1, 5, 9, 16, 100):
        parts = list(BLOCKS.chunks(size))
        assert [w for part in parts for w, count in part.groups for _ in range(count)] == WIDTHS
        assert torch.cat([torch.arange(28)[part.where] for part in parts]).tolist() == list(range(28))
        assert all(len(part.block_Q) <= max(size, 8) and part.block_Q[0] == 0 for part in parts)


def test_alive_ends_behind_the_first_error_of_each_block() -> None:
    agrees = torch.ones(1, 28, dtype=torch.bool)
    agrees[0, [2, 5, 15, 16]] = False  # offsets 2 and 5 of block 0, the last of block 1, the first of block 2
    truth = [1, 1, 1, 0, 0, 0, 0, 0, *[1] * 8, 1, 0, 0, 0, *[1] * 8]
    assert alive(BLOCKS, agrees)[0].long().tolist() == truth


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"temperature": 0.0}, "temperature"), ({"decay": -1.0}, "decay"), ({"focus": 1.5}, "focus")],
)
def test_impossible_objectives_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"objective.{message}"):
        Objective(**fields)
