"""Writing checkpoints: view files, and merged checkpoints that load where this package is not installed.

A folder appears whole or not at all: files are written beside it and renamed into place.

The merged form carries this package's own source as `trust_remote_code` files: transformers wants flat modules that
import each other relatively, so `orthrus/a/b.py` becomes `orthrus_a_b.py`, and `from orthrus.a.b import c` becomes
`from .orthrus_a_b import c`. That is all that is rewritten; the decoding loop is the same code in both places.
"""

import ast
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData, save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from orthrus import __version__
from orthrus.model.bases import Family, family_of
from orthrus.model.checkpoint import (
    BASE_FIELDS,
    VIEW_MODEL_TYPE,
    BaseName,
    LoadReport,
    load_model,
    load_tokenizer,
)
from orthrus.model.hub import find_folder
from orthrus.model.modeling import OrthrusLM
from orthrus.model.tensors import HEAD, fingerprint, read_headers, read_json

ENTRY = "orthrus.decoding.generate"
"""The module whose transitive imports make up the remote code."""
AUTO_MAP = {
    "AutoConfig": "configuration_orthrus.OrthrusConfig",
    "AutoModelForCausalLM": "modeling_orthrus.OrthrusLM",
}
MAX_SHARD = "5GB"


# --- folders -----------------------------------------------------------------------------------------------------


