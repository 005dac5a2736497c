"""`orthrus chat`: a conversation whose history stays in the cache, so a turn prefills only its new tokens."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthrus.cli import options
from orthrus.cli.errors import one_line
from orthrus.cli.options import check_draft_precision, check_text, refuse, sampling_fields

if TYPE_CHECKING:
    from orthrus.cli.session import Session
    from orthrus.decoding.stats import DecodingStats
    from orthrus.decoding.timing import Show

COMMANDS = "/reset forgets the conversation, /stats shows what it cost, /quit leaves; Ctrl-C stops an answer"


def chat(
    model: options.Model = None,
    revision: options.Revision = None,
    base: options.Base = None,
    no_diffusion: options.NoDiffusion = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of one answer.")] = 1024,
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
) -> None:
    """Talk to a model that has a chat template."""
    refuse("--block-size", "has no effect with --no-diffusion", when=no_diffusion and block_size is not None)
    check_draft_precision(draft_precision, backend, drafting=not no_diffusion)
    sampling = sampling_fields(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)

    from orthrus.cli.session import open_session
    from orthrus.decoding.sampling import Sampling

    checked = Sampling(**sampling)
    session = open_session(
        model=model, revision=revision, base=base, dtype=dtype, device=device, attn=attn, exact=exact,
        backend=backend, block_size=options.block_size_of(block_size), draft_precision=draft_precision,
    )  # fmt: skip
    request = {"sampling": checked, "drafting": not no_diffusion}
    conversation = Conversation(session, request, system=system, max_new_tokens=max_new_tokens, stop=stop or ())
    conversation.check_template()
    context = session.model.config.max_position_embeddings
    session.begin(num_tokens=context, sampling=checked, drafting=not no_diffusion, is_elastic=True)
    print(f"({session.chosen.name} backend) {COMMANDS}", file=sys.stderr)
    for line in read_lines():
        if not obey(conversation, line):
            break


def read_lines() -> Iterator[str]:
    """The user's lines until the end of input; Ctrl-C at the prompt only clears the line."""
    try:
        import readline  # noqa: F401  (line editing and history for input())
    except ImportError:
        pass
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def obey(conversation: "Conversation", line: str) -> bool:
    """Carry out one line of the user's; False when it asks to leave."""
    if line == "/quit":
        return False
    if line == "/reset":
        conversation.reset()
    elif line == "/stats":
        print(conversation.report())
    elif line.startswith("/"):
        print(f"no such command; {COMMANDS}", file=sys.stderr)
    elif line:
        try:
            conversation.say(line)
        except ValueError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(forgotten: stopped in the middle of a pass)", file=sys.stderr)
    return True


class Conversation:
    """The messages so far and the cache row that holds them."""

    def __init__(
        self,
        session: "Session",
        request: dict[str, Any],
        *,
        system: str | None = None,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ):
        self._session = session
        self._request = request
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._row: int | None = None
        self._stats: DecodingStats | None = None

    def check_template(self) -> None:
        """Refuse a model without a chat template before the user has typed anything."""
        self._session.encode_chat([*self._opening, {"role": "user", "content": "hello"}])

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._drop_row()
        self._stats = None
        self._messages = list(self._opening)

    def say(self, text: str) -> None:
        """Answer one message, streaming to stdout; a refused message leaves the conversation as it was."""
        check_text(text)
        messages = [*self._messages, {"role": "user", "content": text}]
        answer = self._decode(self._session.encode_chat(messages))
        self.remember(text, answer)

    def remember(self, text: str, answer: str) -> None:
        """Add a turn and its answer to the history."""
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def report(self) -> str:
        """What the conversation cost so far."""
        stats = self._stats
        if stats is None:
            return "nothing decoded yet"
        return (
            f"{stats.num_tokens} tokens in {stats.num_cycles} cycles, {stats.tokens_per_cycle:.2f} tokens per cycle, "
            f"{stats.tokens_per_forward:.2f} per forward pass, {self._session.chosen.name} backend"
        )

    def _decode(self, prompt_ids: list[int]) -> str:
        from orthrus.cli.printer import TextPrinter

        printer = TextPrinter(self._session.tokenizer)
        try:
            token_ids, is_finished = self._read(prompt_ids, printer.show)
        except BaseException:
            self._drop_row()
            raise
        printer.close()
        self._count(self._row)
        if not is_finished:
            # An unfinished row cannot be continued under another prompt: the next turn prefills it all.
            self._drop_row()
        return self._session.decode(token_ids)

    def _read(self, prompt_ids: list[int], show: "Show") -> tuple[list[int], bool]:
        """The answer's tokens, and whether it came to its end rather than being stopped by Ctrl-C."""
        from orthrus.decoding.decoder import Request

        decoder = self._session.decoder
        stopping = self._session.stopping(prompt_ids, max_new_tokens=self._max_new_tokens, stop=self._stop)
        request = Request(prompt_ids=prompt_ids, stopping=stopping, **self._request)
        with interruptible() as interrupted:
            record = decoder.admit(request, reuse_row=self._row)
            self._row = record.row
            token_ids = list(record.token_ids)
            show(record)
            while record.finish_reason is None and not interrupted:
                (record,) = decoder.step()
                token_ids += record.token_ids
                show(record)
        return token_ids, record.finish_reason is not None

    def _drop_row(self) -> None:
        if self._row is not None:
            with suppress(ValueError):  # a prefill that failed has released the row already
                self._session.decoder.release(self._row)
        self._row = None

    def _count(self, row: int | None) -> None:
        assert row is not None
        stats = self._session.decoder.stats(row)
        self._stats = stats if self._stats is None else self._stats.merge(stats)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect Ctrl-C in a list instead of raising, so that a cycle is never cut in half.

    A second Ctrl-C raises as usual, for a cycle that takes too long to wait for.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, previous)
