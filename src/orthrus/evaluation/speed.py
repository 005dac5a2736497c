"""How fast drafting is, against this engine with drafting off, on real prompts; `python -m orthrus.evaluation.speed`.

In exact mode (the default in bf16 and fp16) plain decoding runs passes of block_size rows, so there are two baselines:
`ar`, the same computation with drafting off, and `ar_one_row`, plain decoding free of that price. Both are reported.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from orthrus.environment import bundled_or, pick_device
from orthrus.evaluation.measurement import dtype_name, measure
from orthrus.evaluation.records import ResultRecord, check_writable, here_and_now, model_name, to_json, write_records
from orthrus.evaluation.suites import Prompt, read_prompts
from orthrus.evaluation.summary import records_of, summarise
from orthrus.evaluation.tables import print_summaries
from orthrus.model.checkpoint import load_model, load_tokenizer
from orthrus.model.packed import is_packed


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to measure."""

    model: str | None = None
    """Folder or Hub id; the bundled model for None."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    block_sizes: tuple[int, ...] | None = None
    prompts: Path | None = None
    """A JSON Lines file; held-out Python for None."""
    field: str = "prompt"
    """The field of that file that holds the prompt."""
    num_prompts: int | None = None
    """The first so many; 64 held-out prompts, or all lines of the file, for None."""
    max_new_tokens: int = 200
    exact: bool | None = None
    """As `PortableBackend` takes it: None is on in bf16 and fp16."""
    device: str | None = None
    attn: str = "sdpa"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 2:
            raise ValueError(f"max_new_tokens must be at least 2 (prefill gives the first), got {self.max_new_tokens}")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {self.num_prompts}")
        if not self.dtypes:
            raise ValueError("dtypes: name at least one")

    @property
    def source(self) -> str:
        """Where the model is loaded from."""
        return bundled_or(self.model)

    @property
    def model_name(self) -> str:
        """The name that records carry: a folder's own, a Hub id in full."""
        return model_name(self.source)

    def read_prompts(self) -> list[Prompt]:
        """The prompts, in order."""
        return read_prompts(self.prompts, field=self.field, num_prompts=self.num_prompts, num_heldout=64)


def facts(model: Any, settings: Settings, *, num_prompts: int) -> dict[str, Any]:
    """What every number of one dtype depends on."""
    return {
        "model": settings.model_name,
        "backend": "portable",
        "batch": 1,
        "dtype": dtype_name(model),
        "suite": "heldout_python" if settings.prompts is None else settings.prompts.stem,
        "num_prompts": num_prompts,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": 0.0,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "attn_implementation": settings.attn,
        "packed": is_packed(model),
    }


def bench(settings: Settings) -> list[ResultRecord]:
    """Measure, print a table for each dtype, and return the records."""
    prompts, records = settings.read_prompts(), []
    device = pick_device(settings.device)
    tokenizer = load_tokenizer(settings.source)
    origin = here_and_now(device)
    for dtype in settings.dtypes:
        model = load_model(settings.source, dtype=dtype, device=device, attn_implementation=settings.attn)
        found = measure(
            model,
            tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            block_sizes=settings.block_sizes,
            exact=settings.exact,
        )
        params = facts(model, settings, num_prompts=len(prompts))
        summaries = summarise(found)
        print_summaries(summaries, found, heading=heading(params, hardware=origin.hardware))
        records += [record for summary in summaries for record in records_of(summary, params, origin, prompts)]
    return records


def heading(params: dict[str, Any], *, hardware: str) -> str:
    """One line that says what a table was measured on."""
    return (
        f"{params['model']}, {params['dtype']}, {params['num_prompts']} prompts ({params['suite']}), greedy, up to "
        f"{params['max_new_tokens']} tokens, {params['threads']} threads, {hardware}"
    )


def main(
    model: Annotated[str | None, typer.Option(metavar="ID|FOLDER", help="The bundled model by default.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated; float32 and bfloat16 by default.")] = None,
    block_size: Annotated[
        list[int] | None, typer.Option(metavar="K", help="May be repeated; 4, 8, 16, 32 as far as trained by default.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="One JSON object a line; held-out Python by default.")
    ] = None,
    field: Annotated[str, typer.Option(help="The field of the file that holds the prompt.")] = "prompt",
    num_prompts: Annotated[int | None, typer.Option(metavar="N", help="The first N; 64, or the whole file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to write, at most.")] = 200,
    exact: Annotated[bool | None, typer.Option("--exact/--no-exact", help="On in bf16 and fp16 by default.")] = None,
    device: Annotated[str | None, typer.Option(help="CUDA where there is one.")] = None,
    attn: Annotated[str, typer.Option(metavar="NAME", help="eager, sdpa, flash_attention_2, ...")] = "sdpa",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER|FILE.json", help="Write the records, e.g. to benchmarks/results.")
    ] = None,
) -> None:
    """Measure decoding with and without drafting; the last line is the JSON list of records."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        settings = Settings(
            model=model, dtypes=tuple(dtype or Settings().dtypes), block_sizes=tuple(block_size or ()) or None,
            prompts=prompts, field=field, num_prompts=num_prompts, max_new_tokens=max_new_tokens, exact=exact,
            device=device, attn=attn,
        )  # fmt: skip
        if out is not None:
            check_writable(out)
        records = bench(settings)
        if out is not None:
            path = write_records(records, out, theme=f"speed-{settings.model_name}")
            print(f"written to {path}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(to_json(records), flush=True)


if __name__ == "__main__":
    typer.run(main)