@contextmanager
def whole_folder(folder: Path, *, force: bool) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` only when the block ends without an error."""
    check_replaceable(folder, force=force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)
        old = staging.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def check_replaceable(folder: Path, *, force: bool) -> None:
    """Refuse to write over something: a folder with content needs `force`, and must then be a checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder to write")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise ValueError(f"{folder} is not empty; name another folder, or replace it with force")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is no checkpoint and will not be replaced")


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors as one safetensors file, or as shards with an index when they are many bytes."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(on_host, folder, max_shard_size=MAX_SHARD)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # the writer's 0600 would keep a shared checkpoint from everybody else
    # The writer leaves out tensors that share memory with others.
    assert set(read_headers(folder)) == set(tensors), "two tensors of the model share their memory"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- the two forms -----------------------------------------------------------------------------------------------


def save_view(
    model: OrthrusLM,
    folder: str | os.PathLike,
    *,
    base_id: str | None = None,
    base_revision: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    force: bool = False,
) -> None:
    """Write the `*_diff` tensors alone, with the base they belong to.

    `tensors` are the view's when they are not simply the model's own: spread over processes, or in another dtype.

    A model from `from_pretrained` knows its base; `base_id` (Hub id or folder) names it for any other. The base's
    fingerprint is that of its stored files, or of the weights in memory when the model came from no file.
    """
    base = base_of(model, base_id=base_id, base_revision=base_revision)
    config = model.config
    with whole_folder(Path(folder), force=force) as staging:
        tensors = dict(model.view_parameters()) if tensors is None else tensors
        write_tensors(tensors, staging)
        fields = {
            "architectures": ["OrthrusView"],
            "model_type": VIEW_MODEL_TYPE,
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
            "orthrus_version": __version__,
        }
        write_json(staging / "config.json", fields | base_fields(base))
        (staging / "README.md").write_text(card(base, form="view", block_size=config.block_size), encoding="utf-8")


def save_merged(
    model: OrthrusLM,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    remote_code: bool = True,
    force: bool = False,
) -> None:
    """Write base and view in the released checkpoints' layout, with code for `trust_remote_code` unless told not to.

    Without the code only loaders that know the method (this package) find the view; others see the base.
    """
    report: LoadReport | None = getattr(model, "load_report", None)
    with whole_folder(Path(folder), force=force) as staging:
        tensors = model.state_dict()
        if model.config.tie_word_embeddings:
            tensors.pop(HEAD, None)
        write_tensors(tensors, staging)
        base = report.base if report is not None else None
        write_json(
            staging / "config.json", merged_fields(model, base) | ({"auto_map": AUTO_MAP} if remote_code else {})
        )
        (staging / "README.md").write_text(
            card(base, form="merged", block_size=model.config.block_size), encoding="utf-8"
        )
        # save_pretrained would refuse what some bases publish, such as a top_k without do_sample.
        generation = {n: value for n, value in model.generation_config.to_diff_dict().items() if n[0] != "_"}
        write_json(staging / "generation_config.json", generation)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        for name, source in code_files(family_of(model.config)).items() if remote_code else ():
            (staging / name).write_text(source, encoding="utf-8")


def merged_fields(model: OrthrusLM, base: BaseName | None) -> dict[str, Any]:
    """config.json of a merged checkpoint: `model_type` as in the releases, so stock loaders see the base."""
    fields = {name: value for name, value in json.loads(model.config.to_json_string()).items() if name[0] != "_"}
    return fields | {
        "architectures": ["OrthrusLM"],
        "model_type": family_of(model.config).model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "orthrus_version": __version__,
        **(base_fields(base) if base is not None else {}),
    }


def base_fields(base: BaseName) -> dict[str, str | None]:
    """The fields of config.json that name a base."""
    return dict(zip(BASE_FIELDS, (base.id, base.revision, base.fingerprint), strict=True))


def base_of(model: OrthrusLM, *, base_id: str | None, base_revision: str | None) -> BaseName:
    """The base that a view of this model belongs to, fingerprint included.

    A merged checkpoint may have been cast when it was written: it names its base only while the tensors still are that
    base's, and itself otherwise.
    """
    report: LoadReport | None = getattr(model, "load_report", None)
    if report is None:
        if base_id is None:
            raise ValueError("this model was not loaded from a checkpoint: name its base with base_id=")
        return BaseName(id=base_id, revision=base_revision, fingerprint=fingerprint(model))
    assert report.folder is not None
    if report.form != "merged" and report.base is not None:
        known = report.base
    else:
        own_id = report.source if report.revision else str(report.folder.resolve())
        known = BaseName(id=own_id, revision=report.revision, fingerprint=fingerprint(report.folder))
        if report.base is not None and report.base.fingerprint == known.fingerprint:
            known = report.base
    if base_id is not None:
        return BaseName(id=base_id, revision=base_revision, fingerprint=known.fingerprint)
    return known


CARD = """---
{front}
---

{what}, drafting blocks of {block_size} tokens; written by orthrus-llm {version}.
Base: {base}.
"""


def card(base: BaseName | None, *, form: Literal["view", "merged"], block_size: int) -> str:
    """The model card: what this is and which base it belongs to."""
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["orthrus"]}
    if base is not None and base.revision is not None:
        metadata |= {"base_model": base.id, "base_model_relation": "adapter" if form == "view" else "merge"}
    return CARD.format(
        front=ModelCardData(**metadata).to_yaml(),
        what="The diffusion view of a language model" if form == "view" else "A language model with its diffusion view",
        block_size=block_size,
        version=__version__,
        base=base if base is not None else "not recorded",
    )


# --- from checkpoint to checkpoint -------------------------------------------------------------------------------


def convert(
    base: str | os.PathLike,
    out: str | os.PathLike,
    *,
    block_size: int = 32,
    mask_token_id: int | None = None,
    form: Literal["view", "merged"] = "view",
    revision: str | None = None,
    dtype: Any = None,
    force: bool = False,
    **options: Any,
) -> Path:
    """Start a view on a stock base as a copy of its AR projections, and write it; returns the folder.

    `mask_token_id` is the first embedding row behind the tokenizer unless given.
    """
    check_replaceable(Path(out), force=force)
    tokenizer = tokenizer_of(base, revision=revision, **options)
    if mask_token_id is None:
        mask_token_id = spare_token(base, tokenizer, revision=revision, **options)
    model = load_model(
        base, revision=revision, dtype=dtype, start_view=True, block_size=block_size, mask_token_id=mask_token_id,
        **options,
    )  # fmt: skip
    return save(model, Path(out), tokenizer, form=form, force=force)


def export(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    form: Literal["view", "merged"] = "merged",
    revision: str | None = None,
    base: str | os.PathLike | None = None,
    dtype: Any = None,
    remote_code: bool = True,
    force: bool = False,
    **options: Any,
) -> Path:
    """Write a checkpoint in another form; returns the folder. `remote_code` is as in `save_merged`."""
    check_replaceable(Path(out), force=force)
    model = load_model(source, revision=revision, base=base, dtype=dtype, **options)
    tokenizer = tokenizer_of(source, revision=revision, base=base, **options)
    return save(model, Path(out), tokenizer, form=form, remote_code=remote_code, force=force)


def save(
    model: OrthrusLM,
    out: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    form: Literal["view", "merged"],
    remote_code: bool = True,
    force: bool = False,
) -> Path:
    """Write one of the two forms; a view file leaves the tokenizer to its base."""
    if form == "view" and not remote_code:
        raise ValueError("remote_code=False (--no-remote-code) is for the merged form: a view file never holds code")
    if form == "view":
        save_view(model, out, force=force)
    elif form == "merged":
        save_merged(model, out, tokenizer, remote_code=remote_code, force=force)
    else:
        raise ValueError(f"form must be 'view' or 'merged', got {form!r}")
    return out


def tokenizer_of(source: str | os.PathLike, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, None when it has none."""
    try:
        return load_tokenizer(source, **options)
    except ValueError:
        return None


def spare_token(
    base: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None, *, revision: str | None, **options: Any
) -> int:
    """The first embedding row behind the tokenizer, which no text uses; `ValueError` when there is none."""
    if tokenizer is None:
        raise ValueError(f"{base} has no tokenizer to find an unused row with: give mask_token_id, an id no text uses")
    fields = read_json(find_folder(base, weights=False, revision=revision, **options) / "config.json")
    num_rows = fields.get("vocab_size", 0)
    if len(tokenizer) >= num_rows:
        raise ValueError(
            f"the tokenizer's {len(tokenizer)} tokens fill all {num_rows} embedding rows of {base}, and embeddings are "
            f"never resized: give mask_token_id, a token that no text uses: {reserved_token(tokenizer)}"
        )
    return len(tokenizer)


def reserved_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """For a message: a token that the tokenizer keeps for such uses, or how to look for one."""
    names = {id_: token for token, id_ in tokenizer.get_added_vocab().items()}
    reserved = [id_ for id_, token in names.items() if re.search("reserved|unused|control", token.lower())]
    if not reserved:
        return "a special token that its chat template does not write, say"
    return f"{max(reserved)}, say, which is its {names[max(reserved)]}"


# --- remote code -------------------------------------------------------------------------------------------------


def code_files(family: Family) -> dict[str, str]:
    """File name to source of everything that `trust_remote_code` needs for a checkpoint of this family."""
    modules = closure(ENTRY)
    header = (
        f"# Generated by orthrus-llm {__version__} from {{origin}}. Do not edit: export the checkpoint again.\n"
        "# SPDX-License-Identifier: Apache-2.0\n"
    )
    code = {
        f"{flat_name(module)}.py": header.format(origin=module) + flatten(source) for module, source in modules.items()
    }
    code["configuration_orthrus.py"] = header.format(origin="orthrus.model.export") + configuration_source(family)
    code["modeling_orthrus.py"] = header.format(origin="orthrus.model.export") + modeling_source(modules)
    return code


CONFIGURATION = '''"""The configuration class that config.json's auto_map names."""

from .orthrus_config import {config} as _OrthrusConfig


class OrthrusConfig(_OrthrusConfig):
    """As config.json has it: released checkpoints say `{model_type}`, which lets stock loaders read the AR view."""

    model_type = "{model_type}"
'''

MODELING = '''"""The model class that config.json's auto_map names."""

{imports}

# Early transformers 5 copies the modules that this one imports into its cache, not those that they import.


class OrthrusLM(OrthrusForCausalLM):
    """A dual-view language model: `generate` drafts a block with one view and verifies it with the other."""

    config_class = OrthrusConfig
'''


def configuration_source(family: Family) -> str:
    """The configuration module, whose class is the family's dual-view one under the stock `model_type`."""
    return CONFIGURATION.format(config=family.config.__name__, model_type=family.model_type)


def modeling_source(modules: Iterable[str]) -> str:
    """The entry module, which imports every other one by name."""
    lines = [f"from .{flat_name(module)} import __name__ as _  # noqa: F401" for module in modules]
    lines += ["from .configuration_orthrus import OrthrusConfig", f"from .{flat_name(ENTRY)} import OrthrusForCausalLM"]
    return MODELING.format(imports="\n".join(lines))


def flat_name(module: str) -> str:
    """`orthrus.decoding.verify` as a module beside the weights: `orthrus_decoding_verify`."""
    return module.replace(".", "_")


def flatten(source: str) -> str:
    """Absolute imports of this package made relative."""
    return re.sub(
        r"^(\s*)from (orthrus(?:\.\w+)+) import ",
        lambda match: f"{match[1]}from .{flat_name(match[2])} import ",
        source,
        flags=re.MULTILINE,
    )


def closure(entry: str) -> dict[str, str]:
    """Module name to source of `entry` and everything in this package that it imports, itself or through others."""
    sources: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module not in sources:
            sources[module] = module_source(module)
            waiting += package_imports(sources[module], where=module)
    return dict(sorted(sources.items()))


def module_source(module: str) -> str:
    """The source text of a module of this package."""
    path = files("orthrus").joinpath(*module.split(".")[1:-1], f"{module.split('.')[-1]}.py")
    return path.read_text(encoding="utf-8")


def package_imports(source: str, *, where: str) -> list[str]:
    """The package's modules that a source imports, each as `from orthrus.a.b import c`, the form that is rewritten."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            strange = [alias.name for alias in node.names if alias.name.split(".")[0] == "orthrus"]
            assert not strange, f"{where}: `import {strange[0]}` cannot be flattened"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module != "orthrus", f"{where}: line {node.lineno} cannot be flattened"
            if node.module is not None and node.module.startswith("orthrus."):
                modules.append(node.module)
    return modules
