"""`generate(backend=...)`: the engine writes what the portable backend writes, and a refusal says why.

On a CPU the engine's twins run. What "auto" does on a GPU is seen by telling it that it is on one.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList

from orthrus.decoding import backends, generate
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.engine import reference
from tests.decoding.subjects import MASK, random_prompt, subject
from tests.decoding.test_generate import IDS, Recorder, padded_batch
from tests.decoding.test_lossless import PreferEven, StopOnSum

BATCH, ATTENTION_MASK = padded_batch()


@pytest.fixture
def model() -> OrthrusForCausalLM:
    return copy.deepcopy(subject())


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" asks is answered as on a GPU."""
    monkeypatch.setattr(backends, "is_preferred", lambda model: True)


def both(model: OrthrusForCausalLM, **settings) -> tuple:
    """(output, stats) of either backend."""
    return tuple(model.generate(**settings, backend=name, return_stats=True) for name in ("portable", "engine"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_diffusion_mode": False},
        {"block_size": 3},
        {"do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 4},
        {"do_sample": True, "top_p": 0.9, "seed": 4, "sampling_rule": "speculative"},
        {"do_sample": True, "seed": 1, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "eos_token_id": [3, 9], "min_new_tokens": 5},
        {"prefill_chunk_size": 4},
        {"stopping_criteria": StoppingCriteriaList([StopOnSum(5), MaxTimeCriteria(36_000)])},
        {"logits_processor": LogitsProcessorList([PreferEven()])},
    ],
    ids=lambda settings: "-".join(settings) or "greedy",
)
def test_the_engine_writes_and_counts_what_the_portable_backend_does(model: OrthrusForCausalLM, settings: dict):
    call: dict[str, Any] = {"input_ids": BATCH, "attention_mask": ATTENTION_MASK, "max_new_tokens": 30} | settings
    (expected, plain), (output, stats) = both(model, **call)
    assert output.tolist() == expected.tolist()
    assert (plain.backend, stats.backend, plain.refusal, stats.refusal) == ("portable", "engine", None, None)
    assert stats.acceptance_histogram == plain.acceptance_histogram
    assert stats.num_cycles + stats.num_plain_steps == plain.num_cycles + plain.num_plain_steps > 0


def test_scores_and_logits_come_from_the_engine_too(model: OrthrusForCausalLM):
    call: dict[str, Any] = {"input_ids": IDS, "max_new_tokens": 12, "return_dict_in_generate": True}
    (expected, _), (output, _) = both(model, **call, output_logits=True, output_scores=True)
    for name in ("logits", "scores"):
        pairs = zip(getattr(output, name), getattr(expected, name), strict=True)
        for a, b in pairs:  # fp32: sums of 32 to 48 products in another order
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_prompt_beyond_the_context_is_refused_as_such(model: OrthrusForCausalLM, on_gpu: None):
    """Not as a matter of `max_new_tokens` or of the backend: no other setting would help. No warning comes first."""
    prompt = torch.tensor([random_prompt(model.config.max_position_embeddings, seed=1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("auto", "engine", "portable"):
            with pytest.raises(ValueError, match="the prompt has .* tokens, the model's context is .*: shorten it"):
                model.generate(input_ids=prompt, max_new_tokens=2, backend=backend)


def test_a_block_size_out_of_range_is_refused_before_an_engine_is_built(
    model: OrthrusForCausalLM, on_gpu: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generate, "choose_backend", lambda *args, **settings: pytest.fail("a backend was asked for"))
    ways: list[dict[str, Any]] = [{}, {"backend": "engine"}, {"use_diffusion_mode": False}]
    wrong: list[Any] = [99, 1, "wide"]
    for block_size in wrong:
        for settings in ways:
            with pytest.raises(ValueError, match=rf"block_size must be 2 .. \d+ .*got {block_size!r}"):
                model.generate(IDS, max_new_tokens=4, block_size=block_size, **settings)


def test_a_cpu_decodes_portably_and_says_nothing(model: OrthrusForCausalLM):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, stats = model.generate(input_ids=IDS, max_new_tokens=4, return_stats=True)
    assert (stats.backend, stats.refusal) == ("portable", None)


def test_auto_takes_the_engine_on_a_gpu(model: OrthrusForCausalLM, on_gpu: None):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, stats = model.generate(input_ids=IDS, max_new_tokens=4, return_stats=True)
    assert (stats.backend, stats.refusal) == ("engine", None)


def add_hook(model: nn.Module) -> dict:
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output * 1.5)
    return {}


REFUSALS = {
    "mlp.up_proj has a hook": add_hook,
    "the model's context is 256": lambda model: {"max_new_tokens": 252},
    "exact=True": lambda model: {"exact": True},
    "cache_bytes=1000 holds 0 tokens": lambda model: {"cache_bytes": 1000},
}
"""What the engine refuses of a call of ours, and how to come by it."""


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_refusal_raises_where_the_engine_is_forced_and_says_why_where_it_is_not(
    model: OrthrusForCausalLM, on_gpu: None, reason: str
):
    call: dict[str, Any] = {"input_ids": IDS, "max_new_tokens": 9} | REFUSALS[reason](model)
    portable = {name: value for name, value in call.items() if name != "cache_bytes"}
    expected = model.generate(**portable, backend="portable")
    with pytest.raises(ValueError, match=reason):
        model.generate(**call, backend="engine")
    with pytest.warns(UserWarning, match=f"portable backend: .*{reason}"):
        output, stats = model.generate(**call, return_stats=True)
    assert output.tolist() == expected.tolist()
    assert stats.backend == "portable" and stats.refusal is not None and reason in stats.refusal


def test_what_no_setting_of_a_call_changes_is_refused_too(on_gpu: None, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="rope_type 'dynamic'"):
        copy.deepcopy(subject(variant="mistral-dynamic")).generate(IDS, max_new_tokens=3, backend="engine")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast is on"):
        copy.deepcopy(subject()).generate(IDS, max_new_tokens=3, backend="engine")
    monkeypatch.setattr(backends, "KEEPER", "orthrus.engine.no_such_module")
    with pytest.raises(ValueError, match="cannot be imported here"):
        copy.deepcopy(subject()).generate(IDS, max_new_tokens=3, backend="engine")


DRAFTED = [
    {},
    {"block_size": 3},
    {"block_size": "auto"},
    {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 4},
    {"repetition_penalty": 1.3, "eos_token_id": [3, 9]},
]


@pytest.mark.parametrize("settings", DRAFTED, ids=lambda settings: "-".join(settings) or "greedy")
def test_drafts_in_fp8_write_the_same_text(model: OrthrusForCausalLM, settings: dict, monkeypatch: pytest.MonkeyPatch):
    call: dict[str, Any] = {"input_ids": BATCH, "attention_mask": ATTENTION_MASK, "max_new_tokens": 30} | settings
    expected = model.generate(**call, backend="engine")
    read = count_fp8_products(monkeypatch)
    output, stats = model.generate(**call, backend="engine", draft_precision="fp8", return_stats=True)
    assert output.tolist() == expected.tolist() and stats.backend == "engine"
    assert stats.num_cycles and bool(read), "no draft read the copy"


def count_fp8_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every product that reads weights in fp8."""
    read, product = [], reference._product

    def spy(x_RD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        if weight_ED.dtype == torch.float8_e4m3fn:
            read.append(len(x_RD))
        return product(x_RD, weight_ED)

    monkeypatch.setattr(reference, "_product", spy)
    return read


def test_drafts_in_fp8_are_refused_where_the_engine_does_not_run(model: OrthrusForCausalLM):
    call: dict[str, Any] = {"input_ids": IDS, "max_new_tokens": 9, "draft_precision": "fp8"}
    with pytest.raises(ValueError, match="'auto' takes it on a GPU, this model is on cpu"):
        model.generate(**call)
    with pytest.raises(ValueError, match="leave out backend='portable'"):
        model.generate(**call, backend="portable")
    with pytest.raises(ValueError, match="no effect with use_diffusion_mode=False"):
        model.generate(**call, backend="engine", use_diffusion_mode=False)


@pytest.mark.parametrize("reason", REFUSALS)
def test_auto_does_not_fall_back_where_fp8_was_wanted(model: OrthrusForCausalLM, on_gpu: None, reason: str):
    call: dict[str, Any] = {"input_ids": IDS, "max_new_tokens": 9, "draft_precision": "fp8"}
    _, stats = model.generate(**call, return_stats=True)
    assert stats.backend == "engine"
    with pytest.raises(ValueError, match=f"draft_precision='fp8' is for the engine alone.*{reason}"):
        model.generate(**call | REFUSALS[reason](model))


def test_a_chosen_attention_is_run_unless_the_engine_is_forced(on_gpu: None):
    model = copy.deepcopy(subject(implementation="eager"))
    with pytest.warns(UserWarning, match="attn_implementation 'eager'"):
        output = model.generate(IDS, max_new_tokens=9)
    forced, stats = model.generate(IDS, max_new_tokens=9, backend="engine", return_stats=True)
    assert forced.tolist() == output.tolist() and stats.backend == "engine"


def test_code_beside_a_checkpoint_has_no_engine(model: OrthrusForCausalLM, on_gpu: None, monkeypatch):
    """The copy that `trust_remote_code` runs: its types are not the package's."""
    monkeypatch.setattr(backends, "__name__", "transformers_modules.orthrus_decoding_backends")
    with pytest.warns(UserWarning, match="load it with orthrus.OrthrusForCausalLM"):
        _, stats = model.generate(IDS, max_new_tokens=3, return_stats=True)
    assert stats.backend == "portable"
    model.release_engine()
    model.double()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "fast"}, "backend must be one of 'auto', 'engine', 'portable', got 'fast'"),
        ({"backend": "portable", "cache_bytes": 10**6}, "no effect with backend='portable'"),
        ({"cache_bytes": 10**6}, "cache_bytes sizes .* the engine is not used here: 'auto' takes it on a GPU"),
        ({"cache_bytes": 0.5}, "cache_bytes must be int"),
        ({"backend": "engine", "block_size": 99}, "block_size must be"),
        ({"backend": "engine", "draft_precision": "int4"}, "draft_precision must be 'fp8' or None, got 'int4'"),
        ({"backend": "engine", "draft_precision": 8}, "draft_precision must be str"),
    ],
)
def test_a_users_mistake_is_named(model: OrthrusForCausalLM, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, max_new_tokens=3, **settings)


