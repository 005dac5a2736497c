"""A plain decoding step for ONE row, as fast as we can make it where a row's bits may depend on the number of rows.

What `exactness.py` holds the engine against. Nothing here keeps the engine's rules: sums are cut for one row, products
are multiply-adds in fp32 without tensor cores, norms are not rounded before they are multiplied. Six kernels a layer:

    qkv      input norm and product
    read     q/k norm, RoPE, page write, and attention to a tile of slots
    merge    the tiles' states folded
    o        product and residual
    gate_up  post norm, product and SwiGLU
    down     product and residual

A program of a product has all inputs of a few outputs in registers, so that its threads add on their own and meet once.
The norm before a product needs no kernel: its weight is multiplied into the inputs, its factor into the sum. Kernels
overlap as the engine's do (`kernels/overlap.py`), and read their first weights, keys and values before they wait.

How a product is spread (`Spread`) is chosen by timing, for each shape on its own.

    D = inputs, E = outputs, F = width of the MLP, N = query heads, G = key/value heads, H = head dimension, P = pages,
    S = slots of a page, V = vocabulary, T = tiles of slots
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import gemv_kernels
from orthrus.engine.kernels import head_kernels, place
from orthrus.engine.kernels.attention import LOG2E
from orthrus.engine.kernels.attention import attend as attend_any
from orthrus.engine.kernels.overlap import overlap
from orthrus.engine.operations import Ops, kernel_ops
from orthrus.engine.reference import HeadNorms, Pages, Rotary

kernels: Any = gemv_kernels
row_largest: Any = head_kernels.row_largest

THREAD_INPUTS = 8
"""Neighbouring inputs of a thread: loads of 16 bytes in bf16."""
TILE_SLOTS = 64
"""Slots whose attention is a program's."""
MAX_SLOTS = 4096
"""Slots of a table that `read` and `merge` are for: behind them it is the engine's attention."""
LEAST_REGISTERS = 16
"""Of a thread, that weights on their way take: with fewer, too little is on its way."""
MOST_REGISTERS = 192
"""Of a thread, that weights, the next ones and sums take: with more, some are spilt (8 x 4 of 12,288 inputs)."""


class Spread(NamedTuple):
    """How a product of one row is spread over programs."""

    BLOCK_E: int
    """Outputs that a program makes at a time."""
    REPEATS: int
    """Loads of 16 bytes that a thread has on their way for each output."""
    num_warps: int
    per_processor: int
    """Programs of a multiprocessor, which share the outputs among them; 0: a program for every BLOCK_E outputs."""


class Unnormed(NamedTuple):
    """Hidden states whose norm the next product makes."""

    hidden_RD: Tensor
    norm_D: Tensor
    eps: float

    def normed(self) -> Tensor:
        """The states, normed. [1, D]."""
        x = self.hidden_RD.float()
        factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * factor * self.norm_D.float()).to(self.hidden_RD.dtype)


class Unplaced(NamedTuple):
    """A projection whose heads are still to be normed, turned and stored."""

    qkv_RE: Tensor
    rotary: Rotary
    norms: HeadNorms | None
    num_heads: int


def spreads(kind: str, width: int) -> Iterator[Spread]:
    """Ways to spread a product of so many inputs that registers hold."""
    all_spreads = itertools.product((1, 2, 4, 8), (1, 2, 4), (4, 8), (0, 2, 3, 4, 6))
    for block_e, repeats, num_warps, per_processor in all_spreads:
        registers = block_e * repeats * 4
        is_apt = LEAST_REGISTERS <= registers and 2 * registers + THREAD_INPUTS * block_e <= MOST_REGISTERS
        is_apt &= repeats == 1 or repeats * block_inputs(num_warps) < 2 * width
        is_apt &= per_processor * num_warps <= 24  # more could not run at once
        if kind == "swiglu":
            is_apt &= block_e > 1
        if kind == "largest":
            is_apt &= per_processor > 0
        if is_apt:
            yield Spread(block_e, repeats, num_warps, per_processor)


def block_inputs(num_warps: int) -> int:
    """Inputs that a program loads at once for an output."""
    return THREAD_INPUTS * 32 * num_warps


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def multiply(
    x: Tensor | Unnormed, weight_ED: Tensor, spread: Spread, *, kind: str = "sum", residual_RE: Tensor | None = None
) -> Tensor:
    """A product of one row, of the `kind` that `multiply_one` has: sums [1, E], SwiGLU [1, F], or the argmax [1]."""
    x_RD, norm_D, eps = x if isinstance(x, Unnormed) else (x, None, 0.0)
    num_rows, width = x_RD.shape
    if num_rows != 1 or weight_ED.shape[1] != width or not (x_RD.is_contiguous() and weight_ED.is_contiguous()):
        raise ValueError(f"one row of {width} numbers and weights that lie together are needed, got {num_rows} rows")
    num_blocks, rest = divmod(len(weight_ED), spread.BLOCK_E)
    if rest:
        raise ValueError(f"{len(weight_ED)} outputs are no multiple of {spread.BLOCK_E}")
    num_programs = num_blocks
    if spread.per_processor:
        num_programs = min(num_blocks, spread.per_processor * num_processors(x_RD.device))
    is_largest = kind == "largest"
    num_outputs = len(weight_ED) // 2 if kind == "swiglu" else len(weight_ED)
    out = x_RD.new_empty(1, num_programs, dtype=torch.float32) if is_largest else x_RD.new_empty(1, num_outputs)
    ids = x_RD.new_empty(1, num_programs, dtype=torch.int32) if is_largest else None
    block_k = block_inputs(spread.num_warps)
    kernels.multiply_one[(num_programs,)](
        x_RD, norm_D, weight_ED, residual_RE, out, ids, num_outputs, num_blocks, eps,
        KIND=kind, WIDTH=width, CHUNKS=triton.cdiv(width, spread.REPEATS * block_k), BLOCK_E=spread.BLOCK_E,
        REPEATS=spread.REPEATS, BLOCK_K=block_k, MANY=num_programs < num_blocks, num_warps=spread.num_warps,
        **overlap(x_RD),
    )  # fmt: skip
    if not is_largest:
        return out
    token_R = x_RD.new_empty(1, dtype=torch.long)
    block = triton.next_power_of_2(num_programs)
    row_largest[(1,)](out, ids, token_R, num_programs, BLOCK=block, **overlap(x_RD))
    return token_R


