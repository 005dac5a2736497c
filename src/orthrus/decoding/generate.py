"""`model.generate` with everything a transformers user may pass, over the one decoding loop.

transformers' own `generate` prepares what it always prepares (generation config, processors, stopping criteria,
padding, the streamer's prompt) and hands it to `_Generation` through `custom_generate`. Output classes, padding of
finished rows and the meaning of every argument are stock's; what block decoding cannot honour is refused by name.

    B = rows (prompts x num_return_sequences), P = width of the padded prompts, V = vocabulary
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from orthrus.decoding.arguments import check_inputs, check_kinds, check_range, refuse_settings, refuse_unknown
from orthrus.decoding.backends import (
    BackendName,
    Chosen,
    DraftPrecision,
    check_wish,
    choose_backend,
    loaded_keeper,
)
from orthrus.decoding.decoder import Decoder, Record, Request, check_block_size, check_prompt
from orthrus.decoding.portable import PREFILL_CHUNK
from orthrus.decoding.sampling import Sampling, derive_seed
from orthrus.decoding.stats import DecodingStats
from orthrus.decoding.stopping import Stopping
from orthrus.model.checkpoint import OrthrusCheckpointMixin
from orthrus.model.modeling import OrthrusLM

ROWWISE = frozenset(
    getattr(logits_process, name)
    for name in (
        "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "TemperatureLogitsWarper",
        "TopPLogitsWarper", "TopKLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper",
        "EtaLogitsWarper", "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor",
        "ExponentialDecayLengthPenalty", "LogitNormalization", "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    )
)  # fmt: skip
"""Processors known to treat each row by itself; any other is called with as many rows as stock would pass."""

WARPERS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
)
"""Warpers that `Sampling` expresses, in stock's order: at the end of the list they are applied to whole blocks."""


