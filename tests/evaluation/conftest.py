"""A tiny random checkpoint with both views, and short prompts for it."""

import json
from pathlib import Path

import pytest

from tests.cli.commands import run
from tests.cli.tiny import write_base

TEXTS = ["def add(a, b):", "class Stack:\n    pass", "x = 1", "import os\n\n\ndef walk(path):"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged checkpoint of a tiny random base, trained for blocks of 8."""
    folder = tmp_path_factory.mktemp("evaluation")
    run("convert", write_base(folder / "base"), folder / "random", "--form", "merged", "--block-size", 8)
    return folder / "random"


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts as lines of a JSON Lines file."""
    path = tmp_path_factory.mktemp("prompts") / "snippets.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path
