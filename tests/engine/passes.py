"""Passes over paged keys and values: random ones, and what a kernel may not read made poisonous."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from orthrus.engine.reference import Pages
from tests.engine.interpreter import DEVICE

POISON = 0
"""A page of NaN, which is where a table points behind its row's last page."""


def random_pages(
    lengths: list[int], width: int, *, num_groups: int, head_dim: int, page_slots: int, table_pages: int,
    dtype: torch.dtype = torch.float32,
) -> Pages:  # fmt: skip
    """Pages of rows that are `lengths` tokens long and about to have `width` more, everything else NaN."""
    shape = (len(lengths) * table_pages + 1, page_slots, num_groups, head_dim)
    keys, values = torch.randn(2, *shape).to(DEVICE, dtype)
    tables = (1 + torch.randperm(shape[0] - 1)).view(len(lengths), table_pages)
    keys[POISON] = values[POISON] = torch.nan
    for b, length in enumerate(lengths):
        num_pages = -(-(length + width) // page_slots)
        tables[b, num_pages:] = POISON
        last, behind = tables[b, num_pages - 1], (length + width - 1) % page_slots + 1
        keys[last, behind:] = values[last, behind:] = torch.nan
    return Pages(keys, values, tables.to(DEVICE, torch.int32), torch.tensor(lengths, dtype=torch.int32, device=DEVICE))


def of_rows(pages: Pages, rows: list[int]) -> Pages:
    """The same pages, some of the rows in this order."""
    return pages._replace(tables_BM=pages.tables_BM[rows].contiguous(), lengths_B=pages.lengths_B[rows].contiguous())


def in_fp32(pages: Pages) -> Pages:
    """What the fp32 twin reads."""
    return pages._replace(keys_PSGH=pages.keys_PSGH.float(), values_PSGH=pages.values_PSGH.float())


def fp32(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """An own block's keys and values for the fp32 twin."""
    return None if pair is None else (pair[0].float(), pair[1].float())


def planted(module: ModuleType, folder: Path, *, old: str, new: str) -> ModuleType:
    """A module of kernels with a bug in it."""
    source = inspect.getsource(module)
    assert old in source, f"{module.__name__} has no {old!r} to be broken"
    path = folder / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"planted_{folder.name}", path)
    assert spec is not None and spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    return broken
