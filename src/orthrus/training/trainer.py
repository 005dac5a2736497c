"""The training loops of the bundled model: its base from nothing, then its diffusion view.

Both loops keep fp32 master copies of bf16 weights, use Muon for matrices and AdamW for the rest, and take their
learning rate from `schedule`. Only the parameters handed to `Optimisers` change: for the view, the `*_diff` tensors.

    B = rows, T = tokens of a row, A = anchors, K = block size, V = vocabulary
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthrus.config import OrthrusConfig
from orthrus.model.modeling import OrthrusLM
from orthrus.training.anchors import Blocks
from orthrus.training.forward import LayerStep, Passes, block_mask
from orthrus.training.loss import chunk_loss, chunked_view_loss, position_weights, survival
from orthrus.training.muon import Muon
from orthrus.training.ranks import agree, average, num_ranks, once, rank
from orthrus.training.recipe import BaseStage, Shape, Steps, ViewStage
from orthrus.training.rows import Rows

SAVE_SECONDS = 60.0
"""Time between two saves of a run."""


def schedule(progress: float, step: int, *, warmup_steps: int, cooldown_share: float) -> float:
    """Learning-rate factor: linear warm-up in steps, 1, then linear to 0 over the last `cooldown_share` of the run."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return warmup * min(1.0, max(0.0, (1.0 - progress) / cooldown_share))


class Clock:
    """How far a run is, from 0 to 1: the further of steps taken and seconds spent (step 0, which compiles, is free).

    Ranks share rank 0's clock, or they would not stop at the same step.
    """

    def __init__(self, num_steps: int, max_seconds: float | None, device: torch.device):
        self.num_steps, self.max_seconds, self._device = num_steps, max_seconds, device
        self.started = time.perf_counter()

    def progress(self, step: int) -> float:
        """The share of the run behind us before step `step`."""
        if step == 1:
            self.started = time.perf_counter()
        share = step / self.num_steps
        if step == 0 or self.max_seconds is None:
            return share
        return max(share, agree(self.seconds() / self.max_seconds, self._device))

    def seconds(self) -> float:
        """Seconds since step 1 began (since the start, before that)."""
        return time.perf_counter() - self.started


class Optimisers:
    """Muon for matrices and AdamW for embeddings and norms, over fp32 masters of the model's weights."""

    def __init__(self, named: dict[str, nn.Parameter], *, learning_rate: float, weight_decay: float):
        self.learning_rate = learning_rate
        self.weights = list(named.values())
        self.device = self.weights[0].device
        self.masters = [w.detach().float().clone() for w in self.weights]
        matrix = [w.dim() == 2 and "embed" not in name and "lm_head" not in name for name, w in named.items()]
        muon = [m for m, is_matrix in zip(self.masters, matrix, strict=True) if is_matrix]
        rest = [m for m, is_matrix in zip(self.masters, matrix, strict=True) if not is_matrix]
        self.muon = Muon(muon, lr=learning_rate, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, factor: float) -> Tensor:
        """One clipped update at `factor` times the learning rate, from the weights' gradients; their global norm."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        assert len(gradients) == len(self.weights), "a trained weight got no gradient"
        for weight, master, gradient in zip(self.weights, self.masters, gradients, strict=True):
            master.grad = gradient.float()
            weight.grad = None
        average([master.grad for master in self.masters if master.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimiser in (self.muon, self.adamw):
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate * factor
            optimiser.step()
        torch._foreach_copy_(self.weights, self.masters)
        return norm


def new_base(shape: Shape, *, seed: int, eos_token_id: int, mask_token_id: int) -> OrthrusLM:
    """A freshly initialised model of this shape in bf16, its view a copy of its AR projections."""
    torch.manual_seed(seed)
    config = OrthrusConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        block_size=shape.block_size,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    return OrthrusLM(config).to(torch.bfloat16)


def token_rows(
    tokens: np.ndarray, *, row_tokens: int, rows_per_pass: int, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """Endless batches of `row_tokens + 1` neighbouring tokens; every epoch cuts at a new offset. [B, T+1]."""
    stream = torch.from_numpy(tokens.astype(np.int32)).to(device)
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(row_tokens, (1,), generator=generator))
        num_rows = (len(stream) - offset - 1) // row_tokens
        assert num_rows >= rows_per_pass, "the corpus is smaller than one pass"
        starts = torch.randperm(num_rows, generator=generator) * row_tokens + offset
        for chunk in starts.split(rows_per_pass)[: num_rows // rows_per_pass]:
            index_BT = chunk.to(device)[:, None] + torch.arange(row_tokens + 1, device=device)
            yield stream[index_BT].long()


def next_token_nll(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each row's tokens from the logits before them, in nats. [B, T]."""
    flat = F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT.flatten(), reduction="none")
    return flat.view_as(ids_BT)


