"""The loop: rows of any lengths, coming and going, each as if it were alone."""

import random

import pytest
import torch

from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.sampling import Sampling
from orthrus.decoding.stopping import StopCheck, Stopping
from tests.decoding.checks import check_drafts, chi_squared, law_of
from tests.decoding.subjects import (
    BLOCK,
    RiggedBackend,
    decode,
    decode_all,
    random_prompt,
    request,
    stock_text,
    subject,
)

SAMPLED = [
    dict(temperature=0.9, seed=5),
    dict(temperature=1.3, top_k=9, top_p=0.9, seed=6),
    dict(temperature=0.7, min_p=0.05, seed=7, rule="speculative"),
    dict(),
    dict(temperature=1.0, seed=2**80),
]


class Letters:
    """A tokenizer of one or two letters a token, so that strings straddle token edges."""

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join("ab" if i % 3 == 0 else "bc" if i % 3 == 1 else "d" for i in ids)


def test_row_of_batch_equals_row_alone():
    prompts = [random_prompt(length, seed=length) for length in (3, 17, 1, 9, 70)]
    requests = [request(p, 10 + 5 * i, **SAMPLED[i]) for i, p in enumerate(prompts)]
    together, records = decode_all(Decoder(PortableBackend(subject())), requests)
    for row, alone_request in enumerate(requests):
        alone, alone_records = decode_all(Decoder(PortableBackend(subject())), [alone_request])
        assert together[row] == alone[0], f"row {row} writes another text in company"
        of_row = [r for r in records if r.row == row]
        assert [r.draft_ids for r in of_row] == [r.draft_ids for r in alone_records], f"row {row} drafts otherwise"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("block_size", [2, 5, BLOCK])
def test_drafts_are_the_methods_formula(implementation: str, block_size: int):
    prompts = [random_prompt(length, seed=length) for length in (2, 11, 6)]
    check_drafts(subject(False, implementation), prompts, block_size)


def test_rows_come_and_go_at_any_time():
    rng = random.Random(0)
    prompts = {i: random_prompt(rng.randint(1, 40), seed=i) for i in range(12)}
    truth = {i: stock_text(p, 20) for i, p in prompts.items()}
    decoder, waiting = Decoder(PortableBackend(subject())), list(prompts)
    number_of, written, dropped = {}, {}, set()
    while waiting or decoder.active:
        if waiting and (not decoder.active or rng.random() < 0.5):
            number = waiting.pop()
            record = decoder.admit(request(prompts[number], 20))
            number_of[record.row] = number
            written[number] = list(record.token_ids)
        for record in decoder.step():
            written[number_of[record.row]].extend(record.token_ids)
            if record.finish_reason is not None and rng.random() < 0.7:
                decoder.release(record.row)
            elif record.finish_reason is None and rng.random() < 0.03:
                dropped.add(number_of[record.row])
                decoder.release(record.row)
    assert dropped, "the test never released an unfinished row"
    for number, text in written.items():
        expected = truth[number]
        assert text == (expected[: len(text)] if number in dropped else expected)


def test_the_cache_holds_the_tokens_before_the_anchor():
    decoder = Decoder(PortableBackend(subject()))
    decoder.admit(request(random_prompt(5), 20))
    decoder.step()
    decoder._backend.truncate(0, decoder._backend.length(0) - 1)
    with pytest.raises(AssertionError, match="before the anchor"):
        decoder.step()


@pytest.mark.parametrize("chunk", [1, 3, 64, 512])
def test_prefill_chunks_and_growth_change_nothing(chunk: int):
    prompt = random_prompt(130)
    expected = stock_text(prompt, 100)
    backend = PortableBackend(subject(), prefill_chunk=chunk)
    texts, _ = decode_all(Decoder(backend), [request(prompt, 100), request(prompt[:2], 10)])
    assert texts[0] == expected
    assert backend.cache.num_slots >= 229


