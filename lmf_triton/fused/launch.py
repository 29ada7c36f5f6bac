"""How the kernels are launched: pure functions from shapes and strides to frozen configurations.

Nothing here touches a tensor or a device, so every choice can be tested and compiled on a machine without a GPU.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

# Warps of a program with several rows: fewer would not fill a multiprocessor with so small programs.
MIN_SHARED_WARPS = 4
# A warp takes 1024 elements of 4 bytes, 32 a thread: with addresses and masks they stay within 128 registers.
WARP_ELEMENTS = 1024
MAX_WARPS = 16
# Longest row in one tile, by bytes of the arithmetic type; it fills MAX_WARPS warps twice. Longer rows are looped over.
# For sm_90 triton 3.6 compiles the longest without spilling; 3.9 spills 40 bytes a thread of a tile of 256.
MAX_ONE_TILE_CLASSES = {4: 32768, 8: 8192}
# Rows of at most this many classes share a program. Elements of their tile: with 1024, 2048 and 4096 a float32 row of
# 256 classes takes 552, 384 and 296 instructions of a warp on sm_90 (triton 3.6), while 62%, 50% and 25% of the warps
# can be resident; its bytes leave time for 630.
MAX_SHORT_CLASSES = 256
SHORT_ROWS_TILE = 2048
# Where neighbouring rows, not classes, are neighbours in memory: 16 rows fill a 32-byte sector of half logits, and
# beyond 512 a thread has more than 4 rows, whose losses take its registers.
STRIDED_TILE = 4096
MAX_STRIDED_TILE = 16384
MIN_STRIDED_ROWS = 16
MAX_STRIDED_ROWS = 512
# Tile of one step of a loop over classes: the widest that triton 3.6 and 3.9 compile without spilling. Wide, so that
# few rows are under way at a time, since what they take of the L2 cache decides how much of the second reading comes
# from there: one or two programs of 8 warps on each of 132 multiprocessors are 17 to 34 MiB of rows of 64K bfloat16
# logits.
LOOP_TILE = 8192
# A batch whose tile is at most this big, 16 elements a thread of 4 warps, is one program: its means need no pass over
# the targets beforehand.
MAX_SINGLE_PROGRAM_TILE = 2048
# Tile of the elementwise kernels (backward, upstream).
ELEMENTWISE_TILE = 4096
# Multiprocessors of the device for which launches are chosen where there is none: compiled and interpreted kernels.
H100_MULTIPROCESSORS = 132
# Samples of one step of the pass over the targets, 8 or 16 a thread, and the most programs that share the pass. A step
# waits for memory once; from MANY_SAMPLES on the steps are larger, so that there are few of them.
TOTALS_BLOCK_ROWS, MANY_TOTALS_BLOCK_ROWS = 1024, 8192
MANY_SAMPLES = 2**19
MAX_TOTALS_PROGRAMS = 128
# Programs of the upstream kernel, some 16 a multiprocessor: enough to fill the device, few enough that nothing is lost
# on them where the upstream gradient is 1, as nearly always.
MAX_UPSTREAM_PROGRAMS = 2048


@dataclass(frozen=True)
class LaunchConfig:
    """Tile and warps of one launch."""

    block_rows: int
    block_classes: int
    num_warps: int
    class_splits: int = 1  # programs that share the classes of a row, each for its own statistics

    def n_programs(self, n_groups: int, n_rows: int, n_classes: int | None = None) -> int:
        """Tiles of ``(n_groups, n_rows)`` rows; with ``n_classes``, the tiles of a row count too."""
        row_blocks = n_groups * _cdiv(n_rows, self.block_rows)
        return row_blocks if n_classes is None else row_blocks * _cdiv(n_classes, self.block_classes)


@lru_cache(maxsize=4096)
def forward_config(
    n_groups: int,
    n_rows: int,
    n_classes: int,
    itemsize: int,
    *,
    class_contiguous: bool = True,
    two_exponentials: bool = False,
    n_multiprocessors: int = H100_MULTIPROCESSORS,
) -> LaunchConfig:
    """Tile of ``forward_kernel``: several short rows, one long row, or a part of rows that are looped over.

    ``itemsize`` is the bytes of the arithmetic type. ``two_exponentials``: both terms are there and ``scale`` is not
    1, so that each element has two values to keep. Where rows are looped over and too few to fill the device,
    ``class_splits`` is above 1: the tile is ``statistics_kernel``'s, and that of ``forward_kernel`` is
    :func:`combine_config`'s.
    """
    block_classes = _next_power_of_2(n_classes)
    all_rows = _next_power_of_2(n_rows)
    n_values = 2 if two_exponentials else 1  # that a thread keeps of each element
    if n_groups == 1 and all_rows * block_classes <= MAX_SINGLE_PROGRAM_TILE:
        block_rows = all_rows
    elif not class_contiguous:
        block_rows = min(all_rows, MAX_STRIDED_ROWS, max(MIN_STRIDED_ROWS, STRIDED_TILE // block_classes))
        block_classes = min(block_classes, MAX_STRIDED_TILE * 4 // itemsize // block_rows)
    elif block_classes > MAX_ONE_TILE_CLASSES[itemsize] // n_values:
        block_rows, block_classes = 1, LOOP_TILE // n_values
    elif block_classes > MAX_SHORT_CLASSES:
        block_rows = 1
    else:
        block_rows = min(all_rows, SHORT_ROWS_TILE // block_classes)
    n_elements = block_rows * block_classes
    # A long row takes as few warps as hold it, since every warp computes the row's loss.
    num_warps = _warps(n_elements, itemsize) if block_rows == 1 else max(MIN_SHARED_WARPS, _warps(n_elements, itemsize))
    config = LaunchConfig(block_rows, block_classes, num_warps)
    splits = _class_splits(config, n_rows, n_classes, n_multiprocessors) if n_groups == 1 else 1
    return replace(config, class_splits=splits)


def combine_config(config: LaunchConfig, n_rows: int) -> LaunchConfig:
    """Tile of ``forward_kernel`` where ``statistics_kernel`` went before: the statistics of all rows."""
    return LaunchConfig(_next_power_of_2(n_rows), config.class_splits, MIN_SHARED_WARPS)


@lru_cache(maxsize=4096)
def elementwise_config(n_rows: int, n_classes: int, itemsize: int) -> LaunchConfig:
    """Tile of ``backward_kernel`` and ``upstream_kernel``, which need not see a row as a whole."""
    block_classes = min(_next_power_of_2(n_classes), ELEMENTWISE_TILE)
    block_rows = min(_next_power_of_2(n_rows), ELEMENTWISE_TILE // block_classes)
    return LaunchConfig(block_rows, block_classes, max(MIN_SHARED_WARPS, _warps(block_rows * block_classes, itemsize)))


def alignment(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all of these sizes and strides.

    Triton finds out by itself what is divisible by 16, and nothing less; C = 1000 deserves wide loads too.
    """
    return math.gcd(16, *sizes)