def base_parameters(model: OrthrusLM) -> dict[str, nn.Parameter]:
    """All parameters but the view's."""
    view = model.view_parameters()
    return {name: p for name, p in model.named_parameters() if name not in view}


@dataclass(kw_only=True)
class Saver:
    """Saves as training goes, so that a run that is cut off loses at most `SAVE_SECONDS`."""

    save: Callable[[], None]
    last: float = field(default_factory=time.perf_counter)

    def __call__(self) -> None:
        """Save if the last save is long enough ago (rank 0 alone: the others need not wait)."""
        if rank() == 0 and time.perf_counter() - self.last >= SAVE_SECONDS:
            self.save()
            self.last = time.perf_counter()


@dataclass(kw_only=True)
class Log:
    """One JSON line per report, to a file and to the terminal."""

    stage: str
    path: Path
    every: int = 50

    def __call__(self, **values: Any) -> None:
        """Append one record (rank 0)."""
        if rank() != 0:
            return
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"stage": self.stage, **rounded})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


MicroBatch = Callable[[], tuple[Tensor, Tensor | None]]
"""The next micro-batch's loss, and its survival (`loss.survival`) where a view is trained."""


def run_steps(
    model: nn.Module, trained: dict[str, nn.Parameter], micro_batch: MicroBatch, stage: Steps, *, log: Log, saver: Saver
) -> int:
    """Train these parameters and no others; returns the number of steps taken. Ranks share the rows of a step.

    What is logged of loss and survival is the mean over rank 0's micro-batches since the last report.
    """
    optimisers = Optimisers(thaw(model, trained), learning_rate=stage.learning_rate, weight_decay=stage.weight_decay)
    num_passes = share_of_rank(stage.rows_per_step, rows_per_pass=stage.rows_per_pass)
    clock = Clock(stage.num_steps, stage.max_seconds, optimisers.device)
    step, losses, survivals = 0, [], []
    while (progress := clock.progress(step)) < 1:
        for _ in range(num_passes):
            loss, survival_J = micro_batch()
            (loss / num_passes).backward()
            losses.append(loss.detach())
            survivals += [] if survival_J is None else [survival_J]
        factor = schedule(progress, step, warmup_steps=stage.warmup_steps, cooldown_share=stage.cooldown_share)
        norm = optimisers.step(factor)
        if step % log.every == 0:
            drafts = describe(torch.stack(survivals).mean(dim=0)) if survivals else {}
            loss = torch.stack(losses).mean().item()
            log(step=step, seconds=clock.seconds(), loss=loss, norm=norm.item(), factor=factor, **drafts)
            losses, survivals = [], []
        step += 1
        saver()
    once(saver.save)
    return step


def describe(survival_J: Tensor) -> dict[str, Any]:
    """A few entries of a survival curve, and N on rows that the base wrote greedily."""
    return {"survival": [round(a, 3) for a in survival_J.tolist()[::5]], "n": 1 + survival_J.sum().item()}


def train_base(model: OrthrusLM, tokens: np.ndarray, stage: BaseStage, *, seed: int, log: Log, saver: Saver) -> int:
    """Pretrain the base on a token stream; returns the number of steps taken."""
    device = next(model.parameters()).device
    passes = Passes(model, compiled=device.type == "cuda")
    nll_of = passes.compile(next_token_nll)
    rows = token_rows(
        tokens, row_tokens=stage.row_tokens, rows_per_pass=stage.rows_per_pass, seed=seed + rank(), device=device
    )

    def micro_batch() -> tuple[Tensor, None]:
        ids_BT = next(rows)
        logits_BTV = model.logits(passes.ar(ids_BT[:, :-1])[0])
        return nll_of(logits_BTV, ids_BT[:, 1:]).mean(), None

    return run_steps(model, base_parameters(model), micro_batch, stage, log=log, saver=saver)


