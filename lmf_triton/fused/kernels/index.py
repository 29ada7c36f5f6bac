"""Loss and gradient for targets that are class indices, in one pass over the logits.

Every kernel sees the logits as ``(group, row, class)``. A row is one sample; rows that lie a constant stride apart
form a group. For ``(N, C)`` there is one group of N rows; for contiguous ``(N, C, H, W)`` a group is an image and its
rows are the pixels, which are neighbours in memory.

The work on a row is four steps. *Summarise*: read its classes; *combine*: their summaries make that of the row; *loss
and coefficients*: a few numbers a row; *gradient*: for each class, from its logit and the row's coefficients. A row may
be one tile in registers, a loop over tiles, or, where rows are few and long, shared by programs that summarise a part
each; the steps are the same.

Words: *others*, the classes other than the target; *gap*, from the target's logit to the logsumexp of the others;
*plain* and *scaled*, what belongs to exp(x) and to exp(scale * x); *slope*, the derivative of a term in its gap;
*coefs*, the coefficients of a row's gradient; *tile*, ``[BLOCK_ROWS, BLOCK_CLASSES]`` of one group; *part*, the classes
of one program of summarise_kernel; *totals*, sum of weights and number of samples, which *denominators* are made of.
FORM and RULE, which are constexprs, say what terms and what reduction a kernel is compiled for (rows.py, reduction.py).

Loops run to a compile-time bound: a power of two or a number of class blocks, so that few variants are compiled.
"""

import triton
import triton.language as tl

from ..rows import (
    N_COEFS,
    coefs_of,
    combine,
    gradient,
    load_coefs,
    load_denominators,
    load_others,
    load_rows,
    load_summaries,
    load_weight,
    offsets,
    redistribute_coefs,
    redistribute_summary,
    store_coefs,
    store_gradient,
    store_summary,
    sum_of_rows,
    summarise_loop,
    summarise_tile,
    terms_and_slopes,
)


@triton.jit
def summarise_kernel(
    logits_ptr, logits_stride_row, logits_stride_class,  # (row, class)
    target_ptr, target_stride_row,  # (row), any integer type
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
    CLASS_BLOCKS: tl.constexpr,  # of one part
):  # fmt: skip
    """The first step alone, for a part of the classes, where there are too few rows to fill the device."""
    dtype: tl.constexpr = summaries_ptr.dtype.element_ty
    n_classes = ALIGN * n_classes
    part = tl.program_id(0) % n_parts
    block = tl.program_id(0) // n_parts
    rows = load_rows(block, target_ptr, 0, target_stride_row, n_rows, n_classes, ignore_index, BLOCK_ROWS)
    row_ptrs = logits_ptr + ALIGN * offsets(rows, 0, logits_stride_row)
    lanes = summarise_loop(
        row_ptrs, logits_stride_class, part * CLASS_BLOCKS, rows, n_classes, scale, dtype, FORM, BLOCK_ROWS,
        BLOCK_CLASSES, CLASS_BLOCKS,
    )  # fmt: skip
    store_summary(summaries_ptr, combine(lanes, scale, FORM), part, rows, n_rows, n_parts)


