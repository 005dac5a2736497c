"""The engine that a model keeps: built once, no larger than needed, no longer than its model, one call at a time."""

import copy
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList

from orthrus.decoding import backends
from orthrus.decoding.backends import DraftPrecision
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.engine import keeper
from orthrus.engine.engine import PAGE_SLOTS, page_bytes
from orthrus.engine.keeper import FIRST_TOKENS, KeptEngine, borrow
from orthrus.engine.quantise import quantise_rows
from orthrus.engine.weights import copies_bytes
from tests.decoding.subjects import random_prompt, request, stock_text, subject

PROMPT = random_prompt(9)
IDS = torch.tensor([PROMPT])


@pytest.fixture
def model() -> OrthrusForCausalLM:
    return copy.deepcopy(subject())


def write(model: OrthrusForCausalLM, max_new_tokens: int = 12, **settings) -> list[int]:
    """The engine's continuation of the prompt."""
    call: dict[str, Any] = {"max_new_tokens": max_new_tokens, "backend": "engine"} | settings
    output = model.generate(IDS, **call)
    return output[0, len(PROMPT) :].tolist()


def engine_of(model: OrthrusForCausalLM) -> KeptEngine | None:
    kept = keeper._keepers.get(model)
    return None if kept is None else kept.engine


def check_free(engine: KeptEngine | None) -> None:
    """All pages can be had by the next call."""
    assert engine is not None
    engine.begin_loan(8)
    assert engine.pool.num_free == engine.pool.num_pages


def test_one_engine_serves_all_calls_of_a_model(model: OrthrusForCausalLM):
    first = write(model)
    engine = engine_of(model)
    assert engine is not None and first == stock_text(PROMPT, 12)
    assert write(model, 30) == stock_text(PROMPT, 30) and engine_of(model) is engine
    assert write(model, prefill_chunk_size=4) == first and engine_of(model) is engine


def test_two_models_have_an_engine_each(model: OrthrusForCausalLM):
    other = copy.deepcopy(subject(seed=5))
    for _ in range(2):
        assert write(model) == stock_text(PROMPT, 12)
        assert write(other) == stock_text(PROMPT, 12, seed=5)
    assert engine_of(model) is not engine_of(other)


def test_pages_are_as_many_as_a_call_needed(model: OrthrusForCausalLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeper, "FIRST_TOKENS", PAGE_SLOTS)
    sizes = []
    for num_rows, num_new in ((1, 12), (1, 55), (1, 56), (3, 90), (3, 119), (4, 119), (1, 12)):
        output = model.generate(IDS.repeat(num_rows, 1), max_new_tokens=num_new, backend="engine")
        assert output[-1, 9:].tolist() == stock_text(PROMPT, num_new)
        engine = engine_of(model)
        assert engine is not None
        sizes.append(engine.pool.num_pages)
    # 21, 64 and 65 tokens; 3 rows of 99 and of 128, in pages of 64; 4 rows of 128 double it; nothing shrinks.
    assert sizes == [1, 1, 2, 6, 6, 12, 12]


def test_a_first_engine_is_large_enough_for_short_calls(model: OrthrusForCausalLM):
    write(model)
    engine = engine_of(model)
    assert engine is not None and engine.pool.num_pages * PAGE_SLOTS == FIRST_TOKENS


def test_cache_bytes_is_the_size_of_the_cache(model: OrthrusForCausalLM):
    each = page_bytes(model, PAGE_SLOTS)
    assert write(model, cache_bytes=3 * each + 5) == stock_text(PROMPT, 12)
    engine = engine_of(model)
    assert engine is not None and engine.pool.num_pages == 3
    assert write(model) and engine_of(model) is engine, "a call that fits takes what is there"
    with pytest.raises(ValueError, match=f"holds 64 tokens, these rows may need 128: give {2 * each}"):
        write(model, 100, cache_bytes=each)
    with pytest.raises(ValueError, match="cache_bytes=-1 holds 0 tokens"):
        write(model, cache_bytes=-1)


