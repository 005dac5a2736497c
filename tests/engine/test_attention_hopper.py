"""The kernels of attention and of placing compile for Hopper, which the interpreter cannot know.

Compiling needs no GPU, but it needs Triton without its interpreter: another process.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from orthrus.engine.kernels import attention_kernels, place_kernels
from orthrus.engine.kernels.attention import DOUBLINGS, FIRST_SLOTS, MERGE, SHARE, TILES
from orthrus.engine.kernels.place import TILE

FP32 = dict.fromkeys(("ACC", "PEAK", "TOTAL", "QKV"), "*fp32")
INT32 = dict.fromkeys(("TABLES", "LENGTHS", "WIDTHS"), "*i32")
KINDS = FP32 | INT32 | dict(scale="fp32", eps="fp32")
STRIDES = ("kp", "ks", "kg", "vp", "vs", "vg")


def ptx(kernel, options, **constants):
    kinds = {name: KINDS.get(name, "*bf16" if name.isupper() else "i32") for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in kinds.items()}
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {at[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind[0] == "*" or n in STRIDES}
    source = ASTSource(kernel, signature, {at[name]: value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def spilled(code):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search("([0-9]+) bytes spill stores", said)[1])


def check_wait(code, num_ahead=0):
    # Before it waits for the kernels before it, a kernel reads what none of them writes, and writes nothing.
    assert code.count("griddepcontrol.wait") == code.count("griddepcontrol.launch_dependents") == 1
    ahead = code[: code.index("griddepcontrol.wait")]
    assert not re.search("st[.]global|red[.]global|atom[.]|cp[.]async|ret;", ahead), "it does not wait before it works"
    assert ahead.count("ld.global") <= num_ahead, "more is read ahead than lengths, tables, widths and angles"


def split(tile):
    names = ("num_warps", "num_stages", "enable_fp_fusion")
    return {n: v for n, v in tile.items() if n in names}, {n: v for n, v in tile.items() if n not in names}


HEADS = dict(H=128, BLOCK_H=128, HOPPER=True, FIRST=FIRST_SLOTS, SHARE=SHARE, DOUBLINGS=DOUBLINGS)
READ = HEADS | dict(GROUP=4, S=64, BY="tf32")
AR, DRAFT = dict(OWN_K=None, OWN_V=None, WIDTHS=None, HAS_OWN=False), dict(HAS_OWN=True)
options, tile = split(TILES[2])
products = set()
for how in (AR, DRAFT):
    code = ptx(attention_kernels.read_part, options, **READ | tile | how)
    copied = code.count("cp.async.cg.shared.global") * 16 * 32 * options["num_warps"]
    num_tiles = copied / (2 * tile["TILE_K"] * 128 * 2)  # of keys and values: those before a loop and one in it
    # Two loops: tiles that all queries see, and the rest.
    assert num_tiles == 2 * options["num_stages"], f"too few keys are loaded ahead: {num_tiles} tiles"
    assert not spilled(code), f"registers spill: splits, {how}"
    check_wait(code, num_ahead=3 if how is DRAFT else 2)
    products.add(frozenset(re.findall(r"wgmma[.]mma_async\\S*", code)))
    code = ptx(attention_kernels.read_all, options, **READ | tile | how)
    assert spilled(code) <= 64, f"registers spill: whole rows, {how}"  # some do; fewer heads or more warps are slower
    check_wait(code)
    products.add(frozenset(re.findall(r"wgmma[.]mma_async\\S*", code)))
assert len(products) == 1 and all(products), f"splits and whole rows run different products: {products}"
options, tile = split(MERGE)
check_wait(ptx(attention_kernels.merge, options, HAS_OWN=True, **HEADS | tile), num_ahead=2)
options, tile = split(TILE)
place = dict(SPLITS=2, HOPPER=True, SCALE=None, BIAS=None, NUM_HEADS=32, NUM_GROUPS=8, H=128, BLOCK_H=128, S=64, **tile)
check_wait(ptx(place_kernels.place, options, HAS_NORMS=True, HAS_OWN=False, **place), num_ahead=8)
place |= dict(HAS_NORMS=False, HAS_OWN=True, QUERY_NORM=None, KEY_NORM=None)
check_wait(ptx(place_kernels.place, options, **place), num_ahead=3)
"""


def test_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
