"""Orthrus on unmodified vLLM: `vllm serve` with this package installed and a speculative configuration.

vLLM finds the plugin by its entry point (`vllm.general_plugins`) and drafts by its method "dflash": a block of the last
token and masks, one pass that is not causal, over the target's own cache. What this package adds are two model classes:

* `target.OrthrusTarget`, the AR view: vLLM's own class for the base's family, which leaves `*_diff` tensors alone;
* `draft.OrthrusDraft`, the diffusion view: the `*_diff` tensors and nothing else, between the target's own layers.

Importing this module imports neither torch nor vLLM.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthrus.integrations.vllm.block_sizes import BY_ROWS, at_most, check_table, ranges_of

BlockSize = int | Mapping[int, int]
"""Positions of a block, or a table of them by the rows that decode together (`block_sizes.BY_ROWS`)."""

NUM_ROWS = 256
"""Rows that may decode together."""
STEP_POSITIONS = 8192
"""Positions of a step at least: vLLM's own number for a server, and it warns below it."""


def speculative_config(
    view: str | os.PathLike, *, block_size: BlockSize | None = None, **options: Any
) -> dict[str, Any]:
    """vLLM's `speculative_config` for the checkpoint (or view file) `view`, drafting blocks of `block_size`.

    None is `BY_ROWS`, up to the block that the view was trained with where `view` is a folder; vLLM refuses larger ones
    of a Hub id. `options` are vLLM's own fields and win. vLLM 0.26 needs room for the drafts of all rows in a step:

        LLM(model=view, speculative_config=speculative_config(view), max_num_seqs=64, max_num_batched_tokens=10_176)

    Raises `ValueError` for a block without drafts, or a table that leaves a batch out.
    """
    by_rows: dict[str, Any] = {}
    if block_size is None:
        block_size = at_most(BY_ROWS, trained_block_size(view) or max(BY_ROWS.values()))
    if isinstance(block_size, Mapping):
        table = check_table(block_size)
        by_rows = {"num_speculative_tokens_per_batch_size": ranges_of(table)}
        block_size = max(table.values())
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 (one anchor, one draft), got {block_size}")
    return {"method": "dflash", "model": os.fspath(view), "num_speculative_tokens": block_size - 1} | by_rows | options


def trained_block_size(view: str | os.PathLike) -> int | None:
    """What config.json in this folder says; None where it says nothing, or there is none."""
    file = Path(view) / "config.json"
    return json.loads(file.read_text()).get("block_size") if file.is_file() else None


def serve_command(
    view: str | os.PathLike,
    *arguments: str,
    base: str | os.PathLike | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    block_size: BlockSize | None = None,
    draft_sample_method: str | None = None,
) -> list[str]:
    """The `vllm serve` line for a checkpoint, as a list of words; `arguments` are vLLM's own and go behind it.

    With `base` the text is that of a stock checkpoint, which config.json does not call an OrthrusLM, and `view` only
    drafts for it. `revision` is the view's on the Hub, and the target's where they are one; else `base_revision` is.
    """
    given = {"revision": revision, "draft_sample_method": draft_sample_method}
    options = {name: value for name, value in given.items() if value is not None}
    speculation = json.dumps(speculative_config(view, block_size=block_size, **options))
    head = ["vllm", "serve", os.fspath(view if base is None else base)]
    if base is not None:
        head += ["--hf-overrides", json.dumps({"architectures": ["OrthrusLM"]})]
    if (of_target := revision if base is None else base_revision) is not None:
        head += ["--revision", of_target]
    room = room_for_drafts(arguments, json.loads(speculation)["num_speculative_tokens"])
    return [*head, "--speculative-config", speculation, *room, *arguments]


def room_for_drafts(arguments: Sequence[str], num_drafts: int) -> list[str]:
    """How many rows and positions a step has where `arguments` do not say, or name a file that may.

    vLLM 0.26 keeps the widest block of every row that could decode out of a step's positions. With its own numbers for
    a GPU (1,024 rows, 8,192 positions) nothing is left of them and it does not start. 0.32 keeps nothing ahead of a
    step, so what one may decode is said as well.
    """
    rows, *positions, file = (
        given_option(arguments, name)
        for name in ("max-num-seqs", "max-num-batched-tokens", "max-num-scheduled-tokens", "config")
    )
    if file is not None:
        return []
    room = [] if rows is not None else ["--max-num-seqs", str(NUM_ROWS)]
    num_rows = str(NUM_ROWS) if rows is None else rows
    if positions == [None, None] and num_rows.isdecimal():  # vLLM says what is wrong with another
        num_scheduled = max(STEP_POSITIONS, int(num_rows) * (num_drafts + 1))
        room += ["--max-num-batched-tokens", str(num_scheduled + int(num_rows) * num_drafts)]
        room += ["--max-num-scheduled-tokens", str(num_scheduled)]
    return room


def given_option(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option among a command's words, "" where it is the last of them; None where it is not given."""
    for index, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:].replace("_", "-") == name:
            return value if equals else "".join(arguments[index + 1 : index + 2])
    return None
