"""The view's training: anchors, passes, loss and what may change."""

import hashlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from orthrus.config import OrthrusConfig
from orthrus.datagen.regenerate import OwnRows, continue_rows, is_new_ngram, loop_start
from orthrus.model.attention import run_layers
from orthrus.model.masks import block_training_mask
from orthrus.model.modeling import OrthrusLM
from orthrus.training.anchors import Blocks, sample_anchors
from orthrus.training.forward import Passes, block_mask
from orthrus.training.muon import Muon
from orthrus.training.recipe import ViewStage
from orthrus.training.rows import Rows, one_reply_rows, training_rows
from orthrus.training.trainer import Log, Saver, ViewTask, schedule, train_view


@pytest.fixture
def model(tiny_config: OrthrusConfig) -> OrthrusLM:
    """A random model whose view differs from its AR projections."""
    return OrthrusLM(tiny_config).eval()


BLOCKS = Blocks.of(((8, 2), (4, 3)))
WIDTHS = [8, 8, 4, 4, 4]


def some_rows(num_rows: int = 2, num_tokens: int = 40) -> Rows:
    """Rows whose reply begins after a token or two and runs to the end."""
    first = torch.arange(1, num_rows + 1)
    return one_reply_rows(torch.randint(0, 96, (num_rows, num_tokens)), first, torch.full_like(first, num_tokens))


def some_anchors(rows: Rows) -> torch.Tensor:
    return BLOCKS.sample(rows.anchorable_BT, torch.Generator().manual_seed(1))


def test_anchors_are_distinct_sorted_and_on_allowed_places() -> None:
    allowed = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    generator, seen = torch.Generator().manual_seed(0), torch.zeros_like(allowed)
    for _ in range(100):
        anchors = sample_anchors(allowed, num_anchors=10, generator=generator)
        assert allowed.gather(1, anchors).all() and (anchors.diff(dim=1) > 0).all()
        seen.scatter_(1, anchors, True)
    assert torch.equal(seen, allowed), "some allowed place is never drawn"


def test_anchors_repeat_evenly_when_a_row_has_too_few_places() -> None:
    allowed = torch.zeros(1, 40, dtype=torch.bool)
    allowed[0, [31, 35]] = True
    drawn = sample_anchors(allowed, num_anchors=4, generator=torch.Generator().manual_seed(0))
    assert drawn.tolist() == [[31, 31, 35, 35]]


def test_a_block_that_repeats_another_has_no_weight() -> None:
    rows = one_reply_rows(torch.arange(40)[None] % 96, torch.tensor([1]), torch.tensor([40]))
    # Groups of 2 x 8 and 3 x 4: place 10 is repeated within a group, and stands in both, which is no repetition.
    supervised_BQ = BLOCKS.supervised(rows.reply_BT, torch.tensor([[10, 10, 10, 20, 20]]))
    by_block = [int(supervised_BQ[0, BLOCKS.block_Q == block].sum()) for block in range(5)]
    assert by_block == [7, 0, 3, 3, 0]
    once = BLOCKS.supervised(rows.reply_BT, torch.tensor([[10, 11, 10, 20, 30]]))
    assert torch.equal(once, ~BLOCKS.is_last_Q[None]), "blocks at different places all count"


def test_a_row_of_few_places_has_the_loss_of_each_place_once(model: OrthrusLM) -> None:
    """However many copies of its blocks are computed."""
    first, end = torch.tensor([3]), torch.tensor([6])  # anchors at 3 and 4 alone
    rows = one_reply_rows(torch.randint(0, 96, (1, 40)), first, end)
    losses = []
    for count in (2, 7):
        task = ViewTask(model, ViewStage(blocks=((4, count),)))
        anchors = task.blocks.sample(rows.anchorable_BT, torch.Generator().manual_seed(0))
        loss, weight, _ = task.weighted(rows, anchors)
        assert weight == 3, "drafts of 4 and 5 behind anchor 3, of 5 behind anchor 4"
        losses.append(loss)
    torch.testing.assert_close(*losses, msg="copies of a block count again")


def test_own_rows_without_a_place_for_an_anchor_are_refused() -> None:
    with pytest.raises(ValueError, match="no place for an anchor"):
        OwnRows(torch.zeros(2, 40, dtype=torch.int16), torch.tensor([3, 33]), torch.tensor([32, 34]))


