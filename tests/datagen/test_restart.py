"""Runs of the command that are stopped in every way there is, started again, and compared with an undisturbed one."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.cli.commands import OFFLINE, PROGRAM, last_json, refused, run
from tests.cli.tiny import TEMPLATE, byte_tokenizer
from tests.datagen.server import Server, answer_to

NUM_PROMPTS = 90


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(NUM_PROMPTS)))
    return path


def command(prompts: Path, out: Path, server: Server, *more: object) -> list[str]:
    fixed = ("--endpoint", server.url, "--model", "m", "--shard-size", 16, "--concurrency", 8)
    return [str(argument) for argument in ("datagen", prompts, out, *fixed, *more)]


def begin(prompts: Path, out: Path, server: Server, *more: object) -> "subprocess.Popen[str]":
    """The command in a process of its own."""
    return subprocess.Popen(
        [*PROGRAM, *command(prompts, out, server, *more)], env=os.environ | OFFLINE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(prompts: Path, out: Path, *more: object) -> dict[str, Any]:
    """Let the command come to its end, in this process, with a server that behaves."""
    with Server() as server:
        return last_json(run(*command(prompts, out, server, "--json", *more)).stdout)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def contents(path: Path) -> dict[str, str]:
    """The bytes of all shards."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("part-*"))}


def num_kept(path: Path) -> int:
    """Answers that are on the disk."""
    journal = path / "journal.jsonl"
    ids = {json.loads(line)["id"] for line in journal.read_bytes().splitlines()} if journal.exists() else set()
    for file in path.glob("part-*"):
        ids |= set(pq.read_table(file, columns=["id"])["id"].to_pylist())
    return len(ids)


@pytest.fixture(scope="module")
def expected(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    report = finish(prompts, out)
    assert (report["answered"], report["new"], report["failed"], report["remaining"]) == (
        NUM_PROMPTS,
        NUM_PROMPTS,
        0,
        0,
    )
    rows = [row for file in sorted(out.glob("part-*")) for row in pq.read_table(file).to_pylist()]
    asked = [row["messages"][-1]["content"] for row in rows]
    assert Counter(asked) == Counter(f"question {i}" for i in range(NUM_PROMPTS)), "a prompt was lost or doubled"
    assert all(row["response"] == answer_to(text) for row, text in zip(rows, asked, strict=True))
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    return contents(out)


def test_killed_run_loses_what_is_in_flight_alone_and_ends_with_the_same_shards(
    prompts: Path, tmp_path: Path, expected: dict[str, str]
):
    def faults(text: str, number: int) -> str | None:
        return "reset" if number == 1 and int(text.split()[1]) % 9 == 0 else None

    with Server(faults, delay_s=0.02) as server:
        for num_wanted in (25, 55):
            process = begin(prompts, tmp_path, server)
            wait_for(lambda n=num_wanted: sum(server.answered.values()) >= n)
            process.kill()
            process.communicate()
            num_given = len(server.answered)
            assert num_given - 8 <= num_kept(tmp_path) < NUM_PROMPTS, "more was lost than was in flight"
    kept = num_kept(tmp_path)
    report = finish(prompts, tmp_path)
    assert report["new"] == NUM_PROMPTS - kept and report["remaining"] == 0
    assert contents(tmp_path) == expected, "kills changed the shards"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "STOP"])
def test_stopped_run_finishes_what_is_in_flight_and_can_go_on(
    prompts: Path, tmp_path: Path, expected: dict[str, str], how: str
):
    once = [how]  # a second signal would end this very process

    def faults(text: str, number: int) -> None:
        with suppress(IndexError):
            if len(server.asked) < 40:
                return
            if once.pop() == "STOP":
                (tmp_path / "STOP").touch()
            else:
                os.kill(os.getpid(), getattr(signal, how))

    before = signal.getsignal(signal.SIGTERM)
    with Server(faults, delay_s=0.05) as server:
        report = last_json(run(*command(prompts, tmp_path, server, "--json")).stdout)
        assert report["stopped"] == how and 0 < report["remaining"] < NUM_PROMPTS
        assert report["answered"] == len(server.asked), "something in flight was dropped"
    assert signal.getsignal(signal.SIGTERM) is before
    if how == "STOP":
        with Server() as server:
            assert "remove it to go on" in refused(*command(prompts, tmp_path, server))
        (tmp_path / "STOP").unlink()
    assert finish(prompts, tmp_path)["stopped"] is None
    assert contents(tmp_path) == expected


