"""Continuous batching: whatever comes, goes and is preempted, each request's text is the one it has alone."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.engine.prefix import PrefixIndex
from orthrus.engine.scheduler import Scheduler
from tests.decoding.subjects import decode_all, random_prompt, request, subject
from tests.engine.paged import VOCABULARY, BudgetedBackend, FakeBackend
from tests.engine.workload import Job, Run, check_pages


def fake_alone(r: Request, *, is_invariant: bool, prefill_chunk: int = 8) -> list[int]:
    """The request's text from a decoder of its own, without scheduler, sharing or preemption."""
    backend = FakeBackend(400, is_invariant=is_invariant, prefill_chunk=prefill_chunk)
    decoder = Decoder(backend)
    row = decoder.begin(r)
    backend.tables.add(row)
    backend.tables.reserve(row, len(r.prompt_ids) + r.stopping.max_new_tokens + backend.max_block_size)
    record = decoder.prefill(row)
    assert record is not None
    text = list(record.token_ids)
    while decoder.active:
        text += decoder.step()[0].token_ids
    return text


SYSTEM = list(range(1, 20))
"""What many prompts begin with: two chunks and a bit."""

PROMPTS = st.builds(
    lambda shared, own, seed: SYSTEM[:shared] + [digest % VOCABULARY for digest in range(seed, seed + own)],
    shared=st.sampled_from([0, 4, 8, 16, 19]),
    own=st.integers(1, 25),
    seed=st.integers(0, 3),
)
JOBS = st.builds(
    lambda prompt, max_new, step, cancel_after, seed, eos, drafting: Job(
        request(
            prompt,
            max_new,
            eos_token_ids=frozenset(eos),
            drafting=drafting,
            **({} if seed is None else dict(temperature=1.0, seed=seed)),
        ),
        step,
        cancel_after,
    ),
    prompt=PROMPTS,
    max_new=st.integers(1, 30),
    step=st.integers(0, 15),
    cancel_after=st.none() | st.integers(0, 12),
    seed=st.none() | st.integers(0, 2),
    eos=st.sets(st.integers(0, VOCABULARY - 1), max_size=2),
    drafting=st.booleans(),
)


@settings(max_examples=120, deadline=None)
@given(
    jobs=st.lists(JOBS, min_size=1, max_size=10),
    num_pages=st.integers(20, 40),
    max_rows=st.integers(1, 6),
    step_tokens=st.integers(1, 60),
    reuse=st.booleans(),
    is_invariant=st.booleans(),
)
def test_every_text_is_the_one_of_the_request_alone(jobs, num_pages, max_rows, step_tokens, reuse, is_invariant):
    backend = FakeBackend(num_pages, is_invariant=is_invariant)
    prefix = PrefixIndex(backend.tables.pool, quantum=1 if is_invariant else 8) if reuse else None
    scheduler = Scheduler(
        Decoder(backend), tables=backend.tables, prefix=prefix, max_rows=max_rows, step_tokens=step_tokens,
        reuses_new_tokens=is_invariant,
    )  # fmt: skip
    run = Run(scheduler, jobs)
    run.check(jobs, lambda r: fake_alone(r, is_invariant=is_invariant))
    check_pages(backend.tables, prefix)


def soak_jobs(num_jobs: int, rng: random.Random) -> list[Job]:
    jobs = []
    for number in range(num_jobs):
        prompt = SYSTEM[: rng.choice([0, 8, 19])] + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 60))]
        fields = dict(temperature=1.0, seed=rng.randrange(5)) if rng.random() < 0.5 else {}
        cancel_after = rng.randint(0, 30) if rng.random() < 0.2 else None
        r = request(prompt, rng.randint(1, 60), eos_token_ids=frozenset([rng.randrange(VOCABULARY)]), **fields)
        jobs.append(Job(r, number // 3, cancel_after))
    return jobs


def test_soak():
    """Some hundred requests, many more than fit, cancelled and preempted: texts right, no page lost."""
    backend = FakeBackend(60, is_invariant=False)
    prefix = PrefixIndex(backend.tables.pool, quantum=8)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables, prefix=prefix, max_rows=8, step_tokens=64)
    jobs = soak_jobs(400, random.Random(0))
    run = Run(scheduler, jobs)
    run.check(jobs, lambda r: fake_alone(r, is_invariant=False))
    check_pages(backend.tables, prefix)
    assert len(run.cancelled) > 20 and scheduler.num_preemptions > 20, "the workload is too easy to show anything"
    assert prefix.stats.num_reused > 0 and prefix.stats.num_evicted > 0
    assert any(kind == "replay" for kind, _, _ in backend.passes)


def test_reuse_within_a_chunk_would_change_bits():
    """The negative control of `quantum`: where the pass decides the bits, sharing at any page boundary shows."""
    backend = FakeBackend(60, is_invariant=False)
    prefix = PrefixIndex(backend.tables.pool, quantum=1)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables, prefix=prefix)
    jobs = [Job(request(SYSTEM[:12] + [9] * (1 + 8 * s), 10)) for s in range(2)]
    run = Run(scheduler, jobs)
    assert run.texts[1] != fake_alone(jobs[1].request, is_invariant=False)


