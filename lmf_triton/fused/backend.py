"""The loss by Triton kernels: allocation and launches. plain.py is its counterpart with the same three functions."""

import contextlib
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..options import LossOptions
from ..shapes import arithmetic_dtype, class_axis
from . import launch
from .kernels import elementwise, index
from .layout import RowLayout, contiguous_strides, row_layout

# True under TRITON_INTERPRET=1: the kernels then run on CPU tensors.
INTERPRETED = not isinstance(index.forward_kernel, triton.JITFunction)

# Triton 3.10 is to change the default of this one. Results are within the tests' bounds either way.
COMPILER_OPTIONS = {"enable_fp_fusion": True}

N_COEFS = 4  # floats a row from which backward_kernel recomputes the gradient


def forward(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    *,
    with_grad: bool,
    with_saved: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """The loss and, where asked for, its gradient, and the tensors from which :func:`backward` computes it."""
    checks.check_readable(logits=logits, target=target, margins=margins, weight=weight)
    dtype = arithmetic_dtype(logits)
    per_row = options.reduction == "none"
    grad = torch.empty_like(logits) if with_grad else None
    coefs = logits.new_empty((*target.shape, N_COEFS), dtype=dtype) if with_saved else None
    saved = (logits, target, coefs) if with_saved else None
    if target.numel() == 0:
        empty_value = float("nan") if options.is_mean else 0.0
        return logits.new_full(target.shape if per_row else (), empty_value, dtype=dtype), grad, saved

    margins, weight = (t if t is None else t.contiguous() for t in (margins, weight))  # (C,): a copy costs nothing
    n_classes, class_stride, row_strides = _axes(logits)
    _, grad_class_stride, grad_row_strides = _axes(logits if grad is None else grad)
    # Where nothing is written per row, the logits' strides stand in: they keep no dimensions apart.
    out_strides = contiguous_strides(target.shape) if per_row or with_saved else row_strides
    layout = row_layout(target.shape, row_strides, target.stride(), out_strides, grad_row_strides)
    logits_strides, target_strides, out_strides, grad_row_strides = layout.strides
    align = launch.alignment(n_classes, *logits_strides, *grad_row_strides)
    config = launch.forward_config(
        layout.n_groups,
        layout.n_rows,
        n_classes,
        dtype.itemsize,
        class_contiguous=class_stride == 1,
        two_exponentials=options.needs_plain and options.needs_scaled,
        n_multiprocessors=_n_multiprocessors(logits.device),
    )
    statistics = None
    if config.class_splits > 1:
        if with_grad:
            loss, _, saved = forward(logits, target, margins, weight, options, with_grad=False, with_saved=True)
            _fill_gradient(grad, saved, None, options)
            return loss, grad, None
        statistics = _statistics(logits, target, options, layout, config, align)
        config = launch.combine_config(config, layout.n_rows)
    class_blocks = 1 if statistics is not None else -(-n_classes // config.block_classes)
    n_programs = config.n_programs(layout.n_groups, layout.n_rows)
    n_partials = n_programs * len(layout.offsets)

    with _device_of(logits):
        totals = None
        if options.is_mean and n_partials > 1:
            totals = _totals(target, weight, n_classes, options.ignore_index, dtype)
        loss = logits.new_empty(target.shape if per_row else () if n_partials == 1 else n_partials, dtype=dtype)
        for i, (logits_at, target_at, out_at, grad_at) in enumerate(layout.offsets):
            index.forward_kernel[(n_programs,)](
                _from(logits, logits_at),
                _from(target, target_at),
                margins,
                weight,
                totals,
                statistics,
                _from(loss, out_at if per_row else i * n_programs),
                _from(grad, grad_at),
                _from(coefs, N_COEFS * out_at),
                *_float_arguments((options.alpha, options.beta, options.gamma, options.scale), dtype),
                options.ignore_index,
                layout.n_rows,
                n_classes // align,
                *(stride // align for stride in logits_strides),
                class_stride,
                *target_strides,
                *out_strides,
                *(stride // align for stride in grad_row_strides),
                grad_class_stride,
                HAS_LDAM=options.has_ldam,
                HAS_FOCAL=options.has_focal,
                UNIT_SCALE=options.scale == 1,
                REDUCTION=options.reduction,
                N_TOTALS=1 if totals is None else totals.shape[1],
                ALIGN=align,
                BLOCK_ROWS=config.block_rows,
                BLOCK_CLASSES=config.block_classes,
                CLASS_BLOCKS=class_blocks,
                num_warps=config.num_warps,
                **COMPILER_OPTIONS,
            )
        if not per_row and n_partials > 1:
            loss = loss.sum()
    return loss, grad, saved


def backward(saved: tuple[Tensor, ...], upstream: Tensor, options: LossOptions) -> Tensor:
    """The gradient of the logits, recomputed from what :func:`forward` saved."""
    grad = torch.empty_like(saved[0])
    if grad.numel() > 0:
        _fill_gradient(grad, saved, upstream, options)
    return grad


def _fill_gradient(grad: Tensor, saved: tuple[Tensor, ...], upstream: Tensor | None, options: LossOptions) -> None:
    """Write the gradient of the logits, times ``upstream`` if given."""
    checks.check_readable(upstream=upstream)
    logits, target, coefs = saved
    n_classes, class_stride, row_strides = _axes(logits)
    _, grad_class_stride, grad_row_strides = _axes(grad)
    layout = row_layout(
        target.shape,
        row_strides,
        target.stride(),
        coefs.stride()[:-1],
        _row_strides(upstream, target),
        grad_row_strides,
    )
    logits_strides, target_strides, coefs_strides, upstream_strides, grad_row_strides = layout.strides
    align = launch.alignment(n_classes, *logits_strides, *grad_row_strides)
    config = launch.elementwise_config(layout.n_rows, n_classes, coefs.dtype.itemsize)
    with _device_of(logits):
        for logits_at, target_at, coefs_at, upstream_at, grad_at in layout.offsets:
            index.backward_kernel[(config.n_programs(layout.n_groups, layout.n_rows, n_classes),)](
                _from(logits, logits_at),
                _from(target, target_at),
                _from(coefs, coefs_at),
                _from(upstream, upstream_at),
                _from(grad, grad_at),
                *_float_arguments((options.scale,), coefs.dtype),
                options.ignore_index,
                layout.n_rows,
                n_classes // align,
                *(stride // align for stride in logits_strides),
                class_stride,
                *target_strides,
                *coefs_strides,
                *upstream_strides,
                *(stride // align for stride in grad_row_strides),
                grad_class_stride,
                PLAIN=options.needs_plain,
                SCALED=options.needs_scaled,
                ALIGN=align,
                BLOCK_ROWS=config.block_rows,
                BLOCK_CLASSES=config.block_classes,
                num_warps=config.num_warps,
                **COMPILER_OPTIONS,
            )


def apply_upstream(grad: Tensor, upstream: Tensor, *, in_place: bool) -> Tensor:
    """``upstream * grad``, rounded once; in place, nothing is moved where the upstream gradient is exactly 1."""
    checks.check_readable(upstream=upstream)
    out = grad if in_place else torch.empty_like(grad)
    if grad.numel() == 0:
        return out
    if upstream.ndim == 0:
        # One factor for a dense tensor: its memory is one long row.
        n_classes, class_stride = grad.numel(), 1
        layout = row_layout((), (), ())
    else:
        n_classes, class_stride, row_strides = _axes(grad)
        layout = row_layout(upstream.shape, row_strides, upstream.stride())
    grad_strides, upstream_strides = layout.strides
    config = launch.elementwise_config(layout.n_rows, n_classes, upstream.dtype.itemsize)
    n_tiles = config.n_programs(layout.n_groups, layout.n_rows, n_classes)
    n_programs, steps = launch.upstream_grid(n_tiles)
    with _device_of(grad):
        for grad_at, upstream_at in layout.offsets:
            elementwise.upstream_kernel[(n_programs,)](
                _from(grad, grad_at),
                _from(upstream, upstream_at),
                _from(out, grad_at),
                n_tiles,
                layout.n_rows,
                n_classes,
                *grad_strides,
                class_stride,
                *upstream_strides,
                IN_PLACE=in_place,
                STEPS=steps,
                BLOCK_ROWS=config.block_rows,
                BLOCK_CLASSES=config.block_classes,
                num_warps=config.num_warps,
                **COMPILER_OPTIONS,
            )
    return out


def _totals(target: Tensor, weight: Tensor | None, n_classes: int, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """``(2, programs)``: parts of the sum of weights and of the number of samples that take part."""
    layout = row_layout(target.shape, target.stride())
    (strides,) = layout.strides
    n_samples = layout.n_groups * layout.n_rows
    grid = launch.totals_grid(n_samples)
    totals = target.new_empty((len(layout.offsets), 2, grid.n_programs), dtype=dtype)
    for part, (target_at,) in zip(totals, layout.offsets, strict=True):
        elementwise.totals_kernel[(grid.n_programs,)](
            _from(target, target_at),
            weight,
            part,
            ignore_index,
            n_samples,
            layout.n_rows,
            n_classes,
            *strides,
            ONE_GROUP=layout.n_groups == 1,
            STEPS=grid.steps,
            BLOCK_ROWS=grid.block_rows,
            num_warps=grid.num_warps,
            **COMPILER_OPTIONS,
        )
    return totals[0] if len(totals) == 1 else totals.sum(0)


def _statistics(
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    layout: RowLayout,
    config: launch.LaunchConfig,
    align: int,
) -> Tensor:
    """``(3, rows, parts)``: maximum and sums of the others in each part of a row, for one group of rows."""
    n_classes, class_stride, _ = _axes(logits)
    (_, logits_stride), (_, target_stride), *_ = layout.strides
    statistics = logits.new_empty((3, layout.n_rows, config.class_splits), dtype=arithmetic_dtype(logits))
    class_blocks = -(-n_classes // config.block_classes)
    with _device_of(logits):
        index.statistics_kernel[(config.n_programs(1, layout.n_rows) * config.class_splits,)](
            logits,
            target,
            statistics,
            *_float_arguments((options.scale,), statistics.dtype),
            options.ignore_index,
            layout.n_rows,
            n_classes // align,
            logits_stride // align,
            class_stride,
            target_stride,
            PLAIN=options.needs_plain,
            SCALED=options.needs_scaled,
            ALIGN=align,
            CLASS_SPLITS=config.class_splits,
            BLOCK_ROWS=config.block_rows,
            BLOCK_CLASSES=config.block_classes,
            CLASS_BLOCKS=-(-class_blocks // config.class_splits),
            num_warps=config.num_warps,
            **COMPILER_OPTIONS,
        )
    return statistics


def _axes(logits: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Number of classes, stride of the class axis, and strides of the sample axes."""
    axis = class_axis(logits.shape)
    strides = logits.stride()
    return logits.shape[axis], strides[axis], strides[:axis] + strides[axis + 1 :]


def _row_strides(upstream: Tensor | None, target: Tensor) -> tuple[int, ...]:
    return upstream.stride() if upstream is not None and upstream.ndim == target.ndim else (0,) * target.ndim


def _from(tensor: Tensor | None, offset: int) -> Tensor | None:
    """The tensor with its first element moved on by ``offset`` elements; its shape means nothing to a kernel."""
    if tensor is None or offset == 0:
        return tensor
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


def _float_arguments(values: tuple[float, ...], dtype: torch.dtype) -> tuple:
    """Triton passes a float as float32, so float64 logits get theirs as constants: each new value compiles anew."""
    return tuple(map(tl.constexpr, values)) if dtype == torch.float64 and not INTERPRETED else values


@lru_cache
def _n_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted, or only recorded
        return launch.H100_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make that the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
