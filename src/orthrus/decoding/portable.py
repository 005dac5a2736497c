"""The portable backend: the Hugging Face modules on any device, with any `attn_implementation`.

A pass takes T positions of each of B rows, writes their keys and values into the cache (slot = absolute position) and
attends from them in one of three ways: `sdpa` called directly with a mask made once per pass, a function of
transformers' attention interface that takes such a mask (`eager` and whatever the user registered), or a flash kernel
of that interface, which takes packed rows and their lengths instead of a mask.

In `exact` mode every AR pass of a row, plain decoding included, runs alone, at block_size rows, over the slots reserved
at admission: the same shapes with and without drafting, hence the same bits (docs/lossless.md).

    B = rows, T = positions of a pass, S = slots it sees, N = query heads, G = key/value heads, H = head dimension
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from orthrus.decoding.cache import SLOT_QUANTUM, Cache
from orthrus.decoding.chooser import Chooser, first_outcome
from orthrus.decoding.row import Cycle, Outcome, Row
from orthrus.decoding.schedule import Experience, experience_of
from orthrus.model.attention import Attend, View, check_untouched, run_layers
from orthrus.model.masks import draft_mask, verify_mask
from orthrus.model.packed import PackedModel, pack

PREFILL_CHUNK = 512
"""Prompt tokens of one prefill pass: its mask has chunk x prompt entries."""


@dataclass(slots=True)
class Reach:
    """Which slots a pass writes and sees: T positions of each row, from its length on."""

    strips: slice
    lengths: list[int]
    num_positions: int
    num_slots: int
    lengths_B: Tensor
    block_widths: list[int] | None = None
    """Positions each row's block has (anchor included) in a draft pass; None in a causal pass."""

    @property
    def is_level(self) -> bool:
        """Whether all rows start at the same slot."""
        return all(length == self.lengths[0] for length in self.lengths)

    def mask(self) -> Tensor:
        """True where a query sees a slot. [B, T, S]."""
        if self.block_widths is None:
            return verify_mask(self.lengths_B, self.num_positions, self.num_slots)
        widths_B = torch.tensor(self.block_widths, device=self.lengths_B.device)
        return draft_mask(self.lengths_B, widths_B, self.num_positions, self.num_slots)

    def sees_all(self) -> bool:
        """Whether every query sees every slot, so that no mask is needed."""
        causal = self.block_widths is None and self.num_positions > 1
        return not causal and all(seen == self.num_slots for seen in self.seen())

    def seen(self) -> list[int]:
        """Slots that the last query of each row sees."""
        widths = self.block_widths or [self.num_positions] * len(self.lengths)
        return [length + width for length, width in zip(self.lengths, widths, strict=True)]


class Stopwatch:
    """Milliseconds of the device's work between marks; nothing waits until they are read."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        """Note the time at this point of the work."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def between(self, a: int, b: int) -> float:
        """Milliseconds from mark a to mark b, once the device has passed b."""
        if self._is_cuda:
            self._marks[b].synchronize()
            return self._marks[a].elapsed_time(self._marks[b])
        return (self._marks[b] - self._marks[a]) * 1000


