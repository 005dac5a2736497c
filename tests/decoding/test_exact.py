"""L1 on a CPU: in bf16, the logits of every committed token have the same bits with and without drafting."""

from functools import cache

import pytest
import torch

import orthrus.model.packed as packed
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.row import Row
from tests.decoding.subjects import RiggedBackend, decode_all, random_prompt, randomise, request
from tests.families import ONE_EACH, OTHERS, dual_config, randomise_vectors

BLOCK = 8
NUM_NEW = 1 + BLOCK * (BLOCK + 1) // 2


@cache
def bf16_subject(implementation: str, width: int = 128, variant: str = "qwen3") -> OrthrusForCausalLM:
    shape = dict(
        vocab_size=263, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config = dual_config(variant, shape, block_size=BLOCK, mask_token_id=262)
    config._attn_implementation = implementation
    model = OrthrusForCausalLM(config).eval()
    randomise(model, seed=1, std=0.15)
    if variant != "qwen3":
        randomise_vectors(model, seed=1, std=0.1)
    return model.to(torch.bfloat16)


def decode_logits(backend: PortableBackend, prompts: list[list[int]], *, drafting: bool) -> tuple[list, list, list]:
    """New tokens, their logits and the accepted counts, row by row."""
    decoder = Decoder(backend, block_size=BLOCK)
    requests = [request(prompt, NUM_NEW, drafting=drafting, logits=True) for prompt in prompts]
    texts, records = decode_all(decoder, requests)
    rows = range(len(prompts))
    logits = [torch.cat([r.logits for r in records if r.row == row and r.logits is not None]) for row in rows]
    accepted = [[r.num_accepted for r in records if r.row == row and r.num_drafted] for row in rows]
    return texts, logits, accepted


def differing_tokens(
    implementation: str, *, exact: bool, num_rows: int = 1, width: int = 128, variant: str = "qwen3"
) -> int:
    """Tokens whose logits differ in some bit between AR decoding and drafting with every acceptance count."""
    model = bf16_subject(implementation, width, variant)
    prompts = [random_prompt(9 + 30 * row, seed=row) for row in range(num_rows)]
    texts, plain, _ = decode_logits(PortableBackend(model, exact=exact), prompts, drafting=False)
    truth = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    counts = list(range(BLOCK))
    backend = RiggedBackend(model, truth, lambda row, cycle: counts[(cycle + row) % BLOCK], exact=exact)
    drafted_texts, drafted, accepted = decode_logits(backend, prompts, drafting=True)
    if exact:
        assert drafted_texts == texts
        assert set(accepted[0]) == set(range(BLOCK)), "some acceptance count was never forced"
    differing = 0
    for a, b in zip(plain, drafted, strict=True):
        length = min(len(a), len(b))
        differing += int((a[:length] != b[:length]).any(-1).sum())
    return differing


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_exact_logits_have_the_same_bits_with_and_without_drafting(implementation: str):
    assert differing_tokens(implementation, exact=True) == 0


def test_exact_logits_have_the_same_bits_in_a_ragged_batch():
    assert differing_tokens("sdpa", exact=True, num_rows=3) == 0


@pytest.mark.parametrize("variant", OTHERS)
def test_exact_holds_for_every_family(variant: str):
    assert differing_tokens("sdpa", exact=True, num_rows=2, variant=variant) == 0


def test_exact_holds_at_the_width_of_the_bundled_model():
    """Products of other sizes run other kernels."""
    assert differing_tokens("sdpa", exact=True, width=512) == 0


def test_exact_holds_without_packed_weights(monkeypatch):
    monkeypatch.setattr(packed, "MAX_BYTES", 0)
    assert differing_tokens("sdpa", exact=True) == 0


@pytest.mark.parametrize("variant", ["qwen3", *ONE_EACH])
def test_without_exact_some_bits_differ(variant: str):
    """The negative control: if this fails, the tests above prove nothing on this machine."""
    assert differing_tokens("sdpa", exact=False, variant=variant) > 0


def test_exact_rows_do_not_depend_on_the_batch():
    model = bf16_subject("sdpa")
    prompts = [random_prompt(9 + 30 * row, seed=row) for row in range(3)]
    _, together, _ = decode_logits(PortableBackend(model), prompts, drafting=True)
    for row, prompt in enumerate(prompts):
        _, alone, _ = decode_logits(PortableBackend(model), [prompt], drafting=True)
        assert torch.equal(alone[0], together[row]), f"row {row} has other bits in company"


def test_exact_coupled_sampling_writes_the_same_text():
    model = bf16_subject("sdpa")
    for seed in range(3):
        fields = dict(temperature=0.9, top_p=0.95, seed=seed)
        plain, _ = decode_all(
            Decoder(PortableBackend(model)), [request(random_prompt(7), 40, drafting=False, **fields)]
        )
        drafted, _ = decode_all(Decoder(PortableBackend(model)), [request(random_prompt(7), 40, **fields)])
        assert plain == drafted


def test_exact_is_the_default_in_low_precision_only():
    assert PortableBackend(bf16_subject("sdpa")).exact
    assert not PortableBackend(bf16_subject("sdpa"), exact=False).exact


class ReplayOfOtherShape(RiggedBackend):
    """Replays a preempted row's new tokens one by one instead of in the verify pass's shape."""

    def _replay_pass(self, row: Row, start: int) -> None:
        ids_11 = torch.tensor([row.tokens[start : start + 1]], device=self.device)
        self._run(ids_11, self._reach([row], 1, start + 1), "ar")
        self.cache.commit(row.index, 1)


def preempted_logits(backend: PortableBackend, prompt: list[int], steps: int | None) -> torch.Tensor:
    """The logits of a text whose row is preempted every so many steps. [NUM_NEW, V]."""
    decoder = Decoder(backend, block_size=BLOCK)
    records = [decoder.admit(request(prompt, NUM_NEW, logits=True))]
    while decoder.active:
        records += decoder.step()
        if steps and decoder.active and len(records) % steps == 0:
            decoder.preempt(0)
            assert 0 not in backend.cache and decoder.waiting == {0}
            while decoder.waiting:
                assert decoder.prefill(0, limit=8) is None, "a preempted row's first token was chosen again"
    return torch.cat([record.logits for record in records if record.logits is not None])


@pytest.mark.parametrize("steps", [1, 3])
def test_a_preempted_row_goes_on_with_the_same_bits(steps: int):
    model, prompt = bf16_subject("sdpa"), random_prompt(29)
    text = decode_all(Decoder(PortableBackend(model), block_size=BLOCK), [request(prompt, NUM_NEW)])[0][0]

    def backend(kind: type[RiggedBackend]) -> RiggedBackend:
        return kind(model, [prompt + text], lambda row, cycle: cycle % BLOCK, prefill_chunk=16)

    whole = preempted_logits(backend(RiggedBackend), prompt, None)
    assert torch.equal(preempted_logits(backend(RiggedBackend), prompt, steps), whole)
    assert not torch.equal(preempted_logits(backend(ReplayOfOtherShape), prompt, steps), whole), "the test sees nothing"
