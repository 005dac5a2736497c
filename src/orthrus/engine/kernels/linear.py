"""Products with weights for few rows (decoding) or many (prefill), whose rows have the same bits either way.

At 1 to 128 rows such a product takes the time of reading the weight, which the kernels (`linear_kernels.py`) do once.
A sum over D is cut into SPLITS parts, so that there is work for all multiprocessors; parts are fp32, scaled where rows
are quantised, and added in order, and what follows (outputs' scale, bias, residual, SwiGLU) is done on the sum. Parts
follow from E, D and the weight's dtype. The number of rows decides how large a tile is and how its programs run
(BY_ROWS), which changes no row's sum, and that beyond MAX_SPREAD_ROWS, where rows are work enough, one program makes
all parts of its tile and adds them in the same order. Many rows of 16 bits are multiplied by a kernel of their own, for
which Hopper's tensor memory accelerator fetches tiles: again with the same bits. Nothing is fused into multiply-adds: a
compiler may do so in one of the kernels and not in the other.

    R = rows of a pass, D = inputs, E = outputs, F = width of the MLP
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orthrus.engine.kernels import linear_kernels
from orthrus.engine.kernels.overlap import is_hopper, overlap
from orthrus.engine.kernels.quantise import quantise

kernels: Any = linear_kernels


class Tiles(NamedTuple):
    """How a product is cut, and how its programs run."""

    BLOCK_E: int
    """Weight rows of a tile. At least 64, or Hopper's tensor cores are not used as they should be."""
    BLOCK_K: int
    """Inputs of a tile, whose multiples parts of a sum end at. Where tiles are fetched they have others (TMA_TILE)."""
    SPLITS: int
    """Parts of the sum over inputs."""
    num_warps: int
    num_stages: int
    """Blocks of inputs in flight; fewer where shared memory does not hold them. Changes no bits."""


TILES: dict[tuple[int, int, int], Tiles] = {
    # Qwen3-8B: gate_up, down, qkv, o, head
    (24576, 4096, 2): Tiles(64, 64, 1, 8, 6),
    (4096, 12288, 2): Tiles(64, 128, 2, 4, 6),
    (6144, 4096, 2): Tiles(64, 128, 4, 4, 3),
    (4096, 4096, 2): Tiles(128, 128, 4, 4, 4),
    (151936, 4096, 2): Tiles(128, 128, 1, 8, 4),
    (24576, 4096, 1): Tiles(128, 128, 1, 8, 4),
    (4096, 12288, 1): Tiles(128, 256, 4, 4, 4),
    (6144, 4096, 1): Tiles(64, 256, 4, 4, 3),
    (4096, 4096, 1): Tiles(64, 256, 2, 4, 6),
    (151936, 4096, 1): Tiles(128, 128, 1, 8, 3),
    # Qwen3-4B
    (19456, 2560, 2): Tiles(128, 64, 1, 8, 4),
    (2560, 9728, 2): Tiles(64, 128, 3, 4, 6),
    (6144, 2560, 2): Tiles(64, 128, 4, 4, 3),
    (2560, 4096, 2): Tiles(64, 128, 3, 4, 6),
    (151936, 2560, 2): Tiles(128, 128, 1, 4, 4),
    (19456, 2560, 1): Tiles(128, 128, 1, 8, 4),
    (2560, 9728, 1): Tiles(64, 256, 3, 4, 6),
    (6144, 2560, 1): Tiles(64, 128, 4, 4, 6),
    (2560, 4096, 1): Tiles(64, 256, 3, 4, 6),
    (151936, 2560, 1): Tiles(128, 128, 1, 8, 3),
    # Qwen3-1.7B
    (12288, 2048, 2): Tiles(128, 64, 1, 8, 6),
    (2048, 6144, 2): Tiles(64, 128, 4, 4, 6),
    (4096, 2048, 2): Tiles(64, 128, 2, 4, 6),
    (2048, 2048, 2): Tiles(64, 128, 4, 4, 6),
    (151936, 2048, 2): Tiles(128, 128, 1, 4, 4),
    (12288, 2048, 1): Tiles(128, 256, 1, 8, 4),
    (2048, 6144, 1): Tiles(64, 256, 4, 4, 6),
    (4096, 2048, 1): Tiles(64, 256, 2, 4, 6),
    (2048, 2048, 1): Tiles(64, 128, 3, 4, 6),
    (151936, 2048, 1): Tiles(128, 128, 1, 8, 3),
}
"""By (E, D, bytes of a weight), where measuring on an H200 (`benchmarks/tiles.py`) found better than `default_tiles`.
Never by the number of rows: a row's bits would depend on its neighbours. And never found anew by the process that uses
them: two processes would disagree about bits."""


