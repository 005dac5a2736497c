"""Weights, rows and tiles at which the kernels of products are tested, and the ways in which a row can be placed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.engine.kernels import linear
from orthrus.engine.kernels import tiles as cuts
from orthrus.engine.kernels.tiles import Tiles
from orthrus.engine.quantise import quantise_rows
from tests.engine.interpreter import DEVICE

# Tiny shapes have one part by default: these cut sums as large ones are cut. Small, for each step of a program costs
# the interpreter milliseconds.
SHAPES = {
    "odd": (30, 50, Tiles(64, 32, 1, 4, 3)),
    "split": (74, 140, Tiles(64, 32, 2, 4, 3)),  # the last part is shorter, its last block not whole
    "whole": (64, 96, Tiles(64, 32, 3, 4, 3)),
    "empty": (48, 90, Tiles(64, 64, 3, 4, 3)),  # a part has no inputs
}

NUM_ROWS = 130
"""More than any tile of rows holds, and than products here spread the parts of their sums for."""

SPREAD_ROWS = 128
"""Instead of linear.MAX_SPREAD_ROWS, beyond which the interpreter would take long."""

PLACES = {
    "alone": [7],
    "reversed": [9, 8, 7],
    "in a wider tile": [129, *range(1, 33)],
    "in the widest": [*range(40, 106)],
}
"""Rows of the NUM_ROWS that are computed again, in other company."""


def cut(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[int, int]:
    """Have products of this shape cut as SHAPES says, whatever the dtype. (outputs, inputs)."""
    num_outputs, width, tiles = SHAPES[name]
    monkeypatch.setattr(linear, "MAX_SPREAD_ROWS", SPREAD_ROWS)
    for weight_bytes in (1, 2, 4):
        monkeypatch.setitem(cuts.TILES, (num_outputs, width, weight_bytes), tiles)
    return num_outputs, width


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of a dtype."""
    return torch.randn(shape).to(DEVICE, dtype)


def launched(monkeypatch: pytest.MonkeyPatch, module: Any, prefix: str) -> list[str]:
    """The kernels with names like this that a module launches from here on."""
    found, kernels = [], module.kernels

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            if name.startswith(prefix):
                found.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(module, "kernels", Recorded())
    return found


def with_tma(monkeypatch: pytest.MonkeyPatch, has_tma: bool) -> None:
    """Have tiles fetched, or not; kernels overlap as they do on this device."""
    if has_tma and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tiles are fetched from Hopper on")
    for module in (linear, cuts):
        monkeypatch.setattr(module, "is_hopper", lambda device: has_tma)


def weight_of(num_outputs: int, width: int, dtype: torch.dtype, is_fp8: bool) -> tuple[Tensor, Tensor | None]:
    """A weight whose products are about as large as its inputs, in this dtype or in fp8, and its scale there."""
    weight = draw(num_outputs, width, dtype=dtype) / width**0.5
    return quantise_rows(weight) if is_fp8 else (weight, None)