class OrthrusForCausalLM(OrthrusCheckpointMixin, OrthrusLM):
    """A dual-view model that generates several tokens per forward pass, and the text its AR view alone would write."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        *,
        use_diffusion_mode: bool = True,
        block_size: int | Literal["auto"] | None = None,
        sampling_rule: Literal["speculative", "coupled"] | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        exact: bool | None = None,
        backend: BackendName = "auto",
        cache_bytes: int | None = None,
        draft_precision: DraftPrecision | None = None,
        return_stats: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, with these arguments of its own:

        - `use_diffusion_mode`: False decodes one token at a time with the AR view, through the same loop.
        - `block_size`: positions drafted together, 2 .. the trained size, or "auto": each cycle drafts as many tokens,
          from none up, as its time and its text make worth it (`decoding/schedule.py`). By default "auto" on the engine
          and a GPU, else the trained size, and that too for speculative sampling, whose text would follow the clock.
        - `sampling_rule`: `speculative` or `coupled` (the default where a seed is given); only with `do_sample=True`.
        - `seed`: the sampled text's seed; without one it comes from `generator` or torch's global generator.
        - `exact`: bit-identical logits with and without drafting; default on for bfloat16 and float16.
        - `backend`: "auto" takes the engine on a GPU and warns, saying why, where it has to fall back to the portable
          backend; "engine" and "portable" force one. On a CPU the engine's slow twins run, which are there for tests.
        - `cache_bytes`: what the engine's keys and values take of the GPU's memory; as much as this call's rows may
          need unless told. The engine stays with the model, and so do they, until `release_engine`.
        - `draft_precision`: "fp8" has the engine's drafts read a second copy of the weights, a byte a weight. The text
          is the same; how many drafts are accepted may not be. An error, not a warning, where the engine does not run.
          The copy stays with the engine: a drafting call that wants another precision rebuilds both.
        - `return_stats`: return (output, `DecodingStats` of all rows together).
        """
        for name, value in (("synced_gpus", synced_gpus), ("assistant_model", assistant_model)):
            if value:
                raise ValueError(f"generate: {name} is not supported")
        check_kinds(
            use_diffusion_mode=use_diffusion_mode, block_size=block_size, seed=seed, exact=exact, generator=generator,
            cache_bytes=cache_bytes, draft_precision=draft_precision,
        )  # fmt: skip
        check_block_size(block_size, self.config.block_size)
        check_wish(backend, cache_bytes, draft_precision)
        if draft_precision is not None and not use_diffusion_mode:
            raise ValueError(
                "generate: draft_precision has no effect with use_diffusion_mode=False, which drafts nothing"
            )
        if block_size == "auto" and seed is not None and sampling_rule == "speculative":
            raise ValueError(
                "generate: with block_size='auto' widths follow the clock, and a seed does not fix a speculative text: "
                "use sampling_rule='coupled', or a number for block_size"
            )
        check_inputs(kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask"))
        refuse_unknown(kwargs)
        refuse_settings(self.generation_config, generation_config, kwargs)
        generation = _Generation(
            drafting=use_diffusion_mode,
            block_size=block_size,
            rule=sampling_rule,
            seed=seed,
            generator=generator,
            exact=exact,
            backend=backend,
            cache_bytes=cache_bytes,
            draft_precision=draft_precision,
            streamer=streamer,
            return_stats=return_stats,
        )
        return super().generate(
            inputs,
            generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            streamer=streamer,
            custom_generate=generation,
            **kwargs,
        )

    def release_engine(self) -> None:
        """Free the engine's cache and graphs, if there are any; the next call that wants it builds another."""
        if (keeper := loaded_keeper()) is not None:
            keeper.release(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OrthrusForCausalLM":
        """What `.to` and its like do; an engine over weights that were moved away would keep the old ones alive."""
        super()._apply(fn, recurse)
        if (keeper := loaded_keeper()) is not None:
            keeper.release_moved(self)
        return self

    def _extract_generation_mode_kwargs(self, custom_generate: Any, kwargs: dict, *args: Any, **named: Any) -> dict:
        """Keep the tokenizer, which transformers drops for a callable `custom_generate` though stop strings need it."""
        tokenizer = kwargs.get("tokenizer")
        extracted = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args, **named)
        return extracted if tokenizer is None else {**extracted, "tokenizer": tokenizer}


@dataclass(frozen=True, kw_only=True)
class _Generation:
    """One call of `generate`: the callable that stock hands its preparations to."""

    drafting: bool
    block_size: int | Literal["auto"] | None
    rule: Literal["speculative", "coupled"] | None
    seed: int | None
    generator: torch.Generator | None
    exact: bool | None
    backend: BackendName
    cache_bytes: int | None
    draft_precision: DraftPrecision | None
    streamer: Any
    return_stats: bool

    def __call__(
        self,
        model: OrthrusForCausalLM,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        # A parameter called attention_mask would be taken out of stock's hands before it prepares the mask.
        config = generation_config
        if self.streamer is not None and len(input_ids) > 1:
            raise ValueError(f"generate: streamer works with one row only, got {len(input_ids)}")
        prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
        check_range(prompts, model.config.vocab_size)
        for prompt in prompts:  # here, since a backend would be asked for prompt and new tokens together
            check_prompt(len(prompt), model.config.max_position_embeddings)
        processors, sampling = _split_warpers(logits_processor, bool(config.do_sample))
        _refuse_stateful(processors)
        stops = _Stops.of(stopping_criteria, input_ids.shape[1])
        wants_logits = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        requests = []
        for b, prompt in enumerate(prompts):
            place = _Place(input_ids[b : b + 1].to(model.device), len(prompt), b, len(prompts))
            requests.append(
                Request(
                    prompt_ids=prompt,
                    stopping=Stopping(max_new_tokens=stops.max_new_tokens, eos_token_ids=stops.eos_token_ids),
                    sampling=self._seeded(sampling, b % (config.num_return_sequences or 1)),
                    logits_processor=place.processor(processors),
                    stopping_criteria=place.criteria(stops.criteria),
                    drafting=self.drafting,
                    logits=wants_logits,
                )
            )
        with self._choose(model, requests, config.prefill_chunk_size or PREFILL_CHUNK) as chosen:
            block_size = self.block_size
            if block_size is None:
                block_size = chosen.block_size_for((r.sampling for r in requests), drafting=self.drafting)
            decoder = Decoder(chosen.backend, block_size=block_size)
            stats = DecodingStats(block_size=decoder.block_size, backend=chosen.name, refusal=chosen.refusal)
            written = _Written(decoder, requests, self.streamer, stats)
            written.run()
            if not stops.has_eos and stops.criteria:
                written.level(stops.max_new_tokens)
            output = _output(written, input_ids, config)
        if self.streamer is not None:
            self.streamer.end()
        return (output, written.stats()) if self.return_stats else output

    def _choose(self, model: OrthrusForCausalLM, requests: list[Request], prefill_chunk: int) -> Chosen:
        chosen = choose_backend(
            model,
            wish=self.backend,
            row_tokens=[len(request.prompt_ids) + request.stopping.max_new_tokens for request in requests],
            exact=self.exact,
            prefill_chunk=prefill_chunk,
            cache_bytes=self.cache_bytes,
            draft_precision=self.draft_precision,
            is_drafting=self.drafting,
        )
        if chosen.refusal is not None:
            warnings.warn(f"generate: decoding on the slower portable backend: {chosen.refusal}", stacklevel=2)
        return chosen

    def _seeded(self, sampling: Sampling, copy: int) -> Sampling:
        """The row's own seed: the call's for the first sequence of a prompt, derived ones for the others."""
        if sampling.effective_rule == "greedy":
            if self.rule is not None:
                raise ValueError(f"sampling_rule={self.rule!r} has no effect on greedy decoding: add do_sample=True")
            return sampling
        rule = self.rule or ("speculative" if self.seed is None else "coupled")
        if self.seed is not None:
            seed = derive_seed(self.seed, copy)
        else:
            device = "cpu" if self.generator is None else self.generator.device
            seed = int(torch.randint(2**63 - 1, (), generator=self.generator, device=device))
        return Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            rule=rule,
        )


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Each row's real tokens: those its mask keeps, as stock's position ids and attention have it."""
    ids = input_ids.tolist()
    if attention_mask is None:
        return ids
    assert attention_mask.shape == input_ids.shape, "checked before transformers prepared it"
    mask = (attention_mask != 0).tolist()
    for b, row in enumerate(mask):
        if row and not any(row):
            raise ValueError(f"attention_mask hides all of row {b}; every row needs a token to continue")
        if row and not row[-1]:
            raise ValueError(f"attention_mask hides the last token of row {b} (right padding); pad on the left")
    return [
        [token for token, kept in zip(row, kept_row, strict=True) if kept]
        for row, kept_row in zip(ids, mask, strict=True)
    ]


def _split_warpers(prepared: LogitsProcessorList, do_sample: bool) -> tuple[LogitsProcessorList, Sampling]:
    """The processors that need their position's prefix, and the warpers at the end of the list as a `Sampling`."""
    if not do_sample:
        return prepared, Sampling()
    rest, settings, latest = list(prepared), {"temperature": 1.0}, len(WARPERS)
    while rest and type(rest[-1]) in WARPERS[:latest] and _is_plain(rest[-1]):
        warper = rest.pop()
        latest = WARPERS.index(type(warper))
        name = ("temperature", "top_k", "top_p", "min_p")[latest]
        settings[name] = getattr(warper, name)
    return LogitsProcessorList(rest), Sampling(**settings)


def _is_plain(warper: Any) -> bool:
    """Whether a warper filters to -inf and keeps one token at least, as `sampling.warp` does."""
    if getattr(warper, "filter_value", -float("inf")) != -float("inf"):
        return False
    return getattr(warper, "min_tokens_to_keep", 1) == 1 and getattr(warper, "top_p", 1) > 0


def _refuse_stateful(processors: LogitsProcessorList) -> None:
    for processor in processors:
        if isinstance(processor, logits_process.SynthIDTextWatermarkLogitsProcessor):
            raise ValueError(
                "generate: watermarking_config of the SynthID kind is not supported: it counts its calls, "
                "and drafts are scored that may never be written"
            )


@dataclass(frozen=True, kw_only=True)
class _Stops:
    """Stock's stopping criteria, taken apart."""

    max_new_tokens: int
    eos_token_ids: frozenset[int]
    has_eos: bool
    criteria: StoppingCriteriaList

    @classmethod
    def of(cls, prepared: StoppingCriteriaList, num_prompt: int) -> "_Stops":
        """Length limits and end-of-sequence ids as numbers, everything else as criteria asked at each position."""
        limits, eos, others = [], set(), StoppingCriteriaList()
        has_eos = False
        for criterion in prepared:
            if type(criterion) is MaxLengthCriteria:
                limits.append(criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                has_eos = True
                eos.update(criterion.eos_token_id.tolist())
            else:
                has_eos = has_eos or hasattr(criterion, "eos_token_id")
                others.append(criterion)
        return cls(
            max_new_tokens=min(limits) - num_prompt, eos_token_ids=frozenset(eos), has_eos=has_eos, criteria=others
        )


class _Place:
    """A row as processors and criteria written for stock expect it: its padded prompt, at its index in the batch.

    Only this row's answer is used; the other rows of the call are copies of it.
    """

    def __init__(self, padded_ids_1P: Tensor, num_prompt: int, index: int, num_rows: int):
        self._padded_ids_1P = padded_ids_1P
        self._num_prompt = num_prompt
        self._is_padded = padded_ids_1P.shape[1] != num_prompt
        self._index = index
        self._num_rows = num_rows

    def _ids(self, ids_1n: Tensor, num_rows: int) -> Tensor:
        if self._is_padded:
            ids_1n = torch.cat([self._padded_ids_1P, ids_1n[:, self._num_prompt :]], dim=1)
        return ids_1n.repeat(num_rows, 1)

    def processor(self, processors: LogitsProcessorList) -> Callable[[Tensor, Tensor], Tensor] | None:
        """These processors for this row alone; None when there are none."""
        if not processors:
            return None
        num_rows = 1 if all(type(processor) in ROWWISE for processor in processors) else self._num_rows
        index = 0 if num_rows == 1 else self._index

        def process(ids_1n: Tensor, scores_1V: Tensor) -> Tensor:
            scores = processors(self._ids(ids_1n, num_rows), scores_1V.repeat(num_rows, 1))
            return scores[index : index + 1]

        return process

    def criteria(self, criteria: StoppingCriteriaList) -> Callable[[Tensor, Any], Tensor] | None:
        """These criteria for this row alone; None when there are none."""
        if not criteria:
            return None

        def is_done(ids_1n: Tensor, scores: tuple[Tensor, ...] | None) -> Tensor:
            if scores is not None:
                scores = tuple(step.expand(self._num_rows, -1) for step in scores)
            return criteria(self._ids(ids_1n, self._num_rows), scores)[self._index]

        return is_done


class _Written:
    """What the rows of one call have written so far: the reader of the loop."""

    def __init__(self, decoder: Decoder, requests: list[Request], streamer: Any, stats: DecodingStats):
        self._decoder = decoder
        self._requests = requests
        self._streamer = streamer
        self._of_row: dict[int, int] = {}
        self._stats = stats
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.logits: list[list[Tensor]] = [[] for _ in requests]
        self.scores: list[list[Tensor]] = [[] for _ in requests]

    def run(self) -> None:
        """Admit every request and step until all rows have ended."""
        for b, request in enumerate(self._requests):
            self._take(self._decoder.admit(request), b)
        self._step_to_end()

    def level(self, max_new_tokens: int) -> None:
        """Without an end-of-sequence id stock has nothing to pad with: it goes on writing rows that a criterion has
        ended until the last one ends. So do we, from the rows' own caches."""
        longest = max(map(len, self.tokens))
        for row, b in list(self._of_row.items()):
            missing = longest - len(self.tokens[b])
            if missing > 0:
                request = self._requests[b]
                more = Request(
                    prompt_ids=[*request.prompt_ids, *self.tokens[b]],
                    stopping=Stopping(max_new_tokens=missing),
                    sampling=request.sampling,
                    logits_processor=request.logits_processor,
                    drafting=request.drafting,
                    logits=request.logits,
                )
                self._stats = self._stats.merge(self._decoder.stats(row))
                self._take(self._decoder.admit(more, reuse_row=row), b)
        self._step_to_end()

    def stats(self) -> DecodingStats:
        """All rows together."""
        merged = self._stats
        for row in self._of_row:
            merged = merged.merge(self._decoder.stats(row))
        return merged

    def _step_to_end(self) -> None:
        while self._decoder.active:
            for record in self._decoder.step():
                self._take(record, self._of_row[record.row])

    def _take(self, record: Record, b: int) -> None:
        self._of_row[record.row] = b
        self.tokens[b].extend(record.token_ids)
        if record.logits is not None and record.scores is not None:
            self.logits[b].extend(record.logits)
            self.scores[b].extend(record.scores)
        if self._streamer is not None:
            self._streamer.put(torch.tensor(record.token_ids))


def _output(written: _Written, input_ids: Tensor, config: GenerationConfig) -> Tensor | GenerateDecoderOnlyOutput:
    """Stock's output: prompts and new tokens, finished rows padded to the longest."""
    longest = max(map(len, written.tokens))
    pad = config._pad_token_tensor
    padding = 0 if pad is None else int(pad)
    rows = [tokens + [padding] * (longest - len(tokens)) for tokens in written.tokens]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    sequences = torch.cat([input_ids, new], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=_steps(written.scores, longest, padding) if config.output_scores else None,
        logits=_steps(written.logits, longest, padding) if config.output_logits else None,
    )


def _steps(rows: list[list[Tensor]], longest: int, padding: int) -> tuple[Tensor, ...]:
    """One [B, V] for each step. A row that has ended writes padding for certain, and its scores say so."""
    certain_V = torch.full_like(rows[0][0], -torch.inf)
    certain_V[padding] = 0
    return tuple(
        torch.stack([row[step] if step < len(row) else certain_V for row in rows]).clone() for step in range(longest)
    )