class Execution(NamedTuple):
    """How the programs of a product run, as in `Tiles`: what has no effect on bits."""

    BLOCK_E: int
    num_warps: int
    num_stages: int
    by_tma: bool = False
    """`multiply_by_tma`, in tiles of TMA_TILE, where `can_fetch`; else `multiply`, as TILES say."""


TMA_TILE = dict(BLOCK_R=128, BLOCK_K=64)
"""Rows and inputs of a tile that is fetched: as wide as the accelerator's swizzle, which 128 bytes are."""

BY_ROWS: dict[tuple[int, int, int], dict[int, Execution]] = {
    # Qwen3-8B: gate_up, down, qkv, o, head
    (24576, 4096, 2): {
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 3),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(256, 8, 4, by_tma=True),
        1024: Execution(256, 8, 4, by_tma=True),
    },
    (4096, 12288, 2): {
        128: Execution(64, 4, 4),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(128, 4, 3, by_tma=True),
    },
    (6144, 4096, 2): {
        128: Execution(64, 4, 3, by_tma=True),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(64, 4, 3, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (4096, 4096, 2): {
        64: Execution(64, 4, 3),
        128: Execution(128, 4, 6, by_tma=True),
        256: Execution(128, 4, 3, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(128, 4, 3, by_tma=True),
    },
    (151936, 4096, 2): {
        128: Execution(128, 4, 6, by_tma=True),
        256: Execution(256, 8, 4, by_tma=True),
        512: Execution(256, 8, 4, by_tma=True),
        1024: Execution(256, 8, 4, by_tma=True),
    },
    # Qwen3-4B
    (19456, 2560, 2): {
        16: Execution(128, 8, 5),
        64: Execution(64, 4, 3),
        128: Execution(64, 4, 3),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(256, 8, 4, by_tma=True),
    },
    (2560, 9728, 2): {
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 4),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (6144, 2560, 2): {
        128: Execution(64, 4, 3, by_tma=True),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(64, 4, 3, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (2560, 4096, 2): {
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 6, by_tma=True),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (151936, 2560, 2): {
        128: Execution(128, 4, 6, by_tma=True),
        256: Execution(128, 4, 3, by_tma=True),
        512: Execution(256, 8, 3, by_tma=True),
        1024: Execution(256, 8, 3, by_tma=True),
    },
    # Qwen3-1.7B
    (12288, 2048, 2): {
        64: Execution(128, 4, 6),
        128: Execution(128, 4, 6),
        256: Execution(128, 4, 3, by_tma=True),
        512: Execution(128, 4, 2, by_tma=True),
        1024: Execution(128, 4, 2, by_tma=True),
    },
    (2048, 6144, 2): {
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 6, by_tma=True),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(64, 4, 6, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (4096, 2048, 2): {
        16: Execution(64, 4, 4),
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 6, by_tma=True),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(64, 4, 4, by_tma=True),
        1024: Execution(128, 4, 3, by_tma=True),
    },
    (2048, 2048, 2): {
        16: Execution(128, 4, 3),
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 6, by_tma=True),
        256: Execution(128, 4, 4, by_tma=True),
        512: Execution(64, 4, 6, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (151936, 2048, 2): {
        128: Execution(128, 4, 3, by_tma=True),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(128, 4, 3, by_tma=True),
        1024: Execution(128, 4, 3, by_tma=True),
    },
}
"""By (E, D, bytes of a weight) and one of ROWS, where measuring on an H200 (`benchmarks/tiles.py --rows`; 16 inside of
passes, and 256 to 1,024 of 8B) found better than what TILES say."""

MANY_ROWS = Execution(128, 4, 6, by_tma=True)
"""Good at every shape of TILES, if not the best."""

ROWS = (16, 32, 64, 128, 256, 512, 1024)
"""Up to so many rows run as that many were measured to; more as the last."""

MAX_SPREAD_ROWS = 256
"""With more rows than this the parts of a sum are not spread over programs: parts are fp32 numbers for all rows, which
would take too much memory, and rows are work enough."""

SHARED_BYTES = 200 * 1024
"""Shared memory that a program's blocks in flight may take (Hopper has 227 KiB)."""


def default_tiles(num_outputs: int, width: int, weight_bytes: int) -> Tiles:
    """Tiles for a shape that nobody measured: about two programs for each of 132 multiprocessors, 512 inputs a part."""
    block_e, block_k = 64, 32 if weight_bytes == 4 else 128
    splits = max(1, min(264 // triton.cdiv(num_outputs, block_e), width // 512))
    return Tiles(block_e, block_k, 1 << splits.bit_length() - 1, num_warps=4, num_stages=4)


def tiles_of(weight_ED: Tensor) -> Tiles:
    """How products with this weight are cut: by its shape and dtype alone."""
    num_outputs, width = weight_ED.shape
    return tiles_of_shape(num_outputs, width, weight_ED.element_size())


def tiles_of_shape(num_outputs: int, width: int, weight_bytes: int) -> Tiles:
    """Those of TILES, or the default."""
    key = num_outputs, width, weight_bytes
    return TILES.get(key) or default_tiles(*key)


def execution_of(weight_ED: Tensor, num_rows: int) -> Execution | None:
    """That of BY_ROWS for as many rows, if there is one; for shapes that nobody measured MANY_ROWS, on Hopper."""
    num_outputs, width = weight_ED.shape
    key = num_outputs, width, weight_ED.element_size()
    if key in BY_ROWS:
        return BY_ROWS[key].get(next((rows for rows in ROWS if num_rows <= rows), ROWS[-1]))
    is_fetched = num_rows > TMA_TILE["BLOCK_R"] and weight_ED.element_size() == 2 and is_hopper(weight_ED.device)
    return MANY_ROWS if is_fetched else None


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
    num_parts = tiles.SPLITS if is_spread else 1
    if (how := tma_settings(x_RD, weight_ED, tiles, has_one_part=is_gated)) is not None:
        block_e = how["BLOCK_E"] // 2 if is_gated else how["BLOCK_E"]
        kernels.multiply_by_tma[triton.cdiv(num_rows, how["BLOCK_R"]), triton.cdiv(num_outputs, block_e), num_parts](
            *descriptors(x_RD, weight_ED, block_e), scale, bias, residual, out, residual_stride, num_rows, num_outputs,
            split_blocks=inputs_of_part(x_RD.shape[1], tiles) // how["BLOCK_K"],
            SPLITS=num_parts if is_spread else tiles.SPLITS, SPREAD=is_spread, GATED=is_gated, **how,
        )  # fmt: skip
        return
    rows_RD, rows_scale_R = as_read(x_RD, weight_ED)
    how = settings(rows_RD, weight_ED, tiles)
    block_e = how["BLOCK_E"] // 2 if is_gated else how["BLOCK_E"]
    kernels.multiply[triton.cdiv(num_rows, how["BLOCK_R"]), triton.cdiv(num_outputs, block_e), num_parts](
        rows_RD, rows_scale_R, weight_ED, scale, bias, residual, out, rows_RD.stride(0), residual_stride, num_rows,
        num_outputs,
        SPREAD=is_spread, GATED=is_gated, **how | (dict(SPLITS=1) if is_spread else {}),  # a program knows one part
    )  # fmt: skip


def as_read(x_RD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows in the dtype that a kernel multiplies them in, and fp32 scales [R] where that is fp8."""
    return (x_RD, None) if x_RD.dtype == weight_ED.dtype else quantise(x_RD)


def settings(x_RD: Tensor, weight_ED: Tensor, tiles: Tiles) -> dict[str, Any]:
    """What a kernel over these operands is compiled for, and how it runs."""
    width = x_RD.shape[1]
    execution = execution_of(weight_ED, len(x_RD))
    if execution is not None and not execution.by_tma:  # else it was chosen for the other kernel
        tiles = tiles._replace(
            BLOCK_E=execution.BLOCK_E, num_warps=execution.num_warps, num_stages=execution.num_stages
        )
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


def inputs_of_part(width: int, tiles: Tiles) -> int:
    """Inputs of each part of a sum but the last, which may have fewer."""
    return triton.cdiv(triton.cdiv(width, tiles.BLOCK_K), tiles.SPLITS) * tiles.BLOCK_K


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
