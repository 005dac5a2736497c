"""`orthrus convert` and `orthrus export`: what they write, and what they refuse to write over."""

from pathlib import Path

import pytest
from safetensors import safe_open

from tests.cli.commands import last_json, refused, run

PROMPT = "import os\n"


def tensor_names(folder: Path) -> set[str]:
    """The tensors of a checkpoint."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def text_of(model: Path) -> str:
    """A short fp32 answer."""
    arguments = ("--model", model, "--dtype", "float32", "--max-new-tokens", 16, "--json")
    return last_json(run("generate", PROMPT, *arguments).stdout)["text"]


def test_view_holds_the_view_and_merged_holds_all(base: Path, view: Path, model: Path):
    assert all("_diff." in name for name in tensor_names(view))
    assert tensor_names(model) == tensor_names(base) | tensor_names(view)


def test_json_says_what_was_written(base: Path, tmp_path: Path):
    facts = last_json(run("convert", base, tmp_path / "out", "--json").stdout)
    assert facts["form"] == "view" and facts["weight_bytes"] > 0
    assert Path(facts["folder"]) == tmp_path / "out"


def test_there_and_back_is_the_same_model(view: Path, model: Path, base: Path, tmp_path: Path):
    run("export", view, tmp_path / "merged")
    assert tensor_names(tmp_path / "merged") == tensor_names(model)
    assert text_of(tmp_path / "merged") == text_of(model)
    run("export", model, tmp_path / "view", "--form", "view", "--base", base)
    assert tensor_names(tmp_path / "view") == tensor_names(view)


def test_merged_without_code_is_the_same_model_and_names_no_code(view: Path, model: Path, tmp_path: Path):
    run("export", view, tmp_path / "plain", "--no-remote-code")
    assert not list((tmp_path / "plain").glob("*.py")), "no code was asked for"
    assert "auto_map" not in (tmp_path / "plain" / "config.json").read_text(), "a loader would look for the code"
    assert text_of(tmp_path / "plain") == text_of(model)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_full_folder_is_not_overwritten_unless_forced(command: str, base: Path, model: Path, tmp_path: Path):
    source = base if command == "convert" else model
    (tmp_path / "config.json").write_text("{}")
    assert "not empty" in refused(command, source, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
    run(command, source, tmp_path, "--force")
    assert (tmp_path / "model.safetensors").is_file()


def test_file_is_not_a_folder(base: Path, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused("convert", base, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--block-size", 1], "block_size"),
        (["--mask-token-id", 264], "mask_token_id"),
        (["--dtype", "int7"], "--dtype int7"),
    ],
    ids=str,
)
def test_bad_argument_writes_nothing(base: Path, tmp_path: Path, arguments: list[object], word: str):
    assert word in refused("convert", base, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_base_without_a_view_is_refused_with_the_way_out(base: Path):
    assert "orthrus convert" in refused("generate", "x", "--model", base)


def test_model_with_a_view_is_not_converted_again(model: Path, tmp_path: Path):
    assert "already has" in refused("convert", model, tmp_path / "out")