@triton.jit
def forward_kernel(
    logits_ptr, logits_stride_group, logits_stride_row, logits_stride_class,  # (group, row, class)
    target_ptr, target_stride_group, target_stride_row,  # (group, row), any integer type
    margins_ptr,  # (class) or None
    weight_ptr,  # (class) or None
    totals_ptr,  # (2, N_TOTALS) from totals_kernel; None: no mean, or this one tile holds all rows
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,  # classes of a tile; with summaries, the parts of a row
    CLASS_BLOCKS: tl.constexpr,  # 1: the tile stays in registers between loss and gradient
):  # fmt: skip
    """Loss of BLOCK_ROWS rows, with their gradient or the coefficients from which backward_kernel computes it."""
    dtype: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    n_classes = ALIGN * n_classes
    rows = load_rows(
        program, target_ptr, target_stride_group, target_stride_row, n_rows, n_classes, ignore_index, BLOCK_ROWS
    )
    row_ptrs = logits_ptr + ALIGN * offsets(rows, logits_stride_group, logits_stride_row)
    x_y = tl.load(row_ptrs + rows.target.to(tl.int64) * logits_stride_class, mask=rows.kept, other=0.0).to(dtype)
    offs_c = tl.arange(0, BLOCK_CLASSES)

    # Summarise.
    if summaries_ptr is not None:
        parts = load_summaries(summaries_ptr, rows, n_rows, n_parts, BLOCK_CLASSES)
    elif CLASS_BLOCKS == 1:
        others = load_others(row_ptrs, offs_c, logits_stride_class, rows, n_classes, dtype, EVICTION="")
        parts = summarise_tile(others, FORM)
    else:
        parts = summarise_loop(
            row_ptrs, logits_stride_class, 0, rows, n_classes, scale, dtype, FORM, BLOCK_ROWS, BLOCK_CLASSES,
            CLASS_BLOCKS,
        )  # fmt: skip

    # Combine.
    combined = combine(parts, scale, FORM)
    summary = redistribute_summary(combined, BLOCK_ROWS)

    # Loss and coefficients.
    weight = load_weight(weight_ptr, rows.target, rows.kept, dtype)
    denominators = load_denominators(totals_ptr, weight, rows.kept, N_TOTALS, RULE)
    terms = terms_and_slopes(summary, x_y, margins_ptr, rows, weight, denominators, alpha, beta, gamma, scale, FORM)
    coefs = coefs_of(summary, terms, scale, FORM)
    if RULE.per_sample:
        tl.store(loss_ptr + offsets(rows, out_stride_group, out_stride_row), terms.ldam + terms.focal, mask=rows.exists)
    else:
        tl.store(loss_ptr + program, sum_of_rows(terms, denominators, FORM, RULE))
    if coefs_ptr is not None:
        store_coefs(coefs_ptr + N_COEFS * offsets(rows, out_stride_group, out_stride_row), coefs, rows.exists)

    # Gradient.
    if grad_ptr is not None:
        coefs = redistribute_coefs(coefs, combined.max, BLOCK_ROWS)
        grad_rows = grad_ptr + ALIGN * offsets(rows, grad_stride_group, grad_stride_row)
        if CLASS_BLOCKS == 1:
            grad = gradient(others, offs_c, rows.target, coefs, scale, FORM)
            store_gradient(grad_rows, offs_c, grad_stride_class, rows.exists, n_classes, grad, EVICTION="")
        else:
            # Backwards: the blocks read last are the likeliest to be in cache still.
            for block in range(CLASS_BLOCKS):
                cols = (CLASS_BLOCKS - 1 - block) * BLOCK_CLASSES + offs_c
                again = load_others(row_ptrs, cols, logits_stride_class, rows, n_classes, dtype, EVICTION="evict_first")
                grad = gradient(again, cols, rows.target, coefs, scale, FORM)
                store_gradient(grad_rows, cols, grad_stride_class, rows.exists, n_classes, grad, EVICTION="evict_first")


@triton.jit
def backward_kernel(
    logits_ptr, logits_stride_group, logits_stride_row, logits_stride_class,  # (group, row, class)
    target_ptr, target_stride_group, target_stride_row,  # (group, row), any integer type
    coefs_ptr, coefs_stride_group, coefs_stride_row,  # (group, row, N_COEFS) from forward_kernel
    upstream_ptr, upstream_stride_group, upstream_stride_row,  # (group, row), strides 0 for a scalar; or None for 1
    grad_ptr, grad_stride_group, grad_stride_row, grad_stride_class,  # (group, row, class)
    scale,
    ignore_index,
    n_rows,
    n_classes,  # this and the strides of groups and rows of logits and gradient in units of ALIGN elements
    FORM: tl.constexpr,
    ALIGN: tl.constexpr,  # a power of two: what the compiler may rely on to load several classes at once
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The last step alone: the gradient of one tile from each row's coefficients, times the upstream gradient."""
    dtype: tl.constexpr = coefs_ptr.dtype.element_ty
    n_classes = ALIGN * n_classes
    class_blocks = tl.cdiv(n_classes, BLOCK_CLASSES)
    program = tl.program_id(0)
    offs_c = (program % class_blocks).to(tl.int64) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    rows = load_rows(
        program // class_blocks, target_ptr, target_stride_group, target_stride_row, n_rows, n_classes, ignore_index,
        BLOCK_ROWS,
    )  # fmt: skip

    active = rows.kept | rows.out_of_range
    upstream = active.to(dtype)
    if upstream_ptr is not None:
        upstream_ptrs = upstream_ptr + offsets(rows, upstream_stride_group, upstream_stride_row)
        upstream = tl.load(upstream_ptrs, mask=active, other=0.0).to(dtype)
    coefs = load_coefs(coefs_ptr + offsets(rows, coefs_stride_group, coefs_stride_row), upstream, rows.exists)

    row_ptrs = logits_ptr + ALIGN * offsets(rows, logits_stride_group, logits_stride_row)
    others = load_others(row_ptrs, offs_c, logits_stride_class, rows, n_classes, dtype, EVICTION="")
    grad = gradient(others, offs_c, rows.target, coefs, scale, FORM)
    grad_rows = grad_ptr + ALIGN * offsets(rows, grad_stride_group, grad_stride_row)
    store_gradient(grad_rows, offs_c, grad_stride_class, rows.exists, n_classes, grad, EVICTION="")
