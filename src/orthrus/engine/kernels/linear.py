"""Products with weights for few rows (decoding) or many (prefill), whose rows have the same bits either way.

At 1 to 128 rows such a product takes the time of reading the weight, which the kernels (`linear_kernels.py`) do once.
A sum over D is cut into SPLITS parts, so that there is work for all multiprocessors; parts are fp32, scaled where rows
are quantised, and added in order, and what follows (outputs' scale, bias, residual, SwiGLU) is done on the sum. Parts
follow from E, D and the weight's dtype (`tiles.py`). The number of rows decides how large a tile is and how its
programs run, which changes no row's sum, and that beyond MAX_SPREAD_ROWS, where rows are work enough, one program makes
all parts of its tile and adds them in the same order. Many rows of 16 bits are multiplied by a kernel of their own, for
which Hopper's tensor memory accelerator fetches tiles: again with the same bits. Nothing is fused into multiply-adds: a
compiler may do so in one of the kernels and not in the other.

    R = rows of a pass, D = inputs, E = outputs, F = width of the MLP
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orthrus.engine.kernels import linear_kernels
from orthrus.engine.kernels.overlap import is_hopper, overlap
from orthrus.engine.kernels.quantise import quantise
from orthrus.engine.kernels.tiles import SHARED_BYTES, TMA_TILE, Tiles, execution_of, inputs_of_part, tiles_of

kernels: Any = linear_kernels


MAX_SPREAD_ROWS = 256
"""With more rows than this the parts of a sum are not spread over programs: parts are fp32 numbers for all rows, which
would take too much memory, and rows are work enough."""


def linear(
    x_RD: Tensor,
    weight_ED: Tensor,
    *,
    bias_E: Tensor | None = None,
    residual_RE: Tensor | None = None,
    scale_E: Tensor | None = None,
) -> Tensor:
    """x . weight' * scale + bias + residual, in fp32, rounded once. [R, E].

    `weight` may be float8_e4m3fn with an fp32 `scale` for each output; then rows of x are quantised, too.
    """
    return _multiply(x_RD, weight_ED, scale_E, bias_E, residual_RE, is_gated=False)


def swiglu(x_RD: Tensor, weight_2FD: Tensor, *, scale_2F: Tensor | None = None) -> Tensor:
    """silu(x . gate') * (x . up'), the first F rows of the weight being the gate's. In fp32, rounded once. [R, F]."""
    return _multiply(x_RD, weight_2FD, scale_2F, None, None, is_gated=True)


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
    """`linear`, and the RMS norm of what it gives. [R, E] both."""
    parts_SRE = parts(x_RD, weight_ED, scale_E, bias_E)
    num_rows, num_outputs = parts_SRE.shape[1:]
    out, normed = x_RD.new_empty(2, num_rows, num_outputs)
    check_residual(residual_RE, out)
    assert norm_E.shape == (num_outputs,) and norm_E.is_contiguous(), "a norm has a weight for each output"
    if num_rows:
        block = triton.next_power_of_2(num_outputs)
        kernels.add_up_and_norm[(num_rows,)](
            parts_SRE, scale_E, bias_E, residual_RE, norm_E, out, normed,
            0 if residual_RE is None else residual_RE.stride(0), parts_SRE.stride(0), num_outputs, eps,
            SPLITS=len(parts_SRE), BLOCK=block, num_warps=min(8, max(1, block // 512)), enable_fp_fusion=False,
            **overlap(x_RD),
        )  # fmt: skip
    return out, normed


def parts(x_RD: Tensor, weight_ED: Tensor, *by_output: Tensor | None) -> Tensor:
    """The parts of x . weight', to be added in order and then finished by another kernel. fp32 [S, R, E].

    Either SPLITS of them, or, with more than MAX_SPREAD_ROWS rows, their sum in that order.
    """
    check_operands(x_RD, weight_ED, *by_output)
    num_rows, num_outputs = len(x_RD), len(weight_ED)
    tiles = tiles_of(weight_ED)
    is_spread = tiles.SPLITS > 1 and num_rows <= MAX_SPREAD_ROWS
    parts_SRE = x_RD.new_empty(tiles.SPLITS if is_spread else 1, num_rows, num_outputs, dtype=torch.float32)
    if num_rows == 0:
        return parts_SRE
    _launch(x_RD, weight_ED, None, None, None, parts_SRE, num_outputs, tiles, is_spread=is_spread, is_gated=False)
    return parts_SRE


def check_residual(residual: Tensor | None, out: Tensor) -> None:
    """Raise ValueError where the residual is not rows like the output."""
    if residual is not None and (residual.shape != out.shape or residual.stride(1) != 1):
        raise ValueError(f"the residual must be rows of {tuple(out.shape)}, got {tuple(residual.shape)}")


def _multiply(
    x_RD: Tensor, weight_ED: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, *,
    is_gated: bool,
) -> Tensor:  # fmt: skip
    check_operands(x_RD, weight_ED, scale, bias)
    num_rows, num_outputs = len(x_RD), len(weight_ED) // 2 if is_gated else len(weight_ED)
    out = x_RD.new_empty(num_rows, num_outputs)
    check_residual(residual, out)
    if num_rows == 0:
        return out
    tiles = tiles_of(weight_ED)
    if tiles.SPLITS == 1 or num_rows > MAX_SPREAD_ROWS:
        _launch(x_RD, weight_ED, scale, bias, residual, out, num_outputs, tiles, is_spread=False, is_gated=is_gated)
        return out
    parts_SRE = parts(x_RD, weight_ED)
    block = min(512, triton.next_power_of_2(num_outputs))
    kernels.add_up[num_rows, triton.cdiv(num_outputs, block)](
        parts_SRE, scale, bias, residual, out, 0 if residual is None else residual.stride(0), parts_SRE.stride(0),
        num_outputs,
        SPLITS=tiles.SPLITS, GATED=is_gated, BLOCK=block, enable_fp_fusion=False, **overlap(x_RD),
    )  # fmt: skip
    return out


def _launch(
    x_RD: Tensor, weight_ED: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, out: Tensor,
    num_outputs: int, tiles: Tiles, *, is_spread: bool, is_gated: bool,
) -> None:  # fmt: skip
    """One of the two kernels of products: into `out` [R, E], finished, or [SPLITS, R, E], parts if spread."""
    num_rows, residual_stride = len(x_RD), 0 if residual is None else residual.stride(0)
    num_parts, num_summed = (tiles.SPLITS, 1) if is_spread else (1, tiles.SPLITS)  # that a program adds up
    if (how := tma_settings(x_RD, weight_ED, tiles, has_one_part=is_gated)) is not None:
        block_e = how["BLOCK_E"] // 2 if is_gated else how["BLOCK_E"]
        kernels.multiply_by_tma[triton.cdiv(num_rows, how["BLOCK_R"]), triton.cdiv(num_outputs, block_e), num_parts](
            *descriptors(x_RD, weight_ED, block_e), scale, bias, residual, out, residual_stride, num_rows, num_outputs,
            split_blocks=inputs_of_part(x_RD.shape[1], tiles) // how["BLOCK_K"],
            SPLITS=num_summed, SPREAD=is_spread, GATED=is_gated, **how,
        )  # fmt: skip
        return
    rows_RD, rows_scale_R = as_read(x_RD, weight_ED)
    how = settings(rows_RD, weight_ED, tiles)
    block_e = how["BLOCK_E"] // 2 if is_gated else how["BLOCK_E"]
    kernels.multiply[triton.cdiv(num_rows, how["BLOCK_R"]), triton.cdiv(num_outputs, block_e), num_parts](
        rows_RD, rows_scale_R, weight_ED, scale, bias, residual, out, rows_RD.stride(0), residual_stride, num_rows,
        num_outputs,
        SPREAD=is_spread, GATED=is_gated, **how | dict(SPLITS=num_summed),
    )  # fmt: skip


def as_read(x_RD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows in the dtype that a kernel multiplies them in, and fp32 scales [R] where that is fp8."""
    return (x_RD, None) if x_RD.dtype == weight_ED.dtype else quantise(x_RD)


def settings(x_RD: Tensor, weight_ED: Tensor, tiles: Tiles) -> dict[str, Any]:
    """What a kernel over these operands is compiled for, and how it runs."""
    width = x_RD.shape[1]
    execution = execution_of(weight_ED, len(x_RD))
    if execution is not None and not execution.by_tma:  # else it was chosen for the other kernel
        tiles = tiles.run_as(execution)
    block_r = min(128, max(16, triton.next_power_of_2(len(x_RD))))
    stage_bytes = tiles.BLOCK_K * (tiles.BLOCK_E * weight_ED.element_size() + block_r * x_RD.element_size())
    return tiles._asdict() | dict(
        width=width, per_split=inputs_of_part(width, tiles), BLOCK_R=block_r, WHOLE=width % tiles.BLOCK_K == 0,
        BY="ieee" if x_RD.dtype == torch.float32 else "tf32",  # of no effect below fp32
        num_stages=max(1, min(tiles.num_stages, SHARED_BYTES // stage_bytes)),
        enable_fp_fusion=False,
    ) | overlap(x_RD)  # fmt: skip


def tma_settings(x_RD: Tensor, weight_ED: Tensor, tiles: Tiles, *, has_one_part: bool) -> dict[str, Any] | None:
    """As `settings`, of a kernel for which tiles are fetched; None where this many rows have none or it cannot.

    `has_one_part`: the kernel knows no sums of several parts.
    """
    execution = execution_of(weight_ED, len(x_RD))
    if execution is None or not execution.by_tma or not can_fetch(x_RD, weight_ED, tiles, has_one_part=has_one_part):
        return None
    block_k = TMA_TILE["BLOCK_K"]
    stage_bytes = block_k * (execution.BLOCK_E + TMA_TILE["BLOCK_R"]) * weight_ED.element_size()
    return TMA_TILE | dict(
        num_blocks=triton.cdiv(x_RD.shape[1], block_k), BLOCK_E=execution.BLOCK_E, num_warps=execution.num_warps,
        num_stages=max(1, min(execution.num_stages, SHARED_BYTES // stage_bytes)),
        enable_fp_fusion=False,
    ) | overlap(x_RD)  # fmt: skip


def can_fetch(x_RD: Tensor, weight_ED: Tensor, tiles: Tiles, *, has_one_part: bool) -> bool:
    """Whether the tensor memory accelerator can fetch tiles of these operands, for sums that are cut like this.

    It counts in 16 bytes, and parts must end where a tile of inputs does.
    """
    return (
        is_hopper(x_RD.device)
        and x_RD.dtype == weight_ED.dtype
        and weight_ED.element_size() == 2
        and all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (x_RD, weight_ED))
        and (
            tiles.SPLITS == 1 or (not has_one_part and inputs_of_part(x_RD.shape[1], tiles) % TMA_TILE["BLOCK_K"] == 0)
        )
    )


def descriptors(x_RD: Tensor, weight_ED: Tensor, num_outputs: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """What the accelerator knows operands by, in tiles of so many weight rows."""
    block_r, block_k = TMA_TILE["BLOCK_R"], TMA_TILE["BLOCK_K"]
    return (
        TensorDescriptor.from_tensor(x_RD, [block_r, block_k]),
        TensorDescriptor.from_tensor(weight_ED, [num_outputs, block_k]),
    )


def check_operands(x_RD: Tensor, weight_ED: Tensor, *by_output: Tensor | None) -> None:
    """Raise ValueError where the kernels would read other numbers than meant."""
    if weight_ED.dtype not in (x_RD.dtype, torch.float8_e4m3fn):
        raise ValueError(f"weights must be {x_RD.dtype}, as their rows are, or float8_e4m3fn, got {weight_ED.dtype}")
    if x_RD.ndim != 2 or x_RD.shape[1:] != weight_ED.shape[1:]:
        raise ValueError(f"rows of {tuple(x_RD.shape)} do not fit a weight of {tuple(weight_ED.shape)}")
    if (x_RD.stride(1) != 1 and x_RD.shape[1] > 1) or not weight_ED.is_contiguous():
        raise ValueError("rows and weights must lie together in memory; call contiguous() on them")
    for one in by_output:
        if one is not None and (one.shape != weight_ED.shape[:1] or not one.is_contiguous()):
            raise ValueError(f"scale and bias must be [{len(weight_ED)}], one for each output, got {list(one.shape)}")
