"""One run: the folder's open prompts through a writer, with a progress bar, until they are done or a stop is asked."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from orthrus.datagen.answers import Answer, Failure, Writer
from orthrus.datagen.folder import AnswerFolder
from orthrus.datagen.prompts import Prompt
from orthrus.datagen.stop import Stop

QUIET_INTERVAL_S = 30.0
"""Seconds between two lines of progress where stderr is a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run did, and what the folder holds after it."""

    prompts: int
    answered: int
    """By this run and all before it."""
    new: int
    """Answers of this run."""
    new_tokens: int
    failed: int
    """Prompts given up and not answered since."""
    remaining: int
    """Prompts that were neither answered nor given up: a stop came first."""
    stopped: str | None
    """What asked for a stop."""
    seconds: float
    writer: dict[str, Any]
    """The writer's own facts."""

    def as_dict(self) -> dict[str, Any]:
        """The summary as a JSON document's fields."""
        return asdict(self)

    def line(self) -> str:
        """The summary as one line."""
        rate = self.new_tokens / self.seconds if self.seconds else 0.0
        line = (
            f"{self.answered} of {self.prompts} prompts answered, {self.failed} failed, {self.remaining} left; "
            f"this run: {self.new} answers, {self.new_tokens} tokens, {rate:.1f} tokens/s"
        )
        return f"{line}; stopped by {self.stopped}" if self.stopped else line


class Progress:
    """The bar: rate and time left from tqdm, failures beside them."""

    def __init__(self, folder: AnswerFolder, *, is_terminal: bool):
        interval = 0.1 if is_terminal else QUIET_INTERVAL_S
        self._bar = tqdm(
            total=len(folder.prompts), initial=folder.num_answered, desc="answers", unit=" answers",
            mininterval=interval, maxinterval=max(interval, 10.0), dynamic_ncols=is_terminal,
        )  # fmt: skip
        self.num_new = 0
        self.num_tokens = 0
        self.num_failed = 0

    def count(self, result: Answer | Failure) -> None:
        """Show one more result."""
        if isinstance(result, Failure):
            self.num_failed += 1
        else:
            self.num_new += 1
            self.num_tokens += len(result.response_ids)
        self._bar.set_postfix(failed=self.num_failed, tokens=self.num_tokens, refresh=False)
        self._bar.update(isinstance(result, Answer))

    def close(self) -> float:
        """Leave the bar as it is; the seconds it ran."""
        self._bar.close()
        return float(self._bar.format_dict["elapsed"])


def generate_answers(folder: AnswerFolder, start: Callable[[], Writer], *, is_terminal: bool = False) -> Summary:
    """Answer the folder's open prompts; a writer is started only where there are any."""
    if folder.stop_file.exists():
        raise ValueError(f"{folder.stop_file} asks every run over this folder to end; remove it to go on")
    writer = start() if folder.num_answered < len(folder.prompts) else None
    progress = Progress(folder, is_terminal=is_terminal)

    def enter(result: Answer | Failure) -> None:
        folder.enter(result)
        progress.count(result)

    with Stop("what is in flight", file=folder.stop_file) as stop:
        try:
            if writer is not None:
                writer.write(until_stop(folder.pending(), stop), enter, stop.is_asked)
        finally:
            seconds = progress.close()
    num_unanswered = len(folder.prompts) - folder.num_answered
    return Summary(
        prompts=len(folder.prompts),
        answered=folder.num_answered,
        new=progress.num_new,
        new_tokens=progress.num_tokens,
        failed=folder.num_failed,
        remaining=num_unanswered - folder.num_failed,
        stopped=stop.reason if num_unanswered > progress.num_failed else None,
        seconds=seconds,
        writer={} if writer is None else writer.facts(),
    )


def until_stop(prompts: Iterator[Prompt], stop: Stop) -> Iterator[Prompt]:
    """The prompts, as long as no stop is asked for."""
    for prompt in prompts:
        if stop.is_asked():
            return
        yield prompt
