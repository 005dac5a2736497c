"""Attention of the diffusion view inside vLLM: its own projections, and the target's slots of the cache.

A block reads the target's keys and values of everything before its anchor, and its own of the block. vLLM gives both
one place: a layer that shares another's cache has none of its own, and the slots behind the row's length are reserved
for what will be verified there. So the view's keys and values are written into them; the verify pass overwrites them.

    S = positions of the pass (blocks of all rows, one behind the other), D = hidden width
"""

from typing import Any

import torch
from torch import Tensor, nn

from orthrus.integrations.vllm.symbols import (
    Attention,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VllmConfig,
    call_name,
    get_forward_context,
    unified_attention_with_output,
    unified_kv_cache_update,
)


def borrow(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Give `owner` an attribute that is another's module, without making it a part: it is loaded, moved and counted
    where it belongs."""
    object.__setattr__(owner, name, module)


def drop_slots_behind(num_positions: int, positions_S: Tensor, layer: Attention) -> None:
    """Have nothing written for positions from `num_positions` on, which the cache has no room for.

    vLLM's V2 runner drafts beyond its longest sequence and gives such positions slots of the row's last page, over keys
    and values of the text. -1 is its word for no slot.
    """
    slots = get_forward_context().slot_mapping
    own = slots.get(layer.layer_name) if isinstance(slots, dict) else None
    if own is not None:
        own[: len(positions_S)].masked_fill_(positions_S >= num_positions, -1)


class BlockAttention(Attention):
    """vLLM's attention layer over the cache of another, which it writes before it reads.

    vLLM's own layer leaves that write out where a cache is shared, since other models share it with a layer that wrote
    the same positions in the same pass. Without it a block attends to whatever was in its slots: the text is the same
    and most drafts are wrong.
    """

    def __init__(self, *arguments: Any, shared_with: Attention, **options: Any):
        super().__init__(*arguments, **options)
        # Set behind the constructor, which would tell the backend, whose write then does nothing either.
        self.kv_sharing_target_layer_name = shared_with.layer_name

    def write(self, k: Tensor, v: Tensor) -> Tensor | None:
        """Put the block's keys and values into its slots; what `read` has to be given so that it comes behind this."""
        if self.attn_backend.forward_includes_kv_cache_update:
            return None  # reading writes
        if self.use_direct_call:
            return unified_kv_cache_update(k, v, self.layer_name)
        return torch.ops.vllm.unified_kv_cache_update(k, v, call_name(self))

    def read(self, q: Tensor, k: Tensor, v: Tensor, written: Tensor | None) -> Tensor:
        """The mixed values of each position, from the cache. Like q."""
        mixed = torch.empty_like(q)
        if self.use_direct_call:
            unified_attention_with_output(q, k, v, mixed, self.layer_name, kv_cache_dummy_dep=written)
        else:
            torch.ops.vllm.unified_attention_with_output(q, k, v, mixed, call_name(self), kv_cache_dummy_dep=written)
        return mixed

    def forward(self, q_SD: Tensor, k_SD: Tensor, v_SD: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attention of each position over its row's cache and block. [S, heads * head_dim]."""
        q = q_SD.view(-1, self.num_heads, self.head_size)
        k, v = (x.view(-1, self.num_kv_heads, self.head_size) for x in (k_SD, v_SD))
        return self.read(q, k, v, self.write(k, v)).flatten(1)


class ViewAttention(nn.Module):
    """The `*_diff` projections and norms of one layer, around a `BlockAttention`."""

    causal = False

    def __init__(self, target: nn.Module, vllm_config: VllmConfig, *, prefix: str):
        """`target` is the AR view's attention in the same layer, which says how large everything is."""
        super().__init__()
        hidden_size = target.o_proj.output_size
        self.num_heads, self.num_kv_heads, self.head_dim = target.num_heads, target.num_kv_heads, target.head_dim
        self.q_size, self.kv_size = target.q_size, target.kv_size
        self.qkv_proj = QKVParallelLinear(
            hidden_size, target.head_dim, target.total_num_heads, target.total_num_kv_heads,
            bias=target.qkv_proj.bias is not None, prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            target.total_num_heads * target.head_dim, hidden_size,
            bias=target.o_proj.bias is not None, prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        if hasattr(target, "q_norm"):
            self.q_norm = RMSNorm(target.head_dim, eps=target.q_norm.variance_epsilon)
            self.k_norm = RMSNorm(target.head_dim, eps=target.k_norm.variance_epsilon)
        self.attn = BlockAttention(
            target.num_heads, target.head_dim, target.scaling, num_kv_heads=target.num_kv_heads,
            cache_config=vllm_config.cache_config, prefix=f"{prefix}.attn", shared_with=target.attn,
        )  # fmt: skip
        borrow(self, "rotary_emb", target.rotary_emb)

    def _normed(self, x_SD: Tensor, name: str) -> Tensor:
        norm = getattr(self, name, None)
        return x_SD if norm is None else norm(x_SD.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    def forward(self, positions_S: Tensor, hidden_SD: Tensor) -> Tensor:
        """What attention adds to each position of the blocks. [S, D]."""
        qkv, _ = self.qkv_proj(hidden_SD)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions_S, self._normed(q, "q_norm"), self._normed(k, "k_norm"))
        mixed, _ = self.o_proj(self.attn(q, k, v))
        return mixed
