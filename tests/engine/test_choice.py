"""Cycles that argmax alone does not decide: what is sent, what is kept, and rows in groups. On a CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from orthrus.decoding import chooser, sampling
from orthrus.decoding.chooser import Chooser, Settings
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.row import Row
from orthrus.decoding.sampling import Sampling
from orthrus.engine import choice
from orthrus.engine.choice import KEPT_BYTES, SCORE_COPIES, SCORES_BYTES, group_rows
from orthrus.engine.engine import affordable_bytes
from orthrus.engine.passes import Inputs
from tests.decoding.subjects import decode_all, random_prompt, request
from tests.decoding.test_decoder import SAMPLED
from tests.decoding.test_lossless import PreferEven
from tests.engine.test_engine import engine

KINDS: list[dict[str, Any]] = [
    dict(temperature=0.8, top_p=0.95, top_k=50, rule="speculative", seed=1, logprobs=True),
    dict(temperature=0.8, top_p=0.95, rule="coupled", seed=2, logits=True),
    dict(logprobs=True),
    dict(temperature=1.2, min_p=0.05, rule="speculative", seed=4),
    dict(temperature=0.9, seed=5, logprobs=True),
]


def with_processor(**others: Any) -> dict[str, Any]:
    """A kind whose processor makes the prefix matter, and leaves a law little of what it had."""
    return dict(logits_processor=LogitsProcessorList([PreferEven()] * 4), **others)


PROCESSED = with_processor(temperature=3.0, rule="speculative", seed=6, logprobs=True)


def requests_of(kinds: list[dict[str, Any]], num_new: int = 30) -> list:
    return [request(random_prompt(5 + 9 * i, seed=i), num_new, **kind) for i, kind in enumerate(kinds)]


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """How often a function is called, in the only entry."""
    calls, function = [0], getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, staticmethod(counting) if isinstance(owner, type) else counting)
    return calls


def test_a_cycle_sends_its_numbers_once_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    """Whatever the host has for the device begins as a list: no cycle makes more than one of them a tensor."""
    decoder = Decoder(engine(page_slots=256))
    for one in requests_of(KINDS, 60):
        decoder.admit(one)
    decoder.step()
    made, copied = counted(monkeypatch, torch, "tensor"), counted(monkeypatch, Inputs, "_send")
    sent = counted(monkeypatch, sampling, "send"), counted(monkeypatch, chooser, "send")
    for cycle in range(1, 5):
        decoder.step()
        assert made == copied == [cycle], f"{made[0]} lists were made tensors in {cycle} cycles, {copied[0]} sent"
    assert sent == ([0], [0]), "settings that did not change were sent again"


@pytest.mark.parametrize("change", ["order", "fewer", "seed", "temperature", "top_p", "rule"])
def test_kept_settings_are_of_these_rows_alone(change: str):
    def row(index: int, seed: int, **others: Any) -> Row:
        settings: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "rule": "coupled"} | others
        return Row(
            index=index, tokens=[1], num_prompt=1, max_tokens=9, block_size=4, seed=seed,
            sampling=Sampling(**settings),
        )  # fmt: skip

    rows = [row(0, 1), row(1, 2)]
    backend = engine()
    kept = backend._settings_of(rows)
    rows[0].tokens += [4, 5]
    assert backend._settings_of(rows) is kept, "settings do not hang on a row's text"
    other = {
        "order": rows[::-1], "fewer": rows[:1], "seed": [row(0, 3), rows[1]],
        "temperature": [row(0, 1, temperature=0.6), rows[1]], "top_p": [rows[0], row(1, 2, top_p=0.8)],
        "rule": [rows[0], row(1, 2, rule="speculative")],
    }[change]  # fmt: skip
    found, expected = backend._settings_of(other), Settings.of_rows(other, backend.device)
    assert found is not kept and backend._settings_of(other) is found
    for name in ("seeds_B", "is_speculative_B1", "is_coupled_B1"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("temperature", "top_k", "tail", "min_p"):
        assert torch.equal(getattr(found.laws, name), getattr(expected.laws, name)), name


def test_rows_that_come_and_go_are_chosen_by_their_own_settings():
    """Batches whose settings are kept from cycle to cycle, with rows that end between them."""
    requests = [request(random_prompt(n, seed=n), 5 + 6 * i, **SAMPLED[i]) for i, n in enumerate((3, 17, 1, 9, 70))]
    together, _ = decode_all(Decoder(engine()), requests)
    for row, alone in enumerate(requests):
        assert decode_all(Decoder(engine()), [alone])[0][0] == together[row]


def told(decoder: Decoder, requests: list) -> tuple[list[tuple], list[tuple]]:
    """What records say of the text, with log-probabilities; and the logits and scores that were wanted."""
    _, records = decode_all(decoder, requests)
    return [(r.row, r.token_ids, r.draft_ids, r.num_accepted, r.logprobs) for r in records], [
        (r.logits, r.scores) for r in records if r.logits is not None
    ]


@pytest.mark.parametrize("scores_bytes", [1, 2 * SCORE_COPIES * 4 * 61 * 8])
@pytest.mark.parametrize("kept_bytes", [0, 2**28])
def test_groups_and_drafts_computed_again_change_nothing(
    scores_bytes: int, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    """Rows chosen one by one or in pairs, sampled drafts kept or not."""
    kinds = [*KINDS, PROCESSED]
    expected, wanted = told(Decoder(engine()), requests_of(kinds))
    monkeypatch.setattr(choice, "SCORES_BYTES", scores_bytes)
    monkeypatch.setattr(choice, "KEPT_BYTES", kept_bytes)
    redrafts = counted(monkeypatch, choice, "at_column")
    found, found_wanted = told(Decoder(engine()), requests_of(kinds))
    assert (redrafts[0] > 0) == (kept_bytes == 0)
    assert [one[:4] for one in found] == [one[:4] for one in expected]
    assert len(found_wanted) == len(wanted) > 0
    # fp32: the head's products of other numbers of rows.
    for one, other in zip(found, expected, strict=True):
        assert (one[4] is None) == (other[4] is None)
        torch.testing.assert_close(torch.tensor(one[4] or []), torch.tensor(other[4] or []), rtol=1e-4, atol=1e-4)
    for one, other in zip(found_wanted, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [dict(temperature=0.9, seed=6), dict(temperature=0.9, seed=6, rule="speculative"), {}])
def test_log_probabilities_are_of_the_views_own_logits(kind: dict[str, Any]):
    """Before processors and warpers, which the scores are behind."""
    _, records = decode_all(Decoder(engine()), requests_of([with_processor(logprobs=True, logits=True, **kind)]))
    for record in records:
        assert record.logits is not None and record.scores is not None and record.logprobs is not None
        assert not torch.equal(record.logits, record.scores)
        own = record.logits.log_softmax(-1).gather(1, torch.tensor(record.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(record.logprobs), own)


P, Q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.7, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(("num_rows", "has_processor"), [(20_000, False), (2_000, True)])
def test_a_drafted_token_has_the_ar_law(num_rows: int, has_processor: bool):
    """Over seeds, by the uniforms that are really used: what one is used for twice is correlated. Both tokens of a
    cycle, the second where the draft was kept. A processor keeps token 1 out."""
    processor = LogitsProcessorList([SuppressTokensLogitsProcessor([1])]) if has_processor else None
    rows = [
        Row(
            index=i, tokens=[1, 2], num_prompt=1, max_tokens=9, block_size=2, seed=i, width=1, processor=processor,
            sampling=Sampling(temperature=1.0, rule="speculative"),
        )
        for i in range(num_rows)
    ]  # fmt: skip
    one = Chooser(rows, 2, len(P), torch.device("cpu"))
    drafts = one.draft(Q.log().expand(num_rows, 1, len(Q)).contiguous())
    accepted, written = one.verify(
        P.log().expand(num_rows, 2, len(P)).contiguous(), drafts, torch.ones(num_rows).long()
    )
    assert 0 < int(accepted.sum()) < num_rows
    allowed = torch.arange(len(P)) != (1 if has_processor else -1)
    for tokens, law in ((drafts[:, 0], Q), (written[:, 0], P), (written[accepted == 1, 1], P)):
        found, expected = tokens.bincount(minlength=len(P)), law * allowed / law[allowed].sum() * len(tokens)
        assert not found[~allowed].any(), "a token is there that the processor left out"
        chi_squared = ((found - expected) ** 2 / expected)[allowed].sum()
        assert chi_squared < 16.3, f"{found.tolist()} where {expected.tolist()} is the law"  # one in 1,000, 3 degrees


def test_groups_fit_what_is_reserved():
    row_logits = 32 * 151_936
    for num_rows in (1, 2, 7, 64):
        groups = group_rows(num_rows, row_logits)
        assert [row for group in groups for row in range(num_rows)[group]] == list(range(num_rows))
        largest = max(group.stop - group.start for group in groups)
        assert largest * row_logits * 4 * SCORE_COPIES <= SCORES_BYTES
    assert len(group_rows(3, 2**40)) == 3, "a row that does not fit is a group all the same"


@pytest.mark.parametrize("free", [10**12, 4 * 10**9, 10**8])
def test_pages_leave_what_choices_take(free: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    taken = affordable_bytes(torch.device("cuda"))
    assert 0 <= taken <= 0.9 * free
    assert taken == 0 or free - taken >= SCORES_BYTES + KEPT_BYTES


def peak_bytes(work: Callable[[], Any], folder: Path) -> int:
    """The most that was allocated at once beyond what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    assert peak > 0, "the profiler saw nothing"
    return peak


