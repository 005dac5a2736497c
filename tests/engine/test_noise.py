"""The kernel of the noise against torch: every bit, or seeded text would follow who made it."""

import pytest
import torch

from orthrus.decoding import sampling
from orthrus.decoding.sampling import seed_tensor
from tests.engine.interpreter import DEVICE

pytest.importorskip("triton")
from orthrus.engine.kernels.noise import gumbel  # noqa: E402


@pytest.mark.parametrize("num_tokens", [1, 61, 1024, 5003])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (2, 0)])
def test_noise_has_the_bits_of_torchs(num_tokens: int, shape: tuple[int, int]) -> None:
    seeds = seed_tensor([3, 2**70 + 1, -5][: shape[0]]).to(DEVICE)
    positions = torch.randint(0, 2**20, shape, device=DEVICE)
    found = gumbel(seeds, positions, num_tokens)
    assert found.isfinite().all() and torch.equal(found, sampling.gumbel(seeds, positions, num_tokens))
