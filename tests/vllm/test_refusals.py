"""What the plugin refuses, each by one sentence, and what it makes of a checkpoint's names: no vLLM is needed here."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3Config

from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.environment import BUNDLED
from orthrus.integrations.vllm import serve_command, speculative_config
from orthrus.integrations.vllm.refusals import (
    check_draft,
    check_engine,
    check_files,
    check_load,
    check_same_backend,
    check_writes,
    settle,
)
from orthrus.integrations.vllm.versions import check_version
from orthrus.integrations.vllm.view_config import ViewConfig
from orthrus.integrations.vllm.weights import load_view, stored_name, view_parameter
from orthrus.model.export import save_view


def engine_config(**changes: Any) -> Any:
    """What the plugin reads of vLLM's configuration of an engine."""
    own = json.loads((BUNDLED / "config.json").read_text())
    config = Qwen3Config.from_dict(own | changes.pop("config", {}))
    model = SimpleNamespace(
        hf_config=config, model=str(changes.pop("model", BUNDLED)), revision=None,
        convert_type=changes.pop("convert", "none"),
    )  # fmt: skip
    draft = SimpleNamespace(
        hf_config=Qwen3Config.from_dict(own | changes.pop("draft_config", {})),
        model=str(changes.pop("view", BUNDLED)), revision=None,
    )  # fmt: skip
    speculation = SimpleNamespace(
        method="dflash", num_speculative_tokens=changes.pop("width", 31), draft_model_config=draft,
        disable_eagle_block_drop=False, kv_cache_dtype=changes.pop("draft_cache_dtype", None),
        num_speculative_tokens_per_batch_size=changes.pop("table", None),
    )  # fmt: skip
    return SimpleNamespace(
        model_config=model, speculative_config=speculation if changes.pop("drafting", True) else None,
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=changes.pop("stages", 1),
            decode_context_parallel_size=changes.pop("context_ranks", 1),
        ),
        cache_config=SimpleNamespace(cache_dtype=changes.pop("cache_dtype", "auto")),
        load_config=SimpleNamespace(
            load_format=changes.pop("load_format", "auto"), download_dir=changes.pop("place", None)
        ),
        scheduler_config=SimpleNamespace(async_scheduling=changes.pop("asynchronous", None)),
        lora_config=changes.pop("lora", None), use_v2_model_runner=changes.pop("v2", False), **changes,
    )  # fmt: skip


