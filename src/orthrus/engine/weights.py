"""A dual-view model's weights as the engine's passes read them: joined where products share an input, never copied.

The joined tensors take the place of the model's own: each of its parameters becomes a view of its rows. So the Hugging
Face modules and the engine read the same memory, an edit in place (`load_state_dict`) reaches both, and making the
engine takes one layer's worth of memory for a moment.

    D = hidden width, N = query heads, G = key/value heads, H = head dimension, A = N * H, E = (N + 2 G) * H, F = width
    of the MLP, V = vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from orthrus.decoding.backends import DraftPrecision
from orthrus.engine.quantise import quantise_weight
from orthrus.engine.reference import HeadNorms, Rotary
from orthrus.model.attention import View, twin
from orthrus.model.bases import ROWS

MLPS = tuple(row.mlp for row in ROWS)
"""The MLPs that `swiglu` and `linear` compute."""

DRAFT_PRECISIONS: tuple[DraftPrecision, ...] = get_args(DraftPrecision)
"""What copies of weights for drafts may be kept in."""
FP8_SINCE = (8, 9)
"""Compute capability of the first GPUs that multiply float8_e4m3fn."""


class Matrix(NamedTuple):
    """The weight of a product, and what follows the product."""

    weight_ED: Tensor
    bias_E: Tensor | None = None
    scale_E: Tensor | None = None
    """With a weight in float8_e4m3fn: what each output is multiplied with, fp32."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.weight_ED.nbytes + (0 if self.scale_E is None else self.scale_E.nbytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWeights:
    """One layer's attention in one view."""

    qkv: Matrix
    """[E, D]."""
    norms: HeadNorms | None
    """None where the base has none."""
    out: Matrix
    """[D, A]."""
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpWeights:
    """One layer's MLP: the same tensors in both views, unless drafts have copies of their own."""

    gate_up: Matrix
    """[2 F, D], the gate's rows first."""
    down: Matrix
    """[D, F]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer in both views."""

    attention: dict[View, AttentionWeights]
    mlp: dict[View, MlpWeights]
    input_norm_D: Tensor
    post_norm_D: Tensor
    input_eps: float
    post_eps: float


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's weights, and the shapes that passes need."""

    embedding_VD: Tensor
    layers: tuple[LayerWeights, ...]
    norm_D: Tensor
    eps: float
    head: dict[View, Matrix]
    """[V, D]; the embedding itself where they are tied."""
    num_heads: int
    num_groups: int
    head_dim: int
    places: dict[str, int]
    """Where each of the model's parameters lay when its weights were taken."""
    draft_precision: DraftPrecision | None
    """What drafts' copies of the matrices are in; None: there are none."""
    versions: dict[str, int]
    """How often each of the model's parameters had been edited in place when copies were made; empty without copies."""

    @property
    def draft_bytes(self) -> int:
        """Bytes of the copies that drafts alone read."""
        return sum(copy.num_bytes for copy in self._draft_matrices() if copy.scale_E is not None)

    def _draft_matrices(self) -> Iterator[Matrix]:
        yield self.head["diffusion"]
        for layer in self.layers:
            attention, mlp = layer.attention["diffusion"], layer.mlp["diffusion"]
            yield from (attention.qkv, attention.out, mlp.gate_up, mlp.down)

    def are_copies_fresh(self, model: nn.Module) -> bool:
        """Whether drafts' copies still are the model's weights. An edit through `.data` moves no version: unseen."""
        return not self.versions or self.versions == versions_of(model)

    def check_places(self, model: nn.Module) -> None:
        """`ValueError` when the model's weights lie elsewhere now, so that the engine would not see them change."""
        if places_of(model) != self.places:
            raise ValueError(
                "the model's weights were moved or replaced after the engine took them (`.to`, an adapter, a new "
                "parameter): build a new engine"
            )


def take_weights(model: nn.Module, draft_precision: DraftPrecision | None = None) -> Weights:
    """Join the weights of an `OrthrusLM`, whose parameters become views of the joined ones.

    With a `draft_precision` of "fp8" draft passes read a second copy of all matrices, a byte a weight, which the AR
    view never reads: drafts change, the text does not. Later edits of the weights do not reach the copies
    (`Weights.are_copies_fresh`).

    Raises `ValueError` naming what the engine's passes do not compute; then the model is as it was.
    """
    check_supported(model)
    check_draft_precision(draft_precision, model.device)
    config, decoder = model.config, model.model
    for_drafts = {None: lambda matrix: matrix, "fp8": in_fp8}[draft_precision]
    layers = tuple(_take_layer(layer, for_drafts) for layer in decoder.layers)
    head = Matrix(model.lm_head.weight.detach())
    return Weights(
        embedding_VD=decoder.embed_tokens.weight.detach(),
        layers=layers,
        norm_D=decoder.norm.weight.detach(),
        eps=decoder.norm.variance_epsilon,
        head={"ar": head, "diffusion": for_drafts(head)},
        num_heads=config.num_attention_heads,
        num_groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        places=places_of(model),
        draft_precision=draft_precision,
        versions={} if draft_precision is None else versions_of(model),
    )


def check_draft_precision(draft_precision: str | None, device: torch.device) -> None:
    """`ValueError` for another precision, and for one that the device's products are not made in."""
    if draft_precision not in (None, *DRAFT_PRECISIONS):
        raise ValueError(
            f"draft_precision must be one of {', '.join(DRAFT_PRECISIONS)} or None, got {draft_precision!r}"
        )
    if draft_precision is None or device.type != "cuda":
        return
    if (found := torch.cuda.get_device_capability(device)) < FP8_SINCE:
        raise ValueError(
            f"draft_precision={draft_precision!r} needs a GPU that multiplies fp8 (compute capability "
            f"{FP8_SINCE[0]}.{FP8_SINCE[1]} or more), this one has {found[0]}.{found[1]}: leave it away"
        )


