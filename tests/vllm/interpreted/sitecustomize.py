"""On the path of every process of an engine: vLLM's V2 runner needs a Triton that has a CPU backend, and this makes
the one here look like it. With TRITON_INTERPRET=1 kernels then run in Triton's interpreter."""

from types import SimpleNamespace

from triton.backends import backends

backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None))
