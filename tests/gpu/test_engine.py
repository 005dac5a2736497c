"""The engine's exactness claims on a GPU, in bf16, through its kernels and graphs: L1 and L2 of docs/lossless.md.

The checks are those of tests/engine, which a CPU runs over plain torch. `ORTHRUS_BIT_PROMPTS` sets how many prompts
each comparison takes (40 by default; published claims are made with 1,000).
"""

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from orthrus.config import OrthrusConfig
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.engine.engine import EngineBackend
from orthrus.engine.graphs import Graphs
from orthrus.engine.operations import reference_ops
from orthrus.environment import BUNDLED
from tests.engine.bits import Trace, check_company, check_every_acceptance, check_replay, plain_alone, random_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

NUM_PROMPTS = int(os.environ.get("ORTHRUS_BIT_PROMPTS", "40"))


def bundled() -> nn.Module:
    return OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=torch.bfloat16).cuda().eval()


def wide() -> nn.Module:
    """Two layers at the widths of Qwen3-1.7B with random weights, where near-ties abound; the view drafts as the AR
    view writes, so that rows advance by all kinds of steps."""
    config = OrthrusConfig(
        vocab_size=8192, hidden_size=2048, intermediate_size=6144, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, block_size=32, mask_token_id=8191,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.device("cuda"):
        model = OrthrusForCausalLM(config).to(torch.bfloat16).eval()
    random_weights(model, 0)
    model.init_view()
    return model


def engine(model: nn.Module, **options: Any) -> EngineBackend:
    settings: dict[str, Any] = {"num_pages": 1024} | options
    return EngineBackend(model, **settings)


@pytest.fixture(scope="module", params=[bundled, wide])
def model(request: pytest.FixtureRequest) -> nn.Module:
    make: Callable[[], nn.Module] = request.param
    return make()


@pytest.fixture(scope="module")
def prompts(model: nn.Module) -> list[list[int]]:
    """Lengths around the edges of pages (64) and of attention's splits (256), and any others."""
    rng = random.Random(0)
    edges = [1, 62, 63, 64, 65, 127, 128, 129, 250, 255, 256, 257, 300, 511, 512, 513]
    lengths = [edges[i] if i < len(edges) else rng.randint(1, 600) for i in range(NUM_PROMPTS)]
    return [[rng.randrange(model.config.vocab_size - 1) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="module")
def expected(model: nn.Module, prompts: list[list[int]]) -> list[Trace]:
    rng = random.Random(1)
    return plain_alone(engine(model), prompts, [rng.randint(24, 72) for _ in prompts])


@pytest.mark.parametrize("logits", [True, False], ids=["logits", "argmax"])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 32])
def test_a_drafted_row_in_company_has_the_bits_of_the_row_alone(
    model: nn.Module, prompts: list[list[int]], expected: list[Trace], num_rows: int, logits: bool
) -> None:
    num_tokens = check_company(expected, engine(model), prompts, num_rows=num_rows, logits=logits)
    assert num_tokens == sum(len(trace.tokens) for trace in expected)


def test_graphs_and_chunks_change_no_bit(model: nn.Module, prompts: list[list[int]], expected: list[Trace]) -> None:
    ways: list[dict[str, Any]] = [
        {"graphs": Graphs(None)},
        {"prefill_chunk": 96},
        {"page_slots": 16, "num_pages": 4096},
    ]
    for options in ways:
        check_company(expected, engine(model, **options), prompts, num_rows=8, logits=False)


def test_what_is_computed_again_or_reused_has_the_bits_of_decoding(
    model: nn.Module, prompts: list[list[int]], expected: list[Trace]
) -> None:
    check_replay(expected, engine(model), prompts)


def test_graphs_are_replayed(model: nn.Module, prompts: list[list[int]], expected: list[Trace]) -> None:
    backend = engine(model)
    check_company(expected[:4], backend, prompts[:4], num_rows=4, logits=False)
    assert len(backend.graphs.captured) >= 2


@pytest.mark.parametrize("num_prompt", [1, 61, 250])
def test_no_acceptance_count_changes_a_bit(model: nn.Module, num_prompt: int) -> None:
    block_size = model.config.block_size
    counts = list(range(block_size)) + list(range(block_size))[::-1]
    rng = random.Random(num_prompt)
    prompt = [rng.randrange(model.config.vocab_size - 1) for _ in range(num_prompt)]
    # The rigged draft reads lengths on the host, which a draft that begins before the host has read knows nothing of.
    backend = engine(model, graphs=Graphs(None), looks_ahead=False)
    truth = plain_alone(backend, [prompt], [1 + sum(counts) + len(counts) + block_size])[0]
    check_every_acceptance(backend, prompt, truth, counts)


def test_operations_that_see_the_whole_pass_do_change_bits(model: nn.Module, prompts: list[list[int]]) -> None:
    """The negative control: cuBLAS chooses its kernels by the number of rows."""
    backend = engine(model, ops=reference_ops(), graphs=Graphs(None))
    some = prompts[:16]
    alone = plain_alone(backend, some, [40] * len(some))
    with pytest.raises(AssertionError, match="than alone without drafts"):
        check_company(alone, backend, some, num_rows=16, logits=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_takes_the_engine_by_itself_and_drafting_changes_no_text(dtype: torch.dtype) -> None:
    """The model card's call: nothing names the engine; a batch, sampled rows of one seed, and the memory given back."""
    model = OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=dtype, device_map="cuda", attn_implementation="sdpa")
    ids = torch.randint(1, 1000, (3, 40), device="cuda")
    call: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 100}
    for sampled in ({}, {"do_sample": True, "seed": 1}):
        texts = []
        for drafting in (True, False):
            output, stats = model.generate(**call, **sampled, use_diffusion_mode=drafting, return_stats=True)
            assert (stats.backend, stats.refusal) == ("engine", None)
            texts.append(output.tolist())
        assert texts[0] == texts[1]
    before = torch.cuda.memory_reserved()
    model.release_engine()
    assert torch.cuda.memory_reserved() < before
    model.cpu()
    assert (
        model.generate(**{name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in call.items()}) is not None
    )
