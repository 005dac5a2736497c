"""L0: in fp32, what `generate` writes is what transformers' own model of the same weights writes, token for token."""

import copy
import random

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import orthrus.decoding.backends as backends
from orthrus.decoding.decoder import Decoder
from tests.decoding.checks import check_every_acceptance_count
from tests.decoding.subjects import (
    BLOCK,
    MASK,
    SHAPE,
    RiggedBackend,
    decode_all,
    random_prompt,
    request,
    stock,
    stock_text,
    subject,
)
from tests.families import ONE_EACH, OTHERS, VARIANTS

NUM_CASES = 240
NUM_CASES_A_VARIANT = 20
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

    monkeypatch.setattr(backends, "PortableBackend", build)
    return made


def check_case(monkeypatch: pytest.MonkeyPatch, number: int, variant: str = "qwen3") -> list[int]:
    """Compare one case with stock; returns the accepted counts where they were prescribed."""
    rng = random.Random(number)
    tied, implementation = rng.random() < 0.5, rng.choice(["eager", "sdpa"])
    weights = rng.randrange(3)
    settings = draw_case(rng)
    ids, mask = draw_batch(rng)
    expected = stock(tied, implementation, weights, variant).generate(input_ids=ids, attention_mask=mask, **settings)
    truth = [row[kept.bool()].tolist() for row, kept in zip(expected, pad_to(mask, expected.shape[1]), strict=True)]
    made = rig(monkeypatch, truth, rng) if rng.random() < 0.8 else []
    drafting = rng.random() < 0.9
    block_size = rng.randint(2, BLOCK)
    actual, stats = subject(tied, implementation, weights, variant).generate(
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


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("variant", ["qwen3-bias", *OTHERS])
def test_every_family_writes_what_its_stock_class_writes(monkeypatch, variant: str):
    counts = []
    for number in range(1000, 1000 + NUM_CASES_A_VARIANT):
        with monkeypatch.context() as patch:
            counts += check_case(patch, number, variant)
    assert 0 in counts and max(counts) > 3, "the drafter was never right, or never wrong"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copied_view_is_believed_and_writes_the_same_text(variant: str):
    """N says that the view's own drafts are accepted: those of a view that knows nothing are one time in 61."""
    model = copy.deepcopy(subject(variant=variant))
    settings: dict = dict(input_ids=torch.tensor([random_prompt(5)]), max_new_tokens=60)
    expected = stock(variant=variant).generate(**settings)
    unlike, strange = model.generate(**settings, return_stats=True)
    model.init_view()
    output, stats = model.generate(**settings, return_stats=True)
    assert output.tolist() == unlike.tolist() == expected.tolist()
    assert strange.tokens_per_cycle < 1.3 < 1.5 < stats.tokens_per_cycle, f"{strange} {stats}"


@pytest.mark.parametrize("variant", ["mistral-dynamic"])
@pytest.mark.parametrize("exact", [True, False])
def test_dynamic_angles_hold_up_to_the_end_of_the_context_and_are_refused_behind_it(variant: str, exact: bool):
    """Behind it stock turns each token by angles of its own: a block, even an exact pass's padding, would move them."""
    prompt = torch.tensor([random_prompt(SHAPE["max_position_embeddings"] - 21)])
    settings: dict = dict(input_ids=prompt, max_new_tokens=21)
    expected = stock(variant=variant).generate(**settings)
    truth = [expected[0].tolist()]
    model = copy.deepcopy(subject(variant=variant))
    for num_right in (0, BLOCK - 1):
        backend = RiggedBackend(model, truth, lambda row, cycle, right=num_right: right, exact=exact)
        texts, _ = decode_all(Decoder(backend), [request(truth[0][:-21], 21)])
        assert texts[0] == truth[0][-21:]
    with pytest.raises(ValueError, match="context is 256.*'dynamic'.*ask for fewer"):
        model.generate(**settings | {"max_new_tokens": 22})


ACCEPTANCE_CASES = [(size, tied, "qwen3") for size in range(2, BLOCK + 1) for tied in (True, False)]
ACCEPTANCE_CASES += [(BLOCK, True, variant) for variant in ONE_EACH]


@pytest.mark.parametrize(("block_size", "tied", "variant"), ACCEPTANCE_CASES)
def test_every_acceptance_count_gives_the_same_text(block_size: int, tied: bool, variant: str):
    prompt = random_prompt(5)
    truth = prompt + stock_text(prompt, 110, tied=tied, variant=variant)
    check_every_acceptance_count(subject(tied, variant=variant), truth, len(prompt), block_size)
