"""Headers, and the fingerprint that names a base."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus.model.tensors import fingerprint, read_header, read_headers
from tests.model.released import random_model, released_tensors, write_released, write_shards, write_stock


def test_header_is_what_was_written(tmp_path: Path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    header = read_headers(tmp_path)
    assert {n: (t.dtype, t.shape) for n, t in header.items()} == {"a": ("F32", (2, 3)), "b": ("BF16", (5,))}
    stored = header["a"]
    data = stored.file.read_bytes()[stored.start : stored.end]
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 60, -1])
def test_cut_off_file_is_refused(tmp_path: Path, num_bytes: int):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(8, 8)}, file)
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match="broken or half-written"):
        read_header(file)


def test_garbage_is_refused(tmp_path: Path):
    for content in (b"\xff" * 64, (20).to_bytes(8, "little") + b"not json" * 8, b"\x02" + b"\0" * 7 + b"[]"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is broken"):
            read_headers(tmp_path)


def test_index_must_match_its_shards(tmp_path: Path):
    tensors = {name: torch.zeros(2) for name in "abcd"}
    write_shards(tmp_path, tensors, num_shards=2)
    assert set(read_headers(tmp_path)) == set(tensors)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["e"] = content["weight_map"]["a"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no shard holds: e$"):
        read_headers(tmp_path)
    content["weight_map"]["e"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside its folder"):
        read_headers(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    del content["weight_map"]["e"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors, which is not there"):
        read_headers(tmp_path)


def test_pickles_are_not_read(tmp_path: Path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        read_headers(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_fingerprint_names_the_base_however_it_is_stored(tmp_path: Path, tied: bool):
    model = random_model(tied=tied)
    print_ = fingerprint(write_stock(tmp_path / "stock", model))
    assert print_.startswith("sha256:") and len(print_) == len("sha256:") + 64
    assert fingerprint(write_released(tmp_path / "merged", model)) == print_, "the view does not belong to the base"
    assert fingerprint(write_released(tmp_path / "shards", model, num_shards=3)) == print_
    assert fingerprint(write_released(tmp_path / "head", model, head=True)) == print_, "a tied head may be stored"
    assert fingerprint(load_file(tmp_path / "merged" / "model.safetensors")) == print_
    assert fingerprint(model.to(torch.bfloat16)) == print_


def test_fingerprint_ignores_rotary_frequencies_and_a_head_without_embedding(tmp_path: Path):
    tensors = released_tensors(random_model())
    print_ = fingerprint(tensors)
    assert fingerprint(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}) == print_
    head_only = dict(tensors)
    head_only["lm_head.weight"] = head_only.pop("model.embed_tokens.weight")
    assert fingerprint(head_only) == print_


def test_fingerprint_sees_every_bit_name_shape_and_dtype():
    tensors = released_tensors(random_model())
    prints = {fingerprint(tensors)}
    name = "model.layers.1.mlp.up_proj.weight"
    changed = tensors[name].clone()
    changed.view(torch.int16)[3, 4] ^= 1
    variants = [
        tensors | {name: changed},
        tensors | {name: tensors[name].reshape(-1)},
        tensors | {name: tensors[name].view(torch.float16)},
        tensors | {name: tensors["model.layers.0.mlp.up_proj.weight"]},
        {n: t for n, t in tensors.items() if n != name},
        {n: t.float() for n, t in tensors.items()},
    ]
    prints |= {fingerprint(variant) for variant in variants}
    assert len(prints) == len(variants) + 1
    view = "model.layers.1.self_attn.q_proj_diff.weight"
    assert fingerprint(tensors | {view: tensors[view] + 1}) in prints, "another view is not another base"


def test_fingerprint_is_the_same_on_every_machine():
    tensors = {"model.norm.weight": torch.arange(4, dtype=torch.float32), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    assert fingerprint(tensors) == "sha256:4dbe17507d9ead8867535e3c7904539b24f9899705a6aba4be3a00bcc8a5a680"
