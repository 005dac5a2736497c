"""What the engine's kernels compute, in plain torch: their slow twins, and what runs where there is no GPU.

Each function here has a kernel of the same name and arguments in `engine/kernels/`. A pass takes W positions of each of
B rows, flat: R = B x W, row b's positions at b * W .. b * W + W - 1, its w-th at absolute position lengths[b] + w. Keys
and values lie in pages; slot s of a row is slot s % S of page tables[b, s // S].

Products are summed in fp32 and rounded once to the dtype of the input. A row's result depends on nothing but that row:
not on R, not on its neighbours, not on where it stands (L1 and L2 of docs/lossless.md).

    R = rows of a pass, D = hidden width, E = outputs, F = width of the MLP, N = query heads, G = key/value heads, H =
    head dimension, P = pages, S = slots of a page, M = pages of a table, V = vocabulary
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.decoding import sampling
from orthrus.engine.quantise import quantise_rows
from orthrus.model.masks import draft_mask, verify_mask


class Pages(NamedTuple):
    """One layer's keys and values, and which of them belong to whom."""

    keys_PSGH: Tensor
    values_PSGH: Tensor
    tables_BM: Tensor
    """int32: the pages of each row, in order; what lies behind a row's last page is never read."""
    lengths_B: Tensor
    """int32, on the device: committed tokens of each row, which is the position of its first in this pass."""


class Rotary(NamedTuple):
    """Cosines and sines of every position, [positions, H] each, in the model's dtype; halves rotate together."""

    cos_TH: Tensor
    sin_TH: Tensor


class HeadNorms(NamedTuple):
    """RMS norms of queries and keys over their head dimension (Qwen3)."""

    query_H: Tensor
    key_H: Tensor
    eps: float


def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in fp32, rounded once. [R, D]."""
    x = x_RD.float()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight_D.float()).to(x_RD.dtype)


def linear(
    x_RD: Tensor,
    weight_ED: Tensor,
    *,
    bias_E: Tensor | None = None,
    residual_RE: Tensor | None = None,
    scale_E: Tensor | None = None,
) -> Tensor:
    """x . weight' * scale + bias + residual, in fp32, rounded once. [R, E].

    `weight` may be float8_e4m3fn with an fp32 `scale` for each output (a draft pass's second copy): rows are then
    quantised as weights are, each by its largest number.
    """
    out = _product(x_RD, weight_ED)
    if scale_E is not None:
        out = out * scale_E
    if bias_E is not None:
        out = out + bias_E.float()
    if residual_RE is not None:
        out = out + residual_RE.float()
    return out.to(x_RD.dtype)


def _product(x_RD: Tensor, weight_ED: Tensor) -> Tensor:
    """x . weight' in fp32, of quantised rows where the weight is. [R, E]."""
    if x_RD.dtype == weight_ED.dtype:
        return x_RD.float() @ weight_ED.float().T
    quantised_RD, scale_R = quantise_rows(x_RD)
    return quantised_RD.float() @ weight_ED.float().T * scale_R[:, None]


def swiglu(x_RD: Tensor, weight_2FD: Tensor, *, scale_2F: Tensor | None = None) -> Tensor:
    """silu(x . gate') * (x . up'), the first F rows of the weight being the gate's. In fp32, rounded once. [R, F]."""
    both = _product(x_RD, weight_2FD)
    if scale_2F is not None:
        both = both * scale_2F
    gate, up = both.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x_RD.dtype)


