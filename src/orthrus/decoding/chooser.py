"""What happens between the passes: from the two views' logits to drafts, and to the tokens a cycle commits.

Rows of one cycle may differ in everything (rule, temperature, seed, processors). Rows without processors are decided
together, without touching the host. A row with processors is walked position by position, each with the prefix it
really has, in both views; the verifier's walk ends at the first rejection, so a processor sees a committed position's
prefix exactly once there, in order, as in plain decoding.

    B = rows, W = positions of the verify pass, J = W - 1 drafts, V = vocabulary
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthrus.decoding.row import Outcome, Row
from orthrus.decoding.sampling import (
    ACCEPT,
    DRAFT,
    NEXT,
    Laws,
    gumbel,
    pick_inverse_cdf,
    seed_tensor,
    uniforms,
    warp,
)
from orthrus.decoding.verify import accept_equal, accept_speculative, count_accepted


class Chooser:
    """The choices of one cycle: `draft` first (unless nothing is drafted), then `verify`."""

    scores_BWV: Tensor | None = None
    """After `verify`: the scores that decided, processors and warpers applied."""

    def __init__(self, rows: Sequence[Row], num_columns: int, num_tokens: int, device: torch.device):
        self._rows = rows
        self._num_tokens = num_tokens
        self._walked = [b for b, row in enumerate(rows) if row.processor is not None]
        self._q_BJV: Tensor | None = None
        self._noise_BWV: Tensor | None = None
        rules = [row.sampling.effective_rule for row in rows]
        self._is_greedy = all(rule == "greedy" for rule in rules)
        self._num_speculative = rules.count("speculative")
        if self._is_greedy:
            return
        self._laws = Laws.of([row.sampling for row in rows], device)
        self._seeds_B = seed_tensor([row.seed for row in rows], device)
        firsts_B = torch.tensor([len(row.tokens) for row in rows], device=device)
        self._positions_BW = firsts_B[:, None] + torch.arange(num_columns, device=device)
        self._is_speculative_B1 = torch.tensor([[rule == "speculative"] for rule in rules], device=device)
        if "coupled" in rules:
            self._noise_BWV = gumbel(self._seeds_B, self._positions_BW, num_tokens)
            if "greedy" in rules:
                is_coupled_B11 = torch.tensor([[[rule == "coupled"]] for rule in rules], device=device)
                self._noise_BWV = self._noise_BWV * is_coupled_B11

    def draft(self, logits_BJV: Tensor) -> Tensor:
        """The block's drafts from the diffusion view's logits. [B, J]."""
        if self._walked:
            logits_BJV = logits_BJV.float()
            for b in self._walked:
                self._walk_draft(b, logits_BJV[b])
        scores = self._scores(logits_BJV)
        if self._num_speculative:
            self._q_BJV = scores.softmax(-1)
        return self._pick_drafts(scores, 0)

    def verify(self, logits_BWV: Tensor, drafts_BJ: Tensor, widths_B: Tensor) -> tuple[Tensor, Tensor]:
        """(A [B], committed [B, W]) from the AR view's logits: row b commits its first A + 1 entries."""
        if self._walked:
            logits_BWV = logits_BWV.float().clone()
            for b in self._walked:
                self._walk_verify(b, logits_BWV[b], drafts_BJ[b])
        scores = self.scores_BWV = self._scores(logits_BWV)
        if self._num_speculative == len(self._rows):
            return self._accept_speculative(scores, drafts_BJ, widths_B)
        equal = accept_equal(drafts_BJ, self._pick_equal(scores, 0), widths_B)
        if not self._num_speculative:
            return equal
        speculative = self._accept_speculative(scores, drafts_BJ, widths_B)
        is_speculative_B = self._is_speculative_B1[:, 0]
        return (
            torch.where(is_speculative_B, speculative[0], equal[0]),
            torch.where(self._is_speculative_B1, speculative[1], equal[1]),
        )

    def report(self, outcomes: Sequence[Outcome], logits_BWV: Tensor) -> None:
        """Add log-probabilities and logits of the committed tokens to the outcomes of the rows that want them."""
        for b, (row, outcome) in enumerate(zip(self._rows, outcomes, strict=True)):
            num_tokens = len(outcome.tokens)
            if row.wants_logprobs:
                logprobs_nV = logits_BWV[b, :num_tokens].float().log_softmax(-1)
                tokens_n1 = torch.tensor(outcome.tokens, device=logits_BWV.device)[:, None]
                outcome.logprobs = logprobs_nV.gather(1, tokens_n1)[:, 0].tolist()
            if row.wants_logits and self.scores_BWV is not None:
                outcome.logits = logits_BWV[b, :num_tokens].float().clone()
                outcome.scores = self.scores_BWV[b, :num_tokens].float().clone()

    def _scores(self, logits_BTV: Tensor) -> Tensor:
        return logits_BTV if self._is_greedy else warp(logits_BTV, self._laws)

    def _accept_speculative(self, scores: Tensor, drafts_BJ: Tensor, widths_B: Tensor) -> tuple[Tensor, Tensor]:
        q_BJV = scores[:, :0] if self._q_BJV is None else self._q_BJV
        u_accept_BJ = uniforms(self._seeds_B, self._positions_BW[:, : drafts_BJ.shape[1]], ACCEPT)
        u_next_BW = uniforms(self._seeds_B, self._positions_BW[:, : scores.shape[1]], NEXT)
        return accept_speculative(scores.softmax(-1), q_BJV, drafts_BJ, widths_B, u_accept_BJ, u_next_BW)

    def _pick_equal(self, scores_BTV: Tensor, first: int) -> Tensor:
        """The greedy or coupled choice at columns first, first + 1, ... [B, T]."""
        if self._noise_BWV is not None:
            scores_BTV = scores_BTV + self._noise_BWV[:, first : first + scores_BTV.shape[1]]
        return scores_BTV.max(-1).indices

    def _pick_drafts(self, scores_BTV: Tensor, first: int) -> Tensor:
        """Drafts at columns first, first + 1, ... from their scores. [B, T]."""
        if self._num_speculative == 0:
            return self._pick_equal(scores_BTV, first)
        columns = slice(first, first + scores_BTV.shape[1])
        u_BT = uniforms(self._seeds_B, self._positions_BW[:, columns], DRAFT)
        drawn_BT = pick_inverse_cdf(scores_BTV.softmax(-1), u_BT)
        if self._num_speculative == len(self._rows):
            return drawn_BT
        return torch.where(self._is_speculative_B1, drawn_BT, self._pick_equal(scores_BTV, first))

    # A row with processors: the same choices, one column at a time, on a chooser of its own.

    def _alone(self, b: int, num_columns: int, device: torch.device) -> "Chooser":
        return Chooser([self._rows[b]], num_columns, self._num_tokens, device)

    def _prefix(self, row: Row, num_columns: int, device: torch.device) -> Tensor:
        return torch.tensor([row.tokens + [0] * num_columns], device=device)

    def _walk_draft(self, b: int, logits_JV: Tensor) -> None:
        """Replace the row's draft logits by processed ones, each with the drafts before it in the prefix."""
        row, device = self._rows[b], logits_JV.device
        assert row.processor is not None
        alone = self._alone(b, len(logits_JV), device)
        ids, start = self._prefix(row, row.width, device), len(row.tokens)
        for j in range(row.width):
            logits_JV[j] = row.processor(ids[:, : start + j], logits_JV[j : j + 1].clone())[0]
            ids[0, start + j] = alone._pick_drafts(alone._scores(logits_JV[None, j : j + 1]), j)[0, 0]

    def _walk_verify(self, b: int, logits_WV: Tensor, drafts_J: Tensor) -> None:
        """Replace the row's AR logits by processed ones, up to the first draft that is not kept."""
        row, device = self._rows[b], logits_WV.device
        assert row.processor is not None
        alone = self._alone(b, len(logits_WV), device)
        ids, start = self._prefix(row, row.width, device), len(row.tokens)
        ids[0, start:] = drafts_J[: row.width]
        for j in range(row.width + 1):
            logits_WV[j] = row.processor(ids[:, : start + j], logits_WV[j : j + 1].clone())[0]
            if j < row.width and not alone._keeps(logits_WV[None, j : j + 1], drafts_J[None, j : j + 1], j, self, b):
                break

    def _keeps(self, logits_11V: Tensor, draft_11: Tensor, j: int, batch: "Chooser", b: int) -> bool:
        """Whether this row's draft at column j survives."""
        scores = self._scores(logits_11V)
        if self._num_speculative == 0:
            return bool(self._pick_equal(scores, j) == draft_11)
        p_11V = scores.softmax(-1)
        u_11 = uniforms(self._seeds_B, self._positions_BW[:, j : j + 1], ACCEPT)
        one_B = torch.ones(1, dtype=torch.long, device=draft_11.device)
        assert batch._q_BJV is not None, "a speculative row was verified without a draft"
        q_11V = batch._q_BJV[b : b + 1, j : j + 1]
        return bool(count_accepted(torch.cat([p_11V, p_11V], dim=1), q_11V, draft_11, one_B, u_11))


def first_outcome(row: Row, logits_11V: Tensor) -> Outcome:
    """The token that follows a prompt, from the AR view's logits there. `ValueError` where they are not numbers."""
    if bool(torch.isnan(logits_11V).any()):
        raise ValueError("the model's logits are not numbers (NaN): the checkpoint's weights are broken")
    device = logits_11V.device
    chooser = Chooser([row], 1, logits_11V.shape[-1], device)
    none_B0, widths_B = (
        torch.empty(1, 0, dtype=torch.long, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
    )
    _, committed_B1 = chooser.verify(logits_11V, none_B0, widths_B)
    outcome = Outcome(tokens=committed_B1[0].tolist(), drafts=[])
    chooser.report([outcome], logits_11V)
    return outcome
