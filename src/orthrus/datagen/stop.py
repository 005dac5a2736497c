"""How a run is asked to end early: a signal, or a file named STOP. What is in flight is finished first."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_SECONDS = 0.2


class Stop:
    """Whether a stop was asked for; a context manager that listens to signals while it is open.

    The first SIGINT or SIGTERM asks for a stop, a SIGINT behind it ends the process where it stands, with what is on
    the disk by then. Signals are listened to in the main thread only, where Python delivers them. Of several ranks each
    has its own answer, and rank 0 alone speaks.
    """

    def __init__(self, in_flight: str, *, file: Path | None = None):
        """`in_flight` says what is finished first; `file` asks for a stop by being there."""
        self._in_flight = in_flight
        self._file = file
        self._reason: str | None = None
        self._looked = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """What asked for the stop."""
        return self._reason

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_asked(self) -> bool:
        """Whether to stop; the file is looked for a few times a second."""
        now = time.monotonic()
        if self._file is not None and self._reason is None and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            if self._file.exists():
                self._reason = self._file.name
        return self._reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._reason is not None and number == signal.SIGINT:
            say("\nleft at once; the next run goes on from what was saved\n")
            os._exit(1)
        if self._reason is None:
            self._reason = name
            say(f"\n{name}: finishing {self._in_flight}; Ctrl-C leaves at once\n")


def say(message: str) -> None:
    """Write to stderr from inside a signal handler, where print could meet itself."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, message.encode())