def test_a_prompt_is_prefilled_in_parts_while_others_are_decoded():
    """Passes have fixed boundaries whatever the limits are, and a row that is not prefilled takes part in no cycle."""
    prompts = [random_prompt(length, seed=length) for length in (5, 43)]
    backend = PortableBackend(subject(), prefill_chunk=8)
    decoder = Decoder(backend)
    first, second = (decoder.begin(request(prompt, 20)) for prompt in prompts)
    assert decoder.waiting == {first, second} and not decoder.active and decoder.step() == []
    record = decoder.prefill(first)
    assert record is not None and decoder.active == {first}
    texts = {first: list(record.token_ids), second: []}
    chunks, run = [], backend._run
    backend._run = lambda ids_BT, reach, view: (
        chunks.append((reach.lengths, ids_BT.shape[1])) or run(ids_BT, reach, view)
    )
    passes = []
    for limit in (1, 8, 9, 3, 100):
        chunks.clear()
        record = decoder.prefill(second, limit=limit)
        passes += chunks
        assert (record is None) == (limit < 100)
        if record is not None:
            texts[second] += record.token_ids
        else:
            (cycle,) = decoder.step()
            texts[first] += cycle.token_ids
    assert passes == [([start], min(8, 43 - start)) for start in range(0, 43, 8)]
    while decoder.active:
        for cycle in decoder.step():
            texts[cycle.row] += cycle.token_ids
    assert list(texts.values()) == [stock_text(prompt, 20) for prompt in prompts]
    assert decoder.stats(second).num_prefills == 1 and decoder.stats(second).prefill_ms > 0


@pytest.mark.parametrize("fields", SAMPLED)
def test_a_preempted_row_writes_the_same_text(fields: dict):
    r = request(random_prompt(19), 30, **{**fields, "seed": fields.get("seed", 3)})
    expected = decode(subject(), r)
    decoder = Decoder(PortableBackend(subject(), prefill_chunk=8))
    row = decoder.begin(r)
    decoder.prefill(row, limit=1)
    decoder.preempt(row)  # in the midst of its prompt
    assert decoder.num_cached(row) == 0
    record = decoder.prefill(row)
    assert record is not None
    text = list(record.token_ids)
    while decoder.active:
        decoder.preempt(row)
        while decoder.waiting:
            assert decoder.prefill(row, limit=5) is None
        text += decoder.step()[0].token_ids
    assert text == expected
    assert decoder.stats(row).num_tokens == len(text) and decoder.stats(row).num_prefills == 1


def test_a_turn_of_a_chat_prefills_only_its_new_tokens():
    backend = PortableBackend(subject(), prefill_chunk=1)
    decoder = Decoder(backend)
    prompt = random_prompt(20)
    first = decoder.admit(request(prompt, 12))
    while decoder.active:
        decoder.step()
    longer = decoder.tokens(first.row) + random_prompt(6, seed=3)
    seen = []
    run = backend._run
    backend._run = lambda ids_BT, reach, view: seen.append(ids_BT.shape[1]) or run(ids_BT, reach, view)
    record = decoder.admit(request(longer, 15), reuse_row=first.row)
    assert record.row == first.row
    assert len(seen) == 7, f"the anchor and six new tokens, not {len(seen)}"
    text = list(record.token_ids)
    while decoder.active:
        text += [token for r in decoder.step() for token in r.token_ids]
    assert text == stock_text(longer, 15)
    with pytest.raises(ValueError, match="reuse_row"):
        decoder.admit(request(prompt, 5), reuse_row=99)


def test_reuse_keeps_only_what_both_share():
    decoder = Decoder(PortableBackend(subject()))
    prompt = random_prompt(20)
    row = decoder.admit(request(prompt, 1)).row
    other = prompt[:11] + random_prompt(5, seed=9)
    record = decoder.admit(request(other, 10), reuse_row=row)
    text = list(record.token_ids)
    while decoder.active:
        text += decoder.step()[0].token_ids
    assert text == stock_text(other, 10)
    same = decoder.admit(request(prompt[:5], 3), reuse_row=row)
    assert list(same.token_ids) == stock_text(prompt[:5], 1)


