"""From logits to the law a token is drawn from, and the randomness it is drawn with.

Both views go through the same `warp`: a draft that is filtered otherwise than its judge is accepted too rarely or,
worse, judged by the wrong law. Randomness is a pure function of (seed, absolute position, purpose), computed with
integers on the device, so that it depends on neither the batch, nor the block, nor what was drafted before:

* the Gumbel noise of a position serves the draft and the verifier, which is why a coupled draft is so often right;
* a position's noise decides only tokens at that position or later, so a rejected draft's noise may be used again.

    B = rows, T = positions, V = vocabulary
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["greedy", "speculative", "coupled"]

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy (official code)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one row's tokens are chosen; the default is greedy."""

    temperature: float = 0.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities sum to p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest; 0 keeps all."""
    seed: int | None = None
    """Same seed, same text; without one a fresh seed is drawn from torch's generator at admission."""
    rule: Literal["speculative", "coupled"] | None = None
    """`speculative`: rejection with residual. `coupled`: the text is the one plain decoding gives for this seed.
    None: coupled when a seed is given, speculative otherwise."""

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number, 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.rule not in (None, "speculative", "coupled"):
            raise ValueError(f"rule must be 'speculative', 'coupled' or None, got {self.rule!r}")

    @property
    def effective_rule(self) -> Rule:
        """The rule that decides, with the defaults resolved."""
        if self.temperature < GREEDY_BELOW:
            return "greedy"
        return self.rule or ("speculative" if self.seed is None else "coupled")


@dataclass(frozen=True, slots=True)
class Laws:
    """The settings of B rows for `warp`, [B, 1, 1] each.

    Tensors on the rows' device also where the rows agree: a Python number is computed with in another way (CUDA turns
    a division by one into a product with its reciprocal), and a row's scores would differ by an ulp with its company.
    """

    temperature: Tensor
    top_k: Tensor
    tail: Tensor
    """1 - top_p, subtracted in double precision and rounded once, as transformers has it."""
    min_p: Tensor
    uses_temperature: bool
    max_top_k: int
    uses_top_p: bool
    uses_min_p: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> "Laws":
        """The laws of these rows; a greedy row gets temperature 1, which leaves its argmax alone."""

        def column(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None, None]

        own = [Sampling(temperature=1.0) if s.temperature < GREEDY_BELOW else s for s in samplings]
        return cls(
            temperature=column([s.temperature for s in own], torch.float32),
            top_k=column([s.top_k for s in own], torch.int64),
            tail=column([1 - s.top_p for s in own], torch.float32),
            min_p=column([s.min_p for s in own], torch.float32),
            uses_temperature=any(s.temperature != 1 for s in own),
            max_top_k=max(s.top_k for s in own),
            uses_top_p=any(s.top_p < 1 for s in own),
            uses_min_p=any(s.min_p > 0 for s in own),
        )


def warp(logits_BTV: Tensor, laws: Laws) -> Tensor:
    """Scores whose softmax is the law: temperature, top-k, top-p, min-p in transformers' order. float32 [B, T, V]."""
    scores = logits_BTV.float()
    if laws.uses_temperature:
        scores = scores / laws.temperature
    if laws.max_top_k:
        scores = keep_top_k(scores, laws.top_k, laws.max_top_k)
    if laws.uses_top_p:
        scores = keep_top_p(scores, laws.tail)
    if laws.uses_min_p:
        scores = keep_min_p(scores, laws.min_p)
    return scores


