"""The engine: a backend of the decoding loop over paged keys and values, with passes of a few fixed shapes.

Exactness (L1 and L2 of docs/lossless.md). The rule is a strong one: every operation gives a
row the bits it would have alone, so no shape decides a bit. A plain step is a pass of one column, a verify pass of up
to block_size, a prefill of hundreds, in company or alone: a position's keys, values and logits have the same bits in
each. It follows that they do not depend on what was drafted or accepted, on who shares the batch, on where prefill
chunks end, or on what a cache kept from earlier; a row that is preempted and computed again is the same row. This
rests on the kernels. Where their twins run (a CPU), it holds up to rounding: in fp32 the text is the same (L0).

Shapes are rounded up so that there are few (`bucket`): rows and tables to powers of two, columns to powers of two and
the block size or, of a chunk of a prompt, to CHUNK_COLUMNS.

    B = rows, W = positions of a pass, J = W - 1 drafts, V = vocabulary, D = hidden width
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orthrus.decoding.backends import DraftPrecision
from orthrus.decoding.chooser import Settings, first_outcome
from orthrus.decoding.portable import PREFILL_CHUNK, Stopwatch
from orthrus.decoding.row import Cycle, Outcome, Row
from orthrus.decoding.schedule import Experience, experience_of
from orthrus.engine.choice import KEPT_BYTES, SCORES_BYTES, CycleChoice
from orthrus.engine.graphs import Graphs
from orthrus.engine.kv import PagePool, PageTables
from orthrus.engine.operations import Ops, choose_ops
from orthrus.engine.passes import Inputs, Passes, Shape
from orthrus.engine.weights import Weights, check_modules, rotary_tables, take_weights

PAGE_SLOTS = 64
"""Slots of a page: divides the 256 slots that attention splits at."""
MIN_TABLE_PAGES = 4
"""The smallest table of a pass: one split of attention."""
CHUNK_COLUMNS = (16, 64, 128, 256, 384, 512)
"""Widths of captured passes over a chunk of a prompt. Few, since each is a graph. A pass of few rows takes the time of
reading the weights whatever its width, but in a long text padding costs attention: each tile of 64 query heads reads
the keys once more. Beyond 128 rows products take tiles of 128."""
CHUNK_BYTES = 28 * 10**6
"""What such a pass may compute with at once, since graphs keep it. 256 columns of Qwen3-8B and 4B, 512 of 1.7B: with
512 of 8B captured, all that is kept beside weights and pages was 213 MB at 40k of context (the aim is 200)."""
FREE_SHARE = 0.9
"""The part of a GPU's free memory that pages get unless told; the rest is for what a pass computes."""
RESERVED_BYTES = SCORES_BYTES + KEPT_BYTES + 2**28
"""What pages leave free on a GPU at least, unless told: for choices, and 2^28 for passes and what graphs keep."""
CPU_BYTES = 256 * 2**20
"""What pages get on a CPU unless told."""


def bucket(number: int, *, largest: int | None = None) -> int:
    """The next power of two, or `largest` where that is less."""
    assert number >= 1, "nothing has no bucket"
    rounded = 1 << (number - 1).bit_length()
    return rounded if largest is None else max(number, min(rounded, largest))


