"""How the kernels are launched: pure functions from shapes and strides to frozen configurations and plans.

Nothing here touches a tensor or a device, so every choice can be tested and compiled on a machine without a GPU. A
*configuration* is a choice for one kernel: its tile and its warps. A *plan* is all of a kernel's launches for tensors
of some shapes and strides; plans are kept, since a training loop asks for the same few in every step. What a choice
depends on is an argument, also what it wants to know of the device, as the number of its multiprocessors is now.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import NamedTuple

from .layout import Axes, RowLayout, contiguous_strides, row_layout

# Warps of a program with several rows: fewer would not fill a multiprocessor with so small programs.
MIN_SHARED_WARPS = 4
# A warp takes 1024 elements of 4 bytes, 32 a thread: with addresses and masks they stay within 128 registers.
WARP_ELEMENTS = 1024
MAX_WARPS = 16
# Longest row in one tile, by bytes of the arithmetic type: a thread of MAX_WARPS warps has 64 or 16 elements of it.
# tests/test_compile_targets.py records what the longest spills: at most 64 of a thread's 256 bytes. Longer rows are
# looped over.
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
# Tile of the elementwise kernels (backward, upstream). Where rows, not classes, are neighbours in memory, it has 64 of
# them: 128 bytes of half logits, wherever they begin, lie in 5 sectors of 32 bytes, not 4; 16 rows would be 2, not 1.
ELEMENTWISE_TILE = 4096
MIN_ADJACENT_ROWS = 64
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
    """Tile and warps of one kernel."""

    block_rows: int
    block_classes: int
    num_warps: int
    class_parts: int = 1  # programs that share the classes of a row, each for a summary of its own

    def n_programs(self, n_groups: int, n_rows: int, n_classes: int | None = None) -> int:
        """Tiles of ``(n_groups, n_rows)`` rows; with ``n_classes``, the tiles of a row count too."""
        row_blocks = n_groups * cdiv(n_rows, self.block_rows)
        return row_blocks if n_classes is None else row_blocks * cdiv(n_classes, self.block_classes)


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
    ``class_parts`` is above 1: the tile is ``summarise_kernel``'s, and that of ``forward_kernel`` is
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
    parts = _class_parts(config, n_rows, n_classes, n_multiprocessors) if n_groups == 1 else 1
    return replace(config, class_parts=parts)


def combine_config(config: LaunchConfig, n_rows: int) -> LaunchConfig:
    """Tile of ``forward_kernel`` where ``summarise_kernel`` went before: the summaries of all parts of all rows."""
    return LaunchConfig(_next_power_of_2(n_rows), _next_power_of_2(config.class_parts), MIN_SHARED_WARPS)


def elementwise_config(n_rows: int, n_classes: int, itemsize: int, *, along_rows: bool = False) -> LaunchConfig:
    """Tile of ``backward_kernel`` and ``upstream_kernel``, which need not see a row as a whole.

    It is filled with classes; ``along_rows``, first with so many rows that either is read in whole sectors.
    """
    all_rows = _next_power_of_2(n_rows)
    min_rows = min(all_rows, MIN_ADJACENT_ROWS) if along_rows else 1
    block_classes = min(_next_power_of_2(n_classes), ELEMENTWISE_TILE // min_rows)
    block_rows = min(all_rows, ELEMENTWISE_TILE // block_classes)
    return LaunchConfig(block_rows, block_classes, max(MIN_SHARED_WARPS, _warps(block_rows * block_classes, itemsize)))


class TotalsGrid(NamedTuple):
    """Programs of ``totals_kernel``, steps of each, samples of a step, and warps."""

    n_programs: int
    steps: int
    block_rows: int
    num_warps: int


def totals_grid(n_samples: int) -> TotalsGrid:
    """The pass over the targets; programs and steps are powers of two, so that few variants compile."""
    block_rows, num_warps = (MANY_TOTALS_BLOCK_ROWS, 16) if n_samples >= MANY_SAMPLES else (TOTALS_BLOCK_ROWS, 4)
    blocks = _next_power_of_2(cdiv(n_samples, block_rows))
    n_programs = min(blocks, MAX_TOTALS_PROGRAMS)
    return TotalsGrid(n_programs, blocks // n_programs, block_rows, num_warps)


def upstream_grid(n_tiles: int) -> tuple[int, int]:
    """Programs of ``upstream_kernel`` and tiles for each, a power of two, so that few variants compile."""
    steps = _next_power_of_2(cdiv(n_tiles, MAX_UPSTREAM_PROGRAMS))
    return cdiv(n_tiles, steps), steps


def alignment(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all of these sizes and strides.

    Triton finds out by itself what is divisible by 16, and nothing less; C = 1000 deserves wide loads too.
    """
    return math.gcd(16, *sizes)


