"""Placeholder until the data branch is merged: text of a JSON Lines file, packed into rows."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Where rows come from."""

    path: str
    """A JSON Lines file with `text`."""
    row_tokens: int = 2048
    packing: Literal["isolated", "concatenated"] = "isolated"


class PackedDataset(torch.utils.data.Dataset):
    """Rows in a fixed order."""

    def __init__(self, settings: DataSettings, tokenizer: Any):
        ids: list[int] = []
        for line in Path(settings.path).read_text().splitlines():
            ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        num = len(ids) // settings.row_tokens
        self.ids = torch.tensor(ids[: num * settings.row_tokens], dtype=torch.int32).view(num, -1)
        self.fingerprint = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        zeros = torch.zeros_like(self.ids[i])
        return {"ids": self.ids[i], "document": zeros, "reply": zeros + 1}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of rows, int64 [B, T]."""
    return {name: torch.stack([item[name] for item in items]).long() for name in items[0]}