def test_own_rows_reply_up_to_their_loop_and_corpus_rows_from_their_second_token() -> None:
    own = OwnRows(torch.arange(30).view(3, 10).short(), torch.tensor([4, 5, 6]), torch.tensor([8, 10, 9]))
    rows = next(training_rows(own, np.arange(100, 200), rows_per_pass=4, real_share=0.25, seed=0))
    assert rows.ids_BT.dtype == torch.long and (rows.document_BT == 0).all() and not rows.isolated
    for ids, reply in zip(rows.ids_BT[:3], rows.reply_BT[:3], strict=True):
        row = int(ids[0]) // 10
        assert reply.tolist() == [int(own.first[row] <= t < own.end[row]) for t in range(10)]
    assert rows.ids_BT[3, 0] >= 100 and (rows.ids_BT[3].diff() == 1).all()
    assert rows.reply_BT[3].tolist() == [0, *[1] * 9]


def test_blocks_know_their_positions() -> None:
    rows = some_rows()
    anchors, ids = some_anchors(rows), rows.ids_BT
    got_ids, got_positions = BLOCKS.inputs(rows, anchors, 96)
    assert torch.equal(got_positions, BLOCKS.places(anchors)), "in a row of one document places are positions"
    for b in range(2):
        places = [(a, j) for a, width in enumerate(WIDTHS) for j in range(width)]
        assert got_positions[b].tolist() == [int(anchors[b, a]) + j for a, j in places]
        assert got_ids[b].tolist() == [int(ids[b, anchors[b, a]]) if j == 0 else 96 for a, j in places]
    assert BLOCKS.is_last_Q.tolist() == [j == width - 1 for width in WIDTHS for j in range(width)]


@torch.no_grad()
def test_block_pass_equals_decoding_each_block_alone(model: OrthrusLM) -> None:
    """Training sees what inference sees: all of the prefix before the anchor, the whole block, nothing else."""
    rows, passes = some_rows(), Passes(model, compiled=False)
    ids, anchors = rows.ids_BT, some_anchors(rows)
    _, clean = passes.ar(ids)
    together = passes.blocks(BLOCKS.inputs(rows, anchors, 96), clean, block_mask(BLOCKS, anchors, num_clean=40))
    for b in range(2):
        for a, (anchor, width) in enumerate(zip(anchors[b].tolist(), WIDTHS, strict=True)):
            _, prefix = passes.ar(ids[b : b + 1, :anchor])
            layer = iter(prefix)

            def attend(attention, q, k, v, layer=layer):  # noqa: ANN001, ANN202
                k_prefix, v_prefix = next(layer)
                k, v = torch.cat([k_prefix, k], 2), torch.cat([v_prefix, v], 2)
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)

            block = torch.tensor([[ids[b, anchor], *[96] * (width - 1)]])
            alone = run_layers(model.model, block, torch.arange(anchor, anchor + width)[None], attend, "diffusion")
            start = sum(WIDTHS[:a])
            torch.testing.assert_close(
                together[b, start : start + width], alone[0], msg=f"row {b}, block {a}: the training mask is wrong"
            )


def test_a_copied_view_on_its_own_anchor_row_has_no_loss_at_the_first_draft(tiny_config: OrthrusConfig) -> None:
    """Masked causally, the anchor row of a copied view sees what the AR row sees."""
    model = OrthrusLM(tiny_config).eval()
    model.init_view()
    rows, passes = some_rows(), Passes(model, compiled=False)
    anchors = some_anchors(rows)
    ar_hidden, clean = passes.ar(rows.ids_BT)
    mask = block_training_mask(anchors, BLOCKS.block_Q, 40)
    own = mask[:, :, 40:] & torch.ones(28, 28, dtype=torch.bool).tril()
    hidden = passes.blocks(BLOCKS.inputs(rows, anchors, 96), clean, torch.cat([mask[:, :, :40], own], dim=2))
    firsts = hidden[:, BLOCKS.offset_Q == 0]
    torch.testing.assert_close(firsts, ar_hidden.gather(1, anchors[:, :, None].expand(-1, -1, 32)))


