"""The AR view inside vLLM: its own Qwen3, which the draft finds by the layers that vLLM keeps for an engine."""

import weakref
from collections.abc import Iterable

from torch import Tensor

from orthrus.integrations.vllm.refusals import check_engine
from orthrus.integrations.vllm.symbols import Attention, Qwen3ForCausalLM, VllmConfig, get_layers_from_vllm_config
from orthrus.model.modeling import is_view_tensor


class OrthrusTarget(Qwen3ForCausalLM):
    """vLLM's Qwen3 over a checkpoint that holds a diffusion view beside the base."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Kept on an attention layer: those belong to one engine, and a module's attribute would be a part of it.
        self.model.layers[0].self_attn.attn.orthrus_target = weakref.ref(self)

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, ...]:
        """Layers whose outputs vLLM hands to a draft. The view reads the cache instead, but vLLM wants one."""
        return (1,)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The base's tensors; the view's belong to the draft."""
        return super().load_weights((name, tensor) for name, tensor in weights if not is_view_tensor(name))


def find_target(vllm_config: VllmConfig) -> OrthrusTarget:
    """The target of the engine that this configuration belongs to; `ValueError` where it is another model."""
    for layer in get_layers_from_vllm_config(vllm_config, Attention).values():
        if (found := getattr(layer, "orthrus_target", None)) is not None:
            return found()
    architectures = ", ".join(vllm_config.model_config.architectures)
    raise ValueError(
        f"the target is {architectures}, which does not lend its layers: an Orthrus view drafts for OrthrusLM "
        """(for a stock base add --hf-overrides '{"architectures": ["OrthrusLM"]}')"""
    )
