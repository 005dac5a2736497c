"""Orthrus on unmodified vLLM: `vllm serve` with this package installed and a speculative configuration.

vLLM finds the plugin by its entry point (`vllm.general_plugins`) and drafts by its method "dflash": a block of the last
token and masks, one pass that is not causal, over the target's own cache. What this package adds are two model classes:

* `target.OrthrusTarget`, the AR view: vLLM's own class for the base's family, which leaves `*_diff` tensors alone;
* `draft.OrthrusDraft`, the diffusion view: the `*_diff` tensors and nothing else, between the target's own layers.

Importing this module imports neither torch nor vLLM.
"""

import json
import os
from typing import Any


def speculative_config(view: str | os.PathLike, *, block_size: int = 32, **options: Any) -> dict[str, Any]:
    """vLLM's `speculative_config` for the checkpoint (or view file) `view`, drafting blocks of `block_size`.

    `LLM(model=view, speculative_config=speculative_config(view))`. `options` are vLLM's own fields and win.
    Raises `ValueError` for a block without drafts.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 (one anchor, one draft), got {block_size}")
    return {"method": "dflash", "model": os.fspath(view), "num_speculative_tokens": block_size - 1} | options


def serve_command(
    view: str | os.PathLike,
    *arguments: str,
    base: str | os.PathLike | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    block_size: int = 32,
) -> list[str]:
    """The `vllm serve` line for a checkpoint, as a list of words; `arguments` are vLLM's own and go behind it.

    With `base` the text is that of a stock checkpoint, which config.json does not call an OrthrusLM, and `view` only
    drafts for it. `revision` is the view's on the Hub, and the target's where they are one; else `base_revision` is.
    """
    options = {"revision": revision} if revision is not None else {}
    speculation = json.dumps(speculative_config(view, block_size=block_size, **options))
    head = ["vllm", "serve", os.fspath(view if base is None else base)]
    if base is not None:
        head += ["--hf-overrides", json.dumps({"architectures": ["OrthrusLM"]})]
    if (of_target := revision if base is None else base_revision) is not None:
        head += ["--revision", of_target]
    return [*head, "--speculative-config", speculation, *arguments]
