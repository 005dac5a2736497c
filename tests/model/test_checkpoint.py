"""Reading the three forms: what is accepted, what is reported, and what is refused before a weight is used."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, Qwen3ForCausalLM

from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.model import checkpoint as checkpoints
from orthrus.model.checkpoint import LoadedLM, load_model, load_tokenizer
from orthrus.model.export import save_merged, save_view
from orthrus.model.modeling import is_view_tensor
from orthrus.model.tensors import read_headers
from tests.model.released import (
    NUM_TOKENS,
    edit_json,
    random_model,
    released_tensors,
    write_released,
    write_shards,
    write_stock,
)

Q_DIFF = "model.layers.1.self_attn.q_proj_diff.weight"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied released checkpoint in bf16."""
    return write_released(tmp_path_factory.mktemp("released") / "model", random_model())


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of `released`."""
    return write_stock(tmp_path_factory.mktemp("stock") / "base", random_model())


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory, stock: Path, released: Path) -> Path:
    """The view of `released`, on `stock`."""
    folder = tmp_path_factory.mktemp("view") / "view"
    save_view(load_model(released), folder, base_id=str(stock))
    return folder


def changed(source: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    tied = model.config.tie_word_embeddings
    return {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}


def assert_same_weights(model: torch.nn.Module, truth: dict[str, Tensor]):
    own = weights(model)
    assert set(own) == set(truth)
    for name, tensor in truth.items():
        assert torch.equal(own[name], tensor.to(own[name].dtype)), f"{name} changed on the way"


# --- the released layout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("rope", ["rope_parameters", "rope_theta"])
def test_released_layout_loads_bit_for_bit(tmp_path: Path, tied: bool, num_shards: int, rope: str):
    source = random_model(tied=tied)
    folder = write_released(tmp_path / "m", source, num_shards=num_shards, rope=rope)
    model = load_model(folder)
    assert_same_weights(model, released_tensors(source))
    assert model.dtype == torch.bfloat16, "the format that config.json names"
    assert model.config.rope_parameters["rope_theta"] == 1e6, "theta was not found under this spelling"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.training


@torch.no_grad()
def test_loaded_model_computes_what_was_saved(tmp_path: Path):
    source = random_model(tied=False, variant="qwen3-bias")
    folder = write_released(tmp_path / "m", source, dtype=torch.float32, attention_bias=True)
    model = load_model(folder, dtype="float32", attn_implementation="sdpa")
    ids = torch.tensor([[1, 2, 3, 250]])
    assert torch.equal(model(ids).logits, source(ids).logits)


def test_quirks_of_released_configurations_do_not_come_through(released: Path):
    model = OrthrusForCausalLM.from_pretrained(released)
    config = model.config
    assert (config.block_size, config.mask_token_id) == (8, NUM_TOKENS)
    assert config.use_cache and model.generation_config.use_cache, "released configurations say false"
    assert not hasattr(config, "r") and not hasattr(config, "lora_alpha")
    assert config.model_type == "orthrus" and config.architectures == ["OrthrusForCausalLM"]
    assert not hasattr(config, "auto_map"), "their code must not be run"
    assert model.generation_config.eos_token_id == 257 and model.generation_config.pad_token_id is None
    assert not model.generation_config.do_sample, "released checkpoints have no sampling defaults; none are invented"
    assert config.name_or_path == str(released)


def test_embedding_is_not_resized_for_the_mask_token(released: Path):
    model = load_model(released)
    assert len(load_tokenizer(released)) == model.config.mask_token_id < model.model.embed_tokens.num_embeddings == 264


@pytest.mark.parametrize("num_shards", [1, 2])
def test_stored_copy_of_a_tied_head_is_reported_and_tied(tmp_path: Path, num_shards: int):
    folder = write_released(tmp_path / "m", random_model(), head=True, num_shards=num_shards)
    model = load_model(folder)
    assert model.load_report.unexpected == ("lm_head.weight",)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_head_stored_without_embedding_is_the_embedding(tmp_path: Path, released: Path):
    folder = changed(
        released, tmp_path / "m", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})
    )
    assert_same_weights(load_model(folder), released_tensors(random_model()))


def test_tied_head_that_differs_is_refused(tmp_path: Path):
    folder = write_released(tmp_path / "m", random_model(), head=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="ties lm_head.weight to the embedding, but"):
        load_model(folder)


def test_view_is_found_by_its_tensors_whatever_config_json_says(tmp_path: Path, released: Path):
    for i, fields in enumerate(
        [{"architectures": ["Qwen3ForCausalLM"]}, {"architectures": None}, {"model_type": "orthrus"}]
    ):
        folder = shutil.copytree(released, tmp_path / str(i))
        edit_json(folder / "config.json", **fields)
        assert load_model(folder).load_report.form == "merged"


def test_report_names_every_tensor(tmp_path: Path, released: Path):
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = changed(released, tmp_path / "m", lambda t: t.update({extra: torch.ones(4)}))
    report = load_model(folder).load_report
    assert report.consumed == tuple(sorted(released_tensors(random_model())))
    assert (report.missing, report.unexpected) == ((), (extra,))
    assert (report.form, report.source, report.revision, report.folder) == ("merged", str(folder), None, folder)


# --- dtype, devices, options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, "float32", "torch.float32"])
def test_dtype_by_name_or_value(released: Path, dtype: str | torch.dtype):
    assert load_model(released, dtype=dtype).dtype == torch.float32
    assert LoadedLM.from_pretrained(released, torch_dtype=dtype).dtype == torch.float32


def test_auto_dtype_is_the_stored_one_when_config_json_is_silent(tmp_path: Path, released: Path):
    folder = shutil.copytree(released, tmp_path / "m")
    edit_json(folder / "config.json", dtype=None)
    assert load_model(folder, dtype="auto").dtype == torch.bfloat16
    edit_json(folder / "config.json", torch_dtype="float16")
    assert load_model(folder).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["bf17", "int8", "nn", torch.int64, "float8_e4m3fn"])
def test_bad_dtype_is_refused(released: Path, dtype: str | torch.dtype):
    with pytest.raises(ValueError, match="is not one of auto, float64, float32, float16, bfloat16"):
        load_model(released, dtype=dtype)


@pytest.mark.parametrize("has_accelerate", [True, False])
def test_device_map_of_one_device_needs_no_accelerate(
    released: Path, has_accelerate: bool, monkeypatch: pytest.MonkeyPatch
):
    if not has_accelerate:
        monkeypatch.setattr(checkpoints, "is_accelerate_available", lambda: False)
    for device_map in ("cpu", {"": "cpu"}, torch.device("cpu")):
        model = LoadedLM.from_pretrained(released, device_map=device_map)
        assert model.device.type == "cpu" and not any(p.is_meta for p in model.parameters())
    if not has_accelerate:
        with pytest.raises(ValueError, match="pip install accelerate"):
            LoadedLM.from_pretrained(released, device_map="auto")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_is_passed_on(released: Path, attention: str):
    assert load_model(released, attn_implementation=attention).config._attn_implementation == attention


def test_absent_attention_package_and_unknown_name_are_value_errors(released: Path):
    with pytest.raises(ValueError, match="FlashAttention2"):
        load_model(released, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="nonsense"):
        load_model(released, attn_implementation="nonsense")


@pytest.mark.parametrize(
    "options", [{"subfolder": "x"}, {"use_safetensors": False}, {"ignore_mismatched_sizes": True}, {"variant": "fp16"}]
)
def test_unsupported_options_are_refused_by_name(released: Path, options: dict):
    with pytest.raises(ValueError, match=next(iter(options))):
        LoadedLM.from_pretrained(released, **options)


def test_transformers_own_options_work(released: Path):
    given = GenerationConfig(max_new_tokens=3)
    model, info = LoadedLM.from_pretrained(
        released, output_loading_info=True, generation_config=given, trust_remote_code=True, block_size=4,
        max_position_embeddings=64, cache_dir="unused", local_files_only=True,
    )  # fmt: skip
    assert model.generation_config.max_new_tokens == 3
    assert (model.config.block_size, model.config.max_position_embeddings) == (4, 64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(TypeError, match="no_such_option"):
        LoadedLM.from_pretrained(released, no_such_option=1)


# --- broken checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [Q_DIFF, "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_missing_tensor_is_named(tmp_path: Path, released: Path, name: str):
    folder = changed(released, tmp_path / "m", lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"lacks 1 tensors: {name}"):
        load_model(folder)


def test_untied_model_without_a_head_is_refused(tmp_path: Path, released: Path):
    folder = shutil.copytree(released, tmp_path / "m")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lacks 1 tensors: lm_head.weight"):
        load_model(folder)


def test_unexpected_tensor_is_named(tmp_path: Path, released: Path):
    folder = changed(released, tmp_path / "m", lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match="does not have: model.layers.7.mlp.up_proj.weight"):
        load_model(folder)


def test_wrong_shape_is_named(tmp_path: Path, released: Path):
    folder = changed(released, tmp_path / "m", lambda t: t.update({Q_DIFF: t[Q_DIFF][:-1].clone()}))
    with pytest.raises(ValueError, match=rf"{Q_DIFF} has shape \[31, 32\], config.json asks for \[32, 32\]"):
        load_model(folder)


def test_quantised_tensor_is_named(tmp_path: Path, released: Path):
    folder = changed(released, tmp_path / "m", lambda t: t.update({Q_DIFF: t[Q_DIFF].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{Q_DIFF} is stored as I8"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q_DIFF, "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, released: Path, name: str, value: float):
    folder = changed(released, tmp_path / "m", lambda t: t[name].view(-1)[3:4].fill_(value))
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values"):
        load_model(folder)


def test_overflow_in_half_precision_is_named(tmp_path: Path, released: Path):
    folder = changed(released, tmp_path / "m", lambda t: t[Q_DIFF].view(-1)[:1].fill_(1e6))
    load_model(folder)
    with pytest.raises(ValueError, match=f"{Q_DIFF} holds NaN or infinite values .as torch.float16"):
        load_model(folder, dtype="float16")


def test_half_written_checkpoint_is_never_loaded(tmp_path: Path, released: Path):
    folder = shutil.copytree(released, tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="half-written"):
        load_model(folder)
    file.unlink()
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "qwen3"}'])
def test_broken_config_is_refused(tmp_path: Path, released: Path, content: str):
    folder = shutil.copytree(released, tmp_path / "m")
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no config.json"):
        load_model(folder)


@pytest.mark.parametrize("field", ["block_size", "mask_token_id"])
def test_missing_view_field_is_named(tmp_path: Path, released: Path, field: str):
    folder = shutil.copytree(released, tmp_path / "m")
    edit_json(folder / "config.json", **{field: None})
    with pytest.raises(ValueError, match=f"lacks {field}"):
        load_model(folder)


def test_mask_token_outside_the_embedding_is_refused(tmp_path: Path, released: Path):
    folder = shutil.copytree(released, tmp_path / "m")
    edit_json(folder / "config.json", mask_token_id=264)
    with pytest.raises(ValueError, match="mask_token_id 264 is outside"):
        load_model(folder)


def test_base_without_view_is_refused_with_the_way_out(tmp_path: Path, stock: Path):
    with pytest.raises(ValueError, match=f"no diffusion view.*orthrus convert {stock} OUT"):
        load_model(stock)
    claiming = shutil.copytree(stock, tmp_path / "m")
    edit_json(claiming / "config.json", architectures=["OrthrusLM"])
    with pytest.raises(ValueError, match="missing although its config.json says OrthrusLM"):
        load_model(claiming)


# --- view files and bases ----------------------------------------------------------------------------------------


def test_view_file_loads_its_base(view: Path, released: Path, stock: Path):
    assert all(is_view_tensor(name) for name in read_headers(view))
    model = load_model(view)
    assert_same_weights(model, weights(load_model(released)))
    report = model.load_report
    assert report.form == "view" and report.base is not None and report.base.id == str(stock)
    assert set(report.consumed) == set(weights(model)), "the base's tensors count as consumed too"
    assert model.generation_config.eos_token_id == [257, 256], "the base's generation configuration"
    assert load_tokenizer(view).chat_template, "the base's tokenizer"


def test_view_file_loads_on_its_base_elsewhere(tmp_path: Path, view: Path, stock: Path, released: Path):
    moved = shutil.copytree(stock, tmp_path / "moved")
    alone = shutil.copytree(view, tmp_path / "view")
    edit_json(alone / "config.json", base_id=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"the base of .* cannot be read .*gone.*name it with base="):
        load_model(alone)
    for base in (moved, released):
        assert_same_weights(load_model(alone, base=base), weights(load_model(released)))
    edit_json(alone / "config.json", base_id="../moved")
    assert load_model(alone).load_report.form == "view", "a relative base is looked for from the view's folder"
    assert load_tokenizer(alone).chat_template


def test_wrong_base_is_refused_before_a_weight_is_used(
    tmp_path: Path, view: Path, stock: Path, monkeypatch: pytest.MonkeyPatch
):
    def flip(tensors: dict[str, Tensor]):
        tensors["model.norm.weight"].view(torch.int16)[0] ^= 1

    other = changed(stock, tmp_path / "other", flip)

    def read_weights(*args: object):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(checkpoints, "open_tensors", read_weights)
    with pytest.raises(
        ValueError, match=r"was trained on .*base \(sha256:\w{12}\); this base is .*other \(sha256:\w{12}"
    ):
        load_model(view, base=other)
    cast = write_stock(tmp_path / "cast", random_model(), dtype=torch.float32)
    with pytest.raises(ValueError, match="other weights"):
        load_model(view, base=cast)


def test_view_with_a_missing_tensor_or_without_a_named_base_is_refused(tmp_path: Path, view: Path):
    broken = changed(view, tmp_path / "broken", lambda t: t.pop(Q_DIFF))
    with pytest.raises(ValueError, match=f"lacks 1 tensors: {Q_DIFF}"):
        load_model(broken)
    nameless = shutil.copytree(view, tmp_path / "nameless")
    edit_json(nameless / "config.json", base_fingerprint=None)
    with pytest.raises(ValueError, match="lacks base_id or base_fingerprint"):
        load_model(nameless)


def test_merged_checkpoint_can_be_held_against_its_base(tmp_path: Path, released: Path, stock: Path):
    assert load_model(released, base=stock).load_report.form == "merged"
    other = write_stock(tmp_path / "other", random_model(seed=2))
    with pytest.raises(ValueError, match="their base tensors differ"):
        load_model(released, base=other)


def test_started_view_is_a_copy_that_shares_nothing(stock: Path):
    model = load_model(stock, start_view=True, block_size=8, mask_token_id=NUM_TOKENS)
    assert set(model.load_report.missing) == set(model.view_parameters())
    attention = model.model.layers[1].self_attn
    assert torch.equal(attention.q_proj.weight, attention.q_proj_diff.weight)
    with torch.no_grad():
        attention.q_proj_diff.weight.zero_()
    assert attention.q_proj.weight.any(), "training the view would change the base"


def test_start_view_on_a_checkpoint_with_a_view_is_refused(released: Path):
    with pytest.raises(ValueError, match="already has a diffusion view"):
        load_model(released, start_view=True)


def test_bias_of_the_base_is_honoured(tmp_path: Path):
    base = write_stock(tmp_path / "base", random_model(variant="qwen3-bias", tied=False), attention_bias=True)
    model = load_model(base, start_view=True, block_size=8, mask_token_id=NUM_TOKENS)
    attention = model.model.layers[0].self_attn
    assert torch.equal(attention.k_proj.bias, attention.k_proj_diff.bias) and attention.k_proj.bias.any()


# --- tokenizer ---------------------------------------------------------------------------------------------------


def test_missing_chat_template_comes_from_the_base(released: Path, stock: Path):
    assert load_tokenizer(released).chat_template is None
    assert load_tokenizer(released, base=stock).chat_template == load_tokenizer(stock).chat_template


def test_missing_tokenizer_comes_from_the_base_or_is_refused(tmp_path: Path, released: Path, stock: Path):
    write_shards(tmp_path / "m", released_tensors(random_model()))
    shutil.copy(released / "config.json", tmp_path / "m")
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "m")
    assert load_tokenizer(tmp_path / "m", base=stock)("ab")["input_ids"] == load_tokenizer(stock)("ab")["input_ids"]


# --- what transformers writes and reads --------------------------------------------------------------------------


def test_what_save_pretrained_writes_is_read(tmp_path: Path, released: Path):
    model = load_model(released)
    model.save_pretrained(tmp_path / "m")
    assert_same_weights(load_model(tmp_path / "m"), weights(model))


@torch.no_grad()
def test_stock_transformers_reads_the_ar_view_of_a_merged_checkpoint(tmp_path: Path, released: Path):
    model = load_model(released, dtype="float32")
    save_merged(model, tmp_path / "m")
    stock = Qwen3ForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(stock(ids).logits, model(ids).logits)
