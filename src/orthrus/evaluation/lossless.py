"""Two decodings of one prompt: equal, or where they part and how close the AR view's decision was there.

Passes over different numbers of rows sum in different orders, so in low precision two logits that are next to equal
may change places. A difference is called rounding only where the model itself says so: both texts went on with a token
whose logit is within a few units in the last place (ulp) of the largest. Everything else is a bug.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEW_ULP = 4
"""A gap of at most so many units in the last place of the larger logit is rounding: passes over different numbers of
rows sum in different orders, and each of the two logits may move by a unit or two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Where two decodings part, and how close the AR view's decision was there."""

    position: int
    """Index of the first token that differs, counted from the first new token."""
    top_logits: tuple[float, float]
    """The AR view's largest and second largest logit at that position."""
    ulp: float
    """One unit in the last place of the largest logit, in the model's dtype."""
    shortfall: float
    """Largest logit minus that of the less likely of the two tokens written; infinite where one text had ended."""

    @property
    def gap(self) -> float:
        """Largest logit minus second largest."""
        return self.top_logits[0] - self.top_logits[1]

    @property
    def ulps(self) -> float:
        """The gap in units in the last place."""
        return self.gap / self.ulp

    @property
    def is_rounding(self) -> bool:
        """Whether both texts wrote a token that is the likeliest up to rounding."""
        return self.shortfall <= FEW_ULP * self.ulp

    def as_dict(self) -> dict[str, Any]:
        """The fields of a JSON document."""
        return {
            "position": self.position,
            "top_logits": list(self.top_logits),
            "logit_gap": self.gap,
            "ulps": self.ulps,
            "rounding": self.is_rounding,
        }


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Index of the first token that differs, the shorter length where one begins the other, None for equal ones."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return None if len(first) == len(second) else min(len(first), len(second))


def find_divergence(
    model: Any, prompt_ids: Sequence[int], first: Sequence[int], second: Sequence[int]
) -> Divergence | None:
    """Where two decodings of one prompt part, with the model's own AR logits there; None for equal ones."""
    position = first_difference(first, second)
    if position is None:
        return None
    logits_V = ar_logits(model, [*prompt_ids, *first[:position]])
    largest, second_largest = logits_V.topk(2).values.tolist()
    written = [float(logits_V[ids[position]]) if position < len(ids) else -math.inf for ids in (first, second)]
    return Divergence(
        position=position,
        top_logits=(largest, second_largest),
        ulp=unit_in_last_place(largest, model.dtype),
        shortfall=largest - min(written),
    )


@torch.inference_mode()
def ar_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """The AR view's logits of the token after these, from the model's stock forward. [V] float32."""
    ids_1T = torch.tensor([list(ids)], device=model.device)
    return model(input_ids=ids_1T, logits_to_keep=1).logits[0, -1].float()


def unit_in_last_place(value: float, dtype: torch.dtype) -> float:
    """Distance from a number to the next larger one in magnitude of this dtype."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))
