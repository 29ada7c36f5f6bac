"""Loss and gradient where several classes have a share of a sample: probabilities, or indices with label smoothing.

Shapes and words are those of index.py. A *share* is what multiplies the loss that the sample would have if a class were
its target: the class's probability, times its weight. The steps are the same, but there are two of *summarise* and
*combine*: of the logits, which gives the classes' probabilities; and of the classes' losses, which needs those. So a
row that is looped over is read three times; any other once, and its classes stay in registers.

There is no kernel for backward alone: it would read as much as this one, and compute no less.
"""

import triton
import triton.language as tl

from ..expectation import (
    Source,
    add_block,
    add_sums,
    combine_lanes,
    factor_of,
    load_classes,
    n_softmaxes,
    no_lanes,
    no_sums,
    rank_block,
    ranking_at,
    softmax_of,
    store_gradient,
    sums_of_block,
    terms_and_coefs,
)
from ..rows import (
    denominators_of_samples,
    load_denominators,
    load_rows,
    load_weight,
    ptrs_of,
    rows_of_probabilities,
    sum_of_rows,
    vector_of,
)


@triton.jit
def expectation_kernel(
    logits_ptr, logits_stride_group, logits_stride_row, logits_stride_class,  # (group, row, class)
    # (group, row, class), any floating type: probabilities; or (group, row), any integer type: class indices.
    target_ptr, target_stride_group, target_stride_row, target_stride_class,
    margins_ptr,  # (class) or None
    weight_ptr,  # (class) or None
    adjustment_ptr,  # (class) or None
    totals_ptr,  # (2, N_TOTALS), as of forward_kernel in index.py
    upstream_ptr, upstream_stride_group, upstream_stride_row,  # (group, row), strides 0 for a scalar; or None for 1
    loss_ptr, loss_stride_group, loss_stride_row,  # (group, row), or (program): the sum of its rows; None: not now
    grad_ptr, grad_stride_group, grad_stride_row, grad_stride_class,  # (group, row, class); None: not now
    alpha,
    beta,
    gamma,
    scale,
    kept,  # what label smoothing leaves of a target: 1 - label_smoothing
    spread,  # what it gives to each class: label_smoothing / n_classes
    ignore_index,
    n_samples,  # of all launches
    n_rows,
    n_classes,  # this and the strides of groups and rows of tensors with classes in units of ALIGN elements
    FORM: tl.constexpr,
    RULE: tl.constexpr,
    N_TOTALS: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    CLASS_TILES: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    CLASS_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Loss of BLOCK_ROWS rows, and their gradient times the upstream gradient."""
    HAS_PROBABILITIES: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    VECTOR: tl.constexpr = vector_of(logits_ptr, ALIGN)
    TILE: tl.constexpr = BLOCK_CLASSES // CLASS_TILES
    dtype: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    n_classes = BLOCK_CLASSES if WHOLE_TILES == CLASS_TILES else ALIGN * n_classes
    if HAS_PROBABILITIES:
        rows = rows_of_probabilities(program, n_rows, ONE_GROUP, BLOCK_ROWS)
        target_rows = ptrs_of(rows, target_ptr, target_stride_group, target_stride_row, ALIGN)
    else:
        rows = load_rows(
            program, target_ptr, target_stride_group, target_stride_row, n_rows, n_classes, ignore_index, ONE_GROUP,
            BLOCK_ROWS,
        )  # fmt: skip
        target_rows = target_ptr
    source = Source(
        ptrs_of(rows, logits_ptr, logits_stride_group, logits_stride_row, ALIGN), logits_stride_class, target_rows,
        target_stride_class, margins_ptr, weight_ptr, adjustment_ptr,
    )  # fmt: skip

    if HAS_PROBABILITIES and totals_ptr is None:
        denominators = denominators_of_samples(n_samples, dtype, RULE)
    else:
        weight = load_weight(weight_ptr, rows.target, rows.kept, dtype)
        denominators = load_denominators(totals_ptr, weight, rows.kept, N_TOTALS, RULE)
    # Of the terms' slopes. LDAM's own softmax is of scale * x, so that its gradient has this factor.
    ldam_share = (scale if FORM.scaled else 1.0) * (alpha / denominators.ldam)
    focal_share = beta / denominators.focal

    # Summarise and combine the logits.
    softmaxes = ()
    if CLASS_BLOCKS == 1:
        block = load_classes(
            source, rows, 0, n_classes, scale, kept, spread, dtype, FORM, BLOCK_CLASSES, CLASS_TILES,
            WHOLE_TILES, VECTOR, EVICTION="",
        )  # fmt: skip
        for i in tl.static_range(n_softmaxes(FORM)):
            factor = factor_of(source, scale, dtype, FORM, i)
            softmaxes = softmaxes + (softmax_of(rank_block(block.logits[i], factor), factor),)
    else:
        lanes = no_lanes(FORM, [BLOCK_ROWS, TILE], dtype)
        for k in range(CLASS_BLOCKS):
            block = load_classes(
                source, rows, k * BLOCK_CLASSES, n_classes, scale, kept, spread, dtype, FORM,
                BLOCK_CLASSES, CLASS_TILES, WHOLE_TILES, VECTOR, EVICTION="evict_last",
            )  # fmt: skip
            lanes = add_block(lanes, source, block, scale, dtype, FORM)
        for i in tl.static_range(n_softmaxes(FORM)):
            factor = factor_of(source, scale, dtype, FORM, i)
            softmaxes = softmaxes + (softmax_of(combine_lanes(ranking_at(lanes, i), factor), factor),)

    # Summarise and combine the classes' losses.
    if CLASS_BLOCKS == 1:
        sums, slopes = sums_of_block(block, softmaxes, source, ldam_share, focal_share, gamma, scale, dtype, FORM)
    else:
        sums = no_sums(FORM, [BLOCK_ROWS, TILE], dtype)
        for k in range(CLASS_BLOCKS):
            # Backwards: the blocks read last are the likeliest to be in cache still.
            block = load_classes(
                source, rows, (CLASS_BLOCKS - 1 - k) * BLOCK_CLASSES, n_classes, scale, kept, spread, dtype,
                FORM, BLOCK_CLASSES, CLASS_TILES, WHOLE_TILES, VECTOR, EVICTION="evict_last",
            )  # fmt: skip
            more, _ = sums_of_block(block, softmaxes, source, ldam_share, focal_share, gamma, scale, dtype, FORM)
            sums = add_sums(sums, more)

    # Loss and coefficients.
    terms, coefs = terms_and_coefs(
        sums, softmaxes, rows, alpha, beta, ldam_share, focal_share, gamma, dtype, FORM
    )  # fmt: skip
    if loss_ptr is not None:
        if RULE.per_sample:
            losses = terms.ldam + terms.focal
            tl.store(ptrs_of(rows, loss_ptr, loss_stride_group, loss_stride_row), losses, mask=rows.exists)
        else:
            tl.store(loss_ptr + program, sum_of_rows(terms, denominators, FORM, RULE))

    # Gradient.
    if grad_ptr is not None:
        grad_rows = ptrs_of(rows, grad_ptr, grad_stride_group, grad_stride_row, ALIGN)
        upstream = None
        if upstream_ptr is not None:
            upstream_ptrs = ptrs_of(rows, upstream_ptr, upstream_stride_group, upstream_stride_row)
            upstream = tl.load(upstream_ptrs, mask=rows.exists, other=0.0).to(dtype)
        if CLASS_BLOCKS == 1:
            store_gradient(
                grad_rows, 0, grad_stride_class, rows, n_classes, block, slopes, softmaxes, coefs, upstream, source,
                scale, dtype, FORM, WHOLE_TILES, EVICTION="",
            )  # fmt: skip
        else:
            for k in range(CLASS_BLOCKS):
                block = load_classes(
                    source, rows, k * BLOCK_CLASSES, n_classes, scale, kept, spread, dtype, FORM,
                    BLOCK_CLASSES, CLASS_TILES, WHOLE_TILES, VECTOR, EVICTION="evict_first",
                )  # fmt: skip
                _, slopes = sums_of_block(
                    block, softmaxes, source, ldam_share, focal_share, gamma, scale, dtype, FORM
                )  # fmt: skip
                store_gradient(
                    grad_rows, k * BLOCK_CLASSES, grad_stride_class, rows, n_classes, block, slopes, softmaxes, coefs,
                    upstream, source, scale, dtype, FORM, WHOLE_TILES, EVICTION="evict_first",
                )  # fmt: skip
