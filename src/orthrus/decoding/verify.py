"""Which drafts survive, and the token that follows them: pure functions of fixed shape that never touch the host.

A wrong verifier writes plausible wrong text, so each function here has a slow twin in tests/decoding and is summed
over all its randomness on a tiny vocabulary. `widths` counts a row's real drafts; columns beyond it are padding.

    B = rows, W = positions of the verify pass (the anchor's and J drafts'), J = W - 1, V = vocabulary
"""

from collections.abc import Callable

import torch
from torch import Tensor

from orthrus.decoding.sampling import MASS_UNIT, masses, pick_inverse_cdf

RESIDUAL_FLOOR = 1e-5
"""A residual of no more mass than this is rounding: p and q agree there, and p itself is drawn from (official code)."""


def count_leading(kept_BJ: Tensor, widths_B: Tensor) -> Tensor:
    """A: how many drafts stand before the first that is not kept, at most the row's width. [B]."""
    real_BJ = torch.arange(kept_BJ.shape[1], device=kept_BJ.device) < widths_B[:, None]
    return (kept_BJ & real_BJ).long().cumprod(dim=1).sum(dim=1)


def accept_equal(drafts_BJ: Tensor, targets_BW: Tensor, widths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy and coupled: a draft is kept iff it is the token the AR view chooses there. (A [B], committed [B, W]).

    Row b commits its first A + 1 entries: drafts up to A equal the targets, and entry A is the correction or bonus.
    """
    return count_leading(drafts_BJ == targets_BW[:, :-1], widths_B), targets_BW


def of_tokens(law_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """The probability of one token in each column. [B, T]."""
    return law_BTV.gather(-1, tokens_BT[..., None]).squeeze(-1)


def at_column(numbers_BTV: Tensor, at_B: Tensor) -> Tensor:
    """One column of each row, the last where there is none of that number. [B, V]."""
    at_B11 = at_B.clamp(max=numbers_BTV.shape[1] - 1)[:, None, None]
    return numbers_BTV.gather(1, at_B11.expand(-1, 1, numbers_BTV.shape[-1])).squeeze(1)


def count_accepted(p_BJ: Tensor, q_BJ: Tensor, widths_B: Tensor, u_BJ: Tensor) -> Tensor:
    """Speculative: a draft that the views give p and q survives with probability min(1, p / q). A, [B]."""
    # "<", not "<=": u can be 0 in principle, and a draft with p = 0 must never pass.
    return count_leading(u_BJ * q_BJ < p_BJ, widths_B)


def residual(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """Weights of the law after a rejection: (p - q)+, or p where that has next to no mass. [B, V].

    Not normalised: who draws knows their sum, and one in floating point would depend on a row's company.
    """
    rest_BV = (p_BV - q_BV).clamp(min=0)
    mass_B1 = masses(rest_BV).sum(-1, keepdim=True)
    return torch.where(mass_B1 <= int(RESIDUAL_FLOOR * MASS_UNIT), p_BV, rest_BV)


def accept_speculative(
    p_BWV: Tensor,
    q_BJ: Tensor,
    q_at: Callable[[Tensor], Tensor],
    drafts_BJ: Tensor,
    widths_B: Tensor,
    u_accept_BJ: Tensor,
    u_next_BW: Tensor,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling: (A [B], committed [B, W]); row b commits its first A + 1 entries.

    Entry A is drawn with u_next[b, A]: from the residual where draft A was rejected, from p where none was. Of the law
    that drafted, only the drafts' own q is wanted of every column, and all of it where a row was rejected:
    q_at(columns [B], each less than J) -> [B, V].
    """
    num_accepted_B = count_accepted(of_tokens(p_BWV[:, :-1], drafts_BJ), q_BJ, widths_B, u_accept_BJ)
    law_BV = p_BV = at_column(p_BWV, num_accepted_B)
    if drafts_BJ.shape[1]:
        q_BV = q_at(num_accepted_B.clamp(max=drafts_BJ.shape[1] - 1))
        was_rejected_B1 = (num_accepted_B < widths_B)[:, None]
        law_BV = torch.where(was_rejected_B1, residual(p_BV, q_BV), p_BV)
    u_B1 = u_next_BW.gather(1, num_accepted_B[:, None])
    next_B1 = pick_inverse_cdf(law_BV[:, None], u_B1)
    columns_W = torch.arange(p_BWV.shape[1], device=p_BWV.device)
    padded_BW = torch.cat([drafts_BJ, next_B1], dim=1)
    return num_accepted_B, torch.where(columns_W < num_accepted_B[:, None], padded_BW, next_B1)
