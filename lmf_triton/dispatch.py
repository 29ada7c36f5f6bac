"""Which way leads to a loss: with autograd or without, past the operators or through them."""

import torch
from torch import Tensor

from . import checks, devices, ops, reduction
from .autograd import LMFFunction, by_operator, ops_are_needed
from .options import LossOptions
from .reduction import Normalizer
from .shapes import class_axis


def evaluate(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None,
    weight: Tensor | None,
    normalizer: Normalizer | None,
    options: LossOptions,
    grad_in_forward: bool | None,
    check_target: bool,
) -> Tensor:
    """The loss of checked arguments, with a graph where the logits want one."""
    wants_gradient = logits.requires_grad and torch.is_grad_enabled()
    by_default = not options.rule.per_sample and logits.dtype != torch.float16
    given = None if normalizer is None else reduction.given_totals(normalizer, logits)
    if ops_are_needed(logits, target, margins, weight, given):
        if grad_in_forward is None:
            # An operator may not overwrite the gradient that was kept. To scale a copy of it costs a GPU more than to
            # compute it in backward, and a CPU less.
            grad_in_forward = by_default and logits.device.type == "cpu"
        # A trace is for calls with and without gradient: it keeps nothing, and backward computes what it needs.
        keep = wants_gradient and not torch.jit.is_tracing()
        keep_grad = keep and grad_in_forward
        n_coefs = devices.backend_of(logits).N_COEFS if keep and not keep_grad else 0
        problem = ops.problem_of(logits, target, margins, weight, given, options)
        return by_operator(*problem, keep_grad, n_coefs)

    logits, target = checks.without_lazy_bits(logits), checks.without_lazy_bits(target)
    margins = None if margins is None else checks.without_lazy_bits(margins)
    weight = None if weight is None else checks.without_lazy_bits(weight)
    backend = devices.backend_of(logits)
    if check_target:  # which the plain backend does by itself on the CPU only
        checks.check_target(target, logits.shape[class_axis(logits.shape)], options.ignore_index)
    if not wants_gradient:
        return backend.forward(logits, target, margins, weight, given, options, keep="nothing")[0]
    if grad_in_forward is None:
        grad_in_forward = by_default
    loss: Tensor
    loss, _ = LMFFunction.apply(logits, target, margins, weight, given, options, grad_in_forward, backend)
    return loss
