"""`orthrus train` that is hit by a signal, or by numbers that are not finite, at a given step: run as a program.

interruption.py PLAN: a JSON list of runs, each {"arguments": [...], "step": N, "signal": "SIGKILL", "rank": R} or
{"arguments": [...], "step": N, "nan_rank": R}. Without a step the run is left alone. Each ends in a line "ended CODE".
"""

import json
import os
import signal
import sys
from typing import Any

from orthrus.cli.app import app
from orthrus.training import ranks, view_trainer
from orthrus.training.ranks import rank


def interrupt(run: dict[str, Any]) -> None:
    """Arrange what happens at the run's step."""
    compute = view_trainer.OrthrusTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        if self.state.global_step == run.get("step") and self._micro_batch == 0:
            if "signal" in run and run.get("rank", rank()) == rank():
                os.kill(os.getpid(), signal.Signals[run["signal"]])
            if run.get("nan_rank") == rank():
                return loss * float("nan")
        return loss

    view_trainer.OrthrusTrainer.compute_loss = compute_loss


def main(plan: list[dict[str, Any]]) -> None:
    """One run after the other in this process."""
    ranks.leave_ranks = lambda: None  # torchrun's meeting place serves one group of ranks in a process's life
    plain = view_trainer.OrthrusTrainer.compute_loss
    for run in plan:
        view_trainer.OrthrusTrainer.compute_loss = plain
        interrupt(run)
        code = 0
        try:
            app(["train", *run["arguments"]], standalone_mode=False)
        except SystemExit as done:
            code = done.code
        print(f"ended {code}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
