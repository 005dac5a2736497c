"""vLLM with this project's view against this project's own decoder, on a CPU in fp32: the text, and how many drafts
were accepted at each position of a block. Text alone sees no mistake of a draft: vLLM corrects it.

An engine takes half a minute to start, so each answers for several tests. `make vllm-test` has what they need.
"""

from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.config import OrthrusConfig
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.environment import BUNDLED
from orthrus.model.export import save_merged
from tests.decoding.subjects import randomise
from tests.vllm.subjects import (
    ENGINE,
    GREEDY,
    NUM_PROMPTS,
    V2,
    expected,
    expected_of,
    plain,
    plain_of,
    prompts,
    round_of,
    round_over,
    run,
)
from tests.vllm.test_refusals import VIEW_TENSOR, damaged, view_over_base

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm-test")

FAULTS = {
    "write removed": "a block's keys and values are not written where it reads",
    "roll removed": "drafts are sampled from other rows than those which propose them",
    "causal mask": "a block is masked causally",
    "other mask token": "a block is filled with token 8183, the view's mask is 8184",
}
"""Mistakes that are planted, and what the self-check says of them."""
PAGE = 128
"""Tokens of a page of vLLM's cache on a CPU."""


def check_text(answer: dict[str, Any]) -> None:
    num_prompts = len(answer["tokens"])
    wrong = [i for i, (a, b) in enumerate(zip(answer["tokens"], plain(num_prompts), strict=True)) if a != b]
    assert not wrong, f"prompts {wrong} were not continued as plain decoding continues them"


def check_drafts(answer: dict[str, Any], *, block_size: int = 32) -> None:
    own = expected(len(answer["tokens"]), block_size)
    (num_drafts,), (num_tokens,) = answer["counters"]["drafts"], answer["counters"]["draft_tokens"]
    assert num_tokens == num_drafts * (block_size - 1), "vLLM cut blocks short: a step has too few tokens"
    assert answer["counters"]["accepted_tokens_per_pos"] == own.accepted_per_position, "the view drafts something else"
    assert num_drafts == own.num_drafts


@cache
def v1() -> dict[str, Any]:
    rounds = [round_of(1), round_of(NUM_PROMPTS), round_of(NUM_PROMPTS)]
    return run(rounds + [round_of(NUM_PROMPTS, fault=fault) for fault in FAULTS] + [round_of(1)])


@cache
def v2() -> dict[str, Any]:
    few = [round_of(2, fault=fault) for fault in FAULTS]  # its kernels run in Triton's interpreter here
    return run([round_of(1), round_of(NUM_PROMPTS), round_of(NUM_PROMPTS), *few, round_of(1)], env=V2)


RUNNERS = pytest.mark.parametrize("runner", [v1, v2], ids=["V1", "V2"])


@RUNNERS
@pytest.mark.parametrize("index", [0, 1, 2], ids=["one row", "24 rows in chunks", "24 rows from the prefix cache"])
def test_text_and_accepted_drafts_are_this_projects_own(runner: Any, index: int):
    answer = runner()["rounds"][index]
    check_text(answer)
    check_drafts(answer)


