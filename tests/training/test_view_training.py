"""The view's training: anchors, passes, loss and what may change."""

import hashlib

import pytest
import torch
from torch.nn import functional as F

from orthrus.config import OrthrusConfig
from orthrus.datagen.regenerate import continue_rows, is_new_ngram, loop_start
from orthrus.model.attention import run_layers
from orthrus.model.modeling import OrthrusLM
from orthrus.training.anchors import block_inputs, sample_anchors
from orthrus.training.forward import ar_pass, block_mask, block_pass
from orthrus.training.loss import position_weights, view_loss
from orthrus.training.muon import Muon
from orthrus.training.recipe import ViewStage
from orthrus.training.trainer import Log, Saver, schedule, train_view, view_step_loss


@pytest.fixture
def model(tiny_config: OrthrusConfig) -> OrthrusLM:
    """A random model whose view differs from its AR projections."""
    return OrthrusLM(tiny_config).eval()


def some_anchors(num_rows: int = 2, num_tokens: int = 40) -> torch.Tensor:
    first = torch.arange(1, num_rows + 1)
    generator = torch.Generator().manual_seed(1)
    last = torch.full_like(first, num_tokens - 8)
    return sample_anchors(first, last, num_anchors=3, generator=generator)


def test_anchors_are_distinct_sorted_and_between_first_and_last() -> None:
    first, last = torch.tensor([1, 5, 20]), torch.tensor([32, 32, 30])
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        anchors = sample_anchors(first, last, num_anchors=10, generator=generator)
        assert (anchors >= first[:, None]).all() and (anchors <= last[:, None]).all()
        assert (anchors.diff(dim=1) > 0).all()


def test_anchors_repeat_evenly_when_a_row_has_too_few_places() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = sample_anchors(torch.tensor([31]), torch.tensor([32]), num_anchors=4, generator=generator)
    assert anchors.tolist() == [[31, 31, 32, 32]]


def test_a_row_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for an anchor"):
        sample_anchors(torch.tensor([3, 33]), torch.tensor([32, 32]), num_anchors=1, generator=torch.Generator())


@torch.no_grad()
def test_block_pass_equals_decoding_each_block_alone(model: OrthrusLM) -> None:
    """Training sees what inference sees: all of the prefix before the anchor, the whole block, nothing else."""
    ids = torch.randint(0, 96, (2, 40))
    anchors = some_anchors()
    blocks = block_inputs(ids, anchors, block_size=8, mask_token_id=96)
    _, clean = ar_pass(model, ids)
    together = block_pass(model, blocks, clean, block_mask(anchors, block_size=8, num_clean=40)).unflatten(1, (3, 8))
    for b in range(2):
        for a, anchor in enumerate(anchors[b].tolist()):
            _, prefix = ar_pass(model, ids[b : b + 1, :anchor])
            layer = iter(prefix)

            def attend(attention, q, k, v, layer=layer):  # noqa: ANN001, ANN202
                k_prefix, v_prefix = next(layer)
                k, v = torch.cat([k_prefix, k], 2), torch.cat([v_prefix, v], 2)
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)

            block = torch.tensor([[ids[b, anchor], *[96] * 7]])
            alone = run_layers(model.model, block, torch.arange(anchor, anchor + 8)[None], attend, "diffusion")
            torch.testing.assert_close(together[b, a], alone[0], msg=f"row {b}, block {a}: the training mask is wrong")


def test_loss_equals_the_sum_written_out() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 40, 11), torch.randn(2, 3, 8, 11)
    anchors, weights = some_anchors(), position_weights(8, 5.0, torch.device("cpu"))
    loss, survival = view_loss(teacher, student, anchors, weights)
    terms, alive = [], torch.zeros(7)
    for b in range(2):
        for a in range(3):
            agrees = True
            for j in range(7):
                p = teacher[b, anchors[b, a] + j].softmax(-1)
                q = student[b, a, j].softmax(-1)
                terms.append(weights[j] * (p * (p / q).log()).sum())
                agrees = agrees and bool(p.argmax() == q.argmax())
                alive[j] += agrees / 6
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    torch.testing.assert_close(survival, alive)


def test_a_copied_view_on_its_own_anchor_row_has_no_loss_at_the_first_draft(tiny_config: OrthrusConfig) -> None:
    """Masked causally, the anchor row of a copied view sees what the AR row sees."""
    model = OrthrusLM(tiny_config).eval()
    model.init_view()
    ids, anchors = torch.randint(0, 96, (2, 40)), some_anchors()
    _, clean = ar_pass(model, ids)
    causal = block_mask(anchors, block_size=8, num_clean=40)
    own = causal[:, :, 40:] & torch.ones(24, 24, dtype=torch.bool).tril()
    blocks = block_inputs(ids, anchors, block_size=8, mask_token_id=96)
    hidden = block_pass(model, blocks, clean, torch.cat([causal[:, :, :40], own], dim=2)).unflatten(1, (3, 8))
    ar_hidden, _ = ar_pass(model, ids)
    torch.testing.assert_close(hidden[:, :, 0], ar_hidden.gather(1, anchors[:, :, None].expand(-1, -1, 32)))


def test_only_the_view_changes_and_its_loss_falls(model: OrthrusLM, tmp_path) -> None:  # noqa: ANN001
    model = model.to(torch.bfloat16)
    view = set(model.view_parameters())

    def digest(of_view: bool) -> str:
        state = [p for name, p in model.state_dict().items() if (name in view) == of_view]
        return hashlib.sha256(b"".join(p.view(torch.int16).numpy().tobytes() for p in state)).hexdigest()

    base_before, view_before = digest(False), digest(True)
    ids = torch.randint(0, 96, (4, 40))
    anchors = some_anchors(4)
    weights, mask = position_weights(8, None, torch.device("cpu")), block_mask(anchors, block_size=8, num_clean=40)
    loss_before = view_step_loss(model, ids, anchors, weights, mask)[0]
    stage = ViewStage(rows_per_step=4, rows_per_pass=2, num_anchors=3, num_steps=40, warmup_steps=1, learning_rate=0.01)

    def rows():  # noqa: ANN202
        while True:
            yield ids[:2], torch.tensor([1, 2]), torch.tensor([32, 32])
            yield ids[2:], torch.tensor([3, 4]), torch.tensor([32, 32])

    assert (
        train_view(model, rows(), stage, seed=0, log=Log(path=tmp_path / "log.jsonl"), saver=Saver(save=lambda: None))
        == 40
    )
    assert digest(False) == base_before, "training the view changed the frozen base"
    assert digest(True) != view_before
    assert view_step_loss(model, ids, anchors, weights, mask)[0] < 0.9 * loss_before


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
    ours = continue_rows(model, prompts, 30, torch.zeros(3, 1), torch.Generator())
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
