"""`block_size="auto"`: what it estimates, what it chooses in simulated processes, and that it changes no text."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from orthrus.decoding.decoder import Decoder
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.schedule import (
    MEMORY,
    PRIOR_CYCLES,
    PRIOR_RATE,
    PROBE_SHARE,
    STALE_CYCLES,
    Candidate,
    CostTable,
    Experience,
    Schedule,
    Survival,
    auto_block_size,
    experience_of,
    offered_widths,
    place_of,
)
from tests.decoding.subjects import BLOCK, RiggedBackend, decode_all, random_prompt, request, stock_text, subject
from tests.decoding.test_exact import bf16_subject

# Milliseconds of a cycle: the bundled model in exact bf16 and in fp32 on two CPU cores, and a GPU on which columns of
# a pass are next to free.
COSTS = {
    "cpu exact": {0: 6.7, 3: 12.0, 7: 12.8},
    "cpu fp32": {0: 7.0, 3: 16.0, 7: 24.0, 15: 40.0, 31: 75.0},
    "gpu": {0: 4.6, 3: 8.9, 7: 8.9, 15: 9.0, 31: 9.2},
}
Rate = Callable[[int], float]
"""rate(tokens written) -> how often a draft behind kept ones is kept."""


# --- simulated processes -------------------------------------------------------------------------------------------


@dataclass
class World:
    """Texts whose drafts are kept at a given rate, in cycles of given cost, noisy and sometimes disturbed."""

    costs: dict[int, float]
    rate: Rate
    rows: int = 1
    noise: float = 0.05
    seed: int = 0
    widths: list[int] = field(default_factory=list)
    """Of each cycle."""

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.experience = Experience(max(self.costs) + 1)
        self.schedule = Schedule(self.experience)
        self.written = 0
        """Tokens of a row, on average."""

    def expected(self, width: int) -> float:
        """E(w) as it truly is now."""
        return sum(self.rate(self.written) ** j for j in range(width + 1))

    def run(self, num_tokens: int, *, text: int = 256) -> tuple[float, float]:
        """Write so many tokens a row, in texts of this length: (true expected tokens, true cost) of all cycles.

        True values instead of drawn ones: what was decided on is noisy, what it was worth is not.
        """
        tokens = ms = 0.0
        left: list[int] = []
        survivals: list[Survival] = []
        target = self.written + num_tokens
        while self.written < target:
            if not any(left):
                left = [text] * self.rows
                survivals = [self.schedule.new_survival() for _ in left]
            candidates = [Candidate(survivals[i], left[i] - 1) for i in range(self.rows) if left[i]]
            width = self.schedule.choose(candidates, 300)
            widths = [min(width, candidate.room) for candidate in candidates]
            accepted = [self._keep(used) for used in widths]
            disturbed = 3 if self.random.random() < 0.02 * (self.noise > 0) else 1
            time = self.costs[width] * math.exp(self.random.gauss(0, self.noise)) * disturbed
            self.schedule.learn(candidates, 300, widths, accepted, time)
            tokens += sum(self.expected(width) for _ in widths)
            ms += self.costs[width]
            rows = [i for i in range(self.rows) if left[i]]
            for i, kept in zip(rows, accepted, strict=True):
                left[i] -= kept + 1
            self.written += (sum(accepted) + len(accepted)) // self.rows
            self.widths.append(width)
        return tokens, ms

    def _keep(self, width: int) -> int:
        rate = self.rate(self.written)
        return next((j for j in range(width) if self.random.random() >= rate), width)


def speed(world: World, num_tokens: int) -> float:
    tokens, ms = world.run(num_tokens)
    return tokens / ms


def best_fixed(world: World) -> float:
    """Tokens per millisecond of the best fixed width, in a world of one rate."""
    return max(world.expected(width) / ms for width, ms in world.costs.items())


@pytest.mark.parametrize("rate", [0.03, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("costs", COSTS)
def test_a_steady_process_loses_little_against_the_best_fixed_width(costs: str, rate: float):
    speeds = []
    for seed in range(3):
        world = World(COSTS[costs], lambda written: rate, seed=seed)
        world.run(512)
        speeds.append(speed(world, 2500))
    mean = sum(speeds) / len(speeds)
    assert mean >= 0.95 * best_fixed(world), "drafts too few or too many"
    assert mean >= 0.97 / COSTS[costs][0], "slower than plain decoding"


@pytest.mark.parametrize("rows", [4, 16])
def test_rows_of_a_batch_choose_together(rows: int):
    costs = {0: 10.0, 3: 30.0, 7: 45.0, 15: 80.0, 31: 150.0}
    for rate in (0.03, 0.9):
        world = World(costs, lambda written, rate=rate: rate, rows=rows)
        world.run(256)
        tokens, ms = world.run(1024)
        assert tokens / ms >= 0.95 * best_fixed(world), f"rate {rate}"


@pytest.mark.parametrize("period", [100, 300])
@pytest.mark.parametrize("costs", COSTS)
def test_regimes_that_switch_cost_nothing_against_plain_decoding(costs: str, period: int):
    world = World(COSTS[costs], lambda written: 0.9 if written // period % 2 else 0.05)
    world.run(2 * period)
    assert speed(world, 3000) >= 0.97 / COSTS[costs][0]


@pytest.mark.parametrize("costs", COSTS)
def test_text_that_becomes_predictable_is_drafted_again_within_the_stated_steps(costs: str):
    """A trial loses at most what it takes longer than a plain step, and PROBE_SHARE of the time pays for it; a tenth
    more is for what the last one lost beyond its estimate. At a rate of 0.9 a trial keeps all 3 drafts in 0.73 of
    cases, and one that does pays for the next: the wait is allowed three times."""
    plain, narrow = COSTS[costs][0], COSTS[costs][3]
    wait = math.ceil(1.1 * (narrow / plain - 1) / PROBE_SHARE)
    for seed in range(5):
        world = World(COSTS[costs], lambda written: 0.0 if written < 600 else 0.9, seed=seed, noise=0)
        world.run(600, text=10**6)
        start = len(world.widths)
        runs = [len(list(group)) for width, group in itertools.groupby(world.widths[100:]) if width == 0]
        assert max(runs) <= wait, "no trial in time"
        world.run(6 * wait, text=10**6)
        after = world.widths[start:]
        drafting = next(i for i in range(len(after)) if min(after[i : i + 8]) > 0)
        assert drafting <= 3 * wait, f"{drafting} steps until drafting, {wait} between trials"


@pytest.mark.parametrize("costs", COSTS)
def test_trials_lose_no_more_than_their_share(costs: str):
    world = World(COSTS[costs], lambda written: 0.0, noise=0)
    world.run(400)
    tokens, ms = world.run(2000)
    assert tokens / ms >= (1 - PROBE_SHARE) / COSTS[costs][0] * 0.999
    assert max(world.widths[-1500:]) > 0, "nothing was tried"


def test_a_width_that_was_disturbed_while_it_was_measured_is_measured_again():
    world = World(COSTS["cpu exact"], lambda written: 0.9, noise=0)
    world.run(300)
    place = place_of(1, 300)
    for _ in range(9):
        world.experience.table.enter(place, 7, 3 * world.costs[7])
    assert world.experience.table.costs(place)[7] == 3 * world.costs[7]
    world.run(1000)
    assert world.widths[-20:].count(7) > 10, "one bad minute, and width 7 is never tried again"


def test_equal_times_and_acceptance_give_equal_widths():
    a, b = (World(COSTS["gpu"], lambda written: 0.8, seed=5) for _ in range(2))
    a.run(1000)
    b.run(1000)
    assert a.widths == b.widths


# --- its parts -----------------------------------------------------------------------------------------------------


def test_offered_widths_end_with_the_block():
    assert offered_widths(32) == (0, 3, 7, 15, 31)
    assert offered_widths(8) == (0, 3, 7)
    assert offered_widths(6) == (0, 3, 5)
    assert offered_widths(2) == (0, 1)


def test_exact_passes_on_a_cpu_are_short():
    assert auto_block_size(32, exact=True, device_type="cpu") == 8
    assert auto_block_size(4, exact=True, device_type="cpu") == 4
    assert auto_block_size(32, exact=True, device_type="cuda") == 32
    assert auto_block_size(32, exact=False, device_type="cpu") == 32


def test_expected_tokens_are_the_sum_of_survival():
    survival = Survival(32, memory=MEMORY)
    for width, accepted in ((3, 3), (15, 9), (31, 2), (31, 31), (7, 0)):
        survival.enter(width, accepted)
    rates = survival.rates()
    by_draft = [rates[0], *[rates[1]] * 2, *[rates[2]] * 4, *[rates[3]] * 8, *[rates[4]] * 16]
    for room in (0, 1, 5, 31, 200):
        found = survival.expected_tokens(room)
        for width, tokens in zip(offered_widths(32), found, strict=True):
            used = min(width, room)
            assert tokens == pytest.approx(1 + sum(math.prod(by_draft[:j]) for j in range(1, used + 1)))


def test_rates_count_only_drafts_behind_kept_ones():
    survival = Survival(8, memory=1.0)
    survival.enter(3, 3)  # all of a narrow block: nothing is said of drafts 3 ..
    survival.enter(7, 4)  # drafts 0 .. 3 kept, draft 4 lost: nothing is said of 5 and 6
    survival.enter(7, 0)
    survival.enter(1, 1)
    kept, reached = (3, 4, 1), (4, 4, 2)
    expected: list[float] = []
    for k, n in zip(kept, reached, strict=True):
        prior = (PRIOR_RATE + expected[-1]) / 2 if expected else PRIOR_RATE
        expected.append((k + PRIOR_CYCLES * prior) / (n + PRIOR_CYCLES))
    assert survival.rates() == pytest.approx(expected)


def test_a_new_row_starts_from_what_other_rows_kept():
    survival = Survival(8, memory=MEMORY)
    assert survival.expected_tokens(7, [0.0, 0.0, 0.0])[1:] == pytest.approx([1.0, 1.0])
    assert survival.expected_tokens(7, [1.0, 1.0, 1.0])[1:] == pytest.approx([4.0, 8.0])


def measured(table: CostTable, place: tuple[int, int], times: dict[int, float]) -> None:
    for width, ms in times.items():
        for time in (100 * ms, ms, ms):  # the first is left out
            table.enter(place, width, time)


def test_costs_are_medians_without_the_first_time():
    table = CostTable(offered_widths(8))
    measured(table, (1, 0), {0: 5.0})
    assert table.costs((1, 0))[0] == 5.0
    for time in (6.0, 6.0, 500.0):
        table.enter((1, 0), 0, time)
    assert table.costs((1, 0))[0] == 6.0
    table.enter((1, 0), 5, 1.0)  # not offered
    assert set(table.costs((1, 0))) == {0, 3, 7}


def test_what_was_not_measured_is_taken_to_be_cheap_but_not_cheaper_than_narrower():
    table = CostTable(offered_widths(32))
    assert set(table.costs((1, 0)).values()) == {0.0}
    measured(table, (1, 0), {0: 5.0, 3: 9.0})
    assert table.costs((1, 0)) == {0: 5.0, 3: 9.0, 7: 9.0, 15: 9.0, 31: 9.0}
    measured(table, (1, 0), {7: 11.0})
    assert table.costs((1, 0)) == {0: 5.0, 3: 9.0, 7: 11.0, 15: 15.0, 31: 23.0}


def test_costs_of_another_place_are_carried_over_by_what_both_have():
    table = CostTable(offered_widths(8))
    measured(table, (1, 0), {0: 5.0, 3: 9.0, 7: 10.0})
    measured(table, (16, 0), {0: 50.0, 3: 90.0, 7: 200.0})
    measured(table, (2, 0), {3: 18.0})
    assert table.costs((2, 0)) == {0: 10.0, 3: 18.0, 7: 20.0}
    assert table.costs((3, 1)) == {0: 10.0, 3: 18.0, 7: 20.0}


def test_only_a_width_that_is_long_out_of_use_is_stale():
    table = CostTable(offered_widths(8))
    measured(table, (1, 0), {0: 1.0, 3: 1.0})
    for _ in range(STALE_CYCLES - 7):
        table.enter((1, 0), 3, 1.0)
    assert table.stalest((1, 0), 3) is None
    table.enter((1, 0), 3, 1.0)
    assert table.stalest((1, 0), 3) == 7, "never run, and the table is old enough"


# --- in the loop ---------------------------------------------------------------------------------------------------


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths that change with every cycle, whatever is best."""
    widths = itertools.cycle([3, 0, 7, 7, 0, 0, 3])
    monkeypatch.setattr(Schedule, "choose", lambda self, candidates, num_slots: next(widths))


