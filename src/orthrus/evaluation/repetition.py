"""Whether a text runs in circles: drafters guess loops easily, so looping outputs are counted apart."""

import re
from collections.abc import Hashable, Sequence

LOOPING_SHARE = 0.5
"""An output is looping when fewer than this share of its 4-grams are distinct: it wrote more old runs of four tokens
than new ones."""


def distinct_4gram_share(token_ids: Sequence[Hashable]) -> float:
    """Distinct runs of four generated tokens / all runs of four; 1 for a text too short to have one."""
    grams = [tuple(token_ids[start : start + 4]) for start in range(len(token_ids) - 3)]
    return len(set(grams)) / len(grams) if grams else 1.0


def pooled_4gram_share(outputs: Sequence[Sequence[Hashable]]) -> float:
    """Distinct runs of four tokens in all outputs together / all runs of four, none of which crosses two outputs.

    Outputs that are each varied may still all say the same: a drafter learns that by heart.
    """
    grams = [tuple(ids[start : start + 4]) for ids in outputs for start in range(len(ids) - 3)]
    return len(set(grams)) / len(grams) if grams else 1.0


def is_looping(token_ids: Sequence[int]) -> bool:
    """Whether less than `LOOPING_SHARE` of the 4-grams are distinct."""
    return distinct_4gram_share(token_ids) < LOOPING_SHARE


def is_varied(text: str) -> bool:
    """Whether a text neither loops nor counts: at least `LOOPING_SHARE` of the 4-grams of its words and signs are
    distinct when every number in them is written 0 ("y1 = x1", "y2 = x2", ... is easily drafted, but no loop).
    """
    return distinct_4gram_share(re.findall(r"\w+|[^\w\s]", re.sub(r"\d+", "0", text))) >= LOOPING_SHARE