@pytest.mark.parametrize("kind", [0, 1, 3, "mixed"])
@torch.inference_mode()
def test_choices_take_no_more_copies_than_are_reserved(kind: int | str, tmp_path: Path):
    """Logits are counted, and what a draft keeps is, too."""
    num_tokens, num_columns = 151_936, 3
    kinds: list[dict[str, Any]] = [dict(temperature=0.8, top_p=0.95, top_k=50, seed=1), KINDS[0]]
    if isinstance(kind, int):
        kinds = [KINDS[kind]]
    rows = [
        Row(
            index=i, tokens=[1, 2], num_prompt=2, max_tokens=99, block_size=4, seed=i, width=num_columns - 1,
            wants_logprobs=True,
            sampling=Sampling(**{name: own[name] for name in own if name not in ("logprobs", "logits")}),
        )
        for i, own in enumerate(kinds)
    ]  # fmt: skip
    draft_logits, logits = torch.randn(2, len(rows), num_columns, num_tokens).bfloat16()
    device = torch.device("cpu")
    one = Chooser(rows, num_columns, num_tokens, device, redraft=lambda columns_B: draft_logits[:, 0])
    drafts: list[torch.Tensor] = []
    copy = len(rows) * num_columns * num_tokens * 4
    draft_peak = peak_bytes(lambda: drafts.append(one.draft(draft_logits[:, :-1])), tmp_path)
    widths = torch.full((len(rows),), num_columns - 1)
    verify_peak = peak_bytes(lambda: one.verify(logits, drafts[0], widths), tmp_path)
    for peak in (draft_peak, verify_peak):
        assert peak + copy / 2 <= SCORE_COPIES * copy, f"{peak / copy + 0.5:.1f} copies are alive at once"
