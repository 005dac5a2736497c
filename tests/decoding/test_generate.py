"""`model.generate` as transformers users call it."""

import copy
import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

import orthrus.decoding.backends as backends
import orthrus.decoding.generate as generate_module
from tests.decoding.subjects import MASK, RiggedBackend, random_prompt, stock, subject

IDS = torch.tensor([random_prompt(7)])


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, length in enumerate((4, 9, 1)):
        ids[b, -length:] = torch.tensor(random_prompt(length, seed=b))
        mask[b, -length:] = 1
    return ids, mask


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """61 tokens: bytes and pairs of bytes, so that strings straddle token edges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[64:94]
    pairs = [(letters[i], letters[(7 * i + 1) % 30]) for i in range(30)]
    vocabulary = {token: i for i, token in enumerate(letters + [a + b for a, b in pairs] + ["<m>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.events: list = []

    def put(self, value: torch.Tensor) -> None:
        self.events.append(value.flatten().tolist())

    def end(self) -> None:
        self.events.append("end")


def rig(monkeypatch: pytest.MonkeyPatch, truth: list[list[int]], num_right: int) -> None:
    monkeypatch.setattr(
        backends, "PortableBackend", lambda m, **o: RiggedBackend(m, truth, lambda row, cycle: num_right, **o)
    )


def test_the_model_cards_call(capsys, tokenizer):
    model = copy.deepcopy(subject())
    model.generation_config.use_cache = False  # as the released checkpoints have it
    output = model.generate(
        input_ids=IDS, max_new_tokens=30, use_diffusion_mode=True, streamer=TextStreamer(tokenizer, skip_prompt=True)
    )
    expected = stock().generate(input_ids=IDS, max_new_tokens=30)
    assert output.tolist() == expected.tolist() and output.dtype == expected.dtype
    assert capsys.readouterr().out == tokenizer.decode(expected[0, 7:]) + "\n"


def test_a_streamer_gets_the_prompt_then_each_commit_then_the_end(monkeypatch):
    expected = stock().generate(input_ids=IDS, max_new_tokens=20)
    rig(monkeypatch, expected.tolist(), 4)
    recorder = Recorder()
    subject().generate(input_ids=IDS, max_new_tokens=20, streamer=recorder)
    assert recorder.events[0] == IDS[0].tolist()
    assert recorder.events[-1] == "end"
    assert [len(event) for event in recorder.events[1:-1]] == [1, 5, 5, 5, 4]
    assert sum(recorder.events[1:-1], []) == expected[0, 7:].tolist()


def test_a_streamer_of_a_batch_is_refused():
    ids, mask = padded_batch()
    with pytest.raises(ValueError, match="streamer"):
        subject().generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, streamer=Recorder())


@pytest.mark.parametrize("drafting", [True, False])
@pytest.mark.parametrize("num_right", [0, 3])
def test_scores_and_logits_are_stocks(monkeypatch, drafting: bool, num_right: int):
    ids, mask = padded_batch()
    settings: dict = dict(
        input_ids=ids, attention_mask=mask, max_new_tokens=15, return_dict_in_generate=True, output_scores=True,
        output_logits=True, repetition_penalty=1.2, eos_token_id=[17, 33], pad_token_id=0,
    )  # fmt: skip
    expected = stock().generate(**settings)
    truth = [row[9 - n :].tolist() for row, n in zip(expected.sequences, (4, 9, 1), strict=True)]
    rig(monkeypatch, truth, num_right)
    output = subject().generate(use_diffusion_mode=drafting, **settings)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert len(output.scores) == len(output.logits) == len(expected.scores)
    for step in range(len(expected.scores)):
        for b in range(3):
            written = expected.sequences[b, 9:].tolist()
            if any(token in (17, 33) for token in written[:step]):
                assert output.scores[step][b].argmax() == 0, "a row that has ended writes padding"
                continue
            for name in ("scores", "logits"):
                torch.testing.assert_close(
                    getattr(output, name)[step][b], getattr(expected, name)[step][b], rtol=1e-3, atol=1e-3
                )
    assert not output.scores[0].is_inference()
    assert subject().compute_transition_scores(output.sequences, output.scores).shape == (3, len(output.scores))


def test_stop_strings_that_straddle_tokens_are_stocks(monkeypatch, tokenizer):
    free = stock().generate(input_ids=IDS, max_new_tokens=40)
    text = tokenizer.decode(free[0, 7:])
    num_cut = 0
    for start in range(0, len(text) - 3, 6):
        for length in (1, 3):
            stop = text[start : start + length]
            settings: dict = dict(input_ids=IDS, max_new_tokens=40, stop_strings=[stop], tokenizer=tokenizer)
            expected = stock().generate(**settings)
            with monkeypatch.context() as patch:
                rig(patch, free.tolist(), 7)
                assert subject().generate(**settings).tolist() == expected.tolist()
            num_cut += expected.shape[1] < free.shape[1]
    assert num_cut > 5


def test_stop_strings_of_the_models_own_config(tokenizer):
    model = copy.deepcopy(subject())
    free = stock().generate(input_ids=IDS, max_new_tokens=30)
    model.generation_config.stop_strings = [tokenizer.decode(free[0, 15:17])]
    output = model.generate(input_ids=IDS, max_new_tokens=30, tokenizer=tokenizer)
    assert output.shape[1] <= 17 and output.tolist() == free[:, : output.shape[1]].tolist()
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(input_ids=IDS, max_new_tokens=30)


def test_rows_go_on_without_an_eos_as_in_stock(tokenizer):
    """Stock writes on a row that a criterion has ended until all rows have: without an EOS it has no padding."""
    ids, mask = padded_batch()

    class Ends:
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 7 == 3

    criteria = StoppingCriteriaList([Ends()])
    settings: dict = dict(input_ids=ids, attention_mask=mask, max_new_tokens=30, stopping_criteria=criteria)
    expected = stock().generate(**settings)
    assert expected.shape[1] > 11
    output, stats = subject().generate(**settings, return_stats=True)
    assert output.tolist() == expected.tolist()
    assert stats.num_tokens >= 3 * (expected.shape[1] - 9)


@pytest.mark.parametrize("seeded", [True, False])
def test_num_return_sequences_differ_and_repeat(seeded: bool):
    ids, mask = padded_batch()
    settings: dict = dict(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=True, temperature=1.5, num_return_sequences=3
    )

    def sample() -> torch.Tensor:
        if seeded:
            return subject().generate(**settings, seed=4)
        return subject().generate(**settings, generator=torch.Generator().manual_seed(4))

    first, second = sample(), sample()
    assert first.tolist() == second.tolist() and first.shape == (9, 21)
    assert len({tuple(row.tolist()) for row in first[:3]}) == 3
    if seeded:
        alone = subject().generate(ids[2:, -1:], max_new_tokens=12, do_sample=True, temperature=1.5, seed=4)
        assert alone[0, 1:].tolist() == first[6, 9:].tolist(), "the first copy is the seed's own text"


def test_a_seeded_text_does_not_notice_drafting():
    settings: dict = dict(
        input_ids=IDS, max_new_tokens=25, do_sample=True, temperature=1.2, top_p=0.9, min_p=0.01, seed=9
    )
    expected = subject().generate(use_diffusion_mode=False, **settings)
    for block_size in (2, 5, 8):
        assert subject().generate(block_size=block_size, **settings).tolist() == expected.tolist()
    speculative = subject().generate(sampling_rule="speculative", **settings)
    assert speculative.tolist() == subject().generate(sampling_rule="speculative", **settings).tolist()


def test_sampling_with_processors_is_coupled_too():
    settings: dict = dict(
        input_ids=IDS, max_new_tokens=20, do_sample=True, temperature=1.3, top_k=30, typical_p=0.9, seed=2,
        repetition_penalty=1.3,
    )  # fmt: skip
    expected = subject().generate(use_diffusion_mode=False, **settings)
    assert subject().generate(block_size=6, **settings).tolist() == expected.tolist()
    torch.manual_seed(0)
    unseeded: dict = {k: v for k, v in settings.items() if k != "seed"}
    first = subject().generate(**unseeded)
    torch.manual_seed(0)
    assert subject().generate(**unseeded).tolist() == first.tolist()


def test_sampling_settings_without_do_sample_are_greedy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = stock().generate(input_ids=IDS, max_new_tokens=12)
        assert subject().generate(input_ids=IDS, max_new_tokens=12, temperature=0.5).tolist() == expected.tolist()


def test_warpers_are_taken_off_the_end_of_the_list_only():
    user = TemperatureLogitsWarper(0.5)
    prepared = LogitsProcessorList([user, TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)])
    rest, sampling = generate_module._split_warpers(prepared, True)
    assert list(rest) == [user] and (sampling.temperature, sampling.top_k) == (0.7, 5)
    prepared = LogitsProcessorList([TopKLogitsWarper(5, min_tokens_to_keep=2)])
    rest, sampling = generate_module._split_warpers(prepared, True)
    assert len(rest) == 1 and sampling.temperature == 1


def test_a_generation_config_object_is_honoured():
    config = GenerationConfig(max_new_tokens=17, repetition_penalty=1.4, eos_token_id=[3, 9], pad_token_id=0)
    expected = stock().generate(input_ids=IDS, generation_config=config)
    assert subject().generate(input_ids=IDS, generation_config=config).tolist() == expected.tolist()
    assert subject().generate(IDS, config).tolist() == expected.tolist()


def test_prefix_functions_and_batch_indexed_processors_are_honoured():
    ids, mask = padded_batch()

    def allowed(row: int, prefix: torch.Tensor) -> list[int]:
        return [t for t in range(1, MASK) if (t + row + int(prefix[-1])) % 3]

    penalty = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=9)
    settings: dict = dict(
        input_ids=ids, attention_mask=mask, max_new_tokens=15, prefix_allowed_tokens_fn=allowed,
        logits_processor=LogitsProcessorList([penalty]), encoder_repetition_penalty=1.2, encoder_no_repeat_ngram_size=2,
    )  # fmt: skip
    assert subject().generate(**settings).tolist() == stock().generate(**settings).tolist()


def test_a_watermark_is_stocks():
    from transformers import WatermarkingConfig

    settings: dict = dict(input_ids=IDS, max_new_tokens=15, watermarking_config=WatermarkingConfig(bias=3.0))
    assert subject().generate(**settings).tolist() == stock().generate(**settings).tolist()


def test_padding_without_a_mask_is_inferred_as_in_stock():
    ids, _ = padded_batch()
    settings: dict = dict(input_ids=ids, max_new_tokens=10, pad_token_id=0)
    assert subject().generate(**settings).tolist() == stock().generate(**settings).tolist()


def test_a_time_limit_ends_generation():
    criteria = StoppingCriteriaList([MaxTimeCriteria(0.0)])
    assert subject().generate(input_ids=IDS, max_new_tokens=50, stopping_criteria=criteria).shape[1] == 8
    assert subject().generate(input_ids=IDS, max_new_tokens=50, max_time=1e-9).shape[1] == 8


def test_stats_come_with_the_output():
    output, stats = subject().generate(input_ids=IDS, max_new_tokens=20, return_stats=True)
    assert stats.num_tokens == output.shape[1] - 7 == 20
    _, plain = subject().generate(input_ids=IDS, max_new_tokens=20, return_stats=True, use_diffusion_mode=False)
    assert (plain.num_plain_steps, plain.num_cycles, plain.tokens_per_forward) == (19, 0, 1.0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_beams", 3), ("assistant_model", object()), ("prompt_lookup_num_tokens", 3), ("guidance_scale", 1.5),
        ("past_key_values", object()), ("inputs_embeds", torch.zeros(1, 2, 32)), ("position_ids", IDS),
        ("output_attentions", True), ("output_hidden_states", True), ("cache_implementation", "static"),
        ("use_cache", False), ("synced_gpus", True), ("max_new_token", 3), ("labels", IDS), ("block_size", 99),
        ("custom_generate", "somewhere/else"), ("token_healing", True), ("dola_layers", "high"),
        ("negative_prompt_ids", IDS), ("trust_remote_code", True), ("max_new_tokens", 0), ("temperature", -1.0),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(argument: str, value: object):
    settings: dict = {"max_new_tokens": 4, "do_sample": argument == "temperature", argument: value}
    name = "max_length|max_new_tokens" if argument == "max_new_tokens" else argument
    with pytest.raises(ValueError, match=name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject().generate(IDS, **settings)


def test_a_wrong_rule_is_refused():
    wrong: dict = {"sampling_rule": "other"}
    for do_sample in (True, False):
        with pytest.raises(ValueError, match="rule"):
            subject().generate(input_ids=IDS, max_new_tokens=4, do_sample=do_sample, **wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_diffusion_mode": "no"}, "use_diffusion_mode must be bool"),
        ({"exact": "yes"}, "exact must be bool"),
        ({"block_size": 8.0}, "block_size must be int"),
        ({"block_size": True}, "block_size must be int"),
        ({"seed": 1.5}, "seed must be int"),
        ({"generator": 5}, "generator must be Generator"),
        ({"seed": 1, "generator": torch.Generator()}, "seed or generator, not both"),
        ({"sampling_rule": "coupled"}, "add do_sample=True"),
        ({"input_ids": torch.tensor([1, 2])}, "int64 tensor"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, "int64 tensor"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.uint8)}, "int64 tensor"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, "int64 tensor"),
        ({"input_ids": torch.tensor([[1, 10_000]])}, "row 0 holds token 10000"),
        ({"input_ids": torch.tensor([[1, 2], [3, -4]])}, "row 1 holds token -4"),
        ({"input_ids": IDS.repeat(2, 1), "attention_mask": torch.ones(1, 7).long()}, r"shape \(1, 7\)"),
        ({"attention_mask": torch.ones(1, 3).long()}, r"shape \(1, 3\)"),
        ({"attention_mask": torch.zeros(1, 7).long()}, "hides all of row 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_decoded(settings: dict, message: str):
    arguments: dict = {"input_ids": IDS, "max_new_tokens": 4, "pad_token_id": 0} | settings
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject().generate(**arguments)


@pytest.mark.parametrize("place", ["", "model", "model.layers.1", "model.layers.0.self_attn", "model.norm"])
def test_hooks_that_no_pass_would_run_are_refused_by_name(place: str):
    model = subject()
    module = model.get_submodule(place)
    handle = module.register_forward_hook(lambda module, arguments, output: output)
    try:
        with pytest.raises(ValueError, match=f"{place or 'the model'} has a hook"):
            model.generate(IDS, max_new_tokens=4)
    finally:
        handle.remove()
    model.generate(IDS, max_new_tokens=4)


def test_hooks_on_what_passes_call_change_the_text_as_in_stock():
    torch.manual_seed(0)
    ours, theirs = subject(), stock()
    handles = [
        model.get_submodule(place).register_forward_hook(lambda module, arguments, output: output * 1.5)
        for model in (ours, theirs)
        for place in ("model.layers.1.mlp", "model.layers.0.self_attn.v_proj", "model.embed_tokens")
    ]
    try:
        expected = theirs.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(ours.generate(IDS, max_new_tokens=12, pad_token_id=0), expected)
    finally:
        for handle in handles:
            handle.remove()


def test_right_padding_is_refused():
    ids, mask = padded_batch()
    with pytest.raises(ValueError, match="attention_mask"):
        subject().generate(input_ids=ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=4, pad_token_id=0)


def test_synthid_is_refused():
    from transformers import SynthIDTextWatermarkingConfig

    with pytest.raises(ValueError, match="watermarking_config"):
        watermark = SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1, 2, 3])
        subject().generate(input_ids=IDS, max_new_tokens=4, do_sample=True, watermarking_config=watermark)
