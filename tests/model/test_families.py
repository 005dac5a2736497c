"""What the families share: the LM head over the decoder, the layer function, and the passes of training."""

import ast
import copy
import inspect
import sys
import textwrap
from types import FunctionType

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, eager_attention_forward

from orthrus.datagen.regenerate import continue_rows
from orthrus.model.bases import ROWS, Family, family_of
from orthrus.model.modeling import OrthrusLM
from orthrus.training.anchors import Blocks
from orthrus.training.forward import Passes, block_mask
from orthrus.training.rows import one_reply_rows
from tests.decoding.checks import reference_draft
from tests.decoding.subjects import BLOCK, MASK, random_prompt, stock, stock_text, subject
from tests.families import ONE_EACH, OTHERS, VARIANTS, dual_config, family, fields_of, stock_twin
from tests.model.released import FIELDS, ROPE, random_model

IDS = torch.tensor([[5, 9, 200, 3, 3, 17, 255], [1, 2, 3, 4, 5, 6, 7]])


def code_of(function: FunctionType, family: Family) -> str:
    """A function's source without comments, docstring, decorators and annotations, its family's name left out."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition):
        del definition.body[0]
    definition.decorator_list.clear()
    for argument in (*definition.args.args, *definition.args.kwonlyargs):
        argument.annotation = None
    return ast.unparse(definition).replace(family.decoder.__name__.removesuffix("Model"), "Family")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_is_taken_from_qwen3_for_all_families_is_written_the_same_in_each(row: Family):
    """One head, one attention function and one MLP formula stand for all families: transformers must agree."""
    host = MODEL_FOR_CAUSAL_LM_MAPPING[row.stock_config]
    qwen3 = family_of(ROWS[0].config())
    assert code_of(host.forward, row) == code_of(Qwen3ForCausalLM.forward, qwen3)
    assert code_of(host.__init__, row) == code_of(Qwen3ForCausalLM.__init__, qwen3)
    module = sys.modules[row.decoder.__module__]
    assert code_of(module.eager_attention_forward, row) == code_of(eager_attention_forward, qwen3)
    assert code_of(row.mlp.forward, row) == code_of(Qwen3MLP.forward, qwen3)
    assert host._tied_weights_keys == OrthrusLM._tied_weights_keys
    flags = [n for n in dir(host) if n.startswith("_supports_") and isinstance(getattr(host, n), bool)]
    flags += ["_tp_plan", "_pp_plan"]
    assert "_supports_sdpa" in flags
    assert {n: getattr(host, n) for n in flags} == {n: getattr(OrthrusLM, n) for n in flags}


@pytest.mark.parametrize("variant", ["qwen3", *ONE_EACH])
def test_a_seed_gives_the_weights_that_it_gives_the_stock_class(variant: str):
    """Recipes that start a base from a seed rest on it."""
    torch.manual_seed(3)
    model = OrthrusLM(dual_config(variant, FIELDS, tie_word_embeddings=False, mask_token_id=263))
    torch.manual_seed(3)
    stock_config = family(variant).stock_config(**fields_of(variant, FIELDS), tie_word_embeddings=False)
    fresh = AutoModelForCausalLM.from_config(stock_config).state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.items())


@pytest.mark.parametrize("variant", OTHERS)
def test_forward_is_the_stock_classes_in_full(variant: str):
    """Loss, cache, padding and hidden states too, as whoever trains or probes the AR view asks for them."""
    model = random_model(variant=variant)
    twin = stock_twin(model, variant, FIELDS | ROPE, tie_word_embeddings=True)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    settings: dict = dict(labels=IDS, attention_mask=mask, output_hidden_states=True, use_cache=True)
    ours, truth = (m(IDS, logits_to_keep=0, **settings) for m in (model, twin))
    assert torch.equal(ours.loss, truth.loss) and torch.equal(ours.logits, truth.logits)
    assert len(ours.hidden_states) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, truth.hidden_states, strict=True))
    after = [m(IDS[:, :1], past_key_values=o.past_key_values).logits for m, o in ((model, ours), (twin, truth))]
    assert torch.equal(*after)
    assert set(twin._no_split_modules) <= set(model._no_split_modules), "device maps would cut a layer in two"


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_training_passes_are_those_of_decoding(variant: str):
    """Training and the generation of its data know no family: they run through the same layer function."""
    model, prompt, anchor = subject(variant=variant), random_prompt(20), 12
    ids = torch.tensor([prompt])
    blocks, anchors = Blocks.of(((BLOCK, 1),)), torch.tensor([[anchor]])
    rows = one_reply_rows(ids, torch.tensor([1]), torch.tensor([20]))
    passes = Passes(model, compiled=False)
    hidden, clean = passes.ar(ids)
    torch.testing.assert_close(model.logits(hidden), stock(variant=variant)(ids).logits, atol=1e-3, rtol=1e-3)
    drafted = passes.blocks(blocks.inputs(rows, anchors, MASK), clean, block_mask(blocks, anchors, num_clean=20))
    expected = reference_draft(model, prompt[: anchor + 1], BLOCK - 1)
    assert model.logits(drafted)[0, :-1].argmax(-1).tolist() == expected
    assert continue_rows(model, ids, 40)[0, 20:].tolist() == stock_text(prompt, 20, variant=variant)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["qwen3", *ONE_EACH])
@torch.no_grad()
def test_attention_is_scaled_as_the_base_scales_it(variant: str, implementation: str):
    """Every family scales by head_dim ** -0.5, so a scale of our own would go unseen: give the layers another one."""
    model = copy.deepcopy(subject(implementation=implementation, variant=variant))
    twin = copy.deepcopy(stock(implementation=implementation, variant=variant))
    for layer in (*model.model.layers, *twin.model.layers):
        layer.self_attn.scaling *= 0.25
    ids = torch.tensor([random_prompt(9)])
    expected = twin.generate(ids, max_new_tokens=20)
    assert model.generate(ids, max_new_tokens=20).tolist() == expected.tolist()
    assert expected[0, 9:].tolist() != stock_text(ids[0].tolist(), 20, variant=variant), "the scale changes nothing"
    hidden, _ = Passes(model, compiled=False).ar(ids)
    torch.testing.assert_close(model.logits(hidden), twin(ids).logits, atol=1e-3, rtol=1e-3)
