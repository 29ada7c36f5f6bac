"""Loss and gradient for targets that are class indices, in one pass over the logits.

Every kernel sees the logits as ``(group, row, class)``. A row is one sample; rows that lie a constant stride apart
form a group. For ``(N, C)`` there is one group of N rows; for contiguous ``(N, C, H, W)`` a group is an image and its
rows are the pixels, which are neighbours in memory.

The work on a row is four steps. *Summarise*: read its classes; *combine*: their summaries make that of the row; *loss
and coefficients*: a few numbers a row; *gradient*: for each class, from its logit and the row's coefficients. A row may
stay in registers, those of one multiprocessor or of a cluster; be looped over; or, where rows are few and long, be
shared by programs that summarise a part each. The steps are the same.

Words: *others*, the classes other than the target; *gap*, from the target's logit to the logsumexp of the others;
*plain* and *scaled*, what belongs to exp(x) and to exp(scale * x); *slope*, the derivative of a term in its gap;
*coefs*, the coefficients of a row's gradient; *tile*, a power of two of rows by a power of two of classes; *block*, the
tiles side by side that a program holds at a time, ``[BLOCK_ROWS, BLOCK_CLASSES]`` of one group; *lane*, an element of a
tile, with what passes through it of all blocks; *part*, the classes of one program of summarise_kernel; *totals*, sum
of weights and number of samples, which *denominators* are made of. FORM and RULE, which are constexprs, say what terms
and what reduction a kernel is compiled for (rows.py, reduction.py).

Loops run to a compile-time bound: a power of two or a number of class blocks, so that few variants are compiled.
"""

import triton
import triton.language as tl

from ..rows import (
    N_COEFS,
    coefs_of,
    combine,
    load_block,
    load_coefs,
    load_denominators,
    load_rows,
    load_summaries,
    load_target_logit,
    load_weight,
    of_kept,
    ptrs_of,
    redistribute_coefs,
    redistribute_summary,
    shares_of,
    store_coefs,
    store_gradient,
    store_summary,
    sum_of_rows,
    summarise_block,
    summarise_loop,
    terms_and_slopes,
    vector_of,
)


@triton.jit
def summarise_kernel(
    logits_ptr, logits_stride_row, logits_stride_class,  # (row, class)
    target_ptr, target_stride_row,  # (row), any integer type
    adjustment_ptr,  # (class) or None: added to the logits
    summaries_ptr,  # (3, row, part): the fields of a Summary
    scale,
    ignore_index,
    n_rows,
    n_classes,  # this and the strides of rows of logits in units of ALIGN elements
    n_parts,  # of each row
    FORM: tl.constexpr,
    ALIGN: tl.constexpr,  # a power of two: what the compiler may rely on to load several classes at once
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    CLASS_TILES: tl.constexpr,
    CLASS_BLOCKS: tl.constexpr,  # of one part
):  # fmt: skip
    """The first step alone, for a part of the classes, where there are too few rows to fill the device."""
    dtype: tl.constexpr = summaries_ptr.dtype.element_ty
    n_classes = ALIGN * n_classes
    part = tl.program_id(0) % n_parts
    block = tl.program_id(0) // n_parts
    rows = load_rows(block, target_ptr, 0, target_stride_row, n_rows, n_classes, ignore_index, True, BLOCK_ROWS)
    row_ptrs = ptrs_of(rows, logits_ptr, 0, logits_stride_row, ALIGN)
    lanes = summarise_loop(
        row_ptrs, logits_stride_class, adjustment_ptr, part * CLASS_BLOCKS, rows, n_classes, scale, dtype, FORM,
        BLOCK_CLASSES, CLASS_TILES, CLASS_BLOCKS, vector_of(logits_ptr, ALIGN),
    )  # fmt: skip
    summary = of_kept(combine(lanes, scale, FORM), rows.kept)
    store_summary(summaries_ptr, summary, part, rows, n_rows, n_parts)


