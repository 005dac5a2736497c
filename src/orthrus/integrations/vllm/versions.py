"""Which versions of vLLM this plugin was run with."""

import logging
import re

TESTED = ("0.26", "0.32")
"""Releases that wrote the right text from the right drafts (docs/serve.md says under which runners)."""
OLDEST = (0, 26)
"""Before it vLLM had no draft method that this plugin can use."""

_logger = logging.getLogger("vllm.orthrus")  # below vLLM's own, so that its handlers print it


def check_version(version: str) -> None:
    """Warn about a vLLM that the plugin was not tested with; `RuntimeError` for one that is too old for it."""
    if (found := re.match(r"(\d+)\.(\d+)", version)) is None:
        _logger.warning("Orthrus: vLLM %s was not tested with this plugin; tested: %s", version, ", ".join(TESTED))
        return
    if (int(found[1]), int(found[2])) < OLDEST:
        raise RuntimeError(f"Orthrus needs vLLM {'.'.join(map(str, OLDEST))} or newer, this is {version}")
    if found[0] not in TESTED:
        _logger.warning(
            "Orthrus: vLLM %s was not tested with this plugin (tested: %s); the text is vLLM's own either way, "
            "but look at the accepted drafts per position",
            version,
            ", ".join(TESTED),
        )
