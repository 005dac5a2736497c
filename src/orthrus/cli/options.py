"""The options that more than one command takes, and the check that an option which does nothing is refused."""

from typing import Annotated, Any, Literal

import typer

Model = Annotated[
    str | None, typer.Option("--model", "-m", metavar="ID|FOLDER", help="Checkpoint; the bundled model by default.")
]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub checkpoint.")]
Base = Annotated[
    str | None, typer.Option(metavar="ID|FOLDER", help="Where a view file's base lies, if not where the file says.")
]
DTYPES = ("auto", "float32", "bfloat16", "float16")
Dtype = Annotated[str, typer.Option(metavar="|".join(DTYPES), help="Number format; auto is the checkpoint's own.")]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="cuda, cuda:1, cpu ...; CUDA where there is one.")]
Attention = Annotated[
    str, typer.Option("--attn", metavar="NAME", help="eager, sdpa, flash_attention_2, or a kernel's Hub name.")
]
Exact = Annotated[
    bool | None,
    typer.Option("--exact/--no-exact", help="Give every pass one fixed shape, so bf16 text equals plain decoding's."),
]
BACKENDS = ("auto", "engine", "portable")
Backend = Annotated[
    str,
    typer.Option(
        metavar="|".join(BACKENDS),
        help="Who runs the passes; auto is the engine on a GPU where it can, else the portable one.",
    ),
]
DRAFT_PRECISIONS = ("fp8",)
DraftPrecision = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(DRAFT_PRECISIONS),
        help="Drafts read a second copy of the weights in this format; the text is the same. Engine only.",
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="Positions per cycle, anchor included; the trained number by default, on a CPU at most 8."
    ),
]
AutoBlockSize = Annotated[
    str | None,
    typer.Option(
        "--block-size", metavar="K|auto",
        help="Positions per cycle, anchor included. auto: from one up, as each cycle's time and text make worth it; "
        "the default of the engine on a GPU, but for sampling without a seed. Elsewhere that is the trained number, "
        "on a CPU at most 8.",
    ),
]  # fmt: skip
NoDiffusion = Annotated[bool, typer.Option("--no-diffusion", help="Plain decoding: one token at a time.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(metavar="N", help="Keep the N likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(metavar="P", help="Keep the likeliest tokens up to probability P.")]
MinP = Annotated[float | None, typer.Option(metavar="P", help="Drop tokens below P times the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text, with and without drafting.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop at this text; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a folder that is not empty.")]


def refuse(option: str, reason: str, *, when: bool) -> None:
    """Raise the error of an option that would be accepted and ignored."""
    if when:
        raise ValueError(f"{option} {reason}")


def block_size_of(text: str | None) -> int | Literal["auto"] | None:
    """The value of `AutoBlockSize`."""
    return None if text is None else number_or_auto(text)


def number_or_auto(text: str) -> int | Literal["auto"]:
    """A block size as the command line names it."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise ValueError(f"--block-size {text}: give a number of positions, or auto")
    return int(text)


def sampling_fields(
    *, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, seed: int | None
) -> dict[str, Any]:
    """The fields of a `Sampling`, refusing filters that greedy decoding would ignore."""
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in filters.items() if value is not None}
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        refuse(flag, "has no effect on greedy decoding; add --temperature", when=temperature == 0)
    return {"temperature": temperature, "seed": seed, **given}


def check_dtype(dtype: str) -> None:
    """Refuse a number format that no command computes in."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")


def check_backend(backend: str, attn: str) -> None:
    """Refuse a backend that there is not, and an attention that it would not run."""
    if backend not in BACKENDS:
        raise ValueError(f"--backend {backend}: choose one of {', '.join(BACKENDS)}")
    refuse(
        f"--attn {attn}",
        "has no effect with --backend engine, which has an attention of its own",
        when=backend == "engine" and attn != "sdpa",
    )


def check_draft_precision(precision: str | None, backend: str, *, drafting: bool = True) -> None:
    """Refuse a format that there is not, and one that nothing would read."""
    if precision is None:
        return
    if precision not in DRAFT_PRECISIONS:
        raise ValueError(f"--draft-precision {precision}: choose {' or '.join(DRAFT_PRECISIONS)}")
    option = f"--draft-precision {precision}"
    refuse(option, "has no effect with --no-diffusion", when=not drafting)
    refuse(option, "has no effect with --backend portable: it is for the engine alone", when=backend == "portable")


def check_text(text: str) -> None:
    """Refuse text that was no UTF-8: Python reads such bytes as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid UTF-8; save it in that encoding") from None
