"""How products with weights are cut, which decides their bits, and how their programs run, which does not.

Found by measuring (`benchmarks/tiles.py`) and fixed here: two processes that tuned for themselves would disagree about
bits. `linear.py` says what is done with it.

    R = rows of a pass, D = inputs, E = outputs
"""

from typing import NamedTuple

import triton
from torch import Tensor

from orthrus.engine.kernels.overlap import is_hopper


class Tiles(NamedTuple):
    """How a product is cut, and how its programs run."""

    BLOCK_E: int
    """Weight rows of a tile. At least 64, or Hopper's tensor cores are not used as they should be."""
    BLOCK_K: int
    """Inputs of a tile, whose multiples parts of a sum end at. Where tiles are fetched they have others (TMA_TILE)."""
    SPLITS: int
    """Parts of the sum over inputs."""
    num_warps: int
    num_stages: int
    """Blocks of inputs in flight; fewer where shared memory does not hold them. Changes no bits."""

    def run_as(self, execution: "Execution") -> "Tiles":
        """The same cut, run otherwise."""
        return self._replace(BLOCK_E=execution.BLOCK_E, num_warps=execution.num_warps, num_stages=execution.num_stages)


TILES: dict[tuple[int, int, int], Tiles] = {
    # Qwen3-8B: gate_up, down, qkv, o, head
    (24576, 4096, 2): Tiles(64, 64, 1, 8, 6),
    (4096, 12288, 2): Tiles(64, 128, 2, 4, 6),
    (6144, 4096, 2): Tiles(64, 128, 4, 4, 3),
    (4096, 4096, 2): Tiles(128, 128, 4, 4, 4),
    (151936, 4096, 2): Tiles(128, 128, 1, 8, 4),
    (24576, 4096, 1): Tiles(128, 128, 1, 8, 4),
    (4096, 12288, 1): Tiles(128, 256, 4, 4, 4),
    (6144, 4096, 1): Tiles(64, 256, 4, 4, 3),
    (4096, 4096, 1): Tiles(64, 256, 2, 4, 6),
    (151936, 4096, 1): Tiles(128, 128, 1, 8, 3),
    # Qwen3-4B
    (19456, 2560, 2): Tiles(128, 64, 1, 8, 4),
    (2560, 9728, 2): Tiles(64, 128, 3, 4, 6),
    (6144, 2560, 2): Tiles(64, 128, 4, 4, 3),
    (2560, 4096, 2): Tiles(64, 128, 3, 4, 6),
    (151936, 2560, 2): Tiles(128, 128, 1, 4, 4),
    (19456, 2560, 1): Tiles(128, 128, 1, 8, 4),
    (2560, 9728, 1): Tiles(64, 256, 3, 4, 6),
    (6144, 2560, 1): Tiles(64, 128, 4, 4, 6),
    (2560, 4096, 1): Tiles(64, 256, 3, 4, 6),
    (151936, 2560, 1): Tiles(128, 128, 1, 8, 3),
    # Qwen3-1.7B
    (12288, 2048, 2): Tiles(128, 64, 1, 8, 6),
    (2048, 6144, 2): Tiles(64, 128, 4, 4, 6),
    (4096, 2048, 2): Tiles(64, 128, 2, 4, 6),
    (2048, 2048, 2): Tiles(64, 128, 4, 4, 6),
    (151936, 2048, 2): Tiles(128, 128, 1, 4, 4),
    (12288, 2048, 1): Tiles(128, 256, 1, 8, 4),
    (2048, 6144, 1): Tiles(64, 256, 4, 4, 6),
    (4096, 2048, 1): Tiles(64, 256, 2, 4, 6),
    (2048, 2048, 1): Tiles(64, 128, 3, 4, 6),
    (151936, 2048, 1): Tiles(128, 128, 1, 8, 3),
}
"""By (E, D, bytes of a weight), where measuring on an H200 (`benchmarks/tiles.py`) found better than `default_tiles`.
Never by the number of rows: a row's bits would depend on its neighbours. And never found anew by the process that uses
them: two processes would disagree about bits."""


class Execution(NamedTuple):
    """How the programs of a product run, as in `Tiles`: what has no effect on bits."""

    BLOCK_E: int
    num_warps: int
    num_stages: int
    by_tma: bool = False
    """`multiply_by_tma`, in tiles of TMA_TILE, where `can_fetch`; else `multiply`, as TILES say."""


TMA_TILE = dict(BLOCK_R=128, BLOCK_K=64)
"""Rows and inputs of a fetched tile. 64 inputs are 128 bytes, the width of the accelerator's swizzle."""

