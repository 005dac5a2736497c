"""What happens between the passes: from the two views' logits to drafts, and to the tokens a cycle commits.

Rows of one cycle may differ in everything (rule, temperature, seed, processors). Rows without processors are decided
together, without touching the host. A row with processors is walked position by position, each with the prefix it
really has, in both views; the verifier's walk ends at the first rejection, so a processor sees a committed position's
prefix exactly once there, in order, as in plain decoding.

    B = rows, W = positions of the verify pass, J = W - 1 drafts, V = vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.decoding.row import Outcome, Row
from orthrus.decoding.sampling import (
    ACCEPT,
    DRAFT,
    NEXT,
    Laws,
    Sampling,
    gumbel,
    pick_inverse_cdf,
    seed_tensor,
    send,
    uniforms,
    warp,
)
from orthrus.decoding.verify import accept_equal, accept_speculative, at_column, count_accepted, of_tokens

Redraft = Callable[[Tensor], Tensor]
"""redraft(columns [B]) -> the diffusion view's logits there, one column of each row, computed again. [B, V]."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the choices of B rows hang on besides logits and positions, on their device: the same in every cycle."""

    of: list[tuple[Sampling, int]]
    """Sampling and seed of each row."""
    laws: Laws
    seeds_B: Tensor
    is_speculative_B1: Tensor
    is_coupled_B1: Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[Row], device: torch.device) -> "Settings":
        """Sent in two copies, which nobody waits for."""
        rules = [row.sampling.effective_rule for row in rows]
        are = (torch.tensor([rule == of for rule in rules]).long() for of in ("speculative", "coupled"))
        seeds_B, is_speculative_B, is_coupled_B = send((seed_tensor([row.seed for row in rows]), *are), device)
        return cls(
            of=settings_of(rows),
            laws=Laws.of([row.sampling for row in rows], device),
            seeds_B=seeds_B,
            is_speculative_B1=is_speculative_B[:, None] != 0,
            is_coupled_B1=is_coupled_B[:, None] != 0,
        )

    def are_of(self, rows: Sequence[Row]) -> bool:
        """Whether these rows, in this order, have these settings."""
        return self.of == settings_of(rows)

    def some(self, rows: slice) -> "Settings":
        """Those of some of the rows."""
        return Settings(
            self.of[rows],
            self.laws.some(rows, [sampling for sampling, _ in self.of[rows]]),
            self.seeds_B[rows],
            self.is_speculative_B1[rows],
            self.is_coupled_B1[rows],
        )


def settings_of(rows: Sequence[Row]) -> list[tuple[Sampling, int]]:
    """What `Settings` follow from."""
    return [(row.sampling, row.seed) for row in rows]


