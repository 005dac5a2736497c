"""On the path of every process of an engine: vLLM's V2 runner needs a Triton that has a CPU backend, and this makes
the one here look like it. With TRITON_INTERPRET=1 kernels then run in Triton's interpreter, whose loads and stores
want masks of booleans, while its "and" of a vector and a number may give another type."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.backends import backends
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

cpu: Any = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
backends.setdefault("cpu", cpu)
builder: Any = InterpreterBuilder
library: Any = libdevice


def boolean(mask: Any) -> TensorHandle:
    return TensorHandle(mask.data.astype(bool), mask.dtype)


load, store = builder.create_masked_load, builder.create_masked_store
builder.create_masked_load = lambda self, place, mask, *rest: load(self, place, boolean(mask), *rest)
builder.create_masked_store = lambda self, place, value, mask, *rest: store(self, place, value, boolean(mask), *rest)


def log1p(x: Any) -> Any:
    return type(x)(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)


library.log1p = log1p  # its own belongs to a GPU's library
