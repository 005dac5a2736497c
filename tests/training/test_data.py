"""From files to rows: what every layout becomes, what is refused, and that a cache is never a surprise."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from orthrus.config import OrthrusConfig
from orthrus.model.modeling import OrthrusLM
from orthrus.training import data
from orthrus.training import documents as documents_module
from orthrus.training.data import PackedDataset, collate, packed_dataset
from orthrus.training.documents import DataSettings, messages_of, unfinished_answers
from orthrus.training.recipe import ViewStage
from orthrus.training.rows import PADDING, Rows
from orthrus.training.trainer import ViewTask
from tests.training.chat import FORGETFUL, PLAIN, tokenizer, turns

ANSWERS = [{"prompt_ids": [5, 6, 7], "response_ids": list(range(10 + n, 15 + n)), "id": str(n)} for n in range(8)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a Parquet or JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(source: Path | str, cache: Path, *, template: str | None = None, **fields: Any) -> PackedDataset:
    held_out = {name: fields.pop(name) for name in ("num_held_out", "seed") if name in fields}
    settings = DataSettings(**{"source": str(source), "row_tokens": 32, **fields})  # type: ignore[arg-type]
    return packed_dataset(settings, tokenizer(template), cache=cache, **held_out)


def documents(rows: PackedDataset) -> list[tuple[list[int], list[int]]]:
    """(ids, whether each is of a reply) of every document, in no particular order."""
    found = []
    for row in (rows[i] for i in range(len(rows))):
        for number in range(int(row["document"].max()) + 1):
            mine = row["document"] == number
            found.append((row["ids"][mine].tolist(), (row["reply"][mine] > 0).tolist()))
    return sorted(found)


@pytest.mark.parametrize("name", ["part-0.parquet", "part-0.jsonl"])
def test_answers_keep_their_tokens_and_reply_with_the_response(tmp_path: Path, name: str) -> None:
    rows = build(write(tmp_path / "in" / name, ANSWERS), tmp_path / "cache")
    assert documents(rows) == [(a["prompt_ids"] + a["response_ids"], [False] * 3 + [True] * 5) for a in ANSWERS]
    assert rows[0]["ids"].dtype == rows[0]["document"].dtype == rows[0]["reply"].dtype == torch.int32
    assert len(rows) == 2 and rows.counts["reply_tokens"] == 40 and rows.counts["tokens"] == 64


@pytest.mark.parametrize("form", ["parquet", "jsonl", "json in a column"])
def test_conversations_reply_with_the_assistants_turns(tmp_path: Path, form: str) -> None:
    talks = [turns("a = 1", f"b = {n}") for n in range(3)]
    content = [json.dumps(talk) for talk in talks] if form == "json in a column" else talks
    path = write(tmp_path / f"in.{form if form == 'jsonl' else 'parquet'}", [{"messages": talk} for talk in content])
    rows = build(path, tmp_path / "cache", template=FORGETFUL)
    decode = tokenizer().decode
    replies = [decode([i for i, r in zip(ids, reply, strict=True) if r]) for ids, reply in documents(rows)]
    assert sorted(replies) == [f"b = {n}<|im_end|>" for n in range(3)]


def test_what_a_message_does_not_have_is_not_there() -> None:
    filled = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": ""}]
    for content in (filled, json.dumps(filled)):
        assert messages_of(content, "here") == [{"role": "user", "content": "a"}, filled[1]], "templates ask"


def test_text_is_all_reply_and_so_is_everything_with_anchors_anywhere(tmp_path: Path) -> None:
    text = build(write(tmp_path / "text.jsonl", [{"text": "x = 1\n"}]), tmp_path / "cache")
    ((ids, reply),) = documents(text)
    assert ids == tokenizer()("x = 1\n")["input_ids"] and all(reply)
    answers = write(tmp_path / "answers.jsonl", ANSWERS)
    everywhere = build(answers, tmp_path / "cache", anchors="all")
    assert all(all(reply) for _, reply in documents(everywhere))
    talk = write(tmp_path / "talk.jsonl", [{"messages": turns("a", "b", "c")}])
    ((ids, reply),) = documents(build(talk, tmp_path / "cache", template=PLAIN, anchors="all"))
    assert all(reply) and tokenizer().decode(ids).count("<|im_end|>") == 3


def test_a_folder_is_read_in_the_order_of_its_names_and_a_pattern_takes_some(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write(tmp_path / "in" / "deep" / f"part-{number}.jsonl", ANSWERS[number : number + 1])
    write(tmp_path / "in" / ".part-9.jsonl", ANSWERS[5:])  # somebody is still writing it
    write(tmp_path / "in" / "part-3.jsonl" / "part-0.jsonl", ANSWERS[3:4])  # a folder named like a file
    rows = build(tmp_path / "in", tmp_path / "cache", row_tokens=8)
    assert [int(rows[i]["ids"][3]) for i in range(len(rows))] == [10, 11, 12, 13]
    some = build(f"{tmp_path}/in/deep/part-[12].jsonl", tmp_path / "cache", row_tokens=8)
    assert [int(some[i]["ids"][3]) for i in range(len(some))] == [11, 12]


def test_what_datagen_keeps_beside_its_shards_is_no_data(tmp_path: Path) -> None:
    write(tmp_path / "in" / "part-00000.parquet", ANSWERS)
    write(tmp_path / "in" / "failed.jsonl", [{"id": "x"}])
    with pytest.raises(ValueError, match="holds .parquet and .jsonl files"):
        build(tmp_path / "in", tmp_path / "cache")
    (tmp_path / "in" / "manifest.json").write_text("{}")
    assert len(documents(build(tmp_path / "in", tmp_path / "cache"))) == 8


def test_answers_that_wait_for_their_shard_are_counted_in_a_line(tmp_path: Path) -> None:
    write(tmp_path / "in" / "part-00000.parquet", ANSWERS)
    write(tmp_path / "in" / "journal.jsonl", ANSWERS[:3])
    assert unfinished_answers(str(tmp_path / "in")) is None, "a folder without a manifest is not datagen's"
    (tmp_path / "in" / "manifest.json").write_text("{}")
    assert f"3 answers in {tmp_path}/in/journal.jsonl are left out" in str(unfinished_answers(str(tmp_path / "in")))
    (tmp_path / "in" / "journal.jsonl").unlink()
    assert unfinished_answers(str(tmp_path / "in")) is None and unfinished_answers("some/data") is None


BAD = [
    ({"messages": None}, "messages is missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "the content of message 1 must be text, got list",
    ),
    ({"messages": [{"role": "user", "content": "a\ud800"}, turns("a", "b")[1]]}, "the text holds half a character"),
    ({"messages": [{"content": "x"}]}, "messages must be a list of {role, content}"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_row_is_refused_by_number_or_left_out(
    tmp_path: Path, bad: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"messages": turns("a", f"b = {n}")} for n in range(3)]
    content = [row if row["messages"] is None else {"messages": json.dumps(row["messages"])} for row in [*good, bad]]
    source = write(tmp_path / "talk.jsonl", [content[0], content[3], *content[1:3], content[3]])
    with pytest.raises(ValueError, match=re.escape(f"row 2: {reason}") + r".*data\.bad_rows=skip"):
        build(source, tmp_path / "cache", template=PLAIN)
    rows = build(source, tmp_path / "cache", template=PLAIN, bad_rows="skip")
    clean = build(write(tmp_path / "clean.jsonl", content[:3]), tmp_path / "cache", template=PLAIN)
    assert documents(rows) == documents(clean) and rows.fingerprint == clean.fingerprint
    assert rows.counts["bad_rows"] == 2 and "bad rows: 2" in rows.describe()
    shown = capsys.readouterr().err
    assert f"row 2: {reason}" in shown and f"row 5: {reason}" in shown and "2 rows left out" in shown
    with pytest.raises(ValueError, match="bad_rows=skip"):  # the rows of the other setting lie in the same cache
        build(source, tmp_path / "cache", template=PLAIN)


def test_a_source_of_bad_rows_alone_is_refused_and_only_the_first_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": 5}] * 9)
    with pytest.raises(ValueError, match=r"none of the 9 rows can be used; the first: .*row 1: text must be a string"):
        build(source, tmp_path / "cache", bad_rows="skip")
    assert capsys.readouterr().err.count("left out: ") == documents_module.SHOWN_BAD_ROWS


def test_texts_are_encoded_together_and_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"x = {n}\n" * (n + 1) for n in range(7)] + ["", "y = 1"]
    talks = [turns("a", f"b = {n}", "c", "") for n in range(7)]
    monkeypatch.setattr(documents_module, "BATCH_CHARACTERS", 40)
    calls = []
    plain = type(tokenizer(PLAIN)).__call__
    monkeypatch.setattr(
        type(tokenizer(PLAIN)), "__call__", lambda self, t, **o: (calls.append(t), plain(self, t, **o))[1]
    )
    text = build(write(tmp_path / "text.jsonl", [{"text": text} for text in texts]), tmp_path / "cache", row_tokens=256)
    talk = build(
        write(tmp_path / "talk.jsonl", [{"messages": t} for t in talks]), tmp_path / "cache", template=PLAIN,
        row_tokens=256,
    )  # fmt: skip
    characters = [sum(map(len, call)) for call in calls if isinstance(call, list)]
    assert len(characters) < len(texts) + len(talks), "one call for each"
    assert max(characters) < 200 < sum(characters), "all of a source in one call"
    monkeypatch.undo()
    alone = [tokenizer()(text)["input_ids"] for text in texts]
    assert [ids for ids, _ in documents(text)] == sorted(ids for ids in alone if len(ids) > 1)
    assert all(tokenizer().decode(ids).count("<|im_end|>") == 4 for ids, _ in documents(talk))


def test_answers_without_a_finished_shard_are_no_data_yet(tmp_path: Path) -> None:
    write(tmp_path / "in" / "journal.jsonl", ANSWERS)
    (tmp_path / "in" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no finished shard of answers"):
        build(tmp_path / "in", tmp_path / "cache")


def test_rows_are_made_once_and_again_when_what_they_are_made_from_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = write(tmp_path / "in" / "a.jsonl", ANSWERS), tmp_path / "cache"
    first = build(source, cache)
    made = []
    write_rows = data.write_rows
    monkeypatch.setattr(data, "write_rows", lambda *arguments: (made.append(1), write_rows(*arguments)))
    again = build(source, cache)
    assert not made and again.fingerprint == first.fingerprint and documents(again) == documents(first)
    source.rename(tmp_path / "moved.jsonl")
    moved = build(tmp_path / "moved.jsonl", cache)
    assert not made and moved.fingerprint == first.fingerprint, "data that moved is the same data"
    known = {first.fingerprint}
    for change in (
        lambda: build(tmp_path / "moved.jsonl", cache, packing="concatenated"),
        lambda: build(tmp_path / "moved.jsonl", cache, row_tokens=16),
        lambda: build(write(tmp_path / "moved.jsonl", ANSWERS[::-1]), cache),
    ):
        known.add(change().fingerprint)
    assert len(made) == 3 and len(known) == 4
    build(tmp_path / "moved.jsonl", cache, template=PLAIN)
    assert len(made) == 4, "another template may write other tokens"


def test_naming_a_revision_leaves_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: datasets.Dataset.from_list(ANSWERS))
    newest, named = build("some/data", tmp_path), build("some/data", tmp_path, revision="abc", split="train")
    assert newest.fingerprint == named.fingerprint, "the same rows are the same data"


def test_a_rank_that_does_not_see_the_packed_rows_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "rank", lambda: 3)
    monkeypatch.setattr(data, "SEEN_WITHIN_S", 0.0)
    with pytest.raises(ValueError, match="rank 3 does not see the rows that rank 0 packed.*one shared --out"):
        data.wait_for(tmp_path / "rows" / "abc")
    rows = build(write(tmp_path / "a.jsonl", ANSWERS), tmp_path / "rows")
    assert data.wait_for(rows.folder).fingerprint == rows.fingerprint


def test_a_run_that_is_cut_off_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write(tmp_path / "a.jsonl", ANSWERS), tmp_path / "cache"

    def cut_off(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "save_file", cut_off)
    with pytest.raises(KeyboardInterrupt):
        build(source, cache)
    assert list(cache.iterdir()) == []


def test_batches_of_workers_are_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHARD_ROWS", 3)
    rows = build(write(tmp_path / "a.parquet", ANSWERS), tmp_path / "cache", row_tokens=9)
    assert len(rows) == 8 and len(list(rows.folder.glob("*.safetensors"))) == 3
    assert [int(rows[i]["ids"][3]) for i in range(8)] == list(range(10, 18)), "shards must follow one another"
    assert torch.equal(rows[-1]["ids"], rows[7]["ids"])
    with pytest.raises(IndexError):
        rows[8]
    (batch, last) = DataLoader(rows, batch_size=5, collate_fn=collate, num_workers=1)
    whole = Rows.from_batch(batch, isolated=rows.isolated)
    assert whole.ids_BT.shape == (5, 9) and len(last["ids"]) == 3
    assert all(t.dtype == torch.long for t in (whole.ids_BT, whole.document_BT, whole.reply_BT))
    assert whole.document_BT[:, -1].tolist() == [PADDING] * 5 and whole.isolated
    assert "8 documents from 8 rows" in rows.describe() and "11.1% padding" in rows.describe()


def test_a_view_trains_on_packed_rows(tmp_path: Path, tiny_config: OrthrusConfig) -> None:
    rows = build(write(tmp_path / "a.jsonl", ANSWERS), tmp_path / "cache")
    task = ViewTask(OrthrusLM(tiny_config), ViewStage(blocks=((8, 4),)))
    batch = Rows.from_batch(collate(rows[i] for i in range(2)), isolated=rows.isolated)
    loss, survival = task(batch, task.blocks.sample(batch.anchorable_BT, torch.Generator()))
    assert loss > 0 and loss.isfinite() and survival.shape == (7,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "x", "answer": "y"}\n', "a.jsonl has the columns question, answer; needed are"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", '{"text": "x = 1"}\n{"text": \n', r"a.jsonl cannot be read.*JSON parse error"),
        ("a.parquet", "nonsense", r"a.parquet cannot be read.*not a parquet file"),
        ("a.jsonl", '{"text": "x = 1"}\n{"text": null}\n', "a.jsonl, row 2: text is missing"),
        ("a.jsonl", '{"text": 5}\n', "row 1: text must be a string, got int"),
        ("a.jsonl", '{"messages": "hello"}\n', "row 1: messages is a string that is no JSON"),
        ("a.jsonl", '{"messages": [{"content": "x"}]}\n', "row 1: messages must be a list of {role, content}"),
        ("a.jsonl", '{"prompt_ids": [1], "response_ids": [9000]}\n', r"row 1: a token id is not in 0 .. 8187"),
        ("a.jsonl", '{"prompt_ids": [1], "response_ids": ["x"]}\n', "row 1: prompt_ids and response_ids must be lists"),
        (
            "a.jsonl",
            '{"prompt_ids": [1, 2], "response_ids": [3]}\n',
            "nothing to learn from.*1 documents without a reply",
        ),
        ("a.csv", "text\nx\n", "a.csv is neither .parquet nor .jsonl"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / name, tmp_path / "cache", template=PLAIN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: build(t / "nowhere.jsonl", t), "nowhere.jsonl' names no .parquet or .jsonl file"),
        (lambda t: build(t, t), "names no .parquet or .jsonl file"),
        (lambda t: build(f"{t}/*.jsonl", t), "names no .parquet or .jsonl file"),
        (
            lambda t: build(write(t / "a.jsonl", ANSWERS), t, revision="main"),
            "data.revision is for a data set on the Hub",
        ),
        (
            lambda t: build(write(t / "a.jsonl", [{"messages": turns("a", "b")}]), t),
            "a.jsonl has conversations, and the base",
        ),
        (
            lambda t: build(write(t / "a.jsonl", ANSWERS), t, row_tokens=4, long_documents="drop"),
            "8 dropped as too long",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'orthrus-llm\[train\]'"):
        build(write(tmp_path / "a.jsonl", ANSWERS), tmp_path)


def test_a_data_set_on_the_hub_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*arguments: Any, **options: Any) -> None:
        assert arguments == ("some/data", "sft") and options == {"revision": "abc", "split": "train"}
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"data.source: some/data \(no file or folder here, .*\) cannot be read: no network"
    ):
        build("some/data", tmp_path, config="sft", revision="abc")


def test_a_data_set_on_the_hub_is_read_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself cannot be asked here: a local data set of the same class stands in for what it downloads."""
    import datasets

    found = {"some/data": ANSWERS, "other/data": ANSWERS[:5]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **options: datasets.Dataset.from_list(found[name]))
    assert len(documents(build("some/data", tmp_path))) == 8
    assert len(documents(build("other/data", tmp_path))) == 5, "the cache takes one data set for another"