def test_second_interrupt_leaves_at_once(prompts: Path, tmp_path: Path, expected: dict[str, str]):
    with Server(lambda text, number: "hang" if len(server.asked) > 30 else None) as server:
        process = begin(prompts, tmp_path, server)
        wait_for(lambda: server.in_flight == 8 and len(server.asked) > 30)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        wait_for(lambda: "finishing what is in flight" in process.stderr.readline())
        assert process.poll() is None, "it waits for what hangs"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 1 and "left at once" in errors
    assert num_kept(tmp_path) >= 20
    finish(prompts, tmp_path)
    assert contents(tmp_path) == expected


def test_prompt_that_fails_makes_exit_code_1_and_the_next_run_fills_its_shard(
    prompts: Path, tmp_path: Path, expected: dict[str, str]
):
    bad = "question 7"
    with Server(lambda text, number: "400 too long" if text == bad else None) as server:
        line = refused_run(*command(prompts, tmp_path, server))
    assert f"{NUM_PROMPTS - 1} of {NUM_PROMPTS} prompts answered, 1 failed, 0 left" in line
    entry = json.loads((tmp_path / "failed.jsonl").read_text())
    assert "too long" in entry["reason"]
    assert contents(tmp_path).keys() == expected.keys() and contents(tmp_path) != expected
    assert finish(prompts, tmp_path)["new"] == 1
    assert contents(tmp_path) == expected and not (tmp_path / "failed.jsonl").exists()


def refused_run(*arguments: str) -> str:
    """The closing line of a run that ends with exit code 1."""
    from typer.testing import CliRunner

    from orthrus.cli.app import app

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 1, result.output
    assert "failed=1" in result.stderr, "the bar says how many failed"
    return result.stdout.splitlines()[-1]


def test_changed_settings_and_prompts_are_refused_by_name(prompts: Path, tmp_path: Path):
    finish(prompts, tmp_path)
    with Server() as server:
        given = command(prompts, tmp_path, server)
        for name, more in {
            "temperature 0.0": ["--temperature", "0.5"],
            "max_new_tokens 2048": ["--max-new-tokens", "5"],
            "enable_thinking false": ["--enable-thinking"],
            'system null, this run has "Be kind."': ["--system", "Be kind."],
            "max_prompts null": ["--max-prompts", "5"],
        }.items():
            assert f"begun with {name}" in refused(*given, *more)
        assert 'begun with model "m"' in refused(*[part if part != "m" else "other" for part in given])
        fewer = tmp_path.parent / "fewer.jsonl"
        fewer.write_text("".join(prompts.read_text().splitlines(keepends=True)[:50]))
        assert "begun with num_prompts 90" in refused(*command(fewer, tmp_path, server))
        assert not server.asked
    assert finish(prompts, tmp_path)["new"] == 0, "refused runs changed nothing"


def test_manifest_says_what_was_made_from_what(prompts: Path, tmp_path: Path):
    finish(prompts, tmp_path, "--max-prompts", 20, "--temperature", 0.7, "--seed", 5)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    settings = manifest["settings"]
    assert settings["written_by"] == "chat" and settings["model"] == "m" and settings["seed"] == 5
    assert settings["num_prompts"] == 20 and len(settings["prompt_ids_sha256"]) == 64
    assert manifest["counts"] == {"prompts": 20, "answered": 20, "failed": 0, "shards": 2, "answers_in_journal": 0}
    assert manifest["source"]["source"] == str(prompts) and manifest["rows"]["read"] == NUM_PROMPTS
    assert {"orthrus", "datasets", "pyarrow"} <= set(manifest["versions"])


def test_key_is_sent_and_written_nowhere(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with Server(
        lambda text, number: "400 key sk-very-secret has no credit" if text == "question 3" else None
    ) as server:
        refused_run(*command(prompts, tmp_path, server))
        assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert not [file for file in tmp_path.iterdir() if b"sk-very-secret" in file.read_bytes()]


def test_tokenizer_makes_the_ids_of_prompts_and_of_answers_without_any(prompts: Path, tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = ("--tokenizer", tmp_path / "tokenizer", "--max-prompts", 5)
    for out, api, returns_ids in (("completions", (), True), ("chat", ("--api", "chat"), False)):
        with Server(returns_ids=returns_ids) as server:
            run(*command(prompts, tmp_path / out, server, *given, *api))
        assert all(("messages" in body) == (out == "chat") for body in server.bodies)
        for row in pq.read_table(tmp_path / out / "part-00000.parquet").to_pylist():
            asked = row["messages"][-1]["content"]
            assert (
                tokenizer.decode(row["prompt_ids"]) == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            )
            assert row["ids_from"] == ("text" if out == "chat" else "server")
        assert json.loads((tmp_path / out / "manifest.json").read_text())["settings"]["written_by"] == out


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy between the test and its server, and no key of the user's."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield
