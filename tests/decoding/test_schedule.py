"""`block_size="auto"`: what it estimates, what it chooses in simulated worlds, and that it changes no text."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from orthrus.decoding.costs import SHAPES, CostTable, PlaceCosts, Shape, ascending, distance, place_of
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.schedule import (
    FIRST_CREDIT,
    STOP_MARGIN,
    TRIAL_SHARE,
    Candidate,
    Choice,
    Experience,
    Schedule,
    auto_block_size,
    experience_of,
)
from orthrus.decoding.survival import MEMORY, PRIOR_RATE, STRENGTHS, PriorStrength, Survival, offered_widths
from tests.decoding.subjects import BLOCK, RiggedBackend, decode_all, random_prompt, request, stock_text, subject
from tests.decoding.test_exact import bf16_subject
from tests.decoding.worlds import (
    FIXED,
    MACHINES,
    RATES,
    TEXTS,
    Ahead,
    Fixed,
    Load,
    Machine,
    engine,
    judge,
    rounds,
    run,
    steady,
    switching,
)

WIDTHS = offered_widths(32)


# --- simulated worlds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["N 12.7", "N 8.5", "N 3.7", "N 1.3", "N 1.0", "300/300", "mixed"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("machine", ["gpu", "bf16 2.4", "fp32 9"])
def test_a_process_that_has_begun_loses_little_against_the_best_fixed_width(machine: str, rows: int, text: str):
    texts = TEXTS[text]
    load = Load(texts=texts, rows=rows, tokens=2000, is_open=len(texts) > 1)
    plain, best = judge(MACHINES[machine], load, seeds=4 if rows == 1 else 1).warm
    assert plain >= 0.97, f"{plain:.3f} of plain decoding"
    assert best >= 0.95, f"{best:.3f} of the best fixed width"


def engine_ratios(ahead: Ahead, rows: int, text: str, *, seeds: int) -> tuple[float, float]:
    """Speed over plain decoding's and over the best fixed width's, behind four rounds of learning: means over seeds."""
    machine, rate = engine(ahead), RATES[text]
    fixed = [rounds(Fixed(width), machine, rate, rows=rows, num_rounds=1, seed=0) for width in FIXED]
    ms = 0.0
    for seed in range(seeds):
        schedule = Schedule(Experience(32), device_type="cuda")
        ms += rounds(schedule, machine, rate, rows=rows, num_rounds=5, seed=seed) / seeds
    return fixed[0] / ms, min(fixed) / ms


@pytest.mark.parametrize("text", RATES)
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_widths_planned_ahead_lose_little_on_the_engine(rows: int, text: str):
    plain, best = engine_ratios("planned", rows, text, seeds=12 if rows < 64 else 4)
    assert plain >= 0.97, f"{plain:.3f} of plain decoding"
    assert best >= 0.95, f"{best:.3f} of the best fixed width"


class Restless(Fixed):
    """Widths that change."""

    def __init__(self, widths: list[int]):
        super().__init__(0)
        self._widths = itertools.cycle(widths)

    def choose(self, candidates: Sequence[Candidate], num_slots: int, *, running: Choice | None = None) -> Choice:
        return Choice(next(self._widths))


def test_without_a_plan_each_change_of_width_wastes_a_draft():
    """In the simulation as on the engine: only what two cycles agreed on is drafted ahead, and lost at a change."""
    machine, widths = engine("planned"), [15, 15, 15, 31]
    planned, guessed = (
        rounds(Restless(widths), engine(ahead), 0.885, rows=4, num_rounds=1, seed=0) for ahead in ("planned", "guessed")
    )
    of_four = 3 * machine.cycle_ms(4, 15) + machine.cycle_ms(4, 31)
    wasted = machine.draft_ms(4, 15) + 3 * machine.read_ms  # of four cycles one finds its draft made
    assert guessed / planned == pytest.approx((of_four + wasted) / of_four)


def test_nothing_is_tried_while_a_trial_runs():
    """Its result comes first, or a plan made meanwhile would repeat a trial that was lost."""
    experience = Experience(8)
    schedule = Schedule(experience)
    candidates = [Candidate(schedule.new_survival(), 100)]
    measured(experience.table.at(place_of(1, 300)), {0: 1.0, 3: 3.5, 7: 3.5})
    experience.credit = 100.0
    first = schedule.choose(candidates, 300)
    assert first.is_trial
    assert not schedule.choose(candidates, 300, running=first).is_trial
    assert schedule.choose(candidates, 300, running=schedule.choose(candidates, 300, running=first)).is_trial


@pytest.mark.parametrize("machine", ["gpu noisy", "bf16 noisy", "fp32 noisy"])
def test_noise_costs_little(machine: str):
    """Times that scatter by 20 %, 3 in 100 of them three times too long."""
    for text in ("N 8.5", "N 1.3"):
        plain, best = judge(MACHINES[machine], Load(texts=TEXTS[text], rows=4, tokens=2000), seeds=2).warm
        assert plain >= 0.97 and best >= 0.95, f"{text}: {plain:.3f} of plain decoding, {best:.3f} of the best width"


@pytest.mark.parametrize("rows", [1, 64])
def test_a_cold_process_loses_on_hopeless_text_what_its_credit_allows(rows: int):
    """The first credit, the share of all time, and a last trial that the credit did not quite cover."""
    machine, tokens, experience = MACHINES["gpu"], 400, Experience(32)
    load = Load(texts=[steady(0.0)], rows=rows, tokens=tokens)
    ms = run(Schedule(experience, device_type="cuda"), machine, load, seed=0)
    steps = ms * tokens * rows / machine.cycle_ms(rows, 0)
    assert experience.credit > -1
    assert steps - tokens <= FIRST_CREDIT + TRIAL_SHARE * tokens + 1


def drafted_at(machine: Machine, first: int, *, seed: int) -> tuple[list[int], int]:
    """Widths over a text that is hopeless for `first` tokens, then predictable; and the first cycle behind them."""
    widths: list[int] = []
    load = Load(texts=[switching(0.0, 0.9, first, 10**6)], rows=1, tokens=first + 1500)
    run(Schedule(Experience(32), device_type=machine.device_type), machine, load, seed=seed, widths=widths)
    return widths, first  # before, each cycle writes one token


@pytest.mark.parametrize("name", ["gpu", "bf16 2.4", "fp32 4"])
def test_text_that_becomes_predictable_is_drafted_again_in_time(name: str):
    """A trial, here of 3 or 7 drafts, loses what it takes longer than a plain step, and TRIAL_SHARE of the time pays
    for it; a fifth more for the hope that it might keep something. One that keeps what it drafted pays for the next;
    at a rate of 0.9 one in ten keeps nothing, and rarely two or three in a row: the wait is allowed three times."""
    machine = MACHINES[name]
    loss = machine.cycle_ms(1, 7) / machine.cycle_ms(1, 0) - 1
    wait = math.ceil(1.2 * loss / TRIAL_SHARE)
    for seed in range(5):
        widths, start = drafted_at(machine, 800, seed=seed)
        plain = [len(list(group)) for width, group in itertools.groupby(widths[300:start]) if not width]
        assert max(plain) <= wait, "no trial in time"
        drafting = next(i for i in range(start, len(widths)) if min(widths[i : i + 6]) > 0)
        assert drafting - start <= 3 * wait, f"{drafting - start} steps until drafting, {wait} between trials"


def test_a_short_hopeless_stretch_does_not_end_drafting_for_long():
    load = Load(texts=TEXTS["20/200"], rows=1, tokens=2000)
    plain, best = judge(MACHINES["gpu"], load, seeds=5).warm
    assert best >= 0.95, "the wait between trials does not begin short"


def test_a_new_process_does_not_try_what_its_device_cannot_do():
    """32 positions of each of 64 rows would take 13 plain steps on a GPU, 4 of one row 3 and 32 of it 18 on a CPU."""
    for device, rows, widest in (("cuda", 64, 7), ("cuda", 1, 31), ("cpu", 1, 7)):
        schedule = Schedule(Experience(32), device_type=device)
        candidates = [Candidate(schedule.new_survival(), 500) for _ in range(rows)]
        assert 0 < schedule.choose(candidates, 300).width <= widest


def test_equal_times_and_acceptance_give_equal_widths():
    found: list[list[int]] = [[], []]
    for widths in found:
        load = Load(texts=TEXTS["mixed"], rows=20, tokens=300)
        run(Schedule(Experience(32), device_type="cuda"), MACHINES["gpu noisy"], load, seed=5, widths=widths)
    assert len(set(found[0])) > 2
    assert found[0] == found[1]


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
        for width, tokens in zip(WIDTHS, found, strict=True):
            used = min(width, room)
            assert tokens == pytest.approx(1 + sum(math.prod(by_draft[:j]) for j in range(1, used + 1)))


def test_rates_count_only_drafts_behind_kept_ones():
    survival = Survival(8, memory=1.0)
    survival.enter(3, 3)  # all of a narrow block: nothing is said of drafts 3 ..
    survival.enter(7, 4)  # drafts 0 .. 3 kept, draft 4 lost: nothing is said of 5 and 6
    survival.enter(7, 0)
    survival.enter(1, 1)
    kept, reached = (3, 4, 1), (4, 4, 2)
    for strength in STRENGTHS:
        expected: list[float] = []
        for k, n in zip(kept, reached, strict=True):
            prior = (PRIOR_RATE + expected[-1]) / 2 if expected else PRIOR_RATE
            expected.append((k + strength * prior) / (n + strength))
        assert survival.rates(strength=strength) == pytest.approx(expected)


def test_old_evidence_fades_as_if_it_were_multiplied():
    survival, kept, reached = Survival(2, memory=0.5), 0.0, 0.0
    for accepted in [1, 0, 1, 1, 0] * 30:  # long enough for the unit to be renewed
        survival.enter(1, accepted)
        kept, reached = kept / 2 + accepted, reached / 2 + 1
    strength = STRENGTHS[1]
    assert survival.rates() == pytest.approx([(kept + strength * PRIOR_RATE) / (reached + strength)])


def test_a_new_row_starts_from_what_other_rows_kept():
    survival = Survival(8, memory=MEMORY)
    assert survival.expected_tokens(7, [0.0, 0.0, 0.0])[1:] == pytest.approx([1.0, 1.0])
    assert survival.expected_tokens(7, [1.0, 1.0, 1.0])[1:] == pytest.approx([4.0, 8.0])


def test_likelihood_is_the_product_over_drafts_that_were_reached():
    survival, prior = Survival(8, memory=MEMORY), [0.5, 0.6, 0.7]
    survival.enter(7, 5)
    a, b, c = survival.rates(prior, strength=2.0)
    for width, accepted, wanted in ((7, 0, 1 - a), (7, 2, a * b * (1 - b)), (7, 7, a * b**2 * c**4), (3, 3, a * b**2)):
        found = survival.log_likelihood(width, accepted, prior, strength=2.0)
        assert found == pytest.approx(math.log(wanted))


@pytest.mark.parametrize(("rates", "wanted"), [((0.5, 0.5), STRENGTHS[2]), ((0.95, 0.05), STRENGTHS[0])])
def test_how_much_rows_are_alike_is_learnt(rates: tuple[float, float], wanted: float):
    rng, strength, pool = random.Random(0), PriorStrength(), Survival(32, memory=0.995)
    rows = [Survival(32, memory=MEMORY) for _ in rates]
    assert strength.value == STRENGTHS[1]
    for _ in range(300):
        for row, rate in zip(rows, rates, strict=True):
            accepted = next((j for j in range(15) if rng.random() >= rate), 15)
            strength.enter(row, 15, accepted, pool.rates())
            row.enter(15, accepted)
            pool.enter(15, accepted)
    assert strength.value == wanted


def measured(costs: PlaceCosts, times: dict[int, float], *, rounds: int = 30, slow: float = 1.0) -> None:
    """Enter these times of widths again and again, in turn."""
    for _ in range(rounds):
        for width, ms in times.items():
            costs.enter(costs.widths.index(width), slow * ms)


def test_costs_are_those_that_were_measured():
    costs = PlaceCosts(1, WIDTHS, SHAPES["cpu"])
    times = {0: 5.0, 3: 9.0, 7: 30.0, 15: 31.0, 31: 50.0}
    measured(costs, times, rounds=60)
    assert costs.in_plain_steps() == pytest.approx([ms / 5.0 for ms in times.values()], rel=0.05)


def test_first_cycles_and_disturbed_ones_do_not_count():
    costs = PlaceCosts(1, WIDTHS, SHAPES["cpu"])
    measured(costs, {0: 500.0, 3: 900.0, 7: 3000.0}, rounds=2)  # compiled, then captured
    measured(costs, {0: 5.0, 3: 9.0, 7: 10.0})
    costs.enter(2, 300.0)
    assert costs.in_plain_steps()[:3] == pytest.approx([1.0, 1.8, 2.0], rel=0.1)


@pytest.mark.parametrize("slow", [1.3, 40.0])
def test_a_machine_that_is_slower_for_a_while_makes_no_width_dear(slow: float):
    costs = PlaceCosts(1, WIDTHS, SHAPES["cpu"])
    measured(costs, {0: 5.0, 3: 9.0})
    measured(costs, {3: 9.0}, rounds=30, slow=slow)
    assert costs.in_plain_steps()[1] == pytest.approx(1.8, rel=0.15), "the width in use was compared with faster times"


def test_a_width_that_was_disturbed_when_it_was_measured_is_found_out():
    costs = PlaceCosts(1, WIDTHS, SHAPES["cpu"])
    measured(costs, {0: 5.0, 3: 9.0})
    measured(costs, {7: 30.0}, rounds=6)
    assert costs.in_plain_steps()[2] > 2.5
    measured(costs, {0: 5.0, 7: 10.0}, rounds=20)
    assert costs.in_plain_steps()[2] == pytest.approx(2.0, rel=0.1)


def test_a_machine_that_stalls_for_seconds_leaves_no_trace():
    """It stalls in the middle, or from the first cycle on, and whatever width is the first to see it recover."""
    for calm, first in itertools.product((0, 30), (0, 3, 7)):
        costs, times = PlaceCosts(1, WIDTHS, SHAPES["cpu"]), {0: 5.0, 3: 9.0, 7: 12.0}
        measured(costs, times, rounds=calm)
        measured(costs, times, rounds=10, slow=40.0)
        measured(costs, {first: times[first]}, rounds=30)
        assert costs.in_plain_steps()[:3] == pytest.approx([1.0, 1.8, 2.4], rel=0.15), (calm, first)


@pytest.mark.parametrize(("free", "factor"), [(4.0, 2.0), (32.0, 1.6)])
def test_what_was_not_measured_follows_from_what_was(free: float, factor: float):
    costs, truth = PlaceCosts(1, WIDTHS, SHAPES["cpu"]), Shape(free, 1.0)
    times = {width: math.exp(truth.log_price(width + 1)) * (factor if width else 1.0) for width in WIDTHS}
    expected = PlaceCosts(1, WIDTHS, SHAPES["cpu"]).in_plain_steps()[-1]
    measured(costs, {width: times[width] for width in (0, 3, 7)})
    wanted = times[31] / times[0]
    assert abs(math.log(costs.in_plain_steps()[-1] / wanted)) < 0.3 * abs(math.log(expected / wanted))


def test_no_width_is_cheaper_than_a_narrower_one():
    costs = PlaceCosts(1, WIDTHS, SHAPES["cpu"])
    measured(costs, {0: 5.0, 3: 18.0, 7: 9.0, 15: 12.0})  # width 3 was disturbed throughout
    _, three, seven, fifteen, _ = costs.in_plain_steps()
    assert three == seven <= fifteen
    assert ascending([1.0, 4.0, 2.0, 3.0, 9.0], [1.0, 1.0, 3.0, 1.0, 1.0]) == [1.0, 2.5, 2.5, 3.0, 9.0]
    assert ascending([3.0, 2.0, 1.0], [1.0, 1.0, 1.0]) == [2.0, 2.0, 2.0]


def test_doubt_falls_with_times_and_grows_again_without():
    costs = PlaceCosts(1, WIDTHS, SHAPES["cpu"])
    unmeasured = costs.doubts()[2]
    measured(costs, {0: 5.0, 7: 10.0})
    fresh = costs.doubts()[2]
    measured(costs, {0: 5.0}, rounds=2000)
    assert fresh < unmeasured / 5
    assert 2 * fresh < costs.doubts()[2] < unmeasured


def test_a_new_place_starts_from_the_nearest():
    table = CostTable(WIDTHS)
    measured(table.at((0, 0)), {0: 5.0, 3: 9.0, 7: 10.0})
    measured(table.at((5, 0)), {0: 50.0, 3: 190.0, 7: 400.0})
    near, far = table.at((1, 1)).in_plain_steps(), table.at((4, 1)).in_plain_steps()
    assert near[1] < 2.5 < far[1]
    assert table.at((0, 0)).in_plain_steps()[1] == pytest.approx(1.8, rel=0.1), "the place itself has changed"


def test_places_are_doublings():
    assert [place_of(rows, 100)[0] for rows in (1, 2, 3, 4, 5, 64)] == [0, 1, 2, 2, 3, 6]
    assert [place_of(1, slots)[1] for slots in (0, 511, 512, 1023, 1024)] == [0, 0, 1, 1, 2]
    assert distance((0, 3), (2, 0)) == 5


def test_choosing_takes_all_rows_into_account():
    """One row that keeps everything among three that keep nothing: worth a cycle of 2 plain steps, not one of 5."""
    for cycle, drafts in ((2.0, True), (5.5, False)):
        experience = Experience(8)
        schedule = Schedule(experience)
        measured(experience.table.at(place_of(4, 300)), {0: 1.0, 3: cycle, 7: cycle})
        candidates = [Candidate(schedule.new_survival(), 100) for _ in range(4)]
        for _ in range(60):
            for i, candidate in enumerate(candidates):
                candidate.survival.enter(7, 7 if i == 0 else 0)
        experience.credit = -math.inf  # no trials
        assert (schedule.choose(candidates, 300).width > 0) == drafts


def test_rows_without_room_are_not_drafted_for():
    schedule = Schedule(Experience(8))
    assert schedule.choose([Candidate(schedule.new_survival(), 0)], 300).width == 0
    assert schedule.choose([Candidate(schedule.new_survival(), 9)], 300).width > 0, (
        "nothing would have been tried anyway"
    )


def test_credit_is_not_saved_up_without_end():
    experience = Experience(8)
    schedule = Schedule(experience)
    candidates = [Candidate(schedule.new_survival(), 100)]
    measured(experience.table.at(place_of(1, 300)), {0: 1.0, 3: 20.0, 7: 20.0})  # nothing can pay
    experience.credit = 0.0
    saved = []
    for _ in range(2):
        for _ in range(400):
            choice = schedule.choose(candidates, 300)
            assert choice.width == 0
            schedule.learn(choice, candidates, 300, [0], [0], 1.0)
        saved.append(experience.credit)
    assert 0 < saved[0] == saved[1]


def test_in_doubt_plain():
    experience = Experience(2)
    schedule = Schedule(experience)
    candidate = Candidate(schedule.new_survival(), 100)
    for _ in range(100):
        candidate.survival.enter(1, 1)
    tokens = candidate.survival.expected_tokens(1, experience.pool.rates())[1]
    for cost, width in ((tokens / STOP_MARGIN * 1.02, 0), (tokens / STOP_MARGIN * 0.98, 1)):
        experience.table = CostTable(experience.widths)
        experience.credit = -math.inf
        measured(experience.table.at(place_of(1, 300)), {0: 1.0, 1: cost}, rounds=200)
        assert schedule.choose([candidate], 300).width == width


# --- in the loop ---------------------------------------------------------------------------------------------------


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths that change with every cycle, whatever is best."""
    widths = itertools.cycle([3, 0, 7, 7, 0, 0, 3])
    monkeypatch.setattr(Schedule, "choose", lambda *args, running=None: Choice(next(widths)))


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

    def timed(self: PortableBackend, rows: list, **options: Any) -> object:
        cycle, width = run(self, rows, **options), max(row.width for row in rows)
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
