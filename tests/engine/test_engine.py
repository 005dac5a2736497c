"""The engine as a backend of the one loop: what the portable backend writes, drafts and accepts, over pages.

In fp32 on a CPU, where the kernels' slow twins run: texts and drafts are compared, bits are the GPU's matter.
"""

import copy
import itertools
import random
from typing import Any

import pytest
import torch

from orthrus.decoding.decoder import Decoder, Record, Request
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.row import Row
from orthrus.decoding.sampling import Sampling
from orthrus.decoding.schedule import Choice, Schedule
from orthrus.engine.engine import EngineBackend, bucket, page_bytes
from orthrus.engine.kv import OutOfPages
from orthrus.engine.passes import Inputs, Passes, Shape
from orthrus.engine.prefix import PrefixIndex
from orthrus.engine.scheduler import Scheduler
from orthrus.environment import BUNDLED
from orthrus.model.checkpoint import load_tokenizer
from tests.decoding.checks import check_drafts
from tests.decoding.subjects import BLOCK, decode_all, random_prompt, request, stock, stock_text, subject
from tests.decoding.test_decoder import SAMPLED, Letters
from tests.families import VARIANTS
from tests.test_bundled import PROMPTS

SUPPORTED = [name for name in VARIANTS if name not in ("llama-bias", "mistral-dynamic")]
PAGE = 16
"""Small, so that every test crosses the edges of pages."""


def engine(variant: str = "qwen3", **options: Any) -> EngineBackend:
    """An engine over a copy of the subject, whose own parameters stay as they are."""
    settings: dict[str, Any] = {"num_pages": 200, "page_slots": PAGE} | options
    return EngineBackend(copy.deepcopy(subject(variant=variant)), **settings)


class Unwritable(list):
    """What the host knows of tables; noting that one was sent fails."""

    def __setitem__(self, *args):
        raise AssertionError("a table was sent again")


def told(records: list[Record]) -> list[tuple]:
    """What a record says of the text and of how it came about."""
    return [(r.row, r.token_ids, r.draft_ids, r.num_drafted, r.num_accepted, r.finish_reason) for r in records]


def check_same(backend: EngineBackend, requests: list[Request], *, variant: str = "qwen3", **options) -> list[Record]:
    """The engine's records are the portable backend's, and no page is left behind."""
    portable = PortableBackend(subject(variant=variant))
    texts, expected = decode_all(Decoder(portable, **options), requests)
    decoder = Decoder(backend, **options)
    found_texts, found = decode_all(decoder, requests)
    assert found_texts == texts, "another text than the portable backend's"
    assert told(found) == told(expected)
    for row in {record.row for record in found}:
        decoder.release(row)
    assert backend.pool.num_free == backend.pool.num_pages, "pages leaked"
    return found


@pytest.mark.parametrize("variant", SUPPORTED)
@pytest.mark.parametrize("lengths", [(5,), (3, 40), (1, 17, 70, 16, 15)])
def test_greedy_rows_are_the_portable_backends(variant: str, lengths: tuple[int, ...]):
    requests = [request(random_prompt(n, seed=n), 20 + 9 * i) for i, n in enumerate(lengths)]
    records = check_same(engine(variant), requests, variant=variant)
    assert any(record.num_drafted for record in records)


@pytest.mark.parametrize("block_size", [2, 5, BLOCK])
def test_drafting_and_plain_rows_share_a_batch(block_size: int):
    """Columns that a row does not fill are padding: another width, or none, in its neighbours changes nothing."""
    requests = [request(random_prompt(n, seed=n), 12 + 5 * n, drafting=n != 7) for n in (2, 7, 11)]
    check_same(engine(), requests, block_size=block_size)


