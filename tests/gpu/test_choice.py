"""Sampled cycles of the engine on a GPU: who waits, what top-p keeps, whose bits noise has, what memory they take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from orthrus.decoding import sampling
from orthrus.decoding.chooser import Chooser
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.decoding.row import Row
from orthrus.decoding.sampling import Sampling, drop_top_k_, drop_top_p_, seed_tensor
from orthrus.engine import choice
from orthrus.engine.choice import SCORE_COPIES, group_rows
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
    monkeypatch.setattr(choice, "SCORES_BYTES", 1)
    monkeypatch.setattr(choice, "KEPT_BYTES", 0)
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


def peak_beyond(work: Callable[[], Any]) -> int:
    """The most that was allocated at once beyond what there was."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_many_sampled_rows_take_what_is_reserved(backend: EngineBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what greedy rows take: what two rows may take, of sixteen."""
    row_logits = 8 * backend.model.config.vocab_size
    allowed = 2 * SCORE_COPIES * 4 * row_logits
    monkeypatch.setattr(choice, "SCORES_BYTES", allowed)
    monkeypatch.setattr(choice, "KEPT_BYTES", 0)
    assert len(group_rows(16, row_logits)) == 8

    def decode(*kinds: dict[str, Any]) -> None:
        decode_all(
            Decoder(backend, block_size=8), [request([5 + i, 9, 11], 40, **kinds[i % len(kinds)]) for i in range(16)]
        )
        for row in range(16):
            backend.release(row)

    for kinds in ([{}], KINDS[:2]):
        decode(*kinds)  # captures
    greedy, sampled = peak_beyond(lambda: decode({})), peak_beyond(lambda: decode(*KINDS[:2]))
    print(
        f"\n16 sampled rows: {sampled / 1e6:.1f} MB, greedy {greedy / 1e6:.1f} MB, allowed {allowed / 1e6:.1f} MB more"
    )
    assert sampled - greedy <= allowed


@pytest.mark.parametrize("kind", [0, 1])
def test_choices_take_no_more_copies_than_are_reserved(kind: int) -> None:
    """At Qwen3's vocabulary, a GPU's sort included."""
    num_tokens, num_columns = 151_936, 8
    names = ("temperature", "top_p", "top_k", "rule")
    settings = {name: value for name, value in KINDS[kind].items() if name in names}
    row = Row(
        index=0, tokens=[1, 2], num_prompt=1, max_tokens=99, block_size=num_columns, seed=1, width=num_columns - 1,
        sampling=Sampling(**settings), wants_logprobs=True,
    )  # fmt: skip
    logits = torch.randn(2, 1, num_columns, num_tokens, device="cuda").bfloat16()
    one = Chooser([row], num_columns, num_tokens, logits.device, redraft=lambda columns: logits[0][:, 0])
    drafts: list[torch.Tensor] = []
    widths = torch.full((1,), num_columns - 1, device="cuda")
    copy = num_columns * num_tokens * 4
    peaks = [
        peak_beyond(lambda: drafts.append(one.draft(logits[0][:, :-1]))),
        peak_beyond(lambda: one.verify(logits[1], drafts[0], widths)),
    ]
    print(f"\ncopies at once: {[round(peak / copy, 1) for peak in peaks]}")
    assert max(peaks) + copy / 2 <= SCORE_COPIES * copy
