"""The benchmark of a plain step in several ways runs where there is no GPU, and all its ways are the same step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def test_all_ways_are_the_same_step_at_toy_size():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    arguments = ["--model", "toy", "--context", "40", "--steps", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "exactness.py"), *arguments],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    # A stream, and two clocks of four ways.
    assert json.loads(lines[-1]) == {"records": 9, "agree": True}
    ways = {line.split()[2]: line.split() for line in lines if line.startswith("toy ")}
    assert set(ways) == {"engine", "tuned", "torch", "gemv"}
    assert all(cells[-1] == "same" for cells in ways.values()), "another token"
    assert float(ways["gemv"][-2]) > 0, "the engine's operations ran in the place of those for one row"


def test_its_records_are_defined_in_the_docs():
    assert "| `one_row_step_ms` |" in (ROOT / "docs" / "benchmarks.md").read_text()
