"""Laws against transformers' warpers, and noise that is a function of (seed, position, purpose) and nothing else."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orthrus.decoding.sampling import (
    ACCEPT,
    DRAFT,
    NEXT,
    Laws,
    Sampling,
    derive_seed,
    gumbel,
    pick_inverse_cdf,
    seed_tensor,
    uniforms,
    warp,
)
from tests.decoding.checks import chi_squared

CPU = torch.device("cpu")
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 500]),
    top_p=st.sampled_from([0.05, 0.6, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)


def stock_warp(logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    """transformers' warpers in transformers' order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(s.temperature)])
    if s.top_k:
        warpers.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        warpers.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        warpers.append(MinPLogitsWarper(s.min_p))
    return warpers(None, logits)


@settings(max_examples=60, deadline=None)
@given(st.lists(SAMPLINGS, min_size=1, max_size=4), st.integers(0, 2**31))
def test_warp_is_transformers_warpers_for_each_row(samplings: list[Sampling], seed: int):
    logits = torch.randn(len(samplings), 3, 29, generator=torch.Generator().manual_seed(seed)) * 2
    scores = warp(logits, Laws.of(samplings, CPU))
    for b, sampling in enumerate(samplings):
        torch.testing.assert_close(scores[b], stock_warp(logits[b], sampling))


def test_a_greedy_row_among_others_keeps_its_argmax():
    logits = torch.randn(2, 1, 31)
    scores = warp(logits, Laws.of([Sampling(), Sampling(temperature=0.5, top_k=2, top_p=0.5, min_p=0.2)], CPU))
    torch.testing.assert_close(scores[0], logits[0])


def test_noise_does_not_depend_on_batch_or_block():
    seeds = seed_tensor([3, 2**70 + 1, -5], CPU)
    positions = torch.arange(7)[None] + torch.tensor([[0], [1000], [5]])
    whole = gumbel(seeds, positions, 100)
    alone = gumbel(seeds[1:2], positions[1:2, 4:5], 100)
    assert torch.equal(whole[1:2, 4:5], alone)
    assert torch.equal(uniforms(seeds, positions, NEXT)[2:, 3:5], uniforms(seeds[2:], positions[2:, 3:5], NEXT))


def test_noise_is_pinned():
    """Seeded text must not change between releases: these values are part of the interface."""
    seeds, positions = seed_tensor([1234], CPU), torch.tensor([[17]])
    assert [round(uniforms(seeds, positions, s).item(), 6) for s in (DRAFT, ACCEPT, NEXT)] == PINNED_UNIFORMS
    torch.testing.assert_close(gumbel(seeds, positions, 4)[0, 0], torch.tensor(PINNED_GUMBEL), rtol=1e-5, atol=1e-5)


PINNED_UNIFORMS = [0.164107, 0.479821, 0.033953]
PINNED_GUMBEL = [1.4913137, -1.1848083, -0.1606166, 0.288086]


def test_streams_positions_and_seeds_are_independent():
    seeds, positions = seed_tensor(list(range(40)), CPU), torch.arange(500)[None].expand(40, -1)
    drawn = torch.stack([uniforms(seeds, positions, s) for s in (DRAFT, ACCEPT, NEXT)])
    assert 0 < drawn.min() and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.005
    neighbours = [(drawn[0, :, 1:], drawn[0, :, :-1]), (drawn[0, 1:], drawn[0, :-1])]
    for a, b in [(drawn[0], drawn[1]), (drawn[1], drawn[2]), *neighbours]:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.03
    counts = torch.histc(drawn[0], bins=50, min=0, max=1)
    assert chi_squared(counts.double(), torch.full((50,), 1 / 50, dtype=torch.float64)) < 4


def test_the_argmax_of_scores_and_noise_has_the_softmax_law():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -6.0])
    noise = gumbel(seed_tensor([11], CPU), torch.arange(200_000)[None], 5)[0]
    counts = torch.bincount((logits + noise).argmax(-1), minlength=5).double()
    assert chi_squared(counts, logits.double().softmax(-1)) < 4
    pairs = (noise[1:] + logits).argmax(-1) * 5 + (noise[:-1] + logits).argmax(-1)
    law = logits.double().softmax(-1)
    assert chi_squared(torch.bincount(pairs, minlength=25).double(), torch.outer(law, law).flatten()) < 4


def test_the_inverse_cdf_never_picks_a_token_without_weight():
    p = torch.tensor([[[0.0, 0.3, 0.0, 0.7, 0.0]]]).expand(1, 3, -1)
    picked = pick_inverse_cdf(p, torch.tensor([[2.0**-24, 0.3, 1 - 2.0**-24]]))
    assert set(picked.flatten().tolist()) <= {1, 3}


def test_sibling_seeds_differ():
    assert derive_seed(7, 0) == 7
    assert len({derive_seed(7, i) for i in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
        ("min_p", 2.0), ("rule", "typical"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name(field: str, value: Any):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})


def test_a_seed_selects_the_coupled_rule():
    assert Sampling(temperature=1.0, seed=1).effective_rule == "coupled"
    assert Sampling(temperature=1.0).effective_rule == "speculative"
    assert Sampling(temperature=1.0, seed=1, rule="speculative").effective_rule == "speculative"
    assert Sampling(temperature=0.0, seed=1).effective_rule == "greedy"