def test_bundled_model_is_accepted_and_keeps_its_last_cached_page():
    config = engine_config()
    settle(config)
    assert config.speculative_config.disable_eagle_block_drop
    assert config.speculative_config.draft_model_config.hf_config.dflash_config == {"mask_token_id": 8184}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": 2}, "pipeline_parallel_size=2 is not supported"),
        ({"config": {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 8}},
         "layer_types: sliding_attention layers"),
        ({"config": {"model_type": "orthrus_view"}}, "is a view file"),
        ({"config": {"model_type": "gemma3"}}, "model_type 'gemma3' is not supported, only Qwen3, Qwen2, Llama, Mis"),
        ({"config": {"model_type": "mistral", "llama_4_scaling": {"beta": 1}}}, "llama_4_scaling of a Mistral base is"),
        ({"convert": "embed"}, "convert=embed is not supported"),
        ({"config": {"attention_bias": True}}, "attention_bias of a Qwen3 base is not supported by vLLM"),
        ({"config": {"model_type": "qwen2", "head_dim": 32}}, "head_dim=32 of a Qwen2 base is not supported by vLLM"),
        ({"config": {"dual_chunk_attention_config": {"chunk_size": 64}}}, "dual_chunk_attention_config is not support"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype=fp8 is not supported"),
        ({"draft_cache_dtype": "fp8"}, "kv_cache_dtype of the speculative config=fp8 is not supported"),
        ({"context_ranks": 2}, "decode_context_parallel_size=2 is not supported"),
        ({"lora": object()}, "LoRA adapters are not supported"),
        ({"width": 32}, "num_speculative_tokens=32 is too many: the view was trained with blocks of 32"),
        ({"draft_config": {"mask_token_id": 8192}}, "mask_token_id 8192 is outside the embedding of 8192 rows"),
        ({"draft_config": {"block_size": None}}, "config.json lacks block_size"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(changes: dict[str, Any], sentence: str):
    config = engine_config(**changes)
    config.model_config.hf_config.model_type = changes.get("config", {}).get("model_type", "qwen3")
    with pytest.raises(ValueError, match=sentence):
        settle(config)


def test_plain_decoding_needs_no_view():
    settle(engine_config(drafting=False, cache_dtype="fp8", lora=object()))


def test_files_that_only_vllm_finds_are_not_looked_for():
    with pytest.raises(ValueError, match="neither a folder nor a model id"):
        settle(engine_config(view="/nowhere", model="/nowhere"))
    settle(engine_config(view="/nowhere", model="/nowhere", load_format="dummy"))
    settle(engine_config(view="/nowhere", model="/nowhere", place="/elsewhere"))


def damaged(folder: Path, change: Any) -> Path:
    """The bundled checkpoint with its tensors changed."""
    shutil.copytree(BUNDLED, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


VIEW_TENSOR = "model.layers.3.self_attn.q_proj_diff.weight"
BASE_TENSOR = "model.layers.3.mlp.up_proj.weight"


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[BASE_TENSOR] = tensors[BASE_TENSOR][:-8].clone()


def drop_view(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "_diff." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop(VIEW_TENSOR), f"lacks 1 tensors: {VIEW_TENSOR}"),
        (drop_view, "has no diffusion view"),
        (reshape, rf"{BASE_TENSOR} has shape \[1016, 512\], config.json asks for \[1024, 512\]"),
    ],
    ids=["one view tensor missing", "no view", "base of another shape"],
)
def test_damaged_checkpoint_is_named_before_the_engine_starts(tmp_path: Path, change: Any, sentence: str):
    folder = damaged(tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=sentence):
        settle(engine_config(view=folder, model=folder))


def test_damaged_base_is_named_without_drafting_too(tmp_path: Path):
    folder = damaged(tmp_path / "damaged", lambda tensors: tensors.pop(BASE_TENSOR))
    with pytest.raises(ValueError, match=f"lacks 1 tensors: {BASE_TENSOR}"):
        settle(engine_config(model=folder, drafting=False))
    settle(engine_config(model=folder, drafting=False, load_format="dummy"))
    settle(engine_config(model=damaged(tmp_path / "no view", drop_view), drafting=False))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": "fp8"}}))
    settle(engine_config(model=folder, drafting=False))


def view_over_base(tmp_path: Path) -> tuple[Path, Path]:
    """The bundled model as a view file and the stock base it belongs to."""
    base = damaged(tmp_path / "base", drop_view)
    model = OrthrusForCausalLM.from_pretrained(BUNDLED)
    save_view(model, tmp_path / "view", base_id="../base")
    return tmp_path / "view", base


def test_view_is_accepted_over_its_base_and_no_other(tmp_path: Path):
    view, base = view_over_base(tmp_path)
    check_files(view, base, revision=None, target_revision=None)
    check_files(BUNDLED, base, revision=None, target_revision=None)

    def shift(tensors: dict[str, torch.Tensor]) -> None:
        tensors[BASE_TENSOR] += 1

    other = damaged(tmp_path / "other", shift)
    with pytest.raises(ValueError, match="was trained on .*; this base is .*: other weights"):
        check_files(view, other, revision=None, target_revision=None)
    with pytest.raises(ValueError, match="was not made from"):
        check_files(BUNDLED, other, revision=None, target_revision=None)


def test_view_has_the_shape_of_its_base(tmp_path: Path):
    view, _ = view_over_base(tmp_path)
    fields = json.loads((view / "config.json").read_text())
    config = ViewConfig.from_dict(fields, name_or_path=str(view))
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (8, 512, 64)
    assert (config.block_size, config.mask_token_id, config.architectures) == (32, 8184, ["OrthrusView"])
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match="the base of the view .* cannot be read"):
        ViewConfig.from_dict(fields, name_or_path=str(view))