@dataclass(frozen=True)
class Plan:
    """All launches of one kernel: the same programs for each place in ``offsets``."""

    offsets: tuple[tuple[int, ...], ...]  # for each launch, where it starts in each tensor
    strides: tuple[tuple[int, ...], ...]  # of each tensor: group, row and, where it has classes, class; see _plan
    n_rows: int
    n_classes: int  # see _plan
    n_programs: int  # of one launch
    meta: Mapping[str, int]  # the kernel's constexprs that are sizes, and num_warps
    n_items: int = 0  # what programs share, in kernels that count it: all samples, all tiles, or the parts of a row


class ForwardPlan(NamedTuple):
    """The launches of a forward pass; ``summarise`` goes first, where rows are few and long."""

    forward: Plan
    summarise: Plan | None

    @property
    def n_partials(self) -> int:
        """Programs over all launches, each of which has a partial sum of the loss."""
        return self.forward.n_programs * len(self.forward.offsets)


@lru_cache(maxsize=4096)
def plan_forward(
    logits: Axes,
    target_strides: tuple[int, ...],
    grad: Axes | None,
    itemsize: int,
    *,
    out_per_row: bool,
    two_exponentials: bool,
    n_multiprocessors: int,
) -> ForwardPlan:
    """``forward_kernel`` and ``summarise_kernel``; tensors are logits, target, output and gradient.

    The output is contiguous: with ``out_per_row``, or after ``summarise_kernel``, losses or coefficients of each row,
    otherwise partial sums.
    """
    grad = grad or logits
    n_classes = logits.n_classes

    def choose(out_strides: tuple[int, ...]) -> tuple[RowLayout, LaunchConfig]:
        layout = row_layout(logits.row_shape, logits.row_strides, target_strides, out_strides, grad.row_strides)
        return layout, forward_config(
            layout.n_groups,
            layout.n_rows,
            n_classes,
            itemsize,
            class_contiguous=logits.stride_class == 1,
            two_exponentials=two_exponentials,
            n_multiprocessors=n_multiprocessors,
        )

    # Partial sums have no strides for the rows. Those of the logits keep no dimensions apart.
    layout, config = choose(logits.row_strides)
    if out_per_row or config.class_parts > 1:
        layout, config = choose(contiguous_strides(logits.row_shape))
    plan = partial(_plan, layout, (logits.stride_class, None, None, grad.stride_class), n_classes)
    n_programs = config.n_programs(layout.n_groups, layout.n_rows)
    class_blocks, parts = cdiv(n_classes, config.block_classes), config.class_parts
    if parts == 1:
        return ForwardPlan(plan(config, n_programs, CLASS_BLOCKS=class_blocks), None)
    return ForwardPlan(
        replace(plan(combine_config(config, layout.n_rows), 1, CLASS_BLOCKS=1), n_items=parts),
        replace(plan(config, parts * n_programs, CLASS_BLOCKS=cdiv(class_blocks, parts)), n_items=parts),
    )


@lru_cache(maxsize=4096)
def plan_backward(
    logits: Axes,
    target_strides: tuple[int, ...],
    coefs_strides: tuple[int, ...],
    upstream_strides: tuple[int, ...],
    grad: Axes,
    itemsize: int,
) -> Plan:
    """``backward_kernel``; tensors are logits, target, coefficients, upstream gradient and gradient."""
    layout = row_layout(
        logits.row_shape, logits.row_strides, target_strides, coefs_strides, upstream_strides, grad.row_strides
    )
    class_strides = logits.stride_class, None, None, None, grad.stride_class
    config = elementwise_config(
        layout.n_rows, logits.n_classes, itemsize, along_rows=_along_rows(layout, class_strides)
    )
    n_programs = config.n_programs(layout.n_groups, layout.n_rows, logits.n_classes)
    return _plan(layout, class_strides, logits.n_classes, config, n_programs)


