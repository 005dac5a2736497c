"""`orthrus train`: run the stages of a recipe."""

import json
from pathlib import Path
from typing import Annotated

import typer


def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the recipe's own")] = None,
    config: Annotated[Path, typer.Option(help="the YAML recipe")] = ...,  # type: ignore[assignment]
    corpus: Annotated[Path, typer.Option(help="folder of the tokenised corpus")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="folder of the run; later stages read what earlier ones wrote")] = ...,  # type: ignore[assignment]
    stages: Annotated[str, typer.Option(help="which stages, in order")] = "base,unlikelihood,sharpen,rollouts,view",
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu")] = None,
) -> None:
    """Train the bundled model's base and view from one recipe; under torchrun, on one GPU a process."""
    import torch

    from orthrus.training.ranks import join_ranks, leave_ranks, rank
    from orthrus.training.recipe import load_recipe
    from orthrus.training.stages import STAGES

    recipe = load_recipe(config, overrides)
    names = stages.split(",")
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
