"""Device functions of rows and tiles."""

import triton
import triton.language as tl

from .math import exp


@triton.jit
def load_target(target_ptrs, row_mask, n_classes, ignore_index):
    """Class of each row, whether the row takes part in the loss, and whether its class is out of range."""
    # Compared in int64 whatever is stored, so that no value of a narrow or wide type is mistaken for another.
    target = tl.load(target_ptrs, mask=row_mask, other=0).to(tl.int64)
    considered = row_mask & (target != ignore_index)
    in_range = (target >= 0) & (target < n_classes)
    return target.to(tl.int32), considered & in_range, considered & (in_range == 0)


@triton.jit
def weight_of(weight_ptr, target, kept, dtype: tl.constexpr):
    if weight_ptr is None:
        return kept.to(dtype)
    else:
        return tl.load(weight_ptr + target, mask=kept, other=0.0).to(dtype)


@triton.jit
def tile_ptrs(row_ptrs, cols, stride_class):
    return row_ptrs[:, None] + cols[None, :].to(tl.int64) * stride_class


@triton.jit
def tile_mask(row_mask, cols, n_classes):
    return row_mask[:, None] & (cols < n_classes)[None, :]


@triton.jit
def load_others(logits_ptrs, offs_c, target, row_mask, kept, n_classes, dtype: tl.constexpr, EVICTION: tl.constexpr):
    """A tile of logits, -inf at the target, in rows that do not take part, and outside the tensor."""
    # Not masked by kept: a mask that depends on data would split the wide loads of class-strided tiles.
    mask = tile_mask(row_mask, offs_c, n_classes)
    x = tl.load(logits_ptrs, mask=mask, other=-float("inf"), eviction_policy=EVICTION).to(dtype)
    return tl.where(kept[:, None] & (offs_c[None, :] != target[:, None]), x, -float("inf"))


@triton.jit
def online_sum(total, gap, is_empty):
    """One step of sum(exp(x - max)), given the gap between the new x and the maximum so far."""
    e = tl.exp(-tl.abs(gap))  # with _exp triton 3.9 spills here on sm_100
    return tl.where(is_empty, total, tl.where(gap > 0, total * e + 1.0, total + e))


@triton.jit
def lane_statistics(
    row_ptrs,
    stride_class,
    first_block,
    target,
    row_mask,
    kept,
    n_classes,
    scale,
    dtype: tl.constexpr,
    PLAIN: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    CLASS_BLOCKS: tl.constexpr,
):
    """Loop over CLASS_BLOCKS blocks: each lane keeps the maximum and the sums of the classes that pass through it."""
    lane_max = tl.full([BLOCK_ROWS, BLOCK_CLASSES], -float("inf"), dtype)
    lane_plain = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], dtype)
    lane_scaled = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], dtype)
    for block in range(CLASS_BLOCKS):
        cols = (first_block + block) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
        logits_ptrs = tile_ptrs(row_ptrs, cols, stride_class)
        # They are read once more, for the gradient.
        others = load_others(logits_ptrs, cols, target, row_mask, kept, n_classes, dtype, EVICTION="evict_last")
        is_empty = others == -float("inf")
        if PLAIN:
            lane_plain = online_sum(lane_plain, others - lane_max, is_empty)
        if SCALED:
            lane_scaled = online_sum(lane_scaled, scale * (others - lane_max), is_empty)
        lane_max = tl.maximum(lane_max, others)
    return lane_max, lane_plain, lane_scaled


@triton.jit
def combine(part_max, part_plain, part_scaled, scale, PLAIN: tl.constexpr, SCALED: tl.constexpr):
    """Statistics of whole rows from those of their parts along axis 1; the maximum is -inf where there is nothing."""
    m = tl.max(part_max, axis=1)
    gaps = part_max - tl.where(m == -float("inf"), 0.0, m)[:, None]
    if PLAIN:
        part_plain *= exp(gaps)
    if SCALED:
        part_scaled *= exp(scale * gaps)
    return m, tl.sum(part_plain, axis=1), tl.sum(part_scaled, axis=1)


@triton.jit
def redistribute(per_row, BLOCK_ROWS: tl.constexpr):
    """The same values, one a row, in whatever layout suits what follows: a gather may change it, at its price.

    Without it the compiler computes the loss of a row once in every lane that has a part of the row.
    """
    if BLOCK_ROWS > 1:
        return tl.gather(per_row, tl.arange(0, BLOCK_ROWS), 0)
    else:
        return per_row


@triton.jit
def gradient(gaps, cols, target, scale, plain_coef, scaled_coef, slope, PLAIN: tl.constexpr, SCALED: tl.constexpr):
    """A tile of the gradient. Where the tile's exponentials are at hand already, the compiler reuses them."""
    grad = tl.zeros(gaps.shape, gaps.dtype)
    if PLAIN:
        grad += plain_coef[:, None] * exp(gaps)
    if SCALED:
        grad += scaled_coef[:, None] * exp(scale * gaps)
    return tl.where(cols[None, :] == target[:, None], -slope[:, None], grad)
