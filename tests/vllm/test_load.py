"""Block sizes by load in vLLM, on a CPU in fp32: rows come and go, and each step drafts, verifies and keeps what this
project's own decoder does at the block size that the table names for its rows.

An engine takes half a minute to start, so each answers for several tests. `make vllm-test` has what they need.
"""

from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.stopping import Stopping
from tests.vllm.subjects import V2, model, plain_of, prompts, round_over, run
from tests.vllm.test_engine import NUM_SAMPLED, SAMPLED_PROMPT, TEMPERATURE, check_law, small_checkpoint

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm-test")

TABLE = {1: 32, 3: 8, 6: 1}
"""From one row on blocks of 32, from three on of 8, from six on none."""
ARRIVALS, LENGTHS = (0, 0, 4, 4, 7, 7, 7), (72, 64, 40, 36, 12, 12, 10)
"""Steps after which rows come, and tokens after which they leave: 2 rows, 4, 7, 4 and 2 in turn."""
SHORT = tuple(ids for ids in prompts() if len(ids) < 100)[: len(ARRIVALS)]


@cache
def answer(runner: str) -> dict[str, Any]:
    one = round_over(SHORT) | {"arrivals": ARRIVALS, "lengths": LENGTHS}
    version, _, scheduling = runner.partition(" ")
    env = {"V1": None, "V2": V2}[version]
    return run([one], env=env, block_size=TABLE, asynchronous=scheduling == "asynchronous")["rounds"][0]


RUNNERS = pytest.mark.parametrize("runner", ["V1", "V2", "V1 asynchronous", "V2 asynchronous"])


def block_size(num_rows: int) -> int:
    """What the table says, read another way than vLLM does."""
    return TABLE[max(rows for rows in TABLE if rows <= num_rows)]


@cache
def num_kept(row: int, num_new: int, num_drafts: int) -> int:
    """How many of so many drafts behind a row's first new tokens this project's own decoder keeps."""
    text = plain_of(SHORT, max(LENGTHS) + 32)[row]
    decoder = Decoder(PortableBackend(model(), exact=False), block_size=1 + num_drafts)
    stopping = Stopping(max_new_tokens=num_drafts + 2, eos_token_ids=frozenset())
    prompt, *cycles = decoder.stream(Request(prompt_ids=(*SHORT[row], *text[: num_new - 1]), stopping=stopping))
    assert prompt.token_ids == (text[num_new - 1],) and cycles[0].num_drafted == num_drafts
    return cycles[0].num_accepted


def verified(steps: list[dict[str, Any]], row: int) -> list[int]:
    """Drafts of a row that each step behind its prompt's verified."""
    (name,) = {name for step in steps for name in step["rows"] if name.startswith(f"row-{row}")}
    return [step["rows"][name] for step in steps if name in step["rows"]][1:]


@RUNNERS
def test_text_is_plain_decodings_while_the_block_size_changes(runner: str):
    for tokens, length, own in zip(answer(runner)["tokens"], LENGTHS, plain_of(SHORT, max(LENGTHS)), strict=True):
        assert tokens == own[:length]


@RUNNERS
def test_block_size_falls_to_none_and_rises_again(runner: str):
    sizes = [block_size(len(step["rows"])) for step in answer(runner)["steps"]]
    assert [size for size, _ in groupby(sizes)] == [32, 8, 1, 8, 32], "the plan has become another"


@RUNNERS
def test_draft_passes_have_the_tables_positions_and_none_is_run_for_anchors_alone(runner: str):
    for step in answer(runner)["steps"]:
        num_rows = len(step["rows"])
        size = block_size(num_rows)
        assert step["drafted"] == ([num_rows * size] if size > 1 else []), f"{num_rows} rows"


@RUNNERS
def test_what_was_drafted_is_verified_in_the_next_step(runner: str):
    steps = answer(runner)["steps"]
    for before, step in zip(steps, steps[1:], strict=False):
        width = block_size(len(before["rows"])) - 1
        for name, num_drafts in step["rows"].items():
            assert num_drafts == (width if name in before["rows"] else 0), name


@RUNNERS
def test_drafts_and_accepted_drafts_are_this_projects_own_at_each_block_size(runner: str):
    num_drafts, num_tokens, kept = 0, 0, [0] * 31
    for row, length in enumerate(LENGTHS):
        num_new = 1
        for width in verified(answer(runner)["steps"], row):
            if num_new >= length:
                break  # scheduled before the step that ended the row was over
            accepted = num_kept(row, num_new, width) if width else 0
            num_drafts, num_tokens = num_drafts + (width > 0), num_tokens + width
            for position in range(accepted):
                kept[position] += 1
            num_new += accepted + 1
        assert num_new >= length
    counters = answer(runner)["counters"]
    assert counters["accepted_tokens_per_pos"] == kept, "the view drafts something else"
    assert (counters["drafts"], counters["draft_tokens"]) == ([num_drafts], [num_tokens])


def test_sampled_text_has_the_base_models_law_in_a_narrower_block(tmp_path: Path):
    """The law of a draft is kept by row and position, and looked up where it was drawn: the width is in both."""
    folder = small_checkpoint(tmp_path / "small")
    sampling = {"temperature": TEMPERATURE, "max_tokens": 3, "ignore_eos": True, "detokenize": False}
    one = round_over([list(SAMPLED_PROMPT)] * NUM_SAMPLED, **sampling)
    answer = run(
        [one], model_name=folder, block_size={1: 8, 2: 3}, env=V2, asynchronous=True, seed=1,
        speculation={"draft_sample_method": "probabilistic"}, skip_tokenizer_init=True, max_model_len=256,
    )["rounds"][0]  # fmt: skip
    (num_drafts,), (num_tokens,) = answer["counters"]["drafts"], answer["counters"]["draft_tokens"]
    assert num_tokens == 2 * num_drafts
    check_law(answer, folder)
