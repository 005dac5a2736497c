"""A cycle of rows that argmax alone does not decide: the engine's passes, and what is chosen between and behind them.

Scores over the vocabulary take much more memory than anything else of a cycle, so rows are chosen in groups.

    B = rows, W = positions of a pass, J = W - 1 drafts, V = vocabulary, D = hidden width
"""

from collections.abc import Callable

import torch
from torch import Tensor

from orthrus.decoding.chooser import Chooser, Redraft, Settings
from orthrus.decoding.row import Outcome, Row
from orthrus.decoding.verify import at_column
from orthrus.engine.graphs import Graphs
from orthrus.engine.passes import Inputs, Passes, begin_read

SCORE_COPIES = 16
"""fp32 numbers for each logit that are alive at once, at most, while a cycle's rows are chosen: top-p has most, 13 on
a CPU, and a GPU's sort has buffers."""
SCORES_BYTES = 3 * 2**28
"""What these may take together: rows are chosen in groups that fit, of one at least. At Qwen3's vocabulary and 32
positions a row takes 311 MB, and two are a group."""
KEPT_BYTES = 2**28
"""What may be kept of sampled drafts until they are verified; what would not fit is computed again then."""


class CycleChoice:
    """The passes of a cycle with `Chooser`s between them, for batches that argmax alone does not decide.

    The same passes: what they compute does not depend on who looks at it. Nor does what is chosen depend on how rows
    are grouped. The device is told nothing that it has, and what is chosen is read once.
    """

    def __init__(self, rows: list[Row], inputs: Inputs, passes: Passes, graphs: Graphs, settings: Settings):
        self.num_columns = max(row.width for row in rows) + 1
        self._inputs, self._passes, self._graphs = inputs, passes, graphs
        self._ids_BW = inputs.ids_BW[: len(rows), : self.num_columns]
        self._widths_B = inputs.widths_B[: len(rows)]
        self._draft_hidden_BJD: Tensor | None = None
        device, num_tokens = inputs.ids_BW.device, len(passes.weights.embedding_VD)
        self._groups = group_rows(len(rows), self.num_columns * num_tokens)
        is_kept = len(rows) * self.num_columns * num_tokens * (4 + inputs.hidden_RD.element_size()) <= KEPT_BYTES
        firsts_B = inputs.lengths_B[: len(rows)].long() + 1
        self._choosers = [
            Chooser(
                rows[group], self.num_columns, num_tokens, device, settings=settings.some(group),
                firsts_B=firsts_B[group], redraft=None if is_kept else self._redraft_of(group),
                make_noise=passes.ops.gumbel,
            )
            for group in self._groups
        ]  # fmt: skip
        self._is_redrafting = not is_kept and any(row.sampling.effective_rule == "speculative" for row in rows)

    def draft(self) -> None:
        """Drafts, into the inputs' ids."""
        self._graphs.run(self._passes.hold_draft, self._inputs)
        hidden_BJD = self._hidden_BWD()[:, :-1]
        for group, chooser in zip(self._groups, self._choosers, strict=True):
            self._ids_BW[group, 1:] = chooser.draft(self._passes.logits(hidden_BJD[group]))
        if self._is_redrafting:
            self._draft_hidden_BJD = hidden_BJD.clone()  # the next pass writes over them

    def verify(self) -> tuple[Callable[[], list], list[Callable[[], list] | None]]:
        """Reads that have begun: accepted drafts, committed tokens and drafts of each row, [B, 2 W]; and each group's
        log-probabilities [rows, W], where they are wanted."""
        self._graphs.run(self._passes.hold_verify, self._inputs)
        hidden_BWD, found = self._hidden_BWD(), []
        for group, chooser in zip(self._groups, self._choosers, strict=True):
            drafts_BJ = self._ids_BW[group, 1:]
            logits_BWV = self._passes.logits(hidden_BWD[group])
            num_accepted_B, committed_BW = chooser.verify(logits_BWV, drafts_BJ, self._widths_B[group])
            found.append(torch.cat([num_accepted_B[:, None], committed_BW, drafts_BJ], dim=1))
        logprobs = [chooser.logprobs_BW for chooser in self._choosers]
        return begin_read(torch.cat(found)), [None if own is None else begin_read(own) for own in logprobs]

    def report(self, outcomes: list[Outcome], read_logprobs: list[Callable[[], list] | None]) -> None:
        """Complete the outcomes with what rows want besides tokens."""
        for group, chooser, read in zip(self._groups, self._choosers, read_logprobs, strict=True):
            chooser.report(outcomes[group], None if read is None else read())

    def _hidden_BWD(self) -> Tensor:
        num_rows, num_columns = self._ids_BW.shape
        return self._inputs.hidden_RD.unflatten(0, self._inputs.ids_BW.shape)[:num_rows, :num_columns]

    def _redraft_of(self, group: slice) -> Redraft:
        def redraft(columns_B: Tensor) -> Tensor:
            assert self._draft_hidden_BJD is not None, "nothing was drafted"
            return self._passes.logits(at_column(self._draft_hidden_BJD[group], columns_B))

        return redraft


def group_rows(num_rows: int, row_logits: int) -> list[slice]:
    """Rows of so many logits each in groups that can be chosen within `SCORES_BYTES`."""
    size = max(1, SCORES_BYTES // (SCORE_COPIES * 4 * row_logits))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
