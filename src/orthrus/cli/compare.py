"""`orthrus generate --compare`: the same request with and without drafting, and an explanation of any difference."""

import statistics
from dataclasses import dataclass
from typing import Any

from orthrus.cli.printer import TextPrinter, TracePrinter
from orthrus.cli.session import Session
from orthrus.decoding.decoder import Decoder, Request
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.timing import Run, timed_run
from orthrus.evaluation.lossless import Divergence, find_divergence

ROUNDS = 3
"""Timed runs of each kind, alternating, behind one run of each that warms up and is shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Timed runs of each kind; all texts of a kind are equal."""

    plain: list[Run]
    drafted: list[Run]
    one_row: list[Run]
    """Plain decoding in passes of one row, where exact mode pads them; its text may differ. Empty in other modes."""
    divergence: Divergence | None
    facts: dict[str, Any]
    text: str

    @property
    def speed_up(self) -> float:
        """Median decode speed with drafting over median decode speed without."""
        plain = median_speed(self.plain)
        return median_speed(self.drafted) / plain if plain else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of a comparison."""
        divergence = self.divergence
        return {
            "text": self.text,
            "mode": "compare",
            "identical": divergence is None,
            "divergence": None if divergence is None else divergence.as_dict(),
            "plain": self.plain[0].as_dict() | {"tokens_per_second": median_speed(self.plain)},
            "drafted": self.drafted[0].as_dict() | {"tokens_per_second": median_speed(self.drafted)},
            "speed_up": self.speed_up,
            "one_row_tokens_per_second": median_speed(self.one_row) if self.one_row else None,
            "rounds": len(self.plain),
            **self.facts,
        }


def compare(session: Session, request: dict[str, Any], *, prompt: str, visible: bool, trace: bool) -> Comparison:
    """Warm up with one shown run of each kind, then time both in turn."""
    plain, drafted = Request(**request, drafting=False), Request(**request, drafting=True)
    if visible:
        show_run(session, plain, heading="without drafting", prompt=prompt, trace=False)
        show_run(session, drafted, heading="with drafting", prompt=prompt, trace=trace)
    else:
        timed_run(session.decoder, plain)
        timed_run(session.decoder, drafted)
    ways = [(session.decoder, plain), (session.decoder, drafted)]
    if session.chosen.backend.exact:  # passes of block_size positions
        ways.append((Decoder(PortableBackend(session.model, exact=False), tokenizer=session.tokenizer), plain))
        timed_run(*ways[-1])
    plains, drafteds, *one_rows = zip(*[[timed_run(*way) for way in ways] for _ in range(ROUNDS)], strict=True)
    return Comparison(
        plain=list(plains),
        drafted=list(drafteds),
        one_row=list(one_rows[0]) if one_rows else [],
        divergence=find_divergence(session.model, plain.prompt_ids, plains[0].token_ids, drafteds[0].token_ids),
        facts=session.facts() | {"num_prompt_tokens": len(plain.prompt_ids), "seed": plain.sampling.seed},
        text=session.decode(drafteds[0].token_ids),
    )


def show_run(session: Session, request: Request, *, heading: str, prompt: str, trace: bool) -> None:
    """Decode once in view of the user, under a heading."""
    print(f"--- {heading} ---")
    printer = (TracePrinter if trace else TextPrinter)(session.tokenizer)
    print(prompt, end="", flush=True)
    timed_run(session.decoder, request, show=printer.show)
    printer.close()
    print()


def median_speed(runs: list[Run]) -> float:
    """Median over runs of decode tokens per second."""
    return statistics.median(run.tokens_per_second for run in runs)


def print_comparison(comparison: Comparison) -> None:
    """The table of both ways, what it was measured on, and whether the texts are equal."""
    facts, stats = comparison.facts, comparison.drafted[0].stats
    drafts = f", drafts in {facts['draft_precision']}" if facts["draft_precision"] else ""
    if not comparison.plain[0].num_timed:
        print("nothing to time: prefill alone gave the whole answer")
        print(f"texts identical: {verdict(comparison)}")
        return
    print(f"{'':18}{'tokens/s':>10}{'tokens/cycle N':>16}{'tokens/pass TPF':>17}{'drafts accepted':>17}")
    print(f"{'without drafting':18}{median_speed(comparison.plain):10.1f}{1.0:16.2f}{1.0:17.2f}{'-':>17}")
    if comparison.one_row:
        print(f"{'  in 1-row passes':18}{median_speed(comparison.one_row):10.1f}{1.0:16.2f}{1.0:17.2f}{'-':>17}")
    print(
        f"{'with drafting':18}{median_speed(comparison.drafted):10.1f}{stats.tokens_per_cycle:16.2f}"
        f"{stats.tokens_per_forward:17.2f}{stats.acceptance_rate:17.1%}"
    )
    print(
        f"speed-up {comparison.speed_up:.2f}x ({facts['model']}, {facts['dtype']} on {facts['device']}, "
        f"{facts['backend']} backend{drafts}, {facts['threads']} threads, "
        f"block {facts['block_size']}, {len(comparison.plain[0].token_ids)} tokens; "
        f"decoding only, median of {len(comparison.plain)} alternating runs)"
    )
    print(f"texts identical: {verdict(comparison)}")


def verdict(comparison: Comparison) -> str:
    """Whether the texts are equal; if not, where they part and whether rounding explains it."""
    divergence = comparison.divergence
    if divergence is None:
        return "yes"
    where = f"no: they part at new token {divergence.position}"
    if comparison.facts["seed"] is not None:
        return f"{where}; sampled, so the logits alone do not say why (run it greedy, or with --dtype float32)"
    close = f"where the plain pass's two best logits are {divergence.gap:.4g} apart ({divergence.ulps:.1f} ulp)"
    if divergence.is_rounding:
        return f"{where}, {close}: rounding in {comparison.facts['dtype']}"
    return f"{where}, {close}: more than rounding explains; please report this"
