"""`orthrus export`: write a checkpoint in another form."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from orthrus.cli import options
from orthrus.cli.convert import print_written


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint: a Hub id or a folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    form: Annotated[
        Literal["merged", "view"], typer.Option(help="merged: loads anywhere; view: the trained tensors only.")
    ] = "merged",
    revision: options.Revision = None,
    base: options.Base = None,
    dtype: options.Dtype = "auto",
    remote_code: Annotated[
        bool, typer.Option(help="Put code for trust_remote_code beside a merged checkpoint's weights.")
    ] = True,
    reader: Annotated[
        Literal["vllm"] | None,
        typer.Option("--for", help="Leave out what this program does not read, and print the line that serves it."),
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint in another form."""
    options.check_dtype(dtype)
    options.refuse(
        "--form view",
        "is not what --for vllm writes: it makes one checkpoint",
        when=form == "view" and reader is not None,
    )
    remote_code = remote_code and reader is None

    from orthrus.cli.session import quiet
    from orthrus.model.export import export as write

    quiet()
    folder = write(
        model, out, form=form, revision=revision, base=base, dtype=dtype, remote_code=remote_code, force=force
    )
    print_written(folder, form, as_json=as_json)
    if reader is not None and not as_json:
        from orthrus.cli.serve import vllm_line

        print(shlex.join(vllm_line(str(folder), base=None, revision=None, block_size="auto", arguments=[])))
