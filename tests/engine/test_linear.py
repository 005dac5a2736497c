"""Products with weights: the kernels against their twins, and the bits of a row in any company."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.engine import reference
from orthrus.engine.quantise import quantise_rows
from tests.engine.interpreter import DEVICE, gpu_arithmetic  # noqa: F401
from tests.engine.products import NUM_ROWS, PLACES, SHAPES, cut, draw

triton = pytest.importorskip("triton")
from orthrus.engine.kernels import linear as kernels  # noqa: E402
from orthrus.engine.kernels.linear import linear, swiglu  # noqa: E402

# bf16 keeps 8 bits, so one rounding is off by at most 2^-8 of the number; rounding a sum before something is added to
# it shows as more wherever they cancel.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: dict(rtol=1e-5, atol=1e-4),
    torch.bfloat16: dict(rtol=2**-8, atol=1e-4),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ALL = ("bias", "residual", "scale")


def epilogue(names: tuple[str, ...], num_rows: int, num_outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `linear` for what follows the product. The residual's rows lie apart."""
    made = {
        "bias_E": draw(num_outputs, dtype=dtype) * 10,
        "residual_RE": draw(num_rows, num_outputs + 3, dtype=dtype)[:, :num_outputs] * 10,
        "scale_E": draw(num_outputs).abs(),
    }
    return {key: value for key, value in made.items() if key.split("_")[0] in names}


def in_fp32(value: Tensor) -> Tensor:
    return value.float() if value.dtype != torch.float8_e4m3fn else value


@DTYPES
@pytest.mark.parametrize(
    ("shape", "names"),
    [("odd", ()), ("split", ()), ("split", ("bias",)), ("split", ("residual",)), ("split", ("scale",)),
     *((shape, ALL) for shape in SHAPES)],
)  # fmt: skip
def test_linear_is_its_twin(
    shape: str, dtype: torch.dtype, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_outputs, width = cut(monkeypatch, shape)
    weight = draw(num_outputs, width, dtype=dtype)
    for num_rows in (1, 18):
        x = draw(num_rows, width, dtype=dtype)
        after = epilogue(names, num_rows, num_outputs, dtype)
        exact = reference.linear(x.float(), weight.float(), **{name: in_fp32(one) for name, one in after.items()})
        torch.testing.assert_close(linear(x, weight, **after).float(), exact, **CLOSE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", ["odd", "split"])
@pytest.mark.parametrize("is_fp8", [False, True], ids=["same", "fp8"])
def test_swiglu_is_its_twin(shape: str, dtype: torch.dtype, is_fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    num_products, width = cut(monkeypatch, shape)
    weight = draw(num_products, width, dtype=dtype) / width**0.5
    weight, scale = quantise_rows(weight) if is_fp8 else (weight, None)
    for num_rows in (1, 18):
        x = draw(num_rows, width, dtype=dtype)
        exact = reference.swiglu(x.float(), in_fp32(weight), scale_2F=scale)
        torch.testing.assert_close(swiglu(x, weight, scale_2F=scale).float(), exact, **CLOSE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", ["odd", "split"])
def test_fp8_weights_are_read_as_they_are(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    num_outputs, width = cut(monkeypatch, shape)
    weight, scale = quantise_rows(draw(num_outputs, width))
    x = draw(5, width, dtype=dtype)
    exact = reference.linear(x.float(), weight, scale_E=scale)
    torch.testing.assert_close(linear(x, weight, scale_E=scale).float(), exact, **CLOSE[dtype])


@DTYPES
@pytest.mark.parametrize(("shape", "is_gated"), [("odd", True), ("split", False), ("split", True), ("whole", False)])
def test_bits_of_a_row_depend_on_nothing_but_that_row(
    shape: str, dtype: torch.dtype, is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L2: other row counts mean other tiles of rows, and sums whose parts are spread over programs or are not."""
    num_outputs, width = cut(monkeypatch, shape)
    x, weight = draw(NUM_ROWS, width, dtype=dtype), draw(num_outputs, width, dtype=dtype)
    after = {} if is_gated else epilogue(("bias", "residual"), NUM_ROWS, num_outputs, dtype)
    run = swiglu if is_gated else linear
    everyone = run(x, weight, **after)
    for company, rows in PLACES.items():
        theirs = {name: value[rows] if name == "residual_RE" else value for name, value in after.items()}
        same = run(x[rows], weight, **theirs)
        assert torch.equal(same, everyone[rows]), f"rows {company} have other bits than among {NUM_ROWS}"


def test_a_sum_in_other_parts_has_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above could not notice that parts follow from the number of rows."""
    num_outputs, width = cut(monkeypatch, "split")
    x, weight = draw(9, width), draw(num_outputs, width)
    split = linear(x, weight)
    monkeypatch.setitem(kernels.TILES, (num_outputs, width, 4), SHAPES["split"][2]._replace(SPLITS=1))
    assert not torch.equal(linear(x, weight), split)


@pytest.mark.parametrize("num_rows", [2, 129])
def test_rows_may_lie_apart(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the last rows of each sequence do."""
    num_outputs, width = cut(monkeypatch, "split")
    x, weight = draw(num_rows, 3, width), draw(num_outputs, width)
    assert torch.equal(linear(x[:, 1], weight), linear(x[:, 1].contiguous(), weight))


def test_no_rows_have_no_products() -> None:
    assert linear(draw(0, 8), draw(3, 8)).shape == (0, 3)
    assert swiglu(draw(0, 8), draw(6, 8)).shape == (0, 3)


@pytest.mark.parametrize(
    ("outputs", "inputs", "weight_bytes", "splits"),
    [(4096, 2048, 2, 4), (2048, 6144, 2, 8), (24_576, 4096, 2, 1), (4096, 12_288, 2, 4), (151_936, 4096, 2, 1)],
)
def test_default_tiles_give_every_multiprocessor_work(
    outputs: int, inputs: int, weight_bytes: int, splits: int
) -> None:
    tiles = kernels.default_tiles(outputs, inputs, weight_bytes)
    assert tiles.SPLITS == splits
    assert triton.cdiv(outputs, tiles.BLOCK_E) * tiles.SPLITS >= 132


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (draw(2, 8), draw(3, 9)), "do not fit"),
        (lambda: (draw(2, 8), draw(3, 8, dtype=torch.bfloat16)), "or float8_e4m3fn"),
        (lambda: (draw(2, 8), draw(8, 3).T), "lie together"),
        (lambda: (draw(8, 2).T, draw(3, 8)), "lie together"),
    ],
)
def test_operands_that_would_be_misread_are_refused(
    arguments: Callable[[], tuple[Tensor, Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear(*arguments())


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (dict(bias_E=torch.zeros(4, device=DEVICE)), "one for each output"),
        (dict(scale_E=torch.zeros(1, device=DEVICE)), "one for each output"),
        (dict(residual_RE=torch.zeros(2, 4, device=DEVICE)), "residual must be"),
    ],
)
def test_what_follows_must_fit_the_product(after: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(draw(2, 8), draw(3, 8), **after)
