"""Products with weights: the kernels against their twins, and the bits of a row in any company."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.engine import reference
from orthrus.engine.quantise import quantise_rows
from tests.engine.interpreter import DEVICE, gpu_arithmetic  # noqa: F401
from tests.engine.products import NUM_ROWS, PLACES, SHAPES, SPREAD_ROWS, cut, draw, launched, weight_of, with_tma

triton = pytest.importorskip("triton")
from orthrus.engine.kernels import linear as kernels  # noqa: E402
from orthrus.engine.kernels import tiles as cuts  # noqa: E402
from orthrus.engine.kernels.head import head_argmax  # noqa: E402
from orthrus.engine.kernels.linear import linear, linear_and_norm, swiglu  # noqa: E402
from orthrus.engine.kernels.norm import rms_norm  # noqa: E402
from orthrus.engine.kernels.tiles import Execution, Tiles  # noqa: E402

# bf16 keeps 8 bits, so one rounding is off by at most 2^-8 of the number; rounding a sum before something is added to
# it shows as more wherever they cancel.
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: dict(rtol=1e-5, atol=1e-4),
    torch.bfloat16: dict(rtol=2**-8, atol=1e-4),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FP8 = pytest.mark.parametrize("is_fp8", [False, True], ids=["same", "fp8"])
ALL = ("bias", "residual", "scale")


def epilogue(names: tuple[str, ...], num_rows: int, num_outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `linear` for what follows the product. The residual's rows lie apart."""
    made = {
        "bias_E": draw(num_outputs, dtype=dtype) * 10,
        "residual_RE": draw(num_rows, num_outputs + 3, dtype=dtype)[:, :num_outputs] * 10,
        "scale_E": draw(num_outputs).abs(),
    }
    return {key: value for key, value in made.items() if key.split("_")[0] in names}


def of_rows(after: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """What follows the product of some of the rows."""
    return {name: value[rows] if name == "residual_RE" else value for name, value in after.items()}


def in_fp32(value: Any) -> Any:
    """The same numbers in fp32, of which the twin rounds nothing; fp8 stays what it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def unrounded(twin: Callable[..., Any], *arguments: Any, **others: Any) -> Any:
    """A twin's result before it is rounded to bf16."""
    return twin(*map(in_fp32, arguments), **{name: in_fp32(one) for name, one in others.items()})


def fp8_slack(x: Tensor, weight: Tensor, scale: Tensor) -> float:
    """What a product of fp8 on a GPU may be off by: Hopper's tensor cores keep 13 bits of an fp8 sum behind the largest
    number that they add, 32 inputs at a time (DeepSeek-V3's report, 3.5.2). None in the interpreter."""
    if DEVICE == "cpu":
        return 0.0
    largest = (x.float().abs() @ (weight.float() * scale[:, None]).abs().T).max().item()
    return (x.shape[1] / 32 + 1) * 2**-13 * largest


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
        exact = unrounded(reference.linear, x, weight, **after)
        torch.testing.assert_close(linear(x, weight, **after).float(), exact, **CLOSE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_of_fp8_is_its_twin(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are quantised by their own scales, which lie far apart."""
    num_outputs, width = cut(monkeypatch, shape)
    weight, scale = quantise_rows(draw(num_outputs, width) / width**0.5)
    for num_rows, names in ((1, ()), (18, ("bias", "residual")), (NUM_ROWS, ("residual",))):
        x = draw(num_rows, width, dtype=dtype) * torch.logspace(-2, 1, num_rows, device=DEVICE, dtype=dtype)[:, None]
        after = epilogue(names, num_rows, num_outputs, dtype) | dict(scale_E=scale)
        exact = unrounded(reference.linear, x, weight, **after)
        close = CLOSE[dtype] | dict(atol=CLOSE[dtype]["atol"] + fp8_slack(x, weight, scale))
        torch.testing.assert_close(linear(x, weight, **after).float(), exact, **close)


@DTYPES
@pytest.mark.parametrize("shape", ["odd", "split"])
@FP8
def test_swiglu_is_its_twin(shape: str, dtype: torch.dtype, is_fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    num_products, width = cut(monkeypatch, shape)
    weight, scale = weight_of(num_products, width, dtype, is_fp8)
    for num_rows in (1, 18):
        x = draw(num_rows, width, dtype=dtype)
        exact = unrounded(reference.swiglu, x, weight, scale_2F=scale)
        close = CLOSE[dtype]
        if scale is not None:  # what both factors are off by, times the other, silu's slope being below 1.1
            factors = unrounded(reference.linear, x, weight, scale_E=scale).abs().max().item()
            close = close | dict(atol=close["atol"] + 2.1 * factors * fp8_slack(x, weight, scale))
        torch.testing.assert_close(swiglu(x, weight, scale_2F=scale).float(), exact, **close)


@DTYPES
@FP8
@pytest.mark.parametrize(
    ("shape", "names"), [("odd", ()), ("split", ("bias",)), ("split", ("residual",)), ("empty", ("bias", "residual"))]
)
def test_linear_and_norm_is_one_after_the_other(
    shape: str, names: tuple[str, ...], dtype: torch.dtype, is_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product bit for bit; its norm too where both kernels sum in one order, which a GPU's layouts need not."""
    num_outputs, width = cut(monkeypatch, shape)
    weight, scale = weight_of(num_outputs, width, dtype, is_fp8)
    norm_E, eps = draw(num_outputs, dtype=dtype), 1e-2
    for num_rows in (1, 18, NUM_ROWS):
        x = draw(num_rows, width, dtype=dtype)
        after = epilogue(names, num_rows, num_outputs, dtype) | dict(scale_E=scale)
        out, normed = linear_and_norm(x, weight, norm_E=norm_E, eps=eps, **after)
        assert torch.equal(out, linear(x, weight, **after)), f"{num_rows} rows: another product than linear's"
        if DEVICE == "cpu":
            assert torch.equal(normed, rms_norm(out, norm_E, eps)), f"{num_rows} rows: another norm"
        exact = unrounded(reference.rms_norm, out, norm_E, eps)
        torch.testing.assert_close(normed.float(), exact, **CLOSE[dtype])


def run_linear_and_norm(x: Tensor, weight: Tensor, **after: Any) -> Tensor:
    """Both results side by side."""
    norm_E = torch.linspace(-1, 1, len(weight), device=DEVICE, dtype=x.dtype)
    return torch.cat(linear_and_norm(x, weight, norm_E=norm_E, eps=1e-6, **after), dim=1)


RUNS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...], str]] = {
    "linear": (linear, ("bias", "residual"), "scale_E"),
    "swiglu": (swiglu, (), "scale_2F"),
    "linear_and_norm": (run_linear_and_norm, ("bias", "residual"), "scale_E"),
}
"""What a pass runs, what follows its product, and what it calls a weight's scale."""


