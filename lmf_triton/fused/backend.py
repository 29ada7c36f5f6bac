"""The loss by Triton kernels: allocation and launches. plain/ is its counterpart with the same functions."""

import contextlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks, reduction
from ..options import Inputs, Keep, LossOptions, is_expectation
from ..shapes import arithmetic_dtype
from . import launch
from .kernels import elementwise, index, probabilities
from .layout import Axes, axes, axes_without_classes
from .rows import Coefs, Form, Summary

# True under TRITON_INTERPRET=1: the kernels then run on CPU tensors.
INTERPRETED = not isinstance(index.forward_kernel, triton.JITFunction)

# Triton 3.10 is to change the default of this one. Results are within the tests' bounds either way.
COMPILER_OPTIONS = {"enable_fp_fusion": True}

_MAJOR, _MINOR, *_ = triton.__version__.split(".")
TRITON_VERSION = int(_MAJOR), int(_MINOR)
# For which launches are chosen where there is no device: kernels that are interpreted, or compiled only.
H100 = launch.Device(132, (9, 0), TRITON_VERSION)

N_COEFS = len(Coefs._fields)


class Outputs(NamedTuple):
    """What ``forward_kernel`` writes."""

    loss: Tensor  # of the target's shape, or the partial sums of the programs
    coefs: Tensor | None
    grad: Tensor | None


def n_coefs(inputs: Inputs, options: LossOptions) -> int:
    """Numbers of each row that :func:`forward` keeps for :func:`backward`."""
    return 0 if is_expectation(inputs, options) else N_COEFS


def forward(inputs: Inputs, options: LossOptions, *, keep: Keep) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss; and to keep for backward, the gradient, or the tensors from which :func:`backward` computes it."""
    checks.check_readable(**inputs._asdict())
    inputs = _contiguous(inputs)
    if math.prod(inputs.sample_shape) == 0:
        return _of_no_samples(inputs, options, keep)
    grad = torch.empty_like(inputs.logits) if keep == "gradient" else None
    with _device_of(inputs.logits):
        if is_expectation(inputs, options):
            loss, coefs = _expectation(inputs, options, None, grad), None
        else:
            loss, coefs = _of_classes(inputs, options, keep, grad)
        if not options.rule.per_sample:
            loss = reduction.sum_of_parts(loss)
    return loss, _kept(keep, grad, inputs, coefs)


def _of_classes(inputs: Inputs, options: LossOptions, keep: Keep, grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The loss, in parts, and the coefficients: by the kernels for class indices. Fills the gradient if given.

    In three steps: plan, denominators, launch.
    """
    plan = launch.plan_forward(
        _axes(inputs.logits),
        inputs.target.stride(),
        None if grad is None else _axes(grad),
        arithmetic_dtype(inputs.logits).itemsize,
        out_per_row=options.rule.per_sample or keep == "coefs",
        two_exponentials=options.needs_plain and options.needs_scaled,
        device=_launch_device(inputs.logits.device),
    )
    totals = inputs.normalizer
    if totals is None and options.rule.is_mean and plan.n_partials > 1:
        totals = _totals(inputs, options)
    loss = _empty_losses(inputs, options, plan.n_partials)
    if plan.summarise is None:
        coefs = _empty_coefs(inputs) if keep == "coefs" else None
        _launch_forward(plan.forward, inputs, totals, None, Outputs(loss, coefs, grad), options)
        return loss, coefs
    coefs = _empty_coefs(inputs)  # from which the gradient comes, if it is wanted
    summaries = _summaries(plan.summarise, inputs, options)
    _launch_forward(plan.forward, inputs, totals, summaries, Outputs(loss, coefs, None), options)
    if grad is not None:
        _launch_backward(inputs, coefs, None, grad, options)
    return loss, coefs


