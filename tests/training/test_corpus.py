import json
import textwrap
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from orthrus.training import corpus, shards, sources
from orthrus.training.corpus import HELD_OUT_MODULES, CorpusConfig, build_corpus
from orthrus.training.sources import STDLIB, RejectedSource, SourceFile, read_document

LOOSE = CorpusConfig(max_package_share=1.0, max_test_share=1.0, val_share=0.0)


def make_module(topic: str, *, num_functions: int = 8) -> str:
    """Source of a module; every line names the topic, so two topics share no line."""
    function = '''
    def {topic}_step_{i}(value_{topic}, other_{topic}):
        """Return the {topic} of step {i}."""
        result_{topic} = value_{topic} + other_{topic} * {i}
        if result_{topic} > limit_{topic}_{i}:
            raise ValueError("{topic} is over its limit")
        return result_{topic} - offset_{topic}_{i}
    '''
    # Digits as letters: a file of numbered names would count as a table.
    topic = topic.translate(str.maketrans("0123456789", "abcdefghij")) + "_topic"
    return "\n".join(textwrap.dedent(function).format(topic=topic, i=i) for i in range(num_functions))


def document(text: str, *, package: str = "pkg", path: str = "pkg/module.py") -> sources.Document:
    return read_document(SourceFile(package, path, text.encode()))


@pytest.fixture(scope="module")
def tokenizer():
    texts = [make_module(topic) for topic in ("alpha", "beta", "gamma")]
    return shards.train_tokenizer(texts, vocab_size=400)


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    shards.save_tokenizer(tokenizer, folder)
    return folder


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(data=st.binary())
def test_tokenizer_round_trips_the_text_of_any_bytes(tokenizer, data):
    text = data.decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(text=st.text(alphabet=" \t\r\n_ab1.(:é漢", max_size=40))
def test_tokenizer_round_trips_runs_of_white_space(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_line_break_and_indentation_are_one_piece(tokenizer):
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("def __init__(self):\n        x = 12")]
    assert pieces == ["def", "Ġ__init__", "(self", "):", "Ċ" + "Ġ" * 8, "x", "Ġ=", "Ġ1", "2"]


def test_saved_tokenizer_loads_with_auto_tokenizer(tokenizer_folder):
    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "class A:\n    def __init__(self) :\n\n        self.x = 'it is n\\'t'\n"
    assert loaded.decode(loaded(text)["input_ids"]) == text, "decoding must not tidy spaces"
    assert loaded.eos_token == loaded.pad_token == shards.END_OF_TEXT
    assert loaded.eos_token_id == len(loaded) - 1, "the mask id, len(tokenizer), must follow the last token"
    assert loaded(shards.END_OF_TEXT)["input_ids"] == [loaded.eos_token_id]


def test_vocabulary_leaves_an_unused_row_for_the_mask():
    assert shards.VOCAB_SIZE < shards.NUM_EMBEDDING_ROWS


def test_end_of_text_written_in_a_document_is_ordinary_text(tokenizer, tokenizer_folder):
    tokens = shards.encode_texts([f"token = '{shards.END_OF_TEXT}'\n"], tokenizer_folder)
    assert (tokens == tokenizer.token_to_id(shards.END_OF_TEXT)).sum() == 1, "a document must not end in its middle"


@pytest.fixture
def write(tokenizer_folder, tmp_path):
    """Writes texts to shards and returns the shards' paths."""

    def write(texts, *, name, num_shards):
        paths, _ = shards.write_shards(
            texts, folder=tmp_path, name=name, num_shards=num_shards, tokenizer_folder=tokenizer_folder
        )
        return paths

    return write


@pytest.mark.parametrize("num_shards", [1, 3, 9])
def test_shards_round_trip(tokenizer, tokenizer_folder, write, num_shards):
    texts = [make_module(f"topic{i}", num_functions=i + 1) for i in range(7)]
    end_id = tokenizer.token_to_id(shards.END_OF_TEXT)
    paths = write(texts, name="train", num_shards=num_shards)
    loaded = shards.load_shards(paths, tokenizer_folder=tokenizer_folder)
    pieces = np.split(loaded.tokens, loaded.starts[1:])
    assert Counter(tokenizer.decode(piece[:-1].tolist()) for piece in pieces) == Counter(texts)
    assert {int(piece[-1]) for piece in pieces} == {end_id}
    assert loaded.tokens.dtype == np.uint16


