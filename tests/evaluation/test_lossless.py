"""Two decodings of one prompt: where they part, and whether the model's own logits explain it."""

import json
import math

import pytest
import torch

from orthrus.config import OrthrusConfig
from orthrus.evaluation.lossless import FEW_ULP, ar_logits, find_divergence, first_difference, unit_in_last_place
from orthrus.model.modeling import OrthrusLM

PROMPT = [1, 2, 3]


@pytest.fixture
def model(tiny_config: OrthrusConfig) -> OrthrusLM:
    return OrthrusLM(tiny_config).eval()


def test_equal_texts_do_not_part_and_the_model_is_not_asked():
    assert find_divergence(None, PROMPT, [2, 3], [2, 3]) is None
    assert first_difference([], []) is None


@pytest.mark.parametrize(("second", "position"), [([5, 9, 7], 1), ([5], 1), ([5, 6, 7, 8], 3), ([], 0)])
def test_position_is_the_first_difference_and_the_logits_are_the_models(
    model: OrthrusLM, second: list[int], position: int
):
    first = [5, 6, 7]
    found = find_divergence(model, PROMPT, first, second)
    assert found is not None and found.position == position
    ids_1T = torch.tensor([[*PROMPT, *first[:position]]])
    with torch.inference_mode():
        logits_V = model(input_ids=ids_1T).logits[0, -1]
    assert found.top_logits == pytest.approx(logits_V.topk(2).values.tolist(), abs=1e-5)
    assert found.gap == pytest.approx(found.top_logits[0] - found.top_logits[1])


def best_tokens(model: OrthrusLM) -> list[int]:
    """All tokens from the likeliest to the least likely behind the prompt."""
    return ar_logits(model, PROMPT).argsort(descending=True).tolist()


@torch.no_grad()
def make_tie(model: OrthrusLM, gap: float) -> tuple[int, int]:
    """Give the second best token behind the prompt the best one's logit minus `gap`; best and second best."""
    best, second = best_tokens(model)[:2]
    head = model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untied from the embedding
    head[second] = head[best] * (1 - gap / float(ar_logits(model, PROMPT)[best]))
    return best, second


def test_flip_of_two_equal_logits_is_rounding(model: OrthrusLM):
    best, second = make_tie(model, gap=0.0)
    found = find_divergence(model, PROMPT, [best], [second])
    assert found is not None and found.is_rounding and found.ulps <= 1, found


def test_flip_beyond_a_few_ulp_is_no_rounding_and_its_gap_is_the_planted_one(model: OrthrusLM):
    best, second = make_tie(model, gap=1e-3)
    found = find_divergence(model, PROMPT, [best], [second])
    assert found is not None and not found.is_rounding
    assert found.gap == pytest.approx(1e-3, rel=1e-2)
    assert found.ulps == pytest.approx(found.gap / unit_in_last_place(found.top_logits[0], torch.float32))
    assert found.ulps > FEW_ULP


def test_third_token_at_a_tie_of_two_is_no_rounding(model: OrthrusLM):
    best, _ = make_tie(model, gap=0.0)
    worst = best_tokens(model)[-1]
    found = find_divergence(model, PROMPT, [best], [worst])
    assert found is not None and found.ulps <= 1, "the model's own decision was a tie"
    assert not found.is_rounding, "but one text wrote a token that no rounding makes the best"


def test_text_that_ends_early_is_no_rounding(model: OrthrusLM):
    best, _ = make_tie(model, gap=0.0)
    found = find_divergence(model, PROMPT, [best], [])
    assert found is not None and math.isinf(found.shortfall) and not found.is_rounding
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["rounding"] is False


@pytest.mark.parametrize(
    ("value", "dtype", "ulp"),
    [
        (1.0, torch.bfloat16, 2.0**-7), (-17.0, torch.bfloat16, 2.0**-3), (15.9, torch.bfloat16, 2.0**-4),
        (1.0, torch.float32, 2.0**-23), (3.0, torch.float16, 2.0**-9),
    ],
)  # fmt: skip
def test_ulp_is_the_step_to_the_next_number(value: float, dtype: torch.dtype, ulp: float):
    assert unit_in_last_place(value, dtype) == ulp
    held = torch.tensor(value).to(dtype)
    step = torch.nextafter(held.abs(), torch.tensor(torch.inf, dtype=dtype)) - held.abs()
    assert float(step) == ulp
    assert unit_in_last_place(0.0, dtype) > 0


def test_ulp_is_of_the_models_dtype(tiny_config: OrthrusConfig):
    model = OrthrusLM(tiny_config).to(torch.bfloat16).eval()
    found = find_divergence(model, PROMPT, [3], [4])
    assert found is not None
    # Both logits are bf16 numbers, so near the largest one their gap is a whole number of its ulp or half-ulp.
    assert found.ulps * 16 == pytest.approx(round(found.ulps * 16))
