"""Head and argmax in one: the id that `linear` and an argmax of its logits give, without the logits."""

import pytest
import torch
from torch import Tensor

from orthrus.engine import reference
from orthrus.engine.quantise import quantise_rows
from tests.engine.interpreter import DEVICE, gpu_arithmetic  # noqa: F401
from tests.engine.products import NUM_ROWS, PLACES, SHAPES, cut, draw, launched, weight_of, with_tma

pytest.importorskip("triton")
from orthrus.engine.kernels import head  # noqa: E402
from orthrus.engine.kernels import tiles as cuts  # noqa: E402
from orthrus.engine.kernels.head import head_argmax  # noqa: E402
from orthrus.engine.kernels.linear import linear  # noqa: E402
from orthrus.engine.kernels.tiles import Execution, Tiles  # noqa: E402

FP8 = pytest.mark.parametrize("is_fp8", [False, True], ids=["same", "fp8"])


@FP8
@pytest.mark.parametrize("shape", SHAPES)
def test_id_is_its_twins(shape: str, is_fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp8, whose sums a GPU rounds, of logits that lie apart: each row of x is one of the weight's, larger."""
    vocab_size, width = cut(monkeypatch, shape)
    weight, scale = weight_of(vocab_size, width, torch.float32, is_fp8)
    for num_rows in (1, 18):
        x = draw(num_rows, width)
        if scale is not None:
            x += (weight.float() * scale[:, None])[-num_rows:].flip(0) * 20
        expected = reference.head_argmax(x, weight, scale_V=scale)
        assert head_argmax(x, weight, scale_V=scale).tolist() == expected.tolist()


def test_scales_of_the_vocabulary_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantised numbers of all ids are the same: only scales say which logit is largest, or, negative, smallest."""
    vocab_size, width = cut(monkeypatch, "split")
    sizes = torch.ones(vocab_size, device=DEVICE)
    sizes[[3, 70]] = torch.tensor([1.5, 0.5], device=DEVICE)
    weight, scale = quantise_rows(torch.linspace(1, 2, width, device=DEVICE) * sizes[:, None])
    x = torch.tensor([[1.0], [-1.0]], device=DEVICE).expand(2, width).contiguous()
    assert head_argmax(x, weight, scale_V=scale).tolist() == [3, 70]


@FP8
@pytest.mark.parametrize("shape", SHAPES)
def test_id_is_the_lowest_of_the_largest_logits_that_linear_gives(
    shape: str, is_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few distinct numbers make ties, within tiles of the vocabulary and between them; rounding to bf16 makes more."""
    vocab_size, width = cut(monkeypatch, shape)
    x = torch.randint(-1, 2, (60, width)).to(DEVICE, torch.bfloat16)
    weight, scale = torch.randint(-1, 2, (vocab_size, width)).to(DEVICE, torch.bfloat16) + 8, None
    if is_fp8:
        weight, scale = quantise_rows(weight)
    logits = linear(x, weight, scale_E=scale)
    is_best = logits == logits.max(dim=1, keepdim=True).values
    assert (is_best.sum(1) > 1).any()
    assert head_argmax(x, weight, scale_V=scale).tolist() == is_best.int().argmax(dim=1).tolist()


def test_logits_that_round_to_the_same_are_equal() -> None:
    """256 and 256.5 are one number in bf16, so the lower id has it, as in an argmax of stored logits."""
    weight = torch.zeros(140, 2, device=DEVICE, dtype=torch.bfloat16)
    weight[3], weight[90] = torch.tensor([256, 0]), torch.tensor([256, 0.5])
    assert head_argmax(torch.ones(1, 2, device=DEVICE, dtype=torch.bfloat16), weight).tolist() == [3]
    assert head_argmax(torch.ones(1, 2, device=DEVICE), weight.float()).tolist() == [90]


def test_fetched_tiles_change_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logits below 0, which is what is fetched beyond the vocabulary, with ties."""
    vocab_size, width = 74, 72
    x = draw(NUM_ROWS, width).abs().to(torch.bfloat16)
    weight = (-draw(1, width).abs() + draw(vocab_size, width) * 1e-2).to(torch.bfloat16)
    key = (vocab_size, width, weight.element_size())
    monkeypatch.setitem(cuts.TILES, key, Tiles(64, 32, 1, 4, 3))
    monkeypatch.setitem(cuts.BY_ROWS, key, {256: Execution(64, 4, 3, by_tma=True)})
    of_kernels = launched(monkeypatch, head, "tile")
    with_tma(monkeypatch, False)
    expected = head_argmax(x, weight)
    assert len(expected.unique()) > 1
    with_tma(monkeypatch, True)
    assert head_argmax(x, weight).tolist() == expected.tolist()
    assert of_kernels == ["tile_largest", "tile_largest_by_tma"]


def test_id_of_a_row_depends_on_nothing_but_that_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits of a row lie within a few units of the last place, so other bits would be another id."""
    vocab_size, width = cut(monkeypatch, "split")
    x, weight = draw(NUM_ROWS, width), draw(1, width) + draw(vocab_size, width) * 1e-7
    check_company(x, weight, None)


def test_id_of_a_row_depends_on_nothing_but_that_row_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a row are one sum in as many orders as there are ids: they differ by rounding alone."""
    vocab_size, width = cut(monkeypatch, "split")
    numbers = torch.logspace(-4, 0, width)
    weight, scale = quantise_rows(torch.stack([numbers[torch.randperm(width)] for _ in range(vocab_size)]).to(DEVICE))
    x = draw(NUM_ROWS, 1).expand(-1, width).contiguous()
    logits = linear(x, weight, scale_E=scale)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), rtol=1e-3, atol=0)
    check_company(x, weight, scale)


def check_company(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """A row chooses the same id in any company, and rows do not all choose the same."""
    everyone = head_argmax(x, weight, scale_V=scale)
    assert len(everyone.unique()) > 1
    for company, rows in PLACES.items():
        theirs = head_argmax(x[rows], weight, scale_V=scale)
        assert torch.equal(theirs, everyone[rows]), f"rows {company} choose other ids"


def test_a_row_of_nan_has_an_id_that_exists() -> None:
    """What follows looks it up in the embedding."""
    x = torch.full((1, 8), torch.nan, device=DEVICE)
    assert head_argmax(x, draw(70, 8)).tolist() == [0]
    weight, scale = quantise_rows(draw(70, 8))
    assert head_argmax(x, weight, scale_V=scale).tolist() == [0]


def test_no_rows_have_no_ids() -> None:
    assert head_argmax(draw(0, 8), draw(70, 8)).shape == (0,)
