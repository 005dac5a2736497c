"""Prompts decoded in every mode, with the time of each run: the raw material of `speed` and of anything like it.

Every prompt is decoded in every mode right after one another, in an order that rotates from prompt to prompt, so that
noise of the machine falls on all modes alike. Timed is decoding alone: the prefill, which gives the first token, is
kept apart. All modes go through the one step loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tqdm import tqdm

from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.stopping import Stopping, eos_token_ids
from orthrus.decoding.timing import Run, timed_run
from orthrus.evaluation.suites import Prompt

BLOCK_SIZES = (4, 8, 16, 32)
"""Measured unless told otherwise, as far as the model was trained for them; its own block size always is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """A way to decode."""

    drafting: bool
    exact: bool
    block_size: int | Literal["auto"] | None
    """Positions of a cycle, or of an exact pass; None for plain decoding in passes of one row. "auto": as many in each
    cycle as are worth it, in exact passes of the size that `auto` has there."""

    @property
    def baseline(self) -> "Mode":
        """The same computation with drafting off."""
        return Mode(drafting=False, exact=self.exact, block_size=self.block_size if self.exact else None)


ONE_ROW = Mode(drafting=False, exact=False, block_size=None)
"""Plain decoding in passes of one row: what a user without drafting would run."""


@dataclass(kw_only=True, slots=True)
class Measurement:
    """All prompts decoded in all modes by one model in one dtype: `runs[mode][i]` is prompt i."""

    model: Any
    tokenizer: Any
    prompts: Sequence[Prompt]
    prompt_ids: list[list[int]]
    runs: dict[Mode, list[Run]] = field(default_factory=dict)


def modes(block_sizes: Sequence[int | Literal["auto"]], *, exact: bool) -> list[Mode]:
    """Drafting at each block size and the baselines of all."""
    found = [ONE_ROW]
    for block_size in block_sizes:
        drafted = Mode(drafting=True, exact=exact, block_size=block_size)
        found += [drafted] if drafted.baseline in found else [drafted.baseline, drafted]
    return found


def measure(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    block_sizes: Sequence[int] | None = None,
    exact: bool | None = None,
) -> Measurement:
    """Decode every prompt in every mode, greedily; the longest prompt warms each mode up first."""
    is_exact = PortableBackend(model, exact=exact).exact
    trained = model.config.block_size
    if block_sizes is None:
        block_sizes = sorted({*(size for size in BLOCK_SIZES if size < trained), trained})
    ways = modes(block_sizes, exact=is_exact)
    # One decoder, hence one cache, for each computation: a drafted run and its baseline share theirs.
    decoders = {way.baseline if way.exact else way: decoder_of(model, way) for way in ways}
    found = Measurement(model=model, tokenizer=tokenizer, prompts=prompts, prompt_ids=encode(tokenizer, prompts))
    eos = eos_token_ids(model, tokenizer)

    def run(way: Mode, ids: Sequence[int]) -> Run:
        room = model.config.max_position_embeddings - len(ids)
        # A prompt that leaves no room at all is refused by the decoder, which says so.
        stopping = Stopping(max_new_tokens=max(1, min(max_new_tokens, room)), eos_token_ids=eos)
        decoder = decoders[way.baseline if way.exact else way]
        return timed_run(decoder, Request(prompt_ids=ids, stopping=stopping, drafting=way.drafting))

    for way in ways:
        found.runs[way] = []
        run(way, max(found.prompt_ids, key=len))
    for index, ids in enumerate(tqdm(found.prompt_ids, desc=dtype_name(model), disable=None)):
        start = index % len(ways)
        for way in ways[start:] + ways[:start]:
            found.runs[way].append(run(way, ids))
    return found


def decoder_of(model: Any, mode: Mode) -> Decoder:
    """A step loop for this mode."""
    return Decoder(PortableBackend(model, exact=mode.exact), block_size=mode.block_size)


def encode(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt's plain text."""
    return [tokenizer(prompt.text)["input_ids"] for prompt in prompts]


def dtype_name(model: Any) -> str:
    """The model's number format: "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")
