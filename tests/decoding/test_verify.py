"""The verifier: each function against a loop that says the same, and its law summed over all randomness."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus.decoding.verify import RESIDUAL_FLOOR, accept_equal, count_leading, residual
from tests.decoding.checks import accept_by_laws, check_speculative_law


@st.composite
def laws(draw: st.DrawFn) -> tuple:
    """(p [B, W, V], q [B, J, V], drafts, widths, u_accept, u_next); some rows of q equal p, some tokens have p = 0."""
    rows, width, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def law(count: int) -> torch.Tensor:
        weights = torch.rand(rows, count, tokens, generator=generator)
        weights = weights * (torch.rand(weights.shape, generator=generator) > 0.3) + 1e-9 * (weights > 0.95)
        weights[..., 0] += 1e-3
        return weights / weights.sum(-1, keepdim=True)

    p, q = law(width), law(width - 1)
    same = torch.rand(rows, width - 1, 1, generator=generator) < 0.4
    q = torch.where(same, p[:, :-1], q)
    drafts = (
        q.flatten(0, 1).multinomial(1, generator=generator).view(rows, width - 1) if width > 1 else q[..., 0].long()
    )
    widths = torch.randint(0, width, (rows,), generator=generator)
    u_accept = torch.rand(rows, width - 1, generator=generator)
    u_next = torch.rand(rows, width, generator=generator).clamp(1e-6, 1 - 1e-6)
    return p, q, drafts, widths, u_accept, u_next


def slow_speculative(p, q, drafts, width, u_accept, u_next) -> list[int]:
    """One row, as the paper says it."""
    written = []
    for j in range(width):
        v = int(drafts[j])
        if not u_accept[j] * q[j, v] < p[j, v]:
            rest = (p[j] - q[j]).clamp(min=0)
            law = p[j] if rest.sum() <= RESIDUAL_FLOOR else rest / rest.sum()
            break
        written.append(v)
    else:
        j, law = width, p[width]
    total, target = 0.0, float(u_next[j]) * law.double().sum().item()
    for v in range(len(law)):
        total += law[v].double().item()
        if total > target:
            return [*written, v]
    raise AssertionError("the law has no mass")


@settings(max_examples=150, deadline=None)
@given(laws())
def test_speculative_acceptance_is_what_the_paper_says(case):
    p, q, drafts, widths, u_accept, u_next = case
    accepted, written = accept_by_laws(*case)
    for b in range(len(p)):
        expected = slow_speculative(p[b], q[b], drafts[b], int(widths[b]), u_accept[b], u_next[b])
        assert written[b, : accepted[b] + 1].tolist() == expected


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
def test_equal_acceptance_is_the_leading_run(rows: int, width: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    drafts = torch.randint(0, 2, (rows, width - 1), generator=generator)
    targets = torch.randint(0, 2, (rows, width), generator=generator)
    widths = torch.randint(0, width, (rows,), generator=generator)
    accepted, written = accept_equal(drafts, targets, widths)
    for b in range(rows):
        count = 0
        while count < widths[b] and drafts[b, count] == targets[b, count]:
            count += 1
        assert accepted[b] == count
        assert written[b, : count + 1].tolist() == drafts[b, :count].tolist() + [int(targets[b, count])]


def test_drafts_beyond_the_width_are_padding():
    kept = torch.ones(3, 4, dtype=torch.bool)
    assert count_leading(kept, torch.tensor([0, 2, 4])).tolist() == [0, 2, 4]


def test_a_draft_of_probability_zero_never_passes():
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    q = torch.tensor([[[1.0, 0.0]]])
    zero = torch.zeros(1, 1)
    accepted, written = accept_by_laws(p, q, torch.tensor([[0]]), torch.tensor([1]), zero, torch.full((1, 2), 0.999))
    assert accepted.tolist() == [0]
    assert written[0, 0] == 1


def test_residual_is_what_p_has_more_and_falls_back_to_p():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.6, 0.2]])
    torch.testing.assert_close(residual(p, q), torch.tensor([[0.3, 0.0, 0.0]]))
    torch.testing.assert_close(residual(p, p), p)
    torch.testing.assert_close(residual(p, p + torch.tensor([[4e-6, -4e-6, 0.0]])), p)
    rest = residual(torch.tensor([[0.4, 0.4, 0.2]]), torch.tensor([[0.3, 0.2, 0.5]]))
    torch.testing.assert_close(rest, torch.tensor([[0.1, 0.2, 0.0]]))


def test_the_speculative_law_is_the_ar_law():
    check_speculative_law()
