"""What only a GPU can show: decoding there, and the training passes that a CPU runs in another form."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthrus.config import OrthrusConfig
from orthrus.decoding.generate import OrthrusForCausalLM
from orthrus.environment import BUNDLED
from orthrus.model.masks import block_training_intervals
from orthrus.model.modeling import OrthrusLM
from orthrus.training.anchors import Blocks
from orthrus.training.forward import dense_attend
from orthrus.training.loss import Objective
from orthrus.training.recipe import ViewStage
from orthrus.training.rows import PADDING, Rows, one_reply_rows
from orthrus.training.task import ViewTraining
from orthrus.training.trainer import ViewTask, thaw
from orthrus.training.view_recipe import ViewSettings
from tests.decoding.checks import check_scores_in_company
from tests.test_bundled import PROMPTS, decode

if torch.cuda.is_available():
    from orthrus.training.interval_attention import interval_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafting_changes_no_text_on_cuda(dtype: torch.dtype) -> None:
    """fp32 by decisions, bf16 by equal bits (exact mode)."""
    model = OrthrusForCausalLM.from_pretrained(BUNDLED, dtype=dtype).cuda().eval()
    plain, _ = decode(model, drafting=False)
    drafted, stats = decode(model, drafting=True)
    assert drafted == plain and len(plain) == len(PROMPTS)
    assert stats.tokens_per_cycle > 2.7, f"the view accepts less on CUDA than on a CPU: N {stats.tokens_per_cycle:.2f}"


@pytest.mark.parametrize("num_tokens", [512, 49_152, 151_936])
def test_scores_have_the_same_bits_alone_and_in_company(num_tokens: int) -> None:
    """A number that divides becomes its reciprocal here, and a scan's order follows the rows."""
    check_scores_in_company(torch.device("cuda"), num_tokens)


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
def test_intervals_train_what_a_dense_mask_trains(packing: str) -> None:
    """Loss and gradients of a micro-batch in fp32: compiled layers over the kernels against the dense mask on a CPU."""
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
        # TF32 is off by default; the kernels sum keys in another order.
        torch.testing.assert_close(found["cuda"][1][name], gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("isolated", [False, True])
def test_kernels_at_the_shape_of_qwen3(isolated: bool) -> None:
    """bf16, heads of 128 and 256 blocks of 32: as far from an fp32 reference as PyTorch's own attention is."""
    torch.manual_seed(0)
    num_clean, blocks = 2048, Blocks.of(((32, 256),), torch.device("cuda"))
    anchors = torch.rand(1, num_clean, device="cuda").argsort(dim=1)[:, :256].sort(dim=1).values
    document = torch.arange(num_clean, device="cuda")[None] // 300 if isolated else None
    intervals = block_training_intervals(anchors, blocks.block_Q, blocks.offset_Q, document)
    shapes = [(4, 8192), (2, num_clean), (2, num_clean), (2, 8192), (2, 8192)]
    tensors = [torch.randn(1, places, n, 128, device="cuda").transpose(1, 2).bfloat16() for n, places in shapes]
    direction = torch.randn(1, 8192, 4 * 128, device="cuda").bfloat16()
    mask = intervals.mask(num_clean)
    attention: Any = SimpleNamespace(scaling=128**-0.5)

    def run(dtype: torch.dtype, attend: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        q, ck, cv, ok, ov = (x.to(dtype) for x in tensors)
        leaves = [x.requires_grad_() for x in (q, ok, ov)]
        mixed = attend(q, (ck, cv), (ok, ov))
        return [x.float() for x in (mixed.detach(), *torch.autograd.grad(mixed, leaves, direction.to(dtype)))]

    def dense(q: torch.Tensor, clean: tuple, own: tuple) -> torch.Tensor:
        keys, values = (torch.cat(pair, dim=2) for pair in zip(clean, own, strict=True))
        return dense_attend(attention, q, keys, values, mask)

    truth, theirs = run(torch.float32, dense), run(torch.bfloat16, dense)
    ours = run(torch.bfloat16, lambda q, clean, own: interval_attention(q, clean, own, intervals, scale=128**-0.5))
    for name, true, one, other in zip(("out", "dq", "dk", "dv"), truth, ours, theirs, strict=True):
        error, usual = (one - true).norm() / true.norm(), (other - true).norm() / true.norm()
        assert error < 1.5 * usual, f"{name}: relative error {error:.2e}, PyTorch's own {usual:.2e}"


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
