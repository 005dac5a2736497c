"""Equal bits, L1 and L2 of docs/lossless.md: the checks, for whatever computes the passes.

What is compared are the AR view's logits of every committed token and the cached keys and values behind the text,
between plain decoding of a row alone and the same row drafted, in company, by other chunks, replayed from graphs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orthrus.decoding.decoder import Decoder, Request
from orthrus.engine.engine import EngineBackend
from orthrus.engine.operations import Ops, reference_ops
from orthrus.engine.passes import Inputs
from orthrus.engine.reference import Pages, attend, head_argmax, linear, place_heads, rms_norm, swiglu
from tests.decoding.subjects import request


class Trace(NamedTuple):
    """What a row wrote: its new tokens, their logits [n, V] where kept, its keys and values [L, T, 2, G, H]."""

    tokens: list[int]
    logits: Tensor | None
    cache: Tensor


def cached(backend: EngineBackend, row: int) -> Tensor:
    """The row's committed keys and values. [L, T, 2, G, H]."""
    pages = torch.tensor(backend.tables.pages(row))
    pools = [pool[:, pages].flatten(1, 2) for pool in (backend.passes.keys_LPSGH, backend.passes.values_LPSGH)]
    return torch.stack(pools, dim=2)[:, : backend.length(row)].clone()


def decode_traced(backend: EngineBackend, requests: Sequence[Request]) -> list[Trace]:
    """All requests as one batch."""
    decoder = Decoder(backend)
    records = [decoder.admit(r) for r in requests]
    rows = [record.row for record in records]
    while decoder.active:
        records += decoder.step()
    traces = []
    for row, r in zip(rows, requests, strict=True):
        kept = [record.logits for record in records if record.row == row and record.logits is not None]
        tokens = decoder.tokens(row)[len(r.prompt_ids) :]
        traces.append(Trace(tokens, torch.cat(kept) if kept else None, cached(backend, row)))
        decoder.release(row)
    return traces


def differences(found: Trace, expected: Trace) -> list[str]:
    """What is not the same bit for bit."""
    named = []
    if found.tokens != expected.tokens:
        named.append("tokens")
    if found.logits is not None and expected.logits is not None and not torch.equal(found.logits, expected.logits):
        named.append("logits")
    if not torch.equal(found.cache, expected.cache):
        named.append("keys and values")
    return named


def plain_alone(backend: EngineBackend, prompts: Sequence[list[int]], num_new: Sequence[int]) -> list[Trace]:
    """Each prompt decoded one token at a time, with nobody beside it: what every other way is compared with."""
    return [
        decode_traced(backend, [request(prompt, n, drafting=False, logits=True)])[0]
        for prompt, n in zip(prompts, num_new, strict=True)
    ]


def check_company(
    expected: Sequence[Trace], backend: EngineBackend, prompts: Sequence[list[int]], *, num_rows: int, logits: bool
) -> int:
    """Drafted in batches of `num_rows`, every row has the bits it had alone. The number of tokens compared.

    Without `logits` the batch takes the argmax path, which is captured; keys and values tell of its passes.
    """
    num_tokens = 0
    for start in range(0, len(prompts), num_rows):
        batch = range(start, min(start + num_rows, len(prompts)))
        requests = [request(prompts[i], len(expected[i].tokens), logits=logits) for i in batch]
        for i, trace in zip(batch, decode_traced(backend, requests), strict=True):
            wrong = differences(trace, expected[i])
            assert not wrong, f"row {i - start} of {len(batch)}: other {' and '.join(wrong)} than alone without drafts"
            num_tokens += len(trace.tokens)
    return num_tokens


