"""Where two texts part, `--compare` says where, how close the decision was, and whether rounding explains it."""

import pytest

from orthrus.cli.compare import Comparison, verdict
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.timing import Run
from orthrus.evaluation.lossless import Divergence


def comparison(divergence: Divergence | None, *, seed: int | None = None) -> Comparison:
    """A comparison that found this divergence."""
    run = Run(
        token_ids=[1, 2, 3],
        finish_reason="length",
        stats=DecodingStats(block_size=8),
        prefill_s=0.1,
        decode_s=0.5,
    )
    facts = {"dtype": "bfloat16", "seed": seed}
    return Comparison(plain=[run], drafted=[run], one_row=[], divergence=divergence, facts=facts, text="")


def divergence(*, gap: float) -> Divergence:
    """Two texts that part at token 4, each with one of the two best tokens, in bf16 near 16."""
    return Divergence(position=4, top_logits=(16.0, 16.0 - gap), ulp=0.125, shortfall=gap)


def test_gap_of_a_few_ulp_is_rounding_and_more_is_not():
    near = divergence(gap=0.125)
    assert "position" not in verdict(comparison(None)) and verdict(comparison(None)) == "yes"
    assert "new token 4" in verdict(comparison(near)) and "rounding in bfloat16" in verdict(comparison(near))
    assert "more than rounding" in verdict(comparison(divergence(gap=2.0)))


def test_sampled_divergence_is_not_explained_by_logits():
    assert "sampled" in verdict(comparison(divergence(gap=2.0), seed=1))


def test_speed_leaves_out_the_first_token():
    run = comparison(None).plain[0]
    assert run.tokens_per_second == pytest.approx(2 / 0.5)
