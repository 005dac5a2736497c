"""A soak of the whole engine at toy size: what tests/gpu/test_soak.py asks of the kernels, and that it finds bugs."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import pytest
from torch import nn

from orthrus.decoding import chooser
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.row import Outcome
from orthrus.engine.kv import PagePool
from orthrus.engine.passes import Inputs, Passes
from tests.decoding.subjects import BLOCK, VOCABULARY, random_prompt, subject
from tests.engine.workload import BlockSize, Limits, Mix, Soaked, soak

LIMITS = (
    Limits(num_pages=20, page_slots=8, max_rows=6, step_tokens=64, prefill_chunk=16),
    Limits(num_pages=30, page_slots=16, max_rows=3, step_tokens=40, prefill_chunk=24),
)


@cache
def toy() -> nn.Module:
    """The view begins as a copy of the AR view, so that some drafts are right."""
    model = copy.deepcopy(subject())
    model.init_view()
    return model


def soak_toy(
    num_jobs: int, *, block_size: BlockSize, is_plain: bool = False, looks_ahead: bool | None = None
) -> Soaked:
    """In fp32 by plain torch, whose products sum in an order that depends on the pass: log-probabilities are some ulp
    of the logits (about 10) apart, through two layers. Any other row's are further away than that."""
    mix = Mix(
        text=random_prompt(400), stops=range(VOCABULARY - 1), num_prompt=70, num_new=40, arrivals=1.0,
        is_plain=is_plain, has_speculative=block_size != "auto",
    )  # fmt: skip
    jobs = mix.jobs(num_jobs, seed=0)
    return soak(
        toy(), jobs, block_size=block_size, limits=LIMITS, alone_every=1, logprob_gap=1e-4,
        engine={"looks_ahead": looks_ahead},
    )  # fmt: skip


@pytest.mark.parametrize(("block_size", "is_plain"), [(BLOCK, False), (4, False), ("auto", False), (BLOCK, True)])
def test_soak(block_size: BlockSize, is_plain: bool):
    found = soak_toy(60, block_size=block_size, is_plain=is_plain)
    found.check_hardness()


def test_a_device_that_drafts_ahead_drafts_the_same():
    """As a GPU does it: a draft of another past would be a worse one."""
    found, expected = (
        soak_toy(60, block_size=4, is_plain=True, looks_ahead=looks_ahead) for looks_ahead in (True, False)
    )
    assert found.tokens_per_cycle == expected.tokens_per_cycle


def free_a_page_early(patch: pytest.MonkeyPatch) -> None:
    """The first of two holders frees a page."""
    release = PagePool.release

    def early(self: PagePool, pages: Iterable[int]) -> None:
        pages = list(pages)
        for page in pages:
            self._num_holders[page] = min(self._num_holders[page], 1)
        release(self, pages)

    patch.setattr(PagePool, "release", early)


def forget_a_row_but_not_its_pages(patch: pytest.MonkeyPatch) -> None:
    """What a cancelled request leaves."""

    def leaking(self: Decoder, row: int) -> None:
        sequence = self._sequences.pop(row)
        if sequence.is_finished:
            self._backend.release(row)

    patch.setattr(Decoder, "release", leaking)


def take_other_rows_seeds(patch: pytest.MonkeyPatch) -> None:
    """The sampling seeds of a batch, turned round."""
    seed_tensor = chooser.seed_tensor
    patch.setattr(chooser, "seed_tensor", lambda seeds: seed_tensor(seeds[::-1]))


def take_other_rows_drafts(patch: pytest.MonkeyPatch) -> None:
    """Right texts, drafted badly."""
    draft = Passes.draft

    def swapped(self: Passes, inputs: Inputs) -> None:
        draft(self, inputs)
        inputs.ids_BW[:, 1:] = inputs.ids_BW[:, 1:].roll(1, 0)

    patch.setattr(Passes, "draft", swapped)


def report_other_rows_logprobs(patch: pytest.MonkeyPatch) -> None:
    """Each token's log-probability is the one that it has in another row."""
    report = chooser.Chooser.report

    def swapped(self: chooser.Chooser, outcomes: Sequence[Outcome], logprobs: Sequence[Sequence[float]] | None) -> None:
        report(self, outcomes, logprobs and [*logprobs[1:], logprobs[0]])

    patch.setattr(chooser.Chooser, "report", swapped)


def do_not_send_a_table(patch: pytest.MonkeyPatch) -> None:
    """A row's table is taken to be there when it has as many pages as the one before."""
    write = Inputs.write

    def forgetful(self: Inputs, anchors: list[int], lengths: list[int], widths: list[int], pages: list) -> None:
        for b, own in enumerate(pages):
            if len(self._pages[b]) == len(own):
                self._pages[b] = own
        write(self, anchors, lengths, widths, pages)

    patch.setattr(Inputs, "write", forgetful)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (free_a_page_early, "page|new token"),
        (forget_a_row_but_not_its_pages, "rows are left in the cache|come to an end"),
        (take_other_rows_seeds, "new token"),
        (take_other_rows_drafts, "drafts worse in company"),
        (report_other_rows_logprobs, "log-probabilities are"),
        (do_not_send_a_table, "new token"),
    ],
)
def test_the_soak_finds_planted_bugs(
    plant: Callable[[pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        soak_toy(60, block_size=BLOCK, is_plain=plant is take_other_rows_drafts)
