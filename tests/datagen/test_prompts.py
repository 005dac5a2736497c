"""Prompts: what identifies one, the order of hashes, which rows give one, and sources that cannot be read."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orthrus.datagen.prompts import Prompt, PromptSet, PromptSource, read_prompts

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Dos."},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path | str, **fields: Any) -> PromptSet:
    return read_prompts(PromptSource(source=str(path), **fields))


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(path, **fields)
    return str(caught.value)


def test_last_assistant_turn_is_dropped_and_the_rest_kept(tmp_path: Path):
    found = read(write_rows(tmp_path / "a.jsonl", [{"messages": TALK}]))
    assert found.prompts[0].messages == TALK[:-1] and found.prompts[0].text is None
    again = read(write_rows(tmp_path / "b.jsonl", [{"messages": TALK[:-1]}]))
    assert again.prompts == found.prompts, "with or without the old answer it is the same prompt"


def test_prompt_is_a_users_message_and_text_is_plain(tmp_path: Path):
    asked = read(write_rows(tmp_path / "a.jsonl", [{"prompt": "Why?"}])).prompts[0]
    assert asked.messages == [{"role": "user", "content": "Why?"}]
    plain = read(write_rows(tmp_path / "b.jsonl", [{"text": "def f("}])).prompts[0]
    assert plain.text == "def f(" and plain.messages is None


def test_messages_come_before_prompt_and_text(tmp_path: Path):
    rows = [{"text": "rendered", "prompt": "Two?", "messages": TALK}]
    assert read(write_rows(tmp_path / "a.jsonl", rows)).field == "messages"


def test_order_is_that_of_hashes_and_does_not_depend_on_the_files(tmp_path: Path):
    rows = [{"prompt": f"question {i}"} for i in range(50)]
    first = read(write_rows(tmp_path / "a.jsonl", rows))
    random.Random(1).shuffle(rows)
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(2):
        table = pa.Table.from_pylist(rows[part::2])
        pq.write_table(table, folder / f"{part}.parquet")
    second = read(folder)
    assert [prompt.id for prompt in first.prompts] == sorted(prompt.id for prompt in first.prompts)
    assert second.prompts == first.prompts and second.digest == first.digest
    assert read(str(folder / "*.parquet")).digest == first.digest
    assert read(folder, max_prompts=10).prompts == first.prompts[:10], "a sample is the beginning of the order"


def test_tables_give_every_message_every_column(tmp_path: Path):
    rows = [{"messages": [{**turn, "tool_calls": [], "name": None} for turn in TALK]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").prompts[0] == Prompt.of(TALK[:-1])


def test_duplicates_and_unusable_rows_are_counted(tmp_path: Path):
    calls = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    picture = [{"role": "user", "content": [{"type": "image"}]}]
    rows = [
        {"messages": TALK}, {"messages": TALK[:-1]}, {"messages": []}, {"messages": TALK[:1]}, {"messages": calls},
        {"messages": None}, {"messages": [{"role": "king", "content": "x"}]}, {"messages": "text"},
    ]  # fmt: skip
    # Read apart: one JSON column of two types is an error of its own.
    path = tmp_path / "a.jsonl"
    found = read(write_rows(path, rows[:-1]))
    assert (len(found.prompts), found.num_rows, found.num_duplicates) == (1, 7, 1)
    assert sum(found.dropped.values()) == 5 and "no user's turn to answer" in found.dropped
    assert "x a message whose content is not text" in refusal(write_rows(path, [{"messages": picture}]))
    assert "x not a list of messages" in refusal(write_rows(path, rows[-1:]))


def test_system_message_is_added_where_there_is_none_and_changes_the_id(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "Why?"}])
    prompt = read(path, system="Be kind.").prompts[0]
    assert prompt.messages == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    assert prompt.id != read(path).prompts[0].id
    talk = write_rows(tmp_path / "b.jsonl", [{"messages": TALK}])
    assert read(talk, system="Be kind.").digest == read(talk).digest, "a conversation's own system message stays"
    assert "plain text" in refusal(write_rows(tmp_path / "c.jsonl", [{"text": "x"}]), system="Be kind.")


def test_sources_that_cannot_be_read_are_refused_by_name(tmp_path: Path):
    assert "no .parquet or .jsonl file there" in refusal(tmp_path / "absent.jsonl")
    assert "no .parquet or .jsonl file there" in refusal(tmp_path)
    assert "no .parquet or .jsonl file there" in refusal(str(tmp_path / "*.parquet"))
    write_rows(tmp_path / "a.csv", [])
    assert ".csv is not read" in refusal(tmp_path / "a.csv")
    write_rows(tmp_path / "a.jsonl", [{"question": "x"}])
    assert "none of the columns messages, prompt, text, only question" in refusal(tmp_path / "a.jsonl")
    assert "split names a part of a Hub data set" in refusal(tmp_path / "a.jsonl", split="train")
    (tmp_path / "b.jsonl").write_text("{broken\n")
    assert "b.jsonl: prompts cannot be read" in refusal(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"prompt": "half a \\ud83d pair"}\n')
    assert "b.jsonl: prompts cannot be read" in refusal(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("")
    assert "c.jsonl: there are no rows in it" in refusal(tmp_path / "c.jsonl")
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    assert "d.parquet: prompts cannot be read" in refusal(tmp_path / "d.parquet")
    assert "holds .parquet and .jsonl files" in refusal(tmp_path)
    with pytest.raises(ValueError, match="max_prompts must be at least 1"):
        read(tmp_path / "a.jsonl", max_prompts=0)


def test_hub_data_set_is_read_at_the_commit_its_revision_stands_for(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def load(*arguments: Any, **named: Any) -> list[dict[str, Any]]:
        asked.append((arguments, named))
        return [{"messages": TALK}]

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, id_, revision: SimpleNamespace(sha="abc"))
    found = read("some/prompts", revision="v2", config="math")
    assert asked == [(("some/prompts", "math"), {"revision": "abc", "split": "train"})]
    assert found.commit == "abc" and found.prompts == [Prompt.of(TALK[:-1])]

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    assert read("some/prompts", revision="v2", split="chat").commit is None
    assert asked[-1] == (("some/prompts", None), {"revision": "v2", "split": "chat"})
    monkeypatch.setattr("datasets.load_dataset", offline)
    assert ("some/prompts (no file or folder here, so taken for a data set on the Hub): prompts cannot be read: "
            "ConnectionError: no network") in refusal("some/prompts")  # fmt: skip
