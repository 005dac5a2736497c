"""The plugin's look at its first draft pass, over a small attention layer that breaks on request: no vLLM is needed.

`test_engine.py` has the same faults in engines."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.integrations.vllm.self_check import SelfCheck

MASK, BLOCK, PAGE, NUM_PAGES, DEPTH = 9, 4, 4, 8, 6


class Layer:
    """Attention of blocks over a paged cache, one head of four numbers, whose rows have 5 and 3 positions of text."""

    layer_name = "view.0"
    num_heads, num_kv_heads, head_size = 2, 1, 4

    def __init__(self, *, writes: bool = True, causal: bool = False):
        self.writes, self.causal = writes, causal
        self.kv_cache = torch.randn(2, NUM_PAGES * PAGE, self.head_size, generator=torch.Generator().manual_seed(0))
        self.pages, self.lengths = ([3, 1, 6], [5, 2, 7]), (5, 3)

    def slots(self) -> Tensor:
        """Of each position of the two blocks."""
        return torch.tensor([
            pages[p // PAGE] * PAGE + p % PAGE
            for pages, length in zip(self.pages, self.lengths, strict=True) for p in range(length, length + BLOCK)
        ])  # fmt: skip

    def __call__(self, q_SD: Tensor, k_SD: Tensor, v_SD: Tensor) -> Tensor:
        if self.writes:
            self.kv_cache[0, self.slots()], self.kv_cache[1, self.slots()] = k_SD.float(), v_SD.float()
        mixed = []
        for row, (pages, length) in enumerate(zip(self.pages, self.lengths, strict=True)):
            slots = [pages[p // PAGE] * PAGE + p % PAGE for p in range(length + BLOCK)]
            k_LD, v_LD = self.kv_cache[:, slots]
            q_BHD = q_SD[row * BLOCK : (row + 1) * BLOCK].float().unflatten(1, (self.num_heads, -1))
            for i, q_HD in enumerate(q_BHD):
                seen = length + (i + 1 if self.causal else BLOCK)
                mixed.append((torch.softmax(q_HD @ k_LD[:seen].T, -1) @ v_LD[:seen]).flatten())
        return torch.stack(mixed).to(q_SD.dtype)


def passes(
    check: SelfCheck, layer: Layer, *, target: Layer | None = None, shift: int = 0, tokens: Any = None,
    metadata: Any = "of a row", slots: Tensor | None = None,
) -> None:  # fmt: skip
    """One draft pass of two rows, as a draft model goes through it. `shift` rows are sampled beside the right ones."""
    context = SimpleNamespace(
        attn_metadata={layer.layer_name: SimpleNamespace(max_query_len=BLOCK)} if metadata == "of a row" else metadata,
        slot_mapping={layer.layer_name: layer.slots() if slots is None else slots},
    )
    positions = torch.tensor([p for length in layer.lengths for p in range(length, length + BLOCK)])
    ids = torch.tensor([1, MASK, MASK, MASK, 2, MASK, MASK, MASK] if tokens is None else tokens)
    check.begin(
        target_layers=[target or layer], view_layers=[layer], context=context, input_ids_S=ids, positions_S=positions
    )
    hidden_SD = torch.randn(2 * BLOCK, DEPTH)
    check.ran(hidden_SD)
    rows = torch.tensor([1, 2, 3, 5, 6, 7])
    check.sampled(torch.roll(hidden_SD, 1, dims=0)[rows + shift])


def new(dtype: torch.dtype = torch.float32) -> SelfCheck:
    return SelfCheck(mask_token_id=MASK, block_size=BLOCK, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sound_pass_is_looked_at_once_and_nothing_is_said(dtype: torch.dtype, caplog: pytest.LogCaptureFixture):
    check, layer = new(dtype), Layer()
    passes(check, layer)
    assert check.done and not check.findings and not caplog.records
    passes(check, Layer(writes=False))
    assert not check.findings, "looked again"


@pytest.mark.parametrize(
    ("layer", "changes", "finding"),
    [
        ({"writes": False}, {}, "a block's keys and values are not written where it reads"),
        ({"causal": True}, {}, "a block is masked causally"),
        ({}, {"shift": -1}, "drafts are sampled from other rows than those which propose them"),
        ({}, {"target": Layer()}, "the view's layers do not share the target's cache"),
        ({}, {"tokens": [1, 0, 0, 0, 2, 0, 0, 0]}, "a block is filled with token 0, the view's mask is 9"),
        ({}, {"metadata": {}, "slots": 3}, "the check itself failed, TypeError: "),
    ],
)
def test_fault_is_named_in_one_warning(
    layer: dict[str, Any], changes: dict[str, Any], finding: str, caplog: pytest.LogCaptureFixture
):
    check = new()
    with caplog.at_level(logging.WARNING, logger="vllm.orthrus"):
        passes(check, Layer(**layer), **changes)
    assert check.done and len(check.findings) == 1 and check.findings[0].startswith(finding)
    (record,) = caplog.records
    assert finding in record.getMessage()


def test_passes_without_a_rows_cache_are_waited_over():
    check, broken = new(), Layer(writes=False)
    passes(check, broken, metadata=None)
    passes(check, broken, slots=torch.full((2 * BLOCK,), -1))
    passes(check, broken, slots=broken.slots().index_fill(0, torch.tensor([BLOCK - 1]), -1))
    assert not check.done and not check.findings
    passes(check, broken)
    assert check.done and check.findings


def test_trial_leaves_every_slot_but_the_blocks_as_it_was():
    layer = Layer()
    before = layer.kv_cache.clone()
    passes(new(), layer)
    others = sorted(set(range(NUM_PAGES * PAGE)) - set(layer.slots().tolist()))
    assert torch.equal(layer.kv_cache[:, others], before[:, others])


def test_pass_whose_rows_are_never_sampled_is_not_waited_for():
    check = new()
    context = SimpleNamespace(attn_metadata={"view.0": None}, slot_mapping={"view.0": Layer().slots()})
    for is_done in (False, True):
        layer = Layer()
        check.begin(
            target_layers=[layer], view_layers=[layer], context=context, positions_S=torch.arange(8),
            input_ids_S=torch.full((8,), MASK),
        )  # fmt: skip
        assert (check.done, check.findings) == (is_done, [])
