"""The Triton kernels: loss and gradient in one pass over the logits, and the kernels around it.

Every kernel sees the logits as ``(group, row, class)``. A row is one sample; rows that lie a constant stride apart
form a group. For ``(N, C)`` there is one group of N rows; for contiguous ``(N, C, H, W)`` a group is an image and its
rows are the pixels, which are neighbours in memory. A tile is ``[BLOCK_ROWS, BLOCK_CLASSES]`` of one group.

Numerics: every reduction runs over the classes other than the target ("the others"), and every exponent is a
difference to their largest logit m. So neither 1 - p nor -log(p) is ever formed by a subtraction.

Loops run to a compile-time bound: a power of two or a number of class blocks, so that few variants are compiled.
"""

import triton
import triton.language as tl

from ..math import exp, focal_term, ldam_term
from ..rows import (
    combine,
    gradient,
    lane_statistics,
    load_others,
    load_target,
    redistribute,
    tile_mask,
    tile_ptrs,
    weight_of,
)


@triton.jit
def statistics_kernel(
    logits_ptr,  # (row, class)
    target_ptr,  # (row), any integer type
    statistics_ptr,  # (3, row, CLASS_SPLITS): maximum and sums of exponentials of the others, for each part of a row
    scale,
    ignore_index,
    n_rows,
    n_classes,  # this and the stride of rows of logits in units of ALIGN elements
    logits_stride_row,
    logits_stride_class,
    target_stride_row,
    PLAIN: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGN: tl.constexpr,  # a power of two: what the compiler may rely on to load several classes at once
    CLASS_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    CLASS_BLOCKS: tl.constexpr,  # of one part
):
    """Row statistics of a part of the classes, where there are too few rows to fill the device."""
    dtype: tl.constexpr = statistics_ptr.dtype.element_ty
    n_classes = ALIGN * n_classes
    split = tl.program_id(0) % CLASS_SPLITS
    rows = (tl.program_id(0) // CLASS_SPLITS).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < n_rows
    target, kept, _ = load_target(target_ptr + rows * target_stride_row, row_mask, n_classes, ignore_index)
    lane_max, lane_plain, lane_scaled = lane_statistics(
        logits_ptr + ALIGN * (rows * logits_stride_row),
        logits_stride_class,
        split * CLASS_BLOCKS,
        target,
        row_mask,
        kept,
        n_classes,
        scale,
        dtype,
        PLAIN,
        SCALED,
        BLOCK_ROWS,
        BLOCK_CLASSES,
        CLASS_BLOCKS,
    )
    m, plain_sum, scaled_sum = combine(lane_max, lane_plain, lane_scaled, scale, PLAIN, SCALED)
    parts = statistics_ptr + rows * CLASS_SPLITS + split
    stride_statistic = n_rows * CLASS_SPLITS
    tl.store(parts, m, mask=row_mask)
    tl.store(parts + stride_statistic, plain_sum, mask=row_mask)
    tl.store(parts + 2 * stride_statistic, scaled_sum, mask=row_mask)


@triton.jit
def forward_kernel(
    logits_ptr,  # (group, row, class)
    target_ptr,  # (group, row), any integer type
    margins_ptr,  # (class) or None
    weight_ptr,  # (class) or None
    totals_ptr,  # (2, N_TOTALS) from totals_kernel; None: no mean, or this one tile holds all rows
    statistics_ptr,  # (3, row, BLOCK_CLASSES) from statistics_kernel, in the one tile that combines them; or None
    loss_ptr,  # (group, row) for reduction "none", otherwise (program): the sum of its rows
    grad_ptr,  # (group, row, class), or None: no gradient now
    coefs_ptr,  # (group, row, 4), or None: nothing to recompute the gradient from
    alpha,
    beta,
    gamma,
    scale,
    ignore_index,
    n_rows,
    n_classes,  # this and the strides of groups and rows of logits and gradient in units of ALIGN elements
    logits_stride_group,
    logits_stride_row,
    logits_stride_class,
    target_stride_group,
    target_stride_row,
    out_stride_group,  # of loss_ptr and, times 4, of coefs_ptr
    out_stride_row,
    grad_stride_group,
    grad_stride_row,
    grad_stride_class,
    HAS_LDAM: tl.constexpr,  # alpha != 0
    HAS_FOCAL: tl.constexpr,  # beta != 0
    UNIT_SCALE: tl.constexpr,  # scale == 1: both terms share their exponentials
    REDUCTION: tl.constexpr,
    N_TOTALS: tl.constexpr,
    ALIGN: tl.constexpr,  # a power of two: what the compiler may rely on to load several classes at once
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    CLASS_BLOCKS: tl.constexpr,  # 1: the tile stays in registers between loss and gradient
):
    """Loss of BLOCK_ROWS rows, with their gradient or the coefficients from which backward_kernel recomputes it."""
    dtype: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    PLAIN: tl.constexpr = HAS_FOCAL or UNIT_SCALE  # e^(x_j - m) is needed
    SCALED: tl.constexpr = HAS_LDAM and not UNIT_SCALE  # e^(scale * (x_j - m)) is needed

    program = tl.program_id(0)
    n_classes = ALIGN * n_classes
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    group = (program // row_blocks).to(tl.int64)
    rows = (program % row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < n_rows
    offs_c = tl.arange(0, BLOCK_CLASSES)

    target_ptrs = target_ptr + group * target_stride_group + rows * target_stride_row
    target, kept, out_of_range = load_target(target_ptrs, row_mask, n_classes, ignore_index)
    row_ptrs = logits_ptr + ALIGN * (group * logits_stride_group + rows * logits_stride_row)
    x_y = tl.load(row_ptrs + target.to(tl.int64) * logits_stride_class, mask=kept, other=0.0).to(dtype)

    # Row statistics: m, the largest of the others, and the sums of their exponentials relative to m.
    plain_sum = tl.zeros([BLOCK_ROWS], dtype)
    scaled_sum = tl.zeros([BLOCK_ROWS], dtype)
    if statistics_ptr is not None:
        parts = statistics_ptr + (rows * BLOCK_CLASSES)[:, None] + offs_c[None, :]
        stride_statistic = n_rows * BLOCK_CLASSES
        part_max = tl.load(parts, mask=row_mask[:, None], other=-float("inf"))
        part_plain = tl.load(parts + stride_statistic, mask=row_mask[:, None], other=0.0)
        part_scaled = tl.load(parts + 2 * stride_statistic, mask=row_mask[:, None], other=0.0)
        m, plain_sum, scaled_sum = combine(part_max, part_plain, part_scaled, scale, PLAIN, SCALED)
        m = tl.where(m == -float("inf"), 0.0, m)
    elif CLASS_BLOCKS == 1:
        logits_ptrs = tile_ptrs(row_ptrs, offs_c, logits_stride_class)
        others = load_others(logits_ptrs, offs_c, target, row_mask, kept, n_classes, dtype, EVICTION="")
        m = tl.max(others, axis=1)
        m = tl.where(m == -float("inf"), 0.0, m)
        gaps = others - m[:, None]
        if PLAIN:
            plain_sum = tl.sum(exp(gaps), axis=1)
        if SCALED:
            scaled_sum = tl.sum(exp(scale * gaps), axis=1)
    else:
        lane_max, lane_plain, lane_scaled = lane_statistics(
            row_ptrs,
            logits_stride_class,
            0,
            target,
            row_mask,
            kept,
            n_classes,
            scale,
            dtype,
            PLAIN,
            SCALED,
            BLOCK_ROWS,
            BLOCK_CLASSES,
            CLASS_BLOCKS,
        )
        m, plain_sum, scaled_sum = combine(lane_max, lane_plain, lane_scaled, scale, PLAIN, SCALED)
        m = tl.where(m == -float("inf"), 0.0, m)

    m = redistribute(m, BLOCK_ROWS)
    plain_sum = redistribute(plain_sum, BLOCK_ROWS)
    scaled_sum = redistribute(scaled_sum, BLOCK_ROWS)

    # A mean divides its gradient row by row, and its loss once, after the sum.
    weight = weight_of(weight_ptr, target, kept, dtype)
    ldam_weight = weight
    focal_weight = weight
    if REDUCTION == "mean" or REDUCTION == "mean_per_term":
        if totals_ptr is None:
            ldam_total = tl.sum(weight)
            count = tl.sum(kept.to(dtype))
        else:
            offs_t = tl.arange(0, N_TOTALS)
            ldam_total = tl.sum(tl.load(totals_ptr + offs_t))
            count = tl.sum(tl.load(totals_ptr + N_TOTALS + offs_t))
        focal_total = count if REDUCTION == "mean_per_term" else ldam_total
        ldam_weight = weight / ldam_total
        focal_weight = weight / focal_total

    # The two terms, and their slopes in the gap between the others and the target. Where there are no others (C = 1,
    # or all at -inf) the gap is -inf. A target out of range has no class and an infinite x_y no softmax: NaN. Ignored
    # rows are exactly 0, whatever their logits and the denominators are.
    no_others = (plain_sum if PLAIN else scaled_sum) == 0
    plain_sum = tl.where(no_others, 1.0, plain_sum)
    scaled_sum = tl.where(no_others, 1.0, scaled_sum)
    gap = tl.where(no_others, -float("inf"), m) - x_y
    gap = tl.where(out_of_range | (x_y == float("inf")), float("nan"), gap)
    active = kept | out_of_range
    ldam = tl.zeros([BLOCK_ROWS], dtype)
    focal = tl.zeros([BLOCK_ROWS], dtype)
    plain_slope = tl.zeros([BLOCK_ROWS], dtype)
    scaled_slope = tl.zeros([BLOCK_ROWS], dtype)
    if HAS_FOCAL:
        value, slope = focal_term(gap + tl.log(plain_sum), gamma)
        focal = tl.where(active, beta * (weight * value), 0.0)
        plain_slope += tl.where(active, beta * (focal_weight * slope), 0.0)
    if HAS_LDAM:
        if margins_ptr is not None:
            gap += tl.load(margins_ptr + target, mask=kept, other=0.0).to(dtype)
        value, slope = ldam_term(gap + tl.log(plain_sum) if UNIT_SCALE else scale * gap + tl.log(scaled_sum))
        ldam = tl.where(active, alpha * (weight * value), 0.0)
        slope = tl.where(active, alpha * (ldam_weight * slope), 0.0)
        if UNIT_SCALE:
            plain_slope += slope
        else:
            scaled_slope += scale * slope
    plain_coef = plain_slope / plain_sum
    scaled_coef = scaled_slope / scaled_sum
    slope = plain_slope + scaled_slope  # minus the gradient of x_y
    plain_coef = redistribute(plain_coef, BLOCK_ROWS)
    scaled_coef = redistribute(scaled_coef, BLOCK_ROWS)
    slope = redistribute(slope, BLOCK_ROWS)

    if REDUCTION == "none":
        tl.store(loss_ptr + group * out_stride_group + rows * out_stride_row, ldam + focal, mask=row_mask)
    elif REDUCTION == "mean_per_term":
        loss = tl.zeros([], dtype)
        if HAS_LDAM:
            loss += tl.sum(ldam) / ldam_total
        if HAS_FOCAL:
            loss += tl.sum(focal) / focal_total
        tl.store(loss_ptr + program, loss)
    else:
        loss = tl.sum(ldam + focal)
        if REDUCTION == "mean":
            loss = loss / ldam_total
        tl.store(loss_ptr + program, loss)

    if coefs_ptr is not None:
        row_coefs = coefs_ptr + 4 * (group * out_stride_group + rows * out_stride_row)
        tl.store(row_coefs, m, mask=row_mask)
        tl.store(row_coefs + 1, plain_coef, mask=row_mask)
        tl.store(row_coefs + 2, scaled_coef, mask=row_mask)
        tl.store(row_coefs + 3, slope, mask=row_mask)

    if grad_ptr is not None:
        grad_rows = grad_ptr + ALIGN * (group * grad_stride_group + rows * grad_stride_row)
        if CLASS_BLOCKS == 1:
            grad = gradient(gaps, offs_c, target, scale, plain_coef, scaled_coef, slope, PLAIN, SCALED)
            grad_ptrs = tile_ptrs(grad_rows, offs_c, grad_stride_class)
            mask = tile_mask(row_mask, offs_c, n_classes)
            tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        else:
            # Backwards: the blocks read last are the likeliest to be in cache still.
            for block in range(CLASS_BLOCKS):
                cols = (CLASS_BLOCKS - 1 - block) * BLOCK_CLASSES + offs_c
                logits_ptrs = tile_ptrs(row_ptrs, cols, logits_stride_class)
                others = load_others(
                    logits_ptrs, cols, target, row_mask, kept, n_classes, dtype, EVICTION="evict_first"
                )
                gaps = others - m[:, None]
                grad = gradient(gaps, cols, target, scale, plain_coef, scaled_coef, slope, PLAIN, SCALED)
                grad_ptrs = tile_ptrs(grad_rows, cols, grad_stride_class)
                mask = tile_mask(row_mask, cols, n_classes)
                tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def backward_kernel(
    logits_ptr,  # (group, row, class)
    target_ptr,  # (group, row), any integer type
    coefs_ptr,  # (group, row, 4) from forward_kernel
    upstream_ptr,  # (group, row), strides 0 for a scalar; or None for 1
    grad_ptr,  # (group, row, class)
    scale,
    ignore_index,
    n_rows,
    n_classes,  # this and the strides of groups and rows of logits and gradient in units of ALIGN elements
    logits_stride_group,
    logits_stride_row,
    logits_stride_class,
    target_stride_group,
    target_stride_row,
    coefs_stride_group,
    coefs_stride_row,
    upstream_stride_group,
    upstream_stride_row,
    grad_stride_group,
    grad_stride_row,
    grad_stride_class,
    PLAIN: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGN: tl.constexpr,  # a power of two: what the compiler may rely on to load several classes at once
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """The gradient of one tile from the logits and each row's coefficients, times the upstream gradient."""
    dtype: tl.constexpr = coefs_ptr.dtype.element_ty
    program = tl.program_id(0)
    n_classes = ALIGN * n_classes
    class_blocks = tl.cdiv(n_classes, BLOCK_CLASSES)
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    group = (program // class_blocks // row_blocks).to(tl.int64)
    rows = (program // class_blocks % row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (program % class_blocks).to(tl.int64) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    row_mask = rows < n_rows

    target_ptrs = target_ptr + group * target_stride_group + rows * target_stride_row
    target, kept, out_of_range = load_target(target_ptrs, row_mask, n_classes, ignore_index)
    active = kept | out_of_range
    upstream = active.to(dtype)
    if upstream_ptr is not None:
        upstream_ptrs = upstream_ptr + group * upstream_stride_group + rows * upstream_stride_row
        upstream = tl.load(upstream_ptrs, mask=active, other=0.0).to(dtype)
    row_coefs = coefs_ptr + group * coefs_stride_group + rows * coefs_stride_row
    m = tl.load(row_coefs, mask=row_mask, other=0.0)
    plain_coef = upstream * tl.load(row_coefs + 1, mask=row_mask, other=0.0)
    scaled_coef = upstream * tl.load(row_coefs + 2, mask=row_mask, other=0.0)
    slope = upstream * tl.load(row_coefs + 3, mask=row_mask, other=0.0)

    logits_ptrs = logits_ptr + ALIGN * (group * logits_stride_group + rows * logits_stride_row)
    logits_ptrs = tile_ptrs(logits_ptrs, cols, logits_stride_class)
    others = load_others(logits_ptrs, cols, target, row_mask, kept, n_classes, dtype, EVICTION="")
    gaps = others - m[:, None]
    grad = gradient(gaps, cols, target, scale, plain_coef, scaled_coef, slope, PLAIN, SCALED)
    grad_ptrs = grad_ptr + ALIGN * (group * grad_stride_group + rows * grad_stride_row)
    grad_ptrs = tile_ptrs(grad_ptrs, cols, grad_stride_class)
    mask = tile_mask(row_mask, cols, n_classes)
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask)
