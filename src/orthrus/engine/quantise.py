"""fp8 copies of weights, for draft passes only: the verifier never reads one, so they cannot change the output.

E = outputs, D = inputs
"""

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448: what the largest weight of an output becomes."""

CHUNK = 1 << 24
"""Weights converted at a time: their fp32 copies are all the memory that quantising takes beside its result."""


def quantise_rows(weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [E, D] and fp32 scales [E], such that fp8 * scale is the weight.

    Off by at most 2^-4 of a weight (3 mantissa bits), or 2^-10 of its output's scale where it is below 2^-6 of that
    (subnormal). No calibration: each output's largest weight is met exactly.

    Raises ValueError where a weight is not finite.
    """
    num_outputs, width = weight_ED.shape
    quantised_ED = torch.empty_like(weight_ED, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scale_E = weight_ED.new_empty(num_outputs, dtype=torch.float32)
    rows = max(1, CHUNK // width)
    for at in range(0, num_outputs, rows):
        chunk = weight_ED[at : at + rows].float()
        # Not below the smallest normal number: an output of zeros stays zero instead of becoming 0 / 0.
        scale = (chunk.abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        scale_E[at : at + rows] = scale
        quantised_ED[at : at + rows] = (chunk / scale[:, None]).to(torch.float8_e4m3fn)
    if not scale_E.isfinite().all():
        bad = (~scale_E.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"weights of outputs {bad[:8]} are not finite: fp8 has no place for them")
    return quantised_ED, scale_E
