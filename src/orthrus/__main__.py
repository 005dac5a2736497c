"""`python -m orthrus` is `orthrus`: what torchrun starts."""

import os
import sys
import traceback
from contextlib import suppress

from orthrus.cli.app import main


def main_of_a_rank() -> None:
    """`main` as one of torchrun's processes, ended without the interpreter's teardown.

    Two of a dozen runs (gloo, a busy machine) ended in "terminate called without an active exception", which we put
    down to threads of process groups that outlive Python; torchrun then calls a finished run a failure.
    """
    code = 1
    try:
        main()
        code = 0
    except SystemExit as done:
        code = exit_code(done)
    except BaseException:  # nothing behind this function prints it
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # its reader is gone, or it is closed: no reason to stay
                stream.flush()
        os._exit(code)


def exit_code(done: SystemExit) -> int:
    """What Python makes of `sys.exit`'s argument: a number is the code, a text is printed and means 1."""
    if done.code is None or isinstance(done.code, int):
        return done.code or 0
    print(done.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main_of_a_rank() if "TORCHELASTIC_RUN_ID" in os.environ else main()
