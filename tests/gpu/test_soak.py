"""A long mixed workload through the scheduler: whatever comes, goes, gives way or is cancelled, each text is its own.

`ORTHRUS_SOAK_REQUESTS` sets how many requests there are in all (400 by default; published claims are made with 2,000).
Each goes through two schedules that differ in rows, pages, their size and prefill chunks, one of them with so few pages
that requests are preempted and prefixes given up; every tenth (`ORTHRUS_SOAK_ALONE_EVERY`) is decoded alone as well, at
batch 1 in a new engine.
Without CUDA the same is done by a toy in fp32, which shows that this file runs (tests/engine/test_soak.py).
"""

import os
import sysconfig
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.environment import BUNDLED
from orthrus.model.checkpoint import load_tokenizer
from tests.engine.test_soak import soak_toy
from tests.engine.workload import BlockSize, Limits, Mix, Soaked, soak

NUM_REQUESTS = int(os.environ.get("ORTHRUS_SOAK_REQUESTS", "400"))
ALONE_EVERY = int(os.environ.get("ORTHRUS_SOAK_ALONE_EVERY", "10"))
LIMITS = (
    Limits(num_pages=200, page_slots=16, max_rows=24, step_tokens=1024, prefill_chunk=512),
    Limits(num_pages=900, page_slots=64, max_rows=48, step_tokens=2048, prefill_chunk=320),
)
"""A request takes up to 1,732 slots, under 600 on average. Small pages run out while rows grow, which preempts."""
SOURCES = ("argparse.py", "configparser.py", "difflib.py", "statistics.py", "textwrap.py")
"""Of the standard library: text that the bundled model's view drafts well."""

WAYS: list[tuple[BlockSize, bool]] = [(32, False), (8, False), ("auto", False), (32, True)]
"""Block size, and whether all requests are greedy."""


def python_source() -> tuple[list[int], list[int]]:
    """Tokens of some modules, and of them those that come once in 100 to 1,000 tokens: what may end a request."""
    tokenizer, library = load_tokenizer(BUNDLED), Path(sysconfig.get_path("stdlib"))
    tokens = [token for name in SOURCES for token in tokenizer((library / name).read_text(encoding="utf-8")).input_ids]
    return tokens, [token for token, n in Counter(tokens).items() if 0.001 <= n / len(tokens) <= 0.01]


@cache
def bundled() -> nn.Module:
    return OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=torch.bfloat16).cuda().eval()


def soak_bundled(num_jobs: int, *, block_size: BlockSize, is_plain: bool) -> Soaked:
    """In bf16 by the kernels, which give a row its own bits: log-probabilities are equal."""
    text, stops = python_source()
    mix = Mix(
        text=text, stops=stops, num_prompt=1500, num_new=200, arrivals=1.0, is_plain=is_plain,
        has_speculative=block_size != "auto",
    )  # fmt: skip
    jobs = mix.jobs(num_jobs, seed=1)
    return soak(bundled(), jobs, block_size=block_size, limits=LIMITS, alone_every=ALONE_EVERY)


@pytest.mark.parametrize(("block_size", "is_plain"), WAYS)
def test_each_text_is_the_one_of_the_request_alone(block_size: BlockSize, is_plain: bool) -> None:
    begun = time.perf_counter()
    num_jobs = NUM_REQUESTS // len(WAYS)
    if torch.cuda.is_available():
        found = soak_bundled(num_jobs, block_size=block_size, is_plain=is_plain)
    else:
        found = soak_toy(num_jobs, block_size="auto" if block_size == "auto" else block_size // 4, is_plain=is_plain)
    print(
        f"\nblock size {block_size}, {'greedy' if is_plain else 'mixed'}: {time.perf_counter() - begun:.0f} s, {found}"
    )
    found.check_hardness()
