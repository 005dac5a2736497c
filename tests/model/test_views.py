"""The layer function that both views run, against the stock model, and the twins it switches between."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from orthrus.model.attention import TWINS, add_twins, causal_attend, copy_twins, run_layers
from orthrus.model.masks import draft_mask
from orthrus.model.modeling import OrthrusLM, is_view_tensor
from tests.model.released import FIELDS, random_model

IDS = torch.tensor([[5, 9, 200, 3, 3, 17, 255], [1, 2, 3, 4, 5, 6, 7]])


def stock(model: OrthrusLM) -> Qwen3ForCausalLM:
    """The stock model with this one's AR weights."""
    fields = {n: getattr(model.config, n) for n in (*FIELDS, "tie_word_embeddings", "rope_parameters")}
    base = Qwen3ForCausalLM(Qwen3Config(**fields)).eval()
    base.load_state_dict({n: t for n, t in model.state_dict().items() if not is_view_tensor(n)})
    return base


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_ar_view_is_the_stock_forward(tied: bool, bias: bool):
    model = random_model(tied=tied, bias=bias)
    hidden = run_layers(model.model, IDS, positions(IDS), causal_attend, "ar")
    truth = stock(model)(IDS).logits
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


@torch.no_grad()
def test_view_pass_is_the_stock_model_with_the_twins_in_place_and_a_full_mask():
    model = random_model()
    swapped = stock(model)
    for layer, own in zip(swapped.model.layers, model.model.layers, strict=True):
        for name in TWINS:
            getattr(layer.self_attn, name).load_state_dict(getattr(own.self_attn, f"{name}_diff").state_dict())
    visible = draft_mask(torch.zeros(2, dtype=torch.long), torch.full((2,), 7), 7, 7)

    def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2)

    hidden = run_layers(model.model, IDS, positions(IDS), attend, "diffusion")
    bias = torch.zeros(2, 1, 7, 7)  # an additive mask of zeros: everything is visible
    truth = swapped(IDS, attention_mask=bias).logits
    torch.testing.assert_close(model.logits(hidden), truth, atol=2e-6, rtol=1e-5)


def test_twins_have_their_modules_shape_bias_and_dtype():
    for bias in (True, False):
        attention = (
            Qwen3ForCausalLM(Qwen3Config(**FIELDS | {"attention_bias": bias})).bfloat16().model.layers[0].self_attn
        )
        add_twins(attention)
        for name in TWINS:
            own, twin = getattr(attention, name), getattr(attention, f"{name}_diff")
            assert {n: p.shape for n, p in own.named_parameters()} == {n: p.shape for n, p in twin.named_parameters()}
            assert (getattr(twin, "bias", None) is not None) == (bias and "proj" in name)


def test_copied_twins_equal_their_modules_and_share_nothing():
    attention = random_model(bias=True).model.layers[0].self_attn
    copy_twins(attention)
    for name in TWINS:
        for own, twin in zip(
            getattr(attention, name).parameters(), getattr(attention, f"{name}_diff").parameters(), strict=True
        ):
            assert torch.equal(own, twin)
            assert own.data_ptr() != twin.data_ptr(), "training the view would change the base"


def test_view_parameters_are_all_twins_and_nothing_else():
    model = random_model(bias=True)
    names = set(model.view_parameters())
    per_layer = {f"{name}_diff.weight" for name in TWINS} | {f"{n}_diff.bias" for n in TWINS if n.endswith("proj")}
    assert names == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in per_layer}


def test_released_1_7b_has_168_twin_tensors_of_478():
    model = random_model()
    per_layer = len(model.view_parameters()) // 2
    assert 28 * per_layer == 168
    shared = len([n for n in model.state_dict() if not is_view_tensor(n)]) - 1  # a tied head is not stored
    assert 168 + 28 * (shared - 2) // 2 + 2 == 478
