"""What is held out is never trained on, whatever else changes, and prompts are where its replies begin."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthrus.training.data import PackedDataset
from orthrus.training.documents import DataSettings, Document, SourceRow, open_source, read_rows
from orthrus.training.prompts import HeldOut, beginning, prompts_of_file
from tests.cli.tiny import TEMPLATE, byte_tokenizer
from tests.training.chat import FORGETFUL, MARKED, PLAIN, tokenizer, turns
from tests.training.test_data import build, documents, write

ANSWERS = [{"prompt_ids": [5, 6, 1000 + n], "response_ids": list(range(100 + n, 105 + n))} for n in range(40)]


def source_row(*ids: int) -> SourceRow:
    array = np.array([*ids], dtype=np.int32)
    return SourceRow("here", {"text": ""}, [Document(array, np.ones(len(ids), dtype=np.int16))])


def tokens(rows: list[SourceRow]) -> list[list[int]]:
    return [document.ids.tolist() for row in rows for document in row.documents]


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(0, 8), st.randoms())
def test_the_choice_is_the_same_in_any_order_and_takes_every_copy(
    numbers: list[int], num: int, chooser: random.Random
) -> None:
    held = HeldOut(num, seed=0)
    left = [document.ids.tolist() for document in held.leave(source_row(n, n) for n in numbers)]
    taken = tokens(held.rows)
    assert len(taken) == min(num, len(set(numbers)))
    assert sorted(left) == sorted([n, n] for n in numbers if [n, n] not in taken), "lost, twice, or a copy trained on"
    again = HeldOut(num, seed=0)
    list(again.leave(source_row(n, n) for n in chooser.sample(numbers, len(numbers))))
    assert tokens(again.rows) == taken, "data in another order is the same data"


def test_the_choice_is_drawn_by_the_seed() -> None:
    chosen = []
    for seed in range(20):
        held = HeldOut(4, seed=seed)
        list(held.leave(source_row(n, n) for n in range(100)))
        chosen += [ids[0] for ids in tokens(held.rows)]
    assert len(set(chosen)) > 40 and 35 < np.mean(chosen) < 65, "not a sample of the whole source"


def test_a_reader_that_stops_early_has_read_nothing_that_is_held_out() -> None:
    held = HeldOut(3, seed=0)
    left = held.leave(source_row(n, n) for n in range(1000))
    read = [next(left).ids.tolist() for _ in range(20)]
    assert len(held.rows) == 3 and not any(ids in read for ids in tokens(held.rows))


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
@pytest.mark.parametrize("anchors", ["assistant", "all"])
def test_held_out_documents_are_in_no_row(tmp_path: Path, packing: str, anchors: str) -> None:
    path = write(tmp_path / "a.jsonl", ANSWERS)
    options = {"packing": packing, "anchors": anchors, "row_tokens": 20}
    rows = build(path, tmp_path / "cache", num_held_out=6, seed=1, **options)
    assert len(rows.prompts) == 6 == rows.counts["held_out"] and "held out: 6" in rows.describe()
    assert all(prompt in [answer["prompt_ids"] for answer in ANSWERS] for prompt in rows.prompts)
    packed = {int(token) for i in range(len(rows)) for token in rows[i]["ids"]}
    kept = [answer for answer in ANSWERS if answer["prompt_ids"] not in rows.prompts]
    assert {n for prompt in rows.prompts for n in prompt[2:]}.isdisjoint(packed)
    assert {answer["prompt_ids"][2] for answer in kept} <= packed


@pytest.mark.parametrize("kind", ["ids", "messages"])
def test_no_other_answer_to_a_held_out_prompt_is_trained_on(tmp_path: Path, kind: str) -> None:
    rows: list[dict] = [{"prompt_ids": [7, n % 5], "response_ids": [20 + n, 60 + n]} for n in range(40)]
    if kind == "messages":
        rows = [{"messages": turns(f"ask {n % 5}", f"reply {n}")} for n in range(40)]
    path = write(tmp_path / "a.jsonl", rows)
    packed = build(path, tmp_path / "cache", num_held_out=3, row_tokens=100, template=PLAIN)
    assert len({tuple(prompt) for prompt in packed.prompts}) == 3, "two prompts that are the same are one"
    trained = [packed[i]["ids"].tolist() for i in range(len(packed))]
    for prompt in packed.prompts:
        assert not any(ids[start : start + len(prompt)] == prompt for ids in trained for start in range(len(ids)))


def test_another_seed_or_number_is_other_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ANSWERS)
    made = [
        build(path, tmp_path / "cache", num_held_out=num, seed=seed) for num, seed in ((4, 0), (4, 1), (5, 0), (0, 0))
    ]
    assert len({rows.fingerprint for rows in made}) == 4 and len({rows.folder for rows in made}) == 4
    assert build(path, tmp_path / "cache", seed=7).folder == made[3].folder, (
        "nothing is drawn where nothing is held out"
    )
    first = [build(path, tmp_path / "b", num_held_out=num, max_rows=1, row_tokens=8) for num in (1, 2)]
    assert first[0].fingerprint != first[1].fingerprint, (
        "the fingerprint must tell what was held out, not only the rows"
    )


def test_what_leaves_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ANSWERS)
    with pytest.raises(ValueError, match=r"nothing to learn from.*40 held out \(evaluation.held_out_documents\)"):
        build(path, tmp_path / "cache", num_held_out=40)


def rows_of(path: Path, template: str | None, **fields: Any) -> list[SourceRow]:
    settings = DataSettings(source=str(path), **fields)
    return list(read_rows(open_source(settings), settings, tokenizer(template), Counter()))


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL])
@pytest.mark.parametrize("anchors", ["assistant", "all"])
@pytest.mark.parametrize("form", [list, json.dumps])
def test_a_conversation_is_asked_for_its_first_reply(tmp_path: Path, template: str, anchors: str, form: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": form(turns("a", "b", "c", "d"))}])
    (row,) = rows_of(path, template, anchors=anchors)
    prompt = beginning(row, tokenizer(template), {"enable_thinking": False})
    thought = "<think>\n\n</think>\n\n" if template is FORGETFUL else ""
    assert tokenizer().decode(prompt) == f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{thought}"
    if anchors == "assistant":
        document = row.documents[0]
        assert document.ids[: len(prompt)].tolist() == prompt and document.reply[len(prompt)] > 0, (
            "prompts and training rows must be written alike"
        )


def test_all_parts_of_a_conversation_are_held_out_together(tmp_path: Path) -> None:
    talks = [{"messages": turns(f"a{n}", f"b{n}", f"c{n}", f"d{n}")} for n in range(6)]
    rows: PackedDataset = build(
        write(tmp_path / "a.jsonl", talks), tmp_path / "cache", template=FORGETFUL, row_tokens=64, num_held_out=2
    )
    texts = [tokenizer().decode(ids) for ids, _ in documents(rows)]
    held = [n for n in range(6) if any(f"a{n}" in tokenizer().decode(prompt) for prompt in rows.prompts)]
    assert len(held) == 2 and len(texts) == 2 * 4, "this template makes two documents of each"
    assert not [n for n in held for text in texts if f"a{n}" in text]


def test_what_has_no_prompt_begins_with_some_of_itself(tmp_path: Path) -> None:
    (long,) = rows_of(write(tmp_path / "a.jsonl", [{"text": "x = 1\n" * 100}]), None)
    (short,) = rows_of(write(tmp_path / "b.jsonl", [{"text": "x = 1\ny = 2\n"}]), None)
    (answer,) = rows_of(write(tmp_path / "c.jsonl", [{"prompt_ids": [], "response_ids": [1, 2, 3, 4]}]), None)
    (reply,) = rows_of(write(tmp_path / "d.jsonl", [{"messages": turns("a", "b", "c")[1:]}]), PLAIN, anchors="all")
    ids = long.documents[0].ids.tolist()
    assert beginning(long, tokenizer(), {}) == ids[:48]
    assert beginning(short, tokenizer(), {}) == short.documents[0].ids[: len(short.documents[0]) // 2].tolist()
    assert beginning(answer, tokenizer(), {}) == [1, 2]
    assert tokenizer().decode(beginning(reply, tokenizer(PLAIN), {})).startswith("<|im_start|>")


def test_a_conversation_that_the_template_takes_only_whole_gives_no_prompt(tmp_path: Path) -> None:
    template = "{% if messages|length < 4 %}{{ raise_exception('too short') }}{% endif %}" + PLAIN
    talks = [{"messages": turns(f"a{n}", "b", "c", "d")} for n in range(4)]
    rows = build(
        write(tmp_path / "a.jsonl", talks), tmp_path / "cache", template=template, anchors="all", num_held_out=2
    )
    assert rows.prompts == [] and rows.counts["held_out"] == 2


def test_prompts_of_a_file(tmp_path: Path) -> None:
    chat = byte_tokenizer()
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ab"}\n\n{"messages": [{"role": "user", "content": "c"}]}\n')

    def read(**options: Any) -> list[list[int]]:
        return prompts_of_file(str(path), chat, 4, options, longest=80)

    with pytest.raises(ValueError, match="line 3: `messages`, but the base has no chat template"):
        read()
    chat.chat_template = TEMPLATE
    texts = [chat.decode(ids) for ids in read(enable_thinking=False)]
    assert texts == ["ab", "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"]
    chat.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="line 3: the chat template refuses the conversation: no"):
        read()
    for content, message in (
        ('{"text": "ab"}', "line 1: needs `prompt`"),
        ('{"prompt": ""}', "line 1: the prompt has 0 tokens, not 1 .. 80"),
        (json.dumps({"prompt": "a" * 81}), "line 1: the prompt has 81 tokens, not 1 .. 80"),
        ("{", "line 1: not JSON"),
        ("\n", "holds no prompt"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read()
