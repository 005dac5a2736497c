"""A model's weights laid out for inference on a CPU: the passes of `attention.run_layers` in fewer, larger products.

oneDNN multiplies by a weight in blocks of its own; `F.linear` hands it the plain layout, and at the few rows of a
decoding pass rearranging that costs as much as the product. `PackedModel` keeps every weight in oneDNN's layout, with
the products that share an input joined into one, and its small operations written for few rows and no autograd.

It is a second copy of the weights, so it is built only where it helps and where it can be kept true (`can_pack`), and
`pack` notices any edit of what was copied.

    B = rows, T = positions of the pass, D = hidden width, N = query heads, G = key/value heads, H = head dimension
"""

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from orthrus.model.attention import Attend, View, twin
from orthrus.model.bases import ROWS

MAX_BYTES = 512 * 2**20
"""Weights of more bytes than this are not copied."""
OPERATORS = (
    "_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported", "_linear_pointwise", "_reorder_linear_weight",
)  # fmt: skip
"""What torch calls these products by: private names, so their absence is expected."""
MLPS = tuple(row.mlp for row in ROWS)
"""The MLPs that `SharedPart.mlp` computes; others run as they are."""


# --- whether and when --------------------------------------------------------------------------------------------


def can_pack(model: nn.Module) -> bool:
    """Whether oneDNN's products are there for this model's device and dtype, and its layers are the plain ones.

    A layer with a hook, an adapter, a parametrisation or a quantised weight is not plain: it must run as it is.
    """
    if model.device.type != "cpu" or not has_packed_products(model.dtype):
        return False
    if not all(type(layer.mlp) in MLPS and is_untouched(layer.mlp) for layer in model.model.layers):
        return False
    return all(is_plain(linear, model.dtype) for linear in linears(model))


def has_packed_products(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have the operators for the dtype. Measured on x86 alone."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def is_plain(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling this module is nothing but a product with its weight, plus its bias."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or not is_untouched(linear):
        return False
    weight = linear.weight
    return weight.dtype == dtype and weight.device.type == "cpu" and is_aligned(weight)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else."""
    return not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


def is_aligned(weight: Tensor) -> bool:
    """Whether a matrix can be read eight bytes at a time, as `stamp` does."""
    row_bytes = weight.shape[1] * weight.element_size()
    return weight.is_contiguous() and row_bytes % 8 == 0 and weight.storage_offset() * weight.element_size() % 8 == 0


def linears(model: nn.Module) -> Iterator[Any]:
    """Every linear layer that a pass of either view calls."""
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield getattr(layer.self_attn, name)
            yield getattr(layer.self_attn, f"{name}_diff")
        yield from (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    yield model.lm_head


def num_bytes(model: nn.Module) -> int:
    """What the packed copy takes."""
    return sum(linear.weight.nbytes for linear in linears(model))


Stamp = tuple[int, int, float]
_packed: "WeakKeyDictionary[nn.Module, PackedModel]" = WeakKeyDictionary()
"""What `pack` keeps, for as long as the model lives. Not on the model, which people copy and pickle."""


def stamp(tensor: Tensor) -> Stamp:
    """Tells an edited tensor from an untouched one: its place, its version, and the sum of its bits (its values, in a
    vector).

    The sum is for edits through `.data`, which move no version counter: a millisecond for 50 MB, once a request. It
    misses one thing: `.data` edits that only move whole groups of eight bytes about.
    """
    version = -1 if tensor.is_inference() else tensor._version
    numbers = tensor.detach().view(torch.int64) if tensor.dim() > 1 else tensor.detach().double()
    return tensor.data_ptr(), version, numbers.sum().item()


def stamps(model: nn.Module) -> list[Stamp]:
    """The stamps of everything that `PackedModel` copies."""
    copied = [t for linear in linears(model) for t in (linear.weight, linear.bias) if t is not None]
    for layer in model.model.layers:
        norms = [twin(layer.self_attn, name, view) for name in ("q_norm", "k_norm") for view in ("ar", "diffusion")]
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        copied += [norm.weight for norm in norms if norm is not None]
    return [stamp(tensor) for tensor in [*copied, model.model.norm.weight, model.model.rotary_emb.inv_freq]]


@torch.inference_mode()
def pack(model: nn.Module) -> "PackedModel | None":
    """The packed form of the model as its weights are now; None where it cannot be packed or is too large to be copied.

    Kept for the next call: a model is packed once, and again when anything that was copied has changed.
    """
    if not can_pack(model) or num_bytes(model) > MAX_BYTES:
        _packed.pop(model, None)
        return None
    current, known = stamps(model), _packed.get(model)
    if known is None or known.stamps != current:
        known = _packed[model] = PackedModel(model, current)
    return known


def is_packed(model: nn.Module) -> bool:
    """Whether the model's last request ran over a packed copy."""
    return model in _packed


# --- what a pass consists of -------------------------------------------------------------------------------------


class Product:
    """One or several linear layers of the same input as one product; their outputs lie one after the other."""

    def __init__(self, *parts: nn.Linear):
        weight = parts[0].weight if len(parts) == 1 else torch.cat([part.weight for part in parts])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias: Tensor | None = None
        if any(part.bias is not None for part in parts):
            zeros = [part.weight.new_zeros(part.out_features) for part in parts]
            biases = [zero if part.bias is None else part.bias for part, zero in zip(parts, zeros, strict=True)]
            self._bias = torch.cat(biases).detach()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs of all parts]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


