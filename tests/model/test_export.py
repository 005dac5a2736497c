"""Writing: round trips, folders that appear whole, and remote code that needs no installed package."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from orthrus import __version__
from orthrus.model import export as exports
from orthrus.model.bases import FAMILIES
from orthrus.model.checkpoint import load_model
from orthrus.model.export import code_files, convert, export, save_merged, save_view
from orthrus.model.tensors import fingerprint, read_headers, read_json
from tests.families import ONE_EACH, VARIANTS, family, stock_class
from tests.model.released import NUM_TOKENS, edit_json, random_model, write_released, write_stock


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in fp32, so that logits can be compared."""
    return write_stock(tmp_path_factory.mktemp("stock") / "base", random_model(tied=False), dtype=torch.float32)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, stock: Path) -> Path:
    """The base with a fresh view, merged by `convert`."""
    return convert(stock, tmp_path_factory.mktemp("merged") / "merged", block_size=8, form="merged")


def stored_bytes(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Every stored tensor's format and bytes."""
    headers = read_headers(folder)
    return {n: (t.dtype, t.file.read_bytes()[t.start : t.end]) for n, t in headers.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "variant"), [(torch.bfloat16, v) for v in VARIANTS] + [(torch.float32, "qwen3")])
def test_base_to_view_to_merged_to_view_keeps_every_bit(tmp_path: Path, tied: bool, dtype: torch.dtype, variant: str):
    base = write_stock(tmp_path / "base", random_model(tied=tied, variant=variant), dtype=dtype, variant=variant)
    view = convert(base, tmp_path / "view", block_size=8)
    merged = export(view, tmp_path / "merged")
    again = export(merged, tmp_path / "again", form="view")
    assert files(view) == files(again)
    assert files(merged) == files(convert(base, tmp_path / "direct", block_size=8, form="merged"))
    assert stored_bytes(merged) == stored_bytes(base) | stored_bytes(view)
    assert fingerprint(merged) == fingerprint(base)
    check_configuration_is_the_bases(merged, base)
    assert type(load_model(merged).config) is family(variant).config
    assert type(AutoModelForCausalLM.from_pretrained(merged)).__name__ == stock_class(variant)


def check_configuration_is_the_bases(merged: Path, base: Path):
    """What stock transformers reads in a merged checkpoint is the base, field by field, defaults included."""
    own, stock = (AutoConfig.from_pretrained(folder).to_dict() for folder in (merged, base))
    ours = {"block_size", "mask_token_id", "auto_map", "orthrus_version", "base_id", "base_revision",
            "base_fingerprint", "architectures", "use_cache", "head_dim", "_name_or_path"}  # fmt: skip
    assert {n: value for n, value in own.items() if n not in ours} == {n: v for n, v in stock.items() if n not in ours}
    head_dim = stock.get("head_dim", stock["hidden_size"] // stock["num_attention_heads"])
    assert own["head_dim"] == head_dim and own["architectures"] == ["OrthrusLM"]


def test_saved_model_of_every_family_is_read_as_its_own(tmp_path: Path):
    """`save_pretrained` writes this project's `model_type`, which names the family too."""
    for variant in VARIANTS:
        model = random_model(variant=variant)
        model.save_pretrained(tmp_path / variant)
        again = load_model(tmp_path / variant)
        assert type(again.config) is type(model.config)
        named = {"_name_or_path": "", "architectures": [], "dtype": None}
        assert again.config.to_dict() | named == model.config.to_dict() | named
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_released_checkpoint_to_view_to_merged_keeps_every_bit(tmp_path: Path):
    released = write_released(tmp_path / "released", random_model(), head=True)
    view = export(released, tmp_path / "view", form="view")
    assert read_json(view / "config.json")["base_id"] == str(released), "with no base named, it is its own base"
    merged = export(view, tmp_path / "merged")
    truth = stored_bytes(released)
    truth.pop("lm_head.weight")  # a copy of the embedding
    assert stored_bytes(merged) == truth
    named = export(released, tmp_path / "named", form="view", base=released)
    assert stored_bytes(named) == stored_bytes(view)


def test_cast_merged_checkpoint_is_its_own_base(tmp_path: Path, stock: Path):
    cast = convert(stock, tmp_path / "cast", block_size=8, form="merged", dtype="bfloat16")
    assert read_json(cast / "config.json")["base_id"] == str(stock), "provenance names where it came from"
    view = export(cast, tmp_path / "view", form="view")
    assert read_json(view / "config.json")["base_id"] == str(cast), "a view of cast weights does not fit the original"
    assert load_model(view).dtype == torch.bfloat16


def test_convert_copies_the_ar_projections(stock: Path, merged: Path):
    base, both = stored_bytes(stock), stored_bytes(merged)
    for name in set(both) - set(base):
        assert both[name] == base[name.replace("_diff.", ".")], f"{name} is no copy"
    assert len(both) - len(base) == 2 * 6


def test_saved_view_is_small_and_names_its_base(tmp_path: Path, stock: Path):
    view = convert(stock, tmp_path / "view", block_size=4, mask_token_id=200)
    fields = read_json(view / "config.json")
    assert (fields["block_size"], fields["mask_token_id"]) == (4, 200)
    assert fields["base_fingerprint"] == fingerprint(stock) and fields["base_id"] == str(stock)
    assert sorted(files(view)) == ["README.md", "config.json", "model.safetensors"]


def test_model_that_came_from_no_checkpoint_needs_a_base_id(tmp_path: Path):
    model = random_model(tied=False)
    with pytest.raises(ValueError, match="name its base with base_id="):
        save_view(model, tmp_path / "view")
    base = write_stock(tmp_path / "base", model, dtype=torch.float32)
    save_view(model, tmp_path / "view", base_id=str(base))
    assert read_json(tmp_path / "view" / "config.json")["base_fingerprint"] == fingerprint(base)
    load_model(tmp_path / "view")


def test_large_checkpoints_are_sharded(tmp_path: Path, merged: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exports, "MAX_SHARD", "20KB")
    save_merged(load_model(merged), tmp_path / "shards")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert stored_bytes(tmp_path / "shards") == stored_bytes(merged)
    load_model(tmp_path / "shards")


# --- what is written beside the tensors --------------------------------------------------------------------------


def test_merged_config_is_the_released_layout(merged: Path, stock: Path):
    fields = read_json(merged / "config.json")
    assert fields["architectures"] == ["OrthrusLM"] and fields["model_type"] == "qwen3"
    assert (fields["block_size"], fields["mask_token_id"]) == (8, NUM_TOKENS)
    base = read_json(stock / "config.json")
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "head_dim",
        "rope_parameters",
        "tie_word_embeddings",
    ):
        assert fields[name] == base[name]
    assert str(merged) not in (merged / "config.json").read_text()


