"""`orthrus serve`: a server of the OpenAI protocol over a checkpoint."""

import os
import shlex
import shutil
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from orthrus.cli import options

BACKENDS = ("vllm",)
DRAFT_SAMPLE_METHODS = ("greedy", "probabilistic")
OWN = ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens", "--hf-overrides", "--model")
"""vLLM's options that the printed line sets."""
NUMBERS = {
    "--pipeline-parallel-size": "pipeline_parallel_size", "-pp": "pipeline_parallel_size",
    "--decode-context-parallel-size": "decode_context_parallel_size", "-dcp": "decode_context_parallel_size",
    "--prefill-context-parallel-size": "prefill_context_parallel_size", "-pcp": "prefill_context_parallel_size",
}  # fmt: skip
"""vLLM's options of which numbers above 1 are refused, and what `refusals.check_options` calls them."""
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""How the command is read: what is no option of its own is the backend's."""


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint or view file: a Hub id or a folder.")],
    backend: Annotated[str, typer.Option(metavar="|".join(BACKENDS), help="Who serves it.")],
    base: options.Base = None,
    revision: options.Revision = None,
    block_size: Annotated[
        str,
        typer.Option(
            metavar="K|auto|TABLE",
            help="Positions per cycle, anchor included: a number, auto (fewer the more rows decode together), or a "
            "table such as 1:32,8:16,24:8,72:1 (from so many rows on, so many; 1 drafts nothing). vLLM's own "
            "goes behind --.",
        ),
    ] = "auto",
    draft_sample_method: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DRAFT_SAMPLE_METHODS),
            help="How drafts of sampled text are chosen: the likeliest (vLLM's default), or drawn from the view's law, "
            "of which more are kept and which takes memory.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the line and do not run it.")] = False,
) -> None:
    """Serve a checkpoint; options behind MODEL that are not listed here, and all behind --, go to vllm serve."""
    if backend not in BACKENDS:
        raise ValueError(f"--backend {backend}: choose {' or '.join(BACKENDS)}")
    if draft_sample_method not in (None, *DRAFT_SAMPLE_METHODS):
        raise ValueError(f"--draft-sample-method {draft_sample_method}: choose {' or '.join(DRAFT_SAMPLE_METHODS)}")
    for word in context.args:
        if (own := option_name(word)) in OWN:
            raise ValueError(f"{own} is what this command writes; change the line that --dry-run prints and run that")
    words = vllm_line(
        model, base=base, revision=revision, block_size=block_size, draft_sample_method=draft_sample_method,
        arguments=context.args,
    )  # fmt: skip
    program = None if dry_run else find_program(words[0])
    print(shlex.join(words), flush=True)
    if program is not None:
        os.execv(program, [program, *words[1:]])


def option_name(word: str) -> str:
    """The option that a word of vLLM's line sets: it may be `--some_option=1` or `--some-option.field`."""
    name = word.partition("=")[0].partition(".")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def checked_options(arguments: list[str]) -> dict[str, Any]:
    """What `refusals.check_options` wants to know of vLLM's options, as far as it can be read from their words."""
    found: dict[str, Any] = {}
    for word, following in pairwise([*arguments, ""]):
        name, value = option_name(word), word.partition("=")[2] or following
        if name in NUMBERS and value.isdecimal():  # what is no number vLLM itself refuses
            found[NUMBERS[name]] = int(value)
        elif name == "--kv-cache-dtype":
            found["kv_cache_dtype"] = value
        elif name in ("--enable-lora", "--no-enable-lora"):
            found["enable_lora"] = name == "--enable-lora"
    return found


def is_data_parallel(arguments: list[str]) -> bool:
    """Whether these words of vLLM's line ask for several engines: of several the last one counts."""
    sizes = [
        word.partition("=")[2] or following
        for word, following in pairwise([*arguments, ""])
        if option_name(word) in ("--data-parallel-size", "-dp")
    ]
    return sizes[-1:] not in ([], ["1"])


def vllm_line(
    model: str,
    *,
    base: str | None,
    revision: str | None,
    block_size: str,
    arguments: list[str],
    draft_sample_method: str | None = None,
) -> list[str]:
    """The line that serves a checkpoint; `ValueError` for what vLLM would refuse in it, in fewer words."""
    from orthrus.cli.session import quiet
    from orthrus.model.checkpoint import read_checkpoint

    quiet()
    # By name, as nothing imports an integration.
    names = ("vllm", "vllm.refusals", "vllm.block_sizes")
    integration, refusals, block_sizes = (import_module(f"orthrus.integrations.{name}") for name in names)
    refusals.check_options(is_drafting=True, **checked_options(arguments))
    wanted = block_sizes.read_block_sizes(block_size)
    checkpoint = read_checkpoint(model, revision=revision)
    base_revision = None
    if checkpoint.form == "view" and base is None and (named := checkpoint.base_name()) is not None:
        base = os.path.normpath(checkpoint.folder / named.id) if named.id.startswith(("./", "../")) else named.id
        base_revision = named.revision
    refusals.check_files(model, base or model, revision=revision, target_revision=base_revision if base else revision)
    trained = checkpoint.config["block_size"]
    is_table = not isinstance(wanted, int)
    if is_table and is_data_parallel(arguments):
        note = "vLLM varies no block sizes with data parallelism"
        if block_size != "auto":
            raise ValueError(f"--block-size {block_size}: {note}, and would draft the widest always; give one size")
        wanted = min(block_sizes.ANY_BATCH, trained)
        print(f"--block-size {wanted}, not auto: {note}", file=sys.stderr, flush=True)
    elif block_size == "auto":
        wanted = block_sizes.at_most(wanted, trained)
    if (widest := wanted if isinstance(wanted, int) else max(wanted.values())) > trained:
        raise ValueError(f"--block-size {widest}: the view was trained with blocks of {trained}, so at most that")
    return integration.serve_command(
        model, *arguments, base=base, revision=revision, base_revision=base_revision, block_size=wanted,
        draft_sample_method=draft_sample_method,
    )  # fmt: skip


def find_program(name: str) -> str:
    """The program's path, from this environment before others; `ValueError` where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ValueError(f"{name} is not installed here: pip install 'orthrus-llm[vllm]'")
    return found