def backward(kept: Sequence[Tensor | None], upstream: Tensor, options: LossOptions) -> Tensor:
    """The gradient of the logits, from what :func:`forward` kept as "coefs"."""
    *tensors, coefs = kept
    inputs = _contiguous(Inputs(*cast(list[Tensor], tensors)))
    checks.check_readable(upstream=upstream)
    grad = torch.empty_like(inputs.logits)
    if grad.numel() > 0:
        with _device_of(inputs.logits):
            if is_expectation(inputs, options):
                _expectation(inputs, options, upstream, grad, with_loss=False)
            else:
                assert coefs is not None
                _launch_backward(inputs, coefs, upstream, grad, options)
    return grad


def _contiguous(inputs: Inputs) -> Inputs:
    """With what there is of each class side by side: a copy of so little costs nothing."""
    margins, weight, adjustment = (t if t is None else t.contiguous() for t in inputs[2:5])
    return inputs._replace(margins=margins, weight=weight, logit_adjustment=adjustment)


def apply_upstream(grad: Tensor, upstream: Tensor, *, in_place: bool) -> Tensor:
    """``upstream * grad``, rounded once; in place, nothing is moved where the upstream gradient is exactly 1."""
    checks.check_readable(upstream=upstream)
    out = grad if in_place else torch.empty_like(grad)
    if grad.numel() == 0:
        return out
    # One factor for a dense tensor: its memory is one long row.
    view = Axes(grad.numel(), 1, (), ()) if upstream.ndim == 0 else _axes(grad)
    plan = launch.plan_upstream(view, upstream.stride(), upstream.dtype.itemsize)
    grad_strides, upstream_strides = plan.strides
    with _device_of(grad):
        for grad_at, upstream_at in plan.offsets:
            _launch(
                elementwise.upstream_kernel,
                plan,
                _from(grad, grad_at),
                *grad_strides,
                _from(upstream, upstream_at),
                *upstream_strides,
                _from(out, grad_at),
                plan.n_items,
                plan.n_rows,
                plan.n_classes,
                IN_PLACE=in_place,
            )
    return out


def _totals(inputs: Inputs, options: LossOptions) -> Tensor:
    """``(2, programs)``: partial sums of the weights and of the number of samples that take part."""
    target = inputs.target
    plan = launch.plan_totals(target.shape, target.stride(), _axes(inputs.logits).n_classes)
    (strides,) = plan.strides
    dtype = arithmetic_dtype(inputs.logits)
    totals = target.new_empty((len(plan.offsets), 2, plan.n_programs), dtype=dtype)
    for of_launch, (target_at,) in zip(totals, plan.offsets, strict=True):
        _launch(
            elementwise.totals_kernel,
            plan,
            _from(target, target_at),
            *strides,
            inputs.weight,
            of_launch,
            options.ignore_index,
            plan.n_items,
            plan.n_rows,
            plan.n_classes,
        )
    return totals[0] if len(totals) == 1 else totals.sum(0)


