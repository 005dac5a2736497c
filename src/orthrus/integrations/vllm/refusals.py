"""What cannot work, refused by one sentence each before anything is computed with it."""

from typing import Any

from orthrus.config import check_layers


def check_engine(vllm_config: Any) -> None:
    """`ValueError` naming the option or field of the model that the plugin does not support."""
    config = vllm_config.model_config.hf_config
    check_layers(config)
    if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        raise ValueError(
            f"pipeline_parallel_size={stages} is not supported by Orthrus: both views share every layer, so a model "
            "cannot be cut between layers; use tensor_parallel_size"
        )
    if vllm_config.speculative_config is None:
        return
    if (dtype := vllm_config.cache_config.cache_dtype) not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"kv_cache_dtype={dtype} is not supported by Orthrus: leave it at auto")
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


def check_same_backend(target: Any, draft: Any) -> None:
    """`ValueError` unless both views read the cache by the same attention backend: each has its own layout of it."""
    if target is not draft:
        raise ValueError(
            f"the target's attention backend is {target.get_name()}, the draft's {draft.get_name()}: they read one "
            "cache, so set attention_backend of the speculative config to the target's"
        )
