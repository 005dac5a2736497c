"""Sampled cycles of the engine on a GPU: who waits, what top-p keeps, whose bits noise has, what memory they take."""

from typing import Any

import pytest
import torch

from orthrus.decoding import sampling
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.decoding.sampling import drop_top_k_, drop_top_p_, seed_tensor
from orthrus.engine import engine as engine_module
from orthrus.engine.engine import EngineBackend
from orthrus.environment import BUNDLED
from tests.decoding.subjects import decode_all, request
from tests.decoding.test_sampling import TOP_KS, check_kept, rows_of_each_kind, sorted_top_p

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

KINDS: list[dict[str, Any]] = [
    dict(temperature=0.8, top_p=0.95, top_k=50, seed=1),
    dict(temperature=0.8, top_p=0.95, rule="speculative", seed=2),
    dict(logprobs=True),
    dict(temperature=1.2, min_p=0.05, seed=4),
]


@pytest.fixture(scope="module")
def backend() -> EngineBackend:
    model = OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=torch.bfloat16).cuda().eval()
    return EngineBackend(model, num_pages=64)


def test_a_sampled_cycle_waits_for_nothing_but_its_result(backend: EngineBackend) -> None:
    """Synchronising operations are errors, once the shapes are captured; the result is waited for by its event."""
    decoder = Decoder(backend, block_size=8)
    rows = [decoder.admit(request([5 + i, 9, 11], 100, **kind)).row for i, kind in enumerate(KINDS)]
    for _ in range(4):
        decoder.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            decoder.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for row in rows:
            decoder.release(row)


def test_groups_and_drafts_computed_again_change_no_text(
    backend: EngineBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request([5 + i, 9, 11], 60, **kind) for i, kind in enumerate(KINDS)]
    expected, _ = decode_all(Decoder(backend, block_size=8), requests)
    for row in range(len(requests)):
        backend.release(row)
    monkeypatch.setattr(engine_module, "SCORES_BYTES", 1)
    monkeypatch.setattr(engine_module, "KEPT_BYTES", 0)
    found, _ = decode_all(Decoder(backend, block_size=8), requests)
    assert found == expected


@pytest.mark.parametrize("num_tokens", [61, 1003, 49_152])
def test_top_p_drops_what_a_sort_says(num_tokens: int) -> None:
    names, *numbers = rows_of_each_kind(num_tokens, 0)
    scores, tail, top_k = (tensor.cuda() for tensor in numbers)
    expected = sorted_top_p(scores, tail)
    found = scores.clone()
    drop_top_p_(found, tail)
    check_kept(names, found, expected)
    best = drop_top_k_(scores, top_k, max(TOP_KS))
    expected = sorted_top_p(scores, tail)
    drop_top_p_(scores, tail, best)
    check_kept(names, scores, expected)


def test_noise_has_the_bits_of_torchs(backend: EngineBackend) -> None:
    seeds, positions = seed_tensor([3, 2**70 + 1, -5]).cuda(), torch.randint(0, 2**20, (3, 4), device="cuda")
    found = backend.passes.ops.gumbel(seeds, positions, 151_936)
    assert torch.equal(found, sampling.gumbel(seeds, positions, 151_936))


def test_many_sampled_rows_take_what_is_reserved(backend: EngineBackend) -> None:
    requests = [request([5 + i, 9, 11], 40, **KINDS[i % 2]) for i in range(16)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decode_all(Decoder(backend, block_size=8), requests)
    for row in range(len(requests)):
        backend.release(row)
    taken = torch.cuda.max_memory_allocated() - before
    print(f"\n16 sampled rows: {taken / 1e6:.0f} MB beside weights and pages")
    assert taken < engine_module.RESERVED_BYTES
