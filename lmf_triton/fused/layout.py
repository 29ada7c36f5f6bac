"""Shapes and strides -> classes, and groups of rows in as few launches as hold them: pure functions."""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from ..shapes import class_axis


class Axes(NamedTuple):
    """A tensor of the logits' shape, as the kernels see it: classes, and samples with their own shape and strides."""

    n_classes: int
    stride_class: int
    row_shape: tuple[int, ...]
    row_strides: tuple[int, ...]


def axes(shape: tuple[int, ...], strides: tuple[int, ...]) -> Axes:
    """Split the class axis of ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)`` off."""
    i = class_axis(shape)
    return Axes(shape[i], strides[i], shape[:i] + shape[i + 1 :], strides[:i] + strides[i + 1 :])


def axes_without_classes(shape: tuple[int, ...], strides: tuple[int, ...]) -> Axes:
    """A tensor of the samples' shape, as if all classes of a sample were one element."""
    return Axes(1, 0, shape, strides)


@dataclass(frozen=True)
class RowLayout:
    """The samples of some tensors of one shape as ``n_groups`` groups of ``n_rows`` rows each, in every launch.

    ``strides[i]`` is ``(stride_group, stride_row)`` of tensor i. Samples that do not fit two strides are spread over
    several launches: ``offsets[k][i]`` is where launch k starts in tensor i.
    """

    n_groups: int
    n_rows: int
    strides: tuple[tuple[int, int], ...]
    offsets: tuple[tuple[int, ...], ...]


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
