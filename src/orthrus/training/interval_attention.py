"""Attention of training on a GPU: a query reads one interval of its clean row's keys and one of the block keys.

Every mask of training is of this kind (`masks.Intervals`), so nothing of size queries x keys is ever made: a tile of
queries walks over the keys that some of them read. Clean keys belong to the frozen view, and the backward pass makes no
gradient for them: three products a tile instead of five. Online softmax and recomputation as in FlashAttention-2
(arXiv 2307.08691). No atomics: sums have one order, and a resumed run the same bits.

The kernels are Triton's (`interval_kernels.py`). The slow twin is `forward.dense_attend`, what other devices run.

    B = rows, Q = queries, T = clean tokens, N = query heads, G = key/value heads, H = head dimension
"""

from typing import Any

import torch
import triton
from torch import Tensor

from orthrus.model.masks import Intervals
from orthrus.training import interval_kernels

kernels: Any = interval_kernels

LOG2E = 1.4426950408889634

TILES: dict[int, dict[str, dict[str, int]]] = {
    2: {
        "forward": dict(TILE_M=128, TILE_K=64, num_warps=8, num_stages=3),
        "queries": dict(TILE_M=128, TILE_K=64, num_warps=8, num_stages=2),
        "keys": dict(TILE_M=64, TILE_K=64, num_warps=4, num_stages=2),
    },
    4: dict.fromkeys(("forward", "queries", "keys"), dict(TILE_M=32, TILE_K=32, num_warps=4, num_stages=1)),
}
"""Tile sizes and how a program runs, by bytes of an element. Fixed, not tuned at run time: ranks and resumed runs must
sum in the same order."""


def interval_attention(
    q_BNQH: Tensor,
    clean: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    intervals: Intervals,
    *,
    scale: float,
) -> Tensor:
    """softmax(scale * q . k) . v over what `intervals` lets each query read. [B, Q, N * H].

    `clean` and `own` are (keys, values) [B, G, T, H] and [B, G, Q, H]; `own` is None where the intervals have no block
    keys. There are gradients for `q` and `own`, and none for `clean`. Each query must read at least one key.
    """
    if q_BNQH.element_size() not in TILES or any(x.dtype != q_BNQH.dtype for x in (*clean, *(own or ()))):
        raise ValueError("interval attention needs queries, keys and values in one dtype of 2 or 4 bytes")
    if torch.is_grad_enabled() and any(x.requires_grad for x in clean):
        raise ValueError("interval attention has no gradient for clean keys and values: they are of the frozen view")
    out, _ = _attention(q_BNQH, *clean, *(own or (None, None)), *intervals, scale)
    return out.flatten(2)


@torch.library.custom_op("orthrus::interval_attention", mutates_args=())
def _attention(
    q: Tensor, ck: Tensor, cv: Tensor, ok: Tensor | None, ov: Tensor | None,
    first: Tensor, stop: Tensor, own_first: Tensor | None, own_stop: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mixed values [B, Q, N, H] and log2 of the softmax's sum [B, N, Q], fp32."""
    out, lse = _empty_outputs(q, ck, cv, ok, ov, first, stop, own_first, own_stop, scale)
    num_rows, num_heads, num_queries, _ = q.shape
    how = _settings(q, ck, "forward")
    grid = (triton.cdiv(num_queries, how["TILE_M"]), num_rows * num_heads)
    _launch(
        kernels.forward, grid,
        q, ck, cv, ok, ov, out, lse, first, stop, own_first, own_stop, *_strides(q, ck, cv, ok, ov),
        num_heads, num_queries, ck.shape[2], scale * LOG2E, HAS_OWN=ok is not None, **how,
    )  # fmt: skip
    return out, lse


@_attention.register_fake
def _empty_outputs(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    num_rows, num_heads, num_queries, head_dim = q.shape
    out = q.new_empty(num_rows, num_queries, num_heads, head_dim)
    return out, q.new_empty(num_rows, num_heads, num_queries, dtype=torch.float32)


@torch.library.custom_op("orthrus::interval_attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor,
    first: Tensor, stop: Tensor, own_first: Tensor, own_stop: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the queries and of the block keys and values, laid out [B, Q, heads, H]."""
    dq, dk, dv = _empty_gradients(gradient, out, lse, q, ck, cv, ok, ov)
    delta = torch.empty_like(lse)
    num_rows, num_heads, num_queries, _ = q.shape
    how = _settings(q, ck, "queries")
    _launch(
        kernels.backward_queries, (triton.cdiv(num_queries, how["TILE_M"]), num_rows * num_heads),
        q, ck, cv, ok, ov, out, gradient, lse, delta, dq, first, stop, own_first, own_stop,
        *_strides(q, ck, cv, ok, ov), num_heads, num_queries, ck.shape[2], scale * LOG2E, scale, HAS_OWN=True, **how,
    )  # fmt: skip
    how = _settings(q, ck, "keys")
    _launch(
        kernels.backward_keys, (triton.cdiv(num_queries, how["TILE_K"]), num_rows * ok.shape[1]),
        q, ok, ov, gradient, lse, delta, dk, dv, own_first, own_stop,
        *_strides(q, ok, ov), num_heads, num_queries, scale * LOG2E, scale, **how,
    )  # fmt: skip
    return dq, dk, dv


@_attention_backward.register_fake
def _empty_gradients(gradient: Tensor, out: Tensor, lse: Tensor, q: Tensor, ck: Tensor, cv: Tensor, ok: Tensor,
                     ov: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, ok, ov))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if tensors[3] is None:
        raise NotImplementedError("interval attention without block keys is of the frozen view: it has no gradient")
    dq, dk, dv = _attention_backward(gradient.contiguous(), out, lse, *tensors, ctx.scale)
    return dq.transpose(1, 2), None, None, dk.transpose(1, 2), dv.transpose(1, 2), *[None] * 5


_attention.register_autograd(_gradients, setup_context=_save)


def _launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **how: Any) -> None:
    """Run a kernel on the device of its first tensor, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **how)


def _settings(q: Tensor, keys: Tensor, kernel: str) -> dict[str, Any]:
    """What a kernel is compiled for, and how it runs."""
    head_dim = q.shape[3]
    by = "ieee" if q.dtype == torch.float32 else "tf32"  # of no effect below fp32
    sizes = dict(GROUP=q.shape[1] // keys.shape[1], H=head_dim, BLOCK_H=max(16, triton.next_power_of_2(head_dim)))
    return sizes | dict(BY=by) | TILES[q.element_size()][kernel]


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides of rows, heads and places; the head dimension must lie together."""
    strides: list[int] = []
    for x in tensors:
        if x is not None and x.stride(3) != 1:
            raise ValueError(f"interval attention reads heads that lie together, got strides {tuple(x.stride())}")
        strides += [0, 0, 0] if x is None else x.stride()[:3]
    return strides
