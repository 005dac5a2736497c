"""What `generate` and `chat` share: a model with its tokenizer and its step loop.

This module imports torch; commands import it when they run.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers

from orthrus.cli.options import check_backend, check_dtype
from orthrus.decoding.backends import Chosen, choose_backend
from orthrus.decoding.decoder import Decoder, check_block_size
from orthrus.decoding.sampling import Sampling
from orthrus.decoding.schedule import CPU_BLOCK_SIZE
from orthrus.decoding.stopping import Stopping, eos_token_ids
from orthrus.environment import bundled_or, pick_device, versions
from orthrus.model.checkpoint import load_model, load_tokenizer
from orthrus.model.packed import is_packed

if TYPE_CHECKING:
    from orthrus.evaluation.batches import BatchMeasurement


@dataclass(kw_only=True)
class Session:
    """A loaded model, its tokenizer and, once it is known what will be decoded (`begin`), its decoding loop."""

    name: str
    model: Any
    tokenizer: Any
    attn: str
    wish: Any
    """The backend that was asked for."""
    exact: bool | None
    block_size: int | Literal["auto"] | None
    draft_precision: Any = None
    chosen: Chosen = field(init=False)
    decoder: Decoder = field(init=False)

    def begin(self, *, num_tokens: int, sampling: Sampling, drafting: bool, is_elastic: bool = False) -> None:
        """Choose the backend for one row of so many tokens, saying on stderr what of it nobody would expect.

        `sampling` and `drafting` are those of the requests to come: widths are chosen unasked where they allow it.
        """
        check_block_size(self.block_size, self.model.config.block_size)
        self.chosen = choose_backend(
            self.model, wish=self.wish, row_tokens=[num_tokens], exact=self.exact, is_elastic=is_elastic,
            draft_precision=self.draft_precision,
        )  # fmt: skip
        note_backend(self.chosen)
        block_size = self.block_size
        if block_size is None and has_short_blocks(self.model):
            block_size = min(CPU_BLOCK_SIZE, self.model.config.block_size)
        elif block_size is None:
            block_size = self.chosen.block_size_for([sampling], drafting=drafting)
        self.decoder = Decoder(self.chosen.backend, block_size=block_size, tokenizer=self.tokenizer)

    def stopping(self, prompt_ids: Sequence[int], *, max_new_tokens: int, stop: Sequence[str] = ()) -> Stopping:
        """When an answer to this prompt ends: no later than where the context does."""
        room = self.model.config.max_position_embeddings - len(prompt_ids)
        return Stopping(
            # A prompt that leaves no room at all is refused by the decoder, which says so better.
            max_new_tokens=min(max_new_tokens, room) if room > 0 else max_new_tokens,
            eos_token_ids=eos_token_ids(self.model, self.tokenizer),
            stop_strings=tuple(stop),
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer(text)["input_ids"]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the model's turn begins."""
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self.name} has no chat template; use `orthrus generate` to continue plain text")
        return self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids without the special ones."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def facts(self) -> dict[str, Any]:
        """What a number measured here depends on."""
        return {
            "model": self.name,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "backend": self.chosen.name,
            "refusal": self.chosen.refusal,
            "exact": self.chosen.exact,
            "attn_implementation": self.attn if self.chosen.name == "portable" else None,
            "packed": is_packed(self.model),
            "draft_precision": self.chosen.draft_precision,
            "block_size": self.decoder.block_size,
            "widths": "auto" if self.decoder.is_auto else "fixed",
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }


def open_session(
    *,
    model: str | None,
    revision: str | None,
    base: str | None,
    dtype: str,
    device: str | None,
    attn: str,
    exact: bool | None,
    backend: str,
    block_size: int | Literal["auto"] | None,
    draft_precision: str | None = None,
) -> Session:
    """Load a checkpoint as the command line names it."""
    check_dtype(dtype)
    check_backend(backend, attn)
    where = bundled_or(model)
    quiet()
    loaded = load_model(
        where, revision=revision, base=base, dtype=dtype, device=pick_device(device), attn_implementation=attn
    )
    tokenizer = load_tokenizer(where, revision=revision, base=base)
    return Session(
        name=model or "the bundled model",
        model=loaded,
        tokenizer=tokenizer,
        attn=attn,
        wish=backend,
        exact=exact,
        block_size=block_size,
        draft_precision=draft_precision,
    )


def has_short_blocks(model: Any) -> bool:
    """Whether a block of the trained size costs more than it brings, so that nobody gets one unasked: on a CPU."""
    return model.device.type == "cpu"


def note_backend(chosen: "Chosen | BatchMeasurement") -> None:
    """Say on stderr why the backend is not the one expected, and what its drafts take beside the model."""
    if chosen.refusal is not None:
        print(f"note: decoding on the portable backend: {chosen.refusal}", file=sys.stderr)
    if chosen.draft_precision is not None:
        size = chosen.draft_bytes / 1e6
        more = f"{size / 1e3:.1f} GB" if size >= 100 else f"{size:.1f} MB"
        copy = f"a second copy of the weights in {chosen.draft_precision}"
        print(f"note: drafts read {copy}: {more} more", file=sys.stderr)


def quiet() -> None:
    """Keep stderr for the user: no loading bars, no library warnings between the lines of an answer."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
