"""`orthrus train`: run a recipe, a view's for any base or the bundled model's stages."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

STAGES = "base,unlikelihood,sharpen,counting,rollouts,view"


def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the recipe's own")] = None,
    config: Annotated[Path, typer.Option(help="the YAML recipe")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="folder of the run")] = ...,  # type: ignore[assignment]
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in OUT")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print memory and arithmetic, write the untrained view, train nothing")
    ] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="with --dry-run: of a run of so many processes")] = None,
    inspect: Annotated[int | None, typer.Option(help="print training row N with its mask, train nothing")] = None,
    corpus: Annotated[Path | None, typer.Option(help="bundled model: folder of the tokenised corpus")] = None,
    stages: Annotated[str | None, typer.Option(help=f"bundled model: which stages, in order ({STAGES})")] = None,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu")] = None,
) -> None:
    """Train a view from one recipe; under torchrun, one process for each GPU. SIGTERM or Ctrl-C saves and stops."""
    from orthrus.training.recipe import Recipe
    from orthrus.training.view_recipe import load_any_recipe

    recipe = load_any_recipe(config, overrides)
    if isinstance(recipe, Recipe):
        given = {"--resume": resume, "--dry-run": dry_run, "--ranks": ranks, "--inspect": inspect is not None}
        refuse(given, f"{config} is the bundled model's kind of recipe, which has no such option")
        if corpus is None:
            raise ValueError(f"{config} is trained from a corpus: give --corpus")
        run_stages(recipe, corpus, out, names=(stages or STAGES).split(","), device=device)
        return
    refuse({"--corpus": corpus, "--stages": stages}, "only the bundled model's recipe has stages and a corpus")
    if dry_run + resume + (inspect is not None) > 1:
        raise ValueError("--dry-run, --inspect and --resume are three things to do: give one of them")
    refuse(
        {"--ranks": ranks and not dry_run}, "has no effect without --dry-run; torchrun starts the processes of a run"
    )
    run_view(recipe, out, device=device, resume=resume, dry=dry_run, ranks=ranks, inspect=inspect)


def refuse(given: dict[str, Any], why: str) -> None:
    """`ValueError` naming the first option that was given although it means nothing here."""
    if wrong := [name for name, value in given.items() if value]:
        raise ValueError(f"{wrong[0]}: {why}")


def run_view(
    recipe: Any, out: Path, *, device: str | None, resume: bool, dry: bool, ranks: int | None, inspect: int | None
) -> None:
    """A view's recipe: train it, or say what that would be."""
    from orthrus.environment import pick_device
    from orthrus.training.ranks import choose_gpu, join_ranks, leave_ranks, rank
    from orthrus.training.view_run import dry_run, show_row, train_view_recipe

    if (inspect is not None or dry) and os.environ.get("RANK", "0") != "0":
        return  # one process of torchrun's says it for all
    if device is None or device.startswith("cuda"):
        choose_gpu()
    where = pick_device(device)
    if inspect is not None:
        show_row(recipe, out, inspect)
        return
    if dry:
        print(json.dumps(dry_run(recipe, out, num_ranks=ranks)), flush=True)
        return
    where = join_ranks(where)
    try:
        result = train_view_recipe(recipe, out, device=where, resume=resume)
        if rank() == 0:
            print(json.dumps(result), flush=True)
    finally:
        leave_ranks()


def run_stages(recipe: Any, corpus: Path, out: Path, *, names: list[str], device: str | None) -> None:
    """The bundled model's recipe: its stages one after the other."""
    import torch

    from orthrus.training.ranks import join_ranks, leave_ranks, rank
    from orthrus.training.stages import STAGES

    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"--stages: unknown stage {unknown[0]!r}; known stages: {', '.join(STAGES)}")
    where = join_ranks(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            facts = STAGES[name](recipe, corpus, out, where)
            if rank() == 0:
                print(json.dumps({"stage": name, **facts}), flush=True)
    finally:
        leave_ranks()
