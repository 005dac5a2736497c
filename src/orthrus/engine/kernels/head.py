"""The LM head and its argmax without the logits: a (value, id) for each tile of the vocabulary, then the best of them.

R = rows of a pass, D = hidden width, V = vocabulary
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus.engine.kernels import head_kernels
from orthrus.engine.kernels.linear import as_read, check_operands, descriptors, settings, tma_settings
from orthrus.engine.kernels.overlap import overlap
from orthrus.engine.kernels.tiles import tiles_of

kernels: Any = head_kernels

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What logits are rounded to."""


def head_argmax(x_RD: Tensor, weight_VD: Tensor, *, scale_V: Tensor | None = None) -> Tensor:
    """The largest logit's token, the lowest id among equals, of logits rounded to the dtype of x. int64 [R].

    Cut as `linear` cuts it, so that the logits compared have the bits that `linear` gives. A row with a NaN gets the
    id of its first NaN or infinite logit.
    """
    check_operands(x_RD, weight_VD, scale_V)
    num_rows, vocab_size = len(x_RD), len(weight_VD)
    out = x_RD.new_empty(num_rows, dtype=torch.long)
    if num_rows == 0:
        return out
    tiles = tiles_of(weight_VD)
    fetching = tma_settings(x_RD, weight_VD, tiles, has_one_part=True)
    rows_RD, rows_scale_R = (x_RD, None) if fetching else as_read(x_RD, weight_VD)
    how = fetching or settings(rows_RD, weight_VD, tiles)
    num_tiles = triton.cdiv(vocab_size, how["BLOCK_E"])
    values = x_RD.new_empty(num_rows, num_tiles, dtype=torch.float32)
    ids = x_RD.new_empty(num_rows, num_tiles, dtype=torch.int32)
    grid, dtype = (triton.cdiv(num_rows, how["BLOCK_R"]), num_tiles), TYPES[x_RD.dtype]
    if fetching:
        kernels.tile_largest_by_tma[grid](
            *descriptors(x_RD, weight_VD, how["BLOCK_E"]), scale_V, values, ids, num_rows, vocab_size, num_tiles,
            DTYPE=dtype, **how,
        )  # fmt: skip
    else:
        kernels.tile_largest[grid](
            rows_RD, rows_scale_R, weight_VD, scale_V, values, ids, rows_RD.stride(0), num_rows, vocab_size, num_tiles,
            DTYPE=dtype, **how,
        )  # fmt: skip
    kernels.row_largest[(num_rows,)](
        values, ids, out, num_tiles, BLOCK=triton.next_power_of_2(num_tiles), enable_fp_fusion=False, **overlap(x_RD)
    )
    return out
