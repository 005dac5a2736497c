"""`python -m orthrus` under torchrun, which leaves without the interpreter's teardown: nothing may get lost with it."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import orthrus.__main__ as entry

def main():
    print("said before")
    {statement}

entry.main = main
entry.main_of_a_rank()
print("still here")
"""


def end(statement: str, **streams: object) -> subprocess.CompletedProcess[str]:
    """A rank whose command is this statement."""
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, text=True, timeout=60, env=environment, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("statement", "code", "error"),
    [
        ("pass", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no such thing')", 1, "no such thing"),
    ],
)
def test_a_rank_ends_as_python_would(statement: str, code: int, error: str) -> None:
    done = end(statement)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, "said before\n", error)


@pytest.mark.parametrize("kind", ["RuntimeError", "KeyboardInterrupt", "GeneratorExit", "BaseException"])
def test_whatever_ends_a_rank_is_printed_with_its_traceback(kind: str) -> None:
    done = end(f"raise {kind}('broken here')")
    assert done.returncode == 1 and done.stdout == "said before\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == f"{kind}: broken here", done.stderr
    assert any("in main" in line for line in lines), "the place is missing"


def test_a_reader_that_is_gone_does_not_keep_a_rank_or_change_its_code() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = end("raise SystemExit(0)", stdout=writer)
    os.close(writer)
    assert done.returncode == 0 and not done.stderr
