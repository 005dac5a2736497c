"""How a command fails: one line on stderr and an exit code, 2 for the user's mistake and 1 for ours."""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

import typer

P = ParamSpec("P")

MISTAKES = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What goes wrong with a path that the user gave; other errors of the system, such as a full disk, are no mistake."""

DEBUG = "ORTHRUS_DEBUG"
"""Environment variable that adds the traceback to any error."""


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """The command with its exceptions turned into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            print(flush=True)  # the answer's last line was cut off
            raise typer.Exit(fail("interrupted", code=1)) from None
        except (ValueError, *MISTAKES) as error:
            raise typer.Exit(fail(one_line(error), code=2)) from None
        except OSError as error:  # a full disk, say
            raise typer.Exit(fail(one_line(error), code=1)) from None
        except Exception as error:
            hint = "" if DEBUG in os.environ else f" ({DEBUG}=1 shows where)"
            raise typer.Exit(fail(f"{type(error).__name__}: {one_line(error)}{hint}", code=1)) from None

    return run


def fail(message: str, *, code: int) -> int:
    """Print an error line, with the traceback before it when asked for; returns the code."""
    if DEBUG in os.environ:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def one_line(error: Exception) -> str:
    """An exception's message without its line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
