"""`orthrus datagen`: have the base model write the answers that its view is trained on."""

import importlib.util
import json
import logging
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orthrus.cli import options
from orthrus.cli.options import check_dtype, refuse, sampling_fields
from orthrus.environment import bundled_or, commit, pick_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from orthrus.datagen.answers import AnswerSettings, Encoder, Writer
    from orthrus.datagen.prompts import Prompt, PromptSet, PromptSource
    from orthrus.decoding.decoder import Decoder

API_KEY = "OPENAI_API_KEY"


def datagen(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="A .parquet or .jsonl file, a folder, a pattern, or a Hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; a run over it is continued.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="ID|FOLDER|NAME", help="Checkpoint; with --endpoint the server's name."),
    ] = None,
    revision: options.Revision = None,
    base: options.Base = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="An OpenAI-compatible server; its key is in OPENAI_API_KEY.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="ID|FOLDER", help="With --endpoint: makes the prompts' token ids here.")
    ] = None,
    api: Annotated[
        Literal["chat", "completions"] | None,
        typer.Option(help="With --endpoint: completions where there is a --tokenizer, else chat."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="With --endpoint: requests in flight (64).")
    ] = None,
    max_retries: Annotated[
        int | None, typer.Option(metavar="N", help="With --endpoint: further tries of a failed request (8).")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", help="With --endpoint: longest wait for one answer (600).")
    ] = None,
    prompts_revision: Annotated[str | None, typer.Option(metavar="REV", help="Commit of a Hub data set.")] = None,
    prompts_config: Annotated[str | None, typer.Option(metavar="NAME", help="Configuration of a Hub data set.")] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Split of a Hub data set (train).")] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message for conversations that have none.")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(metavar="N", help="A random sample of so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of one answer.")] = 2048,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling; each prompt's is made from it and its id (0).")] = None,
    enable_thinking: Annotated[
        bool, typer.Option("--enable-thinking/--no-enable-thinking", help="Passed to the chat template.")
    ] = False,
    shard_size: Annotated[int, typer.Option(metavar="N", help="Answers in one Parquet file.")] = 1000,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Without --endpoint: rows decoded together (16).")
    ] = None,
    no_diffusion: options.NoDiffusion = False,
    block_size: options.BlockSize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    attn: options.Attention = "sdpa",
    exact: options.Exact = None,
    as_json: options.Json = False,
) -> None:
    """Have a model answer prompts, with a server or in this process; stop and start it as you like."""
    given = {
        "--tokenizer": tokenizer, "--api": api, "--concurrency": concurrency, "--max-retries": max_retries,
        "--timeout": timeout,
    }  # fmt: skip
    own = {
        "--base": base, "--batch-size": batch_size, "--no-diffusion": no_diffusion or None, "--block-size": block_size,
        "--dtype": None if dtype == "auto" else dtype, "--device": device, "--attn": None if attn == "sdpa" else attn,
        "--exact/--no-exact": exact,
    }  # fmt: skip
    for option, value in (own if endpoint else given).items():
        refuse(option, f"has no effect {'with' if endpoint else 'without'} --endpoint", when=value is not None)
    refuse("--block-size", "has no effect with --no-diffusion", when=no_diffusion and block_size is not None)
    refuse("--endpoint", "needs --model NAME: what the server calls it", when=bool(endpoint) and not model)
    refuse("--revision", "with --endpoint is the --tokenizer's; name one",
           when=bool(endpoint and revision and not tokenizer))  # fmt: skip
    refuse("--seed", "has no effect on greedy decoding; add --temperature", when=temperature == 0 and seed is not None)
    sampling_fields(temperature=temperature, top_k=None, top_p=top_p, min_p=None, seed=seed)
    check_dtype(dtype)
    check_packages("datasets", "pyarrow", *(["httpx2"] if endpoint else []))

    import datasets

    from orthrus.datagen.answers import AnswerSettings
    from orthrus.datagen.prompts import PromptSource, read_prompts

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs is raised too, and said in one line

    answers = AnswerSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=1.0 if top_p is None else top_p,
        seed=seed or 0, enable_thinking=enable_thinking,
    )  # fmt: skip
    source = PromptSource(
        source=prompts, revision=prompts_revision, config=prompts_config, split=split, system=system,
        max_prompts=max_prompts,
    )  # fmt: skip
    found = read_prompts(source)
    refuse("--enable-thinking", "has no effect on plain text", when=enable_thinking and found.field == "text")
    if endpoint:
        way = server(
            answers, found, url=endpoint, model=str(model), revision=revision, tokenizer=tokenizer, route=api,
            concurrency=concurrency, max_retries=max_retries, timeout_s=timeout,
        )  # fmt: skip
    else:
        way = this_process(
            answers, model=model, revision=revision, base=base, batch_size=batch_size, drafting=not no_diffusion,
            block_size=block_size, dtype=dtype, device=device, attn=attn, exact=exact,
        )  # fmt: skip
    run(way, source, found, answers, out=out, shard_size=shard_size, as_json=as_json)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """Who answers: the settings that a later run must repeat, what else is known, and how to begin."""

    settings: dict[str, Any]
    facts: dict[str, Any]
    start: "Callable[[Prompt], Writer]"
    """Given any of the prompts, to refuse at once what fits none."""