def check_replay(expected: Sequence[Trace], backend: EngineBackend, prompts: Sequence[list[int]]) -> None:
    """A text that is prefilled has the bits of the text that was decoded, from nothing or from half of itself."""
    decoder = Decoder(backend)
    for prompt, trace in zip(prompts, expected, strict=True):
        text = prompt + trace.tokens[:-1]
        row = decoder.admit(request(text, 1)).row
        assert torch.equal(cached(backend, row), trace.cache), "prefilled again: other keys and values than decoded"
        half = text[: len(text) // 2]
        decoder.admit(request([*half, (half[-1] + 1) % 7], 1), reuse_row=row)
        again = decoder.admit(request(text, 1), reuse_row=row)
        assert list(again.token_ids) == trace.tokens[-1:]
        assert torch.equal(cached(backend, row), trace.cache), "reused: other keys and values than decoded"
        decoder.release(row)


def rig(backend: EngineBackend, prompt: list[int], truth: list[int], counts: Sequence[int]) -> Callable[[Inputs], None]:
    """A draft for a batch of one row that is right for counts[i] tokens in cycle i and wrong after them."""
    text, cycles = prompt + truth, iter(counts)

    def draft(inputs: Inputs) -> None:
        backend.passes.__class__.draft(backend.passes, inputs)
        num_right, position = next(cycles), int(inputs.lengths_B[0]) + 1
        for j in range(inputs.shape.num_columns - 1):
            true = text[position + j] if position + j < len(text) else 0
            inputs.ids_BW[0, 1 + j] = true if j < num_right else (true + 1) % 7

    return draft


def check_every_acceptance(backend: EngineBackend, prompt: list[int], expected: Trace, counts: Sequence[int]) -> None:
    """However many drafts each cycle keeps, keys and values have the bits of plain decoding."""
    num_new = 1 + sum(count + 1 for count in counts)
    assert num_new <= len(expected.tokens), "the truth is too short for these counts"
    passes: Any = backend.passes
    passes.draft = rig(backend, prompt, expected.tokens, counts)
    decoder = Decoder(backend)
    records = [decoder.admit(request(prompt, len(expected.tokens)))]
    records += [decoder.step()[0] for _ in counts]
    row = records[0].row
    assert [record.num_accepted for record in records[1:]] == list(counts), "acceptance is not as told"
    found = cached(backend, row)
    assert torch.equal(found, expected.cache[:, : found.shape[1]]), "other keys and values than plain decoding's"
    decoder.release(row)


def random_weights(model: nn.Module, seed: int, std: float = 0.05) -> None:
    """Weights under which many tokens are nearly equally likely, so that a last bit decides."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std, generator=generator)


def row_by_row_ops() -> Ops:
    """Plain torch that has the kernels' property: each row is computed alone, over what it sees alone."""

    def rowwise(function: Callable[..., Tensor], *by_row: str) -> Callable[..., Tensor]:
        def compute(x_RD: Tensor, *args, **kwargs) -> Tensor:
            def of(r: int) -> dict:
                cut = {name: kwargs[name][r : r + 1] for name in by_row if kwargs.get(name) is not None}
                return kwargs | cut

            return torch.cat([function(x_RD[r : r + 1], *args, **of(r)) for r in range(len(x_RD))])

        return compute

    def attend_alone(q_RNH: Tensor, pages: Pages, *, width: int, own=None, **options) -> Tensor:
        if own is not None:  # what a draft is worth in bits is nobody's business
            return attend(q_RNH, pages, width=width, own=own, **options)
        mixed = []
        for r in range(len(q_RNH)):
            b, w = divmod(r, width)
            seen_B = pages.lengths_B[b : b + 1] + w
            num_pages = int(seen_B) // pages.keys_PSGH.shape[1] + 1
            alone = pages._replace(tables_BM=pages.tables_BM[b : b + 1, :num_pages], lengths_B=seen_B)
            mixed.append(attend(q_RNH[r : r + 1], alone, width=1, **options))
        return torch.cat(mixed)

    def linear_and_norm_alone(x_RD: Tensor, weight_ED: Tensor, *, norm_E: Tensor, eps: float, **options):
        out_RE = linear_alone(x_RD, weight_ED, **options)
        return out_RE, rms_norm(out_RE, norm_E, eps)

    def project_heads_alone(x_RD: Tensor, qkv_ED: Tensor, *places, bias_E=None, scale_E=None, **options) -> Tensor:
        return place_heads(linear_alone(x_RD, qkv_ED, bias_E=bias_E, scale_E=scale_E), *places, **options)

    linear_alone = rowwise(linear, "residual_RE")
    return reference_ops()._replace(
        linear=linear_alone,
        linear_and_norm=linear_and_norm_alone,
        project_heads=project_heads_alone,
        swiglu=rowwise(swiglu),
        head_argmax=rowwise(head_argmax),
        attend=attend_alone,
    )
