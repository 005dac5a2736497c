"""The passes: how each attention implementation is called, and what a broken checkpoint does."""

import copy

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthrus.decoding.decoder import Decoder
from orthrus.decoding.portable import PortableBackend, attention_kind
from tests.decoding.checks import check_drafts
from tests.decoding.subjects import decode_all, random_prompt, request, stock_text, subject


def varlen_attention(
    module, query, key, value, attention_mask, *, scaling, is_causal, dropout, cu_seq_lens_q, cu_seq_lens_k,
    max_length_q, max_length_k,
):  # fmt: skip
    """What flash_attn_varlen_func computes, with the layout transformers hands to it: [1, heads, packed, H]."""
    assert attention_mask is None and dropout == 0.0
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    group = query.shape[1] // key.shape[1]
    mixed = []
    for b in range(len(cu_seq_lens_q) - 1):
        q = query[0, :, cu_seq_lens_q[b] : cu_seq_lens_q[b + 1]]
        k = key[0, :, cu_seq_lens_k[b] : cu_seq_lens_k[b + 1]].repeat_interleave(group, 0)
        v = value[0, :, cu_seq_lens_k[b] : cu_seq_lens_k[b + 1]].repeat_interleave(group, 0)
        num_queries, num_keys = q.shape[1], k.shape[1]
        assert num_queries <= max_length_q and num_keys <= max_length_k
        weights = q @ k.transpose(1, 2) * scaling
        if is_causal:  # aligned at the bottom right, as flash attention 2.1 and later have it
            hidden = torch.arange(num_keys) > torch.arange(num_queries)[:, None] + num_keys - num_queries
            weights = weights.masked_fill(hidden, -torch.inf)
        mixed.append((weights.softmax(-1) @ v).transpose(0, 1))
    assert cu_seq_lens_q[-1] == query.shape[2] and cu_seq_lens_k[-1] == key.shape[2]
    return torch.cat(mixed)[None], None


@pytest.fixture
def packed_subject():
    """The subject behind a flash kernel that a CPU can run."""
    ALL_ATTENTION_FUNCTIONS.register("flash_attention_fake", varlen_attention)
    model = copy.deepcopy(subject())
    model.config._attn_implementation = "flash_attention_fake"
    yield model
    del ALL_ATTENTION_FUNCTIONS._global_mapping["flash_attention_fake"]


def test_packed_rows_give_the_same_text_and_drafts(packed_subject):
    prompts = [random_prompt(length, seed=length) for length in (3, 14, 1, 30)]
    requests = [request(prompt, 12 + 7 * i) for i, prompt in enumerate(prompts)]
    texts, records = decode_all(Decoder(PortableBackend(packed_subject)), requests)
    expected, expected_records = decode_all(Decoder(PortableBackend(subject())), requests)
    assert texts == expected
    assert [r.draft_ids for r in records] == [r.draft_ids for r in expected_records]
    assert texts[0] == stock_text(prompts[0], 12)


def test_packed_drafts_are_the_methods_formula(packed_subject):
    check_drafts(packed_subject, [random_prompt(2), random_prompt(9, seed=1)], 5)


def test_a_registered_function_gets_an_additive_mask():
    seen = []

    def custom(module, query, key, value, attention_mask, **options):
        seen.append(attention_mask)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("my_attention", custom)
    try:
        model = copy.deepcopy(subject())
        model.config._attn_implementation = "my_attention"
        prompt = random_prompt(5)
        assert decode_all(Decoder(PortableBackend(model)), [request(prompt, 10)])[0][0] == stock_text(prompt, 10)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["my_attention"]
    masks = [mask for mask in seen if mask is not None]
    assert masks and all(mask.shape[1] == 1 and mask.dtype == torch.float32 for mask in masks)


@pytest.mark.parametrize("name", ["flex_attention", "paged|sdpa"])
def test_what_cannot_decode_is_refused_by_name(name: str):
    with pytest.raises(ValueError, match="attn_implementation"):
        attention_kind(name)


def test_hub_flash_kernels_are_packed():
    assert attention_kind("kernels-community/flash-attn2") is attention_kind("flash_attention_4")
    assert attention_kind("kernels-community/metal-flash-sdpa") is attention_kind("eager")


def test_broken_weights_are_one_clear_error():
    model = copy.deepcopy(subject())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        Decoder(PortableBackend(model)).admit(request([1, 2], 4))


def test_a_model_without_a_mask_token_decodes_but_does_not_draft():
    model = copy.deepcopy(subject())
    model.config.mask_token_id = None
    prompt = random_prompt(4)
    texts, _ = decode_all(Decoder(PortableBackend(model)), [request(prompt, 8, drafting=False)])
    assert texts[0] == stock_text(prompt, 8)
    with pytest.raises(ValueError, match="mask_token_id"):
        decode_all(Decoder(PortableBackend(model)), [request(prompt, 8)])


@torch.inference_mode()
def test_garbage_beyond_the_lengths_is_never_read():
    """Drafts, rejected tokens and other rows' padding leave garbage there; make it as bad as finite numbers go."""
    prompts = [random_prompt(5), random_prompt(23, seed=1)]
    backend = PortableBackend(subject())
    decoder = Decoder(backend)
    texts = {decoder.admit(request(p, 40)).row: [] for p in prompts}
    for row in texts:
        texts[row] = decoder.tokens(row)[len(prompts[row]) :]
    while decoder.active:
        for row in texts:
            strip = backend.cache.arrange([row])
            for tensors in (backend.cache.keys, backend.cache.values):
                for tensor in tensors:
                    tensor[strip, :, backend.length(row) :] = 1e4
        for record in decoder.step():
            texts[record.row].extend(record.token_ids)
    for row, prompt in enumerate(prompts):
        assert texts[row] == stock_text(prompt, 40)


def test_the_lm_head_sees_one_row_of_a_prompt():
    model = copy.deepcopy(subject())
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    Decoder(PortableBackend(model)).admit(request(random_prompt(100), 4))
    assert seen == [1]
