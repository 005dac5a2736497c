"""Bugs that others have shipped, planted here on purpose: the checks of this folder must notice each one."""

import pytest
import torch

import orthrus.decoding.portable as portable
import orthrus.decoding.verify as verify
from orthrus.decoding.cache import Cache
from orthrus.decoding.portable import PortableBackend
from orthrus.model.masks import verify_mask
from tests.decoding.checks import check_acceptance, check_drafts, check_every_acceptance_count, check_speculative_law
from tests.decoding.subjects import random_prompt, stock_text, subject
from tests.decoding.trained import MODULUS, trained_subject

PROMPT = random_prompt(6)


def all_checks(implementation: str = "sdpa") -> None:
    """What the bugs below must fail: text and acceptance at every count, drafts by formula, law by enumeration."""
    model = subject(False, implementation)
    check_every_acceptance_count(model, PROMPT + stock_text(PROMPT, 40), len(PROMPT), 5)
    check_drafts(model, [PROMPT, PROMPT[:2]], 5)
    check_speculative_law()


def test_the_checks_pass_without_a_bug():
    all_checks()


def trained_acceptance() -> None:
    prompts = [[(start + step * i) % MODULUS for i in range(4)] for start in (0, 7, 19) for step in (1, 2, 3)]
    check_acceptance(trained_subject(), prompts, at_least=4.0)


def test_a_trained_view_is_believed():
    trained_acceptance()


def test_a_causal_draft_mask_costs_a_trained_view_its_acceptance(monkeypatch):
    monkeypatch.setattr(portable, "draft_mask", lambda lengths, widths, q, s: verify_mask(lengths, q, s))
    monkeypatch.setattr(portable.Reach, "sees_all", lambda self: False)
    with pytest.raises(AssertionError, match="acceptance fell"):
        trained_acceptance()


@pytest.mark.parametrize("offset", [-1, 1])
def test_a_crop_off_by_one_is_noticed(monkeypatch, offset: int):
    commit = Cache.commit
    monkeypatch.setattr(Cache, "commit", lambda self, row, n: commit(self, row, n + offset if n < 5 else n))
    with pytest.raises(AssertionError, match="before the anchor"):
        all_checks()


def test_a_rejected_key_left_in_the_cache_is_noticed(monkeypatch):
    """The same off-by-one where no length tells: the verify pass writes one slot too far."""
    writer = PortableBackend._writer

    def shifted(self, reach, positions_BT):
        if reach.block_widths is None and reach.num_positions > 1 and reach.lengths[0] > 8:
            reach.lengths = [length + 1 for length in reach.lengths]
        return writer(self, reach, positions_BT)

    monkeypatch.setattr(PortableBackend, "_writer", shifted)
    with pytest.raises((AssertionError, RuntimeError)):
        all_checks()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_causal_draft_mask_is_noticed(monkeypatch, implementation: str):
    monkeypatch.setattr(portable, "draft_mask", lambda lengths, widths, q, s: verify_mask(lengths, q, s))
    monkeypatch.setattr(portable.Reach, "sees_all", lambda self: False)
    with pytest.raises(AssertionError, match="another draft"):
        all_checks(implementation)


def test_a_draft_that_does_not_see_its_prefix_is_noticed(monkeypatch):
    def blind(lengths, widths, num_queries, num_slots):
        slots = torch.arange(num_slots)
        own = (slots >= lengths[:, None]) & (slots < (lengths + widths)[:, None])
        return own[:, None].expand(-1, num_queries, -1)

    monkeypatch.setattr(portable, "draft_mask", blind)
    monkeypatch.setattr(portable.Reach, "sees_all", lambda self: False)
    with pytest.raises(AssertionError, match="another draft"):
        all_checks()


def test_a_verify_mask_that_sees_the_future_is_noticed(monkeypatch):
    def leaking(lengths, num_queries, num_slots):
        return (torch.arange(num_slots) < (lengths + num_queries)[:, None])[:, None].expand(-1, num_queries, -1)

    monkeypatch.setattr(portable, "verify_mask", leaking)
    with pytest.raises(AssertionError):
        all_checks()


def test_drafts_read_with_the_wrong_shift_are_noticed(monkeypatch):
    """Row j predicts token j + 1 of the block, not token j."""
    run = PortableBackend._run

    def shifted(self, ids, reach, view):
        hidden = run(self, ids, reach, view)
        return hidden if view == "ar" else hidden.roll(-1, dims=1)

    monkeypatch.setattr(PortableBackend, "_run", shifted)
    with pytest.raises(AssertionError, match="another draft"):
        all_checks()


@pytest.mark.parametrize(
    "bug",
    [
        lambda p, q: p,  # no residual: the next token is drawn from p
        lambda p, q: (p - q).abs() / (p - q).abs().sum(-1, keepdim=True),  # not clamped
        lambda p, q: torch.where(p > q, p, 0),  # q not subtracted
    ],
)
def test_a_wrong_residual_is_noticed(monkeypatch, bug):
    monkeypatch.setattr(verify, "residual", bug)
    with pytest.raises(AssertionError, match="another law"):
        all_checks()


def test_a_residual_that_is_not_normalised_is_noticed(monkeypatch):
    """Drawn against an absolute threshold, the missing mass would all fall on one token."""
    monkeypatch.setattr(verify, "residual", lambda p, q: (p - q).clamp(min=0))

    def absolute(p, u):
        return (p.cumsum(-1) <= u[..., None]).sum(-1).clamp(max=p.shape[-1] - 1)

    monkeypatch.setattr(verify, "pick_inverse_cdf", absolute)
    with pytest.raises(AssertionError, match="another law"):
        all_checks()


def test_an_acceptance_that_forgets_the_first_rejection_is_noticed(monkeypatch):
    monkeypatch.setattr(verify, "count_leading", lambda kept, widths: kept.long().sum(1))
    with pytest.raises(AssertionError):
        all_checks()


def test_an_acceptance_ratio_upside_down_is_noticed(monkeypatch):
    count = verify.count_accepted

    def upside_down(p, q, widths, u):
        return count(q, p, widths, u)

    monkeypatch.setattr(verify, "count_accepted", upside_down)
    with pytest.raises(AssertionError, match="another law"):
        all_checks()