def keep_top_k(scores: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    """Drop (-inf) whatever scores below the k-th best; ties with it stay. A k of 0 drops nothing."""
    size = min(max_top_k, scores.shape[-1])
    best = scores.topk(size, dim=-1).values
    kth = best.gather(-1, (top_k.clamp(1, size) - 1).expand(*best.shape[:-1], 1)).masked_fill(top_k == 0, -math.inf)
    return scores.masked_fill(scores < kth, -math.inf)


MASS_UNIT = 2.0**60
"""Probabilities are added up as integers of this unit, whose sum is the same in any order: the order of a parallel scan
follows the number of rows. What an fp32 probability has below 2^-60 is lost."""


def keep_top_p(scores: Tensor, tail: Tensor) -> Tensor:
    """Drop the least likely tokens whose total stays within `tail` (1 - p, fp32); the likeliest always stays.

    Of equally likely tokens those of lower ids are dropped first. A tail of 0 drops nothing.
    """
    ascending, order = scores.sort(dim=-1, stable=True)
    mass = (ascending.softmax(-1) * MASS_UNIT).long().cumsum(-1)
    drop = (mass <= (tail * MASS_UNIT).long()) & (tail > 0)  # else tokens without mass would go, in company only
    drop[..., -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens less likely than min_p times the likeliest."""
    p = scores.softmax(-1)
    return scores.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)


def pick_inverse_cdf(p_BTV: Tensor, u_BT: Tensor) -> Tensor:
    """The token at which the cumulated weights pass u: a draw from p (normalised or not) for u in (0, 1). [B, T].

    Cumulated in float64: a parallel float32 scan may step back by an ulp, and a token of weight 0 could be picked.
    """
    cdf = p_BTV.cumsum(-1, dtype=torch.float64)
    return (cdf <= u_BT[..., None] * cdf[..., -1:]).sum(-1)


# Counter-based noise. Two's complement wrap-around is what every torch device does for integers.

DRAFT, ACCEPT, NEXT, GUMBEL = range(4)
"""What a position's randomness is for; streams never mix."""


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN_64 = _signed(0x9E3779B97F4A7C15, 64)
_MIX_64 = (_signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64))
_GOLDEN_32 = _signed(0x9E3779B1, 32)
_MIX_32 = (_signed(0x7FEB352D, 32), _signed(0x846CA68B, 32))


def mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64."""
    for multiplier, shift in zip(_MIX_64, (30, 27), strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def mix32(x: Tensor) -> Tensor:
    """The `lowbias32` finaliser on int32."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MIX_32[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MIX_32[1]
    return x ^ ((x >> 16) & 0xFFFF)


def seed_tensor(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Python integers of any size as int64 [B]."""
    return torch.tensor([_signed(seed, 64) for seed in seeds], dtype=torch.int64, device=device)


def derive_seed(seed: int, index: int) -> int:
    """The seed of the index-th sibling of a request (index 0 keeps the seed itself)."""
    if index == 0:
        return seed
    return int(mix64(torch.tensor(_signed(seed + index * 0xD1342543DE82EF95, 64))))


def position_keys(seeds_B: Tensor, positions_BT: Tensor, stream: int) -> Tensor:
    """One 64-bit key for each (seed, absolute position, stream). [B, T]."""
    rows_B = mix64(seeds_B * 4 + stream + _GOLDEN_64)
    return mix64(rows_B[:, None] ^ (positions_BT * _GOLDEN_64))


def uniforms(seeds_B: Tensor, positions_BT: Tensor, stream: int) -> Tensor:
    """float32 in (0, 1) for each row and position: odd multiples of 2^-24, so u * total < total exactly. [B, T]."""
    keys_BT = position_keys(seeds_B, positions_BT, stream)
    return (((keys_BT >> 41) & 0x7FFFFF).float() + 0.5) * 2.0**-23


def gumbel(seeds_B: Tensor, positions_BT: Tensor, num_tokens: int) -> Tensor:
    """Gumbel noise of every token at every position, float32 [B, T, V].

    The integers are equal on all devices; the two logarithms may differ by an ulp between devices.
    """
    keys_BT = position_keys(seeds_B, positions_BT, GUMBEL)
    low, high = keys_BT.to(torch.int32)[..., None], (keys_BT >> 32).to(torch.int32)[..., None]
    tokens_V = torch.arange(num_tokens, dtype=torch.int32, device=seeds_B.device) * _GOLDEN_32
    bits = mix32(mix32(tokens_V ^ low) + high)
    # All 32 bits at the small end of u: the winner is the smallest exponential, where float32 is finest.
    u = (bits.to(torch.int64) & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
