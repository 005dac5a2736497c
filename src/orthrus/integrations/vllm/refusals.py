"""What cannot work, refused by one sentence each before anything is computed with it."""

import os
from typing import Any

from orthrus.config import OrthrusConfig, check_layers
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
    if (speculation := vllm_config.speculative_config) is None or speculation.method != "dflash":
        return
    check_draft(vllm_config)
    if vllm_config.scheduler_config.async_scheduling is False:  # None: vLLM has yet to decide
        check_load(vllm_config)
    loading = vllm_config.load_config
    # Else the files lie where only vLLM's loader finds them, or there are none; loading checks the view again.
    if loading.load_format in ("auto", "hf", "safetensors") and loading.download_dir is None:
        target, draft = vllm_config.model_config, speculation.draft_model_config
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


def check_engine(vllm_config: Any) -> None:
    """`ValueError` naming the option or field of the model that the plugin does not support."""
    config = vllm_config.model_config.hf_config
    if config.model_type == VIEW_MODEL_TYPE:
        view, base = vllm_config.model_config.model, getattr(config, "base_id", None) or "BASE"
        raise ValueError(
            f"{view} is a view file, which holds no base to serve: vllm serve {base} --hf-overrides "
            f"""'{{"architectures": ["OrthrusLM"]}}' --speculative-config with {view} as its model"""
        )
    if config.model_type != "qwen3":
        raise ValueError(
            f"model_type {config.model_type!r} is not supported by this plugin yet, only Qwen3; orthrus generate "
            "decodes with other bases"
        )
    check_layers(config)
    if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        raise ValueError(
            f"pipeline_parallel_size={stages} is not supported by Orthrus: both views share every layer, so a model "
            "cannot be cut between layers; use tensor_parallel_size"
        )
    if vllm_config.speculative_config is None:
        return
    if vllm_config.speculative_config.method != "dflash":
        return
    for where, dtype in (
        ("kv_cache_dtype", vllm_config.cache_config.cache_dtype),
        ("kv_cache_dtype of the speculative config", getattr(vllm_config.speculative_config, "kv_cache_dtype", None)),
    ):
        if dtype not in (None, "auto", "bfloat16", "float16", "float32"):
            raise ValueError(f"{where}={dtype} is not supported by Orthrus: leave it at auto")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(vllm_config.parallel_config, name, 1)) > 1:
            raise ValueError(
                f"{name}={size} is not supported by Orthrus: a block's keys are written where one rank has all slots"
            )
    if getattr(vllm_config, "lora_config", None) is not None:
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