def test_loaded_tokens_do_not_depend_on_sharding_or_workers(tokenizer_folder, write):
    texts = [make_module(f"topic{i}", num_functions=2) for i in range(5)]
    one = write(texts, name="one", num_shards=1)
    many = write(texts[::-1], name="many", num_shards=4)
    first = shards.load_shards(one, tokenizer_folder=tokenizer_folder)
    second = shards.load_shards(many, tokenizer_folder=tokenizer_folder, num_workers=2)
    assert first.fingerprint == second.fingerprint


def test_shard_of_another_tokenizer_is_refused(write, tmp_path):
    paths = write([make_module("alpha")], name="train", num_shards=1)
    shards.save_tokenizer(shards.train_tokenizer(["x"], vocab_size=257), tmp_path / "other")
    with pytest.raises(ValueError, match="another tokenizer"):
        shards.load_shards(paths, tokenizer_folder=tmp_path / "other")


def test_licence_header_is_stripped_and_other_comments_stay():
    body = make_module("alpha")
    header = "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n# Copyright 2020 Somebody\n# Licensed under X\n\n"
    assert document(header + body).text == document(body).text
    assert "# Notes on alpha" in document("# Notes on alpha\n" + body).text


def test_licence_docstring_is_stripped():
    body = make_module("alpha")
    licence = '"""Licensed under the Apache License, Version 2.0."""\n'
    cleaned = document(licence + body)
    assert "Apache" not in cleaned.text
    start, end = cleaned.blocks[0]
    assert cleaned.text.split("\n")[start].startswith("def "), "blocks must be counted after stripping"
    assert cleaned.text.split("\n")[end - 1].startswith("    return")


def test_tabs_and_line_ends_are_normalised():
    text = make_module("alpha")
    messy = text.replace("    ", "\t").replace("\n", "  \r\n")
    assert document(messy).text == document(text).text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\n", "size"),
        ("def broken(:\n" * 50, "syntax"),
        ("# Generated by a tool. DO NOT EDIT\n" + make_module("alpha"), "generated"),
        ("table = [\n" + "    12, 345, 6789,\n" * 100 + "]\n", "table"),
        (make_module("alpha") + "name = 'has_close_elements'\n", "benchmark"),
        (make_module("alpha") + "text = '" + "漢" * 900 + "'\n", "script"),
        (make_module("alpha") + "text = '\0'\n", "encoding"),
    ],
)
def test_what_is_not_handwritten_code_is_refused_with_its_reason(text, reason):
    with pytest.raises(RejectedSource, match=reason):
        document(text)


@pytest.mark.parametrize("path", ["pkg/_vendor/a.py", "pkg/x_pb2.py", "pkg/migrations/0001.py", "pkg/_version.py"])
def test_vendored_and_generated_paths_are_not_wanted(path):
    assert not sources.is_wanted_path(path, package="pkg")


def test_standard_library_tests_are_not_wanted():
    assert not sources.is_wanted_path("test/test_heapq.py", package=STDLIB)
    assert sources.is_wanted_path("tests/test_heapq.py", package="pkg")


@pytest.mark.parametrize(
    ("field", "permissive"),
    [
        ("License-Expression: MIT", True),
        ("Classifier: License :: OSI Approved :: BSD License", True),
        ("License: Apache-2.0 OR BSD-3-Clause", True),
        ("License: GPLv3", False),
        ("License: MIT\nClassifier: License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)", False),
        ("License-Expression: MPL-2.0 AND MIT", False),
        ("Name: unknown", False),
    ],
)
def test_only_permissive_licences_are_taken(field, permissive):
    assert sources.is_permissive(f"Metadata-Version: 2.1\n{field}\n\nMIT or GPL, says the readme") == permissive


def test_held_out_modules_never_reach_training():
    held = [document(make_module(f"m{i}"), package=STDLIB, path=path) for i, path in enumerate(held_out_paths())]
    other = document(make_module("other"), package=STDLIB, path="other.py")
    built = build_corpus([*held, other], config=LOOSE)
    assert [d.name for d in built.train] == ["stdlib/other.py"]
    assert {corpus.module_name(d) for d in built.held_out} == set(HELD_OUT_MODULES)