@pytest.mark.parametrize("seed", range(3))
def test_coupled_text_is_the_same_at_any_block_size(seed: int):
    """S1: with a seed, drafting changes nothing, not even the block size does."""
    fields = dict(temperature=1.1, top_k=20, seed=seed)
    expected = decode(subject(), request(random_prompt(6), 40, drafting=False, **fields))
    for block_size in range(2, BLOCK + 1):
        assert decode(subject(), request(random_prompt(6), 40, **fields), block_size=block_size) == expected
    assert expected != decode(subject(), request(random_prompt(6), 40, temperature=1.1, top_k=20, seed=seed + 100))


def test_without_a_seed_torch_decides():
    def sample() -> list[int]:
        return decode(subject(), request(random_prompt(6), 20, temperature=1.5))

    torch.manual_seed(1)
    first, second = sample(), sample()
    torch.manual_seed(1)
    assert [sample(), sample()] == [first, second]
    assert first != second


def test_a_coupled_drafter_that_is_the_model_is_always_right():
    """Where both views have one law, the shared noise makes the draft the AR sample."""
    model = subject()
    prompt = random_prompt(6)
    r = request(prompt, 30, temperature=1.0, seed=3)
    truth = prompt + decode(model, r)
    counts = [5, 0, 7, 2, 3, 1, 4, 6, 0, 0, 0, 0, 0]
    backend = RiggedBackend(model, [truth], lambda row, cycle: counts[cycle])
    texts, records = decode_all(Decoder(backend), [r])
    assert prompt + texts[0] == truth
    assert [record.num_accepted for record in records[1:6]] == counts[:5]


@pytest.mark.parametrize("rule", ["speculative", "coupled"])
@pytest.mark.parametrize("view", ["random", "copied"])
def test_sampled_tokens_have_the_ar_law(rule: str, view: str):
    """S0 through the real decoder: pairs (second, third) of new tokens against the AR view's exact law."""
    model = subject(seed=0)
    if view == "copied":
        model = subject(seed=7)
        model.init_view()
    prompt, temperature, num_rows = random_prompt(4), 1.6, 1000
    sampling = dict(temperature=temperature, top_k=4, rule=rule)
    prompt = prompt + stock_text(prompt, 1, seed=7 if view == "copied" else 0)
    counts = torch.zeros(61, 61, dtype=torch.float64)
    num_accepted = 0
    for start in range(0, num_rows, 250):
        decoder = Decoder(PortableBackend(model), block_size=4)
        requests = [request(prompt, 3, seed=s, **sampling) for s in range(start, start + 250)]
        texts, records = decode_all(decoder, requests)
        num_accepted += sum(record.num_accepted for record in records)
        for _, second, third in texts:
            counts[second, third] += 1
    assert num_accepted > 50, "nothing was accepted: the test says nothing about acceptance"
    assert chi_squared(counts.flatten(), pair_law(model, prompt, temperature)) < 4


def pair_law(model, prompt: list[int], temperature: float) -> torch.Tensor:
    """Law of the second and third new tokens under top-k 4, the first summed out. [61 * 61]."""

    def next_law(tokens: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(tokens)).logits[:, -1]
        kth = logits.topk(4).values[:, -1:]
        return law_of(logits.masked_fill(logits < kth, -torch.inf), temperature)

    law = torch.zeros(61, 61, dtype=torch.float64)
    first = next_law([prompt])[0]
    for a in first.nonzero()[:, 0].tolist():
        second = next_law([[*prompt, a]])[0]
        for b in second.nonzero()[:, 0].tolist():
            law[b] += first[a] * second[b] * next_law([[*prompt, a, b]])[0]
    return law.flatten()


def test_logprobs_are_the_ar_views():
    model, prompt = subject(), random_prompt(6)
    decoder = Decoder(PortableBackend(model))
    _, records = decode_all(decoder, [request(prompt, 20, logprobs=True, temperature=1.2, seed=0)])
    tokens = [token for record in records for token in record.token_ids]
    logprobs = [value for record in records for value in record.logprobs or ()]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_right", [0, 3, 7])
