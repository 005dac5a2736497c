"""Prompts drafted in batches: every prompt's counts are those it has alone, in batches that stay within bounds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus.decoding import batch
from orthrus.decoding.batch import batches, draft_greedily
from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import Stopping
from tests.decoding.trained import BLOCK, MODULUS, trained_subject

EOS = frozenset({5})


def prompts() -> list[list[int]]:
    """Of many lengths; some count, which is drafted well, some do not."""
    counting = [[(start + step * i) % MODULUS for i in range(3 + 2 * start)] for step in (1, 2) for start in range(6)]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(MODULUS, (n,), generator=generator).tolist() for n in (30, 2, 17, 9)]
    return [*counting[:5], *noise, *counting[5:]]


def alone(prompt: list[int]) -> DecodingStats:
    decoder = Decoder(PortableBackend(trained_subject(), exact=False), block_size=BLOCK)
    record = decoder.admit(Request(prompt_ids=prompt, stopping=Stopping(max_new_tokens=20, eos_token_ids=EOS)))
    while decoder.active:
        decoder.step()
    return decoder.stats(record.row)


def counts(stats: DecodingStats) -> list[object]:
    return [value for name, value in stats.as_dict().items() if not name.endswith("_ms")]


@pytest.mark.parametrize(("rows", "slots"), [(16, 8192), (3, 8192), (16, 100), (16, 1)])
def test_prompts_in_batches_have_the_counts_of_prompts_alone(
    monkeypatch: pytest.MonkeyPatch, rows: int, slots: int
) -> None:
    monkeypatch.setattr(batch, "MAX_ROWS", rows)
    monkeypatch.setattr(batch, "MAX_SLOTS", slots)
    found = draft_greedily(trained_subject(), prompts(), block_size=BLOCK, max_new_tokens=20, eos=EOS)
    expected = [alone(prompt) for prompt in prompts()]
    assert len({str(counts(one)) for one in expected}) > 3, "prompts that are all alike cannot be mixed up"
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert counts(one) == counts(other), f"prompt {number} is drafted differently among others"


def test_no_prompts_are_no_counts() -> None:
    assert draft_greedily(trained_subject(), [], block_size=BLOCK, max_new_tokens=20, eos=EOS) == []


def test_cudnn_attention_is_off_while_prompts_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel plans anew for each length, and lengths change with every cycle."""
    seen = []
    step = Decoder.step
    monkeypatch.setattr(
        Decoder, "step", lambda self: (seen.append(torch.backends.cuda.cudnn_sdp_enabled()), step(self))[1]
    )
    was = torch.backends.cuda.cudnn_sdp_enabled()
    draft_greedily(trained_subject(), prompts()[:2], block_size=BLOCK, max_new_tokens=20, eos=EOS)
    assert seen and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled() == was


@given(st.lists(st.integers(1, 20_000), max_size=60))
def test_every_row_is_in_one_batch_and_no_batch_is_too_large(num_slots: list[int]) -> None:
    made = list(batches(num_slots))
    assert sorted(i for one in made for i in one) == list(range(len(num_slots)))
    for one in made:
        assert len(one) <= batch.MAX_ROWS
        assert len(one) == 1 or len(one) * max(num_slots[i] for i in one) <= batch.MAX_SLOTS
