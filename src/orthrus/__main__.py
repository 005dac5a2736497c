"""`python -m orthrus` is `orthrus`: what torchrun starts."""

import os
import sys

from orthrus.cli.app import main


def main_of_a_rank() -> None:
    """`main` as one of torchrun's processes, ended without the interpreter's teardown.

    Two of a dozen runs (gloo, a busy machine) ended in "terminate called without an active exception", which we put
    down to threads of process groups that outlive Python; torchrun then calls a finished run a failure.
    """
    code = 1
    try:
        main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main_of_a_rank() if "TORCHELASTIC_RUN_ID" in os.environ else main()
