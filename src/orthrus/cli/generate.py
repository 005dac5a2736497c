"""`orthrus generate`: continue a text."""

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthrus.cli import options
from orthrus.cli.options import check_draft_precision, check_text, refuse, sampling_fields

if TYPE_CHECKING:
    from orthrus.cli.session import Session
    from orthrus.decoding.timing import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """How the answer is shown."""

    as_json: bool
    trace: bool
    compare: bool


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Read from stdin when absent or '-'.")
    ] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    base: options.Base = None,
    no_diffusion: options.NoDiffusion = False,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens to write; fewer where the context ends.")
    ] = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    block_size: options.AutoBlockSize = None,
    stop: options.Stop = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    attn: options.Attention = "sdpa",
    exact: options.Exact = None,
    backend: options.Backend = "auto",
    draft_precision: options.DraftPrecision = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    as_json: options.Json = False,
    trace: Annotated[bool, typer.Option("--trace", help="Colour what each cycle drafted and what it added.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode with and without drafting; print both speeds and any difference.")
    ] = False,
) -> None:
    """Continue a text, printing it as its tokens are committed."""
    refuse("--block-size", "has no effect with --no-diffusion", when=no_diffusion and block_size is not None)
    refuse("--compare", "runs both ways; drop --no-diffusion", when=compare and no_diffusion)
    refuse("--trace", "prints text and --json prints none; drop one", when=trace and as_json)
    refuse(
        "--compare",
        "needs a --seed when sampling: without one, two runs differ however they are decoded",
        when=compare and temperature != 0 and seed is None,
    )
    check_draft_precision(draft_precision, backend, drafting=not no_diffusion)
    sampling = sampling_fields(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    text = read_prompt(prompt)

    from orthrus.cli.session import open_session
    from orthrus.decoding.decoder import check_prompt
    from orthrus.decoding.sampling import Sampling

    checked = Sampling(**sampling)
    session = open_session(
        model=model, revision=revision, base=base, dtype=dtype, device=device, attn=attn, exact=exact,
        backend=backend, block_size=options.block_size_of(block_size), draft_precision=draft_precision,
    )  # fmt: skip
    prompt_ids = session.encode_chat([{"role": "user", "content": text}]) if chat else session.encode(text)
    check_prompt(len(prompt_ids), session.model.config.max_position_embeddings)
    stopping = session.stopping(prompt_ids, max_new_tokens=max_new_tokens, stop=stop or ())
    request = {"prompt_ids": prompt_ids, "stopping": stopping, "sampling": checked}
    drafting = not no_diffusion
    session.begin(num_tokens=len(prompt_ids) + stopping.max_new_tokens, sampling=checked, drafting=drafting)
    output = Output(as_json=as_json, trace=trace, compare=compare)
    if output.compare:
        run_compare(session, request, text, output)
    else:
        run_once(session, request, output, drafting=drafting)


def read_prompt(prompt: str | None) -> str:
    """The prompt as given, or all of stdin for none or "-"."""
    is_piped = prompt is None or prompt == "-"
    refuse("the prompt", "is missing: stdin is closed", when=is_piped and sys.stdin is None)
    text = sys.stdin.read() if is_piped else prompt
    check_text(text)
    refuse("the prompt", "is empty; give some text to continue", when=not text)
    return text


def run_once(session: "Session", request: dict[str, Any], output: Output, *, drafting: bool) -> None:
    """Decode once; the text goes to stdout, a line about its cost to stderr."""
    from orthrus.cli.printer import TextPrinter, TracePrinter
    from orthrus.decoding.decoder import Request
    from orthrus.decoding.timing import timed_run

    checked = Request(**request, drafting=drafting)
    if output.as_json:
        answer = timed_run(session.decoder, checked)
        print(json.dumps(document(session, checked, answer), allow_nan=False), flush=True)
        return
    printer = (TracePrinter if output.trace else TextPrinter)(session.tokenizer)
    answer = timed_run(session.decoder, checked, show=printer.show)
    printer.close()
    print(summary(answer), file=sys.stderr)


def run_compare(session: "Session", request: dict[str, Any], text: str, output: Output) -> None:
    """Decode both ways; the texts first, then the table of both."""
    from orthrus.cli.compare import compare, print_comparison

    comparison = compare(session, request, prompt=text, visible=not output.as_json, trace=output.trace)
    if output.as_json:
        facts = session.facts() | comparison.as_dict()
        print(json.dumps(facts, allow_nan=False), flush=True)
    else:
        print_comparison(comparison)


def document(session: "Session", request: Any, answer: "Run") -> dict[str, Any]:
    """The JSON document of one answer."""
    return {
        "text": session.decode(answer.token_ids),
        "num_prompt_tokens": len(request.prompt_ids),
        **answer.as_dict(),
        "mode": "diffusion" if request.drafting else "ar",
        "seed": request.sampling.seed,
        **session.facts(),
    }


def summary(answer: "Run") -> str:
    """One line about what an answer cost."""
    stats = answer.stats
    line = f"{len(answer.token_ids)} tokens ({answer.finish_reason}), {answer.tokens_per_second:.1f} tokens/s"
    if stats.num_drafted:
        line += f", {stats.tokens_per_cycle:.2f} tokens per cycle, {stats.tokens_per_forward:.2f} per forward pass"
    return line
