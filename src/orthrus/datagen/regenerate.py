"""The base's own continuations of training text, in bulk: what a view is trained on.

A view is asked to predict what its base would write, so it learns most from what its base did write. Rows have one
fixed length and no stopping rule, which lets thousands of them share one step: this is a data generator for small
bases, not a decoder (docs/architecture.md says why it is apart from the decoding loop).

    B = rows, P = prompt tokens, T = tokens of a row, L = layers, G = key/value heads, R = query heads of one
    key/value head, H = head dimension, V = vocabulary
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthrus.model.attention import causal_attend, run_layers
from orthrus.model.modeling import OrthrusLM


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutStage:
    """The base's own continuations of training text: what the view is trained on."""

    prompt_tokens: tuple[int, ...] = (32, 128, 256)
    """Prompt lengths, in equal shares; a row is always `row_tokens` long."""
    row_tokens: int = 512
    rows_per_batch: int = 4096
    num_batches: int = 30
    sampled_share: float = 0.2
    """Share of rows sampled at `temperature`; the others are greedy."""
    temperature: float = 0.8
    sources: tuple[str, ...] = ("train", "val")
    """Token streams that prompts are cut from, in equal shares: text the base has seen, and text it has not."""
    min_tokens: int = 48
    """Rows that begin to loop earlier than this many tokens behind their prompt are dropped."""
    max_seconds: float | None = None


