"""One request decoded to its end, with the time of its parts: what the command line and the benchmarks report."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orthrus.decoding.decoder import Decoder, Record, Request
from orthrus.decoding.stats import DecodingStats

Show = Callable[[Record], None]
"""Called with each record as it is committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One finished request: its tokens and what they cost, the loading of the model excluded."""

    token_ids: list[int]
    """The new tokens."""
    finish_reason: str | None
    stats: DecodingStats
    prefill_s: float
    decode_s: float
    """Wall time of all cycles: everything behind the first token, which prefill gives."""
    cycles_s: float = 0.0
    """The part of `decode_s` in cycles that drafted; a last plain step, where one token is left to write, is not."""
    draft_ms: float = 0.0
    """Draft passes of those cycles."""
    verify_ms: float = 0.0
    """Verify passes of those cycles."""

    @property
    def num_timed(self) -> int:
        """Tokens written during `decode_s`."""
        return len(self.token_ids) - 1

    @property
    def tokens_per_second(self) -> float:
        """Tokens behind the first per second of decoding."""
        return self.num_timed / self.decode_s if self.decode_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields of a JSON document that describe decoding."""
        return {
            "num_tokens": len(self.token_ids),
            "finish_reason": self.finish_reason,
            "prefill_seconds": self.prefill_s,
            "decode_seconds": self.decode_s,
            "tokens_per_second": self.tokens_per_second,
            "stats": self.stats.as_dict(),
        }


def timed_run(decoder: Decoder, request: Request, *, show: Show | None = None) -> Run:
    """Decode one request to its end, showing each record as it is committed."""
    started = time.perf_counter()
    cycles_s = draft_ms = verify_ms = 0.0
    records = decoder.stream(request)
    record = next(records)
    prefilled = last = time.perf_counter()
    stats, token_ids = decoder.stats(record.row), list(record.token_ids)
    if show is not None:
        show(record)
    for record in records:
        before, last = last, time.perf_counter()
        token_ids += record.token_ids
        if record.num_drafted:
            cycles_s += last - before
            draft_ms += record.draft_ms
            verify_ms += record.verify_ms
        if show is not None:
            show(record)
    return Run(
        token_ids=token_ids,
        finish_reason=record.finish_reason,
        stats=stats,
        prefill_s=prefilled - started,
        decode_s=last - prefilled,
        cycles_s=cycles_s,
        draft_ms=draft_ms,
        verify_ms=verify_ms,
    )