@pytest.mark.usefixtures("restless")
def test_widths_never_change_the_text():
    prompts = [random_prompt(5 + 9 * row, seed=row) for row in range(3)]
    texts = [stock_text(prompt, 50) for prompt in prompts]
    truth = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    backend = RiggedBackend(subject(), truth, lambda row, cycle: (cycle + 3 * row) % BLOCK)
    found, records = decode_all(Decoder(backend, block_size="auto"), [request(prompt, 50) for prompt in prompts])
    assert found == texts
    assert {record.num_drafted for record in records} >= {0, 3, 7}


@pytest.mark.usefixtures("restless")
def test_widths_never_change_the_bits_of_exact_passes():
    model, prompt = bf16_subject("sdpa"), random_prompt(9)
    wanted = request(prompt, 60, logits=True)
    (text,), plain = decode_all(Decoder(PortableBackend(model)), [request(prompt, 60, logits=True, drafting=False)])
    backend = RiggedBackend(model, [prompt + text], lambda row, cycle: cycle % BLOCK)
    (found,), drafted = decode_all(Decoder(backend, block_size="auto"), [wanted])
    assert found == text
    logits = [torch.cat([r.logits for r in records if r.logits is not None]) for records in (plain, drafted)]
    assert torch.equal(*logits)


@pytest.mark.usefixtures("restless")
def test_coupled_text_does_not_depend_on_widths():
    fields = dict(temperature=0.9, seed=4)
    model, prompt = subject(), random_prompt(6)
    plain = decode_all(Decoder(PortableBackend(model)), [request(prompt, 40, drafting=False, **fields)])[0]
    assert decode_all(Decoder(PortableBackend(model), block_size="auto"), [request(prompt, 40, **fields)])[0] == plain


