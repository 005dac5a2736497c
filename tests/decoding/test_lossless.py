"""L0: in fp32, what `generate` writes is what transformers' own model of the same weights writes, token for token."""

import random

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import orthrus.decoding.generate as generate_module
from tests.decoding.checks import check_every_acceptance_count
from tests.decoding.subjects import (
    BLOCK,
    MASK,
    RiggedBackend,
    random_prompt,
    stock,
    stock_text,
    subject,
)

NUM_CASES = 240
GROUPS = 12


class PreferEven(LogitsProcessor):
    """A user's processor: depends on the prefix it is given, so a wrong prefix changes the text."""

    def __call__(self, input_ids, scores):
        wanted = (input_ids.sum(-1, keepdim=True) + torch.arange(scores.shape[-1])) % 2 == 0
        return scores + 1.5 * wanted


class StopOnSum(StoppingCriteria):
    """A user's criterion: ends a row whose last two tokens sum to a multiple of n."""

    def __init__(self, n: int):
        self.n = n

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -2:].sum(-1) % self.n) == 0


def draw_case(rng: random.Random) -> dict:
    """One random setting of `generate`, stock keywords only."""
    settings: dict = {"max_new_tokens": rng.randint(1, 26), "do_sample": False, "pad_token_id": 0}
    if rng.random() < 0.5:
        settings["eos_token_id"] = rng.sample(range(1, MASK), rng.choice([1, 2, 4]))
        if rng.random() < 0.4:
            settings["min_new_tokens"] = rng.randint(1, 12)
    if rng.random() < 0.5:
        for name, value in rng.sample(
            [
                ("repetition_penalty", 1.3),
                ("no_repeat_ngram_size", 2),
                ("bad_words_ids", [[7], [11, 13], [20]]),
                ("sequence_bias", [[[5], 2.0], [[9, 4], -3.0]]),
                ("suppress_tokens", [3, 4, 5]),
                ("exponential_decay_length_penalty", (3, 1.05)),
                ("logits_processor", LogitsProcessorList([PreferEven()])),
            ],
            rng.randint(1, 3),
        ):
            if name != "exponential_decay_length_penalty" or "eos_token_id" in settings:
                settings[name] = value
    if rng.random() < 0.3:
        settings["stopping_criteria"] = StoppingCriteriaList([StopOnSum(rng.choice([3, 5, 9]))])
    return settings


def draw_batch(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """1 to 5 prompts of different lengths, padded on the left."""
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, length in enumerate(lengths):
        ids[b, -length:] = torch.tensor([rng.randrange(1, MASK) for _ in range(length)])
        mask[b, -length:] = 1
    return ids, mask


def rig(monkeypatch: pytest.MonkeyPatch, truth: list[list[int]], rng: random.Random) -> list[RiggedBackend]:
    """Let `generate` use drafters that are right a random number of times each cycle; returns those it made."""
    made: list[RiggedBackend] = []
    plan = [[rng.randrange(BLOCK) for _ in range(64)] for _ in truth]

    def build(model, **options) -> RiggedBackend:
        made.append(RiggedBackend(model, truth, lambda row, cycle: plan[row][cycle], **options))
        return made[-1]

    monkeypatch.setattr(generate_module, "PortableBackend", build)
    return made


def check_case(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Compare one case with stock; returns the accepted counts where they were prescribed."""
    rng = random.Random(number)
    tied, implementation = rng.random() < 0.5, rng.choice(["eager", "sdpa"])
    weights = rng.randrange(3)
    settings = draw_case(rng)
    ids, mask = draw_batch(rng)
    expected = stock(tied, implementation, weights).generate(input_ids=ids, attention_mask=mask, **settings)
    truth = [row[kept.bool()].tolist() for row, kept in zip(expected, pad_to(mask, expected.shape[1]), strict=True)]
    made = rig(monkeypatch, truth, rng) if rng.random() < 0.8 else []
    drafting = rng.random() < 0.9
    block_size = rng.randint(2, BLOCK)
    actual, stats = subject(tied, implementation, weights).generate(
        input_ids=ids, attention_mask=mask, use_diffusion_mode=drafting, block_size=block_size, return_stats=True,
        **settings,
    )  # fmt: skip
    assert actual.tolist() == expected.tolist(), f"case {number}: {settings}, block {block_size}"
    if not drafting:
        assert stats.num_drafted == 0
        return []
    if not made or set(settings) & {"eos_token_id", "stopping_criteria"} or has_processors(settings):
        return []
    accepted = [count for _, count in made[0].expected]
    assert stats.acceptance_histogram[:block_size] == [accepted.count(a) for a in range(block_size)], (
        f"case {number}: the drafts that were right are not the drafts that were accepted"
    )
    return accepted


def has_processors(settings: dict) -> bool:
    return bool(set(settings) - {"max_new_tokens", "do_sample", "pad_token_id"})


def pad_to(mask: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("group", range(GROUPS))
def test_generate_writes_what_stock_writes(monkeypatch, group: int):
    for number in range(group, NUM_CASES, GROUPS):
        with monkeypatch.context() as patch:
            check_case(patch, number)


@pytest.mark.parametrize("block_size", range(2, BLOCK + 1))
@pytest.mark.parametrize("tied", [True, False])
def test_every_acceptance_count_gives_the_same_text(block_size: int, tied: bool):

    prompt = random_prompt(5)
    truth = prompt + stock_text(prompt, 110, tied=tied)
    check_every_acceptance_count(subject(tied), truth, len(prompt), block_size)
