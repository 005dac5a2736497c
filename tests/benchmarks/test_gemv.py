"""Kernels for one row against the engine's twins; in fp32, where only the order of sums tells them apart."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from orthrus.engine import reference
from orthrus.engine.reference import HeadNorms, Rotary
from tests.engine.interpreter import DEVICE
from tests.engine.passes import random_pages

pytest.importorskip("triton")
from benchmarks.gemv import Spread, Unnormed, Unplaced  # noqa: E402

from benchmarks import gemv  # noqa: E402

# One block and many a program; inputs in one chunk, in two and three, whole and not.
SPREADS = [Spread(4, 1, 4, 0), Spread(8, 2, 4, 2), Spread(2, 1, 8, 1)]
WIDTHS = [2048, 2500]
NUM_OUTPUTS = 48


def expected(x: Tensor | Unnormed, weight: Tensor, kind: str, residual: Tensor | None) -> Tensor:
    """What a product of this kind is."""
    x = x.normed() if isinstance(x, Unnormed) else x
    if kind == "swiglu":
        return reference.swiglu(x, weight)
    if kind == "largest":
        return reference.head_argmax(x, weight)
    return reference.linear(x, weight, residual_RE=residual)


@pytest.mark.parametrize("spread", SPREADS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["sum", "swiglu", "largest"])
def test_product_of_a_row_is_the_twin_s(kind: str, width: int, spread: Spread):
    torch.manual_seed(0)
    weight = torch.randn(NUM_OUTPUTS, width, device=DEVICE) / width**0.5
    x, residual = torch.randn(1, width, device=DEVICE), torch.randn(1, NUM_OUTPUTS, device=DEVICE)
    unnormed = Unnormed(3 * x, torch.rand(width, device=DEVICE) + 0.5, 1e-3)
    of = residual if kind == "sum" else None
    for row in (x, unnormed):
        found = gemv.multiply(row, weight, spread, kind=kind, residual_RE=of)
        # fp32: sums of 2,500 products in another order.
        torch.testing.assert_close(found, expected(row, weight, kind, of), rtol=1e-4, atol=1e-5)


def test_the_first_of_equal_logits_is_the_largest():
    x, weight = torch.ones(1, 64, device=DEVICE), torch.zeros(48, 64, device=DEVICE)
    weight[[13, 30, 41]] = 1.0
    assert gemv.multiply(x, weight, Spread(4, 1, 4, 1), kind="largest").item() == 13


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("length", [0, 5, 63, 64, 127, 150])
@pytest.mark.parametrize("shape", [(4, 2, 16), (3, 3, 32)], ids=str)
def test_attention_of_one_position_is_the_twin_s(shape: tuple[int, int, int], length: int, has_norms: bool):
    num_heads, num_groups, head_dim = shape
    torch.manual_seed(length)
    pages = random_pages([length], 1, num_groups=num_groups, head_dim=head_dim, page_slots=16, table_pages=16)
    twin = pages._replace(keys_PSGH=pages.keys_PSGH.nan_to_num(), values_PSGH=pages.values_PSGH.nan_to_num())
    qkv = torch.randn(1, (num_heads + 2 * num_groups) * head_dim, device=DEVICE)
    angles = torch.outer(torch.arange(256), 2.0 ** -torch.arange(head_dim // 2)).repeat(1, 2)
    rotary = Rotary(angles.cos().to(DEVICE), angles.sin().to(DEVICE))
    query_norm, key_norm = torch.rand(2, head_dim, device=DEVICE) + 0.5
    norms = HeadNorms(query_norm, key_norm, 1e-3) if has_norms else None
    q = reference.place_heads(qkv, twin, rotary, norms, num_heads=num_heads, width=1)
    found = gemv.attend(Unplaced(qkv, rotary, norms, num_heads), pages, width=1, scale=0.2)
    torch.testing.assert_close(found, reference.attend(q, twin, width=1, scale=0.2), rtol=1e-4, atol=1e-5)
    page, slot = pages.tables_BM[0, length // 16], length % 16
    for own, others in ((pages.keys_PSGH, twin.keys_PSGH), (pages.values_PSGH, twin.values_PSGH)):
        torch.testing.assert_close(own[page, slot], others[page, slot], rtol=1e-5, atol=1e-6)
        own[page, slot] = others[page, slot]
        assert torch.equal(own.nan_to_num(), others), "a slot that is not this position's was written"


def test_a_long_table_is_the_engine_s_attention(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    pages = random_pages([100], 1, num_groups=2, head_dim=16, page_slots=16, table_pages=16)
    qkv = torch.randn(1, 8 * 16, device=DEVICE)
    rotary = Rotary(torch.ones(256, 16, device=DEVICE), torch.zeros(256, 16, device=DEVICE))
    short = gemv.attend(Unplaced(qkv, rotary, None, 4), pages, width=1, scale=0.2)
    monkeypatch.setattr(gemv, "MAX_SLOTS", 128)
    long = gemv.attend(Unplaced(qkv, rotary, None, 4), pages, width=1, scale=0.2)
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)


def test_what_is_left_out_is_refused():
    ops = gemv.one_row_ops(lambda weight, kind: Spread(4, 1, 4, 0))
    x, weight = torch.randn(1, 64, device=DEVICE), torch.randn(8, 64, device=DEVICE)
    with pytest.raises(ValueError, match="scale_2F"):
        ops.swiglu(x, weight, scale_2F=torch.ones(8, device=DEVICE))
    with pytest.raises(ValueError, match="one row"):
        gemv.multiply(torch.randn(2, 64, device=DEVICE), weight, Spread(4, 1, 4, 0))
    with pytest.raises(ValueError, match="no multiple"):
        gemv.multiply(x, weight[:6], Spread(4, 1, 4, 0))


def test_swiglu_is_of_gates_and_their_ups():
    x, weight = torch.ones(1, 64, device=DEVICE), torch.zeros(8, 64, device=DEVICE)
    weight[:4, 0], weight[4:, 0] = torch.arange(4.0), torch.tensor([1.0, 10.0, 100.0, 1000.0])
    found = gemv.multiply(x, weight, Spread(4, 1, 4, 0), kind="swiglu")
    want = F.silu(torch.arange(4.0)) * torch.tensor([1.0, 10.0, 100.0, 1000.0])
    torch.testing.assert_close(found[0].cpu(), want)


PROGRAM = """
import os
import re
import subprocess
import tempfile

