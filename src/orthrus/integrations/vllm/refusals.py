"""What cannot work, refused by one sentence each before anything is computed with it."""

import os
from typing import Any

from orthrus.config import OrthrusConfig, check_layers
from orthrus.model.bases import ROWS
from orthrus.model.checkpoint import (
    VIEW_MODEL_TYPE,
    LoadedLM,
    build_config,
    expected_shapes,
    plan_load,
    read_checkpoint,
    settle_form,
)
from orthrus.model.modeling import is_view_tensor


def settle(vllm_config: Any) -> None:
    """Check a configuration before the engine starts, and set what nobody should have to know.

    `dflash_config`: versions before 0.32 look for the mask token there alone (seen with 0.26).
    `disable_eagle_block_drop`: vLLM computes the last cached page of a prompt again for drafts that need its hidden
    states; the view needs none.
    """
    check_engine(vllm_config)
    loading, target = vllm_config.load_config, vllm_config.model_config
    # Else the files lie where only vLLM's loader finds them, or there are none; loading checks the view again.
    has_files = loading.load_format in ("auto", "hf", "safetensors") and loading.download_dir is None
    if (speculation := vllm_config.speculative_config) is None or speculation.method != "dflash":
        if has_files:
            check_plain(target.model, revision=target.revision)
        return
    check_draft(vllm_config)
    if vllm_config.scheduler_config.async_scheduling is False:  # None: vLLM has yet to decide
        check_load(vllm_config)
    if has_files:
        draft = speculation.draft_model_config
        check_files(draft.model, target.model, revision=draft.revision, target_revision=target.revision)
    own = speculation.draft_model_config.hf_config
    own.dflash_config = {"mask_token_id": own.mask_token_id} | (getattr(own, "dflash_config", None) or {})
    if hasattr(speculation, "disable_eagle_block_drop"):
        speculation.disable_eagle_block_drop = True


def check_files(
    view: str | os.PathLike, target: str | os.PathLike, *, revision: str | None, target_revision: str | None
) -> None:
    """`ValueError` naming what is missing, broken, of another shape or of another base; reads headers alone.

    Where view and target are two checkpoints, the target's weights are compared by their fingerprint, too.
    """
    checkpoint = read_checkpoint(view, revision=revision)
    is_one = str(view) == str(target) and revision == target_revision
    base = None if is_one and checkpoint.form != "view" else target
    home, _ = settle_form(checkpoint, base=base, start_view=False)
    fields = home.config
    if checkpoint.form == "view":
        fields = fields | {name: checkpoint.config.get(name) for name in ("block_size", "mask_token_id")}
    config, _ = build_config(OrthrusConfig, fields, where=checkpoint.source)
    tensors = {name: one for name, one in home.tensors.items() if home is checkpoint or not is_view_tensor(name)}
    plan_load(
        tensors | checkpoint.tensors, expected_shapes(LoadedLM, config), where=checkpoint.source, start_view=False
    )


def check_host(config: Any) -> None:
    """`ValueError` for a base of no family that carries a view, or one that vLLM's class of its family computes
    otherwise than transformers' does."""
    names = {row.model_type: row.name for row in ROWS}
    if config.model_type not in names:
        raise ValueError(f"model_type {config.model_type!r} is not supported, only {', '.join(names.values())} bases")
    check_layers(config)
    if getattr(config, "dual_chunk_attention_config", None) is not None:
        raise ValueError(
            "dual_chunk_attention_config is not supported by Orthrus, whose blocks are not cut into chunks as the text "
            "is: take it out of config.json, and the base has full attention"
        )
    for name in ("llama_4_scaling", "ada_rms_norm_t_cond"):
        if config.model_type == "mistral" and getattr(config, name, None):
            raise ValueError(f"{name} of a Mistral base is not supported: vLLM heeds it, transformers does not")
    if config.model_type == "qwen3" and config.attention_bias:
        raise ValueError("attention_bias of a Qwen3 base is not supported by vLLM, whose Qwen3 has no bias in o_proj")
    width = config.hidden_size // config.num_attention_heads
    if config.model_type == "qwen2" and (head_dim := getattr(config, "head_dim", None)) not in (None, width):
        raise ValueError(
            f"head_dim={head_dim} of a Qwen2 base is not supported by vLLM, whose heads are {width} wide there "
            "(hidden_size / num_attention_heads)"
        )


def check_plain(target: str | os.PathLike, *, revision: str | None) -> None:
    """`check_files` for plain decoding, which needs no view: vLLM notices no missing part of a joined projection."""
    checkpoint = read_checkpoint(target, revision=revision)
    if checkpoint.config.get("quantization_config"):
        return  # vLLM reads formats of which this project knows neither names nor shapes
    # A stock base has neither, and no shape depends on them.
    fields = {"block_size": 2, "mask_token_id": 0} | checkpoint.config
    config, _ = build_config(OrthrusConfig, fields, where=checkpoint.source)
    plan_load(
        {name: one for name, one in checkpoint.tensors.items() if not is_view_tensor(name)},
        {name: one for name, one in expected_shapes(LoadedLM, config).items() if not is_view_tensor(name)},
        where=checkpoint.source,
        start_view=False,
    )


