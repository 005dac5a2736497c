"""The kernel that puts heads in their places against its twin; in the interpreter or on a GPU."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthrus.engine import reference
from orthrus.engine.reference import HeadNorms, Pages, Rotary
from tests.engine.interpreter import DEVICE, gpu_arithmetic  # noqa: F401
from tests.engine.passes import of_rows, planted, random_pages

place = pytest.importorskip("orthrus.engine.kernels.place")
from orthrus.engine.kernels import linear  # noqa: E402
from orthrus.engine.kernels import tiles as cuts  # noqa: E402
from tests.engine.products import SPREAD_ROWS, draw, weight_of  # noqa: E402

LENGTHS, WIDTH = [0, 14], 3
SHAPES = [(4, 2, 64), (7, 1, 80), (3, 3, 96), (8, 1, 128)]


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, *, norms: bool, lengths: Sequence[int] = LENGTHS
) -> tuple[Tensor, Pages, Rotary, HeadNorms | None]:
    """A projection, pages of 8 slots, rotary tables and, if asked, norms of the pass."""
    num_heads, num_groups, head_dim = shape
    pages = random_pages(
        list(lengths), WIDTH, num_groups=num_groups, head_dim=head_dim, page_slots=8, table_pages=4, dtype=dtype
    )
    qkv = torch.randn(len(lengths) * WIDTH, (num_heads + 2 * num_groups) * head_dim).to(DEVICE, dtype)
    angles = torch.outer(torch.arange(32), 2.0 ** -torch.arange(head_dim // 2)).repeat(1, 2)
    rotary = Rotary(angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype))
    weights = torch.rand(2, head_dim).to(DEVICE, dtype) + 0.5
    return qkv, pages, rotary, HeadNorms(weights[0], weights[1], 1e-3) if norms else None


def blank(pages: Pages, num_positions: int, *, drafts: bool) -> tuple[Pages, tuple[Tensor, Tensor] | None]:
    """Pages of zeros and, for a draft pass, buffers of its own."""
    keys, values = torch.zeros_like(pages.keys_PSGH), torch.zeros_like(pages.values_PSGH)
    block = num_positions, *keys.shape[2:]
    own = (keys.new_zeros(block), keys.new_zeros(block)) if drafts else None
    return pages._replace(keys_PSGH=keys, values_PSGH=values), own


def written(q: Tensor, pages: Pages, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the pages or buffers that a pass has written."""
    assert own is None or not (pages.keys_PSGH.any() or pages.values_PSGH.any()), "a draft pass left a trace"
    return q, *(own or pages[:2])


