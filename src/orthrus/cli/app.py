"""The `orthrus` command: one file a command, each of which parses, calls the library and prints.

Nothing here or at the head of a command's file imports torch or transformers, so `--help` answers at once.
Exit codes: 0 done, 1 failed, 2 bad arguments.
"""

from collections.abc import Callable

import typer

from orthrus import __version__
from orthrus.cli.bench import decode
from orthrus.cli.chat import chat
from orthrus.cli.convert import convert
from orthrus.cli.datagen import datagen
from orthrus.cli.env import env
from orthrus.cli.errors import reported
from orthrus.cli.export import export
from orthrus.cli.generate import generate
from orthrus.cli.serve import SETTINGS, serve
from orthrus.cli.train import train

app = typer.Typer(
    name="orthrus",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def orthrus(
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Print the version."),
) -> None:
    """Lossless parallel decoding: a frozen LLM drafts a block of tokens and verifies it, writing the same text."""


COMMANDS: tuple[Callable[..., None], ...] = (generate, chat, convert, datagen, train, export, env)
for command in COMMANDS:
    app.command()(reported(command))

app.command(context_settings=SETTINGS)(reported(serve))

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


@bench.callback(help="Measure a model on this machine.")
def measurements() -> None:
    """Without a callback Typer would make the one command the group itself."""


bench.command()(reported(decode))


def main() -> None:
    """The entry point; Typer itself ends quietly when the reader of stdout goes away (`orthrus ... | head`)."""
    app()
