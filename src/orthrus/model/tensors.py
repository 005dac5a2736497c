"""What lies in a checkpoint's safetensors files, read from their headers: nothing is loaded to find a mistake.

The *fingerprint* names a base by its stored weights: sha256 over one line `name dtype shape sha256(bytes)` for each
tensor, by name. It leaves out what does not belong to the base or may be stored or not: the diffusion view, rotary
frequencies, and an LM head that is stored as a copy of the embedding. So the stock base and every merged checkpoint
made from it have the same fingerprint, however they are sharded. It is taken from the stored bytes: a base saved in
another dtype has another fingerprint, and the dtype a model is loaded in does not matter.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.model.modeling import is_view_tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The number formats a checkpoint may be stored in, by their safetensors names."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where one tensor lies and what it is; bytes [start, end) of its file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `ValueError` naming the file when it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, from its index where it has one.

    Raises `ValueError` when there are none (pickled weights are never read) or a shard is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        hint = "; its pickled weights are not read: save them as safetensors" if pickled else ""
        raise ValueError(f"{folder} holds no {SINGLE} and no {INDEX}{hint}")
    files = [folder / name for name in sorted(set(weight_map(folder).values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} is incomplete: {INDEX} names {', '.join(absent)}, which is not there")
    return files


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to file name, as a sharded checkpoint's index has it; files outside the folder are refused."""
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    if strange := [name for name in set(names.values()) if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{folder / INDEX} names files outside its folder: {strange}")
    return names


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors stored in a checkpoint folder, by name. Half-written or otherwise broken files are refused."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ValueError(f"{name} is stored twice, in {tensors[name].file.name} and {file.name}")
            tensors[name] = tensor
    if not (folder / SINGLE).is_file() and (absent := sorted(set(weight_map(folder)) - set(tensors))):
        raise ValueError(f"{folder} is incomplete: {INDEX} names tensors that no shard holds: {listed(absent)}")
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; `ValueError` unless its size is what its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is broken or half-written: its header is cut off")
        try:
            header = json.loads(stream.read(length))
            tensors = {
                name: _stored(file, name, entry, data_start=8 + length)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is broken: {error}") from None
    if size != (needed := max((t.end for t in tensors.values()), default=8 + length)):
        raise ValueError(f"{file} is broken or half-written: {size} bytes, its header says {needed}")
    return tensors


def _stored(file: Path, name: str, entry: Mapping[str, Any], *, data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if (dtype := DTYPES.get(entry["dtype"])) is not None and math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{name} of shape {list(shape)} in {entry['dtype']} does not fill {end - start} bytes")
    return StoredTensor(
        file=file, name=name, dtype=entry["dtype"], shape=shape, start=data_start + start, end=data_start + end
    )


def listed(names: Iterable[str], *, limit: int = 8) -> str:
    """Names for a message: the first few and how many more."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def is_ignorable(name: str) -> bool:
    """Whether a stored tensor can be left alone: old checkpoints stored the rotary frequencies, which are computed."""
    return name.endswith("rotary_emb.inv_freq")


def fingerprint(base: nn.Module | Mapping[str, Tensor] | Path | str) -> str:
    """The base's fingerprint, from a checkpoint folder (exact) or from weights in memory.

    Weights in memory give the folder's fingerprint only in the dtype they are stored in.
    """
    if isinstance(base, (str, Path)):
        return _fingerprint(_file_lines(read_headers(Path(base))))
    if isinstance(base, nn.Module):
        base = base.state_dict()
    return _fingerprint({name: _memory_line(tensor) for name, tensor in base.items() if is_base_tensor(name)})


def is_base_tensor(name: str) -> bool:
    """Whether a stored tensor belongs to the base."""
    return not is_view_tensor(name) and not is_ignorable(name)


def _fingerprint(lines: dict[str, str]) -> str:
    """From `dtype shape digest` of each tensor, a tied head dropped: an equal line is an equal tensor."""
    if EMBEDDING not in lines and HEAD in lines:
        lines[EMBEDDING] = lines[HEAD]
    if lines.get(HEAD) == lines.get(EMBEDDING):
        lines.pop(HEAD, None)
    text = "".join(f"{name} {lines[name]}\n" for name in sorted(lines))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _memory_line(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _line(_DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), data)


def _file_lines(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """The lines of all base tensors; hashing releases the interpreter, so threads read and hash side by side."""
    names = [name for name in tensors if is_base_tensor(name)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _stored_line(tensors[name]), names), strict=True))


def _stored_line(tensor: StoredTensor) -> str:
    with mapped(tensor.file) as data, memoryview(data) as view, view[tensor.start : tensor.end] as part:
        return _line(tensor.dtype, tensor.shape, part)


def _line(dtype: str, shape: tuple[int, ...], data: Any) -> str:
    return f"{dtype} {','.join(map(str, shape))} {hashlib.sha256(data).hexdigest()}"


def mapped(file: Path) -> mmap.mmap:
    """The file's bytes, mapped read-only; a context manager."""
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def is_same(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors are equal bit for bit."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and _stored_line(a) == _stored_line(b)
