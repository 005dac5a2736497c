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

BLOCKS = Blocks.of(((8, 2), (4, 3)))
WIDTHS = [8, 8, 4, 4, 4]
OBJECTIVES = [
    Objective(),
    Objective(kind="kl", temperature=0.5, decay=5.0, focus=0.7),
    Objective(kind="ce", focus=1.0),
    Objective(kind="tv", decay=3.0),
]


def micro_batch(num_ids: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and anchors of two rows."""
    ids = torch.randint(0, num_ids, (2, 40))
    anchors = BLOCKS.sample(torch.tensor([1, 2]), torch.tensor([32, 32]), 40, torch.Generator().manual_seed(1))
    return ids, anchors


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
    ids, anchors = micro_batch()
    teacher, student = torch.randn(2, 40, 3), torch.randn(2, 28, 3)
    loss, agrees = view_loss(objective, BLOCKS, ids, anchors, teacher, student)
    total, weights, lived = 0.0, 0.0, torch.zeros(7)
    for b in range(2):
        for a, width in enumerate(WIDTHS):
            is_alive = True
            for j in range(width - 1):
                at, q = int(anchors[b, a]) + j, sum(WIDTHS[:a]) + j
                weight = 1 - objective.focus + objective.focus * is_alive
                weight *= 1.0 if objective.decay is None else math.exp(-j / objective.decay)
                total += weight * value(objective, teacher[b, at], student[b, q], int(ids[b, at + 1]))
                weights += weight
                is_alive = is_alive and bool(teacher[b, at].argmax() == student[b, q].argmax())
                lived[j] += (is_alive and width == 8) / 4
    assert float(loss) == pytest.approx(total / weights, rel=1e-5)
    torch.testing.assert_close(survival(BLOCKS, agrees), lived)


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
    ids, anchors = micro_batch(11)
    head, teacher = torch.randn(11, 6), torch.randn(2, 40, 6)
    slow, fast = (torch.randn(2, 28, 6, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    expected, agreed = view_loss(objective, BLOCKS, ids, anchors, teacher @ head.T, slow @ head.T)
    (expected * 3).backward()
    loss, agrees = chunked_view_loss(
        objective, BLOCKS, ids, anchors, teacher, fast, head, max_elements=max_elements
    )  # fmt: skip
    (loss * 3).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(fast.grad, slow.grad)
    assert torch.equal(agrees, agreed)


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
