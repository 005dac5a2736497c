"""What drafting did: counts that add up over rows and requests, and the two published metrics made from them.

`tokens_per_cycle` is N (vLLM's `mean_acceptance_length`: the bonus token included, token-weighted);
`tokens_per_forward` is the paper's TPF (about N / 2). Drafts beyond a length limit or a stop do not count as accepted.
"""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class DecodingStats:
    """Counters of one row, or of many when merged."""

    block_size: int
    """K; a cycle drafts at most K - 1 tokens."""
    num_prefills: int = 0
    """Requests: each takes one prefill, which gives the first token."""
    num_cycles: int = 0
    """Draft pass + verify pass."""
    num_plain_steps: int = 0
    """AR passes at width 0: one token, no draft."""
    num_drafted: int = 0
    num_accepted: int = 0
    """Drafts that entered the text, bonus tokens excluded."""
    num_tokens: int = 0
    """New tokens in the text, the first one included."""
    acceptance_histogram: list[int] = field(default_factory=list)
    """Entry a: cycles that accepted exactly a drafts; K entries."""
    drafted_per_position: list[int] = field(default_factory=list)
    """Entry j: cycles that drafted at least j + 1 tokens; K - 1 entries."""
    width_histogram: list[int] = field(default_factory=list)
    """Entry w: steps that asked for w drafts (0: plain steps); K entries."""
    draft_ms: float = 0.0
    """Time of draft passes; a batch's pass is shared out among its rows, so sums are wall time."""
    verify_ms: float = 0.0
    """Time of verify passes and plain steps, shared out likewise."""
    prefill_ms: float = 0.0
    """Time of all prefill passes, those that replay a preempted row included."""
    backend: str | None = None
    """"engine" or "portable", in the stats that `generate` returns."""
    refusal: str | None = None
    """Why "auto" did not take the engine on a GPU (`decoding/backends.py`)."""

    def __post_init__(self):
        self.acceptance_histogram = self.acceptance_histogram or [0] * self.block_size
        self.drafted_per_position = self.drafted_per_position or [0] * (self.block_size - 1)
        self.width_histogram = self.width_histogram or [0] * self.block_size

    def count_prefill(self, *, num_tokens: int) -> None:
        """Enter the end of a prefill and the first token it gave; its passes' time is added as they run."""
        self.num_prefills += 1
        self.num_tokens += num_tokens

    def count_cycle(
        self, *, num_drafted: int, num_accepted: int, num_tokens: int, draft_ms: float, verify_ms: float
    ) -> None:
        """Enter one cycle of one row."""
        self.num_tokens += num_tokens
        self.draft_ms += draft_ms
        self.verify_ms += verify_ms
        self.width_histogram[num_drafted] += 1
        if num_drafted == 0:
            self.num_plain_steps += 1
            return
        self.num_cycles += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.acceptance_histogram[num_accepted] += 1
        for position in range(num_drafted):
            self.drafted_per_position[position] += 1

    @property
    def accepted_per_position(self) -> list[int]:
        """Entry j: cycles whose draft j (the token at anchor + j + 1) was accepted; K - 1 entries."""
        counts, above = [], 0
        for cycles in reversed(self.acceptance_histogram[1:]):
            above += cycles
            counts.append(above)
        return counts[::-1]

    @property
    def tokens_per_cycle(self) -> float:
        """N = 1 + accepted / cycles; 1 where nothing was drafted."""
        return 1 + self.num_accepted / self.num_cycles if self.num_cycles else 1.0

    @property
    def tokens_per_forward(self) -> float:
        """TPF: tokens / all forwards, prefill included and draft passes counted; 0 before anything ran."""
        num_forwards = self.num_prefills + 2 * self.num_cycles + self.num_plain_steps
        return self.num_tokens / num_forwards if num_forwards else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 where nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    def merge(self, other: "DecodingStats") -> "DecodingStats":
        """The counters of both together (a new object); the larger block size gives the lists their length."""
        block_size = max(self.block_size, other.block_size)
        merged = DecodingStats(
            block_size=block_size, backend=self.backend or other.backend, refusal=self.refusal or other.refusal
        )
        for one in (self, other):
            for name in _ADDED:
                setattr(merged, name, getattr(merged, name) + getattr(one, name))
            for name in ("acceptance_histogram", "drafted_per_position", "width_histogram"):
                for index, count in enumerate(getattr(one, name)):
                    getattr(merged, name)[index] += count
        return merged

    def as_dict(self) -> dict:
        """All counters, under this project's names and under vLLM's (`metrics.speculative_decoding`)."""
        return {
            "tokens_per_cycle": self.tokens_per_cycle,
            "tokens_per_forward": self.tokens_per_forward,
            "num_tokens": self.num_tokens,
            "num_prefills": self.num_prefills,
            "num_cycles": self.num_cycles,
            "num_plain_steps": self.num_plain_steps,
            "num_drafted": self.num_drafted,
            "num_accepted": self.num_accepted,
            "accepted_per_position": self.accepted_per_position,
            "drafted_per_position": list(self.drafted_per_position),
            "width_histogram": list(self.width_histogram),
            "prefill_ms": self.prefill_ms,
            "draft_ms": self.draft_ms,
            "verify_ms": self.verify_ms,
            "mean_acceptance_length": self.tokens_per_cycle,
            "draft_acceptance_rate": self.acceptance_rate,
            "acceptance_histogram": list(self.acceptance_histogram),
            "num_spec_steps": self.num_cycles,
            "num_accepted_draft_tokens": self.num_accepted,
            "num_draft_tokens": self.num_drafted,
            "num_spec_tokens": self.block_size - 1,
        }


_ADDED = (
    "num_prefills", "num_cycles", "num_plain_steps", "num_drafted", "num_accepted", "num_tokens",
    "draft_ms", "verify_ms", "prefill_ms",
)  # fmt: skip
"""The counters that merge by addition."""
