"""Kernels around the loss, which need no summary of a row. Words and shapes are those of index.py."""

import triton
import triton.language as tl

from ..rows import load_target, load_weight, tile_mask, tile_ptrs


@triton.jit
def totals_kernel(
    target_ptr, target_stride_group, target_stride_row,  # (group, row), any integer type
    weight_ptr,  # (class) or None
    totals_ptr,  # (2, program): sum of weights, number of samples
    ignore_index,
    n_samples,
    n_rows,
    n_classes,
    ONE_GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Each program's partial sums of the weights and of the number of samples that take part."""
    dtype: tl.constexpr = totals_ptr.dtype.element_ty
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    weight_total = tl.zeros([BLOCK_ROWS], dtype)
    count = tl.zeros([BLOCK_ROWS], dtype)
    for step in range(STEPS):
        samples = (step * n_programs + program).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        if ONE_GROUP:
            offs = samples * target_stride_row
        else:
            offs = (samples // n_rows) * target_stride_group + (samples % n_rows) * target_stride_row
        target, kept, _ = load_target(target_ptr + offs, samples < n_samples, n_classes, ignore_index)
        weight_total += load_weight(weight_ptr, target, kept, dtype)
        count += kept.to(dtype)
    tl.store(totals_ptr + program, tl.sum(weight_total))
    tl.store(totals_ptr + n_programs + program, tl.sum(count))


@triton.jit
def upstream_kernel(
    grad_ptr, grad_stride_group, grad_stride_row, grad_stride_class,  # (group, row, class)
    upstream_ptr, upstream_stride_group, upstream_stride_row,  # (group, row), strides 0 for a scalar
    out_ptr,  # (group, row, class), strides of grad_ptr
    n_tiles,
    n_rows,
    n_classes,  # this and the strides of groups and rows of the gradient in units of ALIGN elements
    IN_PLACE: tl.constexpr,  # out_ptr is grad_ptr
    ALIGN: tl.constexpr,  # a power of two: what the compiler may rely on to move several classes at once
    STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """out = upstream * grad. In place, a tile whose upstream gradients are all exactly 1 is not touched.

    A program takes STEPS tiles: where nothing is to be done, starting one for each would be what costs.
    """
    n_classes = ALIGN * n_classes
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
            row_offs = ALIGN * (group * grad_stride_group + rows * grad_stride_row)
            offs = tile_ptrs(row_offs, cols, grad_stride_class)
            mask = tile_mask(row_mask, cols, n_classes)
            grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(upstream.dtype)
            # 0 stays 0, also where it is an ignored sample's and its upstream gradient is infinite.
            out = tl.where(grad == 0, 0.0, upstream[:, None] * grad)
            tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
