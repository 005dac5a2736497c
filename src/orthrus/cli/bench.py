"""`orthrus bench decode`: what decoding a model costs on this machine, with and without drafting."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthrus.cli import options
from orthrus.cli.options import check_backend, check_draft_precision, check_dtype

if TYPE_CHECKING:
    from orthrus.evaluation.batches import BatchMeasurement
    from orthrus.evaluation.records import ResultRecord

NUM_PROMPTS = 8
"""Held-out prompts unless told otherwise; as many as the largest batch has rows where that is more."""


def decode(
    model: options.Model = None,
    revision: options.Revision = None,
    base: options.Base = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", metavar="B", help="Rows decoded together; may be repeated; 1.")
    ] = None,
    block_size: Annotated[
        list[str] | None,
        typer.Option(metavar="K|auto", help="May be repeated; the trained number by default, on a CPU at most 8."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="One JSON object a line; held-out Python by default.")
    ] = None,
    field: Annotated[str, typer.Option(metavar="NAME", help="The field of the file that holds the prompt.")] = "prompt",
    num_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="The first N; 8 held-out ones, or the whole file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to write for a prompt, at most.")] = 128,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    attn: options.Attention = "sdpa",
    exact: options.Exact = None,
    backend: options.Backend = "auto",
    draft_precision: options.DraftPrecision = None,
    as_json: options.Json = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER|FILE.json", help="Write the records, e.g. to benchmarks/results.")
    ] = None,
) -> None:
    """Time prefill, plain steps and cycles of real prompts, and compare both ways on one backend."""
    check_dtype(dtype)
    check_backend(backend, attn)
    check_draft_precision(draft_precision, backend)
    batches, block_sizes = batch or [1], [options.number_or_auto(text) for text in block_size or ()]

    from orthrus.cli.session import quiet
    from orthrus.decoding.schedule import CPU_BLOCK_SIZE
    from orthrus.environment import bundled_or, pick_device
    from orthrus.evaluation.batches import check_numbers, measure_batches
    from orthrus.evaluation.records import check_writable, model_name, to_json, write_records
    from orthrus.evaluation.suites import read_prompts
    from orthrus.model.checkpoint import load_model, load_tokenizer

    source, where = bundled_or(model), pick_device(device)
    texts = read_prompts(prompts, field=field, num_prompts=num_prompts, num_heldout=max(NUM_PROMPTS, *batches))
    check_numbers(batches, num_prompts=len(texts), max_new_tokens=max_new_tokens)
    if out is not None:
        check_writable(out)
    quiet()
    loaded = load_model(source, revision=revision, base=base, dtype=dtype, device=where, attn_implementation=attn)
    trained = loaded.config.block_size
    found = measure_batches(
        loaded,
        load_tokenizer(source, revision=revision, base=base),
        texts,
        batches=batches,
        block_sizes=block_sizes or [min(CPU_BLOCK_SIZE, trained) if where.type == "cpu" else trained],
        max_new_tokens=max_new_tokens,
        backend=backend,
        exact=exact,
        draft_precision=draft_precision,
    )
    suite = "heldout_python" if prompts is None else prompts.stem
    facts = {"model": model_name(source), "suite": suite, "max_new_tokens": max_new_tokens, "temperature": 0.0}
    records = report(loaded, found, facts)
    if out is not None:
        path = write_records(records, out, theme=f"decode-{facts['model']}-{found[0].backend}")
        print(f"written to {path}")
    if as_json:
        print(to_json(records), flush=True)


def report(model: Any, found: "Sequence[BatchMeasurement]", facts: dict[str, Any]) -> "list[ResultRecord]":
    """Print the table of all batches; their records."""
    from orthrus.cli.session import note_backend
    from orthrus.evaluation.batches import COLUMNS, NOTES, batch_facts, batch_records, batch_row, summarise_batch
    from orthrus.evaluation.records import here_and_now
    from orthrus.evaluation.tables import print_table

    note_backend(found[0])
    origin, records, rows = here_and_now(model.device), [], []
    for one in found:
        params = facts | batch_facts(model, one) | {"num_prompts": one.num_prompts}
        for summary in summarise_batch(one):
            records += batch_records(summary, params, origin)
            rows.append(batch_row(summary))
    dtype = str(model.dtype).removeprefix("torch.")
    drafts = "" if found[0].draft_precision is None else f", drafts in {found[0].draft_precision}"
    num_prompts = max(one.num_prompts for one in found)  # groups of any size are cut from the first prompt on
    print(
        f"{facts['model']}, {dtype}, {found[0].backend} backend{drafts}, {num_prompts} prompts ({facts['suite']}), "
        f"greedy, up to {facts['max_new_tokens']} tokens, {origin.hardware}\n"
    )
    print_table(COLUMNS, rows)
    print(f"\n{NOTES}")
    return records