def test_an_error_of_the_users_is_no_refusal(model: OrthrusForCausalLM, on_gpu: None):
    """What a processor raises while the engine decodes is not swallowed, and decoding does not start anew."""
    calls = []

    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        model.generate(IDS, max_new_tokens=9, logits_processor=LogitsProcessorList([broken]))
    assert len(calls) == 1
    streamer = Recorder()
    output = model.generate(IDS, max_new_tokens=9, streamer=streamer)
    assert streamer.events[-1] == "end" and sum(streamer.events[:-1], []) == output[0].tolist()
    assert MASK not in output and len(random_prompt(7)) + 9 == output.shape[1]


def test_widths_are_chosen_where_no_text_depends_on_them(model: OrthrusForCausalLM, monkeypatch: pytest.MonkeyPatch):
    block_sizes = []

    class Noted(Decoder):
        def __init__(self, *args, **options):
            block_sizes.append(options["block_size"])
            super().__init__(*args, **options)

    def sizes(**settings) -> Any:
        model.generate(IDS, max_new_tokens=4, **settings)
        return block_sizes[-1]

    monkeypatch.setattr(generate, "Decoder", Noted)
    assert sizes(backend="engine") is None, "on a CPU the engine's bits may depend on widths"
    as_on_a_gpu = property(lambda chosen: "auto" if chosen.name == "engine" else None)
    monkeypatch.setattr(backends.Chosen, "default_block_size", as_on_a_gpu)
    assert sizes(backend="engine") == sizes(backend="engine", do_sample=True, seed=1) == "auto"
    assert sizes(backend="engine", block_size=3) == 3
    assert sizes(backend="engine", use_diffusion_mode=False) is None
    assert sizes(backend="engine", do_sample=True) is None, "a speculative text would depend on the clock"
    assert sizes(backend="portable") is None


@pytest.mark.parametrize(
    ("name", "exact", "default"), [("engine", True, "auto"), ("engine", False, None), ("portable", True, None)]
)
def test_only_the_engine_on_a_gpu_chooses_widths_by_itself(name: str, exact: bool, default: str | None):
    backend: Any = None
    assert backends.Chosen(backend, name, exact=exact).default_block_size == default
