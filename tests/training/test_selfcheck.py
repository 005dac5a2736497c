"""The check before the first step: right passes agree with decoding's, each wrong mask or position is found."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orthrus.config import OrthrusConfig
from orthrus.model.modeling import OrthrusLM
from orthrus.training import forward
from orthrus.training.anchors import Blocks
from orthrus.training.recipe import ViewStage
from orthrus.training.rows import Rows
from orthrus.training.selfcheck import SAME, agreement
from orthrus.training.trainer import ViewTask

GROUPS = ((8, 3), (4, 2))


def rows_of(*, isolated: bool) -> Rows:
    """Two rows, of two documents each where they are isolated."""
    ids = torch.randint(0, 90, (2, 48))
    document = torch.zeros(2, 48, dtype=torch.long)
    document[:, 20:] = int(isolated)
    return Rows(ids, document, document + 1, isolated=isolated)


def found(config: OrthrusConfig, *, isolated: bool = True, dtype: torch.dtype = torch.float32) -> float:
    """The agreement of a random model whose views differ."""
    torch.manual_seed(0)
    model = OrthrusLM(config).to(dtype)
    task, rows = ViewTask(model, ViewStage(blocks=GROUPS)), rows_of(isolated=isolated)
    anchors = Blocks.of(GROUPS).sample(rows.anchorable_BT, torch.Generator().manual_seed(0))
    return agreement(task, rows, anchors)


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.99999), (torch.bfloat16, 0.999)])
def test_right_passes_agree(tiny_config: OrthrusConfig, isolated: bool, dtype: torch.dtype, least: float) -> None:
    assert found(tiny_config, isolated=isolated, dtype=dtype) > least > SAME


def causal(mask_BQK: Tensor, block_Q: Tensor, num_clean: int) -> Tensor:
    """A block's position sees only what stands before it in the block."""
    order = torch.ones(len(block_Q), len(block_Q), dtype=torch.bool).tril()
    return torch.cat([mask_BQK[:, :, :num_clean], mask_BQK[:, :, num_clean:] & order], dim=2)


def blind(mask_BQK: Tensor, block_Q: Tensor, num_clean: int) -> Tensor:
    """Blocks see no clean token."""
    return torch.cat([torch.zeros_like(mask_BQK[:, :, :num_clean]), mask_BQK[:, :, num_clean:]], dim=2)


def leaking(mask_BQK: Tensor, block_Q: Tensor, num_clean: int) -> Tensor:
    """Blocks see the clean row up to their anchor's successor."""
    shifted = torch.roll(mask_BQK[:, :, :num_clean], 2, dims=2) | mask_BQK[:, :, :num_clean]
    return torch.cat([shifted, mask_BQK[:, :, num_clean:]], dim=2)


@pytest.mark.parametrize("wrong", [causal, blind, leaking])
def test_a_wrong_mask_is_found(
    tiny_config: OrthrusConfig, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, Tensor, int], Tensor]
) -> None:
    right = forward.block_training_mask

    def planted(anchors_BA: Tensor, block_Q: Tensor, num_clean: int, document_BT: Tensor | None = None) -> Tensor:
        return wrong(right(anchors_BA, block_Q, num_clean, document_BT), block_Q, num_clean)

    monkeypatch.setattr(forward, "block_training_mask", planted)
    assert found(tiny_config) < SAME


def test_wrong_positions_are_found(tiny_config: OrthrusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Blocks.inputs

    def planted(self: Blocks, *arguments: object) -> tuple[Tensor, Tensor]:
        ids_BQ, positions_BQ = right(self, *arguments)  # type: ignore[arg-type]
        return ids_BQ, positions_BQ - self.offset_Q

    monkeypatch.setattr(Blocks, "inputs", planted)
    assert found(tiny_config) < SAME


def test_a_row_without_a_reply_says_nothing(tiny_config: OrthrusConfig) -> None:
    task, rows = ViewTask(OrthrusLM(tiny_config), ViewStage(blocks=GROUPS)), rows_of(isolated=True)
    silent = Rows(rows.ids_BT, rows.document_BT, torch.zeros_like(rows.reply_BT))
    assert agreement(task, silent, torch.full((2, 5), 30)) == 1.0
