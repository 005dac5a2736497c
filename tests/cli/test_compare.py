"""Where two texts part, `--compare` says where, how close the decision was, and whether rounding explains it."""

import dataclasses

import pytest
import torch

from orthrus.cli.compare import Comparison, Divergence, find_divergence, verdict
from orthrus.cli.session import Answer
from orthrus.config import OrthrusConfig
from orthrus.decoding.stats import DecodingStats
from orthrus.model.modeling import OrthrusLM


def comparison(divergence: Divergence | None, *, seed: int | None = None) -> Comparison:
    """A comparison that found this divergence."""
    answer = Answer(
        token_ids=[1, 2, 3],
        finish_reason="length",
        stats=DecodingStats(block_size=8),
        prefill_s=0.1,
        decode_s=0.5,
    )
    facts = {"dtype": "bfloat16", "seed": seed}
    return Comparison(plain=[answer], drafted=[answer], divergence=divergence, facts=facts, text="")


def test_equal_answers_have_no_divergence():
    assert find_divergence(None, [1], [2, 3], [2, 3]) is None


@pytest.mark.parametrize(("drafted", "position"), [([5, 9, 7], 1), ([5], 1), ([5, 6, 7, 8], 3)])
def test_divergence_is_the_first_difference_and_its_gap_is_the_models(
    tiny_config: OrthrusConfig, drafted: list[int], position: int
):
    model, prompt, plain = OrthrusLM(tiny_config).eval(), [1, 2, 3], [5, 6, 7]
    found = find_divergence(model, prompt, plain, drafted)
    assert found is not None and found.position == position
    ids_BT = torch.tensor([[*prompt, *plain[:position]]])
    with torch.inference_mode():
        logits_V = model(input_ids=ids_BT).logits[0, -1].float()
    best = logits_V.topk(2).values
    assert found.gap == pytest.approx(float(best[0] - best[1]), abs=1e-5)


def test_gap_of_a_few_ulp_is_rounding_and_more_is_not():
    near = Divergence(position=4, gap=0.125, ulps=1.0)
    assert "position" not in verdict(comparison(None)) and verdict(comparison(None)) == "yes"
    assert "new token 4" in verdict(comparison(near)) and "rounding in bfloat16" in verdict(comparison(near))
    far = dataclasses.replace(near, gap=2.0, ulps=16.0)
    assert "more than rounding" in verdict(comparison(far))


def test_sampled_divergence_is_not_explained_by_logits():
    assert "sampled" in verdict(comparison(Divergence(position=4, gap=2.0, ulps=16.0), seed=1))


def test_ulp_is_of_the_largest_logit_in_the_models_dtype(tiny_config: OrthrusConfig):
    model = OrthrusLM(tiny_config).to(torch.bfloat16).eval()
    found = find_divergence(model, [1, 2], [3], [4])
    assert found is not None
    # Both logits are bf16 numbers, so near the largest one their gap is a whole number of its ulp or half-ulp.
    assert found.ulps * 16 == pytest.approx(round(found.ulps * 16))


def test_speed_leaves_out_the_first_token():
    answer = comparison(None).plain[0]
    assert answer.tokens_per_second == pytest.approx(2 / 0.5)