def test_generation_config_is_the_bases_with_nothing_invented(merged: Path):
    fields = read_json(merged / "generation_config.json")
    assert fields["eos_token_id"] == [257, 256] and fields["top_k"] == 20
    assert not {"temperature", "top_p", "do_sample"} & set(fields)


def test_merged_tokenizer_is_the_bases(merged: Path, stock: Path):
    own, base = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(stock)
    assert own("def f():")["input_ids"] == base("def f():")["input_ids"]
    assert own.chat_template == base.chat_template


def test_generation_config_is_made_from_config_json_when_the_base_has_none(tmp_path: Path, stock: Path):
    bare = shutil.copytree(stock, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    fields = read_json(convert(bare, tmp_path / "out", form="merged") / "generation_config.json")
    assert fields["eos_token_id"] == 257
    assert "_from_model_config" not in fields, "transformers would make it anew from config.json while generating"


# --- the mask token ----------------------------------------------------------------------------------------------


def test_mask_token_defaults_to_the_row_behind_the_tokenizer(tmp_path: Path, stock: Path):
    full = shutil.copytree(stock, tmp_path / "full")
    edit_json(full / "config.json", vocab_size=NUM_TOKENS)
    with pytest.raises(
        ValueError, match=f"{NUM_TOKENS} tokens fill all {NUM_TOKENS} embedding rows.*give mask_token_id"
    ):
        convert(full, tmp_path / "out")
    spare = AutoTokenizer.from_pretrained(full)
    spare.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>", "<|reserved_1|>"]})
    spare.save_pretrained(full)
    edit_json(full / "config.json", vocab_size=NUM_TOKENS + 2)
    with pytest.raises(ValueError, match=rf"give mask_token_id.*: {NUM_TOKENS + 1}, say, which is its <.reserved_1.>"):
        convert(full, tmp_path / "out")
    bare = shutil.copytree(stock, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer.*give mask_token_id"):
        convert(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(bare, tmp_path / "out", mask_token_id=263)
    with pytest.raises(ValueError, match="mask_token_id 264 is outside"):
        convert(bare, tmp_path / "other", mask_token_id=264)


def test_bad_block_size_and_form_are_refused(tmp_path: Path, stock: Path):
    with pytest.raises(ValueError, match="block_size must be at least 2"):
        convert(stock, tmp_path / "out", block_size=1)
    with pytest.raises(ValueError, match="form must be 'view' or 'merged'"):
        convert(stock, tmp_path / "out", form="zip")  # pyrefly: ignore
    assert not any(tmp_path.iterdir())


# --- folders appear whole or not at all --------------------------------------------------------------------------


def test_folder_with_content_is_not_written_over(tmp_path: Path, stock: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        convert(stock, out)
    with pytest.raises(ValueError, match="no checkpoint and will not be replaced"):
        convert(stock, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file"):
        convert(stock, out / "notes.txt")


def test_force_replaces_a_checkpoint_and_an_empty_folder_needs_none(tmp_path: Path, stock: Path):
    out = tmp_path / "out"
    out.mkdir()
    convert(stock, out, block_size=8)
    convert(stock, out, block_size=4, force=True)
    assert load_model(out).config.block_size == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing may be left beside it"


def test_checkpoint_can_be_written_over_the_one_it_was_loaded_from(tmp_path: Path, merged: Path):
    out = shutil.copytree(merged, tmp_path / "out")
    truth = stored_bytes(out)
    save_merged(load_model(out), out, force=True)
    assert stored_bytes(out) == truth, "the files that the weights are mapped from were written over"


@pytest.mark.parametrize("force", [True, False])
def test_failed_write_leaves_what_was_there(
    tmp_path: Path, stock: Path, merged: Path, force: bool, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    if force:
        convert(stock, out, block_size=8)
    before = files(out) if force else None
    model = load_model(merged)

    def full_disk(tensors: dict[str, Tensor], folder: Path):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(exports, "write_tensors", full_disk)
    for write in (save_view, save_merged):
        with pytest.raises(OSError, match="No space left"):
            write(model, out, force=force)
    assert list(tmp_path.iterdir()) == ([out] if force else [])
    assert before is None or files(out) == before


# --- remote code -------------------------------------------------------------------------------------------------


def test_remote_code_imports_only_itself_and_what_transformers_brings():
    code = code_files(FAMILIES["qwen3"])
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"}
    for name, source in code.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in code, f"{name} imports {node.module}, which is not written"
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None and node.module.split(".")[0] in allowed, f"{name}: {node.module}"
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name


def test_remote_code_says_where_it_came_from():
    for name, source in code_files(FAMILIES["qwen3"]).items():
        first = source.splitlines()[0]
        assert first.startswith(f"# Generated by orthrus-llm {__version__} from orthrus."), name


def test_remote_code_is_the_package_but_for_imports():
    code = code_files(FAMILIES["qwen3"])
    for module in ("orthrus.decoding.verify", "orthrus.model.masks"):
        own = exports.module_source(module).splitlines()
        written = code[f"{module.replace('.', '_')}.py"].splitlines()[2:]
        assert [line for line in own if "import" not in line] == [line for line in written if "import" not in line]


def test_entry_imports_every_module_itself():
    code = code_files(FAMILIES["qwen3"])
    entry = ast.parse(code["modeling_orthrus.py"])
    named = {f"{node.module}.py" for node in entry.body if isinstance(node, ast.ImportFrom)}
    assert named == set(code) - {"modeling_orthrus.py"}, "transformers 5.8 copies only what the entry itself imports"


def test_other_import_forms_are_not_flattened_in_silence():
    for source in ("import orthrus.config", "from orthrus import config", "from .config import x"):
        with pytest.raises(AssertionError, match="cannot be flattened"):
            exports.package_imports(source, where="somewhere")


STRANGER = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "orthrus":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import orthrus
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("orthrus is importable: this proves nothing")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer

prompt = "def add("
for folder, stock_class in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", attn_implementation="eager", trust_remote_code=True
    ).eval()
    assert type(model).__name__ == "OrthrusLM" and type(model).__module__.startswith("transformers_modules.")
    assert model.config._attn_implementation == "eager" and model.dtype == torch.float32
    assert type(model.model).__name__ == stock_class.replace("ForCausalLM", "Model")
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    drafted = model.generate(input_ids=input_ids, max_new_tokens=24, use_diffusion_mode=True, streamer=streamer)
    plain = model.generate(input_ids=input_ids, max_new_tokens=24, use_diffusion_mode=False)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(stock).__name__ == stock_class
    truth = stock.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=24)
    assert drafted.tolist() == plain.tolist() == truth.tolist(), (folder, drafted, plain, truth)
    model.generation_config.top_k = None  # transformers saves no configuration that it finds inconsistent
    saved = f"{sys.argv[1]}/{stock_class}"
    model.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager", trust_remote_code=True)
    assert AutoConfig.from_pretrained(saved).model_type == stock.config.model_type
    assert torch.equal(again(input_ids).logits, model(input_ids).logits)
    print("tokens", drafted.shape[1] - input_ids.shape[1])
assert not [name for name in sys.modules if name.split(".")[0] == "orthrus"]
"""


def test_merged_checkpoint_generates_where_orthrus_is_not_importable(tmp_path: Path, merged: Path):
    folders = {merged: "Qwen3ForCausalLM"}
    for variant in ONE_EACH:
        base = write_stock(tmp_path / variant, random_model(variant=variant), dtype=torch.float32, variant=variant)
        folders[convert(base, tmp_path / f"{variant}-merged", block_size=8, form="merged")] = stock_class(variant)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(part) for pair in folders.items() for part in pair]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "saved"), *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens 24") == len(folders)
