"""The layer function that both views run, against the stock model, and the twins it switches between."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from orthrus.model.attention import TWINS, add_twins, causal_attend, copy_twins, run_layers
from orthrus.model.masks import draft_mask
from orthrus.model.modeling import OrthrusLM, is_view_tensor
from tests.families import VARIANTS, stock_twin
from tests.model.released import FIELDS, ROPE, random_model

IDS = torch.tensor([[5, 9, 200, 3, 3, 17, 255], [1, 2, 3, 4, 5, 6, 7]])


def stock(model: OrthrusLM, variant: str = "qwen3") -> PreTrainedModel:
    """The stock model with this one's AR weights."""
    return stock_twin(model, variant, FIELDS | ROPE, tie_word_embeddings=model.config.tie_word_embeddings)


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_ar_view_is_the_stock_forward(tied: bool, variant: str):
    model = random_model(tied=tied, variant=variant)
    hidden = run_layers(model.model, IDS, positions(IDS), causal_attend, "ar")
    truth = stock(model, variant)(IDS).logits
    torch.testing.assert_close(model.logits(hidden), truth, atol=2e-6, rtol=1e-5)
    assert torch.equal(model(IDS).logits, truth), "the model's own forward must be the base's, bit for bit"


@torch.no_grad()
def test_fresh_view_is_the_ar_view():
    model = random_model()
    before = run_layers(model.model, IDS, positions(IDS), causal_attend, "diffusion")
    model.init_view()
    ar = run_layers(model.model, IDS, positions(IDS), causal_attend, "ar")
    view = run_layers(model.model, IDS, positions(IDS), causal_attend, "diffusion")
    assert torch.equal(ar, view), "a copied view must compute what the AR view computes"
    assert not torch.equal(before, view), "the test must be able to tell the views apart"


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_view_pass_is_the_stock_model_with_the_twins_in_place_and_a_full_mask(variant: str):
    model = random_model(variant=variant)
    swapped = stock(model, variant)
    for layer, own in zip(swapped.model.layers, model.model.layers, strict=True):
        for name in (name for name in TWINS if hasattr(own.self_attn, name)):
            getattr(layer.self_attn, name).load_state_dict(getattr(own.self_attn, f"{name}_diff").state_dict())
    visible = draft_mask(torch.zeros(2, dtype=torch.long), torch.full((2,), 7), 7, 7)

    def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2)

    hidden = run_layers(model.model, IDS, positions(IDS), attend, "diffusion")
    bias = torch.zeros(2, 1, 7, 7)  # an additive mask of zeros: everything is visible
    truth = swapped(IDS, attention_mask=bias).logits
    torch.testing.assert_close(model.logits(hidden), truth, atol=2e-6, rtol=1e-5)


BIASED = {"qwen3-bias": "qkvo", "qwen2": "qkv", "qwen2-yarn": "qkv", "llama-bias": "qkvo"}
"""Which projections of a variant have a bias."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_twins_have_their_modules_shape_bias_and_dtype(variant: str):
    attention = stock(random_model(variant=variant), variant).bfloat16().model.layers[0].self_attn
    add_twins(attention)
    for name in TWINS:
        own, twin = getattr(attention, name, None), getattr(attention, f"{name}_diff", None)
        assert (own is not None) == (twin is not None) == ("proj" in name or variant.startswith("qwen3"))
        if own is not None and twin is not None:
            assert {n: p.shape for n, p in own.named_parameters()} == {n: p.shape for n, p in twin.named_parameters()}
            assert "norm" in name or twin.weight.dtype == torch.bfloat16
            has_bias = "proj" in name and name[0] in BIASED.get(variant, "")
            assert (getattr(twin, "bias", None) is not None) == has_bias


def test_copied_twins_equal_their_modules_and_share_nothing():
    attention = random_model(variant="qwen3-bias").model.layers[0].self_attn
    copy_twins(attention)
    for name in TWINS:
        for own, twin in zip(
            getattr(attention, name).parameters(), getattr(attention, f"{name}_diff").parameters(), strict=True
        ):
            assert torch.equal(own, twin)
            assert own.data_ptr() != twin.data_ptr(), "training the view would change the base"


def test_view_parameters_are_all_twins_and_nothing_else():
    model = random_model(variant="qwen3-bias")
    names = set(model.view_parameters())
    per_layer = {f"{name}_diff.weight" for name in TWINS} | {f"{n}_diff.bias" for n in TWINS if n.endswith("proj")}
    assert names == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in per_layer}


def test_released_1_7b_has_168_twin_tensors_of_478():
    model = random_model()
    per_layer = len(model.view_parameters()) // 2
    assert 28 * per_layer == 168
    shared = len([n for n in model.state_dict() if not is_view_tensor(n)]) - 1  # a tied head is not stored
    assert 168 + 28 * (shared - 2) // 2 + 2 == 478