@DTYPES
@FP8
@pytest.mark.parametrize(
    ("shape", "name"),
    [("odd", "swiglu"), ("split", "linear"), ("split", "swiglu"), ("split", "linear_and_norm"), ("whole", "linear")],
)
def test_bits_of_a_row_depend_on_nothing_but_that_row(
    shape: str, name: str, dtype: torch.dtype, is_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L2: other row counts mean other tiles of rows, and sums whose parts are spread over programs or are not."""
    run, names, scale_name = RUNS[name]
    num_outputs, width = cut(monkeypatch, shape)
    x = draw(NUM_ROWS, width, dtype=dtype)
    weight, scale = weight_of(num_outputs, width, dtype, is_fp8)
    after = epilogue(names, NUM_ROWS, num_outputs, dtype) | {scale_name: scale}
    everyone = run(x, weight, **after)
    for company, rows in PLACES.items():
        same = run(x[rows], weight, **of_rows(after, rows))
        assert torch.equal(same, everyone[rows]), f"rows {company} have other bits than among {NUM_ROWS}"


@pytest.mark.parametrize("name", RUNS)
def test_larger_tiles_for_many_rows_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's argmax too, whose tiles of the vocabulary follow from theirs."""
    run, names, scale_name = RUNS[name]
    num_outputs, width = cut(monkeypatch, "split")
    x, weight = draw(NUM_ROWS, width), draw(num_outputs, width)
    after = epilogue(names, NUM_ROWS, num_outputs, torch.float32) | {scale_name: None}
    expected, largest = run(x, weight, **after), head_argmax(x, weight)
    few, larger = cuts.tiles_of(weight), Execution(128, 8, 2)
    monkeypatch.setitem(cuts.BY_ROWS, (num_outputs, width, weight.element_size()), {64: larger, 256: larger})
    for num_rows in (40, 64, NUM_ROWS):
        some, of_some = x[:num_rows], of_rows(after, list(range(num_rows)))
        assert kernels.settings(some, weight, few)["BLOCK_E"] == 128 != few.BLOCK_E
        assert torch.equal(run(some, weight, **of_some), expected[:num_rows])
        assert torch.equal(head_argmax(some, weight), largest[:num_rows])


FETCHED = {
    "linear": (74, 296, Tiles(64, 32, 3, 4, 3)),  # the last part is shorter, its last block not whole
    "swiglu": (74, 72, Tiles(64, 32, 1, 4, 3)),
    "linear_and_norm": (74, 200, Tiles(64, 32, 2, 4, 3)),
    "parts": (74, 296, Tiles(64, 32, 3, 4, 3)),
}
"""Shapes whose tiles can be fetched."""


def sum_of_parts(x: Tensor, weight: Tensor, *, scale_E: None) -> Tensor:
    """In order, as kernels add them."""
    total, *others = kernels.parts(x, weight, scale_E)
    for other in others:
        total = total + other
    return total


@pytest.mark.parametrize("name", FETCHED)
def test_fetched_tiles_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts spread over programs (66 rows), and not. Parts are fp32: rounding hides none of their bits."""
    run, names, scale_name = (RUNS | {"parts": (sum_of_parts, (), "scale_E")})[name]
    num_outputs, width, tiles = FETCHED[name]
    dtype = torch.bfloat16
    x, weight = draw(NUM_ROWS, width, dtype=dtype), draw(num_outputs, width, dtype=dtype) / width**0.5
    key = (num_outputs, width, weight.element_size())
    monkeypatch.setattr(kernels, "MAX_SPREAD_ROWS", SPREAD_ROWS)
    monkeypatch.setitem(cuts.TILES, key, tiles)
    after = epilogue(names, NUM_ROWS, num_outputs, dtype) | {scale_name: None}
    monkeypatch.setitem(cuts.BY_ROWS, key, dict.fromkeys((128, 256), Execution(64, 4, 3, by_tma=True)))
    of_kernels = launched(monkeypatch, kernels, "multiply")
    with_tma(monkeypatch, False)
    expected = run(x, weight, **after)
    with_tma(monkeypatch, True)
    for num_rows in (66, NUM_ROWS):
        assert torch.equal(run(x[:num_rows], weight, **of_rows(after, list(range(num_rows)))), expected[:num_rows])
    assert of_kernels == ["multiply", *["multiply_by_tma"] * 2]


def test_settings_for_fetched_tiles_are_not_those_of_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, tiles = draw(200, 64, dtype=torch.bfloat16), draw(8, 64, dtype=torch.bfloat16), Tiles(64, 32, 1, 4, 3)
    monkeypatch.setitem(cuts.BY_ROWS, (8, 64, 2), {256: Execution(256, 8, 2, by_tma=True)})
    with_tma(monkeypatch, False)
    assert kernels.tma_settings(x, weight, tiles, has_one_part=True) is None
    found = kernels.settings(x, weight, tiles)
    assert (found["BLOCK_E"], found["num_warps"], found["num_stages"]) == (64, 4, 3)


def test_tiles_are_fetched_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with_tma(monkeypatch, True)
    half = torch.bfloat16
    x, weight, tiles = draw(3, 128, dtype=half), draw(8, 128, dtype=half), Tiles(64, 32, 2, 4, 3)

    def can(x: Tensor, weight: Tensor, tiles: Any = tiles, **how: bool) -> bool:
        return kernels.can_fetch(x, weight, tiles, **{"has_one_part": False} | how)

    assert can(x, weight) and can(draw(3, 2, 128, dtype=half)[:, 1], weight)
    assert not can(x, weight.to(torch.float8_e4m3fn)), "rows are quantised on the way"
    assert not can(x.float(), weight.float()), "fp32 is multiplied as fp32, which takes another instruction"
    assert not can(draw(3, 124, dtype=half), draw(8, 124, dtype=half)), "248 bytes are not counted in 16s"
    assert not can(draw(3 * 128 + 1, dtype=half)[1:].view(3, 128), weight), "nor is a start of 2 bytes"
    assert not can(x, weight, tiles._replace(SPLITS=4)), "a part of 32 inputs ends within a tile"
    assert not can(x, weight, has_one_part=True) and can(x, weight, tiles._replace(SPLITS=1), has_one_part=True)
    with_tma(monkeypatch, False)
    assert not can(x, weight)


def test_shapes_that_nobody_measured_are_fetched_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    with_tma(monkeypatch, True)
    weight = torch.zeros(97, 64, dtype=torch.bfloat16)
    assert [cuts.execution_of(weight, rows) for rows in (128, 129, 4096)] == [None, *[cuts.MANY_ROWS] * 2]
    assert cuts.execution_of(weight.float(), 4096) is None
    with_tma(monkeypatch, False)
    assert cuts.execution_of(weight, 4096) is None


def test_larger_tiles_are_for_as_many_rows_as_they_were_measured_at(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(96, 32)
    named = {rows: Execution(rows, 4, 2) for rows in (16, 64, 1024)}
    monkeypatch.setitem(cuts.BY_ROWS, (96, 32, 4), named)
    for measured, some in ((16, (1, 16)), (64, (33, 64)), (1024, (513, 1024, 4096))):
        assert {cuts.execution_of(weight, rows) for rows in some} == {named[measured]}
    assert {cuts.execution_of(weight, rows) for rows in (17, 32, 65, 128, 129, 512)} == {None}


def test_a_sum_in_other_parts_has_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above could not notice that parts follow from the number of rows."""
    num_outputs, width = cut(monkeypatch, "split")
    x, weight = draw(9, width), draw(num_outputs, width)
    split = linear(x, weight)
    monkeypatch.setitem(cuts.TILES, (num_outputs, width, 4), SHAPES["split"][2]._replace(SPLITS=1))
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
    both = linear_and_norm(draw(0, 8), draw(3, 8), norm_E=draw(3), eps=1e-6)
    assert [one.shape for one in both] == [(0, 3), (0, 3)]


@pytest.mark.parametrize(
    ("outputs", "inputs", "weight_bytes", "splits"),
    [(4096, 2048, 2, 4), (2048, 6144, 2, 8), (24_576, 4096, 2, 1), (4096, 12_288, 2, 4), (151_936, 4096, 2, 1)],
)
def test_default_tiles_give_every_multiprocessor_work(
    outputs: int, inputs: int, weight_bytes: int, splits: int
) -> None:
    tiles = cuts.default_tiles(outputs, inputs, weight_bytes)
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
