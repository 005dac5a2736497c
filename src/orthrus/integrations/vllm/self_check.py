"""Whether this vLLM drafts as the view needs, seen once on the first draft pass that a running engine makes.

A mistake in a draft shows in no text: vLLM corrects it, and is slow. So what the plugin relies on is tried out where it
runs, by what it does and not by what a version is called: the block is an anchor and masks at consecutive positions,
each layer reads the cache of its target, what a block writes is read by all of it, and the rows that are sampled are
those which propose the tokens asked for. None of it depends on weights, and it costs two calls of one attention layer.

    S = positions of the pass (blocks of all rows, one behind the other), D = hidden width, B = positions of a block
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOUD = 2.0**15
"""A value that moves an average of any length, and fits fp16."""

_logger = logging.getLogger("vllm.orthrus")  # below vLLM's own, so that its handlers print it


class SelfCheck:
    """What is found wrong with the first draft pass. `findings` is empty where nothing is, or was seen yet."""

    def __init__(self, *, mask_token_id: int, block_size: int, dtype: torch.dtype):
        """`block_size` is the engine's: drafts of a block and one; `dtype` that of queries."""
        self.findings: list[str] = []
        self.done = False
        self._mask_token_id, self._block_size, self._dtype = mask_token_id, block_size, dtype
        self._expected_BD: Tensor | None = None

    def begin(
        self,
        *,
        target_layers: Sequence[Any],
        view_layers: Sequence[Any],
        context: Any,
        input_ids_S: Tensor,
        positions_S: Tensor,
    ) -> None:
        """Look at what a pass is given, before it runs; passes that no row's cache belongs to are waited over.

        Layers are attention layers, `context` is vLLM's of the pass. The first layer is tried, and leaves nonsense in
        the slots of this pass, which the pass then overwrites.
        """
        if self._expected_BD is not None:
            self._say()  # its rows were sampled without asking for logits
        if self.done:
            return
        try:
            width = self._width(view_layers[0].layer_name, context, input_ids_S)
            if width is None:
                return
            self.findings += inputs_wrong(input_ids_S[:width], positions_S[:width], mask_token_id=self._mask_token_id)
            self.findings += caches_wrong(target_layers, view_layers)
            self.findings += attention_wrong(view_layers[0], positions_S.to(self._dtype), width)
        except Exception as error:  # a look at an engine does not stop it
            self.findings.append(f"the check itself failed, {type(error).__name__}: {error}")
            return self._say()
        self._block_size, self._expected_BD = width, positions_S  # until the pass has run

    def ran(self, hidden_SD: Tensor) -> None:
        """Remember what the pass that was begun computed, not rolled yet."""
        if self._expected_BD is not None:
            self._expected_BD = hidden_SD[: self._block_size - 1].clone()

    def sampled(self, hidden_ND: Tensor) -> None:
        """Look at the rows that vLLM samples drafts from, those of all blocks, and say what was found."""
        if self._expected_BD is None:
            return
        found_BD, expected_BD = hidden_ND[: self._block_size - 1].float(), self._expected_BD.float()
        same = found_BD.shape == expected_BD.shape
        if not same or not torch.allclose(found_BD, expected_BD, rtol=0, atol=0, equal_nan=True):
            self.findings.append("drafts are sampled from other rows than those which propose them")
        self._say()

    def _width(self, name: str, context: Any, input_ids_S: Tensor) -> int | None:
        """Positions of a block in this pass, less than the engine's where drafts depend on load; None for a pass that
        is not a row's: vLLM makes some to measure memory, or ahead of graphs, and none can be tried within a graph."""
        metadata, slots = context.attn_metadata, context.slot_mapping
        if not isinstance(metadata, dict) or not isinstance(slots, dict):
            return None
        if input_ids_S.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        found = getattr(metadata.get(name), "max_query_len", None)
        width = found if isinstance(found, int) else self._block_size
        # Passes ahead of graphs have no slots; blocks that reach beyond the longest sequence have not all of them.
        if len(input_ids_S) < width or bool((slots[name][:width] < 0).any()):
            return None
        return width

    def _say(self) -> None:
        self.done, self._expected_BD = True, None
        if self.findings:
            _logger.warning(
                "Orthrus: this vLLM may not draft as the diffusion view needs (%s): the text is right, but most drafts "
                "would be rejected; look at the accepted drafts per position, or use a tested version",
                "; ".join(self.findings),
            )


def inputs_wrong(input_ids_B: Tensor, positions_B: Tensor, *, mask_token_id: int) -> list[str]:
    """Whether a block is an anchor and masks, one behind the other."""
    wrong = []
    if others := sorted(set(input_ids_B[1:].tolist()) - {mask_token_id}):
        wrong.append(f"a block is filled with token {others[0]}, the view's mask is {mask_token_id}")
    if not bool((positions_B.diff() == 1).all()):
        wrong.append("a block's positions are not consecutive")
    return wrong


def caches_wrong(target_layers: Sequence[Any], view_layers: Sequence[Any]) -> list[str]:
    """Whether the view's layers have the caches of the target's."""
    pairs = zip(target_layers, view_layers, strict=True)
    if any(target.kv_cache.data_ptr() != view.kv_cache.data_ptr() for target, view in pairs):
        return ["the view's layers do not share the target's cache"]
    return []


def attention_wrong(layer: Any, like_S: Tensor, width: int) -> list[str]:
    """Whether the first and the last position of the first block both see the values that the block brings.

    Where queries are zero, each position averages what it sees: the anchor's average moves with the values of the
    masks behind it, unless they were not written (then nobody's does) or lie behind a causal mask (then the last's
    does). This needs to know nothing of a backend's layout.
    """
    q_SD, k_SD = (like_S.new_zeros(len(like_S), num * layer.head_size) for num in (layer.num_heads, layer.num_kv_heads))
    loud_SD = torch.full_like(k_SD, LOUD)
    loud_SD[::width] = 0  # an anchor sees itself in any case
    moved_S = (layer(q_SD, k_SD, k_SD) != layer(q_SD, k_SD, loud_SD)).any(dim=1)
    if not bool(moved_S[width - 1]):
        return ["a block's keys and values are not written where it reads"]
    if not bool(moved_S[0]):
        return ["a block is masked causally"]
    return []