class TotalsGrid(NamedTuple):
    """Programs of ``totals_kernel``, steps of each, samples of a step, and warps."""

    n_programs: int
    steps: int
    block_rows: int
    num_warps: int


@lru_cache(maxsize=4096)
def totals_grid(n_samples: int) -> TotalsGrid:
    """The pass over the targets; programs and steps are powers of two, so that few variants compile."""
    block_rows, num_warps = (MANY_TOTALS_BLOCK_ROWS, 16) if n_samples >= MANY_SAMPLES else (TOTALS_BLOCK_ROWS, 4)
    blocks = _next_power_of_2(_cdiv(n_samples, block_rows))
    n_programs = min(blocks, MAX_TOTALS_PROGRAMS)
    return TotalsGrid(n_programs, blocks // n_programs, block_rows, num_warps)


def upstream_grid(n_tiles: int) -> tuple[int, int]:
    """Programs of ``upstream_kernel`` and tiles for each, a power of two, so that few variants compile."""
    steps = _next_power_of_2(_cdiv(n_tiles, MAX_UPSTREAM_PROGRAMS))
    return _cdiv(n_tiles, steps), steps


def _class_splits(config: LaunchConfig, n_rows: int, n_classes: int, n_multiprocessors: int) -> int:
    """Programs for the classes of a row, a power of two: 1 where the rows alone fill half the device."""
    class_blocks = _cdiv(n_classes, config.block_classes)
    n_programs = config.n_programs(1, n_rows)
    if class_blocks == 1 or 2 * n_programs > n_multiprocessors:
        return 1
    wanted = _next_power_of_2(_cdiv(n_multiprocessors, n_programs))
    one_tile = MAX_SINGLE_PROGRAM_TILE // _next_power_of_2(n_rows)
    return max(1, min(wanted, _next_power_of_2(class_blocks), one_tile))


def _warps(n_elements: int, itemsize: int) -> int:
    return min(max(1, n_elements * itemsize // (4 * WARP_ELEMENTS)), MAX_WARPS)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
