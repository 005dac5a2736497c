"""Laws against transformers' warpers, and noise that is a function of (seed, position, purpose) and nothing else."""

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orthrus.decoding import sampling as sampling_module
from orthrus.decoding.sampling import (
    ACCEPT,
    DRAFT,
    NEXT,
    Laws,
    Sampling,
    derive_seed,
    drop_top_k_,
    drop_top_p_,
    first_above,
    gumbel,
    pick_inverse_cdf,
    seed_tensor,
    send,
    uniforms,
    warp,
)
from tests.decoding.checks import COMPANY, check_scores_in_company, chi_squared

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


def test_scores_have_the_same_bits_alone_and_in_company():
    check_scores_in_company(CPU, 512)


class Operands(TorchDispatchMode):
    """The second operands of divisions, products and comparisons."""

    NAMES = ("div", "mul", "lt", "le", "gt", "ge")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in self.NAMES and args[0].is_floating_point():  # integers are exact whatever they meet
            self.found.append((name, args[1]))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("samplings", [COMPANY, *([one] for one in COMPANY)])
def test_settings_enter_the_scores_as_tensors(samplings: list[Sampling]):
    """CUDA divides by a Python number with its reciprocal; this is what a CPU can show of that."""
    logits = torch.randn(len(samplings), 2, 31)
    laws = Laws.of(samplings, CPU)
    with Operands() as operands:
        warp(logits, laws)
    numbers = {(name, other) for name, other in operands.found if not isinstance(other, torch.Tensor)}
    # Exact wherever they are computed.
    assert numbers <= {("mul", 2.0**60), ("gt", 0)}, "a setting entered as a Python number"
    assert {tensor.dtype for tensor in (laws.temperature, laws.tail, laws.min_p)} == {torch.float32}
    assert laws.temperature.shape == laws.top_k.shape == laws.tail.shape == laws.min_p.shape == (len(samplings), 1, 1)


def num_kept_of_equals(num_tokens: int, top_p: float) -> tuple[int, float]:
    """How many of so many equally likely tokens top-p keeps, all of them behind those that it drops; and their p."""
    logits = torch.zeros(1, 1, num_tokens)
    kept = warp(logits, Laws.of([Sampling(temperature=1.0, top_p=top_p)], CPU)).isfinite()[0, 0]
    num_kept = int(kept.sum())
    assert kept[num_tokens - num_kept :].all(), "which of equals go must not depend on how a sort is done"
    return num_kept, logits.softmax(-1)[0, 0, 0].item()


@pytest.mark.parametrize("num_dropped", [7, 1_003, 15_000, 29_998])
def test_top_p_adds_up_exactly(num_dropped: int):
    """Rounded to fp32 the sum of one token more would be the tail, too."""
    num_tokens = 30_011
    _, p = num_kept_of_equals(num_tokens, 0.5)
    above = num_dropped + 1
    while Fraction(tail := torch.tensor(above * p).item()) >= above * Fraction(p):  # else it is rounded up
        above += 1
    assert num_kept_of_equals(num_tokens, 1 - tail)[0] == num_tokens - above + 1


@pytest.mark.parametrize("num_tokens", [3, 5, 7, 10, 23, 100])
def test_the_mass_that_top_p_drops_is_rounded_as_transformers_rounds_it(num_tokens: int):
    """A token's probability is the tail itself: to the bit, one is dropped."""
    top_p = 1 - 1 / num_tokens
    stock = TopPLogitsWarper(top_p)(torch.tensor([[0]]), torch.zeros(1, num_tokens))
    assert num_kept_of_equals(num_tokens, top_p)[0] == stock.isfinite().sum() == num_tokens - 1


