"""`transformers.Trainer` for a view: its loop, schedule, logging and multi-process running; what it cannot do is here.

Replaced, and why (docs/architecture.md has more):

* the order of rows (`RowOrder`): a function of seed and place, the same however a run is cut into pieces;
* wrapping for FSDP2 (`_wrap_model`): accelerate's shards modules that training never calls;
* checkpoints (`_save_checkpoint` and the loads): Trainer's hold the whole model, are written in place, and are pickles;
* the mean of a step: over all drafts of all its rows, where Trainer takes the mean of micro-batches' means;
* a step whose loss or gradient is not finite: all ranks agree to leave it out, where Trainer would apply it.

    J = offsets of a draft in a block
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from orthrus.datagen.durable import write_whole
from orthrus.datagen.stop import Stop
from orthrus.training.checkpoints import (
    OPTIMIZER,
    RNG,
    RUN,
    SCHEDULER,
    TRAINER_STATE,
    random_states,
    read_view,
    set_random_states,
    write_checkpoint,
)
from orthrus.training.loss import weighted_mean
from orthrus.training.ranks import num_ranks, once, rank
from orthrus.training.sharding import Sharded, fill, shard, whole
from orthrus.training.task import ViewTraining, draw_seed
from orthrus.training.view_recipe import TrainSettings, passes_per_step

STATES = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps for each parameter."""


class RowOrder:
    """Which rows each micro-batch of this rank holds: every epoch a new permutation of all rows, shared out by rank.

    An epoch's rows that fill no whole step are left out; all ranks' micro-batches of a step are neighbours in the
    permutation.
    """

    def __init__(self, num_rows: int, settings: TrainSettings, *, seed: int, num_steps: int):
        self.num_rows, self.settings, self.seed, self.num_steps = num_rows, settings, seed, num_steps
        self.passes = passes_per_step(settings, num_ranks())
        self.steps_per_epoch = num_rows // settings.rows_per_step
        if not self.steps_per_epoch:
            raise ValueError(
                f"the data has {num_rows} training rows, fewer than the {settings.rows_per_step} of one step "
                "(train.rows_per_step)"
            )

    def __len__(self) -> int:
        return self.num_steps * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        rows, ranks, settings = self.settings.rows_per_pass, num_ranks(), self.settings
        order = self._order(0)
        for step in range(self.num_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0:
                order = self._order(epoch)
            for micro_batch in range(self.passes):
                start = place * settings.rows_per_step + (micro_batch * ranks + rank()) * rows
                yield order[start : start + rows].tolist()

    def _order(self, epoch: int) -> Tensor:
        seed = draw_seed(self.seed, step=-1 - epoch, row=0)
        return torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(seed))