def test_only_the_view_changes_and_its_loss_falls(model: OrthrusLM, tmp_path) -> None:  # noqa: ANN001
    model = model.to(torch.bfloat16)
    view = set(model.view_parameters())

    def digest(of_view: bool) -> str:
        state = [p for name, p in model.state_dict().items() if (name in view) == of_view]
        return hashlib.sha256(b"".join(p.view(torch.int16).numpy().tobytes() for p in state)).hexdigest()

    base_before, view_before = digest(False), digest(True)
    all_rows = some_rows(4)
    anchors = some_anchors(all_rows)
    stage = ViewStage(
        rows_per_step=4, rows_per_pass=2, blocks=((8, 2), (4, 3)), num_steps=40, warmup_steps=1, learning_rate=0.01
    )
    loss_before = ViewTask(model, stage)(all_rows, anchors)[0]

    def rows():  # noqa: ANN202
        while True:
            for some in (slice(0, 2), slice(2, 4)):
                yield Rows(all_rows.ids_BT[some], all_rows.document_BT[some], all_rows.reply_BT[some], isolated=False)

    log, saver = Log(stage="test", path=tmp_path / "log.jsonl"), Saver(save=lambda: None)
    assert train_view(model, rows(), stage, seed=0, log=log, saver=saver) == 40
    assert digest(False) == base_before, "training the view changed the frozen base"
    assert digest(True) != view_before
    assert ViewTask(model, stage)(all_rows, anchors)[0] < 0.9 * loss_before


def test_a_step_that_cannot_be_shared_and_a_block_too_wide_are_refused(model: OrthrusLM, tmp_path) -> None:  # noqa: ANN001
    log, saver = Log(stage="test", path=tmp_path / "log.jsonl"), Saver(save=lambda: None)
    with pytest.raises(ValueError, match="rows_per_step 5 must be a multiple of the 2 rows"):
        train_view(
            model, [], ViewStage(rows_per_step=5, rows_per_pass=2, blocks=((8, 1),)), seed=0, log=log, saver=saver
        )
    with pytest.raises(ValueError, match="blocks: width 9 is not in 2 .. 8"):
        ViewTask(model, ViewStage(blocks=((8, 1), (9, 1))))


def test_muon_equals_torch_muon_matrix_by_matrix() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(8, 16), torch.randn(8, 16), torch.randn(16, 8)]
    theirs = [p.clone() for p in ours]
    mine = Muon(ours, lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for p, r in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            r.grad = p.grad.clone()
        mine.step()
        reference.step()
    for p, r in zip(ours, theirs, strict=True):
        # Both iterate in bf16; batched products round differently.
        torch.testing.assert_close(p, r, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_bulk_continuations_equal_stock_greedy_generation(model: OrthrusLM) -> None:
    prompts = torch.randint(0, 96, (3, 10))
    stock = model.generate(prompts, max_new_tokens=20, do_sample=False, pad_token_id=0)
    ours = continue_rows(model, prompts, 30)
    assert torch.equal(ours, stock)


def test_new_ngrams_are_counted_within_the_continuation_only() -> None:
    torch.manual_seed(0)
    ids, first = torch.randint(0, 3, (4, 60)), torch.tensor([0, 5, 20, 50])
    new = is_new_ngram(ids, first, ngram=3)
    for b in range(4):
        seen: set[tuple[int, ...]] = set()
        for t in range(58):
            gram = tuple(ids[b, t : t + 3].tolist())
            assert new[b, t] == (t >= first[b] and gram not in seen), (b, t)
            if t >= first[b]:
                seen.add(gram)


def test_a_loop_starts_where_its_circle_repeats() -> None:
    fresh = list(range(100, 140))
    looping = torch.tensor([[*fresh, *([1, 2, 3, 4, 5] * 20)], [*range(140)]])
    start = loop_start(looping, torch.tensor([10, 10]), window=20, min_new=0.4)
    assert start[1] == 140, "a row without repetition does not loop"
    # From t on, at most 8 of 20 4-grams are new: those before the circle closes at 45, and the five of its first turn.
    assert 35 <= start[0] <= 45


def test_schedule_warms_up_holds_and_reaches_zero() -> None:
    factors = [schedule(s / 100, s, warmup_steps=10, cooldown_share=0.5) for s in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[30] == 1.0 and factors[100] == 0.0
    assert factors[75] == pytest.approx(0.5)
