"""Rows in fp8: copies of weights for draft passes, and what those passes multiply by them.

The verifier never reads either, so they cannot change the output.

    R = rows: of a pass, or the outputs E of a weight. D = their width, the inputs of a product
"""

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448: what the largest number of a row becomes."""

CHUNK = 1 << 24
"""Weights converted at a time: their fp32 copies are all the memory that quantising takes beside its result."""


def quantise_rows(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [R, D] and fp32 scales [R], such that fp8 * scale is x.

    Off by at most 2^-4 of a number (3 mantissa bits), or 2^-10 of its row's scale where it is below 2^-6 of that
    (subnormal). No calibration: each row's largest number is met exactly. A row that holds an infinity or a NaN has one
    of them for a scale, so that whatever it is multiplied with is NaN.
    """
    x = x_RD.float()
    largest_R = x.abs().amax(1)
    # By a tensor: a GPU takes division by a number to be multiplication by its reciprocal, which is rounded otherwise.
    # Not below the smallest normal number: a row of zeros stays zero instead of becoming 0 / 0.
    scale_R = (largest_R / torch.full_like(largest_R, LARGEST)).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale_R[:, None]).to(torch.float8_e4m3fn), scale_R


def quantise_weight(weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows` of a weight, in little memory: float8_e4m3fn [E, D] and fp32 scales [E].

    Raises ValueError where a weight is not finite.
    """
    num_outputs, width = weight_ED.shape
    quantised_ED = torch.empty_like(weight_ED, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scale_E = weight_ED.new_empty(num_outputs, dtype=torch.float32)
    rows = max(1, CHUNK // width)
    for at in range(0, num_outputs, rows):
        chunk = slice(at, at + rows)
        quantised_ED[chunk], scale_E[chunk] = quantise_rows(weight_ED[chunk])
    if not scale_E.isfinite().all():
        bad = (~scale_E.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"weights of outputs {bad[:8]} are not finite: fp8 has no place for them")
    return quantised_ED, scale_E