@lru_cache(maxsize=4096)
def plan_upstream(grad: Axes, upstream_strides: tuple[int, ...], itemsize: int) -> Plan:
    """``upstream_kernel``; tensors are gradient and upstream gradient."""
    layout = row_layout(grad.row_shape, grad.row_strides, upstream_strides)
    class_strides = grad.stride_class, None
    config = elementwise_config(layout.n_rows, grad.n_classes, itemsize, along_rows=_along_rows(layout, class_strides))
    n_tiles = config.n_programs(layout.n_groups, layout.n_rows, grad.n_classes)
    n_programs, steps = upstream_grid(n_tiles)
    plan = _plan(layout, class_strides, grad.n_classes, config, n_programs, STEPS=steps)
    return replace(plan, n_items=n_tiles)


@lru_cache(maxsize=4096)
def plan_totals(shape: tuple[int, ...], strides: tuple[int, ...], n_classes: int) -> Plan:
    """``totals_kernel``; the tensor is the target."""
    layout = row_layout(shape, strides)
    n_samples = layout.n_groups * layout.n_rows
    grid = totals_grid(n_samples)
    meta = {"ONE_GROUP": layout.n_groups == 1, "STEPS": grid.steps, "BLOCK_ROWS": grid.block_rows}
    meta["num_warps"] = grid.num_warps
    return Plan(layout.offsets, layout.strides, layout.n_rows, n_classes, grid.n_programs, meta, n_samples)


def _plan(
    layout: RowLayout,
    class_strides: tuple[int | None, ...],
    n_classes: int,
    config: LaunchConfig,
    n_programs: int,
    **meta: int,
) -> Plan:
    """``class_strides`` has None for tensors without classes.

    The kernels take the number of classes, and the strides of groups and rows of tensors that have them, in units of
    ALIGN elements.
    """
    with_classes = (each for each, stride in zip(layout.strides, class_strides, strict=True) if stride is not None)
    align = alignment(n_classes, *chain.from_iterable(with_classes))
    meta |= {
        "ALIGN": align,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_CLASSES": config.block_classes,
        "num_warps": config.num_warps,
    }
    strides = tuple(
        (group, row) if stride is None else (group // align, row // align, stride)
        for (group, row), stride in zip(layout.strides, class_strides, strict=True)
    )
    return Plan(layout.offsets, strides, layout.n_rows, n_classes // align, n_programs, meta)


def _along_rows(layout: RowLayout, class_strides: tuple[int | None, ...]) -> bool:
    """Whether in one of these tensors the nearest other element in memory is another row's. With 0, it is the same."""
    strides = zip(layout.strides, class_strides, strict=True)
    return any(of_class is not None and 0 < row < of_class for (_, row), of_class in strides)


def _class_parts(config: LaunchConfig, n_rows: int, n_classes: int, n_multiprocessors: int) -> int:
    """Programs that share the classes of a row, each with some: 1 where the rows alone fill half the device."""
    class_blocks = cdiv(n_classes, config.block_classes)
    n_programs = config.n_programs(1, n_rows)
    if class_blocks == 1 or 2 * n_programs > n_multiprocessors:
        return 1
    wanted = _next_power_of_2(cdiv(n_multiprocessors, n_programs))
    one_tile = max(1, MAX_SINGLE_PROGRAM_TILE // _next_power_of_2(n_rows))
    blocks_per_part = cdiv(class_blocks, min(wanted, one_tile))
    return cdiv(class_blocks, blocks_per_part)


def _warps(n_elements: int, itemsize: int) -> int:
    return min(max(1, n_elements * itemsize // (4 * WARP_ELEMENTS)), MAX_WARPS)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