def test_stop_strings_end_inside_a_block(num_right: int):
    """Whatever the block holds, the row ends with the token that completes the string, text and cache alike."""
    prompt = random_prompt(6)
    truth = prompt + stock_text(prompt, 60)
    letters = Letters()
    for stop in ("bca", "dd", "abab", "cd", "babd"):
        ends = [n for n in range(1, 41) if stop in letters.decode(truth[6 : 6 + n])]
        backend = RiggedBackend(subject(), [truth], lambda row, cycle: num_right)
        decoder = Decoder(backend, tokenizer=letters)
        texts, records = decode_all(decoder, [request(prompt, 40, stop_strings=("zzz", stop))])
        length = ends[0] if ends else 40
        assert texts[0] == truth[6 : 6 + length]
        assert records[-1].finish_reason == ("stop" if ends else "length")
        assert backend.length(0) == 6 + length - 1


@pytest.mark.parametrize("num_right", [0, 2, 7])
def test_eos_cuts_text_cache_and_counts(num_right: int):
    prompt = random_prompt(6)
    truth = prompt + stock_text(prompt, 60)
    for position in range(7, 20):
        eos = truth[position]
        length = truth[6:].index(eos) + 1
        backend = RiggedBackend(subject(), [truth], lambda row, cycle: num_right)
        decoder = Decoder(backend)
        texts, records = decode_all(decoder, [request(prompt, 30, eos_token_ids=frozenset({eos, 59}))])
        cut = min(i + 1 for i, t in enumerate(truth[6:]) if t in (eos, 59))
        assert texts[0] == truth[6 : 6 + cut] and cut <= length
        assert backend.length(0) == 6 + cut - 1
        stats = decoder.stats(0)
        assert stats.num_tokens == cut
        assert stats.num_accepted == sum(r.num_accepted for r in records) <= cut


def test_min_new_tokens_keeps_eos_away():
    prompt = random_prompt(6)
    free = stock_text(prompt, 30)
    eos = frozenset(free[:5])
    for minimum in (3, 9):
        text = decode(subject(), request(prompt, 30, eos_token_ids=eos, min_new_tokens=minimum))
        plain = decode(subject(), request(prompt, 30, eos_token_ids=eos, min_new_tokens=minimum, drafting=False))
        assert text == plain
        assert len(text) > minimum - 1 and not eos & set(text[:minimum])


def test_criteria_see_each_committed_position_once():
    seen = []

    def criterion(ids, scores):
        seen.append(ids.shape[1])
        return torch.tensor([ids.shape[1] >= 19])

    prompt = random_prompt(6)
    truth = prompt + stock_text(prompt, 60)
    backend = RiggedBackend(subject(), [truth], lambda row, cycle: 5)
    texts, _ = decode_all(Decoder(backend), [request(prompt, 40, stopping_criteria=criterion)])
    assert texts[0] == truth[6:19]
    assert seen == list(range(7, 20))


def test_stop_check_takes_the_first_stop_of_any_kind():
    check = StopCheck(
        Stopping(max_new_tokens=6, eos_token_ids=frozenset({9})),
        num_prompt=2,
        criteria=lambda ids, scores: ids[:, -1] == 5,
    )
    assert check.cut([1, 1, 2, 3], 2) == (2, None)
    assert check.cut([1, 1, 2, 9, 5], 3) == (2, "stop")
    assert check.cut([1, 1, 2, 5, 9], 3) == (2, "stop")
    assert check.cut([1, 1, 2, 3, 3, 3, 3, 3, 9], 6) == (5, "length")
    assert check.cut([1, 1, 2, 3, 3, 3, 3, 9, 9], 2) == (1, "stop")


def test_stream_releases_its_row():
    backend = PortableBackend(subject())
    decoder = Decoder(backend)
    prompt = random_prompt(6)
    text = [token for record in decoder.stream(request(prompt, 15)) for token in record.token_ids]
    assert text == stock_text(prompt, 15)
    assert not decoder.active and 0 not in backend.cache
    for _ in decoder.stream(request(prompt, 15)):
        break
    assert not decoder.active


