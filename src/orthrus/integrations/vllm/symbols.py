"""Every name of vLLM that the model classes rely on; where versions differ, they differ here."""

from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_attention_with_output, unified_kv_cache_update
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM

__all__ = [
    "Attention",
    "DFlashQwen3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "QKVParallelLinear",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "RMSNorm",
    "RowParallelLinear",
    "VllmConfig",
    "call_name",
    "get_forward_context",
    "get_layers_from_vllm_config",
    "longest_query",
    "support_torch_compile",
    "unified_attention_with_output",
    "unified_kv_cache_update",
]


def call_name(layer: Attention) -> object:
    """How the registered operations `torch.ops.vllm.*` want a layer named: newer versions hide the string from the
    compiler, so that one compiled layer serves all."""
    try:
        from vllm.model_executor.layers.attention.attention import _encode_layer_name
    except ImportError:
        return layer.layer_name
    return _encode_layer_name(layer.layer_name)


def longest_query(layer: Attention) -> int | None:
    """Positions of the pass's longest row as a layer's backend is told; None in a dummy pass and where it is not."""
    metadata = get_forward_context().attn_metadata
    own = metadata.get(layer.layer_name) if isinstance(metadata, dict) else None
    return getattr(own, "max_query_len", None)
