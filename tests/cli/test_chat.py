"""`orthrus chat`: turns, commands, and the cache that keeps the history."""

import signal
from pathlib import Path
from typing import Any

import pytest

from orthrus.cli.chat import Conversation
from orthrus.cli.session import open_session
from orthrus.decoding.decoder import Decoder, Record
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.row import Cycle, Row
from orthrus.decoding.sampling import Sampling
from orthrus.engine.engine import EngineBackend
from tests.cli.commands import refused, run
from tests.cli.tiny import CONTEXT

FIXED = ("--dtype", "float32", "--max-new-tokens", 12)


def conversation(model: Path, backend: str = "auto") -> Conversation:
    """A conversation of short greedy fp32 answers."""
    session = open_session(
        model=str(model), revision=None, base=None, dtype="float32", device="cpu", attn="sdpa", exact=None,
        backend=backend, block_size=None,
    )  # fmt: skip
    request = {"sampling": Sampling(), "drafting": True}
    session.begin(num_tokens=CONTEXT, **request)
    return Conversation(session, request, max_new_tokens=12)


def test_model_without_a_template_is_refused(model: Path):
    message = refused("chat", "--model", model, stdin="hello\n")
    assert "no chat template" in message and "generate" in message


def test_lines_are_answered_until_the_end_of_input(chat_model: Path):
    once = run("chat", "--model", chat_model, *FIXED, stdin="hello\n").stdout
    assert once.strip()
    assert run("chat", "--model", chat_model, *FIXED, stdin="hello\n\nmore\n").stdout.startswith(once)


def test_quit_ends_and_reset_forgets(chat_model: Path):
    once = run("chat", "--model", chat_model, *FIXED, stdin="hello\n").stdout
    assert run("chat", "--model", chat_model, *FIXED, stdin="hello\n/quit\nmore\n").stdout == once
    again = run("chat", "--model", chat_model, *FIXED, stdin="hello\n/reset\nhello\n").stdout
    assert again == once + once, "after /reset the same question gets the same answer"


def test_the_backend_is_named_and_the_engine_keeps_the_history_too(chat_model: Path):
    talks = {}
    for name in ("portable", "engine"):
        talks[name] = run("chat", "--model", chat_model, *FIXED, "--backend", name, stdin="hello\nmore\n/stats\n")
        assert talks[name].stderr.startswith(f"({name} backend)") and f"{name} backend" in talks[name].stdout
    assert talks["portable"].stdout.replace("portable", "engine") == talks["engine"].stdout
    assert "--backend slow" in refused("chat", "--model", chat_model, "--backend", "slow", stdin="hello\n")


def test_drafts_in_fp8_say_the_same(chat_model: Path):
    talk = ("chat", "--model", chat_model, *FIXED, "--backend", "engine")
    expected = run(*talk, stdin="hello\nmore\n")
    answered = run(*talk, "--draft-precision", "fp8", stdin="hello\nmore\n")
    assert answered.stdout == expected.stdout and answered.stdout.strip()
    assert answered.stderr.count("note: drafts read a second copy") == 1 and "note" not in expected.stderr
    for more in (["--draft-precision", "fp4"], ["--draft-precision", "fp8", "--no-diffusion"]):
        assert "--draft-precision fp" in refused(*talk, *more, stdin="hello\n")


def test_stats_and_unknown_commands(chat_model: Path):
    result = run("chat", "--model", chat_model, *FIXED, stdin="/stats\nhello\n/stats\n/nonsense\n")
    assert "nothing decoded yet" in result.stdout and "tokens per cycle" in result.stdout
    assert "no such command" in result.stderr


def test_reset_forgets_the_costs_too_and_bad_bytes_end_nothing(chat_model: Path):
    session = conversation(chat_model)
    with pytest.raises(ValueError, match="not valid UTF-8"):
        session.say("h\udcffllo")
    session.say("hello")
    assert "tokens per cycle" in session.report()
    session.reset()
    assert "nothing decoded yet" in session.report()


def test_turn_that_does_not_fit_is_an_error_and_not_the_end(chat_model: Path):
    result = run("chat", "--model", chat_model, *FIXED, stdin="x" * 300 + "\nhello\n")
    assert result.stderr.count("error: ") == 1
    assert result.stdout == run("chat", "--model", chat_model, *FIXED, stdin="hello\n").stdout


@pytest.mark.parametrize("backend", [PortableBackend, EngineBackend])
def test_second_turn_prefills_only_its_new_tokens(chat_model: Path, monkeypatch: pytest.MonkeyPatch, backend: type):
    prefilled, prefill = [], backend.prefill

    def spy(self: Any, row: Row, *, num_kept: int = 0, limit: int | None = None) -> Cycle:
        prefilled.append((len(row.tokens), len(row.tokens) - num_kept))
        return prefill(self, row, num_kept=num_kept, limit=limit)

    monkeypatch.setattr(backend, "prefill", spy)
    talk = conversation(chat_model, "engine" if backend is EngineBackend else "portable")
    talk.say("hello, this is a first message")
    talk.say("and more")
    (first, first_new), (second, second_new) = prefilled
    assert first_new == first
    # Broken UTF-8 in the answer may be spelled anew, so part of the answer may be prefilled again, never the prompt.
    assert second_new <= second - first, "the history was prefilled again"


def test_answer_does_not_depend_on_the_cache(chat_model: Path, capsys: pytest.CaptureFixture[str]):
    talk = conversation(chat_model)
    talk.say("hello")
    first = capsys.readouterr().out
    talk.say("and more")
    warm = capsys.readouterr().out
    cold = conversation(chat_model)
    cold.remember("hello", first.removesuffix("\n"))
    cold.say("and more")
    assert capsys.readouterr().out == warm


def test_interrupt_stops_the_answer_and_not_the_program(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    talk = conversation(chat_model)
    step = Decoder.step

    def interrupted_step(self: Decoder) -> list[Record]:
        signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Decoder, "step", interrupted_step)
    talk.say("hello")
    monkeypatch.undo()
    first = capsys.readouterr().out
    talk.say("and more")
    assert capsys.readouterr().out and len(first) < 12, "the cycle under way ends, no other begins"
    talk.reset()
    talk.say("hello")
    assert capsys.readouterr().out.startswith(first.rstrip("\n"))
