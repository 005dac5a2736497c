"""The AR view inside vLLM: its own class for the base's family, which the draft finds by the layers that vLLM keeps for
an engine."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from orthrus.integrations.vllm.refusals import check_engine
from orthrus.integrations.vllm.symbols import (
    Attention,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    VllmConfig,
    get_layers_from_vllm_config,
)
from orthrus.model.modeling import is_view_tensor


class OrthrusTarget:
    """What stands in front of vLLM's own class, over a checkpoint that holds a diffusion view beside the base."""

    model: Any
    """The stack of layers between embedding and last norm."""
    logits_processor: Any
    """vLLM's module between the LM head and the logits."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        host: Any = super()
        host.__init__(vllm_config=vllm_config, prefix=prefix)
        # Kept on an attention layer: those belong to one engine, and a module's attribute would be a part of it.
        self.model.layers[0].self_attn.attn.orthrus_target = weakref.ref(self)

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, ...]:
        """Layers whose outputs vLLM hands to a draft. The view reads the cache instead, but vLLM wants one."""
        return (1,)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The base's tensors; the view's belong to the draft."""
        host: Any = super()
        return host.load_weights((name, tensor) for name, tensor in weights if not is_view_tensor(name))


class OrthrusQwen3(OrthrusTarget, Qwen3ForCausalLM):
    """vLLM's Qwen3 with a view."""


class OrthrusQwen2(OrthrusTarget, Qwen2ForCausalLM):
    """vLLM's Qwen2 with a view."""


class OrthrusLlama(OrthrusTarget, LlamaForCausalLM):
    """vLLM's Llama with a view."""


class OrthrusMistral(OrthrusTarget, MistralForCausalLM):
    """vLLM's Mistral with a view."""


TARGETS: dict[str, type[OrthrusTarget]] = {
    "qwen3": OrthrusQwen3, "qwen2": OrthrusQwen2, "llama": OrthrusLlama, "mistral": OrthrusMistral,
}  # fmt: skip
"""By `model_type` of config.json: one for each row of `model/bases.py`."""


class OrthrusOfAnyFamily(OrthrusQwen3):
    """What vLLM knows as OrthrusLM: made for a configuration, it is the target of that base's family.

    Merged checkpoints of all families name one architecture, as a stock base does under `--hf-overrides`. vLLM looks
    its class up by that name alone, and asks the class, not a model, what it can do (pipelines, text): all families
    answer alike (tests/vllm/test_families.py).
    """

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """A model that is no instance of this class, so that Python does not initialise it again."""
        check_engine(vllm_config)
        return TARGETS[vllm_config.model_config.hf_config.model_type](vllm_config=vllm_config, prefix=prefix)


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
