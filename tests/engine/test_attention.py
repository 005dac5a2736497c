"""The engine's attention against its twin, and the bits of a position in any pass; in the interpreter or on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.engine import reference
from orthrus.engine.reference import Pages
from tests.engine.interpreter import DEVICE, gpu_arithmetic  # noqa: F401
from tests.engine.passes import fp32, in_fp32, of_rows, planted, random_pages

attention = pytest.importorskip("orthrus.engine.kernels.attention")

SCALE = 0.3
REAL_NAMES = ("FIRST_SLOTS", "SHARE", "DOUBLINGS", "TILES", "MERGE", "ALL_PROGRAMS")
REAL = {name: getattr(attention, name) for name in REAL_NAMES}

HOW = {"splits": 1 << 40, "whole rows": 0}
"""Each way to spread a pass over programs, by SCRATCH_BYTES."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 16, 32 and 64 slots in tiles of 16: a program of the interpreter costs milliseconds a tile.

    They begin at 0, 16, 32, 48, 64, 96, 128, 192, ...
    """
    for name, value in dict(FIRST_SLOTS=16, SHARE=2, DOUBLINGS=2, ALL_PROGRAMS=0).items():
        monkeypatch.setattr(attention, name, value)
    tile_by(monkeypatch, 32)
    monkeypatch.setattr(attention, "MERGE", dict(TILE_M=64, num_warps=4, AHEAD=3))


def as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REAL.items():
        monkeypatch.setattr(attention, name, value)


def tile_by(monkeypatch: pytest.MonkeyPatch, num_heads: int) -> None:
    tile = dict(TILE_M=num_heads, TILE_K=16, num_warps=4, num_stages=1)
    monkeypatch.setattr(attention, "TILES", {2: tile, 4: tile})


def spread_by(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(attention, "SCRATCH_BYTES", HOW[how])


def heads(num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_rows, num_heads, head_dim).to(DEVICE, dtype)


def own_block(
    num_rows: int, num_groups: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return heads(num_rows, num_groups, head_dim, dtype), heads(num_rows, num_groups, head_dim, dtype)


def clean(pages: Pages) -> Pages:
    """Without NaN, which the fp32 twin multiplies by 0."""
    return pages._replace(keys_PSGH=pages.keys_PSGH.nan_to_num(), values_PSGH=pages.values_PSGH.nan_to_num())


def check_twin(lengths: list[int], width: int, shape: tuple[int, int, int], *, page_slots: int, drafts: bool) -> None:
    num_heads, num_groups, head_dim = shape
    pages = random_pages(
        lengths,
        width,
        num_groups=num_groups,
        head_dim=head_dim,
        page_slots=page_slots,
        table_pages=-(-(max(lengths) + width) // page_slots) + 2,
    )
    q = heads(len(lengths) * width, num_heads, head_dim)
    own, widths = None, None
    if drafts:
        own = own_block(len(q), num_groups, head_dim)
        widths = torch.tensor([1 + (5 * b + 2) % width for b in range(len(lengths))], dtype=torch.int32, device=DEVICE)
    fast = attention.attend(q, pages, width=width, scale=SCALE, own=own, widths_B=widths)
    slow = reference.attend(q, clean(pages), width=width, scale=SCALE, own=own, widths_B=widths)
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("drafts", [False, True], ids=["ar", "draft"])
def test_a_pass_mixes_as_its_twin(monkeypatch, how: str, drafts: bool) -> None:
    """Lengths around pages and splits; a draft block of more than a tile; pages of 1/2, 3/2 and 2 tiles."""
    spread_by(monkeypatch, how)
    check_twin([0, 129], 17, (2, 1, 16), page_slots=8, drafts=drafts)
    check_twin([31, 126, 1], 1, (7, 1, 20), page_slots=32, drafts=drafts)
    check_twin([95, 2], 2, (2, 2, 16), page_slots=24, drafts=drafts)


@pytest.mark.parametrize(("shape", "width"), [((8, 1, 64), 3), ((6, 2, 80), 2), ((2, 2, 96), 3), ((5, 1, 128), 2)])
def test_heads_of_every_family(shape: tuple[int, int, int], width: int) -> None:
    check_twin([43], width, shape, page_slots=16, drafts=False)


def test_the_sizes_that_run(monkeypatch) -> None:
    """Splits of 128 slots and more, pages of 64."""
    as_it_runs(monkeypatch)
    check_twin([1300, 7], 8, (2, 1, 16), page_slots=64, drafts=True)


@pytest.mark.parametrize("drafts", [False, True], ids=["ar", "draft"])
def test_bf16_is_off_by_its_roundings(drafts: bool) -> None:
    """A weight is rounded to bf16 before it meets its value, and the result once: by at most 2^-8 of each."""
    dtype, width = torch.bfloat16, 5
    pages = random_pages([70, 3], width, num_groups=2, head_dim=16, page_slots=8, table_pages=12, dtype=dtype)
    q = heads(2 * width, 6, 16, dtype)
    own = own_block(2 * width, 2, 16, dtype) if drafts else None
    widths = torch.tensor([5, 2], dtype=torch.int32, device=DEVICE) if drafts else None
    fast = attention.attend(q, pages, width=width, scale=SCALE, own=own, widths_B=widths).float()
    twin = in_fp32(clean(pages))
    how: dict[str, Any] = dict(width=width, scale=SCALE, widths_B=widths)
    slow = reference.attend(q.float(), twin, own=fp32(own), **how)
    sizes = None if own is None else (own[0].float(), own[1].float().abs())
    size = reference.attend(q.float(), twin._replace(values_PSGH=twin.values_PSGH.abs()), own=sizes, **how)
    assert ((fast - slow).abs() <= (size + slow.abs()) * 2**-8 * 1.001 + 1e-6).all()


def check_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> None:
    """A position has the same bits alone and in a block, in any batch, table and way to spread the pass.

    In fp32, since rounding to bf16 hides most of what the order of sums changes.
    """
    width, lengths = 6, [0, 31, 125]
    pages = random_pages(lengths, width, num_groups=1, head_dim=16, page_slots=8, table_pages=24, dtype=dtype)
    q = heads(len(lengths) * width, 4, 16, dtype)  # 24 query heads of a key head
    found = {}
    for how, tile in (("splits", 16), ("whole rows", 64)):
        spread_by(monkeypatch, how)
        if DEVICE == "cpu":  # a GPU's fp32 products are summed as a tile's shape has it: there, the tiles that are used
            tile_by(monkeypatch, tile)
        found[how] = attention.attend(q, pages, width=width, scale=SCALE).unflatten(0, (-1, width))
    together = found["whole rows"]
    assert torch.equal(found["splits"], together), "bits depend on how the pass is spread"
    spread_by(monkeypatch, "whole rows")
    rows = [2, 1]
    some = attention.attend(
        q.unflatten(0, (-1, width))[rows].flatten(0, 1), of_rows(pages, rows), width=width, scale=SCALE
    )
    assert torch.equal(some.unflatten(0, (-1, width)), together[rows]), "bits depend on the other rows of the batch"
    wider = pages._replace(tables_BM=torch.nn.functional.pad(pages.tables_BM, (0, 40)))
    assert torch.equal(attention.attend(q, wider, width=width, scale=SCALE).unflatten(0, (-1, width)), together), (
        "bits depend on the room in the tables"
    )
    for w, how in ((0, "splits"), (1, "whole rows"), (5, "splits")):
        spread_by(monkeypatch, how)
        later = pages._replace(lengths_B=pages.lengths_B + w)
        alone = attention.attend(q[w::width].contiguous(), later, width=1, scale=SCALE)
        assert torch.equal(alone, together[:, w]), f"plain decoding and verification differ at position {w}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_position_has_its_bits_in_any_pass(monkeypatch, dtype: torch.dtype) -> None:
    check_bits(monkeypatch, dtype)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param(
            "            stop_M, low, high, FIRST, SHARE,",
            "            stop_M, low, high, FIRST * 2, SHARE,",
            "pass is spread", id="other splits for whole rows",
        ),
        pytest.param(
            "for i in tl.static_range(AHEAD):", "for i in tl.static_range(AHEAD - 1, -1, -1):", "pass is spread",
            id="merged descending",
        ),
        pytest.param(
            "for part in range(0, num_splits + HAS_OWN):", "for part in range(num_splits + HAS_OWN - 1, -1, -1):",
            "pass is spread", id="splits descending",
        ),
        pytest.param(
            "tl.max(scores, 1) * scale", "tl.max(tl.max(scores, 1), 0) * scale", "bits depend on|verification differ",
            id="a peak for all rows of a tile",
        ),
    ],
)  # fmt: skip
def test_a_broken_clause_is_noticed(monkeypatch, tmp_path: Path, old: str, new: str, message: str) -> None:
    monkeypatch.setattr(attention, "kernels", planted(attention.attention_kernels, tmp_path, old=old, new=new))
    with pytest.raises(AssertionError, match=message):
        check_bits(monkeypatch)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("slots[None, :] < stop_M[:, None]", "slots[None, :] <= stop_M[:, None]"),
        ("tl.minimum(low, last) - first", "tl.minimum(tl.max(stop_M, 0), last) - first"),
        (
            "_at(V, page, at, vp, vs, dims, S, TILE_K), mask=is_there",
            "_at(V, page, at, vp, vs, dims, S, TILE_K), mask=is_dim[None, :]",
        ),
        ("tl.constexpr(-1.0e30)", 'tl.constexpr(-float("inf"))'),
    ],
    ids=["a key too many", "a tile not masked", "values behind the end", "NaN for no keys"],
)
def test_a_wrong_mask_is_noticed(monkeypatch, tmp_path: Path, old: str, new: str) -> None:
    monkeypatch.setattr(attention, "kernels", planted(attention.attention_kernels, tmp_path, old=old, new=new))
    spread_by(monkeypatch, "whole rows")
    with pytest.raises(AssertionError, match="not close"):
        check_twin([29], 5, (4, 2, 16), page_slots=8, drafts=False)


def test_a_row_of_padding_is_zero() -> None:
    """It sees nothing, in a draft pass of no width: no NaN reaches the layers behind."""
    pages = random_pages([0, 9], 3, num_groups=2, head_dim=16, page_slots=8, table_pages=4)
    widths = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    out = attention.attend(
        heads(6, 4, 16), pages, width=3, scale=SCALE, own=own_block(6, 2, 16), widths_B=widths
    ).unflatten(0, (2, 3))
    assert not out[0].any() and out[1].all()


def test_splits_follow_each_other(monkeypatch) -> None:
    """Where they begin, by the sentence that defines their sizes."""
    as_it_runs(monkeypatch)
    first, starts = attention.FIRST_SLOTS, [0]
    while starts[-1] < 50_000:
        largest = first << attention.DOUBLINGS
        sizes = [size for size in (first, 2 * first, 4 * first, 8 * first) if attention.SHARE * size <= starts[-1]]
        starts.append(starts[-1] + min(max(sizes, default=first), largest))
    for num_slots in (0, 1, *(start + more for start in starts[1:] for more in (0, 1))):
        assert attention.num_splits(num_slots) == sum(start < num_slots for start in starts), num_slots


def test_the_scratch_stays_small(monkeypatch) -> None:
    """Qwen3-8B at 40k slots: a decoding pass keeps few states, and a prefill pass of 512 positions none."""
    as_it_runs(monkeypatch)
    pool = torch.empty(1, 64, 8, 128)
    pages = Pages(pool, pool, torch.empty(1, 640), torch.empty(1))
    decoding = attention.spread(torch.Size((32, 32, 128)), pages, width=32, element_size=2)
    assert (decoding.num_tiles, decoding.num_splits) == (2, attention.num_splits(640 * 64))
    assert attention._scratch_bytes(decoding.num_splits, 32 * 32, 128) < 30e6
    assert attention.spread(torch.Size((512, 32, 128)), pages, width=512, element_size=2).num_splits == 0
    short = pages._replace(tables_BM=pages.tables_BM[:, :16])
    alone = attention.spread(torch.Size((1, 32, 128)), short, width=1, element_size=2)
    assert (alone.num_tiles, alone.num_splits) == (1, 4)


def test_many_rows_are_read_whole(monkeypatch) -> None:
    """Where programs suffice: wide blocks of some rows, and anything of many, unless a long one could delay them."""
    as_it_runs(monkeypatch)
    pool = torch.empty(1, 64, 8, 128)

    def is_whole(num_rows: int, width: int, num_pages: int = 16) -> bool:
        pages = Pages(pool, pool, torch.empty(num_rows, num_pages), torch.empty(num_rows))
        shape = torch.Size((num_rows * width, 32, 128))
        return attention.spread(shape, pages, width=width, element_size=2).num_splits == 0

    assert [is_whole(num_rows, 32) for num_rows in (1, 4, 8, 64)] == [False, False, True, True]
    assert [is_whole(num_rows, 8) for num_rows in (8, 16, 32)] == [False, True, True]
    assert [is_whole(num_rows, 1) for num_rows in (16, 23, 24, 64)] == [False, False, True, True]
    assert [is_whole(16, width, 128) for width in (4, 8, 32)] == [False, False, True]
    assert not is_whole(4, 32, 640), "64 programs of 40k slots each would leave half of the processors idle"
    assert [is_whole(64, 1, num_pages) for num_pages in (64, 128)] == [True, False], "one row may be the only long one"
