"""The kernels of training's attention in Triton's interpreter, which runs them on a CPU, against the dense twin."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.model.masks import Intervals, block_training_intervals, document_intervals
from orthrus.training.anchors import Blocks
from orthrus.training.forward import dense_attend

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("tests/conftest.py has it interpret where there is no GPU", allow_module_level=True)
from orthrus.training import interval_attention as kernels  # noqa: E402

SCALE = 0.3


def heads(num_heads: int, num_places: int, head_dim: int) -> Tensor:
    """Random queries, keys or values as projections leave them: places before heads in memory. [2, N, places, H]."""
    return torch.randn(2, num_places, num_heads, head_dim).transpose(1, 2).requires_grad_()


def both(q: Tensor, clean: tuple, own: tuple | None, intervals: Intervals) -> tuple[Tensor, Tensor]:
    """What the kernels give, and what their twin gives."""
    fast = kernels.interval_attention(q, clean, own, intervals, scale=SCALE)
    keys, values = clean if own is None else (torch.cat(pair, dim=2) for pair in zip(clean, own, strict=True))
    attention: Any = SimpleNamespace(scaling=SCALE)
    return fast, dense_attend(attention, q, keys, values, intervals.mask(clean[0].shape[2]))


@pytest.mark.parametrize("num_clean", [33, 150])
@pytest.mark.parametrize("groups", [((32, 2), (16, 1), (5, 3)), ((8, 11),), ((2, 1),)])
@pytest.mark.parametrize(("num_heads", "num_groups", "head_dim"), [(4, 2, 16), (3, 3, 24), (4, 1, 40)])
def test_blocks_mix_and_learn_as_under_the_dense_mask(
    groups: tuple, num_heads: int, num_groups: int, head_dim: int, num_clean: int
) -> None:
    """Values and all three gradients, at odd sizes: tiles cut by anchors, documents, blocks and ends."""
    torch.manual_seed(0)
    blocks = Blocks.of(groups)
    anchors = torch.randint(num_clean, (2, sum(count for _, count in groups))).sort(dim=1).values
    anchors[0, 0] = 0  # a block that sees nothing but itself
    document = torch.tensor([[0] * num_clean, [0] * 9 + [1] * 20 + [2] * (num_clean - 29)])
    intervals = block_training_intervals(anchors, blocks.block_Q, blocks.offset_Q, document)
    num_queries = len(blocks.block_Q)
    clean = tuple(heads(num_groups, num_clean, head_dim).detach() for _ in range(2))
    own = tuple(heads(num_groups, num_queries, head_dim) for _ in range(2))
    q = heads(num_heads, num_queries, head_dim)
    fast, slow = both(q, clean, own, intervals)
    torch.testing.assert_close(fast, slow)
    direction = torch.randn_like(slow)
    for name, one, other in zip(
        ("queries", "keys", "values"),
        torch.autograd.grad(fast, (q, *own), direction), torch.autograd.grad(slow, (q, *own), direction), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"gradient of the {name}: {text}")


def test_documents_are_read_as_under_the_dense_mask() -> None:
    """The AR pass of isolated rows, which has no block keys."""
    torch.manual_seed(0)
    document = torch.tensor([[0] * 70, [0] * 3 + [1] * 40 + [2] * 20 + [-1] * 7])
    clean = tuple(heads(2, 70, 16).detach() for _ in range(2))
    fast, slow = both(heads(4, 70, 16).detach(), clean, None, document_intervals(document))
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("is_half", [False, True])
def test_whole_tiles_of_another_document_are_not_read(is_half: bool) -> None:
    """Queries of a tile that begin in two documents, both longer than a tile of keys; fp16 has bf16's tiles."""
    torch.manual_seed(0)
    document = torch.tensor([[0] * 170 + [1] * 160] * 2)
    dtype, blocks = torch.float16 if is_half else torch.float32, Blocks.of(((4, 40),))
    anchors = torch.tensor([[166, 168, *range(292, 330)], [100, *range(291, 330)]])
    intervals = block_training_intervals(anchors, blocks.block_Q, blocks.offset_Q, document)
    clean = tuple(heads(2, 330, 16).detach().to(dtype) for _ in range(2))
    own = tuple(heads(2, 160, 16).detach().to(dtype).requires_grad_() for _ in range(2))
    q = heads(4, 160, 16).detach().to(dtype).requires_grad_()
    fast, slow = both(q, clean, own, intervals)
    direction = torch.randn_like(slow)
    gradients = [torch.autograd.grad(mixed, (q, *own), direction) for mixed in (fast, slow)]
    limits: Any = dict(rtol=1e-2, atol=4e-3) if is_half else {}  # a few roundings of fp16
    torch.testing.assert_close([fast, *gradients[0]], [slow, *gradients[1]], **limits)
    q = heads(4, 330, 16).detach().to(dtype)
    torch.testing.assert_close(*both(q, clean, None, document_intervals(document)), **limits)


def test_the_ar_pass_has_no_gradient() -> None:
    """It is frozen; a gradient of zero would look like one."""
    keys, values = heads(2, 7, 16), heads(2, 7, 16)
    one_document = document_intervals(torch.zeros(2, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="no gradient for clean keys"):
        kernels.interval_attention(heads(2, 7, 16), (keys, values), None, one_document, scale=SCALE)
    clean = keys.detach(), values.detach()
    mixed = kernels.interval_attention(heads(2, 7, 16), clean, None, one_document, scale=SCALE)
    with pytest.raises(NotImplementedError, match="frozen view"):
        mixed.sum().backward()
    with pytest.raises(ValueError, match="in one dtype"):
        kernels.interval_attention(heads(2, 7, 16).half(), clean, None, one_document, scale=SCALE)


def test_heads_that_do_not_lie_together_are_refused() -> None:
    """The kernels would read other numbers."""
    clean = torch.randn(2, 2, 16, 7).transpose(2, 3), torch.randn(2, 2, 16, 7).transpose(2, 3)
    with pytest.raises(ValueError, match="lie together"):
        kernels.interval_attention(
            heads(2, 7, 16), clean, None, document_intervals(torch.zeros(2, 7, dtype=torch.long)), scale=SCALE
        )
