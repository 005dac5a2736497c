"""Teaching a small base not to run in circles: sequence-level unlikelihood (Welleck et al. 2020, arXiv 1908.04319).

A small model that writes greedily falls into loops, and loops are easy to draft: they would make any view look good.
So the base continues training text itself, and learns from what it wrote: tokens that repeat inside a loop are made
less likely, its own sampled text before any loop and rows of the corpus keep everything else in place. Sampled below
temperature 1, its own text also makes it surer of what it prefers.

    B = rows, T = tokens of a row, V = vocabulary
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from orthrus.datagen.regenerate import continue_batches, is_new_ngram, loop_start
from orthrus.model.modeling import OrthrusLM
from orthrus.training.forward import Passes
from orthrus.training.ranks import rank
from orthrus.training.recipe import UnlikelihoodStage
from orthrus.training.trainer import Log, Optimisers, base_parameters, share_of_rank, thaw, token_rows

NGRAM = 4
"""A token repeats when the four tokens that end with it stood in the continuation before."""


def digit_kinds(texts: Sequence[str]) -> Tensor:
    """What each token counts as when repeats are looked for: all digits as one, other tokens as themselves. [V].

    A base that unlearns its loops may count instead ("axis7 : int7", "axis8 : int8"), which is as empty.
    """
    digits_V = torch.tensor([text.strip().isdecimal() for text in texts])
    tokens_V = torch.arange(len(texts))
    return torch.where(digits_V, tokens_V[digits_V].min(), tokens_V) if digits_V.any() else tokens_V


def judge(ids_BT: Tensor, first_B: Tensor, sampled_B: Tensor) -> tuple[Tensor, Tensor]:
    """(good, bad): tokens to make likelier and tokens to make less likely. Boolean, [B, T] both.

    good[b, t]: row b was sampled and t lies in its continuation, before any loop. bad[b, t]: t lies in a loop and ends
    an n-gram that the continuation had before.
    """
    places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    loop_B1 = loop_start(ids_BT, first_B)[:, None]
    good_BT = sampled_B[:, None] & (places_T >= first_B[:, None]) & (places_T < loop_B1)
    repeats_BT = F.pad(~is_new_ngram(ids_BT, first_B, ngram=NGRAM), (NGRAM - 1, 0), value=False)
    return good_BT, repeats_BT & (places_T >= loop_B1 + NGRAM)


def unlikelihood_loss(logits_BTV: Tensor, ids_BT: Tensor, good_BT: Tensor, bad_BT: Tensor, weight: float) -> Tensor:
    """Mean of -log p over good tokens + weight * mean of -log(1 - p) over bad ones, in nats. ()."""
    logits_BTV = logits_BTV.float()
    all_BT = logits_BTV.logsumexp(-1)
    logp_BT = logits_BTV.gather(-1, ids_BT[..., None])[..., 0] - all_BT
    # log(1 - p) from the other tokens' logits: in a loop p is 1 to the last digit, and 1 - p would have no gradient.
    against_BT = all_BT - logits_BTV.scatter(-1, ids_BT[..., None], -torch.inf).logsumexp(-1)
    likely = -(logp_BT * good_BT).sum() / good_BT.sum().clamp(min=1)
    unlikely = (against_BT * bad_BT).sum() / bad_BT.sum().clamp(min=1)
    return likely + weight * unlikely


def train_unlikelihood(
    model: OrthrusLM,
    tokens: np.ndarray,
    prompts: np.ndarray,
    stage: UnlikelihoodStage,
    *,
    kinds_V: Tensor | None = None,
    seed: int,
    log: Log,
) -> dict[str, list[float]]:
    """Rounds of writing and learning; the share of greedy rows that looped in each round, before its steps.

    `kinds_V` says what each token counts as when repeats are looked for (`digit_kinds`); itself by default.
    """
    device = next(model.parameters()).device
    optimisers = Optimisers(
        thaw(model, base_parameters(model)), learning_rate=stage.learning_rate, weight_decay=stage.weight_decay
    )
    passes = Passes(model, compiled=device.type == "cuda")
    loss_of = passes.compile(unlikelihood_loss)
    num_passes = share_of_rank(stage.rows_per_step, rows_per_pass=stage.own_rows_per_pass + stage.corpus_rows_per_pass)
    num_rows = num_passes * stage.own_rows_per_pass * stage.steps_per_round
    num_written = stage.rollouts.rows_per_batch * stage.rollouts.num_batches
    if num_written < num_rows or stage.rollouts.max_seconds is not None:
        raise ValueError(
            f"unlikelihood.rollouts: a round's steps take {num_rows} rows of each rank, "
            f"rows_per_batch x num_batches are {num_written}; write at least as many, and set no max_seconds"
        )
    row_tokens = stage.rollouts.row_tokens
    corpus = token_rows(
        tokens, row_tokens=row_tokens - 1, rows_per_pass=stage.corpus_rows_per_pass, seed=seed + rank(), device=device
    )
    looping: list[float] = []
    for number in range(stage.num_rounds):
        batches = list(continue_batches(model, prompts, stage.rollouts, seed=seed + 1000 * number + rank()))
        ids_BT, first_B, sampled_B = (torch.cat(column) for column in zip(*batches, strict=True))
        kinds_BT = ids_BT if kinds_V is None else kinds_V.to(device)[ids_BT]
        good_BT, bad_BT = judge(kinds_BT, first_B, sampled_B)
        looping.append(float((loop_start(kinds_BT, first_B) < row_tokens)[~sampled_B].float().mean()))
        generator = torch.Generator().manual_seed(seed + 1000 * number + rank())
        order = torch.randperm(len(ids_BT), generator=generator)[:num_rows].to(device)
        picks = iter(order.split(stage.own_rows_per_pass))
        for step in range(stage.steps_per_round):
            for _ in range(num_passes):
                pick, real_BT = next(picks), next(corpus)
                rows_BT = torch.cat([ids_BT[pick], real_BT])
                good = torch.cat([good_BT[pick], torch.ones_like(real_BT, dtype=torch.bool)])[:, 1:]
                bad = torch.cat([bad_BT[pick], torch.zeros_like(real_BT, dtype=torch.bool)])[:, 1:]
                logits_BTV = model.logits(passes.ar(rows_BT[:, :-1])[0])
                loss = loss_of(logits_BTV, rows_BT[:, 1:], good, bad, stage.weight)
                (loss / num_passes).backward()
            progress = (number + step / stage.steps_per_round) / stage.num_rounds
            optimisers.step(1.0 - progress)
        log(round=number, loss=loss.item(), looping=looping[-1])
    return {"looping_share_of_greedy_rows": looping}