def _expectation(
    inputs: Inputs, options: LossOptions, upstream: Tensor | None, grad: Tensor | None, *, with_loss: bool = True
) -> Tensor:
    """The loss, in parts, where several classes have a share. Fills the gradient, times ``upstream``, if given."""
    logits, target = inputs.logits, inputs.target
    per_sample, n_axes = options.rule.per_sample, len(inputs.sample_shape)
    plan = launch.plan_expectation(
        _axes(logits),
        _axes(target) if inputs.has_probabilities else axes_without_classes(target.shape, target.stride()),
        (0,) * n_axes if upstream is None or upstream.ndim != n_axes else upstream.stride(),
        None if grad is None else _axes(grad),
        arithmetic_dtype(logits).itemsize,
        has_probabilities=inputs.has_probabilities,
        out_per_row=per_sample and with_loss,
        n_softmaxes=int(options.needs_plain) + int(options.needs_scaled),
        device=_launch_device(logits.device),
    )
    n_partials = plan.n_programs * len(plan.offsets)
    totals = inputs.normalizer
    if totals is None and options.rule.is_mean and n_partials > 1 and not inputs.has_probabilities:
        totals = _totals(inputs, options)
    loss = _empty_losses(inputs, options, n_partials)
    kept, spread = 1 - options.label_smoothing, options.label_smoothing / _axes(logits).n_classes
    numbers = options.alpha, options.beta, options.gamma, options.scale, kept, spread
    logits_strides, target_strides, upstream_strides, out_strides, grad_strides = plan.strides
    for i, (logits_at, target_at, upstream_at, out_at, grad_at) in enumerate(plan.offsets):
        _launch(
            probabilities.expectation_kernel,
            plan,
            _from(logits, logits_at),
            *logits_strides,
            _from(target, target_at),
            *target_strides,
            *(() if inputs.has_probabilities else (0,)),
            inputs.margins,
            inputs.weight,
            inputs.logit_adjustment,
            totals,
            _from(upstream, upstream_at),
            *upstream_strides,
            _from(loss, out_at if per_sample else i * plan.n_programs) if with_loss else None,
            *out_strides,
            _from(grad, grad_at),
            *grad_strides,
            *_float_arguments(numbers, loss.dtype),
            options.ignore_index,
            plan.n_items,
            plan.n_rows,
            plan.n_classes,
            FORM=_form(options),
            RULE=options.rule.with_totals(inputs.normalizer),
            N_TOTALS=1 if totals is None else totals.numel() // 2,
        )
    return loss


def _summaries(plan: launch.Plan, inputs: Inputs, options: LossOptions) -> Tensor:
    """``(3, rows, parts)``: the summary of each part of each row, for one group of rows."""
    (_, *logits_strides), (_, target_stride), *_ = plan.strides
    dtype = arithmetic_dtype(inputs.logits)
    summaries = inputs.logits.new_empty((len(Summary._fields), plan.n_rows, plan.n_items), dtype=dtype)
    _launch(
        index.summarise_kernel,
        plan,
        inputs.logits,
        *logits_strides,
        inputs.target,
        target_stride,
        _adjustment_of_x(inputs, options),
        summaries,
        *_float_arguments((options.scale,), dtype),
        options.ignore_index,
        plan.n_rows,
        plan.n_classes,
        plan.n_items,
        FORM=_form(options),
    )
    return summaries


def _launch_forward(
    plan: launch.Plan,
    inputs: Inputs,
    totals: Tensor | None,
    summaries: Tensor | None,
    outputs: Outputs,
    options: LossOptions,
) -> None:
    logits_strides, target_strides, out_strides, grad_strides = plan.strides
    per_sample, adjustment = options.rule.per_sample, _adjustment_of_x(inputs, options)
    for i, (logits_at, target_at, out_at, grad_at) in enumerate(plan.offsets):
        _launch(
            index.forward_kernel,
            plan,
            _from(inputs.logits, logits_at),
            *logits_strides,
            _from(inputs.target, target_at),
            *target_strides,
            inputs.margins,
            inputs.weight,
            adjustment,
            totals,
            summaries,
            _from(outputs.loss, out_at if per_sample else i * plan.n_programs),
            _from(outputs.coefs, N_COEFS * out_at),
            *out_strides,
            _from(outputs.grad, grad_at),
            *grad_strides,
            *_float_arguments((options.alpha, options.beta, options.gamma, options.scale), outputs.loss.dtype),
            options.ignore_index,
            plan.n_rows,
            plan.n_classes,
            plan.n_items,
            FORM=_form(options),
            RULE=options.rule.with_totals(inputs.normalizer),
            N_TOTALS=1 if totals is None else totals.numel() // 2,
        )


