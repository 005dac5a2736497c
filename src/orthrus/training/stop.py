"""Asking a run to stop: SIGTERM, or Ctrl-C once. The step in work is finished, the run saved, and resumed later."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop; one rank's answer is not yet everybody's (`OrthrusTrainer`)."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if os.environ.get("RANK", "0") == "0":
            text = f"\n{self.signal.name}: finishing the step in work, then saving; Ctrl-C again leaves without\n"
            with suppress(OSError):  # written past Python's own buffers, which the handler may have interrupted
                os.write(2, text.encode())
        if number == signal.SIGINT:  # the second Ctrl-C means it
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the two signals while the block runs."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
