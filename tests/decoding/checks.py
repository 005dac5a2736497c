"""The checks that the tests run and that planted bugs must fail."""

import itertools
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import orthrus.decoding.verify as verify
from orthrus.decoding.decoder import Decoder
from orthrus.decoding.portable import PortableBackend
from orthrus.decoding.sampling import Laws, Sampling, warp
from orthrus.model.attention import run_layers
from tests.decoding.subjects import MASK, RiggedBackend, decode_all, request


def check_every_acceptance_count(model: nn.Module, truth: list[int], num_prompt: int, block_size: int) -> None:
    """Force each count 0 .. block_size - 1, up and down; the text is the truth and acceptance is as told."""
    counts = list(range(block_size)) + list(range(block_size))[::-1]
    num_new = 1 + sum(count + 1 for count in counts)
    assert len(truth) >= num_prompt + num_new
    backend = RiggedBackend(model, [truth], lambda row, cycle: (counts + [0] * num_new)[cycle])
    texts, records = decode_all(Decoder(backend, block_size=block_size), [request(truth[:num_prompt], num_new)])
    assert texts[0] == truth[num_prompt : num_prompt + num_new], f"block {block_size}: another text than stock's"
    accepted = [record.num_accepted for record in records[1:]]
    assert accepted == counts, f"block {block_size}: accepted {accepted}, the drafter was right {counts} times"


def reference_draft(model: nn.Module, tokens: list[int], width: int) -> list[int]:
    """The diffusion view's greedy drafts after `tokens`, without cache or mask: every key is put there by hand."""
    prefix_kv: list[tuple[Tensor, Tensor]] = []
    group = model.config.num_attention_heads // model.config.num_key_value_heads

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> Tensor:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        weights = (q @ k.transpose(2, 3)) * scale
        if is_causal:
            for row in range(q.shape[2]):
                weights[:, :, row, row + 1 :] = -torch.inf
        return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def read_prefix(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prefix_kv.append((k, v))
        return attention(q, k, v, module.scaling, True)

    def read_block(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prefix_k, prefix_v = prefix_kv[module.layer_idx]
        return attention(q, torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2), module.scaling, False)

    with torch.no_grad():
        length = len(tokens) - 1
        run_layers(model.model, torch.tensor([tokens[:-1]]), torch.arange(length)[None], read_prefix, "ar")
        block = torch.tensor([[tokens[-1]] + [MASK] * width])
        positions = torch.arange(length, length + width + 1)[None]
        hidden = run_layers(model.model, block, positions, read_block, "diffusion")
        return model.logits(hidden)[0, :width].argmax(-1).tolist()


def check_drafts(model: nn.Module, prompts: list[list[int]], block_size: int) -> None:
    """Every block that the decoder proposes, in a batch, is the one the method's formula gives for that row alone."""
    decoder = Decoder(PortableBackend(model), block_size=block_size)
    _, records = decode_all(decoder, [request(prompt, 30) for prompt in prompts])
    tokens = {}
    for record in records:
        so_far = tokens.setdefault(record.row, list(prompts[record.row]))
        if record.num_drafted:
            expected = reference_draft(model, so_far, record.num_drafted)
            assert list(record.draft_ids) == expected, f"row {record.row} at {len(so_far)} tokens: another draft"
        so_far.extend(record.token_ids)


def check_acceptance(model: nn.Module, prompts: list[list[int]], at_least: float) -> None:
    """A view that has learned its task is believed: the one sign of a broken drafter that a user ever sees is N."""
    decoder = Decoder(PortableBackend(model))
    texts, records = decode_all(decoder, [request(prompt, 24) for prompt in prompts])
    plain, _ = decode_all(Decoder(PortableBackend(model)), [request(p, 24, drafting=False) for p in prompts])
    assert texts == plain
    cycles = [record for record in records if record.num_drafted]
    tokens_per_cycle = 1 + sum(record.num_accepted for record in cycles) / len(cycles)
    assert tokens_per_cycle >= at_least, f"acceptance fell: {tokens_per_cycle:.2f} tokens per cycle, not {at_least}"


# Exact law on a vocabulary of three: every combination of the uniforms on a grid on which every decision is exact.

GRID = 12
"""p and q below are quarters, so acceptance ratios, residuals and cumulated weights are all multiples of 1/12."""

P_OF: dict[tuple[int, ...], list[float]] = {
    (): [0.25, 0.25, 0.5],
    (0,): [0.5, 0.25, 0.25],
    (1,): [0.0, 0.5, 0.5],
    (2,): [0.25, 0.75, 0.0],
}
"""The AR law after a prefix; a prefix of two tokens has the law of its last token."""

Q_LAWS = [
    ([0.25, 0.25, 0.5], [0.5, 0.5, 0.0]),
    ([0.5, 0.5, 0.0], [0.25, 0.25, 0.5]),
    ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]),
    ([0.0, 0.5, 0.5], [0.0, 0.0, 1.0]),
    ([0.75, 0.0, 0.25], [0.25, 0.5, 0.25]),
]
"""Laws of two drafts, independent of each other given the prefix, as a diffusion view's are."""