def num_steps_of(train: TrainSettings, num_rows: int) -> int:
    """Optimiser steps of a run over so many rows."""
    if train.num_steps is not None:
        return train.num_steps
    assert train.num_epochs is not None
    return max(1, int(train.num_epochs * (num_rows // train.rows_per_step)))


def training_arguments(
    train: TrainSettings, out: Path, *, seed: int, num_steps: int, device: torch.device
) -> TrainingArguments:
    """Trainer's own arguments: those of the recipe's fields that it has, everything that it would do itself turned off.

    Reading them makes Trainer join the ranks that torchrun started.
    """
    cuda = device.type == "cuda"
    schedule = {"constant": "constant_with_warmup"}.get(train.schedule, train.schedule)
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=num_steps,
        per_device_train_batch_size=train.rows_per_pass,
        gradient_accumulation_steps=passes_per_step(train, world_size()),
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=round(train.warmup_share * num_steps),
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        weight_decay=train.weight_decay,
        max_grad_norm=0.0,  # `_get_grad_norm` clips, once the gradient is a mean
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        seed=seed,
        logging_steps=train.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=train.save_steps,
        report_to=list(train.report_to) or "none",
        run_name=out.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
    )
    assert args.device.type == device.type
    args._n_gpu = 1  # one process uses one GPU, whatever the machine has: never DataParallel
    return args


def world_size() -> int:
    """Processes of the run as torchrun says, before they are joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class OrthrusTrainer(Trainer):
    """Trains the `*_diff` tensors of one model."""

    def __init__(
        self,
        training: ViewTraining,
        args: TrainingArguments,
        *,
        settings: TrainSettings,
        rows: Dataset,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        run_facts: dict[str, Any],
        stop: Stop | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        """`run_facts` goes into every checkpoint's run.json; `stop` is asked after every step."""
        self.settings, self.run_facts = settings, run_facts
        self.stop = Stop("the step in work") if stop is None else stop
        self.training = training
        self.num_skipped = self.num_skipped_in_a_row = 0
        self.was_stopped = False
        self.rows_n: float | None = None
        """N of greedy decoding from random anchors of training rows, in training's own mask, as last logged."""
        self._num_drafts = settings.rows_per_pass * int((~training.task.blocks.is_last_Q).sum())
        self._step_sums = torch.zeros(2, device=args.device)
        """Of this rank's drafts in this step: weighted losses, weights."""
        self._window_sums = torch.zeros(2, device=args.device)
        """Of all ranks' drafts since the last report."""
        self._survival: list[Tensor] = []
        self._at_step, self._micro_batch = -1, 0
        if settings.sharding == "fsdp2":
            shard(training, args.device)
        super().__init__(
            model=training, args=args, train_dataset=rows, data_collator=collate,
            callbacks=[_Stop(self), LogFile(Path(args.output_dir) / "log.jsonl"), *callbacks],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)

    # --- data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches of the whole run; Trainer skips those that a resumed run has behind it."""
        rows: Any = self.train_dataset
        order: Any = RowOrder(len(rows), self.settings, seed=self.args.seed, num_steps=self.args.max_steps)
        return DataLoader(
            rows, batch_sampler=order, collate_fn=self.data_collator, num_workers=self.settings.data_workers,
            pin_memory=self.args.device.type == "cuda",
        )  # fmt: skip

    # --- one step ------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch's share of its step's loss, its anchors drawn for its place in the run.

        The loss times its weight, so that micro-batches add up to a sum over drafts, of which `_get_grad_norm` makes
        the mean. Dividing by the number of drafts, weighted or not, keeps it at a mean's size until then.
        """
        step, num_rows = self.state.global_step, len(inputs["ids"])
        self._at_step, self._micro_batch = step, (self._micro_batch + 1 if self._at_step == step else 0)
        first = (self._micro_batch * num_ranks() + rank()) * num_rows
        seeds = [draw_seed(self.args.seed, step=step, row=row) for row in range(first, first + num_rows)]
        loss, weight, survival_J = model(inputs["ids"], inputs["document"], inputs["reply"], seeds)
        self._step_sums += torch.stack([loss.detach() * weight, weight])
        self._survival.append(survival_J)
        return loss * (weight / self._num_drafts)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in Trainer; a loss that is not finite does not enter the log."""
        return super().training_step(*args, **kwargs).nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the step's gradient, which is made the mean over all its drafts and clipped.

        One exchange a step: the sums that the mean is made of; a rank that has met a loss or gradient that is not
        finite has everybody drop the gradient (AdamW leaves parameters without one alone); and a rank that was asked to
        stop has everybody stop.
        """
        gradients = [parameter.grad for parameter in self._parameters().values() if parameter.grad is not None]
        norm: Any = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_bad = ~(norm + self._step_sums.sum()).isfinite()
        facts = torch.cat([self._step_sums, torch.stack([is_bad, torch.full_like(is_bad, self.stop.is_asked())])])
        if num_ranks() > 1:
            dist.all_reduce(facts)
        self._step_sums.zero_()
        is_bad, self.was_stopped = (flag > 0 for flag in facts[2:].tolist())
        if is_bad:
            self._skip_step()
            return None
        self.num_skipped_in_a_row = 0
        self._window_sums += facts[:2]
        # Trainer and the ranks' exchange have made means of sums: by micro-batches, by ranks.
        num_means = self._num_drafts * self.args.gradient_accumulation_steps * num_ranks()
        scale = weighted_mean(torch.full_like(norm, num_means), facts[1])
        norm = norm * scale
        clip = (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], scale * clip)
        return norm

    def _skip_step(self) -> None:
        for parameter in self.training.parameters():
            parameter.grad = None
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        step = self.state.global_step + 1
        if self.num_skipped_in_a_row >= self.settings.max_skipped_steps:
            raise RuntimeError(
                f"{self.num_skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to step "
                f"{step}: the run is broken; a lower train.learning_rate, or looking at the data, may help"
            )
        say(f"step {step} skipped on all ranks: its loss or gradient is not finite ({self.num_skipped} so far)")

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """As in Trainer, with what the drafts of rank 0's rows would have been worth (`loss.survival`)."""
        if "loss" in logs:
            survival_J = torch.stack(self._survival).float().mean(dim=0)
            logs["rows_n"] = self.rows_n = 1 + survival_J.sum().item()
            logs["skipped_steps"] = self.num_skipped
            self._survival = []
            logs["loss"] = weighted_mean(*self._window_sums).item()
            self._window_sums.zero_()
        logs.pop("total_flos", None)  # Trainer counts none of these passes; --dry-run computes them
        logs.pop("train_loss", None)  # a sum of `compute_loss`' shares, which is no mean
        super().log(logs, start_time)

    # --- several processes ---------------------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """A sharded model is wrapped already; anything else goes Trainer's way (DDP where there are ranks)."""
        if self.settings.sharding != "fsdp2":
            return super()._wrap_model(model, training, dataloader)
        return model if isinstance(model, Sharded) else Sharded(model)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self.training.lm.view_parameters()

    def view_tensors(self) -> dict[str, Tensor]:
        """The view in fp32 on rank 0, nothing on the others; all ranks must ask."""
        return self._whole(self._parameters())

    def _whole(self, tensors: dict[str, Any]) -> dict[str, Tensor]:
        """Full values on rank 0, one tensor gathered at a time."""
        found = {}
        for name, tensor in tensors.items():
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if rank() == 0:
                found[name] = whole(value).clone()
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write OUT/checkpoint-STEP (checkpoints.py)."""
        self.store_flos()
        optimizer: Any = self.optimizer
        states = {
            f"{name}.{key}": optimizer.state[parameter][key]
            for name, parameter in self._parameters().items()
            for key in STATES
            if key in optimizer.state[parameter]
        }
        tensors = {"view": self.view_tensors(), OPTIMIZER: self._whole(states), RNG: self._random_states()}
        once(lambda: self._write(tensors))

    def _write(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        scheduler: Any = self.lr_scheduler
        documents = {
            SCHEDULER: scheduler.state_dict(),
            TRAINER_STATE: json.loads(json.dumps(self._trainer_state())),
            RUN: self.run_facts | {"step": self.state.global_step, "num_skipped": self.num_skipped},
        }
        write_checkpoint(
            Path(self.args.output_dir), self.state.global_step, self.training.lm,
            tensors=tensors, documents=documents, keep=self.settings.keep_checkpoints,
        )  # fmt: skip

    def _trainer_state(self) -> dict[str, Any]:
        """Trainer's state without those of callbacks: none here keeps any."""
        return dataclasses.asdict(self.state) | {"stateful_callbacks": {}}

    def _random_states(self) -> dict[str, Tensor]:
        """Every rank's random states, named R.NAME; complete on every rank."""
        found = {}
        for name, state in random_states(self.args.device).items():
            states = [torch.empty_like(state, device=self.args.device) for _ in range(num_ranks())]
            if num_ranks() > 1:
                dist.all_gather(states, state.to(self.args.device))
            else:
                states = [state]
            found |= {f"{number}.{name}": one.cpu() for number, one in enumerate(states)}
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = read_view(Path(resume_from_checkpoint))
        for name, parameter in self._parameters().items():
            fill(parameter, tensors[name])
        self.num_skipped = json.loads((Path(resume_from_checkpoint) / RUN).read_text())["num_skipped"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stored = load_file(Path(checkpoint) / OPTIMIZER)
        optimizer: Any = self.optimizer
        for name, parameter in self._parameters().items():
            if f"{name}.step" not in stored:  # no step was taken yet that counted
                continue
            state = optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter)
                fill(state[key], stored[f"{name}.{key}"])
            # A fused optimiser keeps its counter on the device.
            fused = optimizer.param_groups[0].get("fused")
            state["step"] = stored[f"{name}.step"].to(parameter.device if fused else "cpu")
        scheduler: Any = self.lr_scheduler
        schedule = json.loads((Path(checkpoint) / SCHEDULER).read_text())
        scheduler.load_state_dict(schedule)
        for group, learning_rate in zip(optimizer.param_groups, schedule["_last_lr"], strict=True):
            group["lr"] = learning_rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        mine = f"{rank()}."
        stored = load_file(Path(checkpoint) / RNG)
        states = {name.removeprefix(mine): state for name, state in stored.items() if name.startswith(mine)}
        set_random_states(states, self.args.device)


class _Stop(TrainerCallback):
    """Saves and ends the run after a step in which the ranks agreed to stop."""

    def __init__(self, trainer: OrthrusTrainer):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """How often is saved and logged is this command's to say; Trainer would go by the resumed state."""
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """The last step of a run is saved as well."""
        if self._trainer.was_stopped or state.global_step >= state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


class LogFile(TrainerCallback):
    """One JSON line per report, to a file and to the terminal (rank 0)."""

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back what an earlier process reported and did not save: those steps come again."""
        if state.is_world_process_zero and self._path.exists():
            lines = self._path.read_bytes().splitlines(keepends=True) if state.global_step else []
            write_whole(self._path, lambda file: file.writelines(up_to_step(lines, state.global_step)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append one record."""
        if not state.is_world_process_zero or not logs:
            return
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in logs.items()}
        line = json.dumps({"step": state.global_step, **rounded})
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def up_to_step(lines: Iterable[bytes], step: int) -> Iterator[bytes]:
    """The lines of a log up to a step, without those that a kill cut short."""
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                yield line


def say(message: str) -> None:
    """A line for the user, from rank 0."""
    if rank() == 0:
        print(message, flush=True)
