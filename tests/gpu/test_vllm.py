"""vLLM with this project's view on a GPU, its passes compiled and replayed from CUDA graphs.

In fp32 text and accepted drafts at each position are this project's own, for prompts whose every token is a clear
choice: vLLM's attention for fp32 multiplies in TF32.

In bf16 vLLM's text depends on who shares a batch, drafting or not, and on what is found in the cache: where two logits
are nearly the same, passes of other shapes round them either way. So a text may leave the one of fp32 where the logits
of both tokens are within `NEAR` steps of bf16, and nowhere else; accepted drafts then are nearly this project's.
"""

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.subjects import (
    NUM_NEW,
    NUM_PROMPTS,
    expected,
    expected_of,
    model,
    plain,
    plain_of,
    prompts,
    round_of,
    round_over,
    run,
)
from tests.vllm.test_engine import FAULTS, check_sampling

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None or not torch.cuda.is_available(), reason="needs vLLM and a CUDA device"
)

GRAPHS = {"cudagraph_capture_sizes": [32 * rows for rows in (1, 2, 4, 8, 16, 24)]}
"""One for each number of blocks that a pass may have, in place of vLLM's own, which end at 512 tokens."""
SETTINGS: dict[str, Any] = {"enforce_eager": False, "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 2 << 30}
"""A cache of a given size: else vLLM measures what is free, and stops where another process changes it."""
NEAR = 2
"""A logit is off by half a step for being rounded, and by about as much for the rounding before it; so is the other."""
PAGE = 16
"""Tokens of a page of vLLM's cache on a GPU."""
RUNNERS = pytest.mark.parametrize("runner", ["V1", "V2"])
ROUNDS = pytest.mark.parametrize("index", [0, 1, 2], ids=["one row", "24 rows in chunks", "24 rows from the cache"])


def env(runner: str) -> dict[str, str]:
    return {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2"))}


@cache
def drafting(runner: str) -> dict[str, Any]:
    rounds = [round_of(1), round_of(NUM_PROMPTS), round_of(NUM_PROMPTS)]
    return run(rounds, env=env(runner), dtype="bfloat16", compilation_config=GRAPHS, **SETTINGS)


@cache
def drafting_fp32(runner: str) -> dict[str, Any]:
    rounds = [round_over(some) for some in (clear()[:1], clear(), clear())]
    return run(rounds, env=env(runner), dtype="float32", compilation_config=GRAPHS, **SETTINGS)


@cache
def broken(runner: str) -> list[dict[str, Any]]:
    """Without graphs, which would go on replaying what was captured."""
    rounds = [round_of(NUM_PROMPTS, fault=fault) for fault in (None, *FAULTS)]
    return run(rounds, env=env(runner), dtype="bfloat16", **SETTINGS | {"enforce_eager": True})["rounds"]


@torch.no_grad()
def margins(row: int) -> tuple[float, float]:
    """The least distance of the two largest logits on the way of a text that is decoded plainly, and the largest
    logit; a block further than asked, since what is accepted there is counted."""
    ids = [*prompts()[row], *plain_of((prompts()[row],), NUM_NEW + 32)[0]]
    logits_TV = model()(torch.tensor([ids], device=model().device)).logits[0, len(prompts()[row]) - 1 : -1].float()
    first_T, second_T = logits_TV.topk(2).values.unbind(-1)
    return (first_T - second_T).min().item(), first_T.max().item()


@cache
def clear() -> tuple[tuple[int, ...], ...]:
    """The prompts at none of whose tokens two logits are within `NEAR` steps of TF32, which has 11 bits."""
    found = []
    for row in range(NUM_PROMPTS):
        least, largest = margins(row)
        if least > NEAR * 2.0 ** (math.floor(math.log2(largest)) - 10):
            found.append(prompts()[row])
    assert len(found) >= NUM_PROMPTS // 3, "too few prompts are clear"
    return tuple(found)


def distance(accepted: list[int]) -> float:
    """How far 24 rows' counts of accepted drafts are from this project's own, as a share of those."""
    own = expected(NUM_PROMPTS, 32).accepted_per_position
    return sum(abs(a - b) for a, b in zip(accepted, own, strict=True)) / sum(own)


@torch.no_grad()
def steps_apart(row: int, text: list[int]) -> float:
    """Steps of bf16 between the logits of this text's and plain decoding's token where they part; 0 where they do
    not."""
    own = plain(NUM_PROMPTS)[row]
    at = next((j for j, (a, b) in enumerate(zip(text, own, strict=True)) if a != b), None)
    if at is None:
        return 0.0
    ids = torch.tensor([[*prompts()[row], *own[:at]]], device=model().device)
    logits_V = model()(ids).logits[0, -1].float()
    step = 2.0 ** (math.floor(math.log2(logits_V.abs().max().item())) - 7)
    return (logits_V[own[at]] - logits_V[text[at]]).item() / step


@RUNNERS
@pytest.mark.parametrize("engine", [drafting, drafting_fp32], ids=["bf16", "fp32"])
def test_the_runner_is_the_one_that_was_asked_for(runner: str, engine: Any):
    (facts,) = engine(runner)["facts"]
    names = {"V1": "vllm.v1.worker.gpu_model_runner", "V2": "vllm.v1.worker.gpu.model_runner"}
    assert facts["runner"] == names[runner]
    assert (facts["num_layers"], facts["num_caches"]) == (16, 8)


@RUNNERS
@ROUNDS
def test_fp32_text_and_accepted_drafts_are_this_projects_own(runner: str, index: int):
    found, some = drafting_fp32(runner)["rounds"][index], clear() if index else clear()[:1]
    own = expected_of(some, 32, NUM_NEW)
    assert found["tokens"] == plain_of(some, NUM_NEW)
    assert found["counters"]["accepted_tokens_per_pos"] == own.accepted_per_position
    assert found["counters"]["drafts"] == [own.num_drafts]


@RUNNERS
def test_prompts_are_found_in_the_prefix_cache(runner: str):
    """All whole pages in front of the last token, as without drafting; vLLM 0.26 leaves the last of them out."""
    found = drafting_fp32(runner)["rounds"][2]["cached"]
    left_out = {(len(ids) - 1) // PAGE * PAGE - cached for ids, cached in zip(clear(), found, strict=True)}
    print(f"\n{runner}: {sum(found)} tokens found, left out of a prompt: {left_out}")
    assert left_out <= {0, PAGE} and sum(found) > 0


@RUNNERS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_of_tensor_parallelism_draft_as_one(runner: str):
    answer = run(
        [round_over(clear())], env=env(runner), dtype="float32", compilation_config=GRAPHS, tensor_parallel_size=2,
        **SETTINGS,
    )  # fmt: skip
    (found,), own = answer["rounds"], expected_of(clear(), 32, NUM_NEW)
    assert len(answer["facts"]) == 2
    assert found["tokens"] == plain_of(clear(), NUM_NEW)
    assert found["counters"]["accepted_tokens_per_pos"] == own.accepted_per_position


@RUNNERS
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_text_has_the_base_models_law(tmp_path: Path, runner: str, method: str):
    """From graphs, which hold the drawing of drafts, too. That a seed repeats a text is promised for V2 alone."""
    sizes = {"cudagraph_capture_sizes": [4 * rows for rows in (1, 3, 8, 16, 24)]}
    check_sampling(
        tmp_path / "small", num_sampled=4800, repeats=runner == "V2", env=env(runner), dtype="float32",
        speculation={"draft_sample_method": method}, compilation_config=sizes, **SETTINGS,
    )  # fmt: skip


@RUNNERS
@ROUNDS
def test_bf16_text_parts_at_near_ties_alone(runner: str, index: int):
    found = drafting(runner)["rounds"][index]["tokens"]
    apart = [steps_apart(row, text) for row, text in enumerate(found)]
    print(f"\n{runner}, round {index}: {apart.count(0.0)} of {len(found)} the same, at most {max(apart):.2f} steps")
    assert max(apart) <= NEAR


@RUNNERS
@pytest.mark.parametrize("index", [1, 2], ids=["24 rows in chunks", "24 rows from the cache"])
def test_bf16_accepted_drafts_are_nearly_this_projects_own(runner: str, index: int):
    counters = drafting(runner)["rounds"][index]["counters"]
    apart, own = distance(counters["accepted_tokens_per_pos"]), expected(NUM_PROMPTS, 32)
    print(f"\n{runner}, round {index}: {apart:.3f} apart, {counters['drafts'][0]} drafts, own {own.num_drafts}")
    assert apart < 0.2


@RUNNERS
def test_planted_faults_are_found_by_the_look_at_the_first_pass(runner: str):
    sound, *faulty = broken(runner)
    assert sound["findings"] == [[]] and distance(sound["counters"]["accepted_tokens_per_pos"]) < 0.2
    accepted = [found["counters"]["accepted_tokens_per_pos"] for found in faulty]
    apart = dict(zip(FAULTS, map(distance, accepted), strict=True))
    print(f"\n{runner}: {apart}")
    assert [found["findings"] for found in faulty] == [[[sentence]] for sentence in FAULTS.values()]
    # A causal mask costs this model next to nothing: only the look sees it.
    assert min(apart["write removed"], apart["roll removed"]) > 0.5


def test_blocks_by_load_leave_the_text():
    """32 positions with few rows, none with all, and graphs of each: V2, since V1 has no whole graphs of several."""
    table = {"num_speculative_tokens_per_batch_size": [[1, 7, 31], [8, 11, 7], [12, 1 << 20, 0]]}
    rounds = [round_over(some) for some in (clear()[:1], clear()[:10], clear(), clear()[:1])]
    sizes = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 64, 80, 96, 120, 128, 160, 192, 224]}
    found = run(rounds, env=env("V2"), dtype="float32", compilation_config=sizes, speculation=table, **SETTINGS)[
        "rounds"
    ]
    for one in found:
        assert one["tokens"] == plain_of(clear()[: len(one["tokens"])], NUM_NEW)
    per_draft = [found[i]["counters"]["draft_tokens"][0] / found[i]["counters"]["drafts"][0] for i in (0, 1)]
    print(f"\ndrafts of a row's block: {per_draft}")
    own = expected_of(clear()[:1], 32, NUM_NEW)
    for one in (found[0], found[-1]):
        assert one["counters"]["accepted_tokens_per_pos"] == own.accepted_per_position
    assert per_draft[0] == 31 and 7 <= per_draft[1] < 31
    assert sum(found[2]["counters"]["drafts"]) < expected_of(clear(), 32, NUM_NEW).num_drafts / 2
