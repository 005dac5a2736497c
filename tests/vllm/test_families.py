"""vLLM's Llama, Qwen2 and Mistral with a view against this project's own decoder: small random models, fp32, a CPU."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.model.bases import FAMILIES, ROWS
from orthrus.model.export import save_merged, save_view
from orthrus.model.modeling import is_view_tensor
from tests.decoding.subjects import randomise
from tests.families import VARIANTS, randomise_vectors
from tests.vllm.subjects import V2, Expected, decoded, plain_of, round_over, run

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm-test")

VOCABULARY, BLOCK, NUM_NEW = 96, 8, 40
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
SUBJECTS: dict[str, dict[str, Any]] = {
    # Biases everywhere, heads wider than hidden_size / num_attention_heads, scaled angles, a head of its own.
    "llama": VARIANTS["llama3"]
    | {"attention_bias": True, "mlp_bias": True, "head_dim": 64, "tie_word_embeddings": False},
    # A bias in three of four projections, scaled angles, a tied head.
    "qwen2": VARIANTS["qwen2-yarn"] | {"tie_word_embeddings": True},
    # No bias, one key head.
    "mistral": VARIANTS["mistral-dynamic"] | {"num_key_value_heads": 1, "tie_word_embeddings": False},
}
NAMES = pytest.mark.parametrize("name", SUBJECTS)
RUNNERS = pytest.mark.parametrize("env", [None, V2], ids=["V1", "V2"])


def fields_of(name: str) -> dict[str, Any]:
    return SHAPE | {field: value for field, value in SUBJECTS[name].items() if field != "model_type"}


@cache
@torch.no_grad()
def subject(name: str) -> OrthrusForCausalLM:
    """A random model that mostly follows its text, so that a view near its own projections drafts some tokens well."""
    config = FAMILIES[name].config(**fields_of(name), block_size=BLOCK, mask_token_id=VOCABULARY - 1)
    model = OrthrusForCausalLM(config).eval()
    randomise(model, seed=0, std=0.08)
    randomise_vectors(model, seed=0)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 6
    model.init_view()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.view_parameters().values():
        parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """8 prompts, the longest of which reach into a second page of the cache."""
    generator = torch.Generator().manual_seed(2)
    lengths = [3, 180, 125, 7, 25, 43, 61, 79]
    return tuple(tuple(torch.randint(VOCABULARY - 1, (n,), generator=generator).tolist()) for n in lengths)


@cache
def expected(name: str, num_prompts: int) -> Expected:
    return decoded(subject(name), prompts()[:num_prompts], BLOCK, NUM_NEW)


def save_base(name: str, folder: Path) -> Path:
    """The subject's base as transformers writes it."""
    config = FAMILIES[name].stock_config(**fields_of(name))
    stock = AutoModelForCausalLM.from_config(config)
    weights = {tensor: value for tensor, value in subject(name).state_dict().items() if not is_view_tensor(tensor)}
    stock.load_state_dict(weights)
    stock.save_pretrained(folder)
    return folder


def engine(*faults: str, **settings: Any) -> dict[str, Any]:
    """A round over all prompts, then one over the first three for each fault."""
    sampling = {"max_tokens": NUM_NEW, "detokenize": False}
    plan = [round_over(prompts(), **sampling)]
    plan += [round_over(prompts()[:3], fault=fault, **sampling) for fault in faults]
    return run(
        plan, block_size=BLOCK, skip_tokenizer_init=True, max_model_len=256, long_prefill_token_threshold=64, **settings
    )


def check_text(answer: dict[str, Any], name: str) -> None:
    own = plain_of(prompts()[: len(answer["tokens"])], NUM_NEW, subject(name))
    assert answer["tokens"] == own, "the text is not plain decoding's"


def check_drafts(answer: dict[str, Any], name: str) -> None:
    own, counted = expected(name, len(answer["tokens"])), answer["counters"]
    assert counted["accepted_tokens_per_pos"] == own.accepted_per_position, "the view drafts something else"
    assert counted["drafts"] == [own.num_drafts]
    assert counted["draft_tokens"] == [own.num_drafts * (BLOCK - 1)]


@NAMES
def test_subject_keeps_some_drafts_at_every_distance_and_not_all(name: str):
    own = expected(name, len(prompts()))
    assert all(0 < kept < own.num_drafts for kept in own.accepted_per_position)
    assert sum(own.accepted_per_position) > own.num_drafts / 2


@NAMES
@RUNNERS
def test_merged_checkpoint_is_decoded_as_by_this_project(tmp_path: Path, name: str, env: dict[str, str] | None):
    save_merged(subject(name), tmp_path / "merged", remote_code=False)
    has_bias = subject(name).model.layers[0].self_attn.q_proj.bias is not None
    faults = ["write removed", *(["query bias dropped"] if has_bias else [])]
    answer = engine(*faults, model_name=tmp_path / "merged", env=env)
    (facts,) = answer["facts"]
    assert facts["target"] == f"Orthrus{FAMILIES[name].name}"
    assert set(facts["own_leaves"]) == {"qkv_proj", "o_proj", "attn"}
    assert (facts["num_layers"], facts["num_caches"]) == (4, 2)
    sound, *broken = answer["rounds"]
    check_text(sound, name)
    check_drafts(sound, name)
    for one in broken:
        check_text(one, name)
        with pytest.raises(AssertionError, match="the view drafts something else"):
            check_drafts(one, name)


@NAMES
@RUNNERS
def test_view_file_drafts_for_its_stock_base(tmp_path: Path, name: str, env: dict[str, str] | None):
    base, view = save_base(name, tmp_path / "base"), tmp_path / "view"
    save_view(subject(name), view, base_id="../base")
    overrides = {"architectures": ["OrthrusLM"]}
    (answer,) = engine(model_name=base, view=view, hf_overrides=overrides, env=env)["rounds"]
    check_text(answer, name)
    check_drafts(answer, name)


# What is asked of the class before there is a model


def test_every_family_has_a_target():
    from orthrus.integrations.vllm.target import TARGETS

    assert list(TARGETS) == [row.model_type for row in ROWS]


def test_class_that_stands_for_all_families_answers_as_each_of_them():
    from vllm.model_executor.models.registry import _ModelInfo

    from orthrus.integrations.vllm.target import TARGETS, OrthrusOfAnyFamily

    def facts(of: type) -> dict[str, Any]:
        return vars(_ModelInfo.from_model_cls(of)) | {"architecture": "", "packed": of.packed_modules_mapping}

    for target in TARGETS.values():
        assert facts(target) == facts(OrthrusOfAnyFamily)


# Angles are the target's in both views: they must be those that the view was trained with


@pytest.mark.parametrize("variant", ["qwen2", "qwen2-yarn", "llama3", "llama-bias", "mistral-dynamic"])
def test_vllm_turns_positions_as_transformers_does(variant: str):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    fields = {field: value for field, value in VARIANTS[variant].items() if field != "model_type"}
    family = FAMILIES[VARIANTS[variant]["model_type"]]
    config = family.config(**SHAPE | {"head_dim": 32} | fields, block_size=BLOCK, mask_token_id=VOCABULARY - 1)
    positions = torch.arange(SHAPE["max_position_embeddings"])
    cos, sin = family.decoder(config).rotary_emb(torch.zeros(1, 1), positions[None])
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            config.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
    own = torch.cat([x[0, :, : config.head_dim // 2] for x in (cos, sin)], dim=-1)
    # Angles of up to 256 radians are rounded to 24 bits before their cosine: 2 ** -16.
    torch.testing.assert_close(rope.cos_sin_cache[positions].float(), own, atol=2**-15, rtol=0)
