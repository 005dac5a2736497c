"""Tiny models whose greedy text varies, stock twins of them, and drafters that are right exactly as often as told."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.decoding.decoder import Decoder, Record, Request
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.row import Row
from orthrus.decoding.sampling import Sampling
from orthrus.decoding.stopping import Stopping
from tests.families import dual_config, randomise_vectors, stock_twin

VOCABULARY = 61
MASK = 60
BLOCK = 8

SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    pad_token_id=0,
)  # fmt: skip


@torch.no_grad()
def randomise(model: nn.Module, seed: int, std: float = 0.8) -> None:
    """Weights wide enough for healthy argmax gaps; narrow embeddings, or a tied head only repeats the last token."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            width = std * (0.3 if "embed" in name else 1.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)


@cache
def subject(
    tied: bool = False, implementation: str = "sdpa", seed: int = 0, variant: str = "qwen3"
) -> OrthrusForCausalLM:
    """A dual-view model whose view is another random one than the AR view's: mostly wrong drafts, never wrong text."""
    config = dual_config(variant, SHAPE, tie_word_embeddings=tied, block_size=BLOCK, mask_token_id=MASK)
    config._attn_implementation = implementation
    model = OrthrusForCausalLM(config).eval()
    randomise(model, seed)
    if variant != "qwen3":
        randomise_vectors(model, seed)
    return model


@cache
def stock(tied: bool = False, implementation: str = "sdpa", seed: int = 0, variant: str = "qwen3") -> PreTrainedModel:
    """transformers' own model with the AR weights of `subject`."""
    model = subject(tied, implementation, seed, variant)
    return stock_twin(model, variant, SHAPE, tie_word_embeddings=tied)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, MASK, (length,), generator=generator).tolist()


class RiggedBackend(PortableBackend):
    """Drafts the true continuation for a prescribed number of tokens and something else after it.

    The draft pass runs all the same, so whatever it leaves behind is really left behind.
    """

    def __init__(self, model: nn.Module, truth: list[list[int]], num_right: Callable[[int, int], int], **options):
        super().__init__(model, **options)
        self.truth = truth
        """Row index -> prompt and true continuation."""
        self.num_right = num_right
        """num_right(row, cycle) -> drafts of this cycle that are right."""
        self.expected: list[tuple[int, int]] = []
        """(row, drafts that must be accepted) in the order of the cycles."""
        self._num_cycles = 0

    def _draft_logits(self, rows: list[Row], ids_BW: Tensor, num_slots: int) -> Tensor:
        logits = torch.full_like(super()._draft_logits(rows, ids_BW, num_slots), -100.0)
        for b, row in enumerate(rows):
            right = min(self.num_right(row.index, self._num_cycles), row.width)
            start = len(row.tokens)
            for j in range(row.width):
                true = self.truth[row.index][start + j] if start + j < len(self.truth[row.index]) else 0
                logits[b, j, true if j < right else (true + 1 + j) % MASK] = 100.0
            known = max(0, len(self.truth[row.index]) - start)
            if row.width:
                self.expected.append((row.index, min(right, known)))
        self._num_cycles += 1
        return logits


def request(prompt: list[int], max_new_tokens: int = 24, **fields) -> Request:
    """A request; keywords of `Stopping` and of `Sampling` are sorted out."""
    stopping = {k: fields.pop(k) for k in ("eos_token_ids", "stop_strings", "min_new_tokens") if k in fields}
    sampling = {k: fields.pop(k) for k in ("temperature", "top_k", "top_p", "min_p", "seed", "rule") if k in fields}
    return Request(
        prompt_ids=prompt,
        stopping=Stopping(max_new_tokens=max_new_tokens, **stopping),
        sampling=Sampling(**sampling),
        **fields,
    )


def decode_all(decoder: Decoder, requests: list[Request]) -> tuple[list[list[int]], list[Record]]:
    """New tokens of each request decoded as one batch, and every record."""
    tokens: dict[int, list[int]] = {}
    records = [decoder.admit(r) for r in requests]
    order = [record.row for record in records]
    while decoder.active:
        records += decoder.step()
    for record in records:
        tokens.setdefault(record.row, []).extend(record.token_ids)
    return [tokens[row] for row in order], records


def decode(model: nn.Module, r: Request, *, block_size: int | None = None, exact: bool | None = None) -> list[int]:
    """New tokens of one request."""
    return decode_all(Decoder(PortableBackend(model, exact=exact), block_size=block_size), [r])[0][0]


def stock_text(
    prompt: list[int], max_new_tokens: int, *, tied: bool = False, seed: int = 0, variant: str = "qwen3"
) -> list[int]:
    """The greedy continuation that transformers writes."""
    ids = torch.tensor([prompt])
    output = stock(tied, "sdpa", seed, variant).generate(input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()
