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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
    all_top_k: bool
    """Whether each row has a top-k."""
    uses_top_p: bool
    uses_min_p: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> "Laws":
        """The laws of these rows; a greedy row gets temperature 1, which leaves its argmax alone."""
        own = [Sampling(temperature=1.0) if s.temperature < GREEDY_BELOW else s for s in samplings]
        columns = (
            torch.tensor([s.temperature for s in own], dtype=torch.float32),
            torch.tensor([s.top_k for s in own], dtype=torch.int64),
            torch.tensor([1 - s.top_p for s in own], dtype=torch.float32),
            torch.tensor([s.min_p for s in own], dtype=torch.float32),
        )
        temperature, top_k, tail, min_p = (column_B[:, None, None] for column_B in send(columns, device))
        return cls(temperature, top_k, tail, min_p, **flags(own))

    def some(self, rows: slice, samplings: Sequence[Sampling]) -> "Laws":
        """The laws of some of the rows, whose settings are given."""
        columns = (getattr(self, name)[rows] for name in ("temperature", "top_k", "tail", "min_p"))
        return Laws(*columns, **flags(samplings))


def flags(samplings: Sequence[Sampling]) -> dict[str, Any]:
    """What `Laws` have to do for these rows; temperatures of greedy rows are not asked."""
    drawn = [s for s in samplings if s.temperature >= GREEDY_BELOW]
    return dict(
        uses_temperature=any(s.temperature != 1 for s in drawn),
        max_top_k=max((s.top_k for s in drawn), default=0),
        all_top_k=len(drawn) == len(samplings) and all(s.top_k for s in drawn),
        uses_top_p=any(s.top_p < 1 for s in drawn),
        uses_min_p=any(s.min_p > 0 for s in drawn),
    )


