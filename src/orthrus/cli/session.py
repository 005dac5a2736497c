"""What `generate` and `chat` share: a model with its tokenizer and its step loop.

This module imports torch; commands import it when they run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers

from orthrus.cli.options import check_dtype
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.schedule import CPU_BLOCK_SIZE
from orthrus.decoding.stopping import Stopping, eos_token_ids
from orthrus.environment import bundled_or, pick_device, versions
from orthrus.model.checkpoint import load_model, load_tokenizer
from orthrus.model.packed import is_packed


@dataclass(kw_only=True)
class Session:
    """A loaded model, its tokenizer and its decoding loop."""

    name: str
    model: Any
    tokenizer: Any
    backend: PortableBackend
    decoder: Decoder
    attn: str

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
            "backend": "portable",
            "exact": self.backend.exact,
            "attn_implementation": self.attn,
            "packed": is_packed(self.model),
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
    block_size: int | Literal["auto"] | None,
) -> Session:
    """Load a checkpoint as the command line names it."""
    check_dtype(dtype)
    where = bundled_or(model)
    quiet()
    loaded = load_model(
        where, revision=revision, base=base, dtype=dtype, device=pick_device(device), attn_implementation=attn
    )
    tokenizer = load_tokenizer(where, revision=revision, base=base)
    backend = PortableBackend(loaded, exact=exact)
    if block_size is None and backend.device.type == "cpu":
        block_size = min(CPU_BLOCK_SIZE, backend.max_block_size)
    return Session(
        name=model or "the bundled model",
        model=loaded,
        tokenizer=tokenizer,
        backend=backend,
        decoder=Decoder(backend, block_size=block_size, tokenizer=tokenizer),
        attn=attn,
    )


def quiet() -> None:
    """Keep stderr for the user: no loading bars, no library warnings between the lines of an answer."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