def p_of(prefix: tuple[int, ...]) -> list[float]:
    return P_OF[prefix[-1:]]


def joint_law(num_tokens: int) -> Tensor:
    """The AR law of the first tokens. [3] * num_tokens."""
    law = torch.zeros([3] * num_tokens, dtype=torch.float64)
    for tokens in itertools.product(range(3), repeat=num_tokens):
        law[tokens] = 1.0
        for i, token in enumerate(tokens):
            law[tokens] *= p_of(tokens[:i])[token]
    return law


def accept_by_laws(p: Tensor, q: Tensor, drafts: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """`accept_speculative` where all of the drafting law is there. q [B, J, V]."""
    q_at = partial(verify.at_column, q)
    return verify.accept_speculative(p, verify.of_tokens(q, drafts), q_at, drafts, *others)


def check_speculative_law() -> None:
    """Summed over all randomness, the first three tokens that drafting and verification write have the AR law."""
    u = (torch.arange(GRID) + 0.5) / GRID
    draft_1, draft_2, accept_1, accept_2, after = torch.meshgrid(u, u, u, u, u, indexing="ij")
    u_draft = torch.stack([draft_1.flatten(), draft_2.flatten()], 1)
    u_accept = torch.stack([accept_1.flatten(), accept_2.flatten()], 1)
    u_next = after.reshape(-1, 1).expand(-1, 3)
    num = len(u_draft)
    table = torch.tensor([p_of(()), p_of((0,)), p_of((1,)), p_of((2,))])
    for q_law in Q_LAWS:
        for width in (0, 1, 2):
            q = torch.tensor(q_law)[None].expand(num, -1, -1)
            drafts = verify.pick_inverse_cdf(q, u_draft)
            p = torch.stack([table[0].expand(num, -1), table[1 + drafts[:, 0]], table[1 + drafts[:, 1]]], 1)
            widths = torch.full((num,), width)
            accepted, written = accept_by_laws(p, q, drafts, widths, u_accept, u_next)
            law = torch.zeros(3, 3, 3, dtype=torch.float64)
            for count in range(3):
                rows = written[accepted == count][:, : count + 1]
                codes = (rows * 3 ** torch.arange(count + 1)).sum(1).bincount(minlength=3 ** (count + 1))
                for code, times in enumerate(codes.tolist()):
                    prefix = tuple(code // 3**i % 3 for i in range(count + 1))
                    for rest in itertools.product(range(3), repeat=2 - count):
                        whole = prefix + rest
                        weight = times / num
                        for i in range(count + 1, 3):
                            weight *= p_of(whole[:i])[whole[i]]
                        law[whole] += weight
            torch.testing.assert_close(law, joint_law(3), rtol=0, atol=1e-9, msg=f"another law: {q_law}, width {width}")


COMPANY = [
    Sampling(temperature=0.7),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.3, top_k=50, top_p=0.6),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(),
    Sampling(temperature=0.9, top_p=0.95, min_p=0.01),
    Sampling(temperature=0.1),
]
"""Rows that agree in nothing."""


def check_scores_in_company(device: torch.device, num_tokens: int) -> None:
    """A row's scores have the same bits alone, at one position or several, and among rows of other laws."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(len(COMPANY), 8, num_tokens, generator=generator, device=device) * 3
    logits[:, 1::2] = logits[:, 1::2].round()  # ties, and many tokens of one probability
    logits[:, 0, ::7] -= 300  # tokens of probability 0
    logits[:, 2] = logits[:, 2, :1] - torch.arange(num_tokens, device=device).ge(10) * 200  # ten of probability 0.1
    together = warp(logits, Laws.of(COMPANY, device))
    for b, sampling in enumerate(COMPANY):
        laws = Laws.of([sampling], device)
        for columns in (slice(None), *(slice(t, t + 1) for t in range(logits.shape[1]))):
            alone = warp(logits[b : b + 1, columns], laws)[0]
            assert torch.equal(alone, together[b, columns]), f"{sampling}, columns {columns}: others change its scores"


def chi_squared(counts: Tensor, law: Tensor) -> float:
    """How many standard deviations the statistic lies above its mean."""
    expected = law * counts.sum()
    enough = expected >= 5
    counts = torch.cat([counts[enough], counts[~enough].sum()[None]])
    expected = torch.cat([expected[enough], expected[~enough].sum()[None]])
    kept = expected > 0
    assert counts[~kept].sum() == 0, "a token of probability 0 was written"
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    return (statistic - freedom) / (2 * max(freedom, 1)) ** 0.5


def law_of(logits: Tensor, temperature: float) -> Tensor:
    return F.softmax(logits.double() / temperature, -1)
