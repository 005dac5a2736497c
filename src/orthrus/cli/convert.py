"""`orthrus convert`: start a diffusion view on a base, as a copy of its own projections."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from orthrus.cli import options


def convert(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="A Qwen3, Qwen2, Llama or Mistral checkpoint: a Hub id or a folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    block_size: Annotated[int, typer.Option(metavar="K", help="Positions to draft together, anchor included.")] = 32,
    mask_token_id: Annotated[
        int | None, typer.Option(metavar="ID", help="Unused embedding row; the first behind the tokenizer by default.")
    ] = None,
    form: Annotated[
        Literal["view", "merged"], typer.Option(help="view: the new tensors only; merged: with the base's.")
    ] = "view",
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Start an untrained view as a copy of a base's projections: the point that training starts from."""
    options.check_dtype(dtype)

    from orthrus.cli.session import quiet
    from orthrus.model import export

    quiet()
    folder = export.convert(
        base,
        out,
        block_size=block_size,
        mask_token_id=mask_token_id,
        form=form,
        revision=revision,
        dtype=dtype,
        force=force,
    )
    print_written(folder, form, as_json=as_json)


def print_written(folder: Path, form: str, *, as_json: bool) -> None:
    """Say which checkpoint was written where, and how large it is."""
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if as_json:
        print(json.dumps({"folder": str(folder), "form": form, "weight_bytes": num_bytes}), flush=True)
    else:
        print(f"wrote {folder}: {form}, {num_bytes / 1e6:.1f} MB of weights")
