"""Every example runs as it stands, on a tiny model, and is short enough to read at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import run
from tests.cli.tiny import write_base

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged checkpoint of a tiny random base."""
    folder = tmp_path_factory.mktemp("examples")
    run("convert", write_base(folder / "base"), folder / "merged", "--form", "merged", "--block-size", 8)
    return folder / "merged"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path, model: Path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(example), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_at_most_40_lines(example: Path):
    assert len(example.read_text().splitlines()) <= 40
