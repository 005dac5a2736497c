"""The table of block sizes by rows, and what becomes of it in vLLM's own option. None of this needs vLLM."""

from importlib.util import find_spec

import pytest

from orthrus.integrations.vllm import speculative_config
from orthrus.integrations.vllm.block_sizes import BY_ROWS, at_most, check_table, ranges_of, read_block_sizes


def test_option_is_a_number_auto_or_a_table():
    assert read_block_sizes("16") == 16
    assert read_block_sizes("auto") is BY_ROWS
    assert read_block_sizes("8:16,1:32,64:1") == {1: 32, 8: 16, 64: 1}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("wide", "give a number of positions, auto, or a table"),
        ("1:32,8", "give a number of positions, auto, or a table"),
        ("1:32:8", "give a number of positions, auto, or a table"),
        ("1:32,8:16,8:4", "a number of rows stands twice"),
        ("2:32,8:16", "must begin with 1 row"),
        ("0:32,1:16", "must begin with 1 row"),
        ("1:32,8:0", "block sizes must be at least 1"),
        ("1:1,8:1", "never drafts"),
    ],
)
def test_option_that_means_nothing_is_named(text: str, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        read_block_sizes(text)


def test_own_table_is_a_table_that_never_widens_and_ends_in_plain_decoding():
    table = check_table(BY_ROWS)
    sizes = list(table.values())
    assert dict(table) == dict(BY_ROWS) and sizes == sorted(sizes, reverse=True) and sizes[-1] == 1


def test_every_number_of_rows_has_the_drafts_that_the_table_says():
    table = {1: 32, 3: 8, 6: 1}
    ranges = ranges_of(table)
    for num_rows in range(1, 600):
        (drafts,) = (drafts for first, last, drafts in ranges if first <= num_rows <= last)
        assert drafts == (31 if num_rows < 3 else 7 if num_rows < 6 else 0)


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm-test")
def test_vllm_reads_the_ranges_as_they_are_meant():
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    drafts = build_dynamic_sd_schedule_lookup(ranges_of({1: 32, 3: 8, 6: 1}), 100, 31)
    assert drafts[1:] == [31, 31, 7, 7, 7, *[0] * 95]


def test_configuration_drafts_the_widest_block_of_the_table():
    assert speculative_config("m", block_size={8: 4, 1: 16}) == {
        "method": "dflash", "model": "m", "num_speculative_tokens": 15,
        "num_speculative_tokens_per_batch_size": [[1, 7, 15], [8, 1 << 20, 3]],
    }  # fmt: skip
    assert "num_speculative_tokens_per_batch_size" not in speculative_config("m", block_size=16)
    with pytest.raises(ValueError, match="must begin with 1 row"):
        speculative_config("m", block_size={2: 16})
    assert max(at_most(BY_ROWS, 8).values()) == 8
