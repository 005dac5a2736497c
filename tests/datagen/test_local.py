"""Answers from this process: those of plain decoding, whatever shares the batch, whatever the order."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from orthrus.cli.app import app
from orthrus.datagen.answers import AnswerSettings
from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.sampling import Sampling
from orthrus.decoding.stopping import Stopping, eos_token_ids
from orthrus.environment import BUNDLED
from orthrus.model.checkpoint import load_model, load_tokenizer
from orthrus.training.data import packed_dataset
from orthrus.training.documents import DataSettings
from tests.cli.commands import last_json, refused, run
from tests.cli.tiny import CONTEXT, TEMPLATE, byte_tokenizer, write_base

TEXTS = (
    "def read(path):",
    "class Stack:\n    def __init__(self):",
    "import os\n\n\ndef main():",
    "def f(a, b):\n    return",
)


def write_prompts(path: Path, column: str, values: Any) -> Path:
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return path


def datagen(prompts: Path, out: Path, *more: object) -> list[dict[str, Any]]:
    """The rows of a run."""
    report = last_json(run("datagen", prompts, out, "--json", *more).stdout)
    assert report["remaining"] == report["failed"] == 0
    return [row for file in sorted(out.glob("part-*")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("texts") / "texts.jsonl", "text", TEXTS)


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return load_model(BUNDLED), load_tokenizer(BUNDLED)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_those_of_plain_decoding_at_any_batch_size(
    texts: Path, bundled: tuple[Any, Any], tmp_path: Path, temperature: float
):
    model, tokenizer = bundled
    sampled = ("--temperature", temperature, "--seed", 5) if temperature else ()
    runs = [datagen(texts, tmp_path / f"{n}", "--max-new-tokens", 16, "--batch-size", n, *sampled) for n in (1, 3)]
    assert runs[0] == runs[1], "an answer depends on the batch it was written in"
    settings = AnswerSettings(temperature=temperature, seed=5)
    decoder = Decoder(PortableBackend(model), block_size=8)
    for row in runs[0]:
        ids = tokenizer(row["prompt_text"])["input_ids"]
        request = Request(
            prompt_ids=ids, drafting=False,
            stopping=Stopping(max_new_tokens=16, eos_token_ids=eos_token_ids(model, tokenizer)),
            sampling=Sampling(temperature=temperature, seed=settings.seed_of(row["id"])),
        )  # fmt: skip
        expected = [token for record in decoder.stream(request) for token in record.token_ids]
        assert row["response_ids"] == expected and row["prompt_ids"] == ids
        assert row["response"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert row["ids_from"] == "decoder" and row["messages"] is None


def test_answer_is_what_generate_prints(texts: Path, tmp_path: Path):
    rows = datagen(texts, tmp_path / "run", "--max-new-tokens", 16, "--max-prompts", 1)
    told = last_json(run("generate", rows[0]["prompt_text"], "--max-new-tokens", 16, "--json").stdout)
    assert rows[0]["response"] == told["text"] and rows[0]["finish_reason"] == told["finish_reason"]


def test_stopped_run_ends_with_the_same_shards(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = ("--max-new-tokens", 12, "--shard-size", 3, "--batch-size", 2)
    whole = datagen(texts, tmp_path / "whole", *given)
    parted = tmp_path / "parted"
    step = Decoder.step

    def stopping_step(decoder: Decoder) -> Any:
        (parted / "STOP").touch()
        return step(decoder)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", stopping_step)
        patch.setattr("orthrus.datagen.stop.LOOK_SECONDS", 0.0)
        report = last_json(run("datagen", texts, parted, "--json", *given).stdout)
    assert report["stopped"] == "STOP" and report["answered"] == 2, "what was in flight is finished, no more begun"
    (parted / "STOP").unlink()
    assert datagen(texts, parted, *given) == whole
    names = [file.name for file in (tmp_path / "whole").glob("part-*")]
    assert all((tmp_path / "whole" / name).read_bytes() == (parted / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model without a view, with a chat template that shows what it was given."""
    folder = write_base(tmp_path_factory.mktemp("models") / "base")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if enable_thinking %}<think>{% endif %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_base_without_a_view_answers_conversations_undrafted(base: Path, tmp_path: Path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "old answer"}]
    prompts = write_prompts(tmp_path / "p.jsonl", "messages", [talk])
    given = ("--model", base, "--max-new-tokens", 8)
    (row,) = datagen(prompts, tmp_path / "run", *given)
    tokenizer = load_tokenizer(base)
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert row["messages"] == talk[:1] and row["prompt_text"] is None
    model = load_model(base, start_view=True, block_size=2, mask_token_id=0)
    ids = load_ids(row["prompt_ids"])
    expected = stock_greedy(base, ids, 8)
    assert row["response_ids"] == expected[: len(row["response_ids"])] and model.config.block_size == 2
    (thinking,) = datagen(prompts, tmp_path / "thinking", *given, "--enable-thinking")
    assert tokenizer.decode(thinking["prompt_ids"]).endswith("assistant\n<think>")
    assert "has no view" in refused("datagen", prompts, tmp_path / "x", *given, "--block-size", 4)


