"""Rows in fp8: what they are off by, the kernel that makes them of a pass's rows, and copies of weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthrus.engine import quantise
from orthrus.engine.quantise import quantise_rows, quantise_weight
from tests.engine.interpreter import DEVICE, gpu_arithmetic  # noqa: F401
from tests.engine.passes import planted
from tests.engine.products import draw

kernels = pytest.importorskip("orthrus.engine.kernels.quantise")


def test_error_is_within_half_a_step_of_fp8() -> None:
    """3 mantissa bits: half a step is 2^-4 of a number, or 2^-10 of the scale below fp8's normal numbers."""
    weight = torch.randn(40, 3000) * torch.logspace(-30, 30, 40)[:, None] * torch.logspace(-5, 0, 3000)
    quantised, scale = quantise_rows(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    error = (quantised.double() * scale[:, None].double() - weight.double()).abs()
    bound = torch.maximum(weight.double().abs() * 2**-4, scale[:, None].double() * 2**-10)
    worst = (error / bound).max().item()
    assert 0.9 < worst < 1 + 1e-6, "the quotient is rounded to fp32 before it is to fp8"


def test_largest_number_of_a_row_is_met() -> None:
    weight = torch.randn(5, 64)
    quantised, scale = quantise_rows(weight)
    assert quantised.float().abs().amax(1).tolist() == [448] * 5
    torch.testing.assert_close(448 * scale, weight.abs().amax(1))


def test_rows_of_zeros_stay_zero() -> None:
    quantised, scale = quantise_rows(torch.zeros(2, 8, dtype=torch.bfloat16))
    assert not quantised.float().any()
    assert scale.isfinite().all()


def rows_of_all_sizes(dtype: torch.dtype) -> Tensor:
    """Rows of ordinary numbers, of tiny and of huge ones, of numbers that fp8 has only as subnormals, and of zeros; and
    multiples of the middles between numbers of fp8, which only the right quotient finds to be middles."""
    sizes = torch.tensor([1, 3, 448, 1e-30, 1e30, 1e-38, 1e-44, 0])[:, None]
    x = torch.cat([torch.randn(8, 300), torch.randn(8, 300) * torch.logspace(-6, 0, 300)]) * sizes.repeat(2, 1)
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    multiples = torch.zeros(32, 300)
    multiples[:, : len(middles)] = middles * (2 * torch.arange(32) + 1)[:, None]
    return torch.cat([x, multiples]).to(DEVICE, dtype)


def check_kernel(dtype: torch.dtype, module=kernels) -> None:
    x = rows_of_all_sizes(dtype)
    for one, other in zip(module.quantise(x), quantise_rows(x), strict=True):
        as_bits = torch.uint8 if one.dtype == torch.float8_e4m3fn else torch.int32
        assert torch.equal(one.view(as_bits), other.view(as_bits)), "the kernel's bits are not the twin's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernel_has_its_twins_bits(dtype: torch.dtype) -> None:
    check_kernel(dtype)


@pytest.mark.parametrize(
    ("old", "new"),
    [("tl.abs(x)", "x"), ("1.1754943508222875e-38", "0.0"), ("tl.div_rn(x, scale)", "(x * tl.div_rn(1.0, scale))")],
    ids=["signed", "0 / 0", "a reciprocal"],
)
def test_a_bug_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(AssertionError, match="not the twin's"):
        check_kernel(torch.float32, planted(kernels, tmp_path, old=old, new=new))


def test_rows_may_lie_apart_and_depend_on_nothing_else() -> None:
    x = draw(5, 3, 70)
    together = kernels.quantise(x[:, 1].contiguous())
    for rows in ([3], [4, 0], [0, 1, 2, 3, 4]):
        for one, all_of_them in zip(kernels.quantise(x[:, 1][rows]), together, strict=True):
            assert torch.equal(one.float(), all_of_them[rows].float())
    for one, other in zip(kernels.quantise(x[:, 1]), together, strict=True):
        assert torch.equal(one.float(), other.float())
    assert [one.shape for one in kernels.quantise(x[:0, 1])] == [(0, 70), (0,)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantise_them", [quantise_rows, kernels.quantise], ids=["twin", "kernel"])
def test_a_row_that_is_not_finite_is_nan_by_any_weight(quantise_them, bad: float) -> None:
    """And no other row: activations of broken weights are for the engine to refuse, not for a kernel."""
    x = draw(3, 40)
    x[1, 7] = bad
    quantised, scale = quantise_them(x)
    product = quantised.float() @ torch.ones(40, device=DEVICE) * scale
    assert product.isnan().tolist() == [False, True, False]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(11, 10, dtype=torch.bfloat16)
    whole = quantise_rows(weight)
    monkeypatch.setattr(quantise, "CHUNK", 30)
    for one, other in zip(quantise_weight(weight), whole, strict=True):
        assert torch.equal(one.float(), other.float())


def test_weights_that_are_not_finite_are_refused_by_output() -> None:
    weight = torch.ones(6, 4)
    weight[2, 1], weight[5, 0] = torch.inf, torch.nan
    with pytest.raises(ValueError, match=r"outputs \[2, 5\]"):
        quantise_weight(weight)
