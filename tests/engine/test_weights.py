"""Joined weights: one memory for the model and the engine, and nothing computed otherwise than the modules would."""

import copy

import pytest
import torch
from torch import nn

from orthrus.decoding.decoder import Decoder
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.engine.engine import EngineBackend
from orthrus.engine.quantise import quantise_weight
from orthrus.engine.weights import (
    Matrix,
    Weights,
    check_draft_precision,
    copies_bytes,
    join,
    rotary_tables,
    take_weights,
)
from orthrus.model.attention import View
from tests.decoding.subjects import decode_all, random_prompt, request, stock_text, subject
from tests.families import VARIANTS


def storages(model: nn.Module) -> dict[int, int]:
    """Address and bytes of every piece of memory behind the parameters."""
    found = (parameter.untyped_storage() for parameter in model.parameters())
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_and_the_engine_share_one_memory(tied: bool):
    model = copy.deepcopy(subject(tied))
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([random_prompt(9)])
    before, num_bytes = model(input_ids=ids).logits, sum(storages(model).values())
    weights = take_weights(model)
    assert sum(storages(model).values()) == num_bytes, "something was kept twice"
    addresses = storages(model)
    taken = [weights.embedding_VD, weights.head["ar"].weight_ED, weights.norm_D]
    for layer in weights.layers:
        taken += [
            layer.input_norm_D,
            layer.post_norm_D,
            layer.mlp["ar"].gate_up.weight_ED,
            layer.mlp["ar"].down.weight_ED,
        ]
        for view in layer.attention.values():
            taken += [view.qkv.weight_ED, view.out.weight_ED]
    assert all(tensor.untyped_storage().data_ptr() in addresses for tensor in taken), "the engine holds a copy"
    assert (weights.embedding_VD.data_ptr() == weights.head["ar"].weight_ED.data_ptr()) == tied
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)


def test_the_views_rows_are_queries_keys_values_then_gate_up():
    model = copy.deepcopy(subject(variant="qwen2"))
    layer, attention = take_weights(model).layers[1], model.model.layers[1].self_attn
    for view, suffix in (("ar", ""), ("diffusion", "_diff")):
        projections = [getattr(attention, f"{name}_proj{suffix}") for name in "qkv"]
        assert torch.equal(layer.attention[view].qkv.weight_ED, torch.cat([p.weight for p in projections]))
        bias_E = layer.attention[view].qkv.bias_E
        assert bias_E is not None and torch.equal(bias_E, torch.cat([p.bias for p in projections]))
        assert torch.equal(layer.attention[view].out.weight_ED, getattr(attention, f"o_proj{suffix}").weight)
    mlp = model.model.layers[1].mlp
    assert torch.equal(layer.mlp["ar"].gate_up.weight_ED, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))


def matrices(weights: Weights, view: View) -> list[Matrix]:
    """All that a pass in one view multiplies by."""
    found = [weights.head[view]]
    for layer in weights.layers:
        attention, mlp = layer.attention[view], layer.mlp[view]
        found += [attention.qkv, attention.out, mlp.gate_up, mlp.down]
    return found


@pytest.mark.parametrize(("tied", "variant"), [(True, "qwen3"), (False, "qwen2")])
def test_copies_for_drafts_are_of_what_drafts_read_and_nothing_else(tied: bool, variant: str):
    model = copy.deepcopy(subject(tied, variant=variant))
    plain = take_weights(model)
    before = storages(model)
    weights = take_weights(model, "fp8")
    assert storages(model) == before, "the model's own memory changed"
    for one, other in zip(matrices(weights, "ar"), matrices(plain, "ar"), strict=True):
        assert one.scale_E is None and one.weight_ED.data_ptr() == other.weight_ED.data_ptr(), "the verifier reads fp8"
    for one, other in zip(matrices(weights, "diffusion"), matrices(plain, "diffusion"), strict=True):
        quantised_ED, scale_E = quantise_weight(other.weight_ED)
        assert one.scale_E is not None and torch.equal(one.scale_E, scale_E)
        assert torch.equal(one.weight_ED.float(), quantised_ED.float()), "a copy of another matrix"
        if other.bias_E is None:
            assert one.bias_E is None
        else:
            assert one.bias_E is not None and torch.equal(one.bias_E, other.bias_E)
    copied = [matrix.weight_ED for matrix in matrices(plain, "diffusion")]
    assert weights.draft_bytes == sum(weight.numel() + 4 * len(weight) for weight in copied)
    assert plain.draft_bytes == 0


