"""L1 and L2 of the engine's logic: where the operations give a row its own bits, no batch, draft or chunk changes them.

On a CPU the operations are plain torch, row by row; on a GPU tests/gpu/test_engine.py asks the same of the kernels.
"""

import copy
from typing import Any

import pytest
import torch

from orthrus.engine.engine import EngineBackend
from orthrus.engine.graphs import Graphs
from orthrus.engine.operations import reference_ops
from tests.decoding.subjects import BLOCK, random_prompt, subject
from tests.engine.bits import (
    check_company,
    check_every_acceptance,
    check_replay,
    plain_alone,
    random_weights,
    row_by_row_ops,
)
from tests.engine.test_graphs import Recorder

LENGTHS = (3, 15, 16, 17, 31, 40)
NUM_NEW = (18, 12, 20, 16, 12, 14)


def engine(**options: Any) -> EngineBackend:
    model = copy.deepcopy(subject()).to(torch.bfloat16)
    random_weights(model, 0, std=0.2)
    model.init_view()  # drafts that are often right, so that rows advance by various steps
    settings: dict[str, Any] = {"num_pages": 60, "page_slots": 16, "ops": row_by_row_ops()} | options
    return EngineBackend(model, **settings)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_prompt(n, seed=n) for n in LENGTHS]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]):
    return plain_alone(engine(), prompts, NUM_NEW)


@pytest.mark.parametrize(("num_rows", "logits"), [(1, True), (2, False), (3, True), (6, False)])
def test_a_drafted_row_in_company_has_the_bits_of_the_row_alone(prompts, expected, num_rows: int, logits: bool):
    num_tokens = check_company(expected, engine(), prompts, num_rows=num_rows, logits=logits)
    assert num_tokens == sum(NUM_NEW)


def test_neither_chunks_nor_page_sizes_nor_graphs_change_a_bit(prompts, expected):
    ways: list[dict[str, Any]] = [
        {"prefill_chunk": 5},
        {"page_slots": 4, "num_pages": 240},
        {"graphs": Graphs(Recorder())},
    ]
    for options in ways:
        check_company(expected, engine(**options), prompts, num_rows=6, logits=False)


def test_what_is_computed_again_or_reused_has_the_bits_of_decoding(prompts, expected):
    check_replay(expected, engine(prefill_chunk=32), prompts)


@pytest.mark.parametrize(
    ("page_slots", "num_prompt", "counts"), [(16, 15, [0, 7, 1, 6, 2, 5, 3, 4, 0]), (4, 9, [7, 7, 7])]
)
def test_no_acceptance_count_changes_a_bit(page_slots: int, num_prompt: int, counts: list[int]):
    """The second case keeps whole blocks whose last token is the first of a page."""
    prompt = random_prompt(num_prompt)
    truth = plain_alone(engine(), [prompt], [1 + sum(counts) + len(counts) + BLOCK])[0]
    check_every_acceptance(engine(page_slots=page_slots, num_pages=240), prompt, truth, counts)


def test_operations_that_see_the_whole_pass_do_change_bits(prompts, expected):
    """The negative control: torch's own products sum in an order that depends on the number of rows."""
    alone = plain_alone(engine(ops=reference_ops()), prompts, NUM_NEW)
    with pytest.raises(AssertionError, match="than alone without drafts"):
        check_company(alone, engine(ops=reference_ops()), prompts, num_rows=6, logits=True)
