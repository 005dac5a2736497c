"""The bundled model in this project's own decoder, and engines of vLLM in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.stopping import Stopping
from orthrus.environment import BUNDLED
from orthrus.integrations.vllm import BlockSize, speculative_config
from orthrus.model.checkpoint import load_tokenizer
from tests.vllm.program import ANSWER

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 24
NUM_NEW = 48
GREEDY = {"temperature": 0.0, "max_tokens": NUM_NEW, "ignore_eos": True}
ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 1280, "max_num_seqs": NUM_PROMPTS,
    "max_num_batched_tokens": 1700, "long_prefill_token_threshold": 200,
}  # fmt: skip
"""A step has room for 24 blocks of 32 beside prompts (else vLLM cuts blocks short, and other drafts are accepted), but
not for all prompts, of which it takes at most 200 tokens each."""


@cache
def model() -> OrthrusForCausalLM:
    """In fp32, on the GPU where there is one."""
    found = OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    return found.cuda() if torch.cuda.is_available() else found


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """24 beginnings of this project's own files, of 3 to 900 tokens."""
    tokenizer = load_tokenizer(BUNDLED)
    files = sorted((ROOT / "src" / "orthrus").glob("*/*.py"))
    long = [text for file in files if len(text := file.read_text()) > 4500]
    lengths = [3, 900, *(5 + 13 * i for i in range(NUM_PROMPTS - 2))]
    found = [tokenizer(text[:4500])["input_ids"][:length] for text, length in zip(long, lengths, strict=False)]
    assert list(map(len, found)) == lengths, "the files have become too few or too short"
    return tuple(map(tuple, found))


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a decoding of prompts comes to, as vLLM counts it."""

    tokens: list[list[int]]
    num_drafts: int
    """Draft passes, counted a row."""
    accepted_per_position: list[int]


def expected(num_prompts: int, block_size: int) -> Expected:
    """This project's own decoding of the first prompts."""
    return expected_of(prompts()[:num_prompts], block_size, NUM_NEW)


@cache
def expected_of(some: tuple[tuple[int, ...], ...], block_size: int, num_new: int) -> Expected:
    """This project's own decoding of some prompts with the bundled model."""
    return decoded(model(), some, block_size, num_new)


def decoded(
    of: OrthrusForCausalLM, some: tuple[tuple[int, ...], ...], block_size: int, num_new: int = NUM_NEW
) -> Expected:
    """This project's own decoding of some prompts by a model, row by row.

    vLLM counts what a last cycle accepted before it cuts the text, so rows are decoded a block further than asked.
    """
    stopping = Stopping(max_new_tokens=num_new + block_size, eos_token_ids=frozenset())
    decoder = Decoder(PortableBackend(of, exact=False), block_size=block_size)
    tokens, num_drafts, accepted = [], 0, [0] * (block_size - 1)
    for ids in some:
        new: list[int] = []
        for record in decoder.stream(Request(prompt_ids=ids, stopping=stopping)):
            if new and len(new) < num_new:
                num_drafts += 1
                for position in range(record.num_accepted):
                    accepted[position] += 1
            new += record.token_ids
        tokens.append(new[:num_new])
    return Expected(tokens=tokens, num_drafts=num_drafts, accepted_per_position=accepted)


def plain(num_prompts: int, num_new: int = NUM_NEW) -> list[list[int]]:
    """This project's own text of the first prompts without drafting."""
    return plain_of(prompts()[:num_prompts], num_new)


@cache
def plain_of(some: tuple[tuple[int, ...], ...], num_new: int, of: OrthrusForCausalLM | None = None) -> list[list[int]]:
    """This project's own text of some prompts without drafting, by the bundled model unless another is given."""
    stopping = Stopping(max_new_tokens=num_new, eos_token_ids=frozenset())
    decoder = Decoder(PortableBackend(of or model(), exact=False))
    requests = [Request(prompt_ids=ids, stopping=stopping, drafting=False) for ids in some]
    return [[token for record in decoder.stream(one) for token in record.token_ids] for one in requests]


V2 = {
    "VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1",
    "PYTHONPATH": f"{ROOT / 'tests' / 'vllm' / 'interpreted'}:{ROOT / 'src'}:{ROOT}",
}  # fmt: skip
"""The environment in which vLLM takes its V2 runner on a CPU."""


def environment(**more: str) -> dict[str, str]:
    """For an engine's process: one thread, a small cache, no interpreter of Triton unless it is asked for."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    } | more  # fmt: skip


def round_of(num_prompts: int, *, fault: str | None = None, **sampling: Any) -> dict[str, Any]:
    """A round over the first prompts, greedy unless told otherwise."""
    return round_over(prompts()[:num_prompts], fault=fault, **sampling)


def round_over(some: Sequence[Sequence[int]], *, fault: str | None = None, **sampling: Any) -> dict[str, Any]:
    """A round over these prompts, greedy unless told otherwise."""
    return {"prompts": some, "sampling": GREEDY | sampling, "fault": fault}


def run(
    rounds: list[dict[str, Any]],
    *,
    model_name: str | Path = BUNDLED,
    view: str | Path | None = None,
    block_size: BlockSize | None = 32,
    env: dict[str, str] | None = None,
    speculation: dict[str, Any] | None = None,
    asynchronous: bool = False,
    **engine: Any,
) -> dict[str, Any]:
    """Run rounds on one engine; `block_size` None is plain decoding. Fails with the engine's own last words."""
    speculative = None
    if block_size is not None:
        speculative = speculative_config(view or model_name, block_size=block_size, **(speculation or {}))
    if asynchronous:
        env = (env or {}) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # other processes would not hear of it
    settings = ENGINE | {"model": str(model_name), "speculative_config": speculative} | engine
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.program"],
        input=json.dumps({"engine": settings, "rounds": rounds, "asynchronous": asynchronous}),
        capture_output=True, text=True, cwd=ROOT, env=environment(**(env or {})), timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"the engine failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    (answer,) = (line for line in done.stdout.splitlines() if line.startswith(ANSWER))  # vLLM logs behind it
    return json.loads(answer.removeprefix(ANSWER))