def test_an_answer_ends_before_a_token_that_the_tokenizer_does_not_have(base: Path, tmp_path: Path):
    """The embedding has 264 rows, the tokenizer 258 tokens: training would refuse the answer."""
    from transformers import Qwen3ForCausalLM

    padded = tmp_path / "padded"
    shutil.copytree(base, padded)
    model, greedy = Qwen3ForCausalLM.from_pretrained(base), stock_greedy(base, load_ids([71, 72]), 4)
    with torch.no_grad():
        model.lm_head.weight[262] = model.lm_head.weight[greedy[0]] * 1.2
        model.lm_head.weight[260] = model.lm_head.weight[greedy[3]] * 1.2
    model.save_pretrained(padded)
    prompts = write_prompts(tmp_path / "p.jsonl", "text", ["hi", "b", "zzz"])
    arguments = ["datagen", prompts, tmp_path / "run", "--model", padded, "--max-new-tokens", 40, "--json"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 1 and last_json(result.stdout)["failed"] == 1
    assert "first token is none of its tokenizer's" in (tmp_path / "run" / "failed.jsonl").read_text()
    rows = pq.read_table(tmp_path / "run" / "part-00000.parquet").to_pylist()
    for row in rows:
        whole = stock_greedy(padded, load_ids(row["prompt_ids"]), 40)
        first = next(place for place, token in enumerate(whole) if token >= 258)
        assert first > 1 and row["response_ids"] == whole[:first] and row["finish_reason"] == "length"
    settings = DataSettings(source=str(tmp_path / "run"), row_tokens=64)
    assert packed_dataset(settings, byte_tokenizer(), cache=tmp_path).counts["documents"] == len(rows) == 2


def load_ids(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


def stock_greedy(folder: Path, ids: Any, num_tokens: int) -> list[int]:
    """The stock model's own greedy text."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder).eval()
    output = model.generate(input_ids=ids, max_new_tokens=num_tokens, do_sample=False)
    return output[0, ids.shape[1] :].tolist()


def test_prompt_longer_than_the_context_is_recorded_and_the_others_answered(base: Path, tmp_path: Path):
    prompts = write_prompts(tmp_path / "p.jsonl", "text", ["x" * CONTEXT, "short", "y" * (CONTEXT - 3)])
    arguments = [
        "datagen",
        str(prompts),
        str(tmp_path / "run"),
        "--model",
        str(base),
        "--max-new-tokens",
        "5",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and last_json(result.stdout)["failed"] == 1
    assert "1 prompts failed; " in result.stderr and "failed.jsonl says why" in result.stderr
    entry = json.loads((tmp_path / "run" / "failed.jsonl").read_text())
    assert entry["reason"] == "the prompt has 256 tokens, the model's context is 256"
    rows = pq.read_table(tmp_path / "run" / "part-00000.parquet").to_pylist()
    assert sorted(len(row["response_ids"]) for row in rows) == [3, 5], "an answer ends where the context does"


# Bad input: one clear line each, exit code 2, nothing on stdout.


def test_options_that_would_be_ignored_are_refused(texts: Path, tmp_path: Path):
    def no(*more: object) -> str:
        return refused("datagen", texts, tmp_path / "run", *more)

    server = ("--endpoint", "http://localhost:1", "--model", "m")
    assert "--concurrency has no effect without --endpoint" in no("--concurrency", 3)
    assert "--tokenizer has no effect without --endpoint" in no("--tokenizer", "x")
    assert "--batch-size has no effect with --endpoint" in no(*server, "--batch-size", 3)
    assert "--dtype has no effect with --endpoint" in no(*server, "--dtype", "float32")
    assert "--no-diffusion has no effect with --endpoint" in no(*server, "--no-diffusion")
    assert "--endpoint needs --model" in no("--endpoint", "http://localhost:1")
    assert "--revision with --endpoint" in no(*server, "--revision", "abc")
    assert "--seed has no effect on greedy" in no("--seed", 1)
    assert "--top-p has no effect on greedy" in no("--top-p", 0.5)
    assert "plain text is no chat" in no(*server)
    assert "--enable-thinking has no effect on plain text" in no("--enable-thinking")
    assert "--api completions needs --tokenizer" in no(*server, "--api", "completions")
    assert "--block-size has no effect with --no-diffusion" in no("--no-diffusion", "--block-size", 4)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--temperature", "-1"], "temperature must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--temperature", "1", "--top-p", "0"], "top_p must be in"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--max-prompts", "0"], "max_prompts must be at least 1"),
        (["--shard-size", "0"], "shard_size must be at least 1"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--model", "/no/such/model"], "neither a folder nor a model id"),
        (["--split", "train"], "split names a part of a Hub data set"),
    ],
)
def test_bad_values_are_refused(texts: Path, tmp_path: Path, more: list[str], message: str):
    assert message in refused("datagen", texts, tmp_path / "run", *more)


def test_conversations_need_a_chat_template_and_files_must_be_there(tmp_path: Path):
    prompts = write_prompts(tmp_path / "p.jsonl", "prompt", ["hi"])
    assert "no chat template; give prompts as plain text" in refused("datagen", prompts, tmp_path / "run")
    assert "no .parquet or .jsonl file there" in refused("datagen", tmp_path / "absent.jsonl", tmp_path / "run")


def test_missing_packages_are_named(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'orthrus-llm[datagen]'" in refused("datagen", texts, tmp_path / "run")
