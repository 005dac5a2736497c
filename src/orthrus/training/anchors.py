"""Where the blocks of a training row start.

B = rows, A = anchors (blocks) a row, K = block size, T = clean tokens of a row, P = places
"""

import torch
from torch import Tensor


def sample_anchors(first_B: Tensor, last_B: Tensor, *, num_anchors: int, generator: torch.Generator) -> Tensor:
    """anchors[b] = sorted positions drawn without replacement from first[b] .. last[b], both included. [B, A].

    Where a row has fewer places than anchors, places repeat evenly. Raises `ValueError` when a row has no place at all.
    """
    if bool((first_B > last_B).any()):
        raise ValueError("a row has no place for an anchor: its first position lies behind its last")
    places_P = torch.arange(int(last_B.max()) + 1, device=first_B.device)
    outside_BP = (places_P < first_B[:, None]) | (places_P > last_B[:, None])
    draws_BP = torch.rand(outside_BP.shape, generator=generator, device=first_B.device)
    order_BP = draws_BP.masked_fill(outside_BP, 2.0).argsort(dim=1)
    num_places_B1 = (last_B - first_B + 1)[:, None]
    picks_BA = torch.arange(num_anchors, device=first_B.device) % num_places_B1
    return order_BP.gather(1, picks_BA).sort(dim=1).values


def block_inputs(ids_BT: Tensor, anchors_BA: Tensor, *, block_size: int, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and absolute positions of all blocks: the anchor's own token, then masks. Both [B, A * K]."""
    offsets_K = torch.arange(block_size, device=ids_BT.device)
    positions_BAK = anchors_BA[:, :, None] + offsets_K
    blocks_BAK = torch.full_like(positions_BAK, mask_token_id)
    blocks_BAK[:, :, 0] = ids_BT.gather(1, anchors_BA)
    return blocks_BAK.flatten(1), positions_BAK.flatten(1)
