"""Block size by load: how many rows a step decodes says how many positions each of their blocks has.

A cycle passes every block twice. While few rows decode, both passes read the weights and the positions cost next to
nothing; with many they cost their own time each, and what is drafted in vain is paid by all rows. A table names the
block size from a number of rows on; 1 is the anchor alone, which is plain decoding without a draft pass. A step's rows
are all that vLLM schedules in it, prompts included.
"""

from collections.abc import Mapping

BY_ROWS: Mapping[int, int] = {1: 32, 8: 16, 24: 8, 48: 4, 72: 1}
"""From so many rows on, blocks of so many positions.

From vLLM 0.26's own cycles, 8B on an H200 (docs/benchmarks.md, benchmarks/results/vllm_h200_2026-11-27.json): at each
measured batch the block that writes most at 8.5 tokens per cycle, or a smaller one where that would write less than
plain decoding at 3.7; changes lie between measured batches. At 64 rows blocks of 4 are 1.0 to 1.4 times plain
decoding; beyond, computed from there, they fall below it at 3.7 tokens per cycle, so nothing is drafted.
"""

ANY_BATCH = 8
"""Where vLLM keeps no table, with data parallelism: at 8.5 tokens per cycle 1.4 (64 rows) to 2.5 (4 rows) times plain
decoding by the same cycles; at 3.7 and 64 rows 0.9."""

MOST_ROWS = 1 << 20
"""More than any engine decodes at once: where the last range of vLLM's table ends."""


def read_block_sizes(text: str) -> int | Mapping[int, int]:
    """What `--block-size` means: a number, "auto" (`BY_ROWS`), or a table such as "1:32,8:16,24:8,72:1".

    Raises `ValueError` that names what is wrong.
    """
    if text == "auto":
        return BY_ROWS
    try:
        if ":" not in text:
            return int(text)
        pairs = [tuple(map(int, entry.split(":"))) for entry in text.split(",")]
        table = {rows: size for rows, size in pairs}
    except ValueError as error:
        raise ValueError(
            f"--block-size {text}: give a number of positions, auto, or a table by rows such as 1:32,8:16,24:8,72:1"
        ) from error
    if len(table) < len(pairs):
        raise ValueError(f"--block-size {text}: a number of rows stands twice in the table")
    return check_table(table)


def check_table(table: Mapping[int, int]) -> Mapping[int, int]:
    """The table, in the order of its rows; `ValueError` for one that leaves a batch out or never drafts."""
    if 1 not in table or min(table) < 1:
        raise ValueError(f"a table of block sizes must begin with 1 row, got {dict(table)}")
    if min(table.values()) < 1:
        raise ValueError(f"block sizes must be at least 1 (the anchor alone, which drafts nothing), got {dict(table)}")
    if max(table.values()) < 2:
        raise ValueError("a table of blocks of 1 never drafts: serve without a speculative configuration")
    return dict(sorted(table.items()))


def at_most(table: Mapping[int, int], trained: int) -> Mapping[int, int]:
    """The table for a view that was trained with smaller blocks."""
    return {rows: min(size, trained) for rows, size in table.items()}


def ranges_of(table: Mapping[int, int]) -> list[list[int]]:
    """vLLM's `num_speculative_tokens_per_batch_size`: [first rows, last rows, drafts], one behind the other."""
    starts = list(table)
    ends = [start - 1 for start in starts[1:]] + [MOST_ROWS]
    return [[start, end, table[start] - 1] for start, end in zip(starts, ends, strict=True)]
