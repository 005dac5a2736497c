"""Requests that come and go, through a scheduler: random workloads, what became of each request, and what must hold."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import RepetitionPenaltyLogitsProcessor

from orthrus.decoding.decoder import Decoder, Record, Request
from orthrus.decoding.stats import DecodingStats
from orthrus.engine.engine import EngineBackend
from orthrus.engine.kv import PageTables
from orthrus.engine.prefix import PrefixIndex
from orthrus.engine.scheduler import Scheduler
from tests.decoding.subjects import request

BlockSize = int | Literal["auto"]


@dataclass(frozen=True)
class Job:
    """A request that comes in a step and may be cancelled, some steps later or once it has written some tokens."""

    request: Request
    step: int = 0
    cancel_after: int | None = None
    cancel_at: int | None = None
    """New tokens."""

    def is_cancelled(self, step: int, num_new: int) -> bool:
        """Whether its client goes away before this step."""
        is_over = self.cancel_at is not None and num_new >= self.cancel_at
        return is_over or (self.cancel_after is not None and step == self.step + self.cancel_after)


class Run:
    """A workload through a scheduler: texts by job, and what was seen on the way."""

    def __init__(self, scheduler: Scheduler, jobs: Sequence[Job], *, max_steps: int = 5000):
        self.scheduler = scheduler
        self.ids: dict[int, int] = {}
        self.texts: dict[int, list[int]] = {}
        self.records: dict[int, list[Record]] = {}
        self.stats: dict[int, DecodingStats] = {}
        """Of those that were not cancelled."""
        self.cancelled: set[int] = set()
        self.first_records: list[int] = []
        pending = sorted(range(len(jobs)), key=lambda j: jobs[j].step)
        for step in range(max_steps):
            while pending and jobs[pending[0]].step <= step:
                job = pending.pop(0)
                self.ids[scheduler.submit(jobs[job].request)] = job
                self.texts[job], self.records[job] = [], []
            for number, job in self.ids.items():
                if jobs[job].is_cancelled(step, len(self.texts[job])) and scheduler.cancel(number):
                    self.cancelled.add(job)
            if scheduler.is_idle and not pending:
                return
            self._step()
        raise AssertionError("the scheduler does not come to an end")

    def _step(self) -> None:
        for number, record in self.scheduler.step().items():
            job = self.ids[number]
            assert job not in self.cancelled, "a cancelled request goes on"
            if not self.records[job]:
                self.first_records.append(number)
            self.texts[job] += record.token_ids
            self.records[job].append(record)
            if record.finish_reason is not None:
                self.stats[job] = self.scheduler.stats(number)
        assert not self.scheduler.failed, f"requests failed: {self.scheduler.failed}"

    def check(self, jobs: Sequence[Job], alone: Callable[[Request], list[int]]) -> None:
        """Each text is the one of the request alone, or the beginning of it where it was cancelled."""
        for job, text in self.texts.items():
            expected = alone(jobs[job].request)
            if job in self.cancelled:
                assert text == expected[: len(text)]
            else:
                assert text == expected, f"request {job} writes another text in company"
                assert self.records[job][-1].finish_reason is not None
        self.check_order()

    def check_order(self) -> None:
        """First tokens come in the order of submission."""
        assert self.first_records == sorted(self.first_records), "a request was served before an older one"

    def written(self, job: int) -> "Written":
        """What the scheduler made of a job."""
        return Written.of(self.records[job], self.stats.get(job))


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of a request."""

    tokens: list[int]
    logprobs: list[float]
    """Empty where they were not wanted."""
    finish_reason: str | None
    """None: it was cancelled."""
    stats: DecodingStats | None

    @classmethod
    def of(cls, records: Sequence[Record], stats: DecodingStats | None) -> "Written":
        return cls(
            tokens=[token for record in records for token in record.token_ids],
            logprobs=[p for record in records for p in record.logprobs or ()],
            finish_reason=records[-1].finish_reason if records else None,
            stats=stats,
        )


