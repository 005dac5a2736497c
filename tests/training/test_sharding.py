"""Weights spread over ranks: what a rank holds between micro-batches."""

import json
from pathlib import Path

from tests.training.test_ranks import run_ranks

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from orthrus.config import OrthrusConfig
from orthrus.model.modeling import OrthrusLM
from orthrus.training.ranks import join_ranks, leave_ranks, rank
from orthrus.training.recipe import ViewStage
from orthrus.training.sharding import Sharded, shard
from orthrus.training.task import ViewTraining

device = join_ranks(torch.device("cpu"))
torch.manual_seed(0)
config = OrthrusConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, block_size=8, mask_token_id=96,
)
training = ViewTraining(OrthrusLM(config), ViewStage(blocks=((8, 4),)), isolated=False)
shard(training, device)
model = Sharded(training)
ids = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(rank()))
held = []
for _ in range(2):
    with Accelerator(cpu=True).no_sync(model):  # as Trainer does for all micro-batches of a step but the last
        model(ids, torch.zeros_like(ids), torch.ones_like(ids), [rank()])[0].backward()
    held.append({
        name: None if p.grad is None else [p.numel(), p.grad.to_local().numel(), str(p.grad.dtype)]
        for name, p in training.lm.view_parameters().items()
    })
(Path(sys.argv[1]) / f"held-{rank()}.json").write_text(json.dumps(held))
leave_ranks()
"""


def test_gradients_are_spread_after_every_micro_batch(tmp_path: Path) -> None:
    """As `budget.training_bytes` counts them: 4 bytes a parameter less than gradients that wait for the last."""
    run_ranks(2, tmp_path, PROGRAM)
    for rank in range(2):
        first, second = json.loads((tmp_path / f"held-{rank}.json").read_text())
        for name, gradient in [*first.items(), *second.items()]:
            assert gradient is not None, f"{name}: its gradient is kept whole until the last micro-batch"
            numbers, held, dtype = gradient
            assert held == numbers // 2 and dtype == "torch.float32", f"{name}: {held} of {numbers} numbers, {dtype}"
        assert len(first) == len(second) > 0, "no parameter was looked at"