def linear_and_norm(
    x_RD: Tensor,
    weight_ED: Tensor,
    *,
    norm_E: Tensor,
    eps: float,
    residual_RE: Tensor | None = None,
    bias_E: Tensor | None = None,
    scale_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear`, and `rms_norm` of what it gives. [R, E] both."""
    out = linear(x_RD, weight_ED, bias_E=bias_E, residual_RE=residual_RE, scale_E=scale_E)
    return out, rms_norm(out, norm_E, eps)


def head_argmax(x_RD: Tensor, weight_VD: Tensor, *, scale_V: Tensor | None = None) -> Tensor:
    """The largest logit's token, the lowest id among equals, of logits rounded to the dtype of x. int64 [R].

    Rounded, so that it is the argmax of the logits that `linear` gives.
    """
    return linear(x_RD, weight_VD, scale_E=scale_V).max(dim=-1).indices


def place_heads(
    qkv_RE: Tensor,
    pages: Pages,
    rotary: Rotary,
    norms: HeadNorms | None,
    *,
    num_heads: int,
    width: int,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Split a fused projection into heads, norm and rotate queries and keys, store keys and values. Queries [R, N, H].

    E = (N + 2 G) * H, queries first, then keys, then values. Keys and values of row b's w-th position go to slot
    lengths[b] + w of its pages, or, in a draft pass, into `own`, two buffers [R, G, H]: the block leaves no trace.
    Norm and rotation in fp32, each rounded to the dtype of the projection, as the Hugging Face modules do.
    """
    num_groups, head_dim = pages.keys_PSGH.shape[2:]
    qkv = qkv_RE.view(len(qkv_RE), -1, head_dim)
    q, k, v = qkv.split([num_heads, num_groups, num_groups], dim=1)
    positions_R = (pages.lengths_B[:, None] + torch.arange(width, device=qkv_RE.device)).flatten().long()
    if norms is not None:
        q, k = rms_norm(q, norms.query_H, norms.eps), rms_norm(k, norms.key_H, norms.eps)
    cos, sin = rotary.cos_TH[positions_R][:, None], rotary.sin_TH[positions_R][:, None]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if own is not None:
        own[0].copy_(k)
        own[1].copy_(v)
        return q
    page_slots = pages.keys_PSGH.shape[1]
    rows_R = torch.arange(len(pages.lengths_B), device=qkv_RE.device).repeat_interleave(width)
    page_R = pages.tables_BM[rows_R, positions_R // page_slots].long()
    pages.keys_PSGH[page_R, positions_R % page_slots] = k
    pages.values_PSGH[page_R, positions_R % page_slots] = v
    return q


def project_heads(
    x_RD: Tensor,
    qkv_ED: Tensor,
    pages: Pages,
    rotary: Rotary,
    norms: HeadNorms | None,
    *,
    num_heads: int,
    width: int,
    own: tuple[Tensor, Tensor] | None = None,
    bias_E: Tensor | None = None,
    scale_E: Tensor | None = None,
) -> Tensor:
    """`linear` and `place_heads`. Queries [R, N, H]."""
    qkv_RE = linear(x_RD, qkv_ED, bias_E=bias_E, scale_E=scale_E)
    return place_heads(qkv_RE, pages, rotary, norms, num_heads=num_heads, width=width, own=own)


def rotate(x_RNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding: each product rounded to the dtype, as PyTorch's elementwise operations do."""
    first, second = x_RNH.chunk(2, dim=-1)
    return x_RNH * cos + torch.cat((-second, first), dim=-1) * sin


def attend(
    q_RNH: Tensor,
    pages: Pages,
    *,
    width: int,
    scale: float,
    own: tuple[Tensor, Tensor] | None = None,
    widths_B: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a pass. [R, N * H].

    AR view (`own` is None): the w-th query of row b sees slots 0 .. lengths[b] + w of its pages, which hold this pass's
    own keys already. Diffusion view: all queries of row b see slots 0 .. lengths[b] - 1 and, of `own` ([R, G, H] keys
    and values), the first widths[b] positions of their row; later ones are padding. int32 [B].
    """
    num_rows, num_groups = len(pages.lengths_B), pages.keys_PSGH.shape[2]
    keys, values = (pool[pages.tables_BM.long()].flatten(1, 2) for pool in pages[:2])  # [B, M * S, G, H]
    num_slots = keys.shape[1]
    if own is None:
        mask = verify_mask(pages.lengths_B, width, num_slots)
    else:
        assert widths_B is not None, "a draft pass has widths"
        before = draft_mask(pages.lengths_B, torch.zeros_like(pages.lengths_B), width, num_slots)
        mask = torch.cat([before, draft_mask(torch.zeros_like(widths_B), widths_B, width, width)], dim=2)
        keys, values = (
            torch.cat([cached, block.unflatten(0, (num_rows, width))], dim=1)
            for cached, block in zip((keys, values), own, strict=True)
        )
    q_BGwWH = q_RNH.float().unflatten(0, (num_rows, width)).unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4)
    scores = q_BGwWH @ keys.float().permute(0, 2, 3, 1)[:, :, None] * scale
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    mixed = weights @ values.float().masked_fill(~mask.any(1)[..., None, None], 0).transpose(1, 2)[:, :, None]
    return mixed.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1).to(q_RNH.dtype)


def gumbel(seeds_B: Tensor, positions_BT: Tensor, num_tokens: int) -> Tensor:
    """Gumbel noise of every token at every position, float32 [B, T, V]: to the bit what other backends add."""
    return sampling.gumbel(seeds_B, positions_BT, num_tokens)