def test_a_draft_precision_that_is_none_is_refused_by_name():
    with pytest.raises(ValueError, match=r"must be one of fp8 or None, got 'int4'"):
        EngineBackend(copy.deepcopy(subject()), num_pages=20, draft_precision="int4")  # pyrefly: ignore[bad-argument-type]


def test_an_edit_in_place_reaches_the_engine():
    model = copy.deepcopy(subject())
    decoder = Decoder(EngineBackend(model, num_pages=20))
    model.load_state_dict(subject(seed=5).state_dict())
    prompt = random_prompt(7)
    assert decode_all(decoder, [request(prompt, 15)])[0][0] == stock_text(prompt, 15, seed=5)


def test_a_second_engine_takes_no_more_memory():
    model = copy.deepcopy(subject())
    first = take_weights(model)
    before = storages(model)
    second = take_weights(model)
    assert storages(model) == before
    assert (
        first.layers[0].mlp["ar"].gate_up.weight_ED.data_ptr()
        == second.layers[0].mlp["ar"].gate_up.weight_ED.data_ptr()
    )
    parts = [nn.Parameter(torch.randn(n, 3)) for n in (2, 5, 4)]
    whole = join(parts)
    assert join(parts).data_ptr() == whole.data_ptr()
    assert join(parts[::-1]).data_ptr() != whole.data_ptr(), "another order is another tensor"


def test_a_model_with_joined_weights_can_be_saved(tmp_path):
    model = copy.deepcopy(subject())
    model.config.name_or_path = ""
    take_weights(model)
    model.save_pretrained(tmp_path)
    loaded = OrthrusForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_weights_that_were_moved_are_refused_at_admission():
    model = copy.deepcopy(subject())
    decoder = Decoder(EngineBackend(model, num_pages=20))
    decoder.admit(request(random_prompt(3), 2))
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(model.model.layers[1].mlp.down_proj.weight.clone())
    with pytest.raises(ValueError, match="build a new engine"):
        decoder.admit(request(random_prompt(3), 2))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj_diff", "model.layers.1", "model.layers.0.mlp"])
def test_what_would_not_be_run_is_refused(name: str):
    model = copy.deepcopy(subject())
    decoder = Decoder(EngineBackend(model, num_pages=20))
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match=name):
        take_weights(model)
    with pytest.raises(ValueError, match=name):
        decoder.admit(request(random_prompt(3), 2))
    hook.remove()
    decoder.admit(request(random_prompt(3), 2))


@pytest.mark.parametrize("variant", ["qwen3", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_copies_take_is_known_before_they_are_made(tied: bool, variant: str):
    model = copy.deepcopy(subject(tied, variant=variant))
    expected = copies_bytes(model, "fp8")
    before = sum(storages(model).values())
    assert take_weights(model, "fp8").draft_bytes == expected > 0
    assert copies_bytes(model, None) == take_weights(model).draft_bytes == 0
    assert sum(storages(model).values()) == before


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_draft_precision(None, torch.device("cuda"))
    with pytest.raises(ValueError, match="compute capability 8.9 or more.*this one has 8.0"):
        check_draft_precision("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_draft_precision("fp8", torch.device("cuda"))


def test_weights_of_several_dtypes_are_refused():
    model = copy.deepcopy(subject())
    model.model.layers[0].mlp.bfloat16()
    with pytest.raises(ValueError, match="bfloat16 on cpu, torch.float32 on cpu"):
        take_weights(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_angles_are_the_models_own_at_every_position(variant: str):
    model = subject(variant=variant)
    rotary = rotary_tables(model, 256)
    for position in (0, 1, 63, 64, 255):
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[position]]))
        assert torch.equal(rotary.cos_TH[position], cos[0, 0]) and torch.equal(rotary.sin_TH[position], sin[0, 0])
