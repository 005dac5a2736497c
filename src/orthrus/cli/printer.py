"""How an answer appears in the terminal: as plain streamed text, or coloured by who wrote each token."""

import sys
from typing import Any, Protocol

from orthrus.decoding.decoder import Record
from orthrus.serving.detokenize import Detokenizer

DRAFTED, OWN, EDGE = "green", "bold yellow", "dim"


class Printer(Protocol):
    """Something that shows records as they are committed."""

    def show(self, record: Record) -> None:
        """Show one record."""
        ...

    def close(self) -> None:
        """Show what was held back, and end the line."""
        ...


class TextPrinter:
    """Streams the answer's text to stdout and nothing else."""

    def __init__(self, tokenizer: Any):
        self._detokenizer = Detokenizer(tokenizer)

    def show(self, record: Record) -> None:
        """Print the text that a record makes certain."""
        self._write(self._detokenizer.push(record.token_ids))

    def close(self) -> None:
        """Print the rest and a line end."""
        self._write(self._detokenizer.flush() + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class TracePrinter:
    """Streams the answer's text with every cycle visible: accepted drafts, the verifier's own token, the edge.

    Without colours (no terminal, or NO_COLOR) a cycle is `[accepted drafts|own token]`.
    """

    def __init__(self, tokenizer: Any):
        from rich.console import Console

        self._detokenizer = Detokenizer(tokenizer)
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._coloured = self._console.color_system is not None and not self._console.no_color
        self._own_label = "the verifier's own token"
        if self._coloured:
            self._print("accepted drafts", DRAFTED)
            self._print(f"  {self._own_label}", OWN)
            self._print("  | end of a cycle\n\n", EDGE)
        else:
            self._print(f"[accepted drafts|{self._own_label}], a bracket a cycle\n\n")

    def show(self, record: Record) -> None:
        """Print one cycle: its accepted drafts, then the token that the verifier added."""
        drafted = self._detokenizer.push(record.token_ids[: record.num_accepted])
        own = self._detokenizer.push(record.token_ids[record.num_accepted :])
        if self._coloured:
            self._print(drafted, DRAFTED)
            self._print(own, OWN)
            self._print("|", EDGE)
        else:
            self._print(f"[{drafted}|{own}]")

    def close(self) -> None:
        """Print the rest and a line end."""
        self._print(self._detokenizer.flush() + "\n")

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, end="")
        sys.stdout.flush()