class Norm:
    """RMSNorm over the last dimension, in fp32 and rounded once, whatever comes in.

    x / sqrt(mean(x^2) + eps) * w, written as x / sqrt(|x|^2 + D eps) * (sqrt(D) w): what counts at the sizes of a
    decoding pass is the number of kernels. Every step is correctly rounded (no hypot), so that a row's bits do not
    depend on whether a vector instruction or the loop behind it handles the row.
    """

    def __init__(self, weight: Tensor, eps: float):
        width = weight.shape[-1]
        self._dtype = weight.dtype
        self._weight = weight.detach().float() * math.sqrt(width)
        self._floor = width * eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the weight's dtype."""
        x = x.float()
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.div(x, size.square_().add_(self._floor).sqrt_()).mul_(self._weight).to(self._dtype)

    @classmethod
    def of(cls, norm: nn.Module) -> "Norm":
        """A norm module's twin."""
        return cls(norm.weight, norm.variance_epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPart:
    """What both views of a layer run: its norms and its MLP."""

    input_norm: Norm
    post_norm: Norm
    gate_up: Product
    module: nn.Module
    """The MLP itself, asked for its activation, which is no weight."""
    down: Product

    def mlp(self, hidden_BTD: Tensor) -> Tensor:
        """Norm and MLP, without the residual."""
        gate, up = self.gate_up(self.post_norm(hidden_BTD)).chunk(2, dim=-1)
        return self.down(self.module.act_fn(gate) * up)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLayer:
    """One layer in one view."""

    attention: nn.Module
    qkv: Product
    qk_norm: Norm | None
    """Of all query and key heads at once, its weight [N + G, H]; None where the base has none."""
    out: Product
    shared: SharedPart


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the half-split kind; the sines' first half comes negated. Both [B, T, 1, H]."""
    return torch.mul(x_BTNH, cos).addcmul_(x_BTNH.roll(x_BTNH.shape[-1] // 2, -1), sin)


class PackedModel:
    """Both views of an `OrthrusLM`, packed. Under `torch.inference_mode` only."""

    def __init__(self, model: nn.Module, stamps: list[Stamp]):
        self.stamps = stamps
        """Of what was copied."""
        config = model.config
        self._num_q, self._num_kv = config.num_attention_heads, config.num_key_value_heads
        self._head_dim: int = config.head_dim
        self._decoder = model.model
        """Asked for what is not copied: embeddings and rotary positions. It holds no reference to `model`."""
        self._views: dict[View, list[PackedLayer]] = {"ar": [], "diffusion": []}
        for layer in model.model.layers:
            shared = pack_shared(layer)
            for view, layers in self._views.items():
                layers.append(self._pack_layer(layer.self_attn, shared, view))
        self._norm = Norm.of(model.model.norm)
        self._head = Product(model.lm_head)
        self._rope_P2H = torch.empty(0, 2, self._head_dim, dtype=model.dtype)

    def run(self, ids_BT: Tensor, positions_BT: Tensor, attend: Attend, view: View) -> Tensor:
        """What `attention.run_layers` computes: all layers in one view; final hidden states, normed. [B, T, D]."""
        hidden_BTD = self._decoder.embed_tokens(ids_BT).float()
        rope_BT2H = self._rope(positions_BT)
        cos, sin = rope_BT2H[:, :, 0, None], rope_BT2H[:, :, 1, None]
        for layer in self._views[view]:
            hidden_BTD += self._attention(layer, hidden_BTD, (cos, sin), attend)
            hidden_BTD += layer.shared.mlp(hidden_BTD)
        return self._norm(hidden_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V]."""
        return self._head(hidden)

    def _attention(self, layer: PackedLayer, hidden_BTD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Norm and attention, without the residual."""
        num_q, num_kv = self._num_q, self._num_kv
        qkv_BTNH = layer.qkv(layer.shared.input_norm(hidden_BTD)).view(*hidden_BTD.shape[:2], -1, self._head_dim)
        qk_BTNH, v_BTGH = qkv_BTNH.split((num_q + num_kv, num_kv), dim=2)
        if layer.qk_norm is not None:
            qk_BTNH = layer.qk_norm(qk_BTNH)
        q_BNTH, k_BGTH = rotate(qk_BTNH, *rope).transpose(1, 2).split((num_q, num_kv), dim=1)
        return layer.out(attend(layer.attention, q_BNTH, k_BGTH, v_BTGH.transpose(1, 2)))

    def _rope(self, positions_BT: Tensor) -> Tensor:
        """Cosines and signed sines of these positions. [B, T, 2, H]."""
        if self._decoder.rotary_emb.rope_type != "default":  # some other types look at the positions they are given
            return self._signed_rope(positions_BT)
        num_positions = int(positions_BT.max()) + 1
        if num_positions > len(self._rope_P2H):
            positions_1P = torch.arange(max(num_positions, 2 * len(self._rope_P2H)))[None]
            self._rope_P2H = self._signed_rope(positions_1P)[0]
        return self._rope_P2H[positions_BT]

    def _signed_rope(self, positions_BT: Tensor) -> Tensor:
        cos, sin = self._decoder.rotary_emb(self._rope_P2H, positions_BT)
        first, second = sin.chunk(2, dim=-1)
        return torch.stack([cos, torch.cat([-first, second], dim=-1)], dim=2)

    def _pack_layer(self, attention: nn.Module, shared: SharedPart, view: View) -> PackedLayer:
        q_norm, k_norm = twin(attention, "q_norm", view), twin(attention, "k_norm", view)
        qk_norm = None
        if q_norm is not None:
            weights = [q_norm.weight.expand(self._num_q, -1), k_norm.weight.expand(self._num_kv, -1)]
            qk_norm = Norm(torch.cat(weights), q_norm.variance_epsilon)
        return PackedLayer(
            attention=attention,
            qkv=Product(*(twin(attention, name, view) for name in ("q_proj", "k_proj", "v_proj"))),
            qk_norm=qk_norm,
            out=Product(twin(attention, "o_proj", view)),
            shared=shared,
        )


def pack_shared(layer: nn.Module) -> SharedPart:
    """The shared part of a decoder layer."""
    mlp = layer.mlp
    return SharedPart(
        input_norm=Norm.of(layer.input_layernorm),
        post_norm=Norm.of(layer.post_attention_layernorm),
        gate_up=Product(mlp.gate_proj, mlp.up_proj),
        module=mlp,
        down=Product(mlp.down_proj),
    )