def test_a_failing_prefill_leaves_nothing_behind():
    def broken(ids, scores):
        raise RuntimeError("user's bug")

    decoder = Decoder(PortableBackend(subject()))
    with pytest.raises(RuntimeError, match="user's bug"):
        decoder.admit(request(random_prompt(5), 5, logits_processor=broken))
    assert not decoder.active
    assert decode_all(decoder, [request(random_prompt(5), 9)])[0][0] == stock_text(random_prompt(5), 9)


def test_a_processor_gets_each_committed_prefix_once_from_the_verifier():
    prompt = random_prompt(6)
    truth = prompt + stock_text(prompt, 60)
    calls = []

    def spy(ids, scores):
        calls.append(ids[0].tolist())
        return scores

    backend = RiggedBackend(subject(), [truth], lambda row, cycle: cycle % 4)
    backend_draft = backend._draft_logits
    texts, records = decode_all(Decoder(backend), [request(prompt, 20, logits_processor=spy)])
    assert texts[0] == truth[6:26] and backend_draft is not None
    drafted = sum(record.num_drafted for record in records)
    assert len(calls) == drafted + 20
    assert all(call == truth[: len(call)] for call in calls if call[6:] == truth[6 : len(call)])


def test_stats_add_up():
    prompt = random_prompt(6)
    truth = prompt + stock_text(prompt, 60)
    counts = [3, 0, 7, 1, 2, 2, 2, 2, 2]
    decoder = Decoder(RiggedBackend(subject(), [truth], lambda row, cycle: counts[cycle]))
    _, records = decode_all(decoder, [request(prompt, 22)])
    stats = decoder.stats(0)
    assert stats.num_tokens == 22 == sum(len(r.token_ids) for r in records)
    assert stats.num_cycles == sum(r.num_drafted > 0 for r in records)
    assert stats.acceptance_histogram[7] == 1
    assert sum(stats.accepted_per_position) == stats.num_accepted
    assert sum(stats.drafted_per_position) == stats.num_drafted
    assert stats.tokens_per_cycle == 1 + stats.num_accepted / stats.num_cycles
    forwards = 1 + 2 * stats.num_cycles + stats.num_plain_steps
    assert stats.tokens_per_forward == 22 / forwards
    twice = stats.merge(stats)
    assert twice.tokens_per_cycle == stats.tokens_per_cycle and twice.num_tokens == 44


def test_vllms_example_gives_vllms_numbers():
    from orthrus.decoding.stats import DecodingStats

    stats = DecodingStats(block_size=3)
    for accepted, times in ((0, 3), (1, 1), (2, 4)):
        for _ in range(times):
            stats.count_cycle(
                num_drafted=2, num_accepted=accepted, num_tokens=accepted + 1, draft_ms=1.0, verify_ms=2.0
            )
    named = stats.as_dict()
    assert named["acceptance_histogram"] == [3, 1, 4]
    assert (named["mean_acceptance_length"], named["draft_acceptance_rate"]) == (2.125, 0.5625)
    assert named["accepted_per_position"] == [5, 4]
    assert (named["draft_ms"], named["verify_ms"]) == (8.0, 16.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decoder(PortableBackend(subject()), block_size=9), "block_size must be 2 .. 8"),
        (lambda: Decoder(PortableBackend(subject()), block_size=1), "block_size"),
        (lambda: Stopping(max_new_tokens=0), "max_new_tokens"),
        (lambda: Stopping(max_new_tokens=1, stop_strings=("",)), "stop_strings"),
        (lambda: Decoder(PortableBackend(subject())).admit(request([], 5)), "prompt is empty"),
        (lambda: Decoder(PortableBackend(subject())).admit(request([1] * 256, 5)), "context is 256"),
        (lambda: Decoder(PortableBackend(subject())).admit(request([1], 5, stop_strings=("a",))), "tokenizer"),
        (lambda: Decoder(PortableBackend(subject())).release(0), "not admitted"),
        (lambda: PortableBackend(subject(), prefill_chunk=0), "prefill_chunk"),
    ],
)
def test_a_users_mistake_is_a_value_error(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_request_defaults_to_greedy_drafting():
    r = Request(prompt_ids=[1], stopping=Stopping(max_new_tokens=1))
    assert r.sampling == Sampling() and r.drafting
