"""The passes of a cycle and of a prompt, as functions of fixed shapes over static buffers: no host reads, nothing sized
by a value.

`Inputs` are the buffers of one shape: B rows, W positions of each, tables of M pages. Rows and columns that a batch
does not fill are padding. A padding row has length 0 and the spare page alone, where what it writes is nobody's; the
columns behind a row's width write behind its length, into its own last page or the spare one. Neither is ever seen:
masks end at lengths and widths.

`draft` and `verify` are the two halves of a greedy cycle; the second leaves anchors and lengths on the device as the
next cycle needs them. `hold_draft` and `hold_verify` are the same passes for whoever needs logits. The host reads one
tensor a cycle, and writes only what it knows to have changed.

    B = rows, W = positions of a pass, J = W - 1 drafts, R = B x W, M = pages of a table, D = hidden width, V =
    vocabulary, L = layers, P = pages, S = slots of a page, G = key/value heads, H = head dimension
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from orthrus.decoding.verify import accept_equal
from orthrus.engine.operations import Ops
from orthrus.engine.reference import Pages, Rotary
from orthrus.engine.weights import AttentionWeights, LayerWeights, Matrix, Weights
from orthrus.model.attention import View

PADDING = -1
"""The width of a row of `Inputs` that no sequence fills."""


class Shape(NamedTuple):
    """What the computation of a pass is fixed for."""

    num_rows: int
    num_columns: int
    num_pages: int
    """Pages of a row's table: M."""