def check_engine(vllm_config: Any) -> None:
    """`ValueError` naming the option or field of the model that the plugin does not support."""
    config = vllm_config.model_config.hf_config
    if config.model_type == VIEW_MODEL_TYPE:
        view, base = vllm_config.model_config.model, getattr(config, "base_id", None) or "BASE"
        raise ValueError(
            f"{view} is a view file, which holds no base to serve: vllm serve {base} --hf-overrides "
            f"""'{{"architectures": ["OrthrusLM"]}}' --speculative-config with {view} as its model"""
        )
    check_host(config)
    if (convert := getattr(vllm_config.model_config, "convert_type", "none")) != "none":
        raise ValueError(f"convert={convert} is not supported by Orthrus, whose models write text")
    speculation, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    check_options(
        is_drafting=speculation is not None and speculation.method == "dflash",
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        decode_context_parallel_size=getattr(parallel, "decode_context_parallel_size", 1),
        prefill_context_parallel_size=getattr(parallel, "prefill_context_parallel_size", 1),
        kv_cache_dtype=vllm_config.cache_config.cache_dtype,
        draft_kv_cache_dtype=getattr(speculation, "kv_cache_dtype", None),
        enable_lora=getattr(vllm_config, "lora_config", None) is not None,
    )


def check_options(
    *,
    is_drafting: bool,
    pipeline_parallel_size: int = 1,
    decode_context_parallel_size: int = 1,
    prefill_context_parallel_size: int = 1,
    kv_cache_dtype: str | None = None,
    draft_kv_cache_dtype: str | None = None,
    enable_lora: bool = False,
) -> None:
    """`ValueError` naming the option, as vLLM calls it, that the plugin does not support."""
    if pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size={pipeline_parallel_size} is not supported by Orthrus: both views share every "
            "layer, so a model cannot be cut between layers; use tensor_parallel_size"
        )
    if not is_drafting:
        return
    for where, dtype in (
        ("kv_cache_dtype", kv_cache_dtype),
        ("kv_cache_dtype of the speculative config", draft_kv_cache_dtype),
    ):
        if dtype not in (None, "auto", "bfloat16", "float16", "float32"):
            raise ValueError(f"{where}={dtype} is not supported by Orthrus: leave it at auto")
    for name, size in (
        ("decode_context_parallel_size", decode_context_parallel_size),
        ("prefill_context_parallel_size", prefill_context_parallel_size),
    ):
        if size > 1:
            raise ValueError(
                f"{name}={size} is not supported by Orthrus: a block's keys are written where one rank has all slots"
            )
    if enable_lora:
        raise ValueError("LoRA adapters are not supported by Orthrus: both views share the modules they would replace")


def check_draft(vllm_config: Any) -> None:
    """`ValueError` for a block or a mask token that the view was not trained with."""
    speculation = vllm_config.speculative_config
    config, source = speculation.draft_model_config.hf_config, speculation.draft_model_config.model
    vocabulary = vllm_config.model_config.hf_config.vocab_size
    for name in ("block_size", "mask_token_id"):
        if getattr(config, name, None) is None:
            raise ValueError(f"{source}: config.json lacks {name}, which the diffusion view was trained with")
    if not 0 <= config.mask_token_id < vocabulary:
        raise ValueError(
            f"{source}: mask_token_id {config.mask_token_id} is outside the embedding of {vocabulary} rows"
        )
    if (width := speculation.num_speculative_tokens) >= config.block_size:
        raise ValueError(
            f"num_speculative_tokens={width} is too many: the view was trained with blocks of {config.block_size}, "
            f"the anchor included, so it drafts at most {config.block_size - 1}"
        )


def check_load(vllm_config: Any) -> None:
    """`ValueError` for block sizes by load that this vLLM's V2 runner and its scheduler would not agree about."""
    if not (vllm_config.speculative_config.num_speculative_tokens_per_batch_size and vllm_config.use_v2_model_runner):
        return
    from orthrus.integrations.vllm.speculator import verifies_what_is_drafted

    if not verifies_what_is_drafted(bool(vllm_config.scheduler_config.async_scheduling)):
        raise ValueError(
            "num_speculative_tokens_per_batch_size needs asynchronous scheduling under this vLLM's V2 runner: turn it "
            "on, or give one number of speculative tokens"
        )


def check_same_backend(target: Any, draft: Any) -> None:
    """`ValueError` unless both views read the cache by the same attention backend: each has its own layout of it."""
    if target is not draft:
        raise ValueError(
            f"the target's attention backend is {target.get_name()}, the draft's {draft.get_name()}: they read one "
            "cache, so set attention_backend of the speculative config to the target's"
        )


def check_writes(layer: Any) -> None:
    """`ValueError` unless a layer of the view writes the block's keys and values, by itself or in its backend's read.

    A backend that knows of a shared cache leaves the write to its owner; the view would then draft from stale slots.
    """
    told = getattr(layer.impl, "kv_sharing_target_layer_name", None) is not None
    can_write = layer.attn_backend.forward_includes_kv_cache_update or hasattr(layer.impl, "do_kv_cache_update")
    if told or not can_write:
        raise ValueError(
            f"attention backend {layer.attn_backend.get_name()} would not write the view's keys and values into a "
            "shared cache; choose another by attention_backend"
        )
