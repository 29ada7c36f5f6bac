"""Strides -> groups of rows, in as few launches as hold them: pure functions."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product


@dataclass(frozen=True)
class RowLayout:
    """The samples of some tensors of one shape as ``n_groups`` groups of ``n_rows`` rows each, in every launch.

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