class Inputs:
    """The static buffers of one shape, and what the host knows to be in them."""

    def __init__(self, shape: Shape, *, spare_page: int, like_VD: Tensor, hidden_RD: Tensor | None = None):
        num_rows, num_columns, num_pages = shape
        device = like_VD.device
        self.shape = shape
        self.spare_page = spare_page
        numbers_3B = torch.zeros(3, num_rows, dtype=torch.int32, device=device)
        numbers_3B[2] = PADDING
        self.anchors_B, self.lengths_B, self.widths_B = numbers_3B
        """`widths_B` are drafts, `PADDING` where there is no row. All int32."""
        self.tables_BM = torch.full((num_rows, num_pages), spare_page, dtype=torch.int32, device=device)
        self.ids_BW = torch.zeros(num_rows, num_columns, dtype=torch.long, device=device)
        self.result_BX = torch.zeros(num_rows, 2 * num_columns, dtype=torch.long, device=device)
        """Accepted drafts, the W committed tokens, the J drafts: what the host reads."""
        num_positions = num_rows * num_columns
        self.hidden_RD = like_VD.new_zeros(num_positions, like_VD.shape[1]) if hidden_RD is None else hidden_RD
        """The last pass's hidden states, where they were asked for; it may be that of other inputs, too."""
        self._numbers_3B = numbers_3B
        self._known: list[list[int]] | None = None
        """Anchors and lengths."""
        self._widths: list[int] | None = [PADDING] * num_rows
        self._pages: list[Sequence[int]] = [()] * num_rows
        self._host_BX: Tensor | None = None

    def write(
        self, anchors: Sequence[int], lengths: Sequence[int], widths: Sequence[int], pages: Sequence[Sequence[int]]
    ) -> bool:
        """Put a batch in; what is there already is not sent again. Whether anchors and lengths were there."""
        assert len(anchors) <= self.shape.num_rows, f"{len(anchors)} rows do not fit {self.shape}"
        places, padded = self._padded(anchors, lengths), self._padded_widths(widths)
        is_same = places == self._known
        if not is_same or padded != self._widths:
            self._send(self._numbers_3B, [*places, padded])
            self._known, self._widths = places, padded
        self._write_pages(pages)
        return is_same

    def follow(
        self,
        other: "Inputs",
        widths: Sequence[int],
        pages: Sequence[Sequence[int]],
        *,
        last_slots: Sequence[int] | None,
    ) -> None:
        """Put in the batch of `other`, at these widths.

        Its anchors and lengths are copied on the device, which has moved them on; `know` says later what they are.

        `last_slots`: where a row's last token will have its slot; no draft is wanted for it or behind it. None: no row
        can come near it.
        """
        assert other.shape.num_rows == self.shape.num_rows, f"rows of {other.shape} have no place in {self.shape}"
        self.forget()
        if other is not self:
            self._numbers_3B[:2].copy_(other._numbers_3B[:2])
        if (padded := self._padded_widths(widths)) != self._widths:
            self._send(self.widths_B, padded)
            self._widths = padded
        if last_slots is not None:
            rooms_B = torch.empty_like(self.widths_B)
            self._send(rooms_B, [*last_slots, *[0] * (self.shape.num_rows - len(last_slots))])
            torch.minimum(self.widths_B, rooms_B.sub_(self.lengths_B).sub_(1), out=self.widths_B)
            self._widths = None
        self._write_pages(pages)

    def write_ids(self, ids: Sequence[int]) -> None:
        """Put in the tokens of a single row; columns behind them keep whatever was there."""
        self._send(self.ids_BW[0, : len(ids)], ids)

    def _write_pages(self, pages: Sequence[Sequence[int]]) -> None:
        padding = [()] * (self.shape.num_rows - len(pages))
        for b, own in enumerate([*pages, *padding]):
            if own != self._pages[b]:
                assert len(own) <= self.shape.num_pages, f"{len(own)} pages do not fit {self.shape}"
                table = [*own, *[self.spare_page] * (self.shape.num_pages - len(own))]
                self._send(self.tables_BM[b], table)
                self._pages[b] = own

    @staticmethod
    def _send(to: Tensor, numbers: Sequence) -> None:
        """Copy from pinned memory: from any other the host would wait until the device has done what it was given."""
        to.copy_(torch.tensor(numbers, dtype=to.dtype, pin_memory=to.is_cuda), non_blocking=True)

    def begin_read(self) -> Callable[[], list[list[int]]]:
        """Have `result_BX` copied to the host as it is at this point of the device's work; waits when called."""
        if self.result_BX.is_cuda and self._host_BX is None:
            self._host_BX = torch.empty(self.result_BX.shape, dtype=torch.long, pin_memory=True)
        return begin_read(self.result_BX, self._host_BX)

    def addresses(self) -> tuple[int, ...]:
        """Where the buffers lie: what a captured graph reads and writes."""
        buffers = (self.anchors_B, self.tables_BM, self.ids_BW, self.result_BX, self.hidden_RD)
        return tuple(buffer.data_ptr() for buffer in buffers)

    def forget(self) -> None:
        """The device is about to move anchors and lengths on, and nobody knows where to yet."""
        self._known = None

    def know(self, anchors: Sequence[int], lengths: Sequence[int]) -> None:
        """Where it moved them."""
        self._known = self._padded(anchors, lengths)

    def _padded(self, anchors: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        padding = [0] * (self.shape.num_rows - len(anchors))
        return [[*anchors, *padding], [*lengths, *padding]]

    def _padded_widths(self, widths: Sequence[int]) -> list[int]:
        return [*widths, *[PADDING] * (self.shape.num_rows - len(widths))]


def begin_read(there: Tensor, host: Tensor | None = None) -> Callable[[], list]:
    """Have a tensor copied to the host, to pinned memory there unless some is given; waits for it when called."""
    if not there.is_cuda:
        return there.tolist
    if host is None:
        host = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
    here, copied = host, torch.cuda.Event()
    here.copy_(there, non_blocking=True)
    copied.record()

    def read() -> list:
        copied.synchronize()
        return here.tolist()

    return read


class Passes:
    """Both views' passes over paged keys and values."""

    def __init__(
        self,
        weights: Weights,
        ops: Ops,
        rotary: Rotary,
        *,
        num_pages: int,
        page_slots: int,
        mask_token: int | None,
    ):
        self.weights, self.ops, self.rotary = weights, ops, rotary
        self._mask_token = 0 if mask_token is None else mask_token
        like = weights.embedding_VD
        shape = (len(weights.layers), num_pages, page_slots, weights.num_groups, weights.head_dim)
        # Zeros, not whatever was there: a weight of 0 times a value that is not a number is not 0.
        self.keys_LPSGH, self.values_LPSGH = like.new_zeros(shape), like.new_zeros(shape)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (old, new) in all layers."""
        if copies:
            old, new = torch.tensor(copies, device=self.keys_LPSGH.device).T
            for pool in (self.keys_LPSGH, self.values_LPSGH):
                pool[:, new] = pool[:, old]

    def run(self, view: View, inputs: Inputs) -> Tensor:
        """All layers in one view over `inputs.ids_BW`; final hidden states, normed. [R, D].

        The AR view writes the pages of its positions, the diffusion view buffers of its own.
        """
        weights, ops = self.weights, self.ops
        own = widths_B = None
        if view == "diffusion":  # a row of padding sees its first position
            widths_B = (inputs.widths_B + 1).clamp(min=1)
        # Behind this kernel of torch's all overlap, and read widths before they wait.
        hidden_RD = F.embedding(inputs.ids_BW.flatten(), weights.embedding_VD)
        if view == "diffusion":
            block = (len(hidden_RD), weights.num_groups, weights.head_dim)
            own = (hidden_RD.new_empty(block), hidden_RD.new_empty(block))
        first, *later = weights.layers
        next_norms = [NextNorm(layer.input_norm_D, layer.input_eps) for layer in later]
        next_norms.append(NextNorm(weights.norm_D, weights.eps))
        normed_RD = ops.rms_norm(hidden_RD, first.input_norm_D, first.input_eps)
        of_layers = zip(weights.layers, next_norms, self.keys_LPSGH, self.values_LPSGH, strict=True)
        for layer, next_norm, keys, values in of_layers:
            pages = Pages(keys, values, inputs.tables_BM, inputs.lengths_B)
            block = _Block(pages, inputs.shape.num_columns, own, widths_B)
            hidden_RD, normed_RD = self._layer(layer, view, hidden_RD, normed_RD, next_norm, block)
        return normed_RD

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to the AR view's logits [..., V] in the model's dtype."""
        return self.ops.linear(hidden.flatten(0, -2), self.weights.head["ar"].weight_ED).unflatten(0, hidden.shape[:-1])

    # What is captured: functions of `inputs` alone that leave their results in it.

    def prefill(self, inputs: Inputs) -> None:
        """The AR view over a chunk of a prompt, into `hidden_RD`."""
        inputs.hidden_RD.copy_(self.run("ar", inputs))

    def hold_draft(self, inputs: Inputs) -> None:
        """The diffusion view over anchors and masks, into `hidden_RD`; position j of a block predicts j + 1."""
        inputs.hidden_RD.copy_(self._run_block(inputs))

    def hold_verify(self, inputs: Inputs) -> None:
        """The AR view over anchors and drafts, into `hidden_RD`."""
        inputs.hidden_RD.copy_(self._run_text(inputs))

    def draft(self, inputs: Inputs) -> None:
        """The diffusion view's greedy drafts, into `ids_BW` behind the anchors."""
        hidden_BJD = self._run_block(inputs).unflatten(0, inputs.ids_BW.shape)[:, :-1]
        drafts = self._argmax("diffusion", hidden_BJD.flatten(0, 1))
        inputs.ids_BW[:, 1:] = drafts.unflatten(0, hidden_BJD.shape[:2])

    def verify(self, inputs: Inputs) -> None:
        """The AR view over anchors and drafts: keep, correct, and move anchors and lengths on. Into `result_BX`."""
        targets = self._argmax("ar", self._run_text(inputs))
        num_accepted_B, committed_BW = self.accept(inputs, targets.unflatten(0, inputs.ids_BW.shape))
        torch.cat([num_accepted_B[:, None], committed_BW, inputs.ids_BW[:, 1:]], dim=1, out=inputs.result_BX)
        is_row_B = inputs.widths_B != PADDING
        anchors_B = committed_BW.gather(1, num_accepted_B[:, None])[:, 0]
        inputs.anchors_B.copy_(anchors_B * is_row_B)
        inputs.lengths_B.add_((num_accepted_B + 1) * is_row_B)

    def _argmax(self, view: View, hidden_RD: Tensor) -> Tensor:
        head = self.weights.head[view]
        return self.ops.head_argmax(hidden_RD, head.weight_ED, scale_V=head.scale_E)

    def accept(self, inputs: Inputs, targets_BW: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts each row keeps, and what it commits; benchmarks force another count. [B], [B, W]."""
        return accept_equal(inputs.ids_BW[:, 1:], targets_BW, inputs.widths_B)

    def _run_block(self, inputs: Inputs) -> Tensor:
        inputs.ids_BW.fill_(self._mask_token)
        inputs.ids_BW[:, 0] = inputs.anchors_B
        return self.run("diffusion", inputs)

    def _run_text(self, inputs: Inputs) -> Tensor:
        inputs.ids_BW[:, 0] = inputs.anchors_B
        return self.run("ar", inputs)

    def _layer(
        self,
        layer: LayerWeights,
        view: View,
        hidden_RD: Tensor,
        normed_RD: Tensor,
        next_norm: "NextNorm",
        block: "_Block",
    ) -> tuple[Tensor, Tensor]:
        """Hidden states, as they are and normed for this layer, to the same behind it."""
        attention, mlp = layer.attention[view], layer.mlp[view]
        # No name keeps what has been read: of a chunk of a prompt each tensor is megabytes.
        hidden_RD, normed_RD = self._add_and_norm(
            self._mix(attention, normed_RD, block), attention.out, hidden_RD,
            NextNorm(layer.post_norm_D, layer.post_eps),
        )  # fmt: skip
        return self._add_and_norm(
            self.ops.swiglu(normed_RD, mlp.gate_up.weight_ED, scale_2F=mlp.gate_up.scale_E), mlp.down, hidden_RD,
            next_norm,
        )  # fmt: skip

    def _mix(self, attention: AttentionWeights, normed_RD: Tensor, block: "_Block") -> Tensor:
        """Attention's heads side by side, before they are projected. [R, N * H]."""
        pages, width, own, widths_B = block
        q_RNH = self.ops.project_heads(
            normed_RD, attention.qkv.weight_ED, pages, self.rotary, attention.norms, num_heads=self.weights.num_heads,
            width=width, own=own, bias_E=attention.qkv.bias_E, scale_E=attention.qkv.scale_E,
        )  # fmt: skip
        return self.ops.attend(q_RNH, pages, width=width, scale=attention.scale, own=own, widths_B=widths_B)

    def _add_and_norm(
        self, x: Tensor, matrix: Matrix, hidden_RD: Tensor, next_norm: "NextNorm"
    ) -> tuple[Tensor, Tensor]:
        """Hidden states with a product added, as they are and normed."""
        return self.ops.linear_and_norm(
            x, matrix.weight_ED, bias_E=matrix.bias_E, scale_E=matrix.scale_E, residual_RE=hidden_RD,
            norm_E=next_norm.norm_D, eps=next_norm.eps,
        )  # fmt: skip


class NextNorm(NamedTuple):
    """The norm that comes after hidden states."""

    norm_D: Tensor
    eps: float


class _Block(NamedTuple):
    """What a layer's attention reads besides queries."""

    pages: Pages
    width: int
    own: tuple[Tensor, Tensor] | None
    widths_B: Tensor | None
