"""Documents packed into one row are strangers: each gets what it gets alone in a row, from both passes and the loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orthrus.config import OrthrusConfig
from orthrus.model import masks
from orthrus.model.modeling import OrthrusLM
from orthrus.training import forward
from orthrus.training.anchors import Blocks
from orthrus.training.forward import Passes, block_mask
from orthrus.training.loss import Objective, position_weights, view_loss
from orthrus.training.recipe import ViewStage
from orthrus.training.rows import PADDING, Rows
from orthrus.training.trainer import ViewTask

BLOCKS = Blocks.of(((8, 12), (4, 12)))
LENGTHS = [[11, 17, 5, 9], [30, 12]]  # of the documents in each row; the second row ends in padding
NUM_TOKENS = 44


@pytest.fixture
def model(tiny_config: OrthrusConfig) -> OrthrusLM:
    """A random model in fp32 whose view differs from its AR projections."""
    return OrthrusLM(tiny_config).eval()


def packed(lengths: list[list[int]] = LENGTHS) -> Rows:
    """Rows of documents of random tokens; in each, a question of two tokens and a reply up to its last but one."""
    ids = torch.randint(0, 96, (len(lengths), NUM_TOKENS))
    document, reply = torch.full_like(ids, PADDING), torch.zeros_like(ids)
    for b, row in enumerate(lengths):
        start = 0
        for number, length in enumerate(row):
            document[b, start : start + length] = number
            reply[b, start + 2 : start + length - 1] = number + 1
            start += length
    return Rows(ids, document, reply)


def documents(rows: Rows) -> list[tuple[int, int, int, Rows]]:
    """(row, start, end, the document alone in a row)."""
    found = []
    for b in range(len(rows)):
        for number in range(int(rows.document_BT[b].max()) + 1):
            places = (rows.document_BT[b] == number).nonzero()[:, 0]
            start, end = int(places[0]), int(places[-1]) + 1
            ids = rows.ids_BT[b : b + 1, start:end]
            alone = Rows(ids, torch.zeros_like(ids), (rows.reply_BT[b : b + 1, start:end] > 0).long(), isolated=False)
            found.append((b, start, end, alone))
    return found


def run(model: OrthrusLM, rows: Rows, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of both passes: the AR view's [B, T, V] and the blocks' [B, Q, V]."""
    passes, document = Passes(model, compiled=False), rows.document_BT if rows.isolated else None
    hidden, clean = passes.ar(rows.ids_BT, rows.positions_BT, document)
    mask = block_mask(BLOCKS, anchors, num_clean=rows.ids_BT.shape[1], document_BT=document)
    return model.logits(hidden), model.logits(passes.blocks(BLOCKS.inputs(rows, anchors, 96), clean, mask))


def anchors_inside(rows: Rows) -> Tensor:
    return BLOCKS.sample(rows.anchorable_BT, torch.Generator().manual_seed(3))


def check_isolation(model: OrthrusLM) -> None:
    """Every document's logits, and its blocks', are those of the document alone in a row."""
    rows = packed()
    anchors = anchors_inside(rows)
    teacher, student = run(model, rows, anchors)
    for b, start, end, alone in documents(rows):
        mine = (anchors[b] >= start) & (anchors[b] < end)
        assert mine.any(), "no block to compare"
        # Blocks of other documents get some anchor of this one; their logits are not looked at.
        own_anchors = torch.where(mine, anchors[b] - start, 2)[None]
        teacher_alone, student_alone = run(model, alone, own_anchors)
        torch.testing.assert_close(teacher[b, start:end], teacher_alone[0], msg=f"row {b}: the AR pass leaks")
        of_mine = mine[BLOCKS.block_Q]
        torch.testing.assert_close(student[b, of_mine], student_alone[0, of_mine], msg=f"row {b}: the blocks leak")


@torch.no_grad()
def test_packed_documents_have_the_logits_of_documents_alone(model: OrthrusLM) -> None:
    check_isolation(model)


def leak_into_ar(document_BT: Tensor) -> Tensor:
    return (
        torch.ones(document_BT.shape[1], document_BT.shape[1], dtype=torch.bool).tril().expand(len(document_BT), -1, -1)
    )


def leak_into_blocks(anchors: Tensor, block: Tensor, num_clean: int, document: Tensor | None = None) -> Tensor:
    return masks.block_training_mask(anchors, block, num_clean)


@pytest.mark.parametrize(
    ("name", "leak", "message"),
    [("document_mask", leak_into_ar, "AR pass"), ("block_training_mask", leak_into_blocks, "blocks")],
)
@torch.no_grad()
def test_a_mask_that_leaks_is_seen(
    model: OrthrusLM, monkeypatch: pytest.MonkeyPatch, name: str, leak: Callable, message: str
) -> None:
    monkeypatch.setattr(forward, name, leak)
    with pytest.raises(AssertionError, match=message):
        check_isolation(model)