def copies_bytes(model: nn.Module, draft_precision: DraftPrecision | None) -> int:
    """The `draft_bytes` that `take_weights` would give: a byte a weight, and 4 of scale an output."""
    if draft_precision is None:
        return 0
    copied = [model.lm_head.weight]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        copied += [twin(attention, f"{name}_proj", "diffusion").weight for name in "qkvo"]
        copied += [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    return sum(weight_ED.numel() + 4 * len(weight_ED) for weight_ED in copied)


def check_supported(model: nn.Module) -> None:
    """`ValueError` naming the first thing about a model that the engine's passes would leave out."""
    config = model.config
    advice = "decode with the portable backend"
    if (rope_type := config.rope_parameters.get("rope_type", "default")) == "dynamic":
        raise ValueError(f"rope_type {rope_type!r} is not supported by the engine, whose angles are fixed: {advice}")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported by the engine, only 'silu': {advice}")
    if getattr(config, "mlp_bias", False):
        raise ValueError(f"mlp_bias is not supported by the engine: {advice}")
    if len(kinds := {(p.device, p.dtype) for p in model.parameters()}) > 1:
        named = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise ValueError(f"the engine needs all weights in one dtype on one device, these are {named}: {advice}")
    check_modules(model)


def check_modules(model: nn.Module) -> None:
    """`ValueError` naming a module that is more than its weights: hooks, adapters, quantised layers, another MLP."""
    for name, module in model.named_modules():
        is_plain = not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        if name.endswith(("_proj", "_proj_diff", "lm_head")):
            is_plain = is_plain and type(module) is nn.Linear
        elif name.endswith(".mlp"):
            is_plain = is_plain and isinstance(module, MLPS)
        if not is_plain:
            raise ValueError(
                f"{name or 'the model'} has a hook, an adapter or a forward of its own, which the engine would not "
                "run: remove it, or decode with the portable backend"
            )


def places_of(model: nn.Module) -> dict[str, int]:
    """The address of each parameter."""
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def versions_of(model: nn.Module) -> dict[str, int]:
    """How often each parameter was edited in place; inference tensors do not count that."""
    return {name: -1 if p.is_inference() else p._version for name, p in model.named_parameters()}


def rotary_tables(model: nn.Module, num_positions: int) -> Rotary:
    """The angles of positions 0 .. num_positions - 1 by the model's own rotary module, in the model's dtype."""
    decoder = model.model
    positions_1T = torch.arange(num_positions, device=model.device)[None]
    cos_1TH, sin_1TH = decoder.rotary_emb(decoder.embed_tokens.weight[:1], positions_1T)
    return Rotary(cos_1TH[0].contiguous(), sin_1TH[0].contiguous())


@torch.no_grad()
def join(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Parameters one after the other along their first dimension; each becomes a view of its part.

    What is joined already is taken as it is: several engines share one model's memory.
    """
    datas = [parameter.detach() for parameter in parameters]
    if (joined := _adjacent(datas)) is not None:
        return joined
    joined = torch.cat(datas)
    for parameter, part in zip(parameters, joined.split([len(data) for data in datas]), strict=True):
        parameter.data = part
    return joined


def _adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie one after the other in one storage, as one; None for others."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.is_contiguous() and tensor.storage_offset() == end):
            return None
        end += tensor.numel()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def in_fp8(matrix: Matrix) -> Matrix:
    """A copy in float8_e4m3fn."""
    weight_ED, scale_E = quantise_weight(matrix.weight_ED)
    return Matrix(weight_ED, matrix.bias_E, scale_E)


def _take_layer(layer: nn.Module, for_drafts: Callable[[Matrix], Matrix]) -> LayerWeights:
    mlp = layer.mlp
    gate_up, down = Matrix(join([mlp.gate_proj.weight, mlp.up_proj.weight])), Matrix(mlp.down_proj.weight.detach())
    return LayerWeights(
        attention={
            "ar": _take_attention(layer.self_attn, "ar", lambda matrix: matrix),
            "diffusion": _take_attention(layer.self_attn, "diffusion", for_drafts),
        },
        mlp={
            "ar": MlpWeights(gate_up=gate_up, down=down),
            "diffusion": MlpWeights(gate_up=for_drafts(gate_up), down=for_drafts(down)),
        },
        input_norm_D=layer.input_layernorm.weight.detach(),
        post_norm_D=layer.post_attention_layernorm.weight.detach(),
        input_eps=layer.input_layernorm.variance_epsilon,
        post_eps=layer.post_attention_layernorm.variance_epsilon,
    )


def _take_attention(attention: nn.Module, view: View, for_view: Callable[[Matrix], Matrix]) -> AttentionWeights:
    projections = [twin(attention, name, view) for name in ("q_proj", "k_proj", "v_proj")]
    out = twin(attention, "o_proj", view)
    norms = None
    if (q_norm := twin(attention, "q_norm", view)) is not None:
        k_norm = twin(attention, "k_norm", view)
        norms = HeadNorms(q_norm.weight.detach(), k_norm.weight.detach(), q_norm.variance_epsilon)
    qkv_ED = join([projection.weight for projection in projections])
    has_bias = projections[0].bias is not None
    qkv_bias_E = join([projection.bias for projection in projections]) if has_bias else None
    return AttentionWeights(
        qkv=for_view(Matrix(qkv_ED, qkv_bias_E)),
        norms=norms,
        out=for_view(Matrix(out.weight.detach(), None if out.bias is None else out.bias.detach())),
        scale=attention.scaling,
    )