@triton.jit
def forward_kernel(
    logits_ptr, logits_stride_group, logits_stride_row, logits_stride_class,  # (group, row, class)
    target_ptr, target_stride_group, target_stride_row,  # (group, row), any integer type
    margins_ptr,  # (class) or None
    weight_ptr,  # (class) or None
    adjustment_ptr,  # (class) or None: added to the logits
    totals_ptr,  # (2, N_TOTALS) from totals_kernel, or given; None: no mean, or this one tile holds all rows
    summaries_ptr,  # (3, row, part) from summarise_kernel, in the one tile that combines them; or None
    loss_ptr,  # (group, row) if nothing is reduced, otherwise (program): the sum of its rows
    coefs_ptr, out_stride_group, out_stride_row,  # (group, row, N_COEFS) or None; the strides of loss_ptr too
    grad_ptr, grad_stride_group, grad_stride_row, grad_stride_class,  # (group, row, class); None: not now, or summaries
    alpha,
    beta,
    gamma,
    scale,
    ignore_index,
    n_rows,
    n_classes,  # this and the strides of groups and rows of logits and gradient in units of ALIGN elements
    n_parts,  # of each row, with summaries
    FORM: tl.constexpr,  # which terms, and which exponentials they need
    RULE: tl.constexpr,  # of the reduction
    N_TOTALS: tl.constexpr,
    ALIGN: tl.constexpr,  # a power of two: what the compiler may rely on to load several classes at once
    ONE_GROUP: tl.constexpr,  # no division for the group
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,  # with summaries, the parts of a row
    CLASS_TILES: tl.constexpr,  # of a block
    WHOLE_TILES: tl.constexpr,  # of these, the first so many have no padding
    CLASS_BLOCKS: tl.constexpr,  # 1: the block stays in registers between loss and gradient
):  # fmt: skip
    """Loss of BLOCK_ROWS rows, with their gradient or the coefficients from which backward_kernel computes it."""
    VECTOR: tl.constexpr = vector_of(logits_ptr, ALIGN)
    dtype: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    n_classes = BLOCK_CLASSES if WHOLE_TILES == CLASS_TILES else ALIGN * n_classes
    rows = load_rows(
        program, target_ptr, target_stride_group, target_stride_row, n_rows, n_classes, ignore_index, ONE_GROUP,
        BLOCK_ROWS,
    )  # fmt: skip
    row_ptrs = ptrs_of(rows, logits_ptr, logits_stride_group, logits_stride_row, ALIGN)
    x_y = load_target_logit(row_ptrs, logits_stride_class, adjustment_ptr, rows, dtype)

    # Summarise.
    if summaries_ptr is not None:
        parts = load_summaries(summaries_ptr, rows, n_rows, n_parts, BLOCK_CLASSES)
    elif CLASS_BLOCKS == 1:
        others = load_block(
            row_ptrs, 0, logits_stride_class, adjustment_ptr, rows, n_classes, dtype, BLOCK_CLASSES, CLASS_TILES,
            WHOLE_TILES, VECTOR, EVICTION="",
        )  # fmt: skip
        parts = summarise_block(others, FORM)
    else:
        parts = summarise_loop(
            row_ptrs, logits_stride_class, adjustment_ptr, 0, rows, n_classes, scale, dtype, FORM, BLOCK_CLASSES,
            CLASS_TILES, CLASS_BLOCKS, VECTOR,
        )  # fmt: skip

    # Combine.
    combined = combine(parts, scale, FORM)
    summary = redistribute_summary(of_kept(combined, rows.kept), BLOCK_ROWS)

    # Loss and coefficients.
    weight = load_weight(weight_ptr, rows.target, rows.kept, dtype)
    denominators = load_denominators(totals_ptr, weight, rows.kept, N_TOTALS, RULE)
    shares = shares_of(weight_ptr, weight, rows.kept, denominators)
    terms = terms_and_slopes(summary, x_y, margins_ptr, rows, weight, shares, alpha, beta, gamma, scale, FORM)
    coefs = coefs_of(summary, terms, scale, FORM)
    if RULE.per_sample:
        tl.store(ptrs_of(rows, loss_ptr, out_stride_group, out_stride_row), terms.ldam + terms.focal, mask=rows.exists)
    else:
        tl.store(loss_ptr + program, sum_of_rows(terms, denominators, FORM, RULE))
    if coefs_ptr is not None:
        store_coefs(ptrs_of(rows, coefs_ptr, out_stride_group, out_stride_row, N_COEFS), coefs, rows.exists)

    # Gradient.
    if grad_ptr is not None:
        coefs = redistribute_coefs(coefs, combined.max, BLOCK_ROWS)
        grad_rows = ptrs_of(rows, grad_ptr, grad_stride_group, grad_stride_row, ALIGN)
        if CLASS_BLOCKS == 1:
            store_gradient(
                grad_rows, 0, grad_stride_class, rows, n_classes, others, coefs, scale, FORM, WHOLE_TILES, VECTOR,
                EVICTION="",
            )  # fmt: skip
        else:
            # Backwards: the blocks read last are the likeliest to be in cache still.
            for block in range(CLASS_BLOCKS):
                first_class = (CLASS_BLOCKS - 1 - block) * BLOCK_CLASSES
                again = load_block(
                    row_ptrs, first_class, logits_stride_class, adjustment_ptr, rows, n_classes, dtype, BLOCK_CLASSES,
                    CLASS_TILES, WHOLE_TILES=0, VECTOR=VECTOR, EVICTION="evict_first",
                )  # fmt: skip
                store_gradient(
                    grad_rows, first_class, grad_stride_class, rows, n_classes, again, coefs, scale, FORM,
                    WHOLE_TILES=0, VECTOR=VECTOR, EVICTION="evict_first",
                )  # fmt: skip


