"""Ways to run a command: in this process, in one of its own, and expecting it to fail."""

import json
import os
import subprocess
import sys

from typer.testing import CliRunner, Result

from orthrus.cli.app import app


def run(*arguments: object, stdin: str | None = None) -> Result:
    """Run a command in this process; it must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object, stdin: str | None = None, code: int = 2) -> str:
    """Run a command that must fail with this code; the one line it says why, and nothing on stdout."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.output
    assert not result.stdout, "an error leaves stdout empty"
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PROGRAM = (sys.executable, "-c", "from orthrus.cli.app import main; main()")


def run_process(*arguments: object, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, in a process of its own, off the network, with these environment variables."""
    environment = os.environ | OFFLINE | variables
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=300)


def last_json(output: str) -> dict:
    """The document on the last line of an output."""
    return json.loads(output.splitlines()[-1])