def test_drafts_are_the_methods_formula(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.decoding.checks.PortableBackend", lambda model: engine())
    check_drafts(subject(), [random_prompt(length, seed=length) for length in (2, 31, 16)], BLOCK)


def test_sampled_rows_of_either_rule_are_the_portable_backends():
    requests = [request(random_prompt(n, seed=n), 25, **SAMPLED[i]) for i, n in enumerate((3, 17, 1, 9, 70))]
    check_same(engine(), requests)


def test_a_row_of_a_mixed_batch_equals_the_row_alone():
    prompts = [random_prompt(length, seed=length) for length in (3, 17, 1, 9, 70)]
    requests = [request(p, 10 + 5 * i, **SAMPLED[i]) for i, p in enumerate(prompts)]
    together, _ = decode_all(Decoder(engine()), requests)
    for row, alone in enumerate(requests):
        assert decode_all(Decoder(engine()), [alone])[0][0] == together[row], (
            f"row {row} writes another text in company"
        )


def test_processors_logprobs_and_logits_are_the_portable_backends():
    def forbid_even(ids, scores):
        scores = scores.clone()
        scores[:, (ids.shape[1] % 2) :: 2] -= 2.0
        return scores

    requests = [
        request(random_prompt(9), 20, logits_processor=forbid_even, logprobs=True),
        request(random_prompt(20, seed=1), 15, logits_processor=forbid_even, temperature=0.8, seed=3),
        request(random_prompt(4, seed=2), 25, logprobs=True, logits=True),
        request(random_prompt(33, seed=3), 25, logits=True, temperature=1.1, top_k=5, seed=1, rule="speculative"),
    ]
    _, expected = decode_all(Decoder(PortableBackend(subject())), requests)
    found = check_same(engine(), requests)
    for one, other in zip(found, expected, strict=True):
        for name in ("logprobs", "logits", "scores"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None), name
            if a is not None:  # fp32: sums of 32 to 48 products in another order
                torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drafting", [True, False])
def test_stops_cut_text_and_pages(drafting: bool):
    letters, prompt = Letters(), random_prompt(6)
    eos = frozenset(stock_text(prompt, 30)[17:19])
    requests = [
        request(prompt, 40, stop_strings=("zzz", "abab"), drafting=drafting),
        request(prompt, 40, eos_token_ids=eos, drafting=drafting),
        request(prompt, 40, eos_token_ids=eos, min_new_tokens=25, drafting=drafting),
        request(prompt, 40, stopping_criteria=lambda ids, scores: torch.tensor([ids.shape[1] >= 33])),
    ]
    check_same(engine(), requests, tokenizer=letters)


@pytest.mark.parametrize("variant", ["qwen3", "qwen2"])
def test_drafts_in_fp8_are_other_drafts_of_the_same_text(variant: str):
    requests = [request(random_prompt(n, seed=n), 40) for n in (3, 17, 40)]
    requests.append(request(random_prompt(9), 40, temperature=0.9, seed=4))
    texts, expected = decode_all(Decoder(engine(variant)), requests)
    found_texts, found = decode_all(Decoder(engine(variant, draft_precision="fp8")), requests)
    assert found_texts == texts, "a draft's precision reached the text"
    assert [r.draft_ids for r in found] != [r.draft_ids for r in expected], "drafts are not of fp8 copies"


def accepted_share(backend: EngineBackend, requests: list[Request]) -> tuple[float, list[list[int]]]:
    """Accepted drafts a cycle, and the texts."""
    texts, records = decode_all(Decoder(backend), requests)
    cycles = [record for record in records if record.num_drafted]
    return sum(record.num_accepted for record in cycles) / len(cycles), texts


@pytest.mark.parametrize("tied", [False, True])
def test_drafts_in_fp8_are_accepted_nearly_as_often(tied: bool):
    """Of a view that drafts as the AR view writes, over random weights, whose argmaxes lie close together."""
    model = copy.deepcopy(subject(tied))
    model.init_view()
    requests = [request(random_prompt(n, seed=n), 60) for n in (3, 17, 30, 5)]
    (expected, texts), (found, found_texts) = (
        accepted_share(EngineBackend(model, num_pages=200, page_slots=PAGE, draft_precision=precision), requests)
        for precision in (None, "fp8")
    )
    assert found_texts == texts
    assert expected > 0.4, "nothing is accepted that could be lost"
    assert found > 0.8 * expected, f"{found:.2f} drafts a cycle are accepted, {expected:.2f} without fp8"


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_chunks_change_nothing_and_end_at_fixed_places(chunk: int):
    prompt = random_prompt(130)
    backend = engine(prefill_chunk=chunk)
    seen = []
    run = backend.passes.run
    backend.passes.run = lambda view, inputs: seen.append(inputs.shape.num_columns) or run(view, inputs)
    decoder = Decoder(backend)
    first = decoder.admit(request(prompt, 1))
    assert seen == [chunk] * (130 // chunk) + [130 % chunk] * (130 % chunk > 0)
    assert list(first.token_ids) == stock_text(prompt, 1)
    seen.clear()
    decoder.admit(request(prompt[:100] + prompt, 1), reuse_row=first.row)
    if chunk == 64:
        assert seen == [28, 64, 38], "what is reused does not move the places where chunks end"


@pytest.mark.parametrize("num_shared", [1, 15, 16, 17, 40])
def test_a_row_begins_with_what_a_finished_one_cached(num_shared: int):
    backend = engine()
    decoder = Decoder(backend)
    row = decoder.admit(request(random_prompt(38), 12)).row
    while decoder.active:
        decoder.step()
    prompt = decoder.tokens(row)[:num_shared] + random_prompt(9, seed=5)
    record = decoder.admit(request(prompt, 30), reuse_row=row)
    text = list(record.token_ids)
    while decoder.active:
        text += decoder.step()[0].token_ids
    assert text == stock_text(prompt, 30)


@pytest.mark.parametrize("num_shared", [16, 32, 37])
def test_shared_pages_are_copied_before_they_are_written(num_shared: int):
    """Two rows over one prompt's pages go on differently, and the pages' first holder does not notice."""
    backend = engine()
    decoder = Decoder(backend)
    prompt = random_prompt(38)
    first = decoder.admit(request(prompt, 30))
    texts = {first.row: list(first.token_ids)}
    prompts = {first.row: prompt}
    for seed in (1, 2):
        other = prompt[:num_shared] + random_prompt(5, seed=seed)
        row = decoder.begin(request(other, 30))
        backend.tables.add(row)
        backend.tables.share(row, backend.tables.pages(first.row)[: -(-num_shared // PAGE)], num_shared)
        record = decoder.prefill(row)
        assert record is not None
        texts[row], prompts[row] = list(record.token_ids), other
    while decoder.active:
        for record in decoder.step():
            texts[record.row] += record.token_ids
    for row, text in texts.items():
        assert text == stock_text(prompts[row], 30), f"row {row}: a page was written that another row reads"


def test_rows_come_and_go_and_leave_no_page():
    rng = random.Random(0)
    prompts = {i: random_prompt(rng.randint(1, 60), seed=i) for i in range(12)}
    truth = {i: stock_text(p, 20) for i, p in prompts.items()}
    backend = engine()
    decoder, waiting = Decoder(backend), list(prompts)
    number_of, written, dropped = {}, {}, set()
    while waiting or decoder.active:
        if waiting and (not decoder.active or rng.random() < 0.5):
            number = waiting.pop()
            record = decoder.admit(request(prompts[number], 20))
            number_of[record.row], written[number] = number, list(record.token_ids)
        for record in decoder.step():
            number = number_of[record.row]
            written[number] += record.token_ids
            if record.finish_reason is not None:
                decoder.release(record.row)
            elif rng.random() < 0.05:
                dropped.add(number)
                decoder.release(record.row)
    assert dropped, "the test never released an unfinished row"
    for number, text in written.items():
        assert text == (truth[number][: len(text)] if number in dropped else truth[number])
    assert backend.pool.num_free == backend.pool.num_pages


@pytest.mark.parametrize("limit", [1, 20, 33])
def test_a_preempted_row_goes_on_where_it_was(limit: int):
    backend = engine(prefill_chunk=32)
    decoder = Decoder(backend)
    prompts = [random_prompt(40), random_prompt(9, seed=1)]
    texts = {record.row: list(record.token_ids) for record in (decoder.admit(request(p, 50)) for p in prompts)}
    num_steps = 0
    while decoder.active:
        for record in decoder.step():
            texts[record.row] += record.token_ids
        num_steps += 1
        if num_steps % 5 == 2 and 0 in decoder.active:
            decoder.preempt(0)
            assert backend.length(0) == 0 and 0 not in backend.tables
            while 0 in decoder.waiting:
                before = backend.length(0)
                assert decoder.prefill(0, limit=limit) is None
                assert backend.length(0) - before <= 32 * (1 + (limit - 1) // 32) + 31
    for row, prompt in enumerate(prompts):
        assert texts[row] == stock_text(prompt, 50)


def test_the_scheduler_over_few_pages_writes_what_each_request_alone_would():
    """Shared beginnings, preemption and chunks at once, over the engine's pages."""
    backend = engine(num_pages=10, prefill_chunk=32)
    prefix = PrefixIndex(backend.pool, quantum=PAGE)
    scheduler = Scheduler(
        Decoder(backend), tables=backend.tables, prefix=prefix, max_rows=5, step_tokens=64, reuses_new_tokens=True
    )
    system = random_prompt(37)
    prompts = [system[: 37 - 7 * (i % 3)] + random_prompt(3 + 5 * (i % 4), seed=i) for i in range(12)]
    ids = [scheduler.submit(request(prompt, 30 + 8 * (i % 6))) for i, prompt in enumerate(prompts)]
    texts = {id_: [] for id_ in ids}
    while not scheduler.is_idle:
        for id_, record in scheduler.step().items():
            texts[id_] += record.token_ids
    for i, prompt in enumerate(prompts):
        assert texts[ids[i]] == stock_text(prompt, 30 + 8 * (i % 6))
    assert scheduler.num_preemptions > 0 and prefix.stats.num_reused > 0
    prefix.clear()
    assert backend.pool.num_free == backend.pool.num_pages


@torch.inference_mode()
def test_what_lies_behind_a_length_is_never_read():
    """Drafts, rejected tokens, padding and free pages leave garbage; make it as bad as finite numbers go."""
    prompts = [random_prompt(5), random_prompt(23, seed=1), random_prompt(48, seed=2)]
    backend = engine()
    decoder = Decoder(backend)
    texts = {}
    for i, prompt in enumerate(prompts):
        record = decoder.admit(request(prompt, 30 + i))
        texts[record.row] = list(record.token_ids)
    while decoder.active:
        is_real = torch.zeros(201, PAGE, dtype=torch.bool)
        for row in texts:
            for slot in range(backend.length(row)):
                is_real[backend.tables.pages(row)[slot // PAGE], slot % PAGE] = True
        for pool in (backend.passes.keys_LPSGH, backend.passes.values_LPSGH):
            pool[:, ~is_real] = 1e4
        for record in decoder.step():
            texts[record.row] += record.token_ids
    for i, prompt in enumerate(prompts):
        assert texts[i] == stock_text(prompt, 30 + i)


def test_a_draft_leaves_no_trace_in_the_pages():
    backend = engine()
    decoder = Decoder(backend)
    decoder.admit(request(random_prompt(21), 20))
    before = backend.passes.keys_LPSGH.clone()
    draft = backend.passes.draft

    def checked(inputs: Inputs) -> None:
        draft(inputs)
        assert torch.equal(backend.passes.keys_LPSGH, before), "the draft pass wrote into pages that others may see"

    backend.passes.draft = checked
    decoder.step()


def test_an_unchanged_batch_is_not_sent_again():
    """Anchors and lengths move on the device; the host sends pages when a row gets one, and widths at the end."""
    backend = engine(page_slots=256)
    decoder = Decoder(backend)
    for n in (5, 9, 11):
        decoder.admit(request(random_prompt(n), 60))
    decoder.step()
    (inputs,) = backend._inputs.values()
    numbers = inputs._numbers_3B
    inputs._numbers_3B = torch.empty(0)  # a copy into it would fail
    inputs._pages = Unwritable(inputs._pages)
    decoder.step()
    for row in range(3):
        assert int(numbers[0, row]) == decoder.tokens(row)[-1]
        assert int(numbers[1, row]) == backend.length(row)
    assert numbers[:, 3].tolist() == [0, 0, -1], "the padding row moved"


@pytest.mark.parametrize("lengths", [(30,), (30, 5, 17)])
def test_looking_ahead_changes_nothing_and_drafts_each_cycle_once(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    backend = engine(looks_ahead=True)
    drafts = count_drafts(backend, monkeypatch)
    records = check_same(backend, [request(random_prompt(n, n), 60) for n in lengths])
    num_cycles = max(sum(r.row == row and r.num_drafted > 0 for r in records) for row in range(len(lengths)))
    assert len(drafts) == num_cycles, "a draft was thrown away"


def test_nothing_is_drafted_ahead_for_a_row_that_may_be_at_its_end(monkeypatch: pytest.MonkeyPatch):
    """Where all drafts are kept, the last cycle is the one that could be."""
    backend = engine(looks_ahead=True)
    drafts = count_drafts(backend, monkeypatch)
    monkeypatch.setattr(backend.passes, "accept", lambda inputs, targets_BW: (inputs.widths_B.clamp(min=0), targets_BW))
    decoder = Decoder(backend, block_size=4)
    decoder.admit(request(random_prompt(9), 1 + 3 * 4))
    num_cycles = 0
    while decoder.active:
        decoder.step()
        num_cycles += 1
    assert len(drafts) == num_cycles == 3


def count_drafts(backend: EngineBackend, monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The shapes of its draft passes, as they come."""
    shapes: list[Shape] = []
    draft = backend.passes.draft
    monkeypatch.setattr(backend.passes, "draft", lambda inputs: shapes.append(inputs.shape) or draft(inputs))
    return shapes


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_change_of_width_that_was_planned_wastes_no_draft(num_rows: int, monkeypatch: pytest.MonkeyPatch):
    """Plain steps between, blocks of 2, 4 and 8 columns, two widths of one shape, tables that grow."""
    widths = [3, 0, 7, 7, 0, 0, 5, 6, 1, 2, 7, 3]
    found = []
    for looks_ahead in (True, False):
        backend = engine(looks_ahead=looks_ahead)
        drafts, plan = count_drafts(backend, monkeypatch), itertools.cycle(widths)
        monkeypatch.setattr(Schedule, "choose", lambda *args, running=None, plan=plan: Choice(next(plan)))
        decoder = Decoder(backend, block_size="auto")
        for row in range(num_rows):
            decoder.admit(request(random_prompt(20 + 17 * row, row), 200))
        records = [record for _ in range(36) for record in decoder.step()]
        cycles = [record.num_drafted for record in records[::num_rows]]
        assert cycles == 3 * widths
        num_ahead = 1 if looks_ahead else 0
        assert len(drafts) == sum(width > 0 for width in cycles) + num_ahead, "a draft was thrown away"
        assert {shape.num_columns for shape in drafts} == {2, 4, 8}
        found.append([(record.row, record.token_ids, record.draft_ids) for record in records])
    assert found[0] == found[1], "what is drafted ahead is another draft, of another past"


def test_what_was_drafted_ahead_is_not_taken_for_another_row():
    """A row that takes over page, length, anchor and width of the one that was drafted for, but not its text."""
    backend = engine(looks_ahead=True, page_slots=256)
    first = row_of(random_prompt(20, 1))
    first.tokens += backend.prefill(first).outcomes[0].tokens
    for _ in range(3):
        first.tokens += backend.cycle([first]).outcomes[0].tokens
    assert backend._ahead is not None
    anchor, length = first.tokens[-1], backend.length(0)
    backend.release(0)
    drafts = []
    for each in (backend, engine(looks_ahead=False, page_slots=256)):
        row = row_of(random_prompt(length, 2))
        each.prefill(row)
        row.tokens.append(anchor)
        drafts.append(each.cycle([row]).outcomes[0].drafts)
    assert drafts[0] == drafts[1]


def test_what_was_drafted_ahead_outlives_the_prefill_and_the_end_of_others(monkeypatch: pytest.MonkeyPatch):
    """A long prompt that is prefilled between cycles, and a row that goes, cost the rows in decoding no draft."""
    backend = engine(looks_ahead=True, prefill_chunk=16)
    decoder = Decoder(backend)
    other = decoder.admit(request(random_prompt(5, 3), 1)).row
    prompt = random_prompt(20)
    text = list(decoder.admit(request(prompt, 80)).token_ids)
    drafts = []
    draft = backend.passes.draft
    monkeypatch.setattr(backend.passes, "draft", lambda inputs: drafts.append(inputs.shape) or draft(inputs))
    late = decoder.begin(request(random_prompt(200, 1), 4))
    num_cycles = 0
    while decoder.num_cached(late) < 160:
        text += decoder.step()[0].token_ids
        num_cycles += 1
        assert decoder.prefill(late, limit=16) is None
        if num_cycles == 3:
            decoder.release(other)
    assert num_cycles == 10
    assert len(drafts) == num_cycles + 1, f"{len(drafts)} drafts in {num_cycles} cycles and one ahead"
    while decoder.active:
        text += decoder.step()[0].token_ids
    assert text == stock_text(prompt, 80)


def test_what_was_drafted_ahead_is_not_taken_for_a_row_in_another_place():
    """Two rows that have the same anchor, length and width by chance, asked for in another order."""
    for seed in range(400):
        backend = engine(looks_ahead=True)
        rows = [row_of(random_prompt(12, 2 * seed + i), index=i, width=1) for i in range(2)]
        for row in rows:
            row.tokens += backend.prefill(row).outcomes[0].tokens
        for _ in range(2):
            for row, outcome in zip(rows, backend.cycle(rows).outcomes, strict=True):
                row.tokens += outcome.tokens
        same = [(row.tokens[-1], row.num_cached) for row in rows]
        if same[0] == same[1] and backend._ahead is not None:
            drafts = [outcome.drafts for outcome in backend.cycle(rows[::-1]).outcomes]
            alone = engine(looks_ahead=False)
            for row, found in zip(rows[::-1], drafts, strict=True):
                again = row_of(row.tokens[:-1], index=row.index, width=1)
                alone.prefill(again)
                again.tokens = list(row.tokens)
                assert alone.cycle([again]).outcomes[0].drafts == found
            if drafts[0] != drafts[1]:
                return
    pytest.fail("no two rows met whose drafts differ: the test shows nothing")


def row_of(prompt: list[int], *, index: int = 0, width: int = BLOCK - 1) -> Row:
    """A greedy row that drafts a whole block unless told."""
    return Row(
        index=index, tokens=list(prompt), num_prompt=len(prompt), max_tokens=120, block_size=BLOCK, sampling=Sampling(),
        seed=0, width=width, next_width=width,
    )  # fmt: skip


def test_too_few_pages_is_an_error_that_changes_nothing():
    backend = engine(num_pages=4)
    decoder = Decoder(backend)
    prompt = random_prompt(40)
    first = decoder.admit(request(prompt, 20))
    with pytest.raises(OutOfPages, match="pages are wanted"):
        decoder.admit(request(random_prompt(30), 5))
    text = list(first.token_ids)
    while decoder.active:
        text += decoder.step()[0].token_ids
    assert text == stock_text(prompt, 20)
    decoder.release(first.row)
    assert backend.pool.num_free == 4


def test_an_interrupted_cycle_can_be_repeated(monkeypatch: pytest.MonkeyPatch):
    backend = engine()
    decoder = Decoder(backend)
    prompt = random_prompt(9)
    text = list(decoder.admit(request(prompt, 20)).token_ids)
    verify = Passes.verify

    def interrupted(self: Passes, inputs: Inputs) -> None:
        verify(self, inputs)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Passes, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.step()
    while decoder.active:
        text += decoder.step()[0].token_ids
    assert text == stock_text(prompt, 20), "the device had moved on, and the host did not know"


@pytest.mark.parametrize(
    ("variant", "message"), [("llama-bias", "mlp_bias"), ("mistral-dynamic", "rope_type 'dynamic'")]
)
def test_what_the_engine_does_not_compute_is_refused_by_name(variant: str, message: str):
    with pytest.raises(ValueError, match=message):
        engine(variant)


def test_a_users_mistake_is_a_value_error():
    with pytest.raises(ValueError, match="prefill_chunk"):
        engine(prefill_chunk=0)
    with pytest.raises(ValueError, match="num_pages"):
        engine(num_pages=0)
    with pytest.raises(ValueError, match="context is 256"):
        Decoder(engine()).admit(request(random_prompt(200), 57))
    with pytest.raises(ValueError, match="mask_token_id"):
        backend = engine()
        backend._mask_token = None
        decode_all(Decoder(backend), [request([1, 2], 4)])


def test_broken_weights_are_one_clear_error():
    backend = engine()
    with torch.no_grad():
        backend.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        Decoder(backend).admit(request([1, 2], 4))


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_takes_the_bytes_of_the_base_models_cache(tied: bool):
    """Keys and values once, for both views, as stock transformers keeps them for the base alone."""
    model = subject(tied)
    prompt = random_prompt(21)
    with torch.no_grad():
        layers = stock(tied)(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values.layers
    base_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // len(prompt)
    backend = EngineBackend(model, num_pages=5, page_slots=8)
    pools = backend.passes.keys_LPSGH.nbytes + backend.passes.values_LPSGH.nbytes
    assert pools == (5 + 1) * 8 * base_bytes, (
        "more or less is kept for a token than by the base model; one page is spare"
    )
    assert page_bytes(model, 8) == 8 * base_bytes


def test_buckets_are_powers_of_two_and_the_largest():
    assert [bucket(n) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
    assert [bucket(n, largest=24) for n in (1, 9, 16, 17, 24)] == [1, 16, 16, 24, 24]


def test_the_bundled_model_drafts_as_it_does_on_the_portable_backend():
    model = OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(BUNDLED)
    requests = [request(tokenizer(prompt).input_ids, 24) for prompt in PROMPTS[:3]]
    texts, expected = decode_all(Decoder(PortableBackend(model), block_size=16), requests)
    found_texts, found = decode_all(Decoder(EngineBackend(model, num_pages=64), block_size=16), requests)
    assert found_texts == texts
    assert [r.num_accepted for r in found] == [r.num_accepted for r in expected]


def test_the_bundled_model_drafts_nearly_as_well_in_fp8():
    model = OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(BUNDLED)
    requests = [request(tokenizer(prompt).input_ids, 40) for prompt in PROMPTS]
    expected, texts = accepted_share(EngineBackend(model, num_pages=64), requests)
    found, found_texts = accepted_share(EngineBackend(model, num_pages=64, draft_precision="fp8"), requests)
    assert found_texts == texts
    assert found > 0.9 * expected, f"{found:.2f} drafts a cycle are accepted, {expected:.2f} without fp8"
