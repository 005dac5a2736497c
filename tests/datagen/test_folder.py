"""The folder: every answer in one place whatever happens, equal bytes whatever the order, and what it refuses."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from orthrus.datagen import folder as folder_module
from orthrus.datagen.answers import Answer, Failure
from orthrus.datagen.folder import AnswerFolder
from orthrus.datagen.prompts import Prompt
from orthrus.datagen.shards import read_table

PROMPTS = sorted((Prompt.of(f"text {i}") for i in range(23)), key=lambda prompt: prompt.id)
SETTINGS = {"model": "m", "temperature": 0.0}


def answer(prompt: Prompt) -> Answer:
    return Answer(
        id=prompt.id, prompt_ids=[1, 2], response_ids=list(prompt.id[:5].encode()), response=f"to {prompt.text}",
        finish_reason="stop", ids_from="server",
    )  # fmt: skip


def failure(prompt: Prompt) -> Failure:
    return Failure(id=prompt.id, reason="HTTP 500", attempts=3)


def opened(path: Path, **settings: Any) -> AnswerFolder:
    return AnswerFolder(path, PROMPTS, shard_size=5, settings=SETTINGS | settings, facts={})


def contents(path: Path) -> dict[str, str]:
    """The bytes of all shards."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("part-*"))}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("whole") / "run"
    with opened(path) as run:
        for prompt in run.pending():
            run.enter(answer(prompt))
    assert len(contents(path)) == 5
    return contents(path)


def test_finished_folder_holds_shards_and_manifest_alone(tmp_path: Path, expected: dict[str, str]):
    with opened(tmp_path) as run:
        for prompt in PROMPTS:
            run.enter(answer(prompt))
    assert {file.name for file in tmp_path.iterdir()} - {".lock"} == {*expected, "manifest.json"}
    counts = json.loads((tmp_path / "manifest.json").read_text())["counts"]
    assert counts == {"prompts": 23, "answered": 23, "failed": 0, "shards": 5, "answers_in_journal": 0}
    rows = [row for name in expected for row in read_table(tmp_path / name).to_pylist()]
    assert [row["id"] for row in rows] == [prompt.id for prompt in PROMPTS]
    assert rows[3]["prompt_text"] == PROMPTS[3].text and rows[3]["response_ids"] == answer(PROMPTS[3]).response_ids


class Killed(BaseException):
    """The end of a process, as far as the folder can tell."""


@pytest.mark.parametrize("seed", range(8))
def test_killed_anywhere_and_in_any_order_the_shards_are_the_same(
    tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, seed: int
):
    """A run is abandoned at random steps, inside the writing of shards and journal too; answers come in any order."""
    choice = random.Random(seed)
    given: dict[str, int] = {}

    def dying(function: Any) -> Any:
        def step(*arguments: Any, **named: Any) -> Any:
            if choice.random() < 0.15:
                raise Killed
            done = function(*arguments, **named)
            if choice.random() < 0.15:
                raise Killed
            return done

        return step

    monkeypatch.setattr(folder_module, "write_shard", dying(folder_module.write_shard))
    monkeypatch.setattr(folder_module.Journal, "replace", dying(folder_module.Journal.replace))
    for _ in range(400):
        run = opened(tmp_path)
        try:
            run.__enter__()
            todo = list(run.pending())
            if not todo:
                run.__exit__()
                break
            choice.shuffle(todo)
            for prompt in todo[: choice.randint(1, 8)]:
                given[prompt.id] = given.get(prompt.id, 0) + 1
                run.enter(answer(prompt))
        except Killed:
            pass
        # What the system does for a dead process, and all it does.
        run._lock.release()
    else:
        pytest.fail("it never ended")
    assert contents(tmp_path) == expected, "a kill changed the shards"
    assert set(given.values()) == {1}, "an answer that was given was asked for again"


def test_line_cut_short_is_asked_again(tmp_path: Path, expected: dict[str, str]):
    with opened(tmp_path) as run:
        for prompt in PROMPTS[:3]:
            run.enter(answer(prompt))
    journal = tmp_path / "journal.jsonl"
    assert len(journal.read_bytes().splitlines()) == 3
    journal.write_bytes(journal.read_bytes()[:-20])
    with opened(tmp_path) as run:
        todo = list(run.pending())
        assert todo == PROMPTS[2:]
        for prompt in todo:
            run.enter(answer(prompt))
    assert contents(tmp_path) == expected


def test_failed_prompts_are_recorded_tried_again_last_and_then_fill_their_shards(
    tmp_path: Path, expected: dict[str, str]
):
    bad = {PROMPTS[0].id, PROMPTS[7].id}
    with opened(tmp_path) as run:
        for prompt in run.pending():
            run.enter(failure(prompt) if prompt.id in bad else answer(prompt))
    entries = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in entries} == bad and entries[0]["reason"] == "HTTP 500"
    assert len(contents(tmp_path)) == 5, "shards are written without them"
    assert sum(read_table(tmp_path / name).num_rows for name in expected) == 21
    with opened(tmp_path) as run:
        assert run.num_failed == 2
        assert {prompt.id for prompt in run.pending()} == bad
        run.enter(answer(PROMPTS[7]))
        run.enter(failure(PROMPTS[0]))
        assert run.num_failed == 1
    with opened(tmp_path) as run:
        run.enter(answer(PROMPTS[0]))
    assert contents(tmp_path) == expected and not (tmp_path / "failed.jsonl").exists()


def test_prompts_given_up_before_come_behind_new_ones(tmp_path: Path):
    with opened(tmp_path) as run:
        run.enter(failure(PROMPTS[0]))
    with opened(tmp_path) as run:
        assert list(run.pending()) == [*PROMPTS[1:], PROMPTS[0]]


def test_failures_of_a_killed_run_are_remembered(tmp_path: Path):
    run = opened(tmp_path).__enter__()
    run.enter(failure(PROMPTS[2]))
    run._lock.release()
    with opened(tmp_path) as again:
        assert again.num_failed == 1


def test_two_runs_in_one_folder_are_refused(tmp_path: Path):
    with opened(tmp_path), pytest.raises(ValueError, match="another run is writing"), opened(tmp_path):
        pass
    with opened(tmp_path):
        pass


def test_changed_settings_are_refused_by_name_once_there_is_an_answer(tmp_path: Path):
    with opened(tmp_path, model="misspelt"):
        pass
    with opened(tmp_path) as run:
        run.enter(answer(PROMPTS[0]))
    with (
        pytest.raises(ValueError, match="begun with temperature 0.0, this run has 0.7"),
        opened(tmp_path, temperature=0.7),
    ):
        pass
    with pytest.raises(ValueError, match="begun with top_p null, this run has 1"), opened(tmp_path, top_p=1):
        pass
    with opened(tmp_path) as run:
        assert run.num_answered == 1, "a refused run changes nothing"


def test_strange_folders_are_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no manifest.json"), opened(tmp_path):
        pass
    with pytest.raises(ValueError, match="thesis.txt is a file"), opened(tmp_path / "thesis.txt"):
        pass
    other = tmp_path / "other"
    with opened(other) as run:
        for prompt in PROMPTS:
            run.enter(answer(prompt))
    (other / "part-00001.parquet").write_bytes((other / "part-00000.parquet").read_bytes())
    with pytest.raises(ValueError, match="does not belong there"), opened(other):
        pass
    (other / "part-00001.parquet").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is broken"), opened(other):
        pass
    (other / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"), opened(other):
        pass
