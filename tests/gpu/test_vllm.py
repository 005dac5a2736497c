"""vLLM with this project's view on a GPU, in bf16, its passes compiled and replayed from CUDA graphs.

The text is compared with vLLM's own without drafting, accepted drafts at each position with this project's decoder. In
bf16 neither is promised: passes of other shapes round differently, and a near-tie may go either way.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.vllm.subjects import NUM_PROMPTS, expected, round_of, run

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None or not torch.cuda.is_available(), reason="needs vLLM and a CUDA device"
)

GRAPHS = {"cudagraph_capture_sizes": [32 * rows for rows in (1, 2, 4, 8, 16, 24)]}
"""One for each number of blocks that a pass may have, in place of vLLM's own, which end at 512 tokens."""
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": False, "gpu_memory_utilization": 0.2}
RUNNERS = pytest.mark.parametrize("runner", ["V1", "V2"])
FAULTS = ("write removed", "roll removed", "causal mask")


def env(runner: str) -> dict[str, str]:
    return {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2"))}


@cache
def drafting(runner: str) -> dict[str, Any]:
    rounds = [round_of(1), round_of(NUM_PROMPTS), round_of(NUM_PROMPTS)]
    return run(rounds, env=env(runner), compilation_config=GRAPHS, **SETTINGS)


@cache
def plain(runner: str) -> list[list[int]]:
    return run([round_of(NUM_PROMPTS)], env=env(runner), block_size=None, **SETTINGS)["rounds"][0]["tokens"]


@cache
def broken(runner: str) -> dict[str, Any]:
    """Without graphs, which would go on replaying what was captured."""
    rounds = [round_of(NUM_PROMPTS, fault=fault) for fault in (None, *FAULTS)]
    return run(rounds, env=env(runner), **SETTINGS | {"enforce_eager": True})


def distance(accepted: list[int]) -> float:
    """How far counts of accepted drafts are from this project's own, as a share of those."""
    own = expected(NUM_PROMPTS, 32).accepted_per_position
    return sum(abs(a - b) for a, b in zip(accepted, own, strict=True)) / sum(own)


@RUNNERS
def test_the_runner_is_the_one_that_was_asked_for(runner: str):
    (facts,) = drafting(runner)["facts"]
    assert (facts["runner"] == "vllm.v1.worker.gpu.model_runner") == (runner == "V2"), facts


@RUNNERS
@pytest.mark.parametrize("index", [0, 1, 2], ids=["one row", "24 rows in chunks", "24 rows from the prefix cache"])
def test_text_is_that_of_plain_decoding(runner: str, index: int):
    found = drafting(runner)["rounds"][index]["tokens"]
    differ = [i for i, (a, b) in enumerate(zip(found, plain(runner), strict=False)) if a != b]
    print(f"\n{runner}, round {index}: {len(found) - len(differ)} of {len(found)} texts are plain decoding's")
    assert not differ


@RUNNERS
@pytest.mark.parametrize("index", [1, 2], ids=["24 rows in chunks", "24 rows from the prefix cache"])
def test_accepted_drafts_are_this_projects_own(runner: str, index: int):
    counters = drafting(runner)["rounds"][index]["counters"]
    own = expected(NUM_PROMPTS, 32)
    print(f"\n{runner}, round {index}: {counters['accepted_tokens_per_pos']}\nown: {own.accepted_per_position}")
    print(f"distance {distance(counters['accepted_tokens_per_pos']):.4f}")
    print(f"drafts {counters['drafts']}, own {own.num_drafts}")
    assert distance(counters["accepted_tokens_per_pos"]) < 0.05


@RUNNERS
def test_planted_faults_are_far_from_it(runner: str):
    found = [one["counters"]["accepted_tokens_per_pos"] for one in broken(runner)["rounds"]]
    print(f"\n{runner}, sound and {FAULTS}: {[round(distance(one), 4) for one in found]}")
    sound, *faults = map(distance, found)
    assert sound < 0.05 and min(faults) > 0.1
