"""A micro-batch as a module: fp32 weights, the base's arithmetic, and which rows and anchors come when."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.config import OrthrusConfig
from orthrus.model.modeling import OrthrusLM
from orthrus.training import view_trainer
from orthrus.training.rows import Rows
from orthrus.training.task import ViewTraining, draw_seed
from orthrus.training.trainer import ViewTask
from orthrus.training.view_recipe import TrainSettings, ViewSettings
from orthrus.training.view_trainer import RowOrder, num_steps_of

SETTINGS = ViewSettings(blocks=((8, 3), (4, 2)))


def new_model(config: OrthrusConfig) -> OrthrusLM:
    torch.manual_seed(0)
    return OrthrusLM(config).to(torch.bfloat16)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    return ids, torch.zeros_like(ids), torch.ones_like(ids)


def test_only_the_view_gets_gradients_and_in_fp32(tiny_config: OrthrusConfig) -> None:
    training = ViewTraining(new_model(tiny_config), SETTINGS, isolated=False)
    training(*batch(), seeds=[5, 6])[0].backward()
    view = training.lm.view_parameters()
    for name, parameter in training.lm.named_parameters():
        assert (parameter.grad is not None) == (name in view), name
        assert parameter.dtype == (torch.float32 if name in view else torch.bfloat16), name
    assert len(list(training.parameters())) == len(list(training.lm.parameters())), "a parameter is missing or twice"


def test_what_is_computed_is_what_the_saved_view_computes(tiny_config: OrthrusConfig) -> None:
    """The loss of fp32 weights is bit for bit that of the same weights cast to bf16, which is what decoding reads."""
    plain, (ids, document, reply) = new_model(tiny_config), batch()
    rows = Rows(ids, document, reply, isolated=False)
    training = ViewTraining(new_model(tiny_config), SETTINGS, isolated=False)
    expected, _ = ViewTask(plain, SETTINGS)(rows, training.anchors(rows, [5, 6]))
    assert torch.equal(training(ids, document, reply, seeds=[5, 6])[0], expected)
    with torch.no_grad():
        for parameter in training.lm.view_parameters().values():
            parameter += parameter * 2**-12  # less than bf16 can tell apart
    assert torch.equal(training(ids, document, reply, seeds=[5, 6])[0], expected)


def test_steps_too_small_for_bf16_add_up(tiny_config: OrthrusConfig) -> None:
    training = ViewTraining(new_model(tiny_config), SETTINGS, isolated=False)
    parameter: Any = training.lm.view_parameters()["model.layers.0.self_attn.q_norm_diff.weight"]
    assert float(parameter.detach()[0]) == 1
    optimiser = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimiser.step()
    assert abs(float(parameter.detach()[0]) - 0.99) < 1e-4


def test_checkpointing_changes_no_gradient(tiny_config: OrthrusConfig) -> None:
    gradients = []
    for checkpointed in (False, True):
        training = ViewTraining(new_model(tiny_config), SETTINGS, isolated=False, gradient_checkpointing=checkpointed)
        training(*batch(), seeds=[5, 6])[0].backward()
        gradients.append([parameter.grad for parameter in training.lm.view_parameters().values()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_anchors_are_a_function_of_the_place_in_the_run(tiny_config: OrthrusConfig) -> None:
    places = [(step, row) for step in range(3) for row in range(5)]
    seeds = [draw_seed(7, step=step, row=row) for step, row in places]
    assert len(set(seeds)) == len(places) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [draw_seed(7, step=step, row=row) for step, row in places]
    assert draw_seed(8, step=0, row=0) != seeds[0]
    training, rows = ViewTraining(new_model(tiny_config), SETTINGS, isolated=False), Rows(*batch(), isolated=False)
    together = training.anchors(rows, [5, 6])
    alone = [training.anchors(Rows(*(x[b : b + 1] for x in batch()), isolated=False), [5 + b]) for b in range(2)]
    assert torch.equal(together, torch.cat(alone)), "a row's anchors must not depend on its micro-batch"


def order_of(ranks: int, monkeypatch: pytest.MonkeyPatch, num_rows: int = 26) -> list[list[list[int]]]:
    """Each rank's micro-batches of two and a half epochs of steps of 8 rows."""
    settings, found = TrainSettings(num_steps=8, rows_per_step=8, rows_per_pass=2), []
    monkeypatch.setattr(view_trainer, "num_ranks", lambda: ranks)
    for number in range(ranks):
        monkeypatch.setattr(view_trainer, "rank", lambda number=number: number)
        order = RowOrder(num_rows, settings, seed=1, num_steps=8)
        found.append(list(order))
        assert len(order) == len(found[-1])
    return found


def test_every_epoch_has_each_row_at_most_once_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = order_of(1, monkeypatch)
    flat = [row for micro_batch in alone for row in micro_batch]
    first, second = flat[:24], flat[24:48]
    assert len(set(first)) == len(set(second)) == 24 and first != second
    assert set(flat) == set(range(26)), "the rows that fill no step are others in each epoch"


def test_ranks_share_the_rows_that_one_rank_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,), pair = order_of(1, monkeypatch), order_of(2, monkeypatch)
    together = [micro_batch for both in zip(*pair, strict=True) for micro_batch in both]
    assert together == alone


def test_epochs_are_counted_in_whole_steps() -> None:
    assert num_steps_of(TrainSettings(num_epochs=2), 471_952) == 7_374  # as published
    assert num_steps_of(TrainSettings(num_epochs=0.5, rows_per_step=4), 41) == 5
    with pytest.raises(ValueError, match="fewer than the 128 of one step"):
        RowOrder(100, TrainSettings(num_steps=1), seed=0, num_steps=1)