import triton
import triton.language as tl
from benchmarks import gemv, gemv_kernels
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

FP32, INT32 = ("ACC", "PEAK", "TOTAL"), ("IDS", "TABLE", "LENGTHS")
KINDS = dict.fromkeys(FP32, "*fp32") | dict.fromkeys(INT32, "*i32") | dict(eps="fp32", scale="fp32")


def ptx(kernel, num_warps, **constants):
    kinds = {name: KINDS.get(name, "*bf16" if name.isupper() else "i32") for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in kinds.items()}
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {at[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind not in ("constexpr", "fp32")}
    source = ASTSource(kernel, signature, {at[name]: value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=num_warps)).asm["ptx"]


def check(code, name, least_ahead):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.search("([0-9]+) bytes spill stores", said)[1] == "0", f"registers spill: {name}"
    assert code.count("griddepcontrol.wait") == code.count("griddepcontrol.launch_dependents") == 1
    ahead = code[: code.index("griddepcontrol.wait")]
    assert not re.search("st[.]global|red[.]global|atom[.]|ret;", ahead), "it does not wait before it works"
    loads = len(re.findall("ld[.]global[^ ]*v4", ahead))
    assert loads >= least_ahead, f"{loads} loads of 16 bytes before it waits: {name}"


def largest(kind, width):
    # The spreads that take the most registers, of either number of warps, with one block a program and with many.
    best = {}
    for spread in gemv.spreads(kind, width):
        key = spread.num_warps, spread.per_processor > 0
        best[key] = max(best.get(key, spread), spread, key=lambda s: (s.BLOCK_E * s.REPEATS, s.BLOCK_E))
    return best.values()


PRODUCTS = ("sum", 4096, True), ("sum", 12_288, False), ("swiglu", 2048, True), ("largest", 4096, True)
for kind, width, has_norm in PRODUCTS:
    for spread in largest(kind, width):
        block = gemv.block_inputs(spread.num_warps)
        none = dict(RESIDUAL=None) if has_norm else dict(NORM=None)
        code = ptx(
            gemv_kernels.multiply_one, spread.num_warps, KIND=kind, WIDTH=width,
            CHUNKS=triton.cdiv(width, spread.REPEATS * block), BLOCK_E=spread.BLOCK_E, REPEATS=spread.REPEATS,
            BLOCK_K=block, MANY=spread.per_processor > 0, HOPPER=True, **none,
        )
        check(code, (kind, width, spread), spread.BLOCK_E * spread.REPEATS)
HEADS = dict(NUM_HEADS=32, H=128, SLOTS=gemv.TILE_SLOTS, HOPPER=True)
read = ptx(gemv_kernels.read_tile, 4, NUM_GROUPS=8, S=64, TILE_M=16, HAS_NORMS=True, DOT=tl.bfloat16, **HEADS)
check(read, "read", 2 * gemv.TILE_SLOTS * 128 * 2 // (16 * 128))
check(ptx(gemv_kernels.merge_tiles, 4, TILES=32, **HEADS), "merge", 0)
"""


def test_kernels_compile_for_hopper_and_read_ahead_of_the_kernel_before():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
