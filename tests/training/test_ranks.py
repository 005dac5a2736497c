"""Several processes of one run: each takes its rows, all take the same step."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from orthrus.training.ranks import agree, average, from_all, num_ranks, once, rank

PROGRAM = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from orthrus.config import OrthrusConfig
from orthrus.training.ranks import agree, average, join_ranks, leave_ranks, num_ranks, once, rank
from orthrus.training.recipe import Steps
from orthrus.training.trainer import Log, Saver, run_steps

out = Path(sys.argv[1])
device = join_ranks(torch.device("cpu"))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
rows = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))
share = iter(rows.chunk(num_ranks(), dim=1)[rank()])

def micro_batch():
    return model(next(share)).square().mean(), None

stage = Steps(rows_per_step=8, rows_per_pass=8 // num_ranks(), num_steps=3, warmup_steps=1, learning_rate=0.1)
steps = run_steps(model, dict(model.named_parameters()), micro_batch, stage,
                  log=Log(stage="test", path=out / "log.jsonl"), saver=Saver(save=lambda: (out / "saved").touch()))
assert steps == 3 and (out / "saved").is_file()
assert agree(10.0 + rank(), device) == 10.0, "rank 0 decides"
once(lambda: (out / "once").write_text(str(rank())))
assert (out / "once").read_text() == "0", "others must wait for rank 0"
save_file(model.state_dict(), out / f"{num_ranks()}-{rank()}.safetensors")
leave_ranks()
"""

WAITING = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from orthrus.training import ranks
from orthrus.training.ranks import from_all, leave_ranks, once, rank

out = Path(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=2))

def fail():
    raise ValueError("the disk is full")

for number in range(2):  # a rank that took the first word for the second would run into the limit
    assert once(lambda: (time.sleep(4), (out / "shared").write_text(str(number)))[1]) == 1, "all have rank 0's result"
    assert (out / "shared").read_text() == str(number)
assert from_all(f"rank {rank()}") == ["rank 0", "rank 1"]
try:
    once(fail)
except Exception as error:
    (out / f"error-{rank()}").write_text(f"{type(error).__name__}: {error}")
leave_ranks()
"""


ENDING = """
import os, sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # as orthrus/__main__.py: the interpreter's teardown sometimes aborts in a process of torchrun
"""


def run_ranks(count: int, out: Path, program: str = PROGRAM) -> None:
    """A program in so many processes."""
    (out / "program.py").write_text(program + ENDING)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launch, str(out / "program.py"), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_ranks_take_the_step_of_one_with_all_rows(tmp_path: Path) -> None:
    run_ranks(1, tmp_path)
    run_ranks(2, tmp_path)
    alone, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    for name in alone:
        assert torch.equal(first[name], second[name]), f"{name}: the ranks have drifted apart"
        torch.testing.assert_close(first[name], alone[name], msg=f"{name}: gradients are not averaged over all rows")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2, "one line a run: rank 0's"


def test_ranks_wait_without_limit_and_end_together(tmp_path: Path) -> None:
    """Longer than the group's own limit, and with rank 0's reason when its work fails."""
    run_ranks(2, tmp_path, WAITING)
    assert (tmp_path / "error-0").read_text() == "ValueError: the disk is full"
    assert (tmp_path / "error-1").read_text() == "RuntimeError: rank 0 failed: ValueError: the disk is full"


def test_one_process_is_a_run_of_one_rank() -> None:
    values, done = torch.tensor([1.0, 2.0]), []
    average([values])
    once(lambda: done.append(1))
    assert from_all("a") == ["a"]
    assert (rank(), num_ranks(), agree(3.0, torch.device("cpu"))) == (0, 1, 3.0)
    assert values.tolist() == [1.0, 2.0] and done == [1]
