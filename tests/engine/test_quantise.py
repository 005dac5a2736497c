"""fp8 copies of weights: what they are off by."""

import pytest
import torch

from orthrus.engine import quantise
from orthrus.engine.quantise import quantise_rows


def test_error_is_within_half_a_step_of_fp8() -> None:
    """3 mantissa bits: half a step is 2^-4 of a weight, or 2^-10 of the scale below fp8's normal numbers."""
    weight = torch.randn(40, 3000) * torch.logspace(-30, 30, 40)[:, None] * torch.logspace(-5, 0, 3000)
    quantised, scale = quantise_rows(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    error = (quantised.double() * scale[:, None].double() - weight.double()).abs()
    bound = torch.maximum(weight.double().abs() * 2**-4, scale[:, None].double() * 2**-10)
    worst = (error / bound).max().item()
    assert 0.9 < worst < 1 + 1e-6, "the quotient is rounded to fp32 before it is to fp8"


def test_largest_weight_of_an_output_is_met() -> None:
    weight = torch.randn(5, 64)
    quantised, scale = quantise_rows(weight)
    assert quantised.float().abs().amax(1).tolist() == [448] * 5
    torch.testing.assert_close(448 * scale, weight.abs().amax(1))


def test_outputs_of_zeros_stay_zero() -> None:
    quantised, scale = quantise_rows(torch.zeros(2, 8, dtype=torch.bfloat16))
    assert not quantised.float().any()
    assert scale.isfinite().all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(11, 10, dtype=torch.bfloat16)
    whole = quantise_rows(weight)
    monkeypatch.setattr(quantise, "CHUNK", 30)
    for one, other in zip(quantise_rows(weight), whole, strict=True):
        assert torch.equal(one.float(), other.float())


def test_weights_that_are_not_finite_are_refused_by_output() -> None:
    weight = torch.ones(6, 4)
    weight[2, 1], weight[5, 0] = torch.inf, torch.nan
    with pytest.raises(ValueError, match=r"outputs \[2, 5\]"):
        quantise_rows(weight)
