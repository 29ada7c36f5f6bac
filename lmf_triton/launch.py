"""How the kernels are launched: pure functions from shapes and strides to frozen configurations.

Nothing here touches a tensor or a device, so every choice can be tested and compiled on a machine without a GPU.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

# Elements of a forward tile. A thread keeps its part of the tile in registers from load to store; at 32 float32
# values a thread there is room for addresses and masks within 128 registers, so that 16 warps share a multiprocessor.
ELEMENTS_PER_THREAD = 32
MAX_WARPS = 16
# Longest row in one tile, by bytes of the arithmetic type. Beyond it the classes are looped over.
MAX_ONE_TILE_CLASSES = {4: 32768, 8: 8192}
# Tile of rows shorter than it, and of each step of the loop over classes.
SMALL_TILE = 4096
# A batch whose whole tile is at most this big is one program: no separate pass for the denominators of a mean.
MAX_SINGLE_PROGRAM_TILE = 8192
# Elements of a tile of the elementwise kernels (backward, scale).
ELEMENTWISE_TILE = 4096
# Rows of one step of the pass over the targets, and the most programs that share the pass.
TOTALS_BLOCK_ROWS = 1024
MAX_TOTALS_PROGRAMS = 128


@dataclass(frozen=True)
class RowLayout:
    """The samples of some tensors of one shape as groups of rows with one stride each.

    ``strides[i]`` is ``(stride_group, stride_row)`` of tensor i. Samples that do not fit two strides are split over
    several launches: ``offsets[k][i]`` is where launch k starts in tensor i.
    """

    n_groups: int
    n_rows: int
    strides: tuple[tuple[int, int], ...]
    offsets: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=4096)
def row_layout(shape: tuple[int, ...], *strides: tuple[int, ...]) -> RowLayout:
    """Merge the sample dimensions of tensors with these strides into as few as hold for all of them at once."""
    dims = [(size, each) for size, *each in zip(shape, *strides, strict=True) if size != 1]
    dims.sort(key=lambda dim: dim[1][0], reverse=True)  # in the order of the first tensor's memory
    merged: list[tuple[int, list[int]]] = []
    for size, each in dims:
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], each, strict=True)):
            merged[-1] = (merged[-1][0] * size, each)
        else:
            merged.append((size, each))
    none = (1, [0] * len(strides))
    n_rows, row = merged.pop() if merged else none
    merged.sort()  # the longest dimension that is left becomes the groups; the others are launched one by one
    n_groups, group = merged.pop() if merged else none
    offsets = tuple(
        tuple(sum(i * each[t] for i, (_, each) in zip(index, merged, strict=True)) for t in range(len(strides)))
        for index in product(*(range(size) for size, _ in merged))
    )
    return RowLayout(n_groups, n_rows, tuple(zip(group, row, strict=True)), offsets)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a new contiguous tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return tuple(strides)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile and warps of one launch."""

    block_rows: int
    block_classes: int
    num_warps: int

    def n_programs(self, n_groups: int, n_rows: int, n_classes: int | None = None) -> int:
        """Tiles of ``(n_groups, n_rows)`` rows; with ``n_classes``, the tiles of a row count too."""
        row_blocks = n_groups * _cdiv(n_rows, self.block_rows)
        return row_blocks if n_classes is None else row_blocks * _cdiv(n_classes, self.block_classes)


@lru_cache(maxsize=4096)
def forward_config(n_groups: int, n_rows: int, n_classes: int, itemsize: int) -> LaunchConfig:
    """Tile of ``forward_kernel`` for arithmetic of ``itemsize`` bytes: several short rows, or one long one."""
    block_classes = _next_power_of_2(n_classes)
    if block_classes > MAX_ONE_TILE_CLASSES[itemsize]:
        block_classes = SMALL_TILE
    all_rows = _next_power_of_2(n_rows)
    if n_groups == 1 and all_rows * block_classes <= MAX_SINGLE_PROGRAM_TILE:
        block_rows = all_rows
    else:
        block_rows = min(all_rows, max(1, SMALL_TILE // block_classes))
    return LaunchConfig(block_rows, block_classes, _warps(block_rows * block_classes, itemsize))


@lru_cache(maxsize=4096)
def elementwise_config(n_rows: int, n_classes: int, itemsize: int) -> LaunchConfig:
    """Tile of ``backward_kernel`` and ``scale_kernel``, which need not see a row as a whole."""
    block_classes = min(_next_power_of_2(n_classes), ELEMENTWISE_TILE)
    block_rows = min(_next_power_of_2(n_rows), ELEMENTWISE_TILE // block_classes)
    return LaunchConfig(block_rows, block_classes, _warps(block_rows * block_classes, itemsize))


def totals_grid(n_samples: int) -> tuple[int, int]:
    """Programs of ``totals_kernel`` and blocks of samples for each: powers of two, so that few variants compile."""
    blocks = _next_power_of_2(_cdiv(n_samples, TOTALS_BLOCK_ROWS))
    n_programs = min(blocks, MAX_TOTALS_PROGRAMS)
    return n_programs, blocks // n_programs


def _warps(n_elements: int, itemsize: int) -> int:
    per_warp = 32 * ELEMENTS_PER_THREAD * 4 // itemsize
    return min(max(4, n_elements // per_warp), MAX_WARPS)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
