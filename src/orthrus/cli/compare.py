"""`orthrus generate --compare`: the same request with and without drafting, and an explanation of any difference."""

import statistics
from dataclasses import dataclass
from typing import Any

from orthrus.cli.printer import TextPrinter, TracePrinter
from orthrus.cli.session import Answer, Session, run_request
from orthrus.decoding.decoder import Request
from orthrus.evaluation.lossless import Divergence, find_divergence

ROUNDS = 3
"""Timed runs of each kind, alternating, behind one run of each that warms up and is shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Timed answers of both kinds; all answers of a kind are equal."""

    plain: list[Answer]
    drafted: list[Answer]
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
        run_request(session.decoder, plain)
        run_request(session.decoder, drafted)
    pairs = [(run_request(session.decoder, plain), run_request(session.decoder, drafted)) for _ in range(ROUNDS)]
    plains, drafteds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return Comparison(
        plain=plains,
        drafted=drafteds,
        divergence=find_divergence(session.model, plain.prompt_ids, plains[0].token_ids, drafteds[0].token_ids),
        facts=session.facts() | {"num_prompt_tokens": len(plain.prompt_ids), "seed": plain.sampling.seed},
        text=session.decode(drafteds[0].token_ids),
    )


def show_run(session: Session, request: Request, *, heading: str, prompt: str, trace: bool) -> None:
    """Decode once in view of the user, under a heading."""
    print(f"--- {heading} ---")
    printer = (TracePrinter if trace else TextPrinter)(session.tokenizer)
    print(prompt, end="", flush=True)
    run_request(session.decoder, request, show=printer.show)
    printer.close()
    print()


def median_speed(answers: list[Answer]) -> float:
    """Median over runs of decode tokens per second."""
    return statistics.median(answer.tokens_per_second for answer in answers)


def print_comparison(comparison: Comparison) -> None:
    """The table of both ways, what it was measured on, and whether the texts are equal."""
    facts, stats = comparison.facts, comparison.drafted[0].stats
    print(f"{'':18}{'tokens/s':>10}{'tokens/cycle N':>16}{'tokens/pass TPF':>17}{'drafts accepted':>17}")
    print(f"{'without drafting':18}{median_speed(comparison.plain):10.1f}{1.0:16.2f}{1.0:17.2f}{'-':>17}")
    print(
        f"{'with drafting':18}{median_speed(comparison.drafted):10.1f}{stats.tokens_per_cycle:16.2f}"
        f"{stats.tokens_per_forward:17.2f}{stats.acceptance_rate:17.1%}"
    )
    print(
        f"speed-up {comparison.speed_up:.2f}x ({facts['model']}, {facts['dtype']} on {facts['device']}, "
        f"{facts['threads']} threads, block {facts['block_size']}, {len(comparison.plain[0].token_ids)} tokens; "
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
