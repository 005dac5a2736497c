"""Real greedy decoding of held-out prompts while a view is trained: the loss falls for many reasons, N rises for one.

A drafter whose mask, positions or template differ from those of decoding learns well and drafts nothing, and no text is
ever wrong: N is the only sign (method.md section 3). So the project's own decoding loop runs on the weights in
training, every so many steps, and says plainly when N stays near 1.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orthrus.decoding.batch import draft_greedily
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import eos_token_ids
from orthrus.training.ranks import num_ranks, rank
from orthrus.training.rows import Rows
from orthrus.training.selfcheck import SAME, agreement
from orthrus.training.sharding import gathered
from orthrus.training.view_recipe import EvaluationSettings

USUAL_MISTAKES = (
    "The usual mistakes: the training mask (a block sees the clean row strictly before its anchor and all of itself, "
    "nothing else), the chat template (training rows and prompts must be written by the same one), the positions (a "
    "block's continue those of its document). `--inspect 0` shows a training row."
)
COUNTS = ("num_prefills", "num_cycles", "num_plain_steps", "num_drafted", "num_accepted", "num_tokens")


def all_ranks(stats: DecodingStats, device: torch.device) -> DecodingStats:
    """The counters of all ranks together."""
    if num_ranks() == 1:
        return stats
    counts = [getattr(stats, name) for name in COUNTS]
    counts += [*stats.acceptance_histogram, *stats.width_histogram, *stats.drafted_per_position]
    summed = torch.tensor(counts, dtype=torch.long, device=device)
    dist.all_reduce(summed)
    values = summed.tolist()
    together = DecodingStats(block_size=stats.block_size)
    for name in COUNTS:
        setattr(together, name, values.pop(0))
    together.acceptance_histogram = values[: stats.block_size]
    together.width_histogram = values[stats.block_size : 2 * stats.block_size]
    together.drafted_per_position = values[2 * stats.block_size :]
    return together


class HeldOutPrompts(TrainerCallback):
    """Decodes the prompts before the first step, every so many steps and after the last, and logs what drafting did.

    Blocks are as wide as the widest in training: a view that has not seen wider ones does not draft them.
    """

    trainer: Any = None
    """Set once there is one."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], settings: EvaluationSettings, *, tokenizer: PreTrainedTokenizerBase
    ):
        self.prompts, self.settings, self._tokenizer = list(prompts), settings, tokenizer
        self.n: list[tuple[int, float]] = []
        """(step, N) of every look."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What the untrained view drafts: where N starts. A resumed run has looked already."""
        self.n = [(record["step"], record["eval_n"]) for record in state.log_history if "eval_n" in record]
        if state.global_step == 0:
            self.check_block()
            self.look(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look where a look is due."""
        if state.global_step % self.settings.every == 0 or state.global_step >= state.max_steps:
            self.look(state.global_step)

    def check_block(self) -> None:
        """Say so when a block of a training row is not computed as decoding computes it (selfcheck.py)."""
        trainer = self.trainer
        if trainer.settings.sharding == "fsdp2":
            return  # a layer's weights are gathered for a step of the whole module only
        training, device = trainer.training, trainer.args.device
        items = [trainer.train_dataset[i] for i in range(trainer.settings.rows_per_pass)]
        rows = Rows.from_batch(trainer.data_collator(items), isolated=training.isolated).to(device)
        anchors_BA = training.task.blocks.sample(rows.anchorable_BT, torch.Generator(device).manual_seed(0))
        found = agreement(training.task, rows, anchors_BA)
        if found < SAME and rank() == 0:
            print(
                f"warning: a block of a training row is not what it is in decoding (cosine {found:.3f}, should be 1): "
                f"the view would learn what it cannot use. {USUAL_MISTAKES}",
                flush=True,
            )

    @torch.no_grad()
    def look(self, step: int) -> DecodingStats:
        """Decode, log, and warn where N says that something is wrong."""
        training = self.trainer.training
        model, device = training.lm, self.trainer.args.device
        mine = self.prompts[rank() :: num_ranks()]
        block_size = max(width for width, _ in training.task.blocks.groups)
        with gathered(training) if self.trainer.settings.sharding == "fsdp2" else nullcontext():
            found = draft_greedily(
                model, mine, block_size=block_size, max_new_tokens=self.settings.max_new_tokens,
                eos=eos_token_ids(model, self._tokenizer),
            )  # fmt: skip
        stats = all_ranks(reduce(DecodingStats.merge, found, DecodingStats(block_size=block_size)), device)
        self.n.append((step, stats.tokens_per_cycle))
        control = self.trainer.control
        is_due = control.should_log  # Trainer takes a report for the one that is due, and would leave that out
        self.trainer.log({"eval_n": stats.tokens_per_cycle, "eval_tpf": stats.tokens_per_forward, **kept(stats)})
        control.should_log = is_due
        is_low = stats.tokens_per_cycle < self.settings.warn_below
        has_not_risen = step > self.n[0][0] and stats.tokens_per_cycle <= self.n[0][1]
        if step >= self.settings.warn_after and (is_low or has_not_risen):
            self.warn(step, stats.tokens_per_cycle)
        return stats

    def warn(self, step: int, n: float) -> None:
        """Say what N near 1, or no higher than before training, means, with what the training rows say beside it."""
        rows_n, start = self.trainer.rows_n, self.n[0][1]
        finding = "nothing is drafted" if n < self.settings.warn_below else f"no more than before training, {start:.2f}"
        beside = "" if rows_n is None else f"; on its training rows it would be {rows_n:.2f}"
        if rows_n is not None and rows_n > max(1.5, 1.5 * n):
            beside += ", so decoding sees something else than training does"
        if rank() == 0:
            print(f"warning: after {step} steps N is {n:.2f}{beside}: {finding}. {USUAL_MISTAKES}", flush=True)


def kept(stats: DecodingStats) -> dict[str, float]:
    """eval_kept_J: share of the cycles with a J-th draft that kept it, J counted from 1 up to the last ever kept."""
    pairs = zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
    return {f"eval_kept_{j}": num / drafted for j, (num, drafted) in enumerate(pairs, start=1) if num}
