"""The bundled model: what is shipped, that it drafts as well as it did, and that drafting changes nothing."""

import json

import pytest
import torch

from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import Stopping
from orthrus.environment import BUNDLED
from orthrus.evaluation.repetition import distinct_4gram_share, is_looping
from orthrus.model.checkpoint import load_tokenizer
from tests.cli.commands import last_json, run_process

PROMPTS = (
    'def read_config(path: str) -> dict[str, str]:\n    """Read a file of KEY=VALUE lines, skipping blank lines."""',
    'class Stack:\n    """A last-in first-out container."""\n\n    def __init__(self):',
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    'def test_parse_empty():\n    """An empty document gives no nodes."""',
)
"""Written for this test."""


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest) -> OrthrusForCausalLM:
    return OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=request.param).eval()


def decode(model: OrthrusForCausalLM, *, drafting: bool, block_size: int = 16) -> tuple[list[list[int]], DecodingStats]:
    """Greedy texts of all prompts one after the other, 64 tokens each, and what they took."""
    tokenizer = load_tokenizer(BUNDLED)
    decoder = Decoder(PortableBackend(model), block_size=block_size)
    texts, total = [], DecodingStats(block_size=block_size)
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        row = decoder.admit(Request(prompt_ids=ids, stopping=Stopping(max_new_tokens=64), drafting=drafting)).row
        while decoder.step():
            pass
        texts.append(decoder.tokens(row)[len(ids) :])
        total = total.merge(decoder.stats(row))
        decoder.release(row)
    return texts, total


def test_drafting_changes_no_text_and_saves_passes(model: OrthrusForCausalLM) -> None:
    plain, _ = decode(model, drafting=False)
    drafted, stats = decode(model, drafting=True)
    assert drafted == plain, "drafting changed the text"
    # 3.15 in fp32, 3.23 in bf16 when the model was bundled; the slack is for near-ties on other processors.
    assert stats.tokens_per_cycle > 2.7, f"the view accepts less than it did: N {stats.tokens_per_cycle:.2f}"


def test_text_does_not_run_in_circles(model: OrthrusForCausalLM) -> None:
    texts, _ = decode(model, drafting=True)
    assert not any(is_looping(text) for text in texts)
    assert sum(map(distinct_4gram_share, texts)) / len(texts) > 0.7


def test_it_is_small_and_says_where_it_came_from() -> None:
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 60_000_000
    assert not [path for path in files if path.suffix == ".py"], "its code is the package"
    facts = json.loads((BUNDLED / "provenance.json").read_text())
    assert facts["recipe"]["name"] == "tiny-python" and facts["base"]["loss_nats_per_token"]["heldout"] > 0
    card = (BUNDLED / "README.md").read_text()
    assert "held-out" in card and "demonstration" in card


def test_generate_without_a_model_takes_the_bundled_one_offline() -> None:
    done = run_process("generate", PROMPTS[1], "--max-new-tokens", 24, "--json")
    assert done.returncode == 0, done.stderr
    report = last_json(done.stdout)
    assert report["num_tokens"] == 24 and "self" in report["text"]