def attend(queries: Unplaced, pages: Pages, *, width: int, scale: float, **draft: Any) -> Tensor:
    """Queries, keys and values of one position placed, and the queries' attention. [1, N * H]."""
    qkv_RE, rotary, norms, num_heads = queries
    num_slots, num_groups, head_dim = pages.keys_PSGH.shape[1:]
    if width != 1 or draft.get("own") is not None:
        raise ValueError("these kernels are for a plain step: one position in the AR view")
    num_tiles = triton.cdiv(pages.tables_BM.shape[1] * num_slots, TILE_SLOTS)
    if num_tiles * TILE_SLOTS > MAX_SLOTS:
        q_RNH = place.place_heads(qkv_RE, pages, rotary, norms, num_heads=num_heads, width=1)
        return attend_any(q_RNH, pages, width=1, scale=scale)
    acc = qkv_RE.new_empty(num_tiles, num_heads, head_dim, dtype=torch.float32)
    peak, total = qkv_RE.new_empty(2, num_tiles, num_heads, dtype=torch.float32)
    query_norm, key_norm, eps = norms or (None, None, 0.0)
    strides = (*pages.keys_PSGH.stride()[:3], *pages.values_PSGH.stride()[:3])
    kernels.read_tile[num_tiles, num_groups](
        qkv_RE, *pages, *rotary, query_norm, key_norm, acc, peak, total, *strides, eps, scale * LOG2E,
        NUM_HEADS=num_heads, NUM_GROUPS=num_groups, H=head_dim, S=num_slots, SLOTS=TILE_SLOTS,
        TILE_M=max(16, triton.next_power_of_2(num_heads // num_groups)), HAS_NORMS=norms is not None,
        DOT=tl.bfloat16 if qkv_RE.is_cuda else tl.float32, num_warps=4,  # the interpreter has no products in bf16
        **overlap(qkv_RE),
    )  # fmt: skip
    out = qkv_RE.new_empty(1, num_heads * head_dim)
    kernels.merge_tiles[(num_heads,)](
        acc, peak, total, pages.lengths_B, out, NUM_HEADS=num_heads, H=head_dim, SLOTS=TILE_SLOTS,
        TILES=triton.next_power_of_2(num_tiles), num_warps=4, **overlap(qkv_RE),
    )  # fmt: skip
    return out


def one_row_ops(spread_of: Callable[[Tensor, str], Spread]) -> Ops:
    """The operations of a plain step of one row. Between them go `Unnormed` and `Unplaced` where tensors did.

    `spread_of`: how a product with this weight, of this kind, is spread.
    """

    def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float) -> Any:
        return Unnormed(x_RD, weight_D, eps)

    def linear_and_norm(
        x: Any, weight_ED: Tensor, *, norm_E: Tensor, eps: float, residual_RE: Tensor, **none: Any
    ) -> Any:
        check_none(none)
        out = multiply(x, weight_ED, spread_of(weight_ED, "sum"), residual_RE=residual_RE)
        return out, Unnormed(out, norm_E, eps)

    def swiglu(x: Any, weight_2FD: Tensor, **none: Any) -> Tensor:
        check_none(none)
        return multiply(x, weight_2FD, spread_of(weight_2FD, "swiglu"), kind="swiglu")

    def head_argmax(x: Any, weight_VD: Tensor, **none: Any) -> Tensor:
        check_none(none)
        return multiply(x, weight_VD, spread_of(weight_VD, "largest"), kind="largest")

    def project_heads(
        x: Any, qkv_ED: Tensor, pages: Pages, rotary: Rotary, norms: HeadNorms | None, *, num_heads: int, width: int,
        **none: Any,
    ) -> Any:  # fmt: skip
        check_none(none)
        return Unplaced(multiply(x, qkv_ED, spread_of(qkv_ED, "sum")), rotary, norms, num_heads)

    return kernel_ops()._replace(
        rms_norm=rms_norm, linear_and_norm=linear_and_norm, swiglu=swiglu, head_argmax=head_argmax,
        project_heads=project_heads, attend=attend,
    )  # fmt: skip


def check_none(arguments: dict[str, Any]) -> None:
    """`ValueError` for a bias, a scale or a block's own keys, which these operations leave out."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise ValueError(f"a plain step of a bf16 Qwen3 has no {', '.join(given)}")