def check_packages(*names: str) -> None:
    """Refuse to begin without the packages that this command alone needs."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"`orthrus datagen` needs the package {name}: pip install 'orthrus-llm[datagen]'")


def server(
    answers: "AnswerSettings",
    found: "PromptSet",
    *,
    url: str,
    tokenizer: str | None,
    revision: str | None,
    route: Literal["chat", "completions"] | None,
    model: str,
    **given: Any,
) -> Way:
    """Answers from an OpenAI-compatible server."""
    from orthrus.datagen.endpoint import Endpoint, EndpointSettings

    route = route or ("completions" if tokenizer else "chat")
    refuse("--api completions", "needs --tokenizer, which makes the prompts' token ids",
           when=route == "completions" and not tokenizer)  # fmt: skip
    refuse("plain text", "is no chat: add --tokenizer, and leave --api chat out",
           when=route == "chat" and found.field == "text")  # fmt: skip
    set_ = {name: value for name, value in given.items() if value is not None}
    settings = EndpointSettings(url=url, model=model, route=route, **set_)

    def start(prompt: "Prompt") -> "Writer":
        encoder = None
        if tokenizer:
            encoder = open_encoder(tokenizer, answers, revision=revision)
            encoder.check(prompt)
        return Endpoint(settings, answers, encoder=encoder, api_key=os.environ.get(API_KEY))

    repeated = {"written_by": route, "model": model, "revision": revision, "tokenizer": tokenizer}
    return Way(settings=repeated, facts={"endpoint": url}, start=start)


def this_process(
    answers: "AnswerSettings",
    *,
    model: str | None,
    revision: str | None,
    base: str | None,
    batch_size: int | None,
    drafting: bool,
    block_size: int | None,
    dtype: str,
    device: str | None,
    attn: str,
    exact: bool | None,
) -> Way:
    """Answers from this project's own decoder."""
    from orthrus.cli.session import quiet
    from orthrus.datagen.local import LocalWriter
    from orthrus.decoding.stopping import eos_token_ids
    from orthrus.model.checkpoint import read_checkpoint
    from orthrus.model.tensors import fingerprint

    quiet()
    where = bundled_or(model)
    checkpoint = read_checkpoint(where, revision=revision)
    has_view = checkpoint.form != "base"
    refuse("--block-size", f"has no effect: {where} has no view", when=block_size is not None and not has_view)
    drafting = drafting and has_view

    def start(prompt: "Prompt") -> "Writer":
        encoder = open_encoder(where, answers, revision=revision, base=base)
        encoder.check(prompt)
        decoder, loaded = open_decoder(
            where, has_view=has_view, block_size=block_size, exact=exact, revision=revision, base=base, dtype=dtype,
            device=device, attn=attn,
        )  # fmt: skip
        return LocalWriter(
            decoder, encoder, answers,
            max_positions=loaded.config.max_position_embeddings,
            vocab_size=loaded.config.vocab_size,
            eos_token_ids=eos_token_ids(loaded, encoder.tokenizer),
            batch_size=16 if batch_size is None else batch_size,
            drafting=drafting,
        )  # fmt: skip

    named = checkpoint.base_name() if checkpoint.form == "view" else None
    repeated = {
        "written_by": "decoder",
        "model": model or "the bundled model",
        "revision": checkpoint.revision,
        "base_fingerprint": named.fingerprint if named else fingerprint(checkpoint.folder),
        "dtype": dtype,
        "exact": exact,
    }
    return Way(settings=repeated, facts={"drafting": drafting}, start=start)


