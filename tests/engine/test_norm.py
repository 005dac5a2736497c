"""The RMS norm's kernel against its twin, and the bits of a row in any company."""

import pytest
import torch

from orthrus.engine import reference
from tests.engine.interpreter import gpu_arithmetic  # noqa: F401
from tests.engine.products import draw

pytest.importorskip("triton")
from orthrus.engine.kernels.norm import rms_norm  # noqa: E402


@pytest.mark.parametrize("width", [1, 7, 128, 1000])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_norm_is_its_twin(width: int, num_rows: int) -> None:
    x, weight = draw(num_rows, width) * 3, draw(width)
    torch.testing.assert_close(rms_norm(x, weight, 1e-2), reference.rms_norm(x, weight, 1e-2))
    # Both round the same fp32 number once, which can lie at the middle between two of bf16.
    low = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-2).float()
    exact = reference.rms_norm(x.bfloat16().float(), weight.bfloat16().float(), 1e-2)
    torch.testing.assert_close(low, exact, rtol=2**-8, atol=1e-6)


def test_bits_of_a_row_depend_on_nothing_but_that_row() -> None:
    x, weight = draw(9, 300, dtype=torch.bfloat16), draw(300, dtype=torch.bfloat16)
    everyone = rms_norm(x, weight, 1e-6)
    for rows in ([4], [8, 0, 3], [*range(8, -1, -1)]):
        assert torch.equal(rms_norm(x[rows], weight, 1e-6), everyone[rows])


def test_rows_may_lie_apart() -> None:
    x, weight = draw(4, 3, 40), draw(40)
    assert torch.equal(rms_norm(x[:, 1], weight, 1e-6), rms_norm(x[:, 1].contiguous(), weight, 1e-6))


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight of \[8\]"):
        rms_norm(draw(2, 8), draw(7), 1e-6)