@torch.no_grad()
def test_positions_through_the_row_are_seen(model: OrthrusLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean tokens' right ones hide nothing: a block must count from where its document does."""
    monkeypatch.setattr(Blocks, "inputs", lambda blocks, rows, anchors, mask: (
        torch.where(blocks.offset_Q == 0, rows.ids_BT.gather(1, anchors)[:, blocks.block_Q], mask),
        blocks.places(anchors),
    ))  # fmt: skip
    with pytest.raises(AssertionError, match="blocks"):
        check_isolation(model)


@pytest.mark.parametrize("objective", [Objective(), Objective(kind="ce"), Objective(kind="tv", decay=4.0, focus=0.5)])
@torch.no_grad()
def test_the_loss_of_a_packed_row_is_the_mean_of_its_documents_losses(model: OrthrusLM, objective: Objective) -> None:
    """Weighted by their supervised weight; through both forms of the loss."""
    rows = packed()
    anchors = anchors_inside(rows)
    teacher, student = run(model, rows, anchors)
    together, agrees = view_loss(objective, BLOCKS, rows, anchors, teacher, student)
    total, weight = 0.0, 0.0
    for b, start, end, alone in documents(rows):
        mine = (anchors[b] >= start) & (anchors[b] < end)
        # Other documents' blocks are put where nothing is supervised: on the last token, which is of no reply.
        own_anchors = torch.where(mine, anchors[b] - start, end - start - 1)[None]
        teacher_alone, student_alone = run(model, alone, own_anchors)
        loss, agrees_alone = view_loss(objective, BLOCKS, alone, own_anchors, teacher_alone, student_alone)
        supervised = BLOCKS.supervised(alone.reply_BT, own_anchors)
        share = position_weights(objective, BLOCKS, supervised, agrees_alone).sum()
        total, weight = total + loss * share, weight + share
        assert torch.equal(agrees[b, supervised[0]], agrees_alone[0, supervised[0]])
    torch.testing.assert_close(together, total / weight)
    task = ViewTask(model, ViewStage(blocks=BLOCKS.groups, objective=objective))
    torch.testing.assert_close(task(rows, anchors)[0], together)


def test_gradients_of_a_packed_row_are_the_documents_gradients(model: OrthrusLM) -> None:
    """One row of documents against the same documents as rows of one batch, each padded."""
    one = packed([[11, 17, 5, 9]])
    document = one.document_BT[0]
    several = [torch.zeros(4, 17, dtype=torch.long) for _ in range(3)]
    several[1] -= 1
    anchors, rows_of, blocks = anchors_inside(one), [], Blocks.of(((8, 12), (4, 12)))
    for b, start, end, alone in documents(one):
        number = int(document[start])
        for target, source in zip(several, (alone.ids_BT, alone.document_BT, alone.reply_BT), strict=True):
            target[number, : end - start] = source[0]
        inside = (anchors[b] >= start) & (anchors[b] < end)
        rows_of.append(torch.where(inside, anchors[b] - start, end - start - 1))
    stage = ViewStage(blocks=blocks.groups)
    gradients = []
    for rows, where in ((one, anchors), (Rows(several[0], several[1], several[2]), torch.stack(rows_of))):
        model.zero_grad()
        loss, _ = ViewTask(model, stage)(rows, where)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.view_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-4, atol=1e-7)


def test_padding_gives_no_nan_and_takes_no_part(model: OrthrusLM) -> None:
    rows = packed()
    anchors, stage = anchors_inside(rows), ViewStage(blocks=BLOCKS.groups)
    loss, survived = ViewTask(model, stage)(rows, anchors)
    loss.backward()
    assert loss.isfinite() and survived.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.view_parameters().values())
    other = Rows(torch.where(rows.document_BT == PADDING, 7, rows.ids_BT), rows.document_BT, rows.reply_BT)
    assert torch.equal(ViewTask(model, stage)(other, anchors)[0], loss), "what padding holds must not matter"


@torch.no_grad()
def test_rows_of_one_document_are_the_fast_causal_pass(model: OrthrusLM) -> None:
    """With a mask or without, `isolated` or not: the same loss; the fast path is a promise, not another question."""
    rows = packed([[44], [37]])
    anchors, stage = anchors_inside(rows), ViewStage(blocks=BLOCKS.groups)
    plain = Rows(rows.ids_BT, rows.document_BT, rows.reply_BT, isolated=False)
    slow, fast = (ViewTask(model, stage)(r, anchors)[0] for r in (rows, plain))
    torch.testing.assert_close(slow, fast)
