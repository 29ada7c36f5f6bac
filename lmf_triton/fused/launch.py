"""How the kernels are launched: pure functions from shapes and strides to frozen configurations and plans.

Nothing here touches a tensor or a device, so every choice can be tested and compiled on a machine without a GPU. A
*configuration* is a choice for one kernel: its block and its warps. A *plan* is all of a kernel's launches for tensors
of some shapes and strides; plans are kept, since a training loop asks for the same few in every step. What a choice
depends on is an argument, also what it wants to know of the device and of the compiler: a ``Device``.
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
MAX_WARPS = 16
# A warp takes 1024 elements of 4 bytes, 32 a thread: with addresses and masks they stay within 128 registers. The
# longest rows take twice as many: a thread then has 64 elements, and the most registers that its warps leave it.
WARP_ELEMENTS = 1024
# Classes that a thread should load at once; with fewer, addresses and masks of single ones take its registers.
MIN_VECTOR = 4
# Elements of a tile for each warp, where there are as many: 8 a thread, 16 bytes of half logits, which is one load.
WARP_TILE_CLASSES = 256

# Registers of a multiprocessor hold a row of so many classes, by bytes of the arithmetic type, for MAX_WARPS warps:
# 64 or 16 elements a thread. tests/test_compile_targets.py sees that nothing spills.
MAX_CTA_CLASSES = {4: 32768, 8: 8192}
# Multiprocessors of a cluster: the most that every device with clusters takes.
MAX_CLUSTER = 8
# Before it, Triton's reductions over a cluster are refused, or lack the barrier that keeps a multiprocessor from
# leaving while another still reads its shared memory (triton-lang/triton #10656).
CLUSTER_TRITON = (3, 9)
# Classes of one step of a loop, by bytes of the arithmetic type; for MAX_WARPS warps, 32 or 8 elements a thread. One
# such program of float32 fills the registers of a multiprocessor. So few rows are under way at a time, and the cache
# has what it can have of them for the second reading: 132 of 128K bfloat16 logits are 34 MB, of the 50 of an H100.
LOOP_CLASSES = {4: 16384, 8: 4096}

# Rows of at most this many classes share a program, which has so many elements of 4 bytes: 32 a thread of 4 warps. At
# 32 classes that is a row for each thread, so that none repeats the work of another on a row's loss. A tile has at
# least so many classes, a sector of half logits.
MAX_SHORT_CLASSES = 512
SHORT_ROWS_ELEMENTS, MAX_SHORT_ROWS = 4096, 512
SECTOR_CLASSES = 16
# Where neighbouring rows, not classes, are neighbours in memory. Of up to so many classes a thread has whole rows, as
# many as make about 40 elements of 4 bytes: each class is a tile, no class is padding, and nothing is exchanged.
MAX_UNROLLED_CLASSES = 32
UNROLLED_ELEMENTS, MAX_UNROLLED_ROWS = 5120, 512
# Of more, a program has 64 rows, or down to 16, which fill a sector of half logits; a thread has up to 40 elements.
STRIDED_ROWS, MIN_STRIDED_ROWS = 64, 16
STRIDED_ELEMENTS = 16384
STRIDED_WARP_ELEMENTS = 1280
# Of an element expectation_kernel has for each softmax logit, share, slope and what these are computed from, as if it
# had so many bytes: a thread takes 8 elements where it has 32 of the other kernels, and 16 at most. In float64, whose
# logarithms take many registers, it counts as four; by bytes of the arithmetic type.
EXPECTATION_BYTES = 16
EXPECTATION_SIZE = {4: 1, 8: 4}
# A batch whose tile is at most this big, 16 elements a thread of 4 warps, is one program: its means need no pass over
# the targets beforehand.
MAX_SINGLE_PROGRAM_TILE = 2048
# Tile of the elementwise kernels (backward, upstream). Where rows, not classes, are neighbours in memory, it has 64 of
# them: 128 bytes of half logits, wherever they begin, lie in 5 sectors of 32 bytes, not 4; 16 rows would be 2, not 1.
ELEMENTWISE_TILE = 4096
MIN_ADJACENT_ROWS = 64
# Samples of one step of the pass over the targets, 8 or 16 a thread, and the most programs that share the pass. A step
# waits for memory once; from MANY_SAMPLES on the steps are larger, so that there are few of them.
TOTALS_BLOCK_ROWS, MANY_TOTALS_BLOCK_ROWS = 1024, 8192
MANY_SAMPLES = 2**19
MAX_TOTALS_PROGRAMS = 128
# Programs of the upstream kernel, some 16 a multiprocessor: enough to fill the device, few enough that nothing is lost
# on them where the upstream gradient is 1, as nearly always.
MAX_UPSTREAM_PROGRAMS = 2048


@dataclass(frozen=True)
class Device:
    """What launches depend on besides the tensors: the device, and the compiler."""

    n_multiprocessors: int
    capability: tuple[int, int] | None  # of an NVIDIA device
    triton_version: tuple[int, int]

    @property
    def max_ctas(self) -> int:
        """The most multiprocessors that may share a row; 1 without clusters."""
        has_clusters = self.capability is not None and self.capability[0] in (9, 10)
        return MAX_CLUSTER if has_clusters and self.triton_version >= CLUSTER_TRITON else 1


@dataclass(frozen=True)
class LaunchConfig:
    """Block and warps of one kernel: of what a program takes at a time, ``block_rows`` rows of ``block_classes``."""

    block_rows: int
    block_classes: int
    num_warps: int
    class_tiles: int = 1  # side by side in a block; each has a power of two of classes
    num_ctas: int = 1  # multiprocessors that a program spans, num_warps on each
    class_parts: int = 1  # programs that share the classes of a row, each for a summary of its own

    def n_programs(self, n_groups: int, n_rows: int, n_classes: int | None = None) -> int:
        """Blocks of ``(n_groups, n_rows)`` rows; with ``n_classes``, the blocks of a row count too."""
        row_blocks = n_groups * cdiv(n_rows, self.block_rows)
        return row_blocks if n_classes is None else row_blocks * cdiv(n_classes, self.block_classes)


def forward_config(
    n_groups: int,
    n_rows: int,
    n_classes: int,
    itemsize: int,
    device: Device,
    *,
    class_contiguous: bool = True,
    aligned: bool = True,
    two_exponentials: bool = False,
) -> LaunchConfig:
    """Block of ``forward_kernel``: several short rows, one long row, or a part of rows that are looped over.

    ``itemsize`` is the bytes of the arithmetic type. ``aligned``: a thread can load neighbouring classes at once, and
    needs not an address and a mask for each of them. ``two_exponentials``: both terms are there and ``scale`` is not
    1, so that each element has two values to keep. Where rows are looped over and too few to fill the device,
    ``class_parts`` is above 1: the block is ``summarise_kernel``'s, and that of ``forward_kernel`` is
    :func:`combine_config`'s.
    """
    all_rows, padded = _next_power_of_2(n_rows), _next_power_of_2(n_classes)
    n_values = 2 if two_exponentials else 1  # of each element
    if n_groups == 1 and all_rows * padded <= MAX_SINGLE_PROGRAM_TILE:
        num_warps = _warps(all_rows * padded, itemsize)
        return LaunchConfig(all_rows, padded, num_warps if n_rows == 1 else max(MIN_SHARED_WARPS, num_warps))
    if not class_contiguous:
        config = _strided(all_rows, n_classes, itemsize, n_values)
    elif n_classes <= MAX_SHORT_CLASSES:
        max_rows = MAX_SHORT_ROWS if aligned and n_values == 1 else MAX_SHORT_ROWS // 2
        return _short_rows(n_groups, n_rows, n_classes, itemsize, max_rows, device.n_multiprocessors)
    else:
        config = _one_row(n_classes, itemsize, n_values, device.max_ctas, aligned)
    if n_groups > 1 or config.block_classes >= n_classes:
        return config
    # Where rows are few, smaller steps make more programs of them.
    part = replace(config, block_classes=config.block_classes // 2, num_warps=config.num_warps // 2)
    n_parts = _class_parts(part, n_rows, n_classes, device.n_multiprocessors)
    return config if n_parts == 1 else replace(part, class_parts=n_parts)


def expectation_config(
    n_groups: int,
    n_rows: int,
    n_classes: int,
    itemsize: int,
    device: Device,
    *,
    class_contiguous: bool = True,
    n_softmaxes: int = 1,
) -> LaunchConfig:
    """Block of ``expectation_kernel``, as :func:`forward_config`, for elements that have more to keep.

    Few long rows are looped over like many.
    """
    all_rows, padded = _next_power_of_2(n_rows), _next_power_of_2(n_classes)
    size = n_softmaxes * EXPECTATION_SIZE[itemsize]
    if n_groups == 1 and all_rows * padded * size <= MAX_SINGLE_PROGRAM_TILE:
        return LaunchConfig(all_rows, padded, _warps(all_rows * padded, size * EXPECTATION_BYTES))
    if not class_contiguous:
        return _strided_expectation(all_rows, n_classes, size)
    if n_classes <= MAX_SHORT_CLASSES:
        max_rows, n_bytes = MAX_SHORT_ROWS // 4 // size, size * EXPECTATION_BYTES
        return _short_rows(n_groups, n_rows, n_classes, n_bytes, max_rows, device.n_multiprocessors)
    return _one_expectation_row(n_classes, size, device.max_ctas)


def _strided_expectation(all_rows: int, n_classes: int, size: int) -> LaunchConfig:
    """Several rows along memory."""
    if n_classes * size <= MAX_UNROLLED_CLASSES:
        rows = max(MIN_SHARED_WARPS * 32, _power_of_2_below(UNROLLED_ELEMENTS // 2 // size // n_classes))
        return LaunchConfig(min(all_rows, rows, MAX_UNROLLED_ROWS), n_classes, MIN_SHARED_WARPS, n_classes)
    padded, elements = _next_power_of_2(n_classes), STRIDED_ELEMENTS // 4 // size
    rows = min(all_rows, STRIDED_ROWS, max(MIN_STRIDED_ROWS, elements // padded))
    classes = min(n_classes, max(1, elements // rows))  # of one step, if there are more
    wanted_warps = _next_power_of_2(cdiv(4 * rows * classes * size, STRIDED_WARP_ELEMENTS))
    num_warps = min(MAX_WARPS, max(MIN_SHARED_WARPS, wanted_warps))
    tile = min(_power_of_2_below(classes), max(1, 32 * num_warps // rows))
    n_tiles = cdiv(classes, tile)
    return LaunchConfig(rows, n_tiles * tile, num_warps, n_tiles)


def _one_expectation_row(n_classes: int, size: int, max_ctas: int) -> LaunchConfig:
    """One row, classes along memory: in the registers of one multiprocessor, in those of a cluster, or looped over."""
    padded = _next_power_of_2(n_classes)
    cta_classes = MAX_CTA_CLASSES[4] // 4 // size
    if padded > cta_classes * max_ctas:
        return LaunchConfig(1, cta_classes // 2, MAX_WARPS)  # lanes keep their sums beside: with as many, some spill
    num_ctas = min(max_ctas, max(1, 2 * padded // cta_classes))
    num_warps = _warps(padded // num_ctas, size * EXPECTATION_BYTES)
    tile = min(padded, max(padded // 4, WARP_TILE_CLASSES * num_warps * num_ctas))
    n_tiles = cdiv(n_classes, tile)
    return LaunchConfig(1, n_tiles * tile, num_warps, n_tiles, num_ctas)


def _short_rows(
    n_groups: int, n_rows: int, n_classes: int, itemsize: int, max_rows: int, n_multiprocessors: int
) -> LaunchConfig:
    """Several rows, classes along memory."""
    padded = _next_power_of_2(n_classes)
    most_rows = max(1, min(max_rows, SHORT_ROWS_ELEMENTS * 4 // itemsize // padded))
    tile = min(padded, max(SECTOR_CLASSES, WARP_TILE_CLASSES * MIN_SHARED_WARPS // most_rows))
    n_tiles = cdiv(n_classes, tile)
    fair_rows = _next_power_of_2(cdiv(n_groups * n_rows, n_multiprocessors))  # with more, some would have none
    block_rows = min(_next_power_of_2(n_rows), most_rows, max(fair_rows, most_rows // 4))
    return LaunchConfig(block_rows, n_tiles * tile, MIN_SHARED_WARPS, n_tiles)


def _strided(all_rows: int, n_classes: int, itemsize: int, n_values: int) -> LaunchConfig:
    """Several rows along memory."""
    size = itemsize // 4
    if n_classes <= MAX_UNROLLED_CLASSES:
        rows = _power_of_2_below(UNROLLED_ELEMENTS // size // n_values // n_classes)
        return LaunchConfig(min(all_rows, rows, MAX_UNROLLED_ROWS), n_classes, MIN_SHARED_WARPS, n_classes)
    padded = _next_power_of_2(n_classes)
    rows = min(all_rows, STRIDED_ROWS, max(MIN_STRIDED_ROWS, STRIDED_ELEMENTS // size // padded))
    classes = min(n_classes, STRIDED_ELEMENTS // size // rows)  # of one step, if there are more
    wanted_warps = _next_power_of_2(cdiv(rows * classes * size, STRIDED_WARP_ELEMENTS))
    num_warps = min(MAX_WARPS, max(MIN_SHARED_WARPS, wanted_warps))
    tile = min(padded, WARP_TILE_CLASSES // size * num_warps // rows)
    n_tiles = cdiv(classes, tile)
    return LaunchConfig(rows, n_tiles * tile, num_warps, n_tiles)


def _one_row(n_classes: int, itemsize: int, n_values: int, max_ctas: int, aligned: bool) -> LaunchConfig:
    """One row, classes along memory: in the registers of one multiprocessor, in those of a cluster, or looped over."""
    padded = _next_power_of_2(n_classes)
    cta_classes = MAX_CTA_CLASSES[itemsize] // n_values
    if padded > cta_classes * max_ctas:
        if not aligned:  # classes meet in a lane only from different tiles; twice the registers for a thread
            return LaunchConfig(1, LOOP_CLASSES[itemsize] // 2, MAX_WARPS // 2, 4)
        # More tiles take fewer registers and more instructions.
        return LaunchConfig(1, LOOP_CLASSES[itemsize], MAX_WARPS, 1 if n_values == 1 else 4)
    # Half a multiprocessor's registers at most, if a cluster allows: so one row is loaded while another is computed.
    num_ctas = min(max_ctas, max(1, 2 * padded // cta_classes))
    num_warps = _warps(padded // num_ctas, itemsize)
    if num_ctas > 1 and padded // num_ctas <= cta_classes // 2:
        num_warps = MAX_WARPS // 2
    # Quarters of the padded row, so that little is padding; halves where with quarters triton 3.6 spills 8 bytes.
    is_full = aligned and num_ctas == 1 and padded * itemsize > MAX_WARPS * WARP_ELEMENTS * 4
    tile = max(padded // (2 if is_full else 4), WARP_TILE_CLASSES * num_warps * num_ctas)
    n_tiles = cdiv(n_classes, tile)
    return LaunchConfig(1, n_tiles * tile, num_warps, n_tiles, num_ctas)


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
    device: Device,
) -> ForwardPlan:
    """``forward_kernel`` and ``summarise_kernel``; tensors are logits, target, output and gradient.

    The output is contiguous: with ``out_per_row``, or after ``summarise_kernel``, losses or coefficients of each row,
    otherwise partial sums.
    """
    grad = grad or logits
    n_classes = logits.n_classes

    def choose(out_strides: tuple[int, ...]) -> tuple[RowLayout, LaunchConfig]:
        layout = row_layout(logits.row_shape, logits.row_strides, target_strides, out_strides, grad.row_strides)
        align = alignment(n_classes, *layout.strides[0], *layout.strides[-1])
        return layout, forward_config(
            layout.n_groups,
            layout.n_rows,
            n_classes,
            itemsize,
            device,
            class_contiguous=logits.stride_class == 1,
            aligned=align >= MIN_VECTOR,
            two_exponentials=two_exponentials,
        )

    # Partial sums have no strides for the rows. Those of the logits keep no dimensions apart.
    layout, config = choose(logits.row_strides)
    if out_per_row or config.class_parts > 1:
        layout, config = choose(contiguous_strides(logits.row_shape))
    plan = partial(_plan, layout, (logits.stride_class, None, None, grad.stride_class), n_classes)
    n_programs = config.n_programs(layout.n_groups, layout.n_rows)
    class_blocks, parts = cdiv(n_classes, config.block_classes), config.class_parts
    if parts == 1:
        whole_tiles = n_classes // (config.block_classes // config.class_tiles) if class_blocks == 1 else 0
        blocks = {"CLASS_TILES": config.class_tiles, "WHOLE_TILES": whole_tiles, "CLASS_BLOCKS": class_blocks}
        return ForwardPlan(plan(config, n_programs, ONE_GROUP=layout.n_groups == 1, **blocks), None)
    combining = combine_config(config, layout.n_rows)
    forward = plan(combining, 1, ONE_GROUP=True, CLASS_TILES=1, WHOLE_TILES=0, CLASS_BLOCKS=1)
    blocks = {"CLASS_TILES": config.class_tiles, "CLASS_BLOCKS": cdiv(class_blocks, parts)}
    summarise = plan(config, parts * n_programs, **blocks)
    return ForwardPlan(replace(forward, n_items=parts), replace(summarise, n_items=parts))


@lru_cache(maxsize=4096)
def plan_expectation(
    logits: Axes,
    target: Axes,
    upstream_strides: tuple[int, ...],
    grad: Axes | None,
    itemsize: int,
    *,
    has_probabilities: bool,
    out_per_row: bool,
    n_softmaxes: int,
    device: Device,
) -> Plan:
    """``expectation_kernel``; tensors are logits, target, upstream gradient, output and gradient.

    ``target`` has classes only with ``has_probabilities``. The output is contiguous: losses of each row, or otherwise
    partial sums, which have no strides for the rows.
    """
    grad = grad or logits
    n_classes = logits.n_classes
    out_strides = contiguous_strides(logits.row_shape) if out_per_row else logits.row_strides
    layout = row_layout(
        logits.row_shape, logits.row_strides, target.row_strides, upstream_strides, out_strides, grad.row_strides
    )
    target_stride_class = target.stride_class if has_probabilities else None
    class_strides = logits.stride_class, target_stride_class, None, None, grad.stride_class
    config = expectation_config(
        layout.n_groups,
        layout.n_rows,
        n_classes,
        itemsize,
        device,
        class_contiguous=logits.stride_class == 1,
        n_softmaxes=n_softmaxes,
    )
    class_blocks = cdiv(n_classes, config.block_classes)
    plan = _plan(
        layout,
        class_strides,
        n_classes,
        config,
        config.n_programs(layout.n_groups, layout.n_rows),
        ONE_GROUP=layout.n_groups == 1,
        CLASS_TILES=config.class_tiles,
        WHOLE_TILES=n_classes // (config.block_classes // config.class_tiles) if class_blocks == 1 else 0,
        CLASS_BLOCKS=class_blocks,
    )
    return replace(plan, n_items=layout.n_groups * layout.n_rows * len(layout.offsets))


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
    return _plan(layout, class_strides, logits.n_classes, config, n_programs, ONE_GROUP=layout.n_groups == 1)


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
    # A number of classes beyond 32 bits must be seen as such: kernels multiply by ALIGN in the width of what they get.
    align = alignment(n_classes, *chain.from_iterable(with_classes)) if n_classes < 2**31 else 1
    meta |= {
        "ALIGN": align,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_CLASSES": config.block_classes,
        "num_warps": config.num_warps,
        "num_ctas": config.num_ctas,
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


def _power_of_2_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)