def test_a_long_prompt_does_not_hold_up_rows_in_decoding():
    """Each step is a cycle for every row, and a bounded number of prompt tokens."""
    backend = FakeBackend(200)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables, step_tokens=20)
    rows = [scheduler.submit(request(random_prompt(5), 200)) for _ in range(2)]
    scheduler.step()
    long = scheduler.submit(request(random_prompt(300), 3))
    for _ in range(-(-300 // 8)):
        before = len(backend.passes)
        records = scheduler.step()
        assert set(rows) <= set(records), "a decoding row waited for a prompt"
        passes = backend.passes[before:]
        prompt_tokens = sum(n for kind, _, n in passes if kind == "prefill")
        cycle_tokens = sum(n for kind, _, n in passes if kind == "cycle")
        assert prompt_tokens < max(20 - cycle_tokens, 1) + 8, "a step's prefill is not bounded"
        if long in records:
            return
        assert prompt_tokens > 0, "the prompt waits although the budget is never zero"
    raise AssertionError("the prompt was not finished within a pass a step")


def test_short_prompts_do_not_starve_a_long_one():
    """Whoever came first is admitted first, even when only shorter prompts would fit."""
    backend = FakeBackend(40)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables, step_tokens=16)
    for _ in range(4):
        scheduler.submit(request(random_prompt(6), 40))
    scheduler.step()
    long = scheduler.submit(request(random_prompt(100), 3))
    for _ in range(60):
        scheduler.submit(request(random_prompt(3), 10))
        records = scheduler.step()
        if long in records:
            return
        assert all(number < long for number in records), "a later request went first"
    raise AssertionError("the long prompt starves")


def test_the_youngest_gives_way_and_the_oldest_is_never_touched():
    backend = FakeBackend(16)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables, step_tokens=100)
    jobs = [Job(request(random_prompt(4, seed=s), 50)) for s in range(3)]
    run = Run(scheduler, jobs)
    run.check(jobs, lambda r: fake_alone(r, is_invariant=True))
    assert scheduler.num_preemptions > 0
    prefilled = Counter(row for kind, row, _ in backend.passes if kind == "prefill")
    assert prefilled[0] == 1, "the oldest was preempted"
    ends = [record.row for records in run.records.values() for record in records[-1:]]
    assert ends == [0, 1, 2]
    check_pages(backend.tables, None)


def test_a_preempted_request_waits_until_it_may_stay():
    """Room for its tokens alone is not enough while others grow, or each page they take would cost it a prefill."""
    backend = FakeBackend(24)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables, step_tokens=100)
    jobs = [Job(request(random_prompt(4, seed=s), 50, drafting=False)) for s in range(5)]
    Run(scheduler, jobs).check(jobs, lambda r: fake_alone(r, is_invariant=True))
    assert 0 < scheduler.num_preemptions <= 6, "8 where no page is left to spare for each row in decoding"


def test_a_busy_batch_does_not_hold_up_prompts():
    """Where the cycle alone takes more than the budget, one prefill pass is run all the same."""
    backend = FakeBackend(100)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables, step_tokens=1)
    for seed in range(2):
        scheduler.submit(request(random_prompt(3, seed), 100))
    scheduler.step()
    scheduler.step()
    prompt = scheduler.submit(request(random_prompt(16), 5))
    scheduler.step()
    assert prompt in scheduler.step(), "two passes in two steps cache two chunks"


def test_a_shared_beginning_is_computed_once():
    backend = FakeBackend(100)
    prefix = PrefixIndex(backend.tables.pool, quantum=1)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables, prefix=prefix, step_tokens=1000)
    prompts = [[*range(40), 50 - s, 3] for s in range(5)]
    scheduler_jobs = [Job(request(p, 4)) for p in prompts]
    run = Run(scheduler, scheduler_jobs)
    run.check(scheduler_jobs, lambda r: fake_alone(r, is_invariant=True))
    assert sum(n for kind, _, n in backend.passes if kind == "prefill") == 42 + 4 * 2
    assert prefix.stats.num_reused == 4 * 40
    check_pages(backend.tables, prefix)