def thaw(model: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Let these parameters of the model be trained and no others; they are returned."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return {name: parameter.requires_grad_(True) for name, parameter in trained.items()}


def share_of_rank(rows_per_step: int, *, rows_per_pass: int) -> int:
    """Micro-batches that each rank does for a step."""
    passes, rest = divmod(rows_per_step, rows_per_pass * num_ranks())
    if rest or not passes:
        raise ValueError(
            f"rows_per_step {rows_per_step} must be a multiple of the {rows_per_pass} rows of a micro-batch x "
            f"{num_ranks()} ranks"
        )
    return passes


@torch.no_grad()
def held_out_loss(model: OrthrusLM, tokens: np.ndarray, *, row_tokens: int = 1024) -> float:
    """Mean cross-entropy in nats per token over whole rows of a held-out stream."""
    device = next(model.parameters()).device
    passes = Passes(model, compiled=False)
    num_rows = (len(tokens) - 1) // row_tokens
    losses = []
    for i in range(num_rows):
        row = torch.from_numpy(tokens[i * row_tokens : (i + 1) * row_tokens + 1].astype(np.int64)).to(device)[None]
        losses.append(next_token_nll(model.logits(passes.ar(row[:, :-1])[0]), row[:, 1:]).mean().item())
    return float(np.mean(losses))


class ViewTask:
    """Loss of one micro-batch of view training: a frozen AR pass, then the block pass."""

    def __init__(self, model: OrthrusLM, stage: Any, *, steps: Iterable[LayerStep] | None = None):
        device, largest = next(model.parameters()).device, model.config.block_size
        if wrong := [width for width, _ in stage.blocks if not 2 <= width <= largest]:
            raise ValueError(f"blocks: width {wrong[0]} is not in 2 .. {largest}, the model's block size")
        self.model, self.stage = model, stage
        self.blocks = Blocks.of(stage.blocks, device)
        self._passes = Passes(model, compiled=device.type == "cuda", steps=steps)
        self._one_chunk = self._passes.compile(chunk_loss)

    def __call__(self, rows: Rows, anchors_BA: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and survival of the widest blocks (`loss.survival`). (), [K-1]."""
        loss, _, survival_J = self.weighted(rows, anchors_BA)
        return loss, survival_J

    def weighted(self, rows: Rows, anchors_BA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the weight of all drafts, over which the loss is the mean, in between. (), (), [K-1]."""
        blocks, stage = self.blocks, self.stage
        hidden_BTD, student_BQD = self.passes(rows, anchors_BA)
        loss, agrees_BQ = chunked_view_loss(
            stage.objective, blocks, rows, anchors_BA, hidden_BTD, student_BQD, self.model.lm_head.weight,
            one_chunk=self._one_chunk,
        )  # fmt: skip
        supervised_BQ = blocks.supervised(rows.reply_BT, anchors_BA)
        weight = position_weights(stage.objective, blocks, supervised_BQ, agrees_BQ).sum()
        return loss, weight, survival(blocks, supervised_BQ, agrees_BQ)

    def passes(self, rows: Rows, anchors_BA: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states of the clean rows in the AR view, and of all blocks. [B, T, D], [B, Q, D]."""
        document_BT = rows.document_BT if rows.isolated else None
        with torch.no_grad():
            hidden_BTD, clean = self._passes.ar(rows.ids_BT, rows.positions_BT, document_BT)
        mask = block_mask(self.blocks, anchors_BA, num_clean=rows.ids_BT.shape[1], document_BT=document_BT)
        inputs = self.blocks.inputs(rows, anchors_BA, self.model.config.mask_token_id)
        return hidden_BTD, self._passes.blocks(inputs, clean, mask)


def train_view(model: OrthrusLM, rows: Iterable[Rows], stage: ViewStage, *, seed: int, log: Log, saver: Saver) -> int:
    """Train the diffusion view; returns the number of steps taken. `rows` yields this rank's micro-batches for ever."""
    device = next(model.parameters()).device
    task, batches = ViewTask(model, stage), iter(rows)
    generator = torch.Generator(device).manual_seed(seed + rank())

    def micro_batch() -> tuple[Tensor, Tensor]:
        batch = next(batches)
        return task(batch, task.blocks.sample(batch.anchorable_BT, generator))

    return run_steps(model, model.view_parameters(), micro_batch, stage, log=log, saver=saver)