class Chooser:
    """The choices of one cycle: `draft` first (unless nothing is drafted), then `verify`.

    `settings` and `firsts_B` (the position that each row's first draft will have, int64) are sent unless the device has
    them. With a `redraft` nothing of the size of the logits is kept between the two. `make_noise` is `gumbel` or
    what has its bits.
    """

    logprobs_BW: Tensor | None = None
    """After `verify`, where a row wants them: log p of what is committed under the AR view's own logits. float32."""

    def __init__(
        self, rows: Sequence[Row], num_columns: int, num_tokens: int, device: torch.device, *,
        settings: Settings | None = None, firsts_B: Tensor | None = None, redraft: Redraft | None = None,
        make_noise: Callable[[Tensor, Tensor, int], Tensor] = gumbel,
    ):  # fmt: skip
        self._rows = rows
        self._num_tokens = num_tokens
        self._walked = [b for b, row in enumerate(rows) if row.processor is not None]
        self._redraft, self._make_noise = redraft, make_noise
        self._q_BJ: Tensor | None = None
        self._draft_logits_BJV: Tensor | None = None
        self._noise_BWV: Tensor | None = None
        self._wanted: dict[int, tuple[Tensor, ...]] = {}
        rules = [row.sampling.effective_rule for row in rows]
        self._is_greedy = all(rule == "greedy" for rule in rules)
        self._num_speculative = rules.count("speculative")
        self._num_coupled = rules.count("coupled")
        if self._is_greedy:
            return
        self._settings = Settings.of_rows(rows, device) if settings is None else settings
        if firsts_B is None:
            (firsts_B,) = send([torch.tensor([len(row.tokens) for row in rows])], device)
        self._positions_BW = firsts_B[:, None] + torch.arange(num_columns, device=device)

    def draft(self, logits_BJV: Tensor) -> Tensor:
        """The block's drafts from the diffusion view's logits. [B, J]."""
        if self._walked:
            logits_BJV = logits_BJV.float()
            for b in self._walked:
                self._walk_draft(b, logits_BJV[b])
        scores = self._scores(logits_BJV)
        if not self._num_speculative:
            return self._pick_equal(scores, 0)
        q_BJV = scores.softmax(-1)
        drafts_BJ = self._pick_drafts(scores, q_BJV, 0)
        self._q_BJ = of_tokens(q_BJV, drafts_BJ)
        if self._redraft is None or self._walked:  # what processors made of logits is not computed again
            self._draft_logits_BJV = logits_BJV
        return drafts_BJ

    def verify(self, logits_BWV: Tensor, drafts_BJ: Tensor, widths_B: Tensor) -> tuple[Tensor, Tensor]:
        """(A [B], committed [B, W]) from the AR view's logits: row b commits its first A + 1 entries."""
        own_BWV = logits_BWV
        if self._walked:
            logits_BWV = logits_BWV.float().clone()
            for b in self._walked:
                self._walk_verify(b, logits_BWV[b], drafts_BJ[b])
        scores = self._scores(logits_BWV)
        # Copies: a view would keep all rows' alive.
        self._wanted = {
            b: tuple(numbers_BWV[b].to(torch.float32, copy=True) for numbers_BWV in (own_BWV, scores))
            for b, row in enumerate(self._rows)
            if row.wants_logits
        }
        num_accepted_B, committed_BW = self._accept(scores, drafts_BJ, widths_B)
        if any(row.wants_logprobs for row in self._rows):
            self.logprobs_BW = of_tokens(own_BWV.float().log_softmax(-1), committed_BW)
        return num_accepted_B, committed_BW

    def report(self, outcomes: Sequence[Outcome], logprobs: Sequence[Sequence[float]] | None) -> None:
        """Add log-probabilities (`logprobs_BW` on the host) and logits of the committed tokens to the outcomes of the
        rows that want them."""
        for b, (row, outcome) in enumerate(zip(self._rows, outcomes, strict=True)):
            num_tokens = len(outcome.tokens)
            if row.wants_logprobs and logprobs is not None:
                outcome.logprobs = list(logprobs[b][:num_tokens])
            if row.wants_logits:
                outcome.logits, outcome.scores = (numbers_WV[:num_tokens].clone() for numbers_WV in self._wanted[b])

    def _scores(self, logits_BTV: Tensor) -> Tensor:
        return logits_BTV if self._is_greedy else warp(logits_BTV, self._settings.laws)

    def _uniforms(self, first: int, num_columns: int, stream: int) -> Tensor:
        return uniforms(self._settings.seeds_B, self._positions_BW[:, first : first + num_columns], stream)

    def _accept(self, scores: Tensor, drafts_BJ: Tensor, widths_B: Tensor) -> tuple[Tensor, Tensor]:
        if self._num_speculative == len(self._rows):
            return self._accept_speculative(scores, drafts_BJ, widths_B)
        equal = accept_equal(drafts_BJ, self._pick_equal(scores, 0), widths_B)
        if not self._num_speculative:
            return equal
        speculative = self._accept_speculative(scores, drafts_BJ, widths_B)
        is_speculative_B1 = self._settings.is_speculative_B1
        return (
            torch.where(is_speculative_B1[:, 0], speculative[0], equal[0]),
            torch.where(is_speculative_B1, speculative[1], equal[1]),
        )

    def _accept_speculative(self, scores: Tensor, drafts_BJ: Tensor, widths_B: Tensor) -> tuple[Tensor, Tensor]:
        num_drafts = drafts_BJ.shape[1]
        q_BJ = scores[:, :0, 0] if self._q_BJ is None else self._q_BJ
        u_accept_BJ = self._uniforms(0, num_drafts, ACCEPT)
        u_next_BW = self._uniforms(0, num_drafts + 1, NEXT)
        return accept_speculative(scores.softmax(-1), q_BJ, self._q_at, drafts_BJ, widths_B, u_accept_BJ, u_next_BW)

    def _q_at(self, columns_B: Tensor) -> Tensor:
        """The law that the drafts of these columns were drawn from: a column's bits do not depend on others. [B, V]."""
        if self._draft_logits_BJV is None:
            assert self._redraft is not None, "speculative rows were verified without a draft"
            logits_BV = self._redraft(columns_B)
        else:
            logits_BV = at_column(self._draft_logits_BJV, columns_B)
        return self._scores(logits_BV[:, None])[:, 0].softmax(-1)

    def _noise(self, first: int, num_columns: int) -> Tensor:
        """What is added to scores at columns first, first + 1, ...: nothing for greedy rows."""
        columns = slice(first, first + num_columns)
        if self._noise_BWV is not None:
            return self._noise_BWV[:, columns]
        # Kept from the draft to verification, which has a column more.
        kept = columns if self._redraft is not None else slice(None)
        noise = self._make_noise(self._settings.seeds_B, self._positions_BW[:, kept], self._num_tokens)
        if self._num_coupled < len(self._rows):
            noise.mul_(self._settings.is_coupled_B1[..., None])
        if self._redraft is not None:
            return noise
        self._noise_BWV = noise
        return noise[:, columns]

    def _pick_equal(self, scores_BTV: Tensor, first: int) -> Tensor:
        """The greedy or coupled choice at columns first, first + 1, ... [B, T]."""
        if self._num_coupled:
            scores_BTV = scores_BTV + self._noise(first, scores_BTV.shape[1])
        return scores_BTV.max(-1).indices

    def _pick_drafts(self, scores_BTV: Tensor, q_BTV: Tensor, first: int) -> Tensor:
        """Drafts at columns first, first + 1, ... from their scores and law, where a row is speculative. [B, T]."""
        drawn_BT = pick_inverse_cdf(q_BTV, self._uniforms(first, q_BTV.shape[1], DRAFT))
        if self._num_speculative == len(self._rows):
            return drawn_BT
        return torch.where(self._settings.is_speculative_B1, drawn_BT, self._pick_equal(scores_BTV, first))

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
            scores = alone._scores(logits_JV[None, j : j + 1])
            is_drawn = alone._num_speculative
            chosen_11 = alone._pick_drafts(scores, scores.softmax(-1), j) if is_drawn else alone._pick_equal(scores, j)
            ids[0, start + j] = chosen_11[0, 0]

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
        one_B = torch.ones(1, dtype=torch.long, device=draft_11.device)
        assert batch._q_BJ is not None, "a speculative row was verified without a draft"
        p_11, q_11 = of_tokens(scores.softmax(-1), draft_11), batch._q_BJ[b : b + 1, j : j + 1]
        return bool(count_accepted(p_11, q_11, one_B, self._uniforms(j, 1, ACCEPT)))


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
    chooser.report([outcome], None if chooser.logprobs_BW is None else chooser.logprobs_BW.tolist())
    return outcome