@pytest.mark.parametrize("reuses_new_tokens", [True, False])
def test_the_next_turn_of_a_chat_finds_the_last_one(reuses_new_tokens: bool):
    backend = FakeBackend(100, is_invariant=reuses_new_tokens)
    prefix = PrefixIndex(backend.tables.pool, quantum=1 if reuses_new_tokens else 8)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables, prefix=prefix, reuses_new_tokens=reuses_new_tokens)
    first = request(random_prompt(20), 20)
    answer = Run(scheduler, [Job(first)]).texts[0]
    second = request([*first.prompt_ids, *answer, 7], 5)
    run = Run(scheduler, [Job(second)])
    run.check([Job(second)], lambda r: fake_alone(r, is_invariant=reuses_new_tokens))
    # 39 of 40 tokens were cached: nine pages are full. Otherwise two chunks of the first prompt are.
    assert prefix.stats.num_reused == (36 if reuses_new_tokens else 16)


def test_what_cannot_be_served_is_refused():
    backend = FakeBackend(10)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables)
    with pytest.raises(ValueError, match="are 41 tokens, the cache holds 40: ask for fewer"):
        scheduler.submit(request(random_prompt(5), 30))
    scheduler.submit(request(random_prompt(4), 30))
    with pytest.raises(ValueError, match="empty"):
        scheduler.submit(request([], 3))
    with pytest.raises(ValueError, match="step_tokens must be at least 1, got 0"):
        Scheduler(Decoder(backend), step_tokens=0)
    assert scheduler.num_waiting == 1


def test_a_failing_prefill_ends_its_own_request_alone():
    def broken(ids, scores):
        raise RuntimeError("user's bug")

    backend = FakeBackend(50)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables)
    good = scheduler.submit(request(random_prompt(5), 9))
    bad = scheduler.submit(request(random_prompt(7), 9, logits_processor=broken))
    other = scheduler.submit(request(random_prompt(3), 9))
    records = scheduler.step()
    assert set(records) == {good, other} and "user's bug" in str(scheduler.failed[bad])
    assert scheduler.step() and not scheduler.failed
    while not scheduler.is_idle:
        scheduler.step()
    check_pages(backend.tables, None)


def test_statistics_of_a_request_outlive_it_by_a_step():
    backend = FakeBackend(50)
    scheduler = Scheduler(Decoder(backend), tables=backend.tables)
    row = scheduler.submit(request(random_prompt(5), 9))
    num_tokens = 0
    while not scheduler.is_idle:
        num_tokens += sum(len(record.token_ids) for record in scheduler.step().values())
    assert scheduler.stats(row).num_tokens == num_tokens == 9
    assert not scheduler.cancel(row), "what is over cannot be cancelled"
    scheduler.step()
    with pytest.raises(KeyError):
        scheduler.stats(row)


# The real model

SAMPLED = [dict(), dict(temperature=0.9, seed=5), dict(temperature=1.2, top_k=9, seed=6, rule="speculative")]


def real_jobs(num_jobs: int) -> list[Job]:
    rng = random.Random(1)
    jobs = []
    for number in range(num_jobs):
        prompt = random_prompt(rng.randint(1, 25), seed=number)
        r = request(prompt, rng.randint(15, 30), drafting=number % 4 > 0, **SAMPLED[number % 3])
        jobs.append(Job(r, number // 3, 4 if number % 7 == 6 else None))
    return jobs


@pytest.mark.parametrize("has_budget", [True, False])
def test_portable_texts_equal_those_alone(has_budget: bool):
    backend = BudgetedBackend(subject(), 9, prefill_chunk=8) if has_budget else PortableBackend(subject())
    tables = backend.tables if isinstance(backend, BudgetedBackend) else None
    scheduler = Scheduler(Decoder(backend), tables=tables, max_rows=5, step_tokens=24)
    jobs = real_jobs(14)
    run = Run(scheduler, jobs)
    run.check(jobs, lambda r: decode_all(Decoder(PortableBackend(subject(), prefill_chunk=8)), [r])[0][0])
    assert run.cancelled and (not has_budget or scheduler.num_preemptions > 3)
    if isinstance(backend, BudgetedBackend):
        check_pages(backend.tables, None)