def held_out_paths() -> list[str]:
    return [
        module.replace(".", "/") + ("/__init__.py" if module == "zipfile" else ".py") for module in HELD_OUT_MODULES
    ]


def test_backports_of_held_out_modules_never_reach_training():
    held = document(make_module("heap"), package=STDLIB, path="heapq.py")
    renamed = make_module("heap").replace("heap_topic_step_0", "push") + make_module("own", num_functions=2)
    inside = make_module("large", num_functions=60) + make_module("heap", num_functions=3)
    copies = [document(renamed, path="a.py"), document(inside, path="b.py")]
    built = build_corpus([held, *copies, document(make_module("clean"), path="c.py")], config=LOOSE)
    assert [d.path for d in built.train] == ["c.py"]
    assert built.num_dropped["held_out"] == 2


def test_near_duplicates_are_dropped_and_the_first_is_kept():
    text = make_module("alpha")
    copies = [
        text,
        text + "\n",
        text + "\n\nextra_name = 'one more line'\n",
        text.replace("ValueError", "AlphaError"),
        make_module("beta"),
    ]
    built = build_corpus([document(c, path=f"{i}.py") for i, c in enumerate(copies)], config=LOOSE)
    assert [d.path for d in built.train] == ["0.py", "4.py"]
    assert built.num_dropped["exact_duplicate"] == 1
    assert built.num_dropped["near_duplicate"] == 2


def test_copied_function_is_cut_out_of_another_file():
    own = make_module("beta")
    borrowed = make_module("alpha", num_functions=2)
    config = CorpusConfig(max_package_share=1.0, val_share=0.0, min_block_lines=4)
    documents = [document(make_module("alpha"), path="a.py"), document(own + borrowed, path="b.py")]
    built = build_corpus(documents, config=config)
    assert built.train[1].text == document(own).text
    assert built.num_dropped["copied_block"] == 2


def test_self_repeating_file_is_dropped():
    built = build_corpus([document(make_module("alpha", num_functions=1) * 9)], config=LOOSE)
    assert not built.train
    assert built.num_dropped["repetitive"] == 1


def test_no_package_and_no_tests_exceed_their_share():
    big = [document(make_module(f"b{i}"), package="big", path=f"b{i}.py") for i in range(20)]
    tests = [document(make_module(f"t{i}"), package=f"p{i}", path=f"tests/test_{i}.py") for i in range(20)]
    config = CorpusConfig(max_train_bytes=30_000, max_package_share=0.2, max_test_share=0.1, val_share=0.0)
    built = build_corpus([*big, *tests], config=config)
    assert 0 < sum(d.num_bytes for d in built.train if d.package == "big") <= 6_000
    assert 0 < sum(d.num_bytes for d in built.train if d.is_test) <= 3_000


def test_validation_documents_are_not_in_training():
    documents = [document(make_module(f"b{i}"), path=f"b{i}.py") for i in range(40)]
    built = build_corpus(documents, config=CorpusConfig(max_package_share=1.0, val_share=0.3))
    names = {d.name for d in built.val}
    assert names and not names & {d.name for d in built.train}
    assert len(built.val) + len(built.train) == 40


def test_command_line_writes_corpus_and_reports_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "stdlib_files", lambda: [SourceFile(STDLIB, "heapq.py", make_module("heap").encode())])
    with zipfile.ZipFile(make_folder(tmp_path / "packages") / "pkg-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pkg-1.0.dist-info/METADATA", "Name: pkg\nLicense: MIT\n")
        for i in range(120):
            wheel.writestr(f"pkg/m{i}.py", make_module(f"b{i}", num_functions=3))
    out = tmp_path / "out"
    options = ["--packages", str(tmp_path / "packages"), "--out", str(out), "--num-shards", "2", "--num-workers", "1"]
    corpus.main([*options, "--max-train-bytes", "2000000"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_files"]["train"] == 120 - result["num_files"]["val"] - result["dropped"].get("over_package", 0)
    assert result["num_files"]["heldout"] == 1
    loaded = shards.load_shards(sorted(out.glob("train_*.xz")), tokenizer_folder=out / "tokenizer")
    assert len(loaded.tokens) == result["num_tokens"]["train"]
    assert len(loaded.starts) == result["num_files"]["train"]


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path