BY_ROWS: dict[tuple[int, int, int], dict[int, Execution]] = {
    # Qwen3-8B: gate_up, down, qkv, o, head
    (24576, 4096, 2): {
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 3),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(256, 8, 4, by_tma=True),
        1024: Execution(256, 8, 4, by_tma=True),
    },
    (4096, 12288, 2): {
        128: Execution(64, 4, 4),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(128, 4, 3, by_tma=True),
    },
    (6144, 4096, 2): {
        128: Execution(64, 4, 3, by_tma=True),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(64, 4, 3, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (4096, 4096, 2): {
        64: Execution(64, 4, 3),
        128: Execution(128, 4, 6, by_tma=True),
        256: Execution(128, 4, 3, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(128, 4, 3, by_tma=True),
    },
    (151936, 4096, 2): {
        128: Execution(128, 4, 6, by_tma=True),
        256: Execution(256, 8, 4, by_tma=True),
        512: Execution(256, 8, 4, by_tma=True),
        1024: Execution(256, 8, 4, by_tma=True),
    },
    # Qwen3-4B
    (19456, 2560, 2): {
        16: Execution(128, 8, 5),
        64: Execution(64, 4, 3),
        128: Execution(64, 4, 3),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(256, 8, 4, by_tma=True),
    },
    (2560, 9728, 2): {
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 4),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (6144, 2560, 2): {
        128: Execution(64, 4, 3, by_tma=True),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(64, 4, 3, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (2560, 4096, 2): {
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 6, by_tma=True),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(128, 4, 6, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (151936, 2560, 2): {
        128: Execution(128, 4, 6, by_tma=True),
        256: Execution(128, 4, 3, by_tma=True),
        512: Execution(256, 8, 3, by_tma=True),
        1024: Execution(256, 8, 3, by_tma=True),
    },
    # Qwen3-1.7B
    (12288, 2048, 2): {
        64: Execution(128, 4, 6),
        128: Execution(128, 4, 6),
        256: Execution(128, 4, 3, by_tma=True),
        512: Execution(128, 4, 2, by_tma=True),
        1024: Execution(128, 4, 2, by_tma=True),
    },
    (2048, 6144, 2): {
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 6, by_tma=True),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(64, 4, 6, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (4096, 2048, 2): {
        16: Execution(64, 4, 4),
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 6, by_tma=True),
        256: Execution(128, 4, 6, by_tma=True),
        512: Execution(64, 4, 4, by_tma=True),
        1024: Execution(128, 4, 3, by_tma=True),
    },
    (2048, 2048, 2): {
        16: Execution(128, 4, 3),
        64: Execution(64, 4, 4),
        128: Execution(64, 4, 6, by_tma=True),
        256: Execution(128, 4, 4, by_tma=True),
        512: Execution(64, 4, 6, by_tma=True),
        1024: Execution(128, 4, 6, by_tma=True),
    },
    (151936, 2048, 2): {
        128: Execution(128, 4, 3, by_tma=True),
        256: Execution(128, 4, 2, by_tma=True),
        512: Execution(128, 4, 3, by_tma=True),
        1024: Execution(128, 4, 3, by_tma=True),
    },
}
"""By (E, D, bytes of a weight) and one of ROWS, where measuring on an H200 (`benchmarks/tiles.py --rows`; 16 inside of
passes, and 256 to 1,024 of 8B) found better than what TILES say."""

MANY_ROWS = Execution(128, 4, 6, by_tma=True)
"""Good at every shape of TILES, if not the best."""

ROWS = (16, 32, 64, 128, 256, 512, 1024)
"""A product of R rows runs as the next of these was measured to; beyond the last, as the last."""

SHARED_BYTES = 200 * 1024
"""Shared memory that a program's blocks in flight may take (Hopper has 227 KiB)."""


def default_tiles(num_outputs: int, width: int, weight_bytes: int) -> Tiles:
    """Tiles for a shape that nobody measured: about two programs for each of 132 multiprocessors, 512 inputs a part."""
    block_e, block_k = 64, 32 if weight_bytes == 4 else 128
    splits = max(1, min(264 // triton.cdiv(num_outputs, block_e), width // 512))
    return Tiles(block_e, block_k, 1 << splits.bit_length() - 1, num_warps=4, num_stages=4)


def tiles_of(weight_ED: Tensor) -> Tiles:
    """How products with this weight are cut: by its shape and dtype alone."""
    num_outputs, width = weight_ED.shape
    return tiles_of_shape(num_outputs, width, weight_ED.element_size())


def tiles_of_shape(num_outputs: int, width: int, weight_bytes: int) -> Tiles:
    """Those of TILES, or the default."""
    key = num_outputs, width, weight_bytes
    return TILES.get(key) or default_tiles(*key)


def execution_of(weight_ED: Tensor, num_rows: int) -> Execution | None:
    """That of BY_ROWS for as many rows, if there is one; for shapes that nobody measured MANY_ROWS, on Hopper."""
    num_outputs, width = weight_ED.shape
    key = num_outputs, width, weight_ED.element_size()
    if key in BY_ROWS:
        return BY_ROWS[key].get(next((rows for rows in ROWS if num_rows <= rows), ROWS[-1]))
    is_fetched = num_rows > TMA_TILE["BLOCK_R"] and weight_ED.element_size() == 2 and is_hopper(weight_ED.device)
    return MANY_ROWS if is_fetched else None


def inputs_of_part(width: int, tiles: Tiles) -> int:
    """Inputs of each part of a sum but the last, which may have fewer."""
    return triton.cdiv(triton.cdiv(width, tiles.BLOCK_K), tiles.SPLITS) * tiles.BLOCK_K
