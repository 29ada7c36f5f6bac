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

# Stands for infinity where inf would meet a factor 0: 0 * inf is NaN, 0 * BIG is 0. A constant that float32 holds.
BIG = tl.constexpr(1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """exp for a whole tile: one multiplication and one instruction. Results below 2^-126 may be flushed to 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _log1p(t):
    """log(1 + t) for t in [0, 1], to 3 units of 2^-24 in float32 (log itself, by the other branch: 5)."""
    if t.dtype == tl.float32:
        # log(1 + t) / t, interpolated at the ten Chebyshev nodes of [0, 1]: a quarter of the instructions of a log.
        p = 0.019542526 - 0.003176057 * t
        p = p * t - 0.05637361
        p = p * t + 0.105436236
        p = p * t - 0.15269667
        p = p * t + 0.19663274
        p = p * t - 0.24951616
        p = p * t + 0.3332971
        p = p * t - 0.49999893
        return (p * t + 1.0) * t
    else:
        # The rounding error of w = 1 + t cancels in log(w) / (w - 1).
        w = 1.0 + t
        lost = w == 1.0
        return tl.where(lost, t, tl.log(w) * (t / tl.where(lost, 1.0, w - 1.0)))


@triton.jit
def _softplus_and_sigmoid(z):
    """softplus(z), softplus(-z), sigmoid(z) and sigmoid(-z) from one exponential that cannot overflow."""
    t = tl.exp(-tl.abs(z))
    log1p_t = _log1p(t)
    larger = 1.0 / (1.0 + t)
    smaller = t * larger
    return (
        tl.maximum(z, 0.0) + log1p_t,
        tl.maximum(-z, 0.0) + log1p_t,
        tl.where(z >= 0, larger, smaller),
        tl.where(z >= 0, smaller, larger),
    )


@triton.jit
def _ldam(v):
    """LDAM of rows with scaled, margin-shifted gap v; and its derivative in v."""
    nll, _, slope, _ = _softplus_and_sigmoid(v)
    return nll, slope


@triton.jit
def _focal(u, gamma):
    """Focal loss of rows with gap u = logsumexp(others) - x_y; and its derivative in u."""
    u = tl.where(u < -BIG, -BIG, u)  # gamma = 0 at u = -inf: exp(-0 * inf) would be NaN
    nll, neg_log_q, q, p = _softplus_and_sigmoid(u)  # -log p_y, -log(1 - p_y), 1 - p_y, p_y
    factor = tl.exp(-gamma * neg_log_q)
    p_nll = p * tl.where(nll > BIG, BIG, nll)  # tends to 0 as u grows: 0 * inf would be NaN
    return factor * nll, factor * (gamma * p_nll + q)


@triton.jit
def _load_target(target_ptrs, row_mask, n_classes, ignore_index):
    """Class of each row, whether the row takes part in the loss, and whether its class is out of range."""
    # Compared in int64 whatever is stored, so that no value of a narrow or wide type is mistaken for another.
    target = tl.load(target_ptrs, mask=row_mask, other=0).to(tl.int64)
    considered = row_mask & (target != ignore_index)
    in_range = (target >= 0) & (target < n_classes)
    return target.to(tl.int32), considered & in_range, considered & (in_range == 0)


@triton.jit
def _weight_of(weight_ptr, target, kept, dtype: tl.constexpr):
    if weight_ptr is None:
        return kept.to(dtype)
    else:
        return tl.load(weight_ptr + target, mask=kept, other=0.0).to(dtype)


@triton.jit
def _tile_ptrs(row_ptrs, cols, stride_class):
    return row_ptrs[:, None] + cols[None, :].to(tl.int64) * stride_class


@triton.jit
def _tile_mask(row_mask, cols, n_classes):
    return row_mask[:, None] & (cols < n_classes)[None, :]


@triton.jit
def _load_others(logits_ptrs, offs_c, target, row_mask, kept, n_classes, dtype: tl.constexpr, EVICTION: tl.constexpr):
    """A tile of logits, -inf at the target, in rows that do not take part, and outside the tensor."""
    # Not masked by kept: a mask that depends on data would split the wide loads of class-strided tiles.
    mask = _tile_mask(row_mask, offs_c, n_classes)
    x = tl.load(logits_ptrs, mask=mask, other=-float("inf"), eviction_policy=EVICTION).to(dtype)
    return tl.where(kept[:, None] & (offs_c[None, :] != target[:, None]), x, -float("inf"))


@triton.jit
def _online_sum(total, gap, is_empty):
    """One step of sum(exp(x - max)), given the gap between the new x and the maximum so far."""
    e = tl.exp(-tl.abs(gap))  # with _exp triton 3.9 spills here on sm_100
    return tl.where(is_empty, total, tl.where(gap > 0, total * e + 1.0, total + e))


@triton.jit
def _lane_statistics(
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
        logits_ptrs = _tile_ptrs(row_ptrs, cols, stride_class)
        # They are read once more, for the gradient.
        others = _load_others(logits_ptrs, cols, target, row_mask, kept, n_classes, dtype, EVICTION="evict_last")
        is_empty = others == -float("inf")
        if PLAIN:
            lane_plain = _online_sum(lane_plain, others - lane_max, is_empty)
        if SCALED:
            lane_scaled = _online_sum(lane_scaled, scale * (others - lane_max), is_empty)
        lane_max = tl.maximum(lane_max, others)
    return lane_max, lane_plain, lane_scaled


@triton.jit
def _combine(part_max, part_plain, part_scaled, scale, PLAIN: tl.constexpr, SCALED: tl.constexpr):
    """Statistics of whole rows from those of their parts along axis 1; the maximum is -inf where there is nothing."""
    m = tl.max(part_max, axis=1)
    gaps = part_max - tl.where(m == -float("inf"), 0.0, m)[:, None]
    if PLAIN:
        part_plain *= _exp(gaps)
    if SCALED:
        part_scaled *= _exp(scale * gaps)
    return m, tl.sum(part_plain, axis=1), tl.sum(part_scaled, axis=1)


@triton.jit
def _redistribute(per_row, BLOCK_ROWS: tl.constexpr):
    """The same values, one a row, in whatever layout suits what follows: a gather may change it, at its price.

    Without it the compiler computes the loss of a row once in every lane that has a part of the row.
    """
    if BLOCK_ROWS > 1:
        return tl.gather(per_row, tl.arange(0, BLOCK_ROWS), 0)
    else:
        return per_row


@triton.jit
def _gradient(gaps, cols, target, scale, plain_coef, scaled_coef, slope, PLAIN: tl.constexpr, SCALED: tl.constexpr):
    """A tile of the gradient. Where the tile's exponentials are at hand already, the compiler reuses them."""
    grad = tl.zeros(gaps.shape, gaps.dtype)
    if PLAIN:
        grad += plain_coef[:, None] * _exp(gaps)
    if SCALED:
        grad += scaled_coef[:, None] * _exp(scale * gaps)
    return tl.where(cols[None, :] == target[:, None], -slope[:, None], grad)


@triton.jit
def totals_kernel(
    target_ptr,  # (group, row), any integer type
    weight_ptr,  # (class) or None
    totals_ptr,  # (2, program): sum of weights, number of samples
    ignore_index,
    n_samples,
    n_rows,
    n_classes,
    target_stride_group,
    target_stride_row,
    ONE_GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Each program's part of the denominators of a mean: sum of weights and number of samples that take part."""
    dtype: tl.constexpr = totals_ptr.dtype.element_ty
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    weight_sum = tl.zeros([BLOCK_ROWS], dtype)
    count = tl.zeros([BLOCK_ROWS], dtype)
    for step in range(STEPS):
        samples = (step * n_programs + program).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        if ONE_GROUP:
            offs = samples * target_stride_row
        else:
            offs = (samples // n_rows) * target_stride_group + (samples % n_rows) * target_stride_row
        target, kept, _ = _load_target(target_ptr + offs, samples < n_samples, n_classes, ignore_index)
        weight_sum += _weight_of(weight_ptr, target, kept, dtype)
        count += kept.to(dtype)
    tl.store(totals_ptr + program, tl.sum(weight_sum))
    tl.store(totals_ptr + n_programs + program, tl.sum(count))


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
    target, kept, _ = _load_target(target_ptr + rows * target_stride_row, row_mask, n_classes, ignore_index)
    lane_max, lane_plain, lane_scaled = _lane_statistics(
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
    m, plain_sum, scaled_sum = _combine(lane_max, lane_plain, lane_scaled, scale, PLAIN, SCALED)
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
    target, kept, out_of_range = _load_target(target_ptrs, row_mask, n_classes, ignore_index)
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
        m, plain_sum, scaled_sum = _combine(part_max, part_plain, part_scaled, scale, PLAIN, SCALED)
        m = tl.where(m == -float("inf"), 0.0, m)
    elif CLASS_BLOCKS == 1:
        logits_ptrs = _tile_ptrs(row_ptrs, offs_c, logits_stride_class)
        others = _load_others(logits_ptrs, offs_c, target, row_mask, kept, n_classes, dtype, EVICTION="")
        m = tl.max(others, axis=1)
        m = tl.where(m == -float("inf"), 0.0, m)
        gaps = others - m[:, None]
        if PLAIN:
            plain_sum = tl.sum(_exp(gaps), axis=1)
        if SCALED:
            scaled_sum = tl.sum(_exp(scale * gaps), axis=1)
    else:
        lane_max, lane_plain, lane_scaled = _lane_statistics(
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
        m, plain_sum, scaled_sum = _combine(lane_max, lane_plain, lane_scaled, scale, PLAIN, SCALED)
        m = tl.where(m == -float("inf"), 0.0, m)

    m = _redistribute(m, BLOCK_ROWS)
    plain_sum = _redistribute(plain_sum, BLOCK_ROWS)
    scaled_sum = _redistribute(scaled_sum, BLOCK_ROWS)

    # A mean divides its gradient row by row, and its loss once, after the sum.
    weight = _weight_of(weight_ptr, target, kept, dtype)
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
        value, slope = _focal(gap + tl.log(plain_sum), gamma)
        focal = tl.where(active, beta * (weight * value), 0.0)
        plain_slope += tl.where(active, beta * (focal_weight * slope), 0.0)
    if HAS_LDAM:
        if margins_ptr is not None:
            gap += tl.load(margins_ptr + target, mask=kept, other=0.0).to(dtype)
        value, slope = _ldam(gap + tl.log(plain_sum) if UNIT_SCALE else scale * gap + tl.log(scaled_sum))
        ldam = tl.where(active, alpha * (weight * value), 0.0)
        slope = tl.where(active, alpha * (ldam_weight * slope), 0.0)
        if UNIT_SCALE:
            plain_slope += slope
        else:
            scaled_slope += scale * slope
    plain_coef = plain_slope / plain_sum
    scaled_coef = scaled_slope / scaled_sum
    slope = plain_slope + scaled_slope  # minus the gradient of x_y
    plain_coef = _redistribute(plain_coef, BLOCK_ROWS)
    scaled_coef = _redistribute(scaled_coef, BLOCK_ROWS)
    slope = _redistribute(slope, BLOCK_ROWS)

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
            grad = _gradient(gaps, offs_c, target, scale, plain_coef, scaled_coef, slope, PLAIN, SCALED)
            grad_ptrs = _tile_ptrs(grad_rows, offs_c, grad_stride_class)
            mask = _tile_mask(row_mask, offs_c, n_classes)
            tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        else:
            # Backwards: the blocks read last are the likeliest to be in cache still.
            for block in range(CLASS_BLOCKS):
                cols = (CLASS_BLOCKS - 1 - block) * BLOCK_CLASSES + offs_c
                logits_ptrs = _tile_ptrs(row_ptrs, cols, logits_stride_class)
                others = _load_others(
                    logits_ptrs, cols, target, row_mask, kept, n_classes, dtype, EVICTION="evict_first"
                )
                gaps = others - m[:, None]
                grad = _gradient(gaps, cols, target, scale, plain_coef, scaled_coef, slope, PLAIN, SCALED)
                grad_ptrs = _tile_ptrs(grad_rows, cols, grad_stride_class)
                mask = _tile_mask(row_mask, cols, n_classes)
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
    target, kept, out_of_range = _load_target(target_ptrs, row_mask, n_classes, ignore_index)
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
    logits_ptrs = _tile_ptrs(logits_ptrs, cols, logits_stride_class)
    others = _load_others(logits_ptrs, cols, target, row_mask, kept, n_classes, dtype, EVICTION="")
    gaps = others - m[:, None]
    grad = _gradient(gaps, cols, target, scale, plain_coef, scaled_coef, slope, PLAIN, SCALED)
    grad_ptrs = grad_ptr + ALIGN * (group * grad_stride_group + rows * grad_stride_row)
    grad_ptrs = _tile_ptrs(grad_ptrs, cols, grad_stride_class)
    mask = _tile_mask(row_mask, cols, n_classes)
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def upstream_kernel(
    grad_ptr,  # (group, row, class)
    upstream_ptr,  # (group, row), strides 0 for a scalar
    out_ptr,  # (group, row, class), strides of grad_ptr
    n_tiles,
    n_rows,
    n_classes,
    grad_stride_group,
    grad_stride_row,
    grad_stride_class,
    upstream_stride_group,
    upstream_stride_row,
    IN_PLACE: tl.constexpr,  # out_ptr is grad_ptr
    STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """out = upstream * grad. In place, a tile whose upstream gradients are all exactly 1 is not touched.

    A program takes STEPS tiles: where nothing is to be done, starting one for each would be what costs.
    """
    class_blocks = tl.cdiv(n_classes, BLOCK_CLASSES)
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    for step in range(STEPS):
        tile = step * tl.num_programs(0) + tl.program_id(0)
        group = (tile // class_blocks // row_blocks).to(tl.int64)
        rows = (tile // class_blocks % row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        cols = (tile % class_blocks).to(tl.int64) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
        row_mask = rows < tl.where(tile < n_tiles, n_rows, 0)

        upstream_ptrs = upstream_ptr + group * upstream_stride_group + rows * upstream_stride_row
        upstream = tl.load(upstream_ptrs, mask=row_mask, other=1.0)
        n_changed = tl.sum((upstream != 1.0).to(tl.int32))
        if (n_changed > 0) or not IN_PLACE:
            offs = _tile_ptrs(group * grad_stride_group + rows * grad_stride_row, cols, grad_stride_class)
            mask = _tile_mask(row_mask, cols, n_classes)
            grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(upstream.dtype)
            # 0 stays 0, also where it is an ignored sample's and its upstream gradient is infinite.
            out = tl.where(grad == 0, 0.0, upstream[:, None] * grad)
            tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
