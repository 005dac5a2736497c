"""Head and argmax in one: the id that `linear` and an argmax of its logits give, without the logits."""

import pytest
import torch

from orthrus.engine import reference
from tests.engine.interpreter import DEVICE, gpu_arithmetic  # noqa: F401
from tests.engine.products import NUM_ROWS, PLACES, SHAPES, cut, draw

pytest.importorskip("triton")
from orthrus.engine.kernels.head import head_argmax  # noqa: E402
from orthrus.engine.kernels.linear import linear  # noqa: E402


@pytest.mark.parametrize("shape", SHAPES)
def test_id_is_its_twins(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size, width = cut(monkeypatch, shape)
    weight = draw(vocab_size, width)
    for num_rows in (1, 18):
        x = draw(num_rows, width)
        assert head_argmax(x, weight).tolist() == reference.head_argmax(x, weight).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_id_is_the_lowest_of_the_largest_logits_that_linear_gives(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few distinct numbers make ties, within tiles of the vocabulary and between them; rounding to bf16 makes more."""
    vocab_size, width = cut(monkeypatch, shape)
    x = torch.randint(-1, 2, (60, width)).to(DEVICE, torch.bfloat16)
    weight = torch.randint(-1, 2, (vocab_size, width)).to(DEVICE, torch.bfloat16) + 8
    logits = linear(x, weight)
    is_best = logits == logits.max(dim=1, keepdim=True).values
    assert (is_best.sum(1) > 1).any()
    assert head_argmax(x, weight).tolist() == is_best.int().argmax(dim=1).tolist()


def test_logits_that_round_to_the_same_are_equal() -> None:
    """256 and 256.5 are one number in bf16, so the lower id has it, as in an argmax of stored logits."""
    weight = torch.zeros(140, 2, device=DEVICE, dtype=torch.bfloat16)
    weight[3], weight[90] = torch.tensor([256, 0]), torch.tensor([256, 0.5])
    assert head_argmax(torch.ones(1, 2, device=DEVICE, dtype=torch.bfloat16), weight).tolist() == [3]
    assert head_argmax(torch.ones(1, 2, device=DEVICE), weight.float()).tolist() == [90]


@pytest.mark.parametrize("shape", ["split"])
def test_id_of_a_row_depends_on_nothing_but_that_row(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits of a row lie within a few units of the last place, so other bits would be another id."""
    vocab_size, width = cut(monkeypatch, shape)
    x, weight = draw(NUM_ROWS, width), draw(1, width) + draw(vocab_size, width) * 1e-7
    everyone = head_argmax(x, weight)
    for company, rows in PLACES.items():
        assert torch.equal(head_argmax(x[rows], weight), everyone[rows]), f"rows {company} choose other ids"


def test_a_row_of_nan_has_an_id_that_exists() -> None:
    """What follows looks it up in the embedding."""
    x = torch.full((1, 8), torch.nan, device=DEVICE)
    assert head_argmax(x, draw(70, 8)).tolist() == [0]


def test_no_rows_have_no_ids() -> None:
    assert head_argmax(draw(0, 8), draw(70, 8)).shape == (0,)
