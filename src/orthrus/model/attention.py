"""Two sets of attention projections in one layer, and the one layer function that both views run.

The AR view is the base's own `q_proj .. o_proj, q_norm, k_norm`; the diffusion view is the trained twins of the same
names with `_diff` behind them. Everything else of a layer is shared (method.md section 2).

What attention reads (a cache, a training row) is the caller's: `run_layers` hands each layer's queries, keys and values
to an `attend` function and gets the mixed values back.

    B = rows, T = positions of the pass, D = hidden width, N = query heads, G = key/value heads, H = head dimension
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

View = Literal["ar", "diffusion"]
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""attend(attention module, q_BNTH, k_BGTH, v_BGTH) -> mixed values [B, T, N * H]."""

TWINS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
"""The modules of an attention layer that have a diffusion twin; a base without q/k norm lacks the last two."""


def add_twins(attention: nn.Module) -> None:
    """Give an attention module a `NAME_diff` of the same shape for each of its projections and norms.

    The twins' values are not set here: they come from a checkpoint, or from `copy_twins`.
    """
    for name in TWINS:
        module = getattr(attention, name, None)
        if isinstance(module, nn.Linear):
            twin = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            setattr(attention, f"{name}_diff", twin.to(module.weight.dtype))
        elif module is not None:
            setattr(attention, f"{name}_diff", type(module)(attention.head_dim, eps=module.variance_epsilon))


@torch.no_grad()
def copy_twins(attention: nn.Module) -> None:
    """Set every twin to its AR module's values: how a view starts (official code)."""
    for name in TWINS:
        if (module := getattr(attention, name, None)) is not None:
            getattr(attention, f"{name}_diff").load_state_dict(module.state_dict())


def check_untouched(model: nn.Module) -> None:
    """`ValueError` naming a hook or a replaced `forward` that no pass of this project would run.

    Passes call projections, MLPs, embeddings and the LM head as modules, but take decoder layers, attention modules
    and norms apart (`run_layer`): what hangs on those would be left out without a word.
    """
    for name, module in model.named_modules():
        is_called = isinstance(module, nn.Linear | nn.Embedding) or ".mlp" in name or "rotary_emb" in name
        if is_called or any(part in name for part in ("_proj", "embed_tokens", "lm_head")):
            continue
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise ValueError(
                f"{name or 'the model'} has a hook or a forward of its own, which block decoding would not run: remove "
                "it, or set it on a projection, the MLP, the embedding or the LM head"
            )


def twin(attention: nn.Module, name: str, view: View) -> Any:
    """The module that plays `name` in this view, or None where the base has none (no q/k norm)."""
    return getattr(attention, name if view == "ar" else f"{name}_diff", None)


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm's own formula in one fused call: a third of the time of the module's six on a CPU (measured).

    In the dtype of `x`: a view in training keeps fp32 weights under a bf16 base (`training/masters.py`).
    """
    return F.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.variance_epsilon)


def rotate(x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Rotary position embedding of the half-split kind, as Qwen and Llama have it."""
    first, second = x_BNTH.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_BNTH * cos_BTH[:, None] + rotated * sin_BTH[:, None]


def project(attention: nn.Module, x_BTD: Tensor, rope: tuple[Tensor, Tensor], view: View) -> tuple[Tensor, ...]:
    """Queries, keys and values of one view, normed and rotated: q [B, N, T, H], k and v [B, G, T, H]."""
    heads = (*x_BTD.shape[:-1], -1, attention.head_dim)
    q, k, v = (
        twin(attention, name, view)(x_BTD).view(heads).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
    )
    if (q_norm := twin(attention, "q_norm", view)) is not None:
        q, k = rms_norm(q_norm, q), rms_norm(twin(attention, "k_norm", view), k)
    return rotate(q, *rope), rotate(k, *rope), v


def run_layer(layer: nn.Module, hidden_BTD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, view: View) -> Tensor:
    """One decoder layer in one view: the view's attention, then the shared MLP, each behind its norm and residual."""
    attention = layer.self_attn
    q, k, v = project(attention, rms_norm(layer.input_layernorm, hidden_BTD), rope, view)
    mixed = attend(attention, q, k, v)
    hidden_BTD = hidden_BTD + twin(attention, "o_proj", view)(mixed)
    return hidden_BTD + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden_BTD))


def run_layers(model: nn.Module, ids_BT: Tensor, positions_BT: Tensor, attend: Attend, view: View) -> Tensor:
    """All layers of `model` (the decoder under the LM head) in one view; final hidden states, normed. [B, T, D]."""
    hidden_BTD = model.embed_tokens(ids_BT)
    rope = model.rotary_emb(hidden_BTD, positions_BT)
    for layer in model.layers:
        hidden_BTD = run_layer(layer, hidden_BTD, rope, attend, view)
    return rms_norm(model.norm, hidden_BTD)


def causal_attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention of whole rows over themselves, for passes that read no cache. [B, T, N * H]."""
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=attention.scaling)
    return mixed.transpose(1, 2).flatten(2)