@RUNNERS
def test_prompts_were_cut_in_chunks_and_found_in_the_prefix_cache(runner: Any):
    assert max(map(len, prompts())) > ENGINE["long_prefill_token_threshold"]
    assert sum(map(len, prompts())) > ENGINE["max_num_batched_tokens"]
    found = runner()["rounds"][2]["cached"]
    assert found == [(len(ids) - 1) // PAGE * PAGE for ids in prompts()], "plain decoding would find these pages"


@pytest.mark.parametrize("env", [None, V2], ids=["V1", "V2"])
def test_text_is_plain_decodings_up_to_the_longest_sequence(env: dict[str, str] | None):
    """Where a block would reach beyond it, the V2 runner gives its positions slots of the text."""
    longest, num_prompt = 256, 205
    long = [ids[:num_prompt] for ids in prompts() if len(ids) >= num_prompt][:4]
    num_new = longest - num_prompt
    one = round_over(long, max_tokens=num_new)
    answer = run([one], env=env, max_model_len=longest)["rounds"][0]
    assert answer["tokens"] == plain_of(tuple(long), num_new)
    assert sum(answer["counters"]["accepted_tokens_per_pos"]) > 0


def crowd(num_rows: int) -> tuple[tuple[int, ...], ...]:
    """Prompts of one page each with room for a block, which outgrow it soon."""
    long = [ids for ids in prompts() if len(ids) >= 100][:num_rows]
    return tuple(ids[: PAGE - 32 - 2 * i] for i, ids in enumerate(long))


def crowded(*rounds: tuple[tuple[tuple[int, ...], ...], dict[str, Any]], num_rows: int, env: Any = None) -> list[Any]:
    """Rounds of prompts and sampling on an engine with one page more than rows (and vLLM's own, of nothing)."""
    plans = [round_over(some, **sampling) for some, sampling in rounds]
    return run(plans, env=env, max_model_len=3 * PAGE, num_gpu_blocks_override=num_rows + 2)["rounds"]


def check_crowded(answer: dict[str, Any], some: tuple[tuple[int, ...], ...], num_new: int) -> None:
    """A row that comes back has lost its block and draws a token without drafts, so its later blocks begin elsewhere:
    counts are not all equal, but as many drafts of a block are accepted."""
    assert answer["tokens"] == plain_of(some, num_new)
    (num_preemptions,), (num_drafts,) = answer["counters"]["num_preemptions"], answer["counters"]["drafts"]
    (num_tokens,), (num_accepted,) = answer["counters"]["draft_tokens"], answer["counters"]["accepted_tokens"]
    assert num_preemptions > 0 and num_tokens == 31 * num_drafts
    own = expected_of(some, 32, num_new)
    assert num_accepted / num_drafts > 0.9 * sum(own.accepted_per_position) / own.num_drafts
    assert answer["findings"] == [[]]


def test_rows_that_leave_the_cache_and_come_back_draft_as_before():
    some, num_new = crowd(14), 100
    (answer,) = crowded((some, GREEDY | {"max_tokens": num_new}), num_rows=14)
    check_crowded(answer, some, num_new)


def test_seed_gives_a_row_that_stays_in_the_cache_its_text_again():
    """Under the V2 runner: vLLM's V1 runner does not sample right on a CPU. The first row is the last to leave the
    cache; rows that do may draw other tokens each time, since their blocks begin elsewhere."""
    some, num_new = crowd(4), 60
    seeded = {"temperature": 0.9, "seed": 7, "max_tokens": num_new, "ignore_eos": True}
    greedy, alone, together, again = crowded(
        (some, GREEDY | {"max_tokens": num_new}), (some[:1], seeded), (some, seeded), (some, seeded),
        num_rows=4, env=V2,
    )  # fmt: skip
    check_crowded(greedy, some, num_new)
    assert together["counters"]["num_preemptions"][0] > 0 == alone["counters"]["num_preemptions"][0]
    assert together["counters"]["accepted_tokens"][0] > 0
    assert together["tokens"][0] == again["tokens"][0] == alone["tokens"][0]
    assert len({tuple(tokens) for tokens in (*together["tokens"], *greedy["tokens"])}) == 8


@RUNNERS
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_leaves_the_text_and_shows_in_the_accepted_drafts(runner: Any, fault: str):
    answer = runner()["rounds"][3 + list(FAULTS).index(fault)]
    check_text(answer)
    with pytest.raises(AssertionError, match="the view drafts something else"):
        check_drafts(answer)
    own = expected(len(answer["tokens"]), 32)
    assert answer["counters"]["accepted_tokens"][0] < sum(own.accepted_per_position)


@RUNNERS
def test_self_check_names_each_planted_fault_and_nothing_else(runner: Any):
    found = [answer["findings"] for answer in runner()["rounds"]]
    assert found == [[[]], [[]], [[]], *([[sentence]] for sentence in FAULTS.values()), [[]]]


@RUNNERS
def test_mended_engine_drafts_as_before(runner: Any):
    check_drafts(runner()["rounds"][-1])


@RUNNERS
def test_view_owns_its_projections_and_no_cache(runner: Any):
    (facts,) = runner()["facts"]
    assert (facts["target"], facts["draft"]) == ("OrthrusQwen3", "OrthrusDraft")
    assert set(facts["own_leaves"]) == {"qkv_proj", "o_proj", "q_norm", "k_norm", "attn"}
    assert (facts["num_layers"], facts["num_caches"]) == (16, 8)
    assert facts["runner"] == {v1: "vllm.v1.worker.cpu_model_runner", v2: "vllm.v1.worker.cpu.model_runner"}[runner]


def test_two_ranks_of_tensor_parallelism_draft_as_one():
    answer = run([round_of(NUM_PROMPTS)], tensor_parallel_size=2)
    assert len(answer["facts"]) == 2
    check_text(answer["rounds"][0])
    check_drafts(answer["rounds"][0])


def test_view_file_drafts_for_the_stock_base_in_smaller_blocks(tmp_path: Path):
    view, base = view_over_base(tmp_path)
    overrides = {"architectures": ["OrthrusLM"]}
    answer = run([round_of(NUM_PROMPTS)], model_name=base, view=view, block_size=8, hf_overrides=overrides)["rounds"][0]
    check_text(answer)
    check_drafts(answer, block_size=8)


def test_checkpoint_alone_is_decoded_plainly():
    answer = run([round_of(4)], block_size=None)["rounds"][0]
    check_text(answer)
    assert not any(map(sum, answer["counters"].values()))


# Sampling: a model of few tokens, whose law of three of them can be written down

VOCABULARY, TEMPERATURE, SAMPLED_PROMPT = 24, 0.9, (1, 5, 2, 7, 3)
NUM_SAMPLED = 480


def small_checkpoint(folder: Path) -> Path:
    """A random model with a head of its own; the view is a copy of the projections, so that many drafts are wrong."""
    config = OrthrusConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=False, block_size=8,
        mask_token_id=VOCABULARY - 1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = OrthrusForCausalLM(config)
    randomise(model, seed=0, std=0.25)
    model.init_view()
    save_merged(model, folder, remote_code=False)
    return folder


@torch.no_grad()
def law_of_three(folder: Path, temperature: float = TEMPERATURE) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of `SAMPLED_PROMPT` by three tokens."""
    model = OrthrusForCausalLM.from_pretrained(folder, dtype=torch.float32)
    p_PV, paths = torch.ones(1, 1, dtype=torch.float64), [()]
    for _ in range(3):
        rows = torch.tensor([[*SAMPLED_PROMPT, *path] for path in paths])
        q_PV = torch.softmax(model(rows).logits[:, -1].double() / temperature, dim=-1)
        p_PV = p_PV.reshape(-1, 1) * q_PV
        paths = [(*path, token) for path in paths for token in range(VOCABULARY)]
    return dict(zip(paths, p_PV.flatten().tolist(), strict=True))


def chi_squared(found: Counter, law: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; continuations expected fewer than 5 times count together."""
    total = found.total()
    cells = [(found[path], p * total) for path, p in law.items() if p * total >= 5]
    cells.append((total - sum(n for n, _ in cells), total - sum(e for _, e in cells)))
    return sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1


def check_law(answer: dict[str, Any], folder: Path) -> None:
    """A round's texts, of three tokens behind `SAMPLED_PROMPT`, have the base model's law, whose test is sharp enough
    to tell it from a colder one."""
    num_drafted, num_accepted = answer["counters"]["draft_tokens"][0], answer["counters"]["accepted_tokens"][0]
    assert 0 < num_accepted < num_drafted, "both ways a draft can go must be taken"
    found = Counter(map(tuple, answer["tokens"]))
    statistic, freedom = chi_squared(found, law_of_three(folder))
    print(f"\nchi-squared {statistic:.1f} of {freedom}, {num_accepted} of {num_drafted} drafts kept")
    assert freedom >= 10
    # Mean + 4 standard deviations of the chi-squared law: a right sampler fails one time in some thousands.
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    colder, freedom = chi_squared(found, law_of_three(folder, 0.8 * TEMPERATURE))
    assert colder > freedom + 4 * (2 * freedom) ** 0.5, "too few samples to tell a law from another"


def check_sampling(folder: Path, *, num_sampled: int = NUM_SAMPLED, repeats: bool = True, **settings: Any) -> None:
    """Sampled text has the base model's law, and a seed repeats it, whoever decodes beside it."""
    prompt, sampling = list(SAMPLED_PROMPT), {"temperature": TEMPERATURE, "ignore_eos": True, "detokenize": False}
    small_checkpoint(folder)
    seeded = [
        round_over([prompt] * rows, **sampling, seed=seed, max_tokens=24) for rows, seed in ((1, 7), (3, 7), (1, 8))
    ]
    answer, *seeded = run(
        [round_over([prompt] * num_sampled, **sampling, max_tokens=3), *seeded],
        model_name=folder, block_size=4, seed=1, skip_tokenizer_init=True, max_model_len=256, **settings,
    )["rounds"]  # fmt: skip
    alone, together, other = (one["tokens"] for one in seeded)
    assert other != alone and len(alone[0]) == 24
    assert not repeats or together == alone * 3
    check_law(answer, folder)


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_text_has_the_base_models_law(tmp_path: Path, method: str):
    check_sampling(tmp_path / "small", env=V2, speculation={"draft_sample_method": method})


# Refusals, through the door that users use


@pytest.mark.parametrize(
    ("block_size", "engine", "sentence"),
    [
        (32, {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 is not supported by Orthrus"),
        (33, {}, "num_speculative_tokens=32 is too many: the view was trained with blocks of 32"),
        (32, {"model_name": "damaged"}, f"lacks 1 tensors: {VIEW_TENSOR}"),
    ],
    ids=["pipeline", "block", "damaged"],
)
def test_engine_does_not_start_and_says_why(tmp_path: Path, block_size: int, engine: dict[str, Any], sentence: str):
    folder = BUNDLED
    if engine.pop("model_name", None):
        folder = damaged(tmp_path / "damaged", lambda tensors: tensors.pop(VIEW_TENSOR))
    with pytest.raises(AssertionError, match="the engine failed") as failure:
        run([round_of(1)], model_name=folder, block_size=block_size, **engine)
    assert sentence in str(failure.value)
    assert "EngineCore" not in str(failure.value), "refused before vLLM starts processes"