def _launch_backward(
    inputs: Inputs, coefs: Tensor, upstream: Tensor | None, grad: Tensor, options: LossOptions
) -> None:
    """Write the gradient of the logits, times ``upstream`` if given."""
    logits, target = inputs.logits, inputs.target
    adjustment = _adjustment_of_x(inputs, options)
    plan = launch.plan_backward(
        _axes(logits),
        target.stride(),
        coefs.stride()[:-1],
        (0,) * target.ndim if upstream is None or upstream.ndim != target.ndim else upstream.stride(),
        _axes(grad),
        coefs.dtype.itemsize,
    )
    logits_strides, target_strides, coefs_strides, upstream_strides, grad_strides = plan.strides
    for logits_at, target_at, coefs_at, upstream_at, grad_at in plan.offsets:
        _launch(
            index.backward_kernel,
            plan,
            _from(logits, logits_at),
            *logits_strides,
            _from(target, target_at),
            *target_strides,
            adjustment,
            _from(coefs, coefs_at),
            *coefs_strides,
            _from(upstream, upstream_at),
            *upstream_strides,
            _from(grad, grad_at),
            *grad_strides,
            *_float_arguments((options.scale,), coefs.dtype),
            options.ignore_index,
            plan.n_rows,
            plan.n_classes,
            FORM=_form(options),
        )


def _adjustment_of_x(inputs: Inputs, options: LossOptions) -> Tensor | None:
    """What is added to x where the loss has one softmax: also to make scale * x + adjustment."""
    if inputs.logit_adjustment is None or options.needs_plain:
        return inputs.logit_adjustment
    return inputs.logit_adjustment.to(arithmetic_dtype(inputs.logits)) / options.scale


def _launch(kernel: Any, plan: launch.Plan, *arguments: Any, **constexprs: Any) -> None:
    kernel[(plan.n_programs,)](*arguments, **constexprs, **plan.meta, **COMPILER_OPTIONS)


def _of_no_samples(inputs: Inputs, options: LossOptions, keep: Keep) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Loss and gradient of an empty batch."""
    loss = _empty_losses(inputs, options, 1)
    loss.fill_(reduction.of_no_samples(options.rule.with_totals(inputs.normalizer)))
    coefs = None if is_expectation(inputs, options) else _empty_coefs(inputs)
    return loss, _kept(keep, torch.empty_like(inputs.logits), inputs, coefs)


def _kept(keep: Keep, grad: Tensor | None, inputs: Inputs, coefs: Tensor | None) -> tuple[Tensor | None, ...]:
    if keep == "gradient":
        return (grad,)
    return (*inputs, coefs) if keep == "coefs" else ()


def _empty_losses(inputs: Inputs, options: LossOptions, n_partials: int) -> Tensor:
    """A place for the loss of each sample, or for each program's part of their sum."""
    shape = inputs.sample_shape if options.rule.per_sample else () if n_partials == 1 else (n_partials,)
    return inputs.logits.new_empty(shape, dtype=arithmetic_dtype(inputs.logits))


def _empty_coefs(inputs: Inputs) -> Tensor:
    """A place for the numbers of each row from which ``backward_kernel`` computes the gradient."""
    return inputs.logits.new_empty((*inputs.target.shape, N_COEFS), dtype=arithmetic_dtype(inputs.logits))


def _form(options: LossOptions) -> Form:
    return Form(options.has_ldam, options.has_focal, options.needs_plain, options.needs_scaled)


def _axes(tensor: Tensor) -> Axes:
    return axes(tensor.shape, tensor.stride())


def _from(tensor: Tensor | None, offset: int) -> Tensor | None:
    """The tensor with its first element moved on by ``offset`` elements; its shape means nothing to a kernel."""
    if tensor is None or offset == 0:
        return tensor
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


def _float_arguments(values: tuple[float, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Triton passes a float as float32, so float64 logits get theirs as constants: each new value compiles anew."""
    return tuple(map(tl.constexpr, values)) if dtype == torch.float64 and not INTERPRETED else values


@lru_cache
def _launch_device(device: torch.device) -> launch.Device:
    if device.type != "cuda":  # interpreted, or only recorded
        return H100
    properties = torch.cuda.get_device_properties(device)
    capability = None if torch.version.hip else (properties.major, properties.minor)
    return launch.Device(properties.multi_processor_count, capability, TRITON_VERSION)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; make that the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
