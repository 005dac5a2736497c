"""Orthrus: a frozen language model that drafts a block in one pass and verifies it in another, writing the same text.

The public names below are imported when they are first used, so that `import orthrus` (and `orthrus --help`) costs
nothing: torch and transformers take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthrus.config import OrthrusConfig
    from orthrus.decoding.decoder import Decoder, Record, Request
    from orthrus.decoding.generate import OrthrusForCausalLM
    from orthrus.decoding.sampling import Sampling
    from orthrus.decoding.stats import DecodingStats
    from orthrus.decoding.stopping import Stopping

__version__ = "0.1.0"

_HOME = {
    "Decoder": "orthrus.decoding.decoder",
    "DecodingStats": "orthrus.decoding.stats",
    "OrthrusConfig": "orthrus.config",
    "OrthrusForCausalLM": "orthrus.decoding.generate",
    "Record": "orthrus.decoding.decoder",
    "Request": "orthrus.decoding.decoder",
    "Sampling": "orthrus.decoding.sampling",
    "Stopping": "orthrus.decoding.stopping",
}

__all__ = [
    "Decoder",
    "DecodingStats",
    "OrthrusConfig",
    "OrthrusForCausalLM",
    "Record",
    "Request",
    "Sampling",
    "Stopping",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Import the module that defines a public name (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'orthrus' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
