"""What the engine takes beside weights and pages, at the shape of Qwen3-8B in bf16: little, and no more for long texts.

Beside them lie rotary tables, the buffers of passes, what a pass computes, and the pool that all graphs share.
PyTorch's peak is taken over a prompt's whole prefill, eager cycles, captures and replays; what graphs keep for good is
added to it, although the peak holds the part of it that was in use while they were captured: the sum is an upper bound.
The driver's own memory for graphs and kernels is not PyTorch's, and not in it.
"""

import gc
import random
from collections.abc import Sequence

import pytest
import torch
from benchmarks.cycle import random_model
from torch import nn

from orthrus.decoding.decoder import Decoder
from orthrus.engine.engine import EngineBackend, page_bytes
from tests.decoding.subjects import request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SHAPE = "8b"
CONTEXTS = (1024, 8192, 40_960)
NUM_CYCLES = 8
"""Eager, captured, replayed."""
ALLOWED_BYTES = 200 * 10**6
ALLOWED_GROWTH = 0.01
"""Of what keys and values grow by. Only the states of attention's splits grow: 44 of them at 40k slots, 8 at 2k."""


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that hold a model's parameters, joined ones once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def pages_bytes(backend: EngineBackend) -> int:
    return backend.passes.keys_LPSGH.nbytes + backend.passes.values_LPSGH.nbytes


def graph_bytes() -> int:
    """Bytes of the segments that private pools hold."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))


def overhead_bytes(model: nn.Module, prompt: Sequence[int]) -> int:
    """An upper bound of what a new engine takes for this prompt and some drafted cycles behind it."""
    gc.collect()
    torch.cuda.empty_cache()
    before = graph_bytes()  # of tests before this one
    block_size = model.config.block_size
    num_new = (NUM_CYCLES + 2) * block_size
    backend = EngineBackend(model, num_pages=(len(prompt) + num_new) // 64 + 1)
    known = weight_bytes(model) + pages_bytes(backend)
    torch.cuda.reset_peak_memory_stats()  # joining the weights takes a layer's worth for a moment
    decoder = Decoder(backend)
    record = decoder.admit(request(list(prompt), num_new))
    for _ in range(NUM_CYCLES):
        (record,) = decoder.step()
        assert record.num_drafted == block_size - 1
    assert {"draft", "verify"} <= {name for name, _ in backend.graphs.captured}
    kept, peak = graph_bytes() - before, torch.cuda.max_memory_allocated() - known
    assert kept > 0, "graphs keep memory of their own: it was not found"
    print(f"\n{len(prompt)} tokens: peak {peak / 1e6:.1f} MB beside weights and pages, graphs keep {kept / 1e6:.1f} MB")
    return peak + kept


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return random_model(SHAPE, torch.device("cuda"), 32)


def test_drafting_takes_little_beside_weights_and_pages_at_any_length(model: nn.Module) -> None:
    rng = random.Random(0)
    text = [rng.randrange(model.config.vocab_size - 1) for _ in range(max(CONTEXTS))]
    overheads = {context: overhead_bytes(model, text[:context]) for context in CONTEXTS}
    shown = ", ".join(f"{num_bytes / 1e6:.1f} MB at {context}" for context, num_bytes in overheads.items())
    assert max(overheads.values()) < ALLOWED_BYTES, shown
    growth, grown = overheads[max(CONTEXTS)] - overheads[min(CONTEXTS)], max(CONTEXTS) - min(CONTEXTS)
    assert growth < ALLOWED_GROWTH * grown * page_bytes(model, 1), f"it grows with the text: {shown}"


def test_a_token_takes_the_bytes_of_the_base_models_cache(model: nn.Module) -> None:
    """Keys and values of all layers once, for both views: none are kept for the diffusion view."""
    config = model.config
    backend = EngineBackend(model, num_pages=7)
    num_slots = 8 * 64  # one page is spare
    base_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert pages_bytes(backend) == num_slots * base_bytes
    assert page_bytes(model, 1) == base_bytes
