"""What only a GPU can show: decoding there, and the training passes that a CPU runs in another form."""

import pytest
import torch

from orthrus.config import OrthrusConfig
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.environment import BUNDLED
from orthrus.model.modeling import OrthrusLM
from orthrus.training.anchors import Blocks
from orthrus.training.loss import Objective
from orthrus.training.recipe import ViewStage
from orthrus.training.rows import PADDING, Rows, one_reply_rows
from orthrus.training.task import ViewTraining
from orthrus.training.trainer import ViewTask, thaw
from orthrus.training.view_recipe import ViewSettings
from tests.test_bundled import PROMPTS, decode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafting_changes_no_text_on_cuda(dtype: torch.dtype) -> None:
    """fp32 by decisions, bf16 by equal bits (exact mode)."""
    model = OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=dtype).cuda().eval()
    plain, _ = decode(model, drafting=False)
    drafted, stats = decode(model, drafting=True)
    assert drafted == plain and len(plain) == len(PROMPTS)
    assert stats.tokens_per_cycle > 2.7, f"the view accepts less on CUDA than on a CPU: N {stats.tokens_per_cycle:.2f}"


def rows_of(packing: str) -> Rows:
    """Two rows: of one document each, or of three, the last of the second row cut short by padding."""
    ids = torch.randint(0, 250, (2, 128))
    if packing == "concatenated":
        return one_reply_rows(ids, torch.tensor([1, 5]), torch.tensor([128, 100]))
    lengths = torch.tensor([[30, 41, 57], [64, 3, 40]])
    document, reply = torch.full((2, 128), PADDING), torch.zeros(2, 128, dtype=torch.long)
    for b in range(2):
        ends = lengths[b].cumsum(0).tolist()
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            document[b, start:end], reply[b, start + 2 : end] = number, number + 1
    return Rows(ids, document, reply)


@pytest.mark.parametrize("packing", ["concatenated", "isolated"])
def test_flex_attention_trains_what_dense_attention_trains(packing: str) -> None:
    """Loss and gradients of a micro-batch: compiled flex_attention in fp32 against the dense mask on the CPU."""
    torch.manual_seed(0)
    config = OrthrusConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, block_size=16, mask_token_id=255,
    )  # fmt: skip
    model = OrthrusLM(config)
    stage = ViewStage(blocks=((16, 4), (8, 8)), objective=Objective(focus=0.5, decay=8.0))
    rows = rows_of(packing)
    anchors = Blocks.of(stage.blocks).sample(rows.anchorable_BT, torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", "cuda"):
        model = model.to(device)
        view = thaw(model, model.view_parameters())
        loss, _ = ViewTask(model, stage)(rows.to(device), anchors.to(device))
        loss.backward()
        found[device] = (loss.item(), {name: p.grad.cpu() for name, p in view.items() if p.grad is not None})
        model.zero_grad()
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-3)
    for name, gradient in found["cpu"][1].items():
        # TF32 is off by default; flex sums keys in another order.
        torch.testing.assert_close(found["cuda"][1][name], gradient, rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_fp32_weights_train_a_bf16_base_as_on_a_cpu(checkpointed: bool) -> None:
    """The module that Trainer wraps: compiled layers over fp32 twins, against the same in plain steps."""
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        config = OrthrusConfig(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=512, block_size=16, mask_token_id=255,
        )  # fmt: skip
        model = OrthrusLM(config).to(torch.bfloat16).to(device)
        settings = ViewSettings(blocks=((16, 4), (8, 8)))
        training = ViewTraining(model, settings, isolated=True, gradient_checkpointing=checkpointed)
        rows = rows_of("isolated").to(device)
        # Seeds draw other anchors on another device.
        anchors = training.task.blocks.sample(rows.anchorable_BT.cpu(), torch.Generator().manual_seed(0)).to(device)
        loss, _ = training.task(rows, anchors)
        loss.backward()
        view = model.view_parameters()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in view.values() if p.grad is not None)
        found[device] = (loss.item(), torch.cat([p.grad.flatten().cpu() for p in view.values() if p.grad is not None]))
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=2e-2)
    assert torch.nn.functional.cosine_similarity(found["cuda"][1], found["cpu"][1], dim=0) > 0.99
