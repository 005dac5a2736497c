"""`orthrus generate` through the door users use: its text, its JSON, its comparison, and every refusal."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from orthrus.cli import options, session
from orthrus.cli.app import app
from orthrus.decoding.backends import BackendName, DraftPrecision
from orthrus.evaluation.batches import BatchMeasurement
from tests.cli.commands import OFFLINE, PROGRAM, last_json, refused, run, run_process
from tests.cli.tiny import CONTEXT, END, START

PROMPT = "def add(a, b):\n"


def generate(model: Path, *arguments: object, stdin: str | None = None) -> dict:
    """The JSON document of a short fp32 answer."""
    fixed = ("--dtype", "float32", "--max-new-tokens", 24, "--json")
    return last_json(run("generate", "--model", model, *fixed, *arguments, stdin=stdin).stdout)


def test_json_says_what_was_measured_on_what(model: Path):
    answer = generate(model, PROMPT, "--block-size", 4, "--seed", 3)
    assert answer["num_tokens"] == 24 and answer["finish_reason"] == "length"
    assert answer["num_prompt_tokens"] == len(PROMPT)
    assert answer["mode"] == "diffusion" and answer["seed"] == 3 and answer["block_size"] == 4
    assert answer["dtype"] == "float32" and answer["device"] == "cpu" and answer["backend"] == "portable"
    assert answer["stats"]["num_cycles"] > 0
    assert {"orthrus", "torch", "transformers", "python"} <= set(answer["versions"])


@pytest.mark.parametrize("backend", options.BACKENDS)
def test_a_prompt_beyond_the_context_is_refused_as_such(model: Path, backend: str):
    message = refused("generate", "--model", model, "--backend", backend, "--device", "cpu", "x" * (CONTEXT + 1))
    assert f"the prompt has {CONTEXT + 1} tokens, the model's context is {CONTEXT}: shorten it" in message


def test_text_is_the_same_without_drafting_and_at_any_block_size(model: Path):
    plain = generate(model, PROMPT, "--no-diffusion")
    assert plain["mode"] == "ar" and plain["stats"]["num_drafted"] == 0
    for block_size in (2, 5, 8):
        assert generate(model, PROMPT, "--block-size", block_size)["text"] == plain["text"]


def test_blocks_are_short_on_a_cpu_unless_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "CPU_BLOCK_SIZE", 4)
    assert generate(model, PROMPT)["block_size"] == 4
    assert generate(model, PROMPT, "--block-size", 8)["block_size"] == 8


def test_auto_writes_the_same_text_and_counts_its_widths(model: Path):
    answer = generate(model, PROMPT, "--block-size", "auto")
    assert answer["text"] == generate(model, PROMPT, "--no-diffusion")["text"]
    assert answer["widths"] == "auto" and generate(model, PROMPT)["widths"] == "fixed"
    stats = answer["stats"]
    assert sum(stats["width_histogram"]) == stats["num_cycles"] + stats["num_plain_steps"]


def test_widths_are_chosen_unasked_only_where_no_text_depends_on_them(model: Path, monkeypatch: pytest.MonkeyPatch):
    """As `generate` of the library does: the engine is asked as on a GPU, where no width changes a bit."""
    as_on_a_gpu = property(lambda chosen: "auto" if chosen.name == "engine" else None)
    monkeypatch.setattr("orthrus.decoding.backends.Chosen.default_block_size", as_on_a_gpu)
    monkeypatch.setattr(session, "has_short_blocks", lambda model: False)
    speculative = ("--temperature", 0.9)

    def widths(*arguments: object) -> str:
        return generate(model, PROMPT, "--backend", "engine", *arguments)["widths"]

    assert widths() == widths(*speculative, "--seed", 1) == widths("--compare") == "auto"
    assert widths("--block-size", 3) == "fixed"
    assert widths(*speculative) == "fixed", "a speculative text would depend on the clock"
    assert widths(*speculative, "--block-size", "auto") == "auto"
    assert widths("--no-diffusion") == "fixed", "nothing is drafted"
    assert widths("--backend", "portable") == "fixed"


def test_block_size_is_a_number_or_auto(model: Path):
    assert "--block-size fast" in refused("generate", PROMPT, "--model", model, "--block-size", "fast")


def test_streamed_text_is_the_json_text_and_stdout_holds_nothing_else(model: Path):
    expected = generate(model, PROMPT)["text"]
    result = run("generate", PROMPT, "--model", model, "--dtype", "float32", "--max-new-tokens", 24)
    assert result.stdout == expected + "\n"
    assert "24 tokens (length)" in result.stderr


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_prompt_comes_from_stdin(model: Path, argument: list[str]):
    assert generate(model, *argument, stdin=PROMPT)["text"] == generate(model, PROMPT)["text"]


def test_view_file_finds_its_base(model: Path, view: Path):
    assert generate(view, PROMPT)["text"] == generate(model, PROMPT)["text"]


def test_seed_decides_sampled_text_with_and_without_drafting(model: Path):
    settings = ("--temperature", 1.0, "--top-k", 50, "--top-p", 0.95, "--seed", 7)
    first = generate(model, PROMPT, *settings)["text"]
    assert generate(model, PROMPT, *settings)["text"] == first
    assert generate(model, PROMPT, *settings, "--no-diffusion")["text"] == first, "a seed means the coupled rule"
    assert generate(model, PROMPT, *settings[:-1], 8)["text"] != first


def test_stop_text_ends_the_answer(model: Path):
    text = generate(model, PROMPT)["text"]
    # A stop text is also found inside special tokens, which the printed text leaves out.
    stop = next(letter for letter in text[4:] if letter.isascii() and letter not in text[:4] + START + END)
    answer = generate(model, PROMPT, "--stop", stop, "--stop", "never in it")
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == text[: text.index(stop) + 1], "the text ends with the token that completes the stop"


def test_the_backend_is_named_and_writes_the_same_text(model: Path):
    answers = {name: generate(model, PROMPT, "--backend", name) for name in ("auto", "portable", "engine")}
    assert len({answer["text"] for answer in answers.values()}) == 1
    named = {name: (answer["backend"], answer["refusal"]) for name, answer in answers.items()}
    assert named == {"auto": ("portable", None), "portable": ("portable", None), "engine": ("engine", None)}
    assert answers["engine"]["attn_implementation"] is None and not answers["engine"]["packed"]
    assert answers["engine"]["stats"]["num_cycles"] > 0
    compared = generate(model, PROMPT, "--compare", "--backend", "engine")
    assert compared["identical"] and compared["backend"] == "engine"
    arguments = ("--model", model, "--dtype", "float32", "--max-new-tokens", 12, "--compare", "--backend", "engine")
    assert ", engine backend, " in run("generate", PROMPT, *arguments).stdout


FP8 = ("--backend", "engine", "--draft-precision", "fp8")


def test_drafts_in_fp8_write_the_same_text_and_their_copy_is_noted_once(model: Path):
    answer = generate(model, PROMPT, *FP8)
    assert answer["text"] == generate(model, PROMPT, "--no-diffusion")["text"]
    assert answer["draft_precision"] == "fp8" and answer["stats"]["num_cycles"] > 0
    assert generate(model, PROMPT, "--backend", "engine")["draft_precision"] is None
    arguments = ("generate", PROMPT, "--model", model, "--dtype", "float32", "--max-new-tokens", 12)
    result = run(*arguments, *FP8, "--compare")
    assert result.stderr.count("note: drafts read a second copy of the weights in fp8: 0.0 MB more") == 1, "once"
    assert "engine backend, drafts in fp8, " in result.stdout and "texts identical: yes" in result.stdout
    assert "note" not in run(*arguments, "--backend", "engine").stderr


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(30_000, "0.0 MB"), (99_900_000, "99.9 MB"), (100e6, "0.1 GB"), (7_660_000_000, "7.7 GB")]
)
def test_what_the_copy_takes_is_said_in_a_unit_of_its_size(
    num_bytes: int, text: str, capsys: pytest.CaptureFixture[str]
):
    found = BatchMeasurement(
        batch=1, backend="engine", exact=True, refusal=None, draft_precision="fp8", draft_bytes=num_bytes
    )
    session.note_backend(found)
    assert capsys.readouterr().err == f"note: drafts read a second copy of the weights in fp8: {text} more\n"


def test_options_are_those_of_the_library():
    assert (options.BACKENDS, options.DRAFT_PRECISIONS) == (get_args(BackendName), get_args(DraftPrecision))


def test_a_refused_engine_is_noted_once(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orthrus.decoding.backends.is_preferred", lambda model: True)
    arguments = ("generate", PROMPT, "--model", model, "--dtype", "float32", "--max-new-tokens", 12)
    assert "note" not in run(*arguments).stderr
    result = run(*arguments, "--attn", "eager", "--json")
    assert result.stderr.count("note: decoding on the portable backend: attn_implementation 'eager'") == 1
    answer = last_json(result.stdout)
    assert answer["backend"] == "portable" and answer["refusal"] in result.stderr


@pytest.mark.parametrize("sampled", [[], ["--temperature", 0.8, "--seed", 1]])
def test_compare_says_identical_in_fp32(model: Path, sampled: list[object]):
    document = generate(model, PROMPT, "--compare", *sampled)
    assert document["identical"] and document["divergence"] is None
    assert document["plain"]["stats"]["num_drafted"] == 0 and document["drafted"]["stats"]["num_cycles"] > 0
    assert document["speed_up"] > 0 and document["rounds"] == 3


def test_compare_prints_both_speeds_and_the_verdict(model: Path):
    arguments = ("--model", model, "--dtype", "float32", "--max-new-tokens", 12, "--compare")
    output = run("generate", PROMPT, *arguments).stdout
    assert "texts identical: yes" in output
    for word in ("tokens/s", "N", "TPF", "without drafting", "with drafting", "speed-up", "threads"):
        assert word in output


def test_compare_shows_what_exact_passes_cost_plain_decoding(model: Path):
    arguments = ("--model", model, "--dtype", "bfloat16", "--max-new-tokens", 12, "--compare")
    assert "in 1-row passes" in run("generate", PROMPT, *arguments).stdout
    assert "in 1-row passes" not in run("generate", PROMPT, *arguments, "--no-exact").stdout
    assert last_json(run("generate", PROMPT, *arguments, "--json").stdout)["one_row_tokens_per_second"] > 0


def test_trace_without_a_terminal_brackets_every_cycle(model: Path):
    output = run("generate", PROMPT, "--model", model, "--dtype", "float32", "--max-new-tokens", 12, "--trace").stdout
    legend, _, cycles = output.partition("\n\n")
    assert "accepted drafts" in legend and "\x1b" not in output
    assert cycles.count("|") >= 2 and cycles.startswith("[")


def test_chat_flag_applies_the_template(chat_model: Path, model: Path):
    assert generate(chat_model, "hi", "--chat")["num_prompt_tokens"] > generate(chat_model, "hi")["num_prompt_tokens"]
    assert "no chat template" in refused("generate", "hi", "--chat", "--model", model)


# Bad input: one clear line each, exit code 2, nothing on stdout.


def test_unknown_model_is_named():
    done = run_process("generate", "x", "--model", "nobody/no-such-model")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "nobody/no-such-model" in done.stderr
    assert "./no-such-folder" in refused("generate", "x", "--model", "./no-such-folder")


def broken_copy(model: Path, folder: Path, change) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["self_attn.k_proj_diff.weight", "mlp.up_proj.weight"])
def test_missing_tensor_is_named(model: Path, tmp_path: Path, name: str):
    tensor = f"model.layers.1.{name}"
    broken = broken_copy(model, tmp_path / "broken", lambda tensors: tensors.pop(tensor))
    assert tensor in refused("generate", "x", "--model", broken)


def test_unexpected_tensor_is_named(model: Path, tmp_path: Path):
    broken = broken_copy(model, tmp_path / "broken", lambda tensors: tensors.update(stray=torch.zeros(2)))
    assert "stray" in refused("generate", "x", "--model", broken)


def test_nan_weights_are_refused(model: Path, tmp_path: Path):
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][:] = torch.nan

    broken = broken_copy(model, tmp_path / "broken", poison)
    message = refused("generate", "x", "--model", broken)
    assert "nan" in message.lower()


def test_view_on_the_wrong_base_is_refused(view: Path, base: Path, tmp_path: Path):
    other = broken_copy(base, tmp_path / "other", lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert "base" in refused("generate", "x", "--model", view, "--base", other)


def test_long_prompt_is_refused_with_both_lengths(model: Path):
    message = refused("generate", "x" * (CONTEXT + 1), "--model", model)
    assert str(CONTEXT + 1) in message and str(CONTEXT) in message


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", ""], "empty"),
        (["generate", "a\udcff"], "not valid UTF-8"),
        (["generate", "x", "--device", "meta"], "--device meta"),
        (["generate", "x", "--max-new-tokens", 0], "max_new_tokens"),
        (["generate", "x", "--dtype", "float8"], "--dtype float8"),
        (["generate", "x", "--device", "cuda:99"], "--device cuda:99"),
        (["generate", "x", "--device", "abacus"], "--device abacus"),
        (["generate", "x", "--block-size", 1], "block_size"),
        (["generate", "x", "--block-size", 9], "block_size"),
        (["generate", "x", "--temperature", -1], "temperature"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
        (["generate", "x", "--temperature", 1, "--top-p", 0], "top_p"),
        (["generate", "x", "--top-k", 5], "--top-k"),
        (["generate", "x", "--no-diffusion", "--block-size", 4], "--block-size"),
        (["generate", "x", "--no-diffusion", "--compare"], "--compare"),
        (["generate", "x", "--temperature", 1, "--compare"], "--seed"),
        (["generate", "x", "--trace", "--json"], "--trace"),
        (["generate", "x", "--stop", ""], "stop"),
        (["generate", "x", "--attn", "no_such_attention"], "no_such_attention"),
        (["generate", "x", "--backend", "fast"], "--backend fast"),
        (["generate", "x", "--backend", "engine", "--attn", "eager"], "--attn eager"),
        (["generate", "x", "--backend", "engine", "--exact", "--device", "cpu"], "exact=True"),
        (["generate", "x", "--backend", "engine", "--draft-precision", "int4"], "--draft-precision int4: choose fp8"),
        (["generate", "x", "--backend", "portable", "--draft-precision", "fp8"], "effect with --backend portable"),
        (["generate", "x", "--no-diffusion", *FP8], "effect with --no-diffusion"),
        (["generate", "x", "--device", "cpu", "--draft-precision", "fp8"], "this model is on cpu"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_bad_argument_is_refused_by_name(model: Path, arguments: list[object], word: str):
    assert word in refused(*arguments, "--model", model)


def test_an_empty_model_name_is_no_name():
    assert "--model is empty" in refused("generate", "x", "--model", "")


def test_a_full_disk_is_no_mistake_of_the_users(model: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object, **settings: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orthrus.cli.generate.run_once", full)
    assert "No space left" in refused("generate", "x", "--model", model, code=1)


def test_nothing_to_time_is_said(model: Path):
    output = run("generate", PROMPT, "--model", model, "--max-new-tokens", 1, "--compare").stdout
    assert "nothing to time" in output and "texts identical: yes" in output and "0.0" not in output


def test_empty_stdin_is_refused(model: Path):
    assert "empty" in refused("generate", "--model", model, stdin="")


# What only a process of its own shows.


def test_process_reads_stdin_and_says_nothing_but_its_cost(model: Path):
    done = run_process("generate", "--model", model, "--max-new-tokens", 20, stdin=PROMPT)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("20 tokens"), "loading bars or library warnings"


def test_reader_that_goes_away_is_no_traceback(model: Path):
    arguments = ["generate", PROMPT, "--model", str(model), "--max-new-tokens", "200"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*PROGRAM, *arguments], env=os.environ | OFFLINE, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in errors and "Exception" not in errors


def test_trace_in_a_terminal_is_coloured_and_no_color_is_obeyed(model: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ("generate", PROMPT, "--model", model, "--max-new-tokens", 12, "--trace")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = run(*arguments).stdout
    assert "\x1b[32m" in coloured and "\x1b[1;33m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = run(*arguments).stdout
    assert "\x1b" not in plain and "[" in plain


def test_error_of_ours_exits_1_and_its_traceback_is_on_request(model: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: object, **settings: object) -> None:
        raise RuntimeError("a wheel\ncame off")

    monkeypatch.setattr("orthrus.cli.session.open_session", broken)
    assert "RuntimeError: a wheel came off" in refused("generate", "x", "--model", model, code=1)
    monkeypatch.setenv("ORTHRUS_DEBUG", "1")
    result = CliRunner().invoke(app, ["generate", "x"])
    assert "Traceback" in result.stderr and result.exit_code == 1