def send(columns: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Columns of one length, int64 or float32, to the device in one copy, for which the host does not wait there.

    To a GPU it goes from pinned memory: from any other the host would wait until the GPU has done what it was given.
    """
    packed = torch.stack([c if c.dtype == torch.int64 else c.view(torch.int32).long() for c in columns])
    if device.type == "cuda":
        packed = packed.pin_memory()
    sent = packed.to(device, non_blocking=True)
    return [
        there if c.dtype == torch.int64 else there.int().view(torch.float32)
        for there, c in zip(sent, columns, strict=True)
    ]


def warp(logits_BTV: Tensor, laws: Laws) -> Tensor:
    """Scores whose softmax is the law: temperature, top-k, top-p, min-p in transformers' order. float32 [B, T, V]."""
    if not (laws.uses_temperature or laws.max_top_k or laws.uses_top_p or laws.uses_min_p):
        return logits_BTV.float()
    scores = logits_BTV.to(torch.float32, copy=True)  # one copy, which all that follows works on
    if laws.uses_temperature:
        scores.div_(laws.temperature)
    best = None
    if laws.max_top_k:
        best = drop_top_k_(scores, laws.top_k, laws.max_top_k)
    if laws.uses_top_p:
        drop_top_p_(scores, laws.tail, best if laws.all_top_k and laws.max_top_k <= MAX_LISTED else None)
    if laws.uses_min_p:
        drop_min_p_(scores, laws.min_p)
    return scores


class Best(NamedTuple):
    """The tokens of the best scores, most likely first, as many for each row as the largest top-k: those that a
    smaller one drops, too. [..., K] each."""

    scores: Tensor
    ids: Tensor


def drop_top_k_(scores: Tensor, top_k: Tensor, max_top_k: int) -> Best:
    """Drop (-inf) whatever scores below the k-th best, in place; ties with it stay. A k of 0 drops nothing.

    Returns the best.
    """
    size = min(max_top_k, scores.shape[-1])
    best = Best(*scores.topk(size, dim=-1))
    index = (top_k.clamp(1, size) - 1).expand(*best.scores.shape[:-1], 1)
    kth = best.scores.gather(-1, index).masked_fill(top_k == 0, -math.inf)
    scores.masked_fill_(scores < kth, -math.inf)
    return best


class Edge(NamedTuple):
    """Where top-p cuts: what scores less goes, what scores more stays, and of those that score as much some go."""

    score: Tensor
    num_dropped: Tensor
    """How many of the edge's tokens go. int64 [..., 1], as `score` is float32."""


def drop_top_p_(scores: Tensor, tail: Tensor, best: Best | None = None) -> None:
    """Drop the least likely tokens whose total stays within `tail` (1 - p, fp32), in place; the likeliest stays.

    Of equally likely tokens those of lower ids are dropped first. A tail of 0 drops nothing. With `best` only these
    tokens, and such as score as the least of them does, have any probability; without, the vocabulary is sorted.
    """
    p = scores.softmax(-1)
    edge = edge_of_list(scores, p, tail, Best(*scores.sort(-1, descending=True)) if best is None else best)
    del p
    is_edge = scores == edge.score
    first_kept, _ = first_above(is_edge, edge.num_dropped)
    ids_V = torch.arange(scores.shape[-1], device=scores.device)
    drop = (scores < edge.score).logical_or_(is_edge.logical_and_(ids_V < first_kept))
    scores.masked_fill_(drop.logical_and_(tail > 0), -math.inf)  # else tokens without mass would go, in company only


def edge_of_list(scores: Tensor, p: Tensor, tail: Tensor, best: Best) -> Edge:
    """The score at which the total of all lower ones and its own passes the tail, where all that has mass is in a list,
    but for more tokens that score as the last of the list."""
    ascending, mass = best.scores.flip(-1), masses(p.gather(-1, best.ids)).flip(-1)
    least = ascending[..., :1]
    num_others = (scores == least).sum(-1, keepdim=True) - (ascending == least).sum(-1, keepdim=True)
    others = num_others * mass[..., :1]  # none, where top-k dropped the least
    up_to = mass.cumsum(-1) + others
    left = mass_to_drop(tail, up_to[..., -1:])
    place = (up_to <= left).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    del up_to
    score = ascending.gather(-1, place)
    left = left - (mass * (ascending < score)).sum(-1, keepdim=True) - others * (score > least)
    of_one = (mass * (ascending == score)).amax(-1, keepdim=True)
    return Edge(score, left // of_one.clamp(min=1))


def drop_min_p_(scores: Tensor, min_p: Tensor) -> None:
    """Drop tokens less likely than min_p times the likeliest, in place."""
    p = scores.softmax(-1)
    scores.masked_fill_(p < min_p * p.amax(-1, keepdim=True), -math.inf)


# Probabilities are added up as integers, whose sum is the same in any order: the order of a parallel sum or scan
# follows the number of rows, and a row's text would follow its company.

MASS_UNIT = 2.0**60
"""Units of mass in a probability of 1. What an fp32 probability has below 2^-60 is lost."""

MAX_LISTED = 1024
"""The largest top-k for which top-p looks at the list of the best alone."""

BLOCK = 128
"""Numbers that `first_above` adds up before it looks where the sum passes; divides Qwen3's vocabulary."""


def masses(p: Tensor) -> Tensor:
    """Probabilities in units of mass, int64."""
    return (p * MASS_UNIT).long()


def mass_to_drop(tail: Tensor, total: Tensor) -> Tensor:
    """The most that top-p drops, less than all. int64 [..., 1]."""
    return torch.minimum(masses(tail), total - 1)


def first_above(numbers: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The first place at which integers 0 or more, added up along the last dimension, pass `bound` [..., 1]; and their
    sum before it. int64 [..., 1] each. The last place, where none does.

    Blocks are added up first, and then the numbers of one: a scan of all of them would be slow where rows are few.
    """
    num_padding = -numbers.shape[-1] % BLOCK
    blocks = (F.pad(numbers, (0, num_padding)) if num_padding else numbers).unflatten(-1, (-1, BLOCK))
    block, before = _first_above(blocks.sum(-1), bound)
    own = blocks.gather(-2, block[..., None].expand(*block.shape, BLOCK)).squeeze(-2).long()
    place, before_place = _first_above(own, bound - before)
    return (block * BLOCK + place).clamp(max=numbers.shape[-1] - 1), before + before_place


def _first_above(numbers: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The same by a scan."""
    up_to = numbers.cumsum(-1)
    place = (up_to <= bound).sum(-1, keepdim=True).clamp(max=numbers.shape[-1] - 1)
    return place, (up_to - numbers).gather(-1, place)


def pick_inverse_cdf(p_BTV: Tensor, u_BT: Tensor) -> Tensor:
    """The token at which the cumulated weights pass u: a draw from p (normalised or not) for u in (0, 1). [B, T].

    A token without mass is never picked.
    """
    mass_BTV = masses(p_BTV)
    # In double precision u times the total is less than the total, also behind both roundings.
    bound_BT1 = (u_BT[..., None].double() * mass_BTV.sum(-1, keepdim=True)).long()
    return first_above(mass_BTV, bound_BT1)[0].squeeze(-1)


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


def seed_tensor(seeds: Sequence[int]) -> Tensor:
    """Python integers of any size as int64 [B]."""
    return torch.tensor([_signed(seed, 64) for seed in seeds], dtype=torch.int64)


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
    u = bits.view(torch.uint32).float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
