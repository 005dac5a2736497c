"""Decoding while a view is trained: N rises when training sees what decoding sees, and a broken mask is called so."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from orthrus.config import OrthrusConfig
from orthrus.decoding.stats import DecodingStats
from orthrus.model.modeling import OrthrusLM
from orthrus.training import acceptance, forward
from orthrus.training.acceptance import HeldOutPrompts
from orthrus.training.task import ViewTraining
from orthrus.training.view_recipe import EvaluationSettings, TrainSettings, ViewSettings
from orthrus.training.view_trainer import OrthrusTrainer, training_arguments
from tests.cli.tiny import byte_tokenizer
from tests.decoding.subjects import randomise
from tests.decoding.trained import LENGTH, MODULUS, optimise

BLOCK = 5


@pytest.fixture(scope="module")
def counter() -> dict[str, Tensor]:
    """Weights of a base that counts."""
    torch.manual_seed(0)
    model = new_model()
    randomise(model, seed=0, std=0.3)
    optimise([p for name, p in model.named_parameters() if "_diff." not in name], 400, lambda: base_loss(model))
    model.init_view()
    return model.state_dict()


def counting(num_rows: int) -> Tensor:
    """Rows that count by 1 .. 8: the last token alone does not say which is next, the one before it does."""
    start, step = torch.randint(0, MODULUS, (num_rows, 1)), torch.randint(1, 9, (num_rows, 1))
    return (start + step * torch.arange(LENGTH)) % MODULUS


def base_loss(model: Any) -> Tensor:
    ids = counting(16)
    return F.cross_entropy(model(ids).logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())


def new_model() -> Any:
    return OrthrusLM(
        OrthrusConfig(
            vocab_size=MODULUS + 1,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            block_size=BLOCK,
            mask_token_id=MODULUS,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )  # fmt: skip
    )


class Rows(torch.utils.data.Dataset):
    """Rows that count, each one reply."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.ids = counting(256)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"ids": ids, "document": torch.zeros_like(ids), "reply": torch.ones_like(ids)}


def train(counter: dict[str, Tensor], out: Path) -> HeldOutPrompts:
    """A run of 250 steps; the callback that looked on."""
    model = new_model()
    model.load_state_dict(counter)
    out.mkdir()
    settings = TrainSettings(
        num_steps=250, rows_per_step=16, rows_per_pass=16, learning_rate=5e-3, save_steps=1000, log_steps=50
    )
    args = training_arguments(settings, out, seed=0, num_steps=250, device=torch.device("cpu"))
    training = ViewTraining(model, ViewSettings(blocks=((BLOCK, 12),)), isolated=False)
    held = HeldOutPrompts(
        [[1 + step * i for i in range(4)] for step in range(1, 8)],
        EvaluationSettings(every=250, warn_after=250, warn_below=1.5, max_new_tokens=30),
        tokenizer=byte_tokenizer(),
    )
    trainer = OrthrusTrainer(
        training, args, settings=settings, rows=Rows(), collate=collate, run_facts={}, callbacks=[held]
    )
    model.load_report = type("Report", (), {"folder": out, "form": "base", "base": Base()})()
    held.trainer = trainer
    trainer.train()
    return held


class Base:
    """What a checkpoint names as its base."""

    id, revision, fingerprint = "counter", None, "sha256:0"


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def test_n_rises_and_nothing_is_said(
    counter: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = train(counter, tmp_path / "out")
    (_, first), (_, last) = held.n
    assert last > first and last > 2
    assert "warning" not in capsys.readouterr().out


def test_a_mask_that_shows_a_block_its_future_is_called_what_it_is(
    counter: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The comparison the wrong way round: blocks read what they should write. On training rows that looks splendid."""
    right = forward.block_training_mask

    def wrong(anchors_BA: Tensor, block_Q: Tensor, num_clean: int, document_BT: Tensor | None = None) -> Tensor:
        mask_BQK = right(anchors_BA, block_Q, num_clean, document_BT)
        return torch.cat([~mask_BQK[:, :, :num_clean], mask_BQK[:, :, num_clean:]], dim=2)

    monkeypatch.setattr(forward, "block_training_mask", wrong)
    held = train(counter, tmp_path / "out")
    output = capsys.readouterr().out
    assert held.n[-1][1] < 1.5, held.n
    assert "warning: a block of a training row is not what it is in decoding" in output.split("warning: after")[0]
    assert "warning: after 250 steps N is 1." in output and "the training mask" in output
    assert "so decoding sees something else than training does" in output


@pytest.mark.parametrize(("after", "is_said"), [(1.5, True), (1.6, True), (1.8, False)])
def test_n_that_is_not_near_one_but_does_not_rise_is_called_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], after: float, is_said: bool
) -> None:
    """A copy of the AR view drafts something: with a broken mask N stays where it was, or falls, but not to 1."""
    control, tokenizer = SimpleNamespace(should_log=False), byte_tokenizer()
    training = SimpleNamespace(lm=new_model(), task=SimpleNamespace(blocks=SimpleNamespace(groups=((BLOCK, 1),))))
    trainer = SimpleNamespace(
        training=training, args=SimpleNamespace(device=torch.device("cpu")), settings=TrainSettings(num_steps=8),
        control=control, log=lambda logs: None, rows_n=1.3,
    )  # fmt: skip
    held: Any = HeldOutPrompts([[1, 2]], EvaluationSettings(warn_after=8), tokenizer=tokenizer)
    held.trainer = trainer
    for step, n in ((0, 1.6), (8, after)):
        stats = DecodingStats(block_size=BLOCK, num_cycles=10, num_accepted=round(10 * (n - 1)))
        monkeypatch.setattr(acceptance, "draft_greedily", lambda *args, stats=stats, **options: [stats])
        held.look(step)
    assert ("no more than before training, 1.60" in capsys.readouterr().out) == is_said