def write_view_of(base: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the base of a view beside the view's folder, in config.json alone; the view's config.json."""
    for name in ("base", "view"):
        (folder / name).mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(base))
    view = {"model_type": "orthrus_view", "architectures": ["OrthrusView"], "block_size": 8, "mask_token_id": 9}
    return view | {"base_id": "../base"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_a_base_leaves_out_means_to_its_view_what_it_means_to_its_family(tmp_path: Path, family: str):
    base: dict[str, Any] = {
        "model_type": family, "architectures": ["Any"], "vocab_size": 10, "hidden_size": 64, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "rope_theta": 5000.0,
    }  # fmt: skip
    config = ViewConfig.from_dict(write_view_of(base, tmp_path), name_or_path=str(tmp_path / "view"))
    assert config.head_dim == {"llama": 16, "qwen2": 16, "qwen3": 128}[family]
    assert config.num_key_value_heads == {"llama": 4, "qwen2": 32, "qwen3": 32}[family]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert (config.architectures, config.model_type) == (["OrthrusView"], "orthrus_view")


def test_view_of_a_base_that_carries_none_is_named(tmp_path: Path):
    base = {"model_type": "gemma3", "hidden_size": 64}
    with pytest.raises(ValueError, match=r"\.\./base has model_type 'gemma3', which is not supported"):
        ViewConfig.from_dict(write_view_of(base, tmp_path), name_or_path=str(tmp_path / "view"))
    with pytest.raises(ValueError, match="does not name its base"):
        ViewConfig.from_dict({"block_size": 8}, name_or_path="v")


def test_block_sizes_by_load_are_refused_where_the_scheduler_would_forget_them(monkeypatch: pytest.MonkeyPatch):
    """Of vLLM's V2 runner the check asks one question, which older versions answer with no."""
    speculator: Any = ModuleType("speculator")
    monkeypatch.setitem(sys.modules, "orthrus.integrations.vllm.speculator", speculator)
    told: dict[str, Any] = {"table": [[1, 7, 31], [8, 9, 15]], "v2": True}
    for is_new in (True, False):
        speculator.verifies_what_is_drafted = lambda is_asynchronous, is_new=is_new: is_asynchronous or is_new
        for changes in ({"v2": False}, {"table": None}, {"asynchronous": True}, {"asynchronous": None}):
            settle(engine_config(**{"asynchronous": False} | told | changes))
        if is_new:
            settle(engine_config(asynchronous=False, **told))
            continue
        for check in (settle, check_load):
            with pytest.raises(ValueError, match="_per_batch_size needs asynchronous scheduling under this vLLM's V2"):
                check(engine_config(asynchronous=False, **told))


def test_two_attention_backends_over_one_cache_are_refused():
    one, other = (SimpleNamespace(get_name=lambda name=name: name) for name in ("FLASH_ATTN", "FLASHINFER"))
    check_same_backend(one, one)
    with pytest.raises(ValueError, match="the target's attention backend is FLASH_ATTN, the draft's FLASHINFER"):
        check_same_backend(one, other)


@pytest.mark.parametrize(
    ("told", "in_read", "has_update", "works"),
    [(None, False, True, True), (None, True, False, True), (None, False, False, False), ("layer", True, True, False)],
)
def test_backend_that_would_not_write_the_block_is_refused(told: Any, in_read: bool, has_update: bool, works: bool):
    implementation = SimpleNamespace(kv_sharing_target_layer_name=told)
    if has_update:
        implementation.do_kv_cache_update = print
    backend = SimpleNamespace(forward_includes_kv_cache_update=in_read, get_name=lambda: "NEW_ATTN")
    layer = SimpleNamespace(impl=implementation, attn_backend=backend)
    if works:
        return check_writes(layer)
    with pytest.raises(ValueError, match="NEW_ATTN would not write"):
        check_writes(layer)


def test_old_versions_are_refused_and_unknown_ones_warned_of(caplog: pytest.LogCaptureFixture):
    check_version("0.32.0+cpu")
    assert not caplog.records
    check_version("0.99.1")
    check_version("dev")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    with pytest.raises(RuntimeError, match="needs vLLM 0.26 or newer, this is 0.25.3"):
        check_version("0.25.3")


def test_configuration_and_command_say_the_same():
    assert speculative_config("m", block_size=8) == {"method": "dflash", "model": "m", "num_speculative_tokens": 7}
    assert speculative_config("m", draft_sample_method="probabilistic")["draft_sample_method"] == "probabilistic"
    *head, text, last = serve_command("m", "--config=own.yaml", block_size=8)
    assert head == ["vllm", "serve", "m", "--speculative-config"] and last == "--config=own.yaml"
    assert json.loads(text) == speculative_config("m", block_size=8)
    with pytest.raises(ValueError, match="at least 2"):
        speculative_config("m", block_size=1)


class Joined(nn.Module):
    """A stand-in for the view: two layers whose joined parameter remembers what it was filled with."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(2))
        self.filled: dict[str | None, float] = {}
        for layer in self.model.layers:
            layer.self_attn = nn.Module()
            layer.self_attn.qkv_proj = nn.Linear(2, 6, bias=False)
            layer.self_attn.o_proj = nn.Linear(2, 2, bias=False)
            layer.self_attn.q_norm = nn.RMSNorm(2)
            layer.self_attn.qkv_proj.weight.weight_loader = lambda parameter, tensor, part: parameter.data[
                {"q": slice(0, 2), "k": slice(2, 4), "v": slice(4, 6)}[part]
            ].copy_(tensor)


def tensors_of_view() -> dict[str, torch.Tensor]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    stored = {f"model.layers.{i}.self_attn.{n}_diff.weight": torch.full((2, 2), i + 0.1 * j)
              for i in range(2) for j, n in enumerate(names)}  # fmt: skip
    norms = {f"model.layers.{i}.self_attn.q_norm_diff.weight": torch.full((2,), 5.0 + i) for i in range(2)}
    return stored | norms | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}


def test_every_tensor_of_the_view_lands_in_its_place():
    draft, stored = Joined(), tensors_of_view()
    filled = load_view(draft, stored.items(), source="m")
    assert len(filled) == 6
    for name, tensor in stored.items():
        if "_diff." in name:
            own, part = view_parameter(name)
            place = {"q": slice(0, 2), "k": slice(2, 4), "v": slice(4, 6), None: slice(None)}[part]
            torch.testing.assert_close(draft.get_parameter(own).data[place], tensor)
            assert stored_name(own, part) == name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("model.layers.1.self_attn.k_proj_diff.weight"),
         "m lacks 1 tensors of the diffusion view: model.layers.1.self_attn.k_proj_diff.weight"),
        (lambda s: s.update({"model.layers.2.self_attn.k_proj_diff.weight": torch.zeros(2, 2)}),
         "m holds model.layers.2.self_attn.k_proj_diff.weight, which this model does not have"),
        (lambda s: s.update({"model.layers.1.mlp.up_diff.weight": torch.zeros(2, 2)}), "no tensor of a diffusion view"),
        (lambda s: s.update({"model.layers.1.self_attn.o_proj_diff.weight": torch.zeros(1, 2)}),
         r"o_proj_diff.weight has shape \[1, 2\], which does not fit"),
    ],
)  # fmt: skip
def test_view_that_does_not_fit_is_named(change: Any, sentence: str):
    stored = tensors_of_view()
    change(stored)
    with pytest.raises(ValueError, match=sentence):
        load_view(Joined(), stored.items(), source="m")


def test_checks_do_not_need_the_engine():
    check_engine(engine_config())
    check_draft(engine_config())
