"""Loading by Hub id, with huggingface_hub's download replaced by one from a folder: nothing here needs a network."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from orthrus.model.checkpoint import LoadedLM, load_model, load_tokenizer
from orthrus.model.export import convert, save_view
from orthrus.model.hub import find_folder
from tests.model.released import NUM_TOKENS, random_model, write_released, write_stock

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A Hub of one cache: `snapshot_download` copies the asked-for files and remembers how it was called."""

    def __init__(self, root: Path):
        self.root = root
        self.calls: list[dict] = []

    def add(self, repo_id: str) -> Path:
        folder = self.root / "repositories" / repo_id
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str], **options) -> str:
        self.calls.append({"repo_id": repo_id, "revision": revision, "allow_patterns": allow_patterns, **options})
        if not self.add(repo_id).is_dir() or revision not in (None, "v1", COMMIT):
            raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nand more lines")
        snapshot = self.root / "cache" / repo_id.replace("/", "--") / "snapshots" / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in self.add(repo_id).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The replaced Hub."""
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.mark.parametrize("num_shards", [1, 2])
def test_only_the_models_own_files_are_downloaded(hub: Hub, num_shards: int):
    folder = write_released(hub.add("someone/Orthrus-tiny"), random_model(), num_shards=num_shards)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_orthrus.py"):
        (folder / name).write_bytes(b"not wanted")
    model = load_model("someone/Orthrus-tiny", revision="v1")
    downloaded = {file.name for file in model.load_report.folder.iterdir()}
    assert not {"pytorch_model.bin", "consolidated.safetensors", "modeling_orthrus.py"} & downloaded
    assert len([name for name in downloaded if name.endswith(".safetensors")]) == num_shards
    assert model.load_report.revision == COMMIT, "the report must name a commit, not a branch that moves"
    assert model.config.name_or_path == "someone/Orthrus-tiny"


def test_both_downloads_are_of_one_commit_and_carry_the_options(hub: Hub):
    write_released(hub.add("someone/m"), random_model())
    LoadedLM.from_pretrained("someone/m", revision="v1", token="secret", cache_dir="there", local_files_only=True)
    assert [call["revision"] for call in hub.calls] == ["v1", COMMIT], "a branch may move between two downloads"
    for call in hub.calls:
        assert (call["token"], call["cache_dir"], call["local_files_only"]) == ("secret", "there", True)


def test_tokenizer_downloads_no_weights(hub: Hub):
    write_released(hub.add("someone/m"), random_model())
    tokenizer = load_tokenizer("someone/m", revision="v1")
    assert len(tokenizer) == NUM_TOKENS
    assert not list((hub.root / "cache").rglob("*.safetensors"))


def test_view_names_its_hub_base_by_commit_and_finds_it_again(hub: Hub, tmp_path: Path):
    write_stock(hub.add("someone/base"), random_model())
    convert("someone/base", tmp_path / "view", block_size=8, revision="v1")
    hub.calls.clear()
    model = load_model(tmp_path / "view")
    base = model.load_report.base
    assert (base.id, base.revision) == ("someone/base", COMMIT)
    assert {call["revision"] for call in hub.calls} == {COMMIT}
    assert "base_model: someone/base" in (tmp_path / "view" / "README.md").read_text()
    assert load_tokenizer(tmp_path / "view").chat_template


def test_view_of_a_hub_checkpoint_names_that_checkpoint(hub: Hub, tmp_path: Path):
    write_released(hub.add("someone/Orthrus-tiny"), random_model())
    save_view(load_model("someone/Orthrus-tiny"), tmp_path / "view")
    model = load_model(tmp_path / "view")
    assert (model.load_report.base.id, model.load_report.base.revision) == ("someone/Orthrus-tiny", COMMIT)
    q_diff = "model.layers.0.self_attn.q_proj_diff.weight"
    assert torch.equal(model.state_dict()[q_diff], random_model().state_dict()[q_diff].bfloat16())


def test_unknown_model_is_one_clear_line(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no folder and no downloadable model called 'some/typo'") as raised:
        load_model("some/typo")
    assert "\n" not in str(raised.value)
    write_released(hub.add("someone/m"), random_model())
    with pytest.raises(ValueError, match="called 'someone/m' at revision v9"):
        load_model("someone/m", revision="v9")

    def gone(*args, **options):
        raise RepositoryNotFoundError("401 Client Error", response=_Response())  # pyrefly: ignore

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    with pytest.raises(ValueError, match="RepositoryNotFoundError: 401 Client Error"):
        load_tokenizer("some/typo")


class _Response:
    """What huggingface_hub's errors look at in an HTTP answer."""

    headers: dict[str, str] = {}
    request = None


@pytest.mark.parametrize("source", ["./not/there", "/not/there", "a/b/c", "", "..", "with space"])
def test_what_is_no_folder_and_no_id_is_not_asked_of_the_hub(hub: Hub, source: str, tmp_path: Path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError):
        load_model(source)
    assert not hub.calls


def test_file_and_revision_of_a_folder_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="neither a folder nor a model id"):
        find_folder(tmp_path / "file", weights=True)
    with pytest.raises(ValueError, match="revision 'v1' names a commit on the Hub"):
        find_folder(tmp_path, weights=True, revision="v1")