def sorted_top_p(scores: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """What top-p says, by a stable sort: tokens from the least likely on go while their total stays within the tail."""
    _, order = scores.sort(dim=-1, stable=True)
    up_to = (scores.softmax(-1) * 2.0**60).long().gather(-1, order).cumsum(-1)
    drop = (up_to <= (tail * 2.0**60).long()) & (tail > 0)
    drop[..., -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


ROWS: dict[str, Any] = {
    "random": lambda n, g: torch.randn(n, generator=g) * 3,
    "steep": lambda n, g: torch.randn(n, generator=g) * 60,
    "bf16": lambda n, g: (torch.randn(n, generator=g) * 2).bfloat16().float(),
    "few values": lambda n, g: torch.randint(-2, 3, (n,), generator=g).float(),
    "flat": lambda n, g: torch.full((n,), 7.25),
    "zeros of both signs": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0),
    "one": lambda n, g: torch.full((n,), -torch.inf).index_fill(0, torch.randint(n, (1,), generator=g), 1.5),
    "neighbours": lambda n, g: 1 + torch.randint(0, 3, (n,), generator=g) * 2.0**-23,
    "lower halves of bits": lambda n, g: torch.randint(2**30, 2**30 + 2**17, (n,), generator=g).int().view(torch.float),
    "filtered": lambda n, g: torch.randn(n, generator=g).masked_fill(torch.rand(n, generator=g) < 0.9, -torch.inf)
    .index_fill(0, torch.tensor([n // 2]), 0.5),
}  # fmt: skip


TAILS = (0.0, 2.0**-60, 1e-9, 0.05, 0.2, 0.3, 0.5, 0.9, 1 - 1e-7, 1.0)
TOP_KS = (1, 2, 7, 50, 80)


def rows_of_each_kind(num_tokens: int, seed: int) -> tuple[list[tuple], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every kind with every tail and top-k: what they are, scores [B, 1, V], tails and top-k [B, 1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    names = list(itertools.product(ROWS, TAILS, TOP_KS))
    scores = torch.stack([ROWS[kind](num_tokens, generator) for kind, _, _ in names])
    tails, top_ks = (torch.tensor([name[i] for name in names])[:, None, None] for i in (1, 2))
    return names, scores[:, None], tails, top_ks


def check_kept(names: list[tuple], found: torch.Tensor, expected: torch.Tensor) -> None:
    for name, one, other in zip(names, found, expected, strict=True):
        num_kept, num_expected = (int(scores.isfinite().sum()) for scores in (one, other))
        assert torch.equal(one, other), f"{name}: {num_kept} tokens stay, not {num_expected}, or others"


@pytest.mark.parametrize("num_tokens", [1, 2, 61, 128, 300, 1003])
@pytest.mark.parametrize("seed", range(3))
def test_top_p_drops_what_a_sort_says(num_tokens: int, seed: int):
    names, scores, tail, _ = rows_of_each_kind(num_tokens, seed)
    expected = sorted_top_p(scores, tail)
    drop_top_p_(scores, tail)
    check_kept(names, scores, expected)


@pytest.mark.parametrize("num_tokens", [1, 2, 61, 300, 1003])
@pytest.mark.parametrize("seed", range(3))
def test_top_p_behind_top_k_drops_what_a_sort_says(num_tokens: int, seed: int):
    """From the list of the best, which need not hold all that tie with its last."""
    names, scores, tail, top_k = rows_of_each_kind(num_tokens, seed)
    best = drop_top_k_(scores, top_k, max(TOP_KS))
    expected = sorted_top_p(scores, tail)
    drop_top_p_(scores, tail, best)
    check_kept(names, scores, expected)


@pytest.mark.parametrize(
    ("samplings", "is_listed"),
    [([(7, 0.9)], True), ([(7, 0.9), (0, 0.9)], False), ([(7, 1.0), (9, 0.5)], True), ([(2000, 0.9)], False)],
)
def test_the_list_is_used_where_it_has_all_that_counts(
    samplings: list[tuple[int, float]], is_listed: bool, monkeypatch: pytest.MonkeyPatch
):
    used = []
    by_list = sampling_module.edge_of_list
    monkeypatch.setattr(
        sampling_module, "edge_of_list", lambda *args: used.append(args[-1].ids.shape[-1]) or by_list(*args)
    )
    rows = [Sampling(temperature=1.0, top_k=top_k, top_p=top_p) for top_k, top_p in samplings]
    warp(torch.randn(len(rows), 1, 3000), Laws.of(rows, CPU))
    assert [size < 3000 for size in used] == [is_listed]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([1, 5, 127, 128, 129, 1000]), st.integers(0, 2**31))
def test_the_first_place_that_passes_a_bound_is_a_scans(size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 4, (3, size), generator=generator) * (torch.rand(3, size, generator=generator) < 0.3)
    numbers[:, seed % size] += 2**40 * (seed % 2) + 1
    up_to = numbers.cumsum(-1)
    bound = (
        (up_to[:, -1:] * torch.rand(3, 1, dtype=torch.float64, generator=generator)).long().clamp(max=up_to[:, -1:] - 1)
    )
    place, before = first_above(numbers, bound)
    for row in range(3):
        expected = next(i for i in range(size) if up_to[row, i] > bound[row])
        assert (int(place[row]), int(before[row])) == (expected, int(up_to[row, expected] - numbers[row, expected]))


def test_columns_arrive_as_they_were_sent():
    columns = (torch.tensor([1.5, -0.0, torch.inf]), torch.tensor([2**62, -1, 0]), torch.tensor([1e-40, 3.0, -7.1]))
    for found, sent in zip(send(columns, CPU), columns, strict=True):
        assert found.dtype == sent.dtype and found.view(torch.uint8).equal(sent.view(torch.uint8))


@pytest.mark.parametrize("top_k", [0, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_law_leaves_the_logits_as_they_were(top_k: int, dtype: torch.dtype):
    """It works in place, on a copy of its own."""
    logits = torch.randn(2, 3, 97).to(dtype)
    before = logits.clone()
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_k=top_k, min_p=0.1),
        Sampling(temperature=0.7, top_k=top_k, top_p=0.8),
    ):
        warp(logits, Laws.of([sampling] * 2, CPU))
        assert torch.equal(logits, before)


def test_noise_does_not_depend_on_batch_or_block():
    seeds = seed_tensor([3, 2**70 + 1, -5])
    positions = torch.arange(7)[None] + torch.tensor([[0], [1000], [5]])
    whole = gumbel(seeds, positions, 100)
    alone = gumbel(seeds[1:2], positions[1:2, 4:5], 100)
    assert torch.equal(whole[1:2, 4:5], alone)
    assert torch.equal(uniforms(seeds, positions, NEXT)[2:, 3:5], uniforms(seeds[2:], positions[2:, 3:5], NEXT))


def test_noise_is_pinned():
    """Seeded text must not change between releases: these values are part of the interface."""
    seeds, positions = seed_tensor([1234]), torch.tensor([[17]])
    assert [round(uniforms(seeds, positions, s).item(), 6) for s in (DRAFT, ACCEPT, NEXT)] == PINNED_UNIFORMS
    torch.testing.assert_close(gumbel(seeds, positions, 4)[0, 0], torch.tensor(PINNED_GUMBEL), rtol=1e-5, atol=1e-5)


PINNED_UNIFORMS = [0.164107, 0.479821, 0.033953]
PINNED_GUMBEL = [1.4913137, -1.1848083, -0.1606166, 0.288086]


def test_streams_positions_and_seeds_are_independent():
    seeds, positions = seed_tensor(list(range(40))), torch.arange(500)[None].expand(40, -1)
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
    noise = gumbel(seed_tensor([11]), torch.arange(200_000)[None], 5)[0]
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
