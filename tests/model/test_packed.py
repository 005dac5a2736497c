"""Packed weights: the same bits as plain products, never stale, and not used where they must not be."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import orthrus.model.packed as packed
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.decoding.portable import PortableBackend
from orthrus.model.attention import View, causal_attend, run_layers
from orthrus.model.packed import Norm, PackedModel, Product, can_pack, pack
from tests.decoding.subjects import BLOCK, MASK, SHAPE, decode_all, random_prompt, randomise, request, subject
from tests.families import OTHERS, dual_config

pytestmark = pytest.mark.skipif(not packed.has_packed_products(torch.float32), reason="no packed products here")
IDS = torch.tensor([random_prompt(11), random_prompt(11, seed=1)])
DTYPES = [d for d in (torch.float32, torch.bfloat16) if packed.has_packed_products(d)]


def fresh(dtype: torch.dtype = torch.float32, variant: str = "qwen3", **fields) -> OrthrusForCausalLM:
    """A model that a test may edit; its norms and biases are random too."""
    config = dual_config(variant, SHAPE, block_size=BLOCK, mask_token_id=MASK, **fields)
    config._attn_implementation = "sdpa"
    model = OrthrusForCausalLM(config).eval()
    randomise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


@torch.inference_mode()
def hidden(model: nn.Module, view: View, *, is_packed: bool) -> Tensor:
    positions = torch.stack([torch.arange(11), torch.arange(5, 16)])
    if not is_packed:
        return run_layers(model.model, IDS, positions, causal_attend, view)
    found = pack(model)
    assert found is not None
    return found.run(IDS, positions, causal_attend, view)


# --- the numbers


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="no bf16 products here")
@pytest.mark.parametrize("num_rows", [1, 3, 8, 16, 32, 257])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_joined_product_has_the_bits_of_its_parts(num_rows: int, bias: bool):
    torch.manual_seed(num_rows)
    parts = [nn.Linear(512, width, bias=bias, dtype=torch.bfloat16) for width in (512, 256, 256)]
    x = torch.randn(1, num_rows, 512, dtype=torch.bfloat16)
    expected = torch.cat([F.linear(x, part.weight, part.bias) for part in parts], dim=-1)
    assert torch.equal(Product(*parts)(x), expected)


@torch.inference_mode()
def test_a_joined_product_mixes_parts_with_and_without_bias():
    parts = [nn.Linear(16, 8), nn.Linear(16, 24, bias=False)]
    x = torch.randn(5, 16)
    torch.testing.assert_close(Product(*parts)(x), torch.cat([part(x) for part in parts], dim=-1))


@pytest.mark.parametrize("view", ["ar", "diffusion"])
@pytest.mark.parametrize(
    "fields", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}, *({"variant": name} for name in OTHERS)]
)
@torch.inference_mode()
def test_fp32_passes_are_the_plain_ones(view: View, fields: dict):
    model = fresh(**fields)
    plain, ours = (hidden(model, view, is_packed=p) for p in (False, True))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    found = pack(model)
    assert found is not None
    torch.testing.assert_close(found.logits(ours), model.logits(plain), rtol=1e-3, atol=1e-3)
    other = hidden(model, "ar" if view == "diffusion" else "diffusion", is_packed=True)
    assert not torch.allclose(ours, other, atol=1e-2), "the comparison cannot tell the views apart"


@pytest.mark.parametrize("shape", [(512,), (12, 64), (20, 64), (3, 24)])
def test_a_norm_gives_a_row_the_same_bits_among_any_number_of_rows(shape: tuple[int, ...]):
    """Exact decoding rests on it: a plain step's one row is a verify pass's row in another place."""
    torch.manual_seed(0)
    norm = Norm(torch.rand(shape), 1e-6)
    row = torch.randn(shape)
    alone = norm(row[None, None])
    for num_rows in range(1, 65):
        rows = norm(row.expand(1, num_rows, *shape).contiguous())
        assert (rows == alone).all(), f"{num_rows} rows: a row's bits depend on where it stands"


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_low_precision_is_no_further_from_the_truth_than_the_plain_passes(dtype: torch.dtype):
    """Against fp64; a rounding left out or added is a few percent, a mistake is a multiple."""
    model = fresh(dtype)
    truth = hidden(copy.deepcopy(model).double(), "ar", is_packed=False)
    plain, ours = ((hidden(model, "ar", is_packed=p).double() - truth).square().mean().sqrt() for p in (False, True))
    assert ours < 1.5 * plain


@torch.inference_mode()
def test_other_rope_types_are_asked_each_time():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = fresh(rope_parameters=rope)
    assert model.model.rotary_emb.rope_type == "linear"
    plain, ours = (hidden(model, "ar", is_packed=p) for p in (False, True))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, hidden(fresh(), "ar", is_packed=True), atol=1e-2), "the rope type changes nothing"


def test_texts_are_the_same_packed_or_not(monkeypatch):
    requests = [request(random_prompt(length, seed=length), 30) for length in (3, 17)]
    ours, _ = decode_all(Decoder(PortableBackend(subject())), requests)
    monkeypatch.setattr(packed, "MAX_BYTES", 0)
    plain, _ = decode_all(Decoder(PortableBackend(subject())), requests)
    assert ours == plain


# --- never stale


def edit_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1


def edit_data(model: nn.Module) -> None:
    model.model.layers[0].self_attn.k_proj_diff.weight.data[0, 0] += 1


def edit_norm_data(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_norm.weight.data[0] += 1


def edit_bias(model: nn.Module) -> None:
    model.model.layers[1].self_attn.o_proj.bias.data += 0.5


def replace_parameter(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)


def replace_data(model: nn.Module) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data.clone()


def swap_rows(model: nn.Module) -> None:
    """The sum of the bits stays; the version counter tells."""
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.copy_(weight.flip(0))


def load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


EDITS = [edit_in_place, edit_data, edit_norm_data, edit_bias, replace_parameter, replace_data, swap_rows, load]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_any_edit_is_noticed(edit: Callable[[nn.Module], None], dtype: torch.dtype):
    model = fresh(dtype, attention_bias=True)
    before = pack(model)
    assert before is not None and pack(model) is before, "packed anew though nothing changed"
    edit(model)
    assert pack(model) is not before


@torch.inference_mode()
def test_weights_made_in_inference_mode_are_watched_too():
    model = fresh()
    before = pack(model)
    assert pack(model) is before
    model.lm_head.weight[0, 0] += 1
    assert pack(model) is not before


def test_an_edit_of_an_mlp_bias_is_noticed():
    """Only some families have biases there."""
    model = fresh(variant="llama-bias")
    for linear in ("gate_proj", "up_proj", "down_proj"):
        before = pack(model)
        assert before is not None and pack(model) is before
        getattr(model.model.layers[1].mlp, linear).bias.data += 0.5
        assert pack(model) is not before, f"an edit of {linear}'s bias goes unseen"


@pytest.mark.parametrize("edit", [edit_in_place, load], ids=lambda edit: edit.__name__)
def test_an_open_backend_decodes_with_the_weights_of_the_moment(edit: Callable[[nn.Module], None]):
    model = fresh()
    backend = PortableBackend(model)
    r = request(random_prompt(5), 20, logits=True)

    def logits(backend: PortableBackend) -> Tensor:
        _, records = decode_all(Decoder(backend), [r])
        return torch.cat([record.logits for record in records if record.logits is not None])[0]

    before = logits(backend)
    edit(model)
    after = logits(backend)
    assert not torch.equal(before, after), "the edit changed nothing"
    assert torch.equal(after, logits(PortableBackend(copy.deepcopy(model))))


def replace_embedding(model: nn.Module) -> None:
    model.set_input_embeddings(nn.Embedding.from_pretrained(torch.randn(SHAPE["vocab_size"], SHAPE["hidden_size"])))


def widen_rope(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq *= 0.5


def other_activation(model: nn.Module) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


@pytest.mark.parametrize("edit", [replace_embedding, widen_rope, other_activation], ids=lambda edit: edit.__name__)
@torch.inference_mode()
def test_what_is_not_a_packed_weight_is_current_too(edit: Callable[[nn.Module], None]):
    model = fresh()
    before = hidden(model, "ar", is_packed=True)
    edit(model)
    ours = hidden(model, "ar", is_packed=True)
    torch.testing.assert_close(ours, hidden(model, "ar", is_packed=False), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-2), "the edit changed nothing"


def test_the_copy_dies_with_the_model():
    model = fresh()
    alive = weakref.ref(pack(model))
    assert alive() is not None
    del model
    gc.collect()
    assert alive() is None, "the packed copy outlives its model"


# --- not where it must not be


class Adapter(nn.Linear):
    """A linear layer of another kind, as adapters and quantisers put in place."""


def hook(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output * 0)


def hook_mlp(model: nn.Module) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 0,))


def adapt(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj = Adapter(32, 32, bias=False)


def parametrise(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.lm_head)


def subclass_mlp(model: nn.Module) -> None:
    mlp = model.model.layers[0].mlp
    mlp.__class__ = type("OtherMLP", (type(mlp),), {"forward": lambda self, x: x})


def override_forward(model: nn.Module) -> None:
    model.lm_head.forward = lambda x: x


def mix_dtypes(model: nn.Module) -> None:
    model.lm_head.to(torch.float64)


def transpose_weight(model: nn.Module) -> None:
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().t().contiguous().t())


@pytest.mark.parametrize(
    "change",
    [hook, hook_mlp, adapt, parametrise, override_forward, mix_dtypes, transpose_weight, subclass_mlp],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("variant", ["qwen3", "llama3"])
def test_layers_that_are_not_plain_run_as_they_are(change: Callable[[nn.Module], None], variant: str):
    model = fresh(variant=variant)
    kept = weakref.ref(pack(model))
    change(model)
    assert not can_pack(model) and pack(model) is None
    gc.collect()
    assert kept() is None, "a copy that nobody may use is kept"


def test_other_dtypes_and_devices_are_left_alone():
    assert not can_pack(fresh(torch.float64))
    assert not can_pack(fresh().to("meta"))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_switching_onednn_off_switches_packing_off():
    model = fresh()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not can_pack(model)
    assert can_pack(model)


def test_large_models_are_not_copied(monkeypatch):
    model = fresh()
    monkeypatch.setattr(packed, "MAX_BYTES", packed.num_bytes(model))
    assert isinstance(pack(model), PackedModel)
    monkeypatch.setattr(packed, "MAX_BYTES", packed.num_bytes(model) - 1)
    assert pack(model) is None


def test_torch_without_the_operators_decodes_plainly(monkeypatch):
    monkeypatch.setattr(packed, "OPERATORS", ("_an_operator_that_nobody_has",))
    backend = PortableBackend(subject())
    r = request(random_prompt(5), 12)
    text, _ = decode_all(Decoder(backend), [r])
    assert backend._packed is None
    monkeypatch.undo()
    packed_backend = PortableBackend(subject())
    assert decode_all(Decoder(packed_backend), [r])[0] == text
    assert packed_backend._packed is not None


def test_a_hook_set_while_decoding_is_honoured_from_the_next_request_on():
    model = fresh()
    backend = PortableBackend(model)
    decode_all(Decoder(backend), [request(random_prompt(5), 4)])
    assert backend._packed is not None
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(1))
    decode_all(Decoder(backend), [request(random_prompt(5), 4)])
    assert seen and backend._packed is None