@triton.jit
def backward_kernel(
    logits_ptr, logits_stride_group, logits_stride_row, logits_stride_class,  # (group, row, class)
    target_ptr, target_stride_group, target_stride_row,  # (group, row), any integer type
    adjustment_ptr,  # (class) or None: added to the logits
    coefs_ptr, coefs_stride_group, coefs_stride_row,  # (group, row, N_COEFS) from forward_kernel
    upstream_ptr, upstream_stride_group, upstream_stride_row,  # (group, row), strides 0 for a scalar; or None for 1
    grad_ptr, grad_stride_group, grad_stride_row, grad_stride_class,  # (group, row, class)
    scale,
    ignore_index,
    n_rows,
    n_classes,  # this and the strides of groups and rows of logits and gradient in units of ALIGN elements
    FORM: tl.constexpr,
    ALIGN: tl.constexpr,  # a power of two: what the compiler may rely on to load several classes at once
    ONE_GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The last step alone: the gradient of one tile from each row's coefficients, times the upstream gradient."""
    VECTOR: tl.constexpr = vector_of(logits_ptr, ALIGN)
    dtype: tl.constexpr = coefs_ptr.dtype.element_ty
    n_classes = ALIGN * n_classes
    class_blocks = tl.cdiv(n_classes, BLOCK_CLASSES)
    program = tl.program_id(0)
    first_class = program % class_blocks * BLOCK_CLASSES
    rows = load_rows(
        program // class_blocks, target_ptr, target_stride_group, target_stride_row, n_rows, n_classes, ignore_index,
        ONE_GROUP, BLOCK_ROWS,
    )  # fmt: skip

    active = rows.kept | rows.out_of_range
    upstream = active.to(dtype)
    if upstream_ptr is not None:
        upstream_ptrs = ptrs_of(rows, upstream_ptr, upstream_stride_group, upstream_stride_row)
        upstream = tl.load(upstream_ptrs, mask=active, other=0.0).to(dtype)
    coefs = load_coefs(ptrs_of(rows, coefs_ptr, coefs_stride_group, coefs_stride_row), upstream, rows.exists)

    row_ptrs = ptrs_of(rows, logits_ptr, logits_stride_group, logits_stride_row, ALIGN)
    others = load_block(
        row_ptrs, first_class, logits_stride_class, adjustment_ptr, rows, n_classes, dtype, BLOCK_CLASSES,
        CLASS_TILES=1, WHOLE_TILES=0, VECTOR=VECTOR, EVICTION="",
    )  # fmt: skip
    grad_rows = ptrs_of(rows, grad_ptr, grad_stride_group, grad_stride_row, ALIGN)
    store_gradient(
        grad_rows, first_class, grad_stride_class, rows, n_classes, others, coefs, scale, FORM, WHOLE_TILES=0,
        VECTOR=VECTOR, EVICTION="",
    )  # fmt: skip