class PortableBackend:
    """Prefill, cycle and release over an `OrthrusLM`, acceptance in plain torch between the passes."""

    device: torch.device
    looks_ahead = False

    def __init__(self, model: nn.Module, *, exact: bool | None = None, prefill_chunk: int = PREFILL_CHUNK):
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        config = model.config
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            raise ValueError(f"the model is spread over {sorted(map(str, devices))}; load it on one device")
        self.model = model
        self.device = devices.pop()
        self.dtype: torch.dtype = model.dtype
        self.exact: bool = self.dtype in (torch.bfloat16, torch.float16) if exact is None else exact
        self.max_block_size: int = config.block_size
        self.max_positions: int = config.max_position_embeddings
        self._mask_token: int | None = config.mask_token_id
        self.prefill_chunk = prefill_chunk
        self._packed: PackedModel | None = None
        # Behind the context `dynamic` angles depend on a pass's last position: a block's are not plain decoding's.
        self._is_bounded: bool = config.rope_parameters.get("rope_type") == "dynamic"
        self._mix = attention_kind(config._attn_implementation)
        self.cache = Cache(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim, dtype=self.dtype, device=self.device
        )

    # The verbs

    @torch.inference_mode()
    def prefill(self, row: Row, *, num_kept: int = 0, limit: int | None = None) -> Cycle:
        """Cache the row's tokens from `num_kept` on, in chunks, and choose the token that follows (see `Backend`)."""
        watch = Stopwatch(self.device)
        watch.mark()
        check_untouched(self.model)
        if self._is_bounded and row.max_tokens > self.max_positions:
            raise ValueError(
                f"prompt and max_new_tokens are {row.max_tokens} tokens, the model's context is {self.max_positions}: "
                "with rope_type 'dynamic' nothing can be decoded beyond it; ask for fewer"
            )
        self._packed = pack(self.model)
        if row.index not in self.cache:
            self.cache.add(row.index)
        self.cache.truncate(row.index, num_kept)
        self.cache.reserve(self._padded_slots(row) if self.exact else len(row.tokens) + row.block_size)
        num_wanted = len(row.tokens) - row.is_resumed
        limit = num_wanted if limit is None else limit
        hidden = None
        while (start := self.cache.length(row.index)) < min(num_wanted, num_kept + limit):
            if start < row.num_prompt:
                hidden = self._prefill_pass(row, start)
            else:
                self._replay_pass(row, start)
        is_done = self.cache.length(row.index) == num_wanted
        outcomes = (
            []
            if hidden is None or row.is_resumed or not is_done
            else [first_outcome(row, self._logits(hidden[:, -1:]))]
        )
        watch.mark()
        return Cycle(outcomes=outcomes, draft_ms=0.0, verify_ms=watch.between(0, 1))

    def _prefill_pass(self, row: Row, start: int) -> Tensor:
        """The prompt's next chunk, which ends at a multiple of the chunk, whatever was cached before. [1, T, D]."""
        end = min(row.num_prompt, (start // self.prefill_chunk + 1) * self.prefill_chunk)
        ids_1T = torch.tensor([row.tokens[start:end]], device=self.device)
        hidden = self._run(ids_1T, self._reach([row], end - start, end), "ar")
        self.cache.commit(row.index, end - start)
        return hidden

    def _replay_pass(self, row: Row, start: int) -> None:
        """A block of tokens that were committed before the row was preempted, in the shape of a verify pass."""
        block = row.tokens[start : min(start + row.block_size, row.num_cached)]
        num_columns, num_slots = len(block), start + len(block)
        if self.exact:
            num_columns, num_slots = row.block_size, self._padded_slots(row)
        ids_1T = torch.tensor([block + [0] * (num_columns - len(block))], device=self.device)
        self._run(ids_1T, self._reach([row], num_columns, num_slots), "ar")
        self.cache.commit(row.index, len(block))

    @torch.inference_mode()
    def cycle(self, rows: list[Row], *, meanwhile: Callable[[], None] | None = None) -> Cycle:
        """One draft pass (unless every width is 0), one verify pass, acceptance, one host read, commit."""
        watch = Stopwatch(self.device)
        watch.mark()
        num_columns = max(row.width for row in rows) + 1
        num_written = max(row.num_cached for row in rows) + num_columns
        self.cache.reserve(max(map(self._padded_slots, rows)) if self.exact else num_written)
        ids_BW = torch.full((len(rows), num_columns), self._mask_token or 0, device=self.device)
        ids_BW[:, 0] = torch.tensor([row.tokens[-1] for row in rows], device=self.device)
        widths_B = torch.tensor([row.width for row in rows], device=self.device)
        chooser = Chooser(rows, num_columns, self.model.config.vocab_size, self.device)
        if num_columns > 1:
            logits_BJV = self._draft_logits(rows, ids_BW, num_written)
            ids_BW[:, 1:] = chooser.draft(logits_BJV)
        drafts_BJ = ids_BW[:, 1:]
        watch.mark()
        logits_BWV = self._verify_logits(rows, ids_BW, num_written)
        num_accepted_B, committed_BW = chooser.verify(logits_BWV, drafts_BJ, widths_B)
        packed = torch.cat([num_accepted_B[:, None], committed_BW, drafts_BJ], dim=1).tolist()
        watch.mark()
        outcomes = []
        for row, (accepted, *rest) in zip(rows, packed, strict=True):
            self.cache.commit(row.index, accepted + 1)
            drafts = rest[num_columns : num_columns + row.width]
            outcomes.append(Outcome(tokens=rest[: accepted + 1], drafts=drafts))
        chooser.report(outcomes, None if chooser.logprobs_BW is None else chooser.logprobs_BW.tolist())
        draft_ms = watch.between(0, 1) if num_columns > 1 else 0.0
        return Cycle(outcomes=outcomes, draft_ms=draft_ms, verify_ms=watch.between(1, 2))

    @torch.inference_mode()
    def release(self, row: int) -> None:
        """Forget a row, if it is known; its strip goes to the next one."""
        if row in self.cache:  # a prefill that failed early has none
            self.cache.remove(row)

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's cached tokens from `length` on."""
        self.cache.truncate(row, length)

    def length(self, row: int) -> int:
        """Cached tokens of a row, 0 where it is not known."""
        return self.cache.length(row) if row in self.cache else 0

    def experience(self, block_size: int) -> Experience:
        """What this process knows of the model's times and drafts, as it is run here."""
        attention = self.model.config._attn_implementation
        return experience_of(self.model, block_size, self.exact, self.dtype, self.device, attention)

    # The passes

    def _padded_slots(self, row: Row) -> int:
        """Slots an exact pass of this row sees: fixed at admission, enough for its last block."""
        return -(-(row.max_tokens + row.block_size) // SLOT_QUANTUM) * SLOT_QUANTUM

    def _reach(self, rows: list[Row], num_positions: int, num_slots: int, *, is_draft: bool = False) -> Reach:
        lengths = [self.cache.length(row.index) for row in rows]
        return Reach(
            strips=self.cache.arrange([row.index for row in rows]),
            lengths=lengths,
            num_positions=num_positions,
            num_slots=num_slots,
            lengths_B=torch.tensor(lengths, device=self.device),
            block_widths=[row.width + 1 for row in rows] if is_draft else None,
        )

    def _draft_logits(self, rows: list[Row], ids_BW: Tensor, num_slots: int) -> Tensor:
        """The diffusion view over [anchor, mask, ...]; row j of a block predicts the token after it. [B, J, V]."""
        if self._mask_token is None:
            raise ValueError("the configuration has no mask_token_id: this model cannot draft, decode without drafting")
        reach = self._reach(rows, ids_BW.shape[1], num_slots, is_draft=True)
        return self._logits(self._run(ids_BW, reach, "diffusion")[:, :-1])

    def _verify_logits(self, rows: list[Row], ids_BW: Tensor, num_slots: int) -> Tensor:
        """The AR view over [anchor, drafts]. [B, W, V]."""
        num_columns = ids_BW.shape[1]
        if not self.exact:
            return self._logits(self._run(ids_BW, self._reach(rows, num_columns, num_slots), "ar"))
        logits = []
        for b, row in enumerate(rows):
            ids_1R = F.pad(ids_BW[b : b + 1], (0, row.block_size - num_columns))
            reach = self._reach([row], row.block_size, self._padded_slots(row))
            # The LM head too sees all R rows: its bits depend on their number like any other layer's.
            logits.append(self._logits(self._run(ids_1R, reach, "ar"))[:, :num_columns])
        return torch.cat(logits)

    def _run(self, ids_BT: Tensor, reach: Reach, view: View) -> Tensor:
        """One pass: final hidden states [B, T, D], its keys and values written, no length moved."""
        positions_BT = reach.lengths_B[:, None] + torch.arange(reach.num_positions, device=self.device)
        write = self._writer(reach, positions_BT)
        attend = self._mix(write, reach, self.model)
        if self._is_bounded:  # an exact pass's padding may lie behind the context
            positions_BT = positions_BT.clamp(max=self.max_positions - 1)
        if self._packed is not None:
            return self._packed.run(ids_BT, positions_BT, attend, view)
        return run_layers(self.model.model, ids_BT, positions_BT, attend, view)

    def _logits(self, hidden: Tensor) -> Tensor:
        return (self._packed or self.model).logits(hidden)

    def _writer(self, reach: Reach, positions_BT: Tensor) -> "Writer":
        strips, num_slots = reach.strips, reach.num_slots
        if reach.is_level:
            target = (strips, slice(None), slice(reach.lengths[0], reach.lengths[0] + reach.num_positions))
        else:
            rows_B1 = torch.arange(strips.start, strips.stop, device=self.device)[:, None]
            target = (rows_B1, slice(None), positions_BT)
        all_keys, all_values = self.cache.keys, self.cache.values

        def write(layer: int, k_BGTH: Tensor, v_BGTH: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = all_keys[layer], all_values[layer]
            if reach.is_level:
                keys[target], values[target] = k_BGTH, v_BGTH
            else:
                keys[target], values[target] = k_BGTH.transpose(1, 2), v_BGTH.transpose(1, 2)
            return keys[strips, :, :num_slots], values[strips, :, :num_slots]

        return write


# Attention

Writer = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""write(layer, k [B, G, T, H], v) -> all keys and values that the pass may see, [B, G, S, H]."""
Mix = Callable[[Writer, Reach, nn.Module], Attend]


def attention_kind(implementation: str | None) -> Mix:
    """How passes attend under this `attn_implementation`; `ValueError` for those that cannot decode."""
    name = implementation or "eager"
    if name == "sdpa":
        return attend_sdpa
    if "flash" in name.lower() and "sdpa" not in name.lower():
        return attend_packed
    if name.startswith("paged|") or name == "flex_attention":
        raise ValueError(
            f"attn_implementation {name!r} is not supported for decoding; "
            "use eager, sdpa, flash_attention_2 or a flash kernel of the Hub"
        )
    return attend_masked


def additive_mask(reach: Reach, dtype: torch.dtype) -> Tensor | None:
    """0 where a query sees a slot and -inf where it does not, [B, 1, T, S]; None where everything is seen."""
    if reach.sees_all():
        return None
    visible_BTS = reach.mask()
    additive_BTS = torch.zeros(visible_BTS.shape, dtype=dtype, device=visible_BTS.device)
    return additive_BTS.masked_fill_(~visible_BTS, -torch.inf)[:, None]


def attend_sdpa(write: Writer, reach: Reach, model: nn.Module) -> Attend:
    """Torch's own attention. The queries that share a key/value head are laid one after the other, so that neither
    keys nor values are copied for grouped heads, whatever kernel torch picks."""
    config = model.config
    num_groups, head_dim = config.num_key_value_heads, config.head_dim
    num_shared = config.num_attention_heads // num_groups
    mask = additive_mask(reach, model.dtype)
    if mask is not None:
        mask = mask.repeat(1, 1, num_shared, 1)

    def attend(attention: nn.Module, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        keys, values = write(attention.layer_idx, k_BGTH, v_BGTH)
        rows, _, num_positions, _ = q_BNTH.shape
        q = q_BNTH.reshape(rows, num_groups, num_shared * num_positions, head_dim)
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=attention.scaling)
        mixed_BNTH = mixed.reshape(rows, num_groups * num_shared, num_positions, head_dim)
        return mixed_BNTH.transpose(1, 2).reshape(rows, num_positions, -1)

    return attend


def attend_masked(write: Writer, reach: Reach, model: nn.Module) -> Attend:
    """A function of transformers' attention interface that takes an additive mask."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, eager_attention_forward)
    mask = additive_mask(reach, model.dtype)

    def attend(attention: nn.Module, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        keys, values = write(attention.layer_idx, k_BGTH, v_BGTH)
        mixed, _ = function(
            attention, q_BNTH, keys, values, mask, dropout=0.0, scaling=attention.scaling, is_causal=False
        )
        return mixed.flatten(2)

    return attend


def attend_packed(write: Writer, reach: Reach, model: nn.Module) -> Attend:
    """A flash kernel of transformers' attention interface: rows packed one after the other, lengths instead of masks.

    Its causal form aligns the last query with the last key, which is what a verify pass needs: T queries at the end of
    length + T keys. The draft pass is the same without `is_causal`.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, eager_attention_forward)
    num_rows, num_positions, num_slots = len(reach.lengths), reach.num_positions, reach.num_slots
    seen, device = reach.seen(), reach.lengths_B.device
    packed = {
        "cu_seq_lens_q": torch.arange(num_rows + 1, dtype=torch.int32, device=device) * num_positions,
        "cu_seq_lens_k": torch.tensor([0, *accumulate(seen)], dtype=torch.int32, device=device),
        "max_length_q": num_positions,
        "max_length_k": max(seen),
    }
    is_causal = reach.block_widths is None
    index = None
    if min(seen) < num_slots:
        starts = range(0, num_rows * num_slots, num_slots)
        index = torch.cat([torch.arange(a, a + n, device=device) for a, n in zip(starts, seen, strict=True)])

    def pack(x_BGSH: Tensor) -> Tensor:
        """[B, G, S, H] -> [1, G, all rows' seen slots, H]."""
        flat = x_BGSH.transpose(1, 2).flatten(0, 1)
        return (flat if index is None else flat[index]).transpose(0, 1)[None]

    def attend(attention: nn.Module, q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor) -> Tensor:
        keys, values = write(attention.layer_idx, k_BGTH, v_BGTH)
        q_1NTH = q_BNTH.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]
        mixed, _ = function(
            attention, q_1NTH, pack(keys), pack(values), None,
            dropout=0.0, scaling=attention.scaling, is_causal=is_causal, **packed,
        )  # fmt: skip
        return mixed.view(num_rows, num_positions, -1)

    return attend