def open_encoder(source: str, answers: "AnswerSettings", **where: Any) -> "Encoder":
    """The tokenizer of a checkpoint, ready for prompts and answers."""
    from orthrus.datagen.answers import Encoder
    from orthrus.model.checkpoint import load_tokenizer

    return Encoder(load_tokenizer(source, **where), name=source, enable_thinking=answers.enable_thinking)


def open_decoder(
    where: str,
    *,
    has_view: bool,
    block_size: int | None,
    exact: bool | None,
    device: str | None,
    attn: str,
    **options_: Any,
) -> "tuple[Decoder, Any]":
    """The step loop over a checkpoint, and the model; a base without a view gets one that is never used."""
    from orthrus.cli.session import CPU_BLOCK_SIZE
    from orthrus.decoding.decoder import Decoder
    from orthrus.decoding.portable import PortableBackend
    from orthrus.model.checkpoint import load_model

    unused_view: dict[str, Any] = {} if has_view else {"start_view": True, "block_size": 2, "mask_token_id": 0}
    loaded = load_model(where, device=pick_device(device), attn_implementation=attn, **options_, **unused_view)
    backend = PortableBackend(loaded, exact=exact)
    if block_size is None and backend.device.type == "cpu":
        block_size = min(CPU_BLOCK_SIZE, backend.max_block_size)
    return Decoder(backend, block_size=block_size), loaded


def run(
    way: Way,
    source: "PromptSource",
    found: "PromptSet",
    answers: "AnswerSettings",
    *,
    out: Path,
    shard_size: int,
    as_json: bool,
) -> None:
    """Answer what is open in the folder and say what came of it."""
    from orthrus.datagen.folder import AnswerFolder
    from orthrus.datagen.generation import generate_answers

    settings = {
        **way.settings,
        **asdict(answers),
        "system": source.system,
        "max_prompts": source.max_prompts,
        "shard_size": shard_size,
        "num_prompts": len(found.prompts),
        "prompt_ids_sha256": found.digest,
    }
    facts = {
        "source": {**asdict(source), "commit": found.commit, "field": found.field},
        "rows": {"read": found.num_rows, "duplicates": found.num_duplicates, "dropped": found.dropped},
        **way.facts,
        "commit": commit(),
    }
    report_rows(found)
    with AnswerFolder(out, found.prompts, shard_size=shard_size, settings=settings, facts=facts) as folder:
        summary = generate_answers(folder, lambda: way.start(found.prompts[0]), is_terminal=sys.stderr.isatty())
    if as_json:
        print(json.dumps({"folder": str(out), **summary.as_dict()}, allow_nan=False), flush=True)
    else:
        print(f"{out}: {summary.line()}")
    if summary.failed:
        print(f"{summary.failed} prompts failed; {out}/failed.jsonl says why", file=sys.stderr)
        raise typer.Exit(1)


def report_rows(found: "PromptSet") -> None:
    """Say which rows gave no prompt of their own, where there are any."""
    without = {"duplicates": found.num_duplicates, **found.dropped}
    if lines := [f"{count} x {reason}" for reason, count in without.items() if count]:
        print(f"{found.num_rows} rows, {len(found.prompts)} prompts; left out: {', '.join(lines)}", file=sys.stderr)
