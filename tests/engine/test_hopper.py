"""Kernels compile for Hopper, which the interpreter cannot know, and use its tensor cores.

Compiling needs no GPU, but it needs Triton without its interpreter: another process.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from orthrus.engine.kernels import head_kernels, linear_kernels, noise, norm, quantise

POINTERS = dict(
    X="*bf16", X_SCALE="*fp32", W="*bf16", WEIGHT="*bf16", SCALE="*fp32", BIAS="*bf16", RESIDUAL="*bf16", OUT="*bf16",
    PARTS="*fp32", VALUES="*fp32", IDS="*i32",
)


def ptx(kernel, types, **constants):
    # Pointers and strides are multiples of 16, as those of whole models are; what no constant says is an int.
    types = {name: types.get(name, POINTERS.get(name, "i32")) for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    at = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    aligned = {at[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind[0] in "*i"}
    source = ASTSource(kernel, signature, {at[name]: value for name, value in constants.items()}, aligned)
    options = dict(num_warps=4, num_stages=3, enable_fp_fusion=False)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def check_wait(code, reads_ahead=False):
    # Before it waits for the kernels before it, a kernel reads what none of them writes, and writes nothing.
    assert code.count("griddepcontrol.wait") == code.count("griddepcontrol.launch_dependents") == 1
    ahead = code[: code.index("griddepcontrol.wait")]
    assert not re.search("st[.]global|red[.]global|atom[.]|cp[.]async|ret;", ahead), "it does not wait before it works"
    assert reads_ahead or "ld.global" not in ahead, "the kernel before is not awaited"


TILE = dict(BLOCK_E=64, BLOCK_R=32, BLOCK_K=64, WHOLE=True, BY="tf32", HOPPER=True)
FP8 = dict(X="*fp8e4nv", W="*fp8e4nv")
NONE = dict(X_SCALE=None, SCALE=None, BIAS=None, RESIDUAL=None)
multiply = linear_kernels.multiply
products = [
    ptx(multiply, {}, SPLITS=1, SPREAD=False, GATED=False, **TILE, X_SCALE=None),
    ptx(multiply, FP8, SPLITS=2, SPREAD=False, GATED=True, **TILE, BIAS=None, RESIDUAL=None),
    ptx(head_kernels.tile_largest, FP8, SPLITS=1, **TILE, DTYPE=tl.bfloat16),
    ptx(multiply, dict(OUT="*fp32"), SPLITS=2, SPREAD=True, GATED=True, **TILE | dict(BLOCK_R=128), **NONE),
    ptx(multiply, {}, SPLITS=1, SPREAD=False, GATED=False, **TILE | dict(WHOLE=False), **NONE, num_rows=1),
    ptx(head_kernels.tile_largest, {}, SPLITS=1, **TILE, X_SCALE=None, SCALE=None, DTYPE=tl.bfloat16),
]
def tiles(num_outputs):
    return dict(X="tensordesc<bf16[128, 64]>", W=f"tensordesc<bf16[{num_outputs}, 64]>")


FETCHED = dict(BLOCK_R=128, BLOCK_K=64, HOPPER=True)
by_tma = [
    ptx(linear_kernels.multiply_by_tma, tiles(64), SPLITS=1, SPREAD=False, GATED=True, BLOCK_E=128, **FETCHED,
        SCALE=None, BIAS=None, RESIDUAL=None),
    ptx(linear_kernels.multiply_by_tma, tiles(64) | dict(OUT="*fp32"), SPLITS=1, SPREAD=True, GATED=False, BLOCK_E=64,
        **FETCHED, SCALE=None, BIAS=None, RESIDUAL=None),
    ptx(linear_kernels.multiply_by_tma, tiles(128), SPLITS=4, SPREAD=False, GATED=False, BLOCK_E=128, **FETCHED),
    ptx(head_kernels.tile_largest_by_tma, tiles(64), BLOCK_E=64, **FETCHED, SCALE=None, DTYPE=tl.bfloat16),
]
for one in by_tma:
    check_wait(one)
    assert "wgmma" in one and "cp.async.bulk.tensor.2d" in one, "tiles are not fetched for Hopper's products"
for one in products:
    check_wait(one)
    assert "wgmma" in one, "the product is not one of Hopper's"
    assert "cp.async.cg" in one, "blocks of inputs are not loaded ahead"
others = [
    ptx(quantise._quantise, dict(OUT="*fp8e4nv", SCALES="*fp32"), LARGEST=448.0, BLOCK=4096, HOPPER=True),
    ptx(head_kernels.row_largest, dict(OUT="*i64"), BLOCK=4096, HOPPER=True),
    *(ptx(linear_kernels.add_up, {}, SPLITS=4, GATED=gated, BLOCK=512, HOPPER=True) for gated in (False, True)),
    ptx(linear_kernels.add_up_and_norm, dict(eps="fp32", NORMED="*bf16"), SPLITS=4, BLOCK=4096, HOPPER=True),
    ptx(norm._rms_norm, dict(eps="fp32"), BLOCK=4096, HOPPER=True),
]
for one in others:
    check_wait(one, reads_ahead="add_up_and_norm" in one)  # the norm's weight
noise = ptx(noise._uniforms, dict(KEYS="*i64", OUT="*fp32"), BLOCK=noise.BLOCK)
assert "cvt.rn.f32.u32" in noise and "fma" not in noise, "noise is not made in steps that have one result"
assert "cvt.rn.satfinite.e4m3x2.f32" in others[0] and "div.full" not in others[0], "rows are not quantised as by torch"
"""


def test_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
