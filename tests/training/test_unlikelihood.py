"""Unlearning loops: which tokens are judged, and that a model that only knows a loop is taken out of it."""

import math

import numpy as np
import pytest
import torch

from orthrus.config import OrthrusConfig
from orthrus.model.modeling import OrthrusLM
from orthrus.training.forward import Passes
from orthrus.training.recipe import BaseStage, RolloutStage, UnlikelihoodStage
from orthrus.training.trainer import Log, Saver, train_base
from orthrus.training.unlikelihood import digit_kinds, judge, train_unlikelihood, unlikelihood_loss


def test_sampled_text_before_a_loop_is_good_and_repeats_inside_it_are_bad() -> None:
    fresh, circle = list(range(100, 130)), [1, 2, 3, 4, 5]
    looping = [*fresh, *circle * 20]
    ids = torch.tensor([looping, looping, list(range(130))])
    good, bad = judge(ids, torch.tensor([10, 10, 10]), torch.tensor([True, False, True]))
    start = int(good[0].nonzero().max()) + 1
    assert good[0].tolist() == [10 <= t < start for t in range(130)] and start <= 40
    assert not good[1].any(), "greedy text is no example: it is what loops"
    assert good[2].tolist() == [t >= 10 for t in range(130)] and not bad[2].any()
    # The first turn is at 30 .. 34, so the first repeated run of four ends at 38.
    assert bad[0].tolist() == [t >= max(38, start + 4) for t in range(130)]
    assert torch.equal(bad[0], bad[1])


def test_counting_up_is_a_loop_when_digits_are_alike() -> None:
    texts = ["7", "y", " =", "x", "\n", *map(str, range(10)), "٣", "a1", ""]
    kinds = digit_kinds(texts)
    assert kinds.tolist() == [0, 1, 2, 3, 4, *[0] * 11, 16, 17]
    lines = [[1, 5 + i % 10, 2, 3, 5 + i // 10 % 10, 5 + i % 7, 4] for i in range(40)]
    ids = torch.tensor([sum(lines, [])])
    start, sampled = torch.tensor([0]), torch.tensor([True])
    assert not judge(ids, start, sampled)[1].any()
    good, bad = judge(kinds[ids], start, sampled)
    assert bad.float().mean() > 0.7 and not good[0, 60:].any()


def test_loss_equals_the_formula() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]])
    ids = torch.tensor([[1, 0, 0]])
    good, bad = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    likely, bad_p = -math.log(math.e / (1 + math.e)), math.exp(2) / (1 + math.exp(2))
    loss = unlikelihood_loss(logits, ids, good, bad, 0.5)
    assert math.isclose(float(loss), likely - 0.5 * math.log(1 - bad_p), rel_tol=1e-5)


def test_a_base_that_only_loops_unlearns_its_loop(tiny_config: OrthrusConfig, tmp_path) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    model = OrthrusLM(tiny_config)
    circles = np.tile(np.arange(5, 11, dtype=np.uint16), 400)
    log = Log(stage="test", path=tmp_path / "log.jsonl")
    base = BaseStage(row_tokens=32, rows_per_step=8, rows_per_pass=8, num_steps=60, warmup_steps=5, learning_rate=0.02)
    train_base(model, circles, base, seed=0, log=log, saver=Saver(save=lambda: None))
    ids = torch.from_numpy(circles[:80].astype(np.int64))[None]

    @torch.no_grad()
    def loop_share() -> float:
        """Share of the circle's tokens that greedy decoding would write."""
        choices = model.logits(Passes(model, compiled=False).ar(ids)[0])[0, 8:-1].argmax(-1)
        return float((choices == ids[0, 9:]).float().mean())

    assert loop_share() == 1.0, "the model was made to loop"
    random = np.random.default_rng(0).integers(0, 90, 4000).astype(np.uint16)
    stage = UnlikelihoodStage(
        num_rounds=2, steps_per_round=10, learning_rate=0.01,
        rows_per_step=16, own_rows_per_pass=8, corpus_rows_per_pass=8,
        rollouts=RolloutStage(
            prompt_tokens=(8,), row_tokens=80, rows_per_batch=80, num_batches=1, sampled_share=0.25, temperature=1.0
        ),
    )  # fmt: skip
    looping = train_unlikelihood(model, random, circles, stage, seed=0, log=log)["looping_share_of_greedy_rows"]
    assert looping[0] == 1.0 and len(looping) == 2
    assert loop_share() < 0.2


def test_too_few_rollouts_for_a_round_are_refused_before_any_is_written(tiny_config: OrthrusConfig, tmp_path) -> None:  # noqa: ANN001
    stage = UnlikelihoodStage(
        num_rounds=1, steps_per_round=3, rows_per_step=4, own_rows_per_pass=2, corpus_rows_per_pass=2,
        rollouts=RolloutStage(prompt_tokens=(4,), row_tokens=80, rows_per_batch=5, num_batches=1),
    )  # fmt: skip
    tokens = np.zeros(400, dtype=np.uint16)
    log = Log(stage="test", path=tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="take 6 rows of each rank, rows_per_batch x num_batches are 5"):
        train_unlikelihood(OrthrusLM(tiny_config), tokens, tokens, stage, seed=0, log=log)