class EngineBackend:
    """Prefill, cycle and release over an `OrthrusLM`, whose parameters become views of the engine's joined weights.

    `looks_ahead`: whether the device drafts while the host reads (on a GPU unless told; see `cycle`).
    `num_pages` pages of `page_slots` tokens each are taken at once: by default what 0.9 of a GPU's free memory holds,
    with `RESERVED_BYTES` left at least.
    Raises `ValueError` naming what the engine does not compute; `OutOfPages` when rows need more pages than there are,
    with every row as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_pages: int | None = None,
        page_slots: int = PAGE_SLOTS,
        prefill_chunk: int = PREFILL_CHUNK,
        draft_precision: DraftPrecision | None = None,
        ops: Ops | None = None,
        graphs: Graphs | None = None,
        make_passes: type[Passes] = Passes,
        looks_ahead: bool | None = None,
    ):
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        config = model.config
        self.model = model
        self.weights = take_weights(model, draft_precision)
        self.device: torch.device = self.weights.embedding_VD.device
        self.max_block_size: int = config.block_size
        self.max_positions: int = config.max_position_embeddings
        self.exact = False  # bits do not depend on shapes: a pass has the positions it is asked for
        self._mask_token: int | None = config.mask_token_id
        self.prefill_chunk = prefill_chunk
        if num_pages is None:
            num_pages = affordable_bytes(self.device) // page_bytes(model, page_slots)
        self.pool = PagePool(num_pages, page_slots)
        self.tables = PageTables(self.pool)
        self._spare_page = num_pages  # behind the pool's: what padding writes is nobody's
        self.passes = make_passes(
            self.weights,
            choose_ops(self.device) if ops is None else ops,
            rotary_tables(model, self.max_positions + self.max_block_size),  # a block's padding may pass the context
            num_pages=num_pages + 1,
            page_slots=page_slots,
            mask_token=self._mask_token,
        )
        self.graphs = Graphs.on(self.device) if graphs is None else graphs
        self._inputs: dict[Shape, Inputs] = {}
        widest = CHUNK_BYTES // position_bytes(self.weights)
        self._chunk_columns = tuple(width for width in CHUNK_COLUMNS if width <= widest)
        self._chunk_inputs: dict[Shape, Inputs] = {}
        like_VD = self.weights.embedding_VD
        self._chunk_hidden_RD = like_VD.new_zeros(max(self._chunk_columns, default=0), like_VD.shape[1])
        self.looks_ahead: bool = self.device.type == "cuda" if looks_ahead is None else looks_ahead
        self._ahead: _Ahead | None = None
        self._settings: Settings | None = None

    def experience(self, block_size: int) -> Experience:
        """What this process knows of the model in this engine: survival and cycle times."""
        setting = ("engine", self.device, self.weights.embedding_VD.dtype, self.weights.draft_precision)
        return experience_of(self.model, block_size, *setting)

    # The verbs

    @torch.inference_mode()
    def prefill(self, row: Row, *, num_kept: int = 0, limit: int | None = None) -> Cycle:
        """Cache the row's tokens from `num_kept` on, in chunks that end at multiples of one size, and choose the next.

        A row that has a table already (one that is used again, or begins with another's pages) keeps its first
        `num_kept` slots. New tokens of a row that was preempted are prefilled as its prompt is: their bits are the same
        in a pass of any shape. `limit`: see `Backend`.
        """
        self._forget_ahead(row.index)
        watch = Stopwatch(self.device)
        watch.mark()
        self._check(row)
        if row.index not in self.tables:
            self.tables.add(row.index)
        if num_kept < self.tables.length(row.index):  # else pages that were reserved for the row stay
            self.tables.truncate(row.index, num_kept)
        end = len(row.tokens) - row.is_resumed
        stop = end if limit is None else min(num_kept + limit, end)
        hidden_RD = None
        while (start := self.tables.length(row.index)) < stop:
            chunk_end = (start // self.prefill_chunk + 1) * self.prefill_chunk
            hidden_RD = self._prefill_pass(row, start, min(chunk_end, end))
        outcomes = []
        if hidden_RD is not None and not row.is_resumed and self.tables.length(row.index) == end:
            outcomes = [first_outcome(row, self.passes.logits(hidden_RD[None, -1:]))]
        watch.mark()
        return Cycle(outcomes=outcomes, draft_ms=0.0, verify_ms=watch.between(0, 1))

    @torch.inference_mode()
    def cycle(self, rows: list[Row], *, meanwhile: Callable[[], None] | None = None) -> Cycle:
        """One draft pass (unless every width is 0), one verify pass, acceptance, one host read, commit.

        While the device verifies, `meanwhile` is called; while the host reads, the device drafts for the cycle after
        this one, where all rows say what they will want of it. A draft that nobody wants then leaves no trace.
        """
        widths = [row.width for row in rows]
        is_drafting = any(widths)
        if is_drafting and self._mask_token is None:
            raise ValueError("the configuration has no mask_token_id: this model cannot draft, decode without drafting")
        ahead = self._ahead if self._ahead is not None and self._ahead.is_of(rows) else None
        inputs, is_same = self._batch(rows, None if ahead is None else ahead.inputs)
        self._ahead = None
        if not all(map(is_plain, rows)):
            return self._chosen_cycle(rows, inputs, meanwhile)
        drafting = None
        if is_drafting:
            drafting = ahead.watch if ahead is not None and is_same else self._draft(inputs)
        watch = Stopwatch(self.device)
        watch.mark()
        inputs.forget()
        self.graphs.run(self.passes.verify, inputs)
        watch.mark()
        read = inputs.begin_read()
        if meanwhile is not None:
            meanwhile()
        self._ahead = ahead = self._draft_ahead(rows, inputs) if self.looks_ahead else None
        outcomes = self._commit(rows, read(), inputs.shape.num_columns)
        anchors, lengths = [o.tokens[-1] for o in outcomes], [self.tables.length(row.index) for row in rows]
        for each in {inputs} if ahead is None else {inputs, ahead.inputs}:
            each.know(anchors, lengths)
        draft_ms = 0.0 if drafting is None else drafting.between(0, 1)
        return Cycle(outcomes=outcomes, draft_ms=draft_ms, verify_ms=watch.between(0, 1))

    def release(self, row: int) -> None:
        """Forget a row, if it is known, and give its pages back."""
        self._forget_ahead(row)
        if row in self.tables:
            self.tables.remove(row)

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's cached tokens from `length` on."""
        self._forget_ahead(row)
        self.tables.truncate(row, length)

    def length(self, row: int) -> int:
        """Cached tokens of a row, 0 where it is not known."""
        return self.tables.length(row) if row in self.tables else 0

    # Batches

    def _check(self, row: Row) -> None:
        check_modules(self.model)
        self.weights.check_places(self.model)
        check_context(row.max_tokens, self.max_positions)

    def _prefill_pass(self, row: Row, start: int, stop: int) -> Tensor:
        """The AR view over the row's tokens start .. stop - 1, which become part of its cache. [stop - start, D].

        What it gives may be overwritten by the next chunk. Columns that pad it, as those of a cycle, write behind the
        row's length, and what they write is never seen.
        """
        self._make_writable(row.index, start, stop)
        kept = self._kept_inputs(start, stop)
        inputs = self._new_inputs(self._chunk_shape(start, stop - start)) if kept is None else kept
        pages = self.tables.pages(row.index)[: self.pool.num_pages_of(stop)]
        inputs.write([row.tokens[start]], [start], [0], [pages])
        inputs.write_ids(row.tokens[start:stop])
        if kept is None:
            self.passes.prefill(inputs)
        else:
            self.graphs.run(self.passes.prefill, kept)
        self.tables.commit(row.index, stop - start)
        return inputs.hidden_RD[: stop - start]

    def _kept_inputs(self, start: int, stop: int) -> Inputs | None:
        """The buffers of a captured pass over tokens start .. stop - 1 of a prompt, padded; all share hidden states.

        None where nothing is captured, for a chunk too long, and where padding would have no angles.
        """
        num_columns = next((width for width in self._chunk_columns if width >= stop - start), None)
        if not self.graphs.can_capture or num_columns is None or start + num_columns > len(self.passes.rotary.cos_TH):
            return None
        shape = self._chunk_shape(start, num_columns)
        if shape not in self._chunk_inputs:
            self._chunk_inputs[shape] = self._new_inputs(shape, self._chunk_hidden_RD[:num_columns])
        return self._chunk_inputs[shape]

    def _chunk_shape(self, start: int, num_columns: int) -> Shape:
        """That of a pass over a chunk of one row, whose table has a page for each of its columns."""
        return Shape(1, num_columns, self._table_pages(start + num_columns))

    def _table_pages(self, num_slots: int) -> int:
        """Pages of the table of a pass whose rows reach so far."""
        return bucket(max(self.pool.num_pages_of(num_slots), MIN_TABLE_PAGES))

    def _new_inputs(self, shape: Shape, hidden_RD: Tensor | None = None) -> Inputs:
        return Inputs(shape, spare_page=self._spare_page, like_VD=self.weights.embedding_VD, hidden_RD=hidden_RD)

    def _batch(self, rows: Sequence[Row], inputs: Inputs | None) -> tuple[Inputs, bool]:
        """Buffers with this batch in them and pages for all that it may commit: the given ones, or those of its shape.

        And whether they had these anchors and lengths in them already, as the last cycle left them.
        """
        for row in rows:
            self._make_writable(row.index, row.num_cached, row.num_cached + row.width + 1)
        widths = [row.width for row in rows]
        inputs = self._inputs_of(widths, max(row.num_cached for row in rows)) if inputs is None else inputs
        is_same = inputs.write(
            [row.tokens[-1] for row in rows], [row.num_cached for row in rows], widths, self._pages_of(rows, inputs)
        )
        return inputs, is_same

    def _inputs_of(self, widths: Sequence[int], num_cached: int) -> Inputs:
        """The buffers for rows of these widths, the longest of which has so many tokens cached."""
        num_columns = bucket(max(widths) + 1, largest=self.max_block_size)
        shape = Shape(bucket(len(widths)), num_columns, self._table_pages(num_cached + num_columns))
        if shape not in self._inputs:
            self._inputs[shape] = self._new_inputs(shape)
        return self._inputs[shape]

    def _pages_of(self, rows: Sequence[Row], inputs: Inputs) -> list[list[int]]:
        return [self.tables.pages(row.index)[: inputs.shape.num_pages] for row in rows]

    # The halves of a cycle

    def _draft(self, inputs: Inputs) -> Stopwatch:
        """Greedy drafts, and the time they take between marks 0 and 1."""
        watch = Stopwatch(self.device)
        watch.mark()
        self.graphs.run(self.passes.draft, inputs)
        watch.mark()
        return watch

    def _draft_ahead(self, rows: Sequence[Row], inputs: Inputs) -> "_Ahead | None":
        """Drafts for the cycle after the one that the device is busy with in these inputs, if it is known to come.

        Its buffers may be others, of another width, or of a longer table, since how far rows get is not known yet.
        """
        widths = [row.next_width for row in rows if row.next_width is not None]
        if len(widths) < len(rows) or not any(widths) or self._mask_token is None:
            return None
        next_inputs = self._inputs_of(widths, max(row.num_cached + row.width + 1 for row in rows))
        last_slots = None
        if any(
            row.max_tokens - 1 <= row.num_cached + row.width + 1 + width
            for row, width in zip(rows, widths, strict=True)
        ):
            last_slots = [row.max_tokens - 1 for row in rows]
        next_inputs.follow(inputs, widths, self._pages_of(rows, next_inputs), last_slots=last_slots)
        return _Ahead(next_inputs, [row.index for row in rows], widths, self._draft(next_inputs))

    def _forget_ahead(self, row: int) -> None:
        """What was drafted for a row that is about to have another past is nobody's; other rows change nothing."""
        if self._ahead is not None and row in self._ahead.rows:
            self._ahead = None

    def _commit(self, rows: Sequence[Row], result: list[list[int]], num_columns: int) -> list[Outcome]:
        """What each row keeps of its accepted drafts, committed tokens and drafts."""
        outcomes = []
        for row, (accepted, *rest) in zip(rows, result, strict=False):  # behind the rows there is padding
            self.tables.commit(row.index, accepted + 1)
            drafts = rest[num_columns : num_columns + row.width]
            outcomes.append(Outcome(tokens=rest[: accepted + 1], drafts=drafts))
        return outcomes

    def _chosen_cycle(self, rows: list[Row], inputs: Inputs, meanwhile: Callable[[], None] | None) -> Cycle:
        """A cycle of rows that argmax alone does not decide."""
        watch = Stopwatch(self.device)
        watch.mark()
        choice = CycleChoice(rows, inputs, self.passes, self.graphs, self._settings_of(rows))
        is_drafting = any(row.width for row in rows)
        if is_drafting:
            choice.draft()
        watch.mark()
        read, read_logprobs = choice.verify()
        watch.mark()  # before the read, which waits for it
        if meanwhile is not None:
            meanwhile()
        outcomes = self._commit(rows, read(), choice.num_columns)
        choice.report(outcomes, read_logprobs)
        draft_ms = watch.between(0, 1) if is_drafting else 0.0
        return Cycle(outcomes=outcomes, draft_ms=draft_ms, verify_ms=watch.between(1, 2))

    def _settings_of(self, rows: Sequence[Row]) -> Settings:
        """The rows' settings on the device, sent when they are not those of the last chosen cycle."""
        if self._settings is None or not self._settings.are_of(rows):
            self._settings = Settings.of_rows(rows, self.device)
        return self._settings

    def _make_writable(self, row: int, start: int, end: int) -> None:
        self.tables.reserve(row, end)
        self.passes.copy_pages(self.tables.writable(row, start, end))


def check_context(num_tokens: int, max_positions: int) -> None:
    """`ValueError` for a row of more tokens, new ones included, than the model has positions."""
    if num_tokens > max_positions:
        raise ValueError(
            f"prompt and max_new_tokens are {num_tokens} tokens, the model's context is {max_positions}: "
            "the engine decodes nothing beyond it; ask for fewer, or decode with the portable backend"
        )


def affordable_bytes(device: torch.device) -> int:
    """What pages may take of a device's memory as it is now."""
    if device.type != "cuda":
        return CPU_BYTES
    torch.cuda.empty_cache()  # what joining the weights freed is free
    free = torch.cuda.mem_get_info(device)[0]
    return max(0, min(int(FREE_SHARE * free), free - RESERVED_BYTES))


def page_bytes(model: nn.Module, page_slots: int) -> int:
    """Bytes of a page of this many slots: keys and values of all layers, as many as the base model's own cache has."""
    config = model.config
    num_numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return num_numbers * page_slots * model.dtype.itemsize


def position_bytes(weights: Weights) -> int:
    """Bytes that a pass computes with at once for each position: a layer's heads in fp32, its gated values, and three
    times hidden states and the same normed."""
    layer, num_bytes = weights.layers[0], weights.embedding_VD.element_size()
    num_qkv, num_gated = len(layer.attention["ar"].qkv.weight_ED), len(layer.mlp["ar"].gate_up.weight_ED) // 2
    return 4 * num_qkv + num_bytes * (num_gated + 6 * weights.embedding_VD.shape[1])


def is_plain(row: Row) -> bool:
    """Whether a row is decided by argmax alone, so that logits need not be kept."""
    has_wishes = row.processor is not None or row.wants_logprobs or row.wants_logits
    return row.sampling.effective_rule == "greedy" and not has_wishes


class _Ahead(NamedTuple):
    """Drafts of a cycle that is not asked for yet."""

    inputs: Inputs
    rows: list[int]
    widths: list[int]
    watch: Stopwatch

    def is_of(self, rows: Sequence[Row]) -> bool:
        """Whether it has enough drafts for these rows. Where a row's pages change without `_forget_ahead`, they are
        copies, or lie behind what it read."""
        if self.rows != [row.index for row in rows]:
            return False
        return all(row.width <= width for row, width in zip(rows, self.widths, strict=True))