def test_the_loop_drafts_where_all_is_kept_and_not_where_nothing_is(monkeypatch: pytest.MonkeyPatch):
    """With times that do not depend on the machine: a plain step takes 4, a cycle 8 and a column 0.1 milliseconds."""
    run = PortableBackend.cycle

    def timed(self: PortableBackend, rows: list) -> object:
        cycle, width = run(self, rows), max(row.width for row in rows)
        cycle.draft_ms, cycle.verify_ms = 4.0 * (width > 0), 4.0 + 0.1 * width
        return cycle

    monkeypatch.setattr(PortableBackend, "cycle", timed)
    prompt = random_prompt(6)
    truth = [prompt + stock_text(prompt, 200)]
    for num_right, width in ((7, 7), (0, 0)):
        backend = RiggedBackend(subject(), truth, lambda row, cycle, right=num_right: right)
        monkeypatch.setattr(backend, "experience", Experience)
        decoder = Decoder(backend, block_size="auto")
        decode_all(decoder, [request(prompt, 200)])
        histogram = decoder.stats(0).width_histogram
        assert histogram[width] > 0.6 * sum(histogram), histogram
        assert histogram[0] == decoder.stats(0).num_plain_steps and len(histogram) == BLOCK
        assert sum(w * n for w, n in enumerate(histogram)) == decoder.stats(0).num_drafted


