"""The diffusion view inside vLLM: the trained projections, between norms and MLPs that are the target's own modules.

vLLM samples draft i from row i of a block, where the anchor is row 0; the view's row i proposes the token behind
position i. So hidden states go out rolled by one row: row i carries what row i - 1 computed. What lands in a row 0 is
never looked at.

    S = positions of the pass (blocks of all rows, one behind the other), D = hidden width
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.integrations.vllm.attention import ViewAttention, borrow, drop_slots_behind
from orthrus.integrations.vllm.refusals import check_draft, check_load, check_same_backend, check_writes
from orthrus.integrations.vllm.self_check import SelfCheck
from orthrus.integrations.vllm.symbols import (
    DFlashQwen3ForCausalLM,
    VllmConfig,
    get_forward_context,
    longest_query,
    support_torch_compile,
)
from orthrus.integrations.vllm.target import OrthrusTarget, find_target
from orthrus.integrations.vllm.weights import load_view


class ViewLayer(nn.Module):
    """One decoder layer in the diffusion view."""

    def __init__(self, target: nn.Module, vllm_config: VllmConfig, *, prefix: str):
        super().__init__()
        self.self_attn = ViewAttention(target.self_attn, vllm_config, prefix=f"{prefix}.self_attn")
        borrow(self, "target", target)

    def forward(self, positions_S: Tensor, hidden_SD: Tensor, residual_SD: Tensor | None) -> tuple[Tensor, Tensor]:
        """As vLLM's layers are called: what the layer added last, and the sum of everything before it."""
        target = self.target
        if residual_SD is None:
            residual_SD = hidden_SD
            hidden_SD = target.input_layernorm(hidden_SD)
        else:
            hidden_SD, residual_SD = target.input_layernorm(hidden_SD, residual_SD)
        hidden_SD = self.self_attn(positions_S, hidden_SD)
        hidden_SD, residual_SD = target.post_attention_layernorm(hidden_SD, residual_SD)
        return target.mlp(hidden_SD), residual_SD


@support_torch_compile
class View(nn.Module):
    """The stack of layers in the diffusion view, compiled as vLLM compiles its own models."""

    use_aux_hidden_state = False

    def __init__(self, target: OrthrusTarget, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        num_layers = len(target.model.layers)
        # Numbered on behind the target's layers: vLLM tells layers apart by these names.
        self.layers = nn.ModuleList(
            ViewLayer(layer, vllm_config, prefix=f"{prefix}.layers.{num_layers + index}")
            for index, layer in enumerate(target.model.layers)
        )
        borrow(self, "target", target)
        borrow(self, "embed_tokens", target.model.embed_tokens)  # vLLM looks for one, and puts the target's there

    def forward(self, input_ids_S: Tensor, positions_S: Tensor, embedded_SD: Tensor | None = None) -> Tensor:
        """Final hidden states of the blocks, normed. [S, D]."""
        target = self.target
        hidden_SD = target.embed_input_ids(input_ids_S) if embedded_SD is None else embedded_SD
        residual_SD = None
        for layer in self.layers:
            hidden_SD, residual_SD = layer(positions_S, hidden_SD, residual_SD)
        hidden_SD, _ = target.model.norm(hidden_SD, residual_SD)
        return hidden_SD


def roll(hidden_SD: Tensor) -> Tensor:
    """Row i of the result is row i - 1. [S, D]."""
    return torch.roll(hidden_SD, 1, dims=0)


class OrthrusDraft(DFlashQwen3ForCausalLM):
    """What vLLM takes for a DFlash model: it asks for this type, and for a few methods of it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)  # not DFlash's own, which builds a whole model
        speculation = vllm_config.speculative_config
        self.draft_model_config = speculation.draft_model_config
        self.config = self.draft_model_config.hf_config
        check_draft(vllm_config)
        target = find_target(vllm_config)
        self.model = View(target, vllm_config=vllm_config, prefix=f"{prefix}.model".lstrip("."))
        for layer, own in zip(target.model.layers, self.model.layers, strict=True):
            check_same_backend(layer.self_attn.attn.attn_backend, own.self_attn.attn.attn_backend)
            check_writes(own.self_attn.attn)
        self._num_positions = vllm_config.model_config.max_model_len - 1  # nothing is drafted for the last
        self._block_size, self._dtype = speculation.num_speculative_tokens + 1, vllm_config.model_config.dtype
        self.start_check()
        self.varies_width = bool(speculation.num_speculative_tokens_per_batch_size)
        check_load(vllm_config)
        if self.varies_width and vllm_config.use_v2_model_runner:
            from orthrus.integrations.vllm.speculator import follow_table  # the V1 runner has no need of its imports

            follow_table()
        self.draft_id_to_target_id = None
        self.logits_processor = target.logits_processor
        # vLLM gives the draft the target's embedding and head; these say that it has none of its own.
        self.has_own_embed_tokens = self.has_own_lm_head = False

    def embed_input_ids(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """The target's embedding of token ids. [S, D]."""
        return self.model.target.embed_input_ids(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Hidden states where vLLM looks for them: row i holds the view's row i - 1. [S, D]."""
        first = self.model.layers[0].self_attn.attn
        if longest_query(first) == 1:  # anchors alone: vLLM's V1 runner runs this pass at width 0, and reads none of it
            return self.model.target.lm_head.weight.new_zeros(len(input_ids), 1)
        drop_slots_behind(self._num_positions, positions, first)
        if self.self_check.done:
            return roll(self.model(input_ids, positions, inputs_embeds))
        self.self_check.begin(
            target_layers=[layer.target.self_attn.attn for layer in self.model.layers],
            view_layers=[layer.self_attn.attn for layer in self.model.layers],
            context=get_forward_context(), input_ids_S=input_ids, positions_S=positions,
        )  # fmt: skip
        hidden_SD = self.model(input_ids, positions, inputs_embeds)
        self.self_check.ran(hidden_SD)
        return roll(hidden_SD)

    def start_check(self) -> None:
        """Look at the next draft pass that has a row's cache, and warn of what is wrong with it."""
        self.self_check = SelfCheck(
            mask_token_id=self.config.mask_token_id, block_size=self._block_size, dtype=self._dtype
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits by the target's head."""
        if not self.self_check.done:
            self.self_check.sampled(hidden_states)
        return self.logits_processor(self.model.target.lm_head, hidden_states)

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """What vLLM collected of the target's layers, as it is: nobody reads it."""
        return hidden_states

    def precompute_and_store_context_kv(self, *_: Any, **__: Any) -> None:
        """Nothing: what the view reads of the text is what the target wrote."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The view's tensors; all others are the target's."""
        return load_view(self, weights, source=str(self.draft_model_config.model))