def test_memory_that_is_too_little_is_refused_or_taken_as_it_is(
    model: OrthrusForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(keeper, "free_pages", lambda model, more_bytes: 2)
    with pytest.raises(ValueError, match="may need 192 tokens of cache, the GPU's free memory holds 128"):
        write(model, 150)
    assert write(model, 100) == stock_text(PROMPT, 100), "pages for what it needs, no floor above the memory"
    loan = borrow(model, row_tokens=[256], is_elastic=True)
    assert loan.backend.pool.num_pages == 4, "what is there and what is free"
    loan.close()
    with pytest.raises(ValueError, match="may need 448 tokens of cache, the GPU's free memory holds 384"):
        borrow(model, row_tokens=[256, 129])
    check_free(engine_of(model))


def test_a_row_that_never_fits_is_a_users_mistake(model: OrthrusForCausalLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeper, "free_pages", lambda model, more_bytes: 1)
    with backends.choose_backend(model, wish="engine", row_tokens=[256], is_elastic=True) as chosen:
        decoder = Decoder(chosen.backend)
        with pytest.raises(ValueError, match="are 100 tokens, the engine's cache holds 64"):
            decoder.admit(request(PROMPT, 91))
        assert decoder.admit(request(PROMPT, 12)).token_ids


# What its drafts read


def precision_of(model: OrthrusForCausalLM) -> str | None:
    engine = engine_of(model)
    assert engine is not None
    return engine.weights.draft_precision


def test_another_precision_takes_the_place_of_the_engine_and_keeps_its_pages(
    model: OrthrusForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    write(model, 200)
    old, built = weakref.ref(engine_of(model)), []

    def build(*arguments: Any, **settings: Any) -> KeptEngine:
        built.append((old(), settings["num_pages"], settings["draft_precision"]))
        return KeptEngine(*arguments, **settings)

    monkeypatch.setattr(keeper, "KeptEngine", build)
    num_pages = FIRST_TOKENS // PAGE_SLOTS
    assert write(model, draft_precision="fp8") == stock_text(PROMPT, 12)
    assert built == [(None, num_pages, "fp8")], "the old engine's memory is there when the new one is built"
    assert write(model, 30, draft_precision="fp8") == stock_text(PROMPT, 30) and len(built) == 1
    assert write(model) == stock_text(PROMPT, 12) and built[1:] == [(None, num_pages, None)]


def test_a_call_without_drafts_takes_an_engine_of_any_precision(model: OrthrusForCausalLM):
    write(model, draft_precision="fp8")
    engine = engine_of(model)
    assert write(model, use_diffusion_mode=False) == stock_text(PROMPT, 12) and engine_of(model) is engine
    call: dict[str, Any] = {"input_ids": IDS.repeat(20, 1), "max_new_tokens": 240, "backend": "engine"}
    model.generate(**call, use_diffusion_mode=False)
    assert precision_of(model) is None, "an engine that is built anyway has no copy that nobody asked for"


def test_copies_are_counted_before_they_are_made(model: OrthrusForCausalLM, monkeypatch: pytest.MonkeyPatch):
    """On a GPU with so much free memory, pages are what the copies leave."""
    num_bytes = copies_bytes(model, "fp8")
    each = page_bytes(model, PAGE_SLOTS)
    asked = []

    def free_pages(model: torch.nn.Module, more_bytes: int) -> int:
        asked.append(more_bytes)
        return (2 * each - more_bytes) // each

    monkeypatch.setattr(keeper, "free_pages", free_pages)
    num_taken = -(-num_bytes // each)
    assert write(model, 100) == stock_text(PROMPT, 100) and asked == [0]
    with pytest.raises(ValueError, match=rf"holds {max(0, 4 - num_taken) * PAGE_SLOTS} beside {num_bytes} bytes of dr"):
        write(model, 240, draft_precision="fp8")
    assert asked == [0, num_bytes] and precision_of(model) is None, "a refusal leaves the engine as it was"
    monkeypatch.setattr(keeper, "free_pages", lambda model, more_bytes: -1)
    assert write(model, draft_precision="fp8") == stock_text(PROMPT, 12)
    engine = engine_of(model)
    assert engine is not None and engine.pool.num_pages == 1 and engine.weights.draft_bytes == num_bytes
    monkeypatch.setattr(keeper, "free_pages", free_pages)
    write(model, 100)
    assert asked[2:] == [-num_bytes], "what the copies give back is free"


def test_copies_follow_weights_that_are_edited(model: OrthrusForCausalLM):
    write(model, draft_precision="fp8")
    engine = engine_of(model)
    model.load_state_dict(subject(seed=5).state_dict())
    assert write(model, draft_precision="fp8") == stock_text(PROMPT, 12, seed=5)
    fresh = engine_of(model)
    assert fresh is not None and fresh is not engine
    copy_VD, scale_V = quantise_rows(model.lm_head.weight)
    head = fresh.weights.head["diffusion"]
    assert head.scale_E is not None and torch.equal(head.scale_E, scale_V)
    assert torch.equal(head.weight_ED.float(), copy_VD.float())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    write(model, draft_precision="fp8")
    assert engine_of(model) is not fresh
    write(model)
    plain = engine_of(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    write(model)
    assert engine_of(model) is plain, "without copies edits are seen as they are"


def test_widths_are_learnt_for_each_precision(model: OrthrusForCausalLM):
    experiences = []
    precisions: tuple[DraftPrecision | None, ...] = (None, "fp8", None)
    for precision in precisions:
        loan = borrow(model, row_tokens=[20], draft_precision=precision)
        experiences.append(loan.backend.experience(8))
        loan.close()
    assert experiences[0] is experiences[2] is not experiences[1]


# How long it lives


def test_the_engine_dies_with_its_model():
    model = copy.deepcopy(subject())
    write(model)
    engine = weakref.ref(engine_of(model))
    assert engine() is not None
    del model
    assert engine() is None, "something keeps pages alive that nobody can use"


def test_weights_that_are_moved_take_the_engine_with_them(model: OrthrusForCausalLM):
    write(model)
    engine = weakref.ref(engine_of(model))
    assert model.to("cpu") is model and engine() is not None, "nothing was moved"
    model.double()
    assert engine() is None, "the old weights are kept alive"
    assert write(model) == stock_text(PROMPT, 12)
    engine = engine_of(model)
    assert engine is not None and engine.passes.keys_LPSGH.dtype == torch.float64


def test_a_weight_that_is_replaced_is_seen(model: OrthrusForCausalLM):
    write(model)
    donor = copy.deepcopy(subject(seed=5))
    model.model.layers, model.model.embed_tokens = donor.model.layers, donor.model.embed_tokens
    model.model.norm, model.lm_head = donor.model.norm, donor.lm_head
    assert write(model) == stock_text(PROMPT, 12, seed=5)


def test_release_frees_and_the_next_call_builds_anew(model: OrthrusForCausalLM):
    model.release_engine()
    write(model)
    engine = weakref.ref(engine_of(model))
    model.release_engine()
    assert engine() is None
    assert write(model) == stock_text(PROMPT, 12)


def test_a_copy_of_the_model_has_no_engine_and_no_part_of_one(model: OrthrusForCausalLM, tmp_path):
    write(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert engine_of(twin) is None
        assert write(twin) == stock_text(PROMPT, 12) and engine_of(twin) is not engine_of(model)
    model.save_pretrained(tmp_path)
    saved = OrthrusForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in model.state_dict().items())
    portable = model.generate(IDS, max_new_tokens=12, backend="portable")
    assert portable[0, 9:].tolist() == stock_text(PROMPT, 12)


def test_a_call_under_inference_mode_leaves_a_model_that_can_be_trained(model: OrthrusForCausalLM):
    with torch.inference_mode():
        assert write(model) == stock_text(PROMPT, 12)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


# One call at a time


class Caller:
    """A streamer that does something while the engine decodes."""

    def __init__(self, act):
        self.act, self.num_puts = act, 0

    def put(self, value: torch.Tensor) -> None:
        self.num_puts += 1
        if self.num_puts == 3:
            self.act()

    def end(self) -> None:
        pass


def test_a_call_within_a_call_does_not_touch_the_engine(model: OrthrusForCausalLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "is_preferred", lambda model: True)
    inner = []

    def act() -> None:
        with pytest.raises(ValueError, match="in use by a call that this one is part of"):
            write(model)
        with pytest.raises(ValueError, match="is decoding"):
            model.release_engine()
        with pytest.warns(UserWarning, match="in use by a call"):
            inner.append(write(model, backend="auto"))

    assert write(model, 30, streamer=Caller(act)) == stock_text(PROMPT, 30)
    assert inner == [stock_text(PROMPT, 12)]


def test_threads_wait_for_one_another(model: OrthrusForCausalLM):
    began, texts, threads = threading.Event(), {}, []

    def act() -> None:
        for n in (20, 21):
            thread = threading.Thread(target=lambda n=n: (began.set(), texts.update({n: write(model, n)})))
            threads.append(thread)
            thread.start()
        assert began.wait(30)
        assert not texts

    assert write(model, 30, streamer=Caller(act)) == stock_text(PROMPT, 30)
    for thread in threads:
        thread.join(60)
    assert texts == {n: stock_text(PROMPT, n) for n in (20, 21)}


def test_no_call_leaves_a_row_behind(model: OrthrusForCausalLM):
    def interrupt(ids: torch.Tensor, scores: object) -> torch.Tensor:
        if len(ids[0]) > 15:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)

    size = 4 * page_bytes(model, PAGE_SLOTS)
    call: dict[str, Any] = {"input_ids": IDS.repeat(4, 1), "max_new_tokens": 20, "backend": "engine"}
    with pytest.raises(KeyboardInterrupt):
        model.generate(**call, cache_bytes=size, stopping_criteria=StoppingCriteriaList([interrupt]))
    assert write(model, 200, cache_bytes=size) == stock_text(PROMPT, 200)
    model.generate(**call)
    assert write(model, 200, cache_bytes=size) == stock_text(PROMPT, 200)


def test_a_hook_that_is_set_later_is_seen_before_anything_is_written(
    model: OrthrusForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backends, "is_preferred", lambda model: True)
    write(model)
    model.lm_head.register_forward_hook(lambda module, args, output: -output)
    with pytest.warns(UserWarning, match="lm_head has a hook"):
        text = write(model, backend="auto")
    assert text == write(model, backend="portable") != stock_text(PROMPT, 12)


def test_a_size_that_is_none_is_named(model: OrthrusForCausalLM):
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1"):
        borrow(model, row_tokens=[8], prefill_chunk=0)
