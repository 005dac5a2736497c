"""Real greedy decoding of held-out prompts while a view is trained: the loss falls for many reasons, N rises for one.

A drafter whose mask, positions or template differ from those of decoding learns well and drafts nothing, and no text is
ever wrong: N is the only sign (method.md section 3). So the project's own decoding loop runs on the weights in
training, every so many steps, and says plainly when N stays near 1.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import Stopping, eos_token_ids
from orthrus.training.ranks import num_ranks, rank
from orthrus.training.rows import PADDING, Rows
from orthrus.training.selfcheck import SAME, agreement
from orthrus.training.sharding import gathered
from orthrus.training.view_recipe import EvaluationSettings

TEXT_PROMPT_TOKENS = 48
"""Tokens of a prompt from a document that is all reply (plain text)."""

USUAL_MISTAKES = (
    "The usual mistakes: the training mask (a block sees the clean row strictly before its anchor and all of itself, "
    "nothing else), the chat template (training rows and prompts must be written by the same one), the positions (a "
    "block's continue those of its document). `--inspect 0` shows a training row."
)


def decode_all(
    model: Any, prompts: Sequence[Sequence[int]], *, block_size: int, max_new_tokens: int, eos: frozenset[int]
) -> DecodingStats:
    """What greedy drafting of these prompts took, all together."""
    # Not exact: near-ties between a pass of one row and one of many do not matter to how well a view drafts.
    decoder = Decoder(PortableBackend(model, exact=False), block_size=block_size)
    stats = DecodingStats(block_size=decoder.block_size)
    for prompt in prompts:
        stopping = Stopping(max_new_tokens=max_new_tokens, eos_token_ids=eos)
        record = decoder.admit(Request(prompt_ids=prompt, stopping=stopping))
        while decoder.active:
            decoder.step()
        stats = stats.merge(decoder.stats(record.row))
        decoder.release(record.row)
    return stats


COUNTS = ("num_prefills", "num_cycles", "num_plain_steps", "num_drafted", "num_accepted", "num_tokens")


def all_ranks(stats: DecodingStats, device: torch.device) -> DecodingStats:
    """The counters of all ranks together."""
    if num_ranks() == 1:
        return stats
    counts = [*(getattr(stats, name) for name in COUNTS), *stats.acceptance_histogram, *stats.drafted_per_position]
    summed = torch.tensor(counts, dtype=torch.long, device=device)
    dist.all_reduce(summed)
    values = summed.tolist()
    together = DecodingStats(block_size=stats.block_size)
    for name in COUNTS:
        setattr(together, name, values.pop(0))
    together.acceptance_histogram = values[: stats.block_size]
    together.drafted_per_position = values[stats.block_size :]
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
        with gathered(training) if self.trainer.settings.sharding == "fsdp2" else nullcontext():
            stats = decode_all(
                model, mine, block_size=max(width for width, _ in training.task.blocks.groups),
                max_new_tokens=self.settings.max_new_tokens, eos=eos_token_ids(model, self._tokenizer),
            )  # fmt: skip
        stats = all_ranks(stats, device)
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


# --- prompts -----------------------------------------------------------------------------------------------------


def beginnings(items: Sequence[dict[str, Tensor]], num_prompts: int) -> list[list[int]]:
    """Prompts from packed rows: the beginnings of documents up to their first reply, one of each row, then the next.

    Of a document that is all reply, the first `TEXT_PROMPT_TOKENS` tokens. Raises `ValueError` where no row has one.
    """
    by_row = [list(beginnings_of(item)) for item in items]
    rounds = max(map(len, by_row), default=0)
    prompts = [row[i] for i in range(rounds) for row in by_row if i < len(row)]
    if not prompts:
        raise ValueError("evaluation.held_out_rows: no document with a reply begins in the held-out rows")
    return prompts[:num_prompts]


def beginnings_of(item: dict[str, Tensor]) -> Iterator[list[int]]:
    """The prompts of one row. Its first document may be the rest of one that began in the row before: it comes last."""
    documents = [number for number in item["document"].unique().tolist() if number != PADDING]
    for number in [*documents[1:], *documents[:1]]:
        places = (item["document"] == number).nonzero()[:, 0]
        ids, replies = item["ids"][places].tolist(), item["reply"][places] > 0
        if not bool(replies.any()):
            continue
        first = int(replies.int().argmax())
        length = first if first > 1 else min(TEXT_PROMPT_TOKENS, len(ids) // 2)
        if length:
            yield ids[:length]


def prompts_of_file(
    path: str, tokenizer: PreTrainedTokenizerBase, num_prompts: int, template_options: dict[str, Any]
) -> list[list[int]]:
    """Token ids of a JSON Lines file's prompts: `prompt`, plain text, or `messages`, a conversation before a reply."""
    prompts: list[list[int]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"evaluation.prompts: {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip() and len(prompts) < num_prompts:
            where = f"evaluation.prompts: {path}, line {number}"
            prompts.append(prompt_of(line, tokenizer, template_options, where=where))
            if not prompts[-1]:
                raise ValueError(f"{where}: the prompt is empty")
    if not prompts:
        raise ValueError(f"evaluation.prompts: {path} holds no prompt")
    return prompts


def prompt_of(
    line: str, tokenizer: PreTrainedTokenizerBase, template_options: dict[str, Any], *, where: str
) -> list[int]:
    """Token ids of one line."""
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError(f"{where}: not JSON") from None
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return tokenizer(record["prompt"])["input_ids"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if not tokenizer.chat_template:
            raise ValueError(f"{where}: `messages`, but the base has no chat template")
        return tokenizer.apply_chat_template(
            record["messages"], add_generation_prompt=True, tokenize=True, return_dict=False, **template_options
        )
    raise ValueError(f"{where}: needs `prompt` (text) or `messages` (a list)")
