"""The checkpoints that the command line makes from a tiny random base."""

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.cli.commands import run
from tests.cli.tiny import TEMPLATE, write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model without a view."""
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture(scope="session")
def model(base: Path) -> Path:
    """The base with a fresh view, merged into one checkpoint by `orthrus convert`."""
    folder = base.parent / "merged"
    run("convert", base, folder, "--form", "merged", "--block-size", 8)
    return folder


@pytest.fixture(scope="session")
def view(base: Path) -> Path:
    """The view alone, naming its base."""
    folder = base.parent / "view"
    run("convert", base, folder, "--form", "view", "--block-size", 8)
    return folder


@pytest.fixture(scope="session")
def chat_model(model: Path) -> Path:
    """The merged checkpoint with a chat template."""
    folder = model.parent / "chat"
    shutil.copytree(model, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