def placed(module, qkv: Tensor, pages: Pages, rotary: Rotary, norms: HeadNorms | None, *, num_heads: int,
           width: int = WIDTH, drafts: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, and the pages or buffers afterwards, from zeros."""
    pages, own = blank(pages, len(qkv), drafts=drafts)
    q = module.place_heads(qkv, pages, rotary, norms, num_heads=num_heads, width=width, own=own)
    return written(q, pages, own)


def check_twin(shape: tuple[int, int, int], dtype: torch.dtype, *, norms: bool, drafts: bool) -> None:
    """With bf16 and norms: a mean summed in another order may move the norm by one rounding, 2^-8, which is carried
    through two products of at most its size, each rounded, and their sum."""
    given = inputs(shape, dtype, norms=norms)
    fast = placed(place, *given, num_heads=shape[0], drafts=drafts)
    slow = placed(reference, *given, num_heads=shape[0], drafts=drafts)
    check_close(fast, slow, dtype, norms=norms)


def check_close(fast: tuple[Tensor, ...], slow: tuple[Tensor, ...], dtype: torch.dtype, *, norms: bool) -> None:
    """As `check_twin` says."""
    for name, one, other in zip(("queries", "keys", "values"), fast, slow, strict=True):
        if name == "values" or (dtype == torch.bfloat16 and not norms):
            assert torch.equal(one, other), f"{name} are not the twin's"
        elif dtype == torch.float32:
            torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
        else:
            off = (one != other).float().mean().item()
            assert off < 0.02, f"{off:.1%} of the {name} are rounded differently"
            torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7 * other.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("drafts", [False, True], ids=["pages", "own"])
@pytest.mark.parametrize(("dtype", "norms"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_heads_are_placed_as_by_the_twin(
    monkeypatch, shape: tuple[int, int, int], dtype: torch.dtype, drafts: bool, norms: bool
) -> None:
    monkeypatch.setattr(place, "TILE", place.TILE | dict(TILE_T=16))  # fewer programs to interpret
    check_twin(shape, dtype, norms=norms, drafts=drafts)


def projected(
    x: Tensor, weight: Tensor, pages: Pages, rotary: Rotary, norms: HeadNorms | None, *, num_heads: int, drafts: bool,
    **after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`placed`, of rows and the weight of their projection."""
    pages, own = blank(pages, len(x), drafts=drafts)
    q = place.project_heads(x, weight, pages, rotary, norms, num_heads=num_heads, width=WIDTH, own=own, **after)
    return written(q, pages, own)


SPLIT = (144, 140, cuts.Tiles(64, 32, 3, 4, 3))
"""A projection to the heads of (5, 2, 16) whose sums have three parts."""


@pytest.mark.parametrize("num_sequences", [2, 44], ids=["spread", "many rows"])
@pytest.mark.parametrize("is_fp8", [False, True], ids=["same", "fp8"])
@pytest.mark.parametrize(
    ("dtype", "norms", "has_bias", "drafts"),
    [(torch.float32, True, True, False), (torch.bfloat16, True, False, True), (torch.bfloat16, False, True, True)],
)
def test_projecting_and_placing_is_one_after_the_other(
    monkeypatch, dtype: torch.dtype, norms: bool, has_bias: bool, drafts: bool, is_fp8: bool, num_sequences: int
) -> None:
    """Bit for bit, but for norms on a GPU, where a head's numbers may lie, and so be summed, in another order."""
    monkeypatch.setattr(place, "TILE", place.TILE | dict(TILE_T=16))
    num_outputs, width, tiles = SPLIT
    for num_bytes in (1, 2, 4):
        monkeypatch.setitem(cuts.TILES, (num_outputs, width, num_bytes), tiles)
    monkeypatch.setattr(linear, "MAX_SPREAD_ROWS", SPREAD_ROWS)
    lengths = [(7 * i) % 20 for i in range(num_sequences)]
    assert (num_sequences * WIDTH > linear.MAX_SPREAD_ROWS) == (num_sequences == 44)
    _, pages, rotary, head_norms = inputs((5, 2, 16), dtype, norms=norms, lengths=lengths)
    x = draw(num_sequences * WIDTH, width, dtype=dtype)
    weight, scale = weight_of(num_outputs, width, dtype, is_fp8)
    after = dict(bias_E=draw(num_outputs, dtype=dtype) if has_bias else None, scale_E=scale)
    found = projected(x, weight, pages, rotary, head_norms, num_heads=5, drafts=drafts, **after)
    qkv = linear.linear(x, weight, **after)
    expected = placed(place, qkv, pages, rotary, head_norms, num_heads=5, drafts=drafts)
    for name, one, other in zip(("queries", "keys", "values"), found, expected, strict=True):
        if DEVICE == "cpu" or not norms or name == "values":
            assert torch.equal(one, other), f"{name} are not those of the projection"
    slow = placed(reference, qkv, pages, rotary, head_norms, num_heads=5, drafts=drafts)
    check_close(found, slow, dtype, norms=norms)


def check_bits() -> None:
    """What a position gets is the same in a pass of one position and of some rows."""
    qkv, pages, rotary, norms = inputs((5, 2, 16), torch.bfloat16, norms=True)
    together = placed(place, qkv, pages, rotary, norms, num_heads=5)
    q = together[0].unflatten(0, (-1, WIDTH))
    rows = [1]
    some = placed(
        place, qkv.unflatten(0, (-1, WIDTH))[rows].flatten(0, 1), of_rows(pages, rows), rotary, norms, num_heads=5
    )
    assert torch.equal(some[0].unflatten(0, (-1, WIDTH)), q[rows]), "bits depend on the other rows"
    for w in range(WIDTH):
        later = pages._replace(lengths_B=pages.lengths_B + w)
        alone = placed(place, qkv[w::WIDTH].contiguous(), later, rotary, norms, num_heads=5, width=1)
        assert torch.equal(alone[0], q[:, w]), f"plain decoding and verification differ at position {w}"
        for one, all_of_them in zip(alone[1:], together[1:], strict=True):
            assert torch.equal(one[one != 0], all_of_them[one != 0]), f"stored bits differ at position {w}"


def test_a_position_has_its_bits_in_any_pass() -> None:
    check_bits()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.sum(x * x, 1) / H", "(tl.sum(x * x, 1) * 0 + tl.sum(tl.sum(x * x, 1), 0)) / H"),
        ("* cos[None, :]).to(dtype).to(tl.float32)", "* cos[None, :])"),
        ("-1.0, 1.0)", "1.0, -1.0)"),
        ("position // S)", "position // S + 1)"),
        ("key, value = heads - NUM_HEADS,", "key, value = heads,"),
    ],
    ids=["a norm over several heads", "a product not rounded", "turned the other way", "the next page", "q for k"],
)
def test_a_bug_is_noticed(monkeypatch, tmp_path: Path, old: str, new: str) -> None:
    monkeypatch.setattr(place, "kernels", planted(place.place_kernels, tmp_path, old=old, new=new))
    with pytest.raises(AssertionError):
        check_twin(SHAPES[0], torch.bfloat16, norms="sum" in old, drafts=False)
