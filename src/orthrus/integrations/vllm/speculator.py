"""Narrower blocks under vLLM's V2 runner, where a table of block sizes asks for them.

vLLM has such a table (`num_speculative_tokens_per_batch_size`): its scheduler verifies fewer drafts when more rows
decode together, and its graphs of the verify pass are made for every width in it. Its V1 runner tells the draft, which
then drafts a smaller block. Its V2 runner always drafts the widest block and has the rest of it ignored: drafts that
are made beside others than the view was asked for, at the widest block's cost, for no row at all at width 0. Here a
draft pass has the width that will be verified, and none is run at width 0.

What depends on the width in vLLM's `DFlashSpeculator` is four attributes; each width has its own set, and vLLM's own
methods run between them. Its graphs of the draft pass are made for the table's widths already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

PER_WIDTH = ("num_query_per_req", "num_speculative_steps", "sample_col", "draft_tokens")
RELIED_ON = (*PER_WIDTH, "_generate_draft")


class BlockSpeculator(DFlashSpeculator):
    """vLLM's speculator over blocks of several widths. One is made of vLLM's own when it gets its attention layers."""

    def make_widths(self) -> None:
        """Have a set of what depends on the width for each one in the table."""
        if missing := [name for name in RELIED_ON if not hasattr(self, name)]:
            raise ValueError(
                f"this vLLM's V2 runner drafts in another way (it lacks {', '.join(missing)}), so block sizes cannot "
                "vary by load: give one number of speculative tokens"
            )
        self.widest = self.num_speculative_steps
        table = self.speculative_config.num_speculative_tokens_per_batch_size
        self.width_of_rows = build_dynamic_sd_schedule_lookup(table, self.max_num_reqs, self.widest)
        self.sets = {width: self._make_set(width) for width in {*self.width_of_rows[1:]} - {0, self.widest}}
        self.sets[self.widest] = {name: getattr(self, name) for name in PER_WIDTH}

    def _make_set(self, width: int) -> dict[str, Any]:
        columns = torch.arange(width, dtype=self.sample_col.dtype, device=self.sample_col.device)
        return {
            "num_query_per_req": 1 + width,
            "num_speculative_steps": width,
            "sample_col": columns.repeat(self.max_num_reqs),
            "draft_tokens": self.draft_tokens.new_zeros(self.max_num_reqs, width),
        }

    @contextmanager
    def at_width(self, width: int) -> Iterator[None]:
        """Draft so many tokens a row."""
        before = self.num_speculative_steps
        self.__dict__.update(self.sets[width])
        try:
            yield
        finally:
            self.__dict__.update(self.sets[before])

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """vLLM's own, less graphs of widths that are never drafted: 0, and those for more rows than there can be."""
        super().init_cudagraph_manager(cudagraph_mode)
        captured: dict[Any, list[Any]] = self.query_cudagraph_manager._capture_descs
        for mode, shapes in captured.items():
            captured[mode] = [shape for shape in shapes if (shape.uniform_token_count or 0) - 1 in self.sets]

    def _generate_draft(self, num_reqs: int, num_tokens_padded: int, *arguments: Any, **options: Any) -> None:
        # Graphs are captured through here alone, without `propose` around it.
        with self.at_width(num_tokens_padded // num_reqs - 1):
            super()._generate_draft(num_reqs, num_tokens_padded, *arguments, **options)

    def propose(self, input_batch: Any, *arguments: Any, **options: Any) -> Tensor:
        """Drafts of each row, of which as many columns as the scheduler will have verified are new. [rows, widest]."""
        num_rows, drafts = input_batch.num_reqs, self.sets[self.widest]["draft_tokens"]
        width = self._width_of(num_rows, options)
        if width:
            with self.at_width(width):
                narrow = super().propose(input_batch, *arguments, **options)
            if width < self.widest:
                drafts[:num_rows, :width] = narrow
        return drafts[:num_rows]

    def _width_of(self, num_rows: int, options: dict[str, Any]) -> int:
        if options.get("dummy_run"):
            return self.widest
        if (told := options.get("num_speculative_tokens")) is not None:
            return told
        return self.width_of_rows[num_rows]  # older versions do not say; the scheduler looked it up here


def follow_table() -> None:
    """Have vLLM's speculator vary its width once it has loaded a draft that asks for it (`varies_width`).

    vLLM makes the speculator itself and hands it to nobody. So its class is told, once a process.
    """
    stock = DFlashSpeculator.set_attn
    if hasattr(stock, "follows_table"):
        return

    @wraps(stock)
    def set_attn(self: Any, *arguments: Any, **options: Any) -> None:
        if type(self) is DFlashSpeculator and getattr(self.model, "varies_width", False):
            self.__class__ = BlockSpeculator
            self.make_widths()
        stock(self, *arguments, **options)

    set_attn.follows_table = True  # type: ignore[attr-defined]
    DFlashSpeculator.set_attn = set_attn


def verifies_what_is_drafted(is_asynchronous: bool) -> bool:
    """Whether this vLLM's scheduler keeps to the table under the V2 runner. Older ones forget it without asynchronous
    scheduling, where the runner reports the widest block's drafts whatever was made."""
    return is_asynchronous or "num_speculative_tokens" in signature(DFlashSpeculator.propose).parameters
