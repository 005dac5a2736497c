"""`orthrus train` that is hit by a signal, or by numbers that are not finite, at a given step: run as a program.

interruption.py PLAN BASE: a JSON list of runs, each {"arguments": [...], "ranks": N} and perhaps what happens,
"signal": "SIGKILL" or "nan": true, then also at which "step" and, unless it happens to all, to which "rank". The ranks
are processes of their own, forked from this one so that importing torch is paid for once; their environment is what
torchrun gives. A line of JSON for each run: the ranks' exit codes (minus the signal that ended one), rank 0's output.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
from typing import Any

from orthrus.cli.app import app
from orthrus.model.checkpoint import load_model
from orthrus.training import view_trainer


def interrupt(run: dict[str, Any], rank: int) -> None:
    """Arrange what happens to this rank at the run's step."""
    compute = view_trainer.OrthrusTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        if self.state.global_step != run["step"] or self._micro_batch or run.get("rank", rank) != rank:
            return loss
        if "signal" in run:
            os.kill(os.getpid(), signal.Signals[run["signal"]])
        return loss * float("nan") if run.get("nan") else loss

    view_trainer.OrthrusTrainer.compute_loss = compute_loss


def be_rank(run: dict[str, Any], rank: int, port: int, output: str) -> None:
    """One rank of one run, to its end."""
    with open(f"{output}-{rank}", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if run["ranks"] > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["ranks"], "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "localhost"}
    if "step" in run:
        interrupt(run, rank)
    code = 1
    try:
        app(["train", *run["arguments"]], standalone_mode=False)
        code = 0
    except SystemExit as done:
        code = int(done.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(plan: list[dict[str, Any]], base: str) -> None:
    """One run after the other. All are of this base."""
    for name in ("orthrus.training.view_run", "accelerate", "datasets", "torch._dynamo"):
        importlib.import_module(name)
    load_model(base, start_view=True, block_size=8, mask_token_id=258)  # compiles a thousand patterns the first time
    gc.freeze()
    for run in plan:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        output = tempfile.mktemp()
        children = []
        for rank in range(run["ranks"]):
            if (child := os.fork()) == 0:
                be_rank(run, rank, port, output)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        with open(f"{output}-0") as file:
            print(json.dumps({"codes": codes, "output": file.read()}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
