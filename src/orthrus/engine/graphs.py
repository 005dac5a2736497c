"""The fixed-shape passes of cycles and prompts as CUDA graphs: some 300 launches become one.

A function of a shape runs as it is the first time, which compiles its kernels and is the pass that was asked for; the
second time it is captured; from then on it is replayed. A graph works on the buffers that it was captured with, and
replaying it on others would decode stale rows without a word: shape and addresses are asserted every time.

All graphs share one pool of memory. What they keep in it is scratch: whatever outlives a replay lies in `Inputs` or in
the pages, so they may be replayed in any order, one at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from orthrus.engine.passes import Inputs, Shape

Function = Callable[[Inputs], None]
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""capture(work) -> replay: the work is recorded, not done; each `replay()` does it."""


class Captured(NamedTuple):
    """A graph and the buffers it works on."""

    replay: Callable[[], None]
    shape: Shape
    addresses: tuple[int, ...]


class Graphs:
    """Runs functions of `Inputs`, each shape of each as a graph of its own; without a `capture`, as they are."""

    def __init__(self, capture: Capture | None):
        self._capture = capture
        self._captured: dict[tuple[str, Shape], Captured | None] = {}

    @classmethod
    def on(cls, device: torch.device) -> "Graphs":
        """Graphs where the device has them."""
        return cls(cuda_capture() if device.type == "cuda" else None)

    @property
    def can_capture(self) -> bool:
        """Whether what runs again is replayed."""
        return self._capture is not None

    @property
    def captured(self) -> list[tuple[str, Shape]]:
        """The functions whose graphs are kept, by name, and their shapes."""
        return [key for key, captured in self._captured.items() if captured is not None]

    def run(self, function: Function, inputs: Inputs) -> None:
        """What `function(inputs)` does."""
        key = (function.__name__, inputs.shape)
        if self._capture is None or key not in self._captured:
            self._captured[key] = None
            function(inputs)
            return
        captured = self._captured[key]
        if captured is None:
            replay = self._capture(lambda: function(inputs))
            captured = self._captured[key] = Captured(replay, inputs.shape, inputs.addresses())
        assert inputs.shape == captured.shape and inputs.addresses() == captured.addresses, (
            f"{key} was captured over other buffers than it is replayed on"
        )
        captured.replay()


def cuda_capture() -> Capture:
    """Captures into graphs that share one pool of memory."""
    pool: Any = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads of the program (a loader that pins memory) may go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return capture