class RowCache:
    """Keys and values of B rows that all have the same length. [L, B, G, T, H] each."""

    def __init__(self, model: OrthrusLM, num_rows: int, num_tokens: int):
        c, weight = model.config, model.model.embed_tokens.weight
        shape = (c.num_hidden_layers, num_rows, c.num_key_value_heads, num_tokens, c.head_dim)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def attend(self, attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v behind what is there, then attend causally over all of it."""
        layer, start, end = attention.layer_idx, self.length, self.length + q.shape[2]
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        if start == 0:
            return causal_attend(attention, q, k, v)
        assert q.shape[2] == 1, "either the whole prompt or one token at a time"
        # The heads of a group as so many queries: keys and values are read once for all of them.
        q_BGRH = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        mixed_BGRH = F.scaled_dot_product_attention(q_BGRH, keys, values, scale=attention.scaling)
        return mixed_BGRH.flatten(1)[:, None]


@torch.no_grad()
def continue_rows(
    model: OrthrusLM,
    prompts_BP: Tensor,
    num_tokens: int,
    *,
    num_sampled: int = 0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Each prompt continued to `num_tokens` tokens; the first `num_sampled` rows sampled, the others greedy. [B, T]."""
    num_rows, num_prompt = prompts_BP.shape
    cache = RowCache(model, num_rows, num_tokens)
    ids_BT = torch.empty(num_rows, num_tokens, dtype=torch.long, device=prompts_BP.device)
    ids_BT[:, :num_prompt] = prompts_BP
    new_BT = prompts_BP
    # With cuDNN's kernel among the choices a step took 67 ms, without it 11 (H100): our guess is that it plans anew for
    # each length, and every step has its own.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        for position in range(num_prompt, num_tokens):
            positions_1T = torch.arange(cache.length, position, device=prompts_BP.device)[None]
            hidden_BTD = run_layers(model.model, new_BT, positions_1T, cache.attend, "ar")
            cache.length = position
            logits_BV = model.logits(hidden_BTD[:, -1])
            drawn_B = draw(logits_BV[:num_sampled], temperature, generator)
            new_BT = torch.cat([drawn_B, logits_BV[num_sampled:].argmax(dim=-1)])[:, None]
            ids_BT[:, position] = new_BT[:, 0]
    return ids_BT


def draw(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A sample of each row at this temperature: the argmax of logits / temperature + Gumbel noise. [B]."""
    noise_BV = -torch.empty_like(logits_BV, dtype=torch.float32).exponential_(generator=generator).log()
    return (logits_BV.float() + noise_BV * temperature).argmax(dim=-1)


def is_new_ngram(ids_BT: Tensor, first_B: Tensor, *, ngram: int = 4) -> Tensor:
    """new[b, t]: the n-gram at t >= first[b] stands nowhere in first[b] .. t - 1. [B, T - n + 1]."""
    grams_BGn = ids_BT.unfold(1, ngram, 1)
    # A prime beyond the vocabulary keeps different n-grams apart up to wrap-around.
    multipliers_n = torch.tensor([1_000_003**i % 2**61 for i in range(ngram)], device=ids_BT.device)
    keys_BG = (grams_BGn * multipliers_n).sum(dim=-1)
    inside_BG = torch.arange(keys_BG.shape[1], device=ids_BT.device) >= first_B[:, None]
    sorted_BG, order_BG = keys_BG.masked_fill(~inside_BG, -(2**62)).sort(dim=1, stable=True)
    fresh_BG = F.pad(sorted_BG[:, 1:] != sorted_BG[:, :-1], (1, 0), value=True)
    return torch.zeros_like(inside_BG).scatter(1, order_BG, fresh_BG) & inside_BG


def loop_start(ids_BT: Tensor, first_B: Tensor, *, window: int = 48, min_new: float = 0.4) -> Tensor:
    """Where each row begins to run in circles: the first t >= first[b] of whose next `window` 4-grams less than
    `min_new` are new; the row's length where that never happens. [B].
    """
    new_BG = is_new_ngram(ids_BT, first_B)
    share_BW = new_BG.float().unfold(1, window, 1).mean(dim=-1)
    inside_BW = torch.arange(share_BW.shape[1], device=ids_BT.device) >= first_B[:, None]
    loops_BW = (share_BW < min_new) & inside_BW
    never_B = torch.full_like(first_B, ids_BT.shape[1])
    return torch.where(loops_BW.any(dim=1), loops_BW.int().argmax(dim=1), never_B)


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Rows that a base wrote: ids [rows, T] int16, and where its reply begins and ends in each, [rows]: first token of
    it, first token behind it."""

    ids: Tensor
    first: Tensor
    end: Tensor

    def __post_init__(self):
        if bool((self.end - self.first < 2).any()):
            raise ValueError("a row has no place for an anchor: its reply has fewer than two tokens")


def continue_batches(
    model: OrthrusLM, prompt_tokens: np.ndarray, stage: RolloutStage, *, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of (ids [B, T], first new position [B], whether the row is sampled [B]), prompts cut at random places."""
    device = model.model.embed_tokens.weight.device
    stream = torch.from_numpy(prompt_tokens.astype(np.int32)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    num_sampled = round(stage.rows_per_batch * stage.sampled_share)
    sampled_B = torch.arange(stage.rows_per_batch, device=device) < num_sampled
    started = time.perf_counter()
    for batch in range(stage.num_batches):
        if stage.max_seconds is not None and time.perf_counter() - started > stage.max_seconds:
            return
        num_prompt = stage.prompt_tokens[batch % len(stage.prompt_tokens)]
        shape = (stage.rows_per_batch, 1)
        starts_B1 = torch.randint(len(stream) - num_prompt, shape, generator=generator, device=device)
        prompts_BP = stream[starts_B1 + torch.arange(num_prompt, device=device)].long()
        ids_BT = continue_rows(
            model, prompts_BP, stage.row_tokens,
            num_sampled=num_sampled, temperature=stage.temperature, generator=generator,
        )  # fmt: skip
        yield ids_BT, torch.full_like(sampled_B, num_prompt, dtype=torch.long), sampled_B


def rollouts(model: OrthrusLM, prompt_tokens: np.ndarray, stage: RolloutStage, *, seed: int) -> tuple[OwnRows, dict]:
    """The base's continuations of prompts cut at random from a token stream, and counts.

    A row's reply goes from its first new token up to where a loop begins; rows whose reply has fewer than `min_tokens`
    tokens (or than two, which leave no place for an anchor) are dropped.
    """
    if model.config.vocab_size > 2**15:
        raise ValueError(f"rollouts keep ids as int16: a vocabulary of {model.config.vocab_size} does not fit")
    started, parts, made, looping = time.perf_counter(), [], 0, 0
    for ids_BT, first_B, _ in continue_batches(model, prompt_tokens, stage, seed=seed):
        end_B = loop_start(ids_BT, first_B)
        keep_B = end_B - first_B >= max(stage.min_tokens, 2)
        made += len(ids_BT)
        looping += int((end_B < stage.row_tokens).sum())
        parts.append((ids_BT[keep_B].short(), first_B[keep_B], end_B[keep_B]))
    own = OwnRows(*(torch.cat(column) for column in zip(*parts, strict=True)))
    places = int((own.end - own.first - 1).sum())
    counts = {"rows_made": made, "rows_looping": looping, "rows_kept": len(own.ids), "anchor_places": places}
    return own, counts | {"seconds": time.perf_counter() - started}