def written_alone(decoder: Decoder, r: Request) -> Written:
    """The request with nobody beside it, without a scheduler."""
    stream = decoder.stream(r)
    records = [next(stream)]
    stats = decoder.stats(records[0].row)
    return Written.of([*records, *stream], stats)


def check_pages(tables: PageTables, prefix: PrefixIndex | None) -> None:
    """All pages come home, and no row is left."""
    pool = tables.pool
    assert not tables._pages, f"rows are left in the cache: {sorted(tables._pages)}"
    assert pool.num_free + (0 if prefix is None else len(prefix)) == pool.num_pages, "a page leaked"
    if prefix is not None:
        assert prefix.num_reclaimable == len(prefix)
        prefix.clear()
    assert pool.num_free == pool.num_pages


# --- random requests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What the requests of a soak are drawn from."""

    text: Sequence[int]
    """Prompts are pieces of it."""
    stops: Sequence[int]
    """Some of them may end a request."""
    num_prompt: int
    """Tokens of a prompt, at most."""
    num_new: int
    """New tokens of a request, at most."""
    arrivals: float
    """Requests that come in a step, on average."""
    is_plain: bool = False
    """Greedy alone, without log-probabilities: the cycles that graphs decide by argmax."""
    has_speculative: bool = True
    """Whether some are sampled by rejection, whose text depends on the widths: not where they are chosen."""

    def jobs(self, num_jobs: int, seed: int) -> list[Job]:
        """Requests in order of arrival."""
        rng = random.Random(seed)
        shared = [self._piece(rng, self.num_prompt // 2) for _ in range(4)]
        jobs, step = [], 0.0
        for _ in range(num_jobs):
            step += rng.expovariate(self.arrivals)
            fields: dict[str, int] = {}
            if rng.random() < 0.25:
                fields[rng.choice(["cancel_after", "cancel_at"])] = rng.randint(0, self.num_new // 2)
            jobs.append(Job(self._request(rng, shared), int(step), **fields))
        return jobs

    def _piece(self, rng: random.Random, length: int) -> list[int]:
        start = rng.randrange(len(self.text) - length)
        return list(self.text[start : start + length])

    def _request(self, rng: random.Random, shared: Sequence[list[int]]) -> Request:
        # Half of them short as often as long: rows that grow beyond their prompts are what runs out of pages.
        length = rng.randint(1, self.num_prompt)
        if rng.random() < 0.5:
            length = int(self.num_prompt ** rng.random())
        prefix = rng.choice(shared) if rng.random() < 0.4 else []
        prompt = (prefix + self._piece(rng, max(length - len(prefix), 0)))[:length]
        fields: dict[str, Any] = dict(drafting=rng.random() < 0.85)
        if rng.random() < 0.3:
            fields["eos_token_ids"] = frozenset(rng.sample(list(self.stops), 2))
        if not self.is_plain:
            fields |= dict(logprobs=rng.random() < 0.25) | self._choice(rng)
            if rng.random() < 0.04:  # such rows are walked token by token, which costs
                fields["logits_processor"] = RepetitionPenaltyLogitsProcessor(rng.choice([1.1, 1.5]))
            if rng.random() < 0.04:
                fields["min_new_tokens"] = rng.randint(1, 8)
        return request(prompt, rng.randint(1, self.num_new), **fields)

    def _choice(self, rng: random.Random) -> dict[str, Any]:
        """Greedy, or a temperature with some filters."""
        if rng.random() < 0.35:
            return {}
        fields: dict[str, Any] = dict(temperature=rng.choice([0.3, 0.7, 1.0, 1.4]), seed=rng.randrange(2**40))
        if rng.random() < 0.3:
            fields["top_k"] = rng.randint(1, 50)
        if rng.random() < 0.3:
            fields["top_p"] = rng.uniform(0.3, 0.99)
        if rng.random() < 0.2:
            fields["min_p"] = rng.uniform(0.01, 0.2)
        if self.has_speculative and rng.random() < 0.25:
            fields["rule"] = "speculative"
        return fields


# --- the soak ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a scheduler may use. Pages are few enough where requests have to give way to each other."""

    num_pages: int
    page_slots: int
    max_rows: int
    step_tokens: int
    prefill_chunk: int


@dataclass(kw_only=True)
class Soaked:
    """What a soak went through, and compared."""

    num_requests: int
    num_cancelled: list[int] = field(default_factory=list)
    num_cut: list[int] = field(default_factory=list)
    """Those of them that had written something."""
    num_preemptions: list[int] = field(default_factory=list)
    num_evicted: list[int] = field(default_factory=list)
    num_reused: list[int] = field(default_factory=list)
    """Of the two schedules, like all lists here: pages given up, and tokens that were not computed again."""
    num_alone: int = 0
    num_tokens: int = 0
    """Compared with those of the request alone."""
    num_between: int = 0
    """Tokens compared between the two schedules."""
    tokens_per_cycle: list[float] = field(default_factory=list)
    """In company and alone, of drafted requests that were decoded alone too."""

    def check_hardness(self) -> None:
        """The first schedule's workload was one that shows something."""
        assert self.num_cancelled[0] > self.num_cut[0] > 0, f"none was cancelled in waiting, or in decoding: {self}"
        assert self.num_preemptions[0] > 0, f"nothing was preempted: {self}"
        assert self.num_reused[0] > 0 and self.num_evicted[0] > 0, f"no prefix was shared, or none was given up: {self}"


def soak(
    model: nn.Module,
    jobs: Sequence[Job],
    *,
    block_size: BlockSize,
    limits: Sequence[Limits],
    alone_every: int,
    logprob_gap: float = 0.0,
    engine: dict[str, Any] | None = None,
) -> Soaked:
    """Every request through two schedules of other limits, and every so many alone in an engine at batch 1.

    Cancelled requests are compared as far as they came. `logprob_gap`: how far apart log-probabilities may be, 0 where
    a row's bits are its own. `engine`: options of every backend.
    """
    options, found = engine or {}, Soaked(num_requests=len(jobs))
    runs = [in_company(model, jobs, block_size, limit, options, found) for limit in limits]
    for number, job in enumerate(jobs):
        first, *others = [run.written(number) for run in runs]
        for other in others:
            name = f"request {number} ({told(job.request)}), in two schedules"
            found.num_between += compare(first, other, name, logprob_gap)
    alone = decode_alone(model, jobs[::alone_every], None if block_size == "auto" else block_size, limits[0], options)
    drafted: list[tuple[DecodingStats, DecodingStats]] = []
    for number, by_itself in zip(range(0, len(jobs), alone_every), alone, strict=True):
        r, company = jobs[number].request, runs[0].written(number)
        for run in runs:
            name = f"request {number} ({told(r)}), in company and alone"
            found.num_tokens += compare(run.written(number), by_itself, name, logprob_gap)
        if r.drafting and company.stats is not None and by_itself.stats is not None:
            drafted.append((company.stats, by_itself.stats))
    found.num_alone = len(alone)
    found.tokens_per_cycle = [tokens_per_cycle(stats) for stats in zip(*drafted, strict=True)]
    in_both = found.tokens_per_cycle
    assert block_size == "auto" or in_both[0] >= in_both[1], (
        f"the view drafts worse in company: N {in_both[0]:.4f}, alone {in_both[1]:.4f}"
    )
    return found


def decode_alone(
    model: nn.Module, jobs: Sequence[Job], block_size: int | None, limits: Limits, options: dict[str, Any]
) -> list[Written]:
    """Each job's request at batch 1, in a new engine."""
    most = max(len(job.request.prompt_ids) + job.request.stopping.max_new_tokens for job in jobs)
    num_pages = (most + model.config.block_size) // limits.page_slots + 1
    backend = EngineBackend(model, num_pages=num_pages, page_slots=limits.page_slots, **options)
    decoder = Decoder(backend, block_size=block_size)
    found = [written_alone(decoder, job.request) for job in jobs]
    check_pages(backend.tables, None)
    return found


def in_company(
    model: nn.Module, jobs: Sequence[Job], block_size: BlockSize, limits: Limits, options: dict[str, Any], found: Soaked
) -> Run:
    """All jobs through one scheduler, and nothing left behind."""
    backend = EngineBackend(
        model, num_pages=limits.num_pages, page_slots=limits.page_slots, prefill_chunk=limits.prefill_chunk, **options
    )
    decoder, prefix = Decoder(backend, block_size=block_size), PrefixIndex(backend.pool, quantum=1)
    scheduler = Scheduler(
        decoder, tables=backend.tables, prefix=prefix, max_rows=limits.max_rows, step_tokens=limits.step_tokens,
        reuses_new_tokens=True,
    )  # fmt: skip
    run = Run(scheduler, jobs, max_steps=300 * len(jobs))
    run.check_order()
    assert not decoder._sequences, f"rows are left in the decoder: {sorted(decoder._sequences)}"
    check_pages(backend.tables, prefix)
    assert len(run.stats) + len(run.cancelled) == len(jobs), "a request neither ended nor was cancelled"
    found.num_cancelled.append(len(run.cancelled))
    found.num_cut.append(sum(bool(run.texts[job]) for job in run.cancelled))
    found.num_preemptions.append(scheduler.num_preemptions)
    found.num_evicted.append(prefix.stats.num_evicted)
    found.num_reused.append(prefix.stats.num_reused)
    return run


def compare(one: Written, other: Written, name: str, logprob_gap: float) -> int:
    """The same tokens, log-probabilities and end, as far as neither was cancelled. How many tokens were compared."""
    num_both = min(len(one.tokens), len(other.tokens))
    at = next((i for i in range(num_both) if one.tokens[i] != other.tokens[i]), num_both)
    assert at == num_both, f"{name}: new token {at} is {one.tokens[at]} and {other.tokens[at]}"
    num_logprobs = min(len(one.logprobs), len(other.logprobs))
    apart = [abs(p - q) for p, q in zip(one.logprobs[:num_logprobs], other.logprobs[:num_logprobs], strict=True)]
    assert max(apart, default=0.0) <= logprob_gap, f"{name}: log-probabilities are {max(apart)} apart"
    for shorter, longer in ((one, other), (other, one)):
        if len(shorter.tokens) < len(longer.tokens):
            assert shorter.finish_reason is None, f"{name}: ended after {len(shorter.tokens)} tokens, but goes on"
    if one.finish_reason is not None and other.finish_reason is not None:
        assert one.finish_reason == other.finish_reason, f"{name}: {one.finish_reason} and {other.finish_reason}"
        assert len(one.logprobs) == len(other.logprobs), f"{name}: log-probabilities are missing"
    return num_both


def told(r: Request) -> str:
    """A request in words."""
    sampling, parts = r.sampling, [f"{len(r.prompt_ids)} + {r.stopping.max_new_tokens} tokens"]
    parts.append(sampling.effective_rule if r.drafting else f"{sampling.effective_rule}, not drafted")
    if sampling.effective_rule != "greedy":
        parts.append(f"temperature {sampling.temperature} top_k {sampling.top_k} top_p {sampling.top_p:.3f}")
        parts.append(f"min_p {sampling.min_p:.3f}")
    if r.logits_processor is not None:
        parts.append("penalty")
    return ", ".join(parts)


def tokens_per_cycle(stats: Sequence[DecodingStats]) -> float:
    """N over all cycles of these requests."""
    return 1 + sum(s.num_accepted for s in stats) / max(sum(s.num_cycles for s in stats), 1)