def test_what_is_known_of_a_model_outlives_a_call_but_not_the_model():
    model = subject()
    before = PortableBackend(model).experience(BLOCK)
    assert PortableBackend(model).experience(BLOCK) is before
    assert PortableBackend(model, exact=True).experience(BLOCK) is not before, "exact cycles take other times"
    assert experience_of(subject(seed=1), BLOCK) is not experience_of(model, BLOCK)


def test_generate_takes_auto_and_refuses_other_words():
    model, prompt = subject(), random_prompt(6)
    output, stats = model.generate(
        torch.tensor([prompt]), max_new_tokens=30, block_size="auto", return_stats=True, do_sample=False
    )
    assert output[0, 6:].tolist() == stock_text(prompt, 30)
    assert sum(stats.as_dict()["width_histogram"]) == stats.num_cycles + stats.num_plain_steps
    with pytest.raises(ValueError, match="'auto', got 'fast'"):
        model.generate(torch.tensor([prompt]), max_new_tokens=3, block_size="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fix a speculative text"):
        model.generate(
            torch.tensor([prompt]), max_new_tokens=3, block_size="auto", do_sample=True, seed=1,
            sampling_rule="speculative",
        )  # fmt: skip


def test_merged_histograms_add_up():
    decoder = Decoder(PortableBackend(subject()), block_size="auto")
    decode_all(decoder, [request(random_prompt(5), 20), request(random_prompt(9), 20)])
    merged = decoder.stats(0).merge(decoder.stats(1))
    assert merged.width_histogram[0] == merged.num_plain_steps
    assert sum(merged.width_histogram) == merged.num_cycles + merged.num_plain_steps
