"""Which way leads to a loss: with autograd or without, past the operators or through them."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import checks, devices, ops, reduction
from .autograd import LMFFunction, ops_are_needed
from .options import Inputs, LossOptions
from .reduction import Normalizer
from .shapes import has_own_dispatch, has_own_functions, is_traced


def evaluate(
    backend_of: Callable[[Tensor], devices.Backend],
    inputs: Inputs,
    normalizer: Normalizer | None,
    options: LossOptions,
    grad_in_forward: bool | None,
    check_target: bool,
) -> Tensor:
    """The loss of checked arguments, with a graph where the logits want one."""
    inputs = inputs.map(_plain)
    logits = inputs.logits
    wants_gradient = logits.requires_grad and torch.is_grad_enabled()
    if normalizer is not None:
        inputs = inputs._replace(normalizer=reduction.given_totals(normalizer, logits))
    if ops_are_needed(*inputs):
        kept = _kept_by_operator(inputs, options, grad_in_forward) if wants_gradient else (False, 0)
        loss: Tensor = torch.ops.lmf_triton.forward(*ops.problem_of(inputs, options), check_target, *kept)[0]
        return loss

    inputs = inputs.map(checks.without_lazy_bits)
    backend = backend_of(logits)
    if check_target:  # which the plain backend does by itself on the CPU only
        checks.check_classes(inputs, options.ignore_index)
    if not wants_gradient:
        return backend.forward(inputs, options, keep="nothing")[0]
    if grad_in_forward is None:
        grad_in_forward = _grad_in_forward(logits, options)
    loss, _ = LMFFunction.apply(*inputs, options, grad_in_forward, backend)
    return loss


def _plain(tensor: Tensor) -> Tensor:
    """As no subclass that is about functions: methods of MONAI's MetaTensor take other arguments than PyTorch's."""
    if type(tensor) is Tensor or torch.compiler.is_compiling():  # which has its own way with subclasses
        return tensor
    if has_own_dispatch(tensor) or not has_own_functions(tensor):
        return tensor
    return tensor.as_subclass(Tensor)


def _grad_in_forward(logits: Tensor, options: LossOptions) -> bool:
    """When the gradient is computed, if nobody says so: where an upstream gradient of 1 is likely, and no underflow."""
    return not options.rule.per_sample and logits.dtype != torch.float16


def _kept_by_operator(inputs: Inputs, options: LossOptions, grad_in_forward: bool | None) -> tuple[bool, int]:
    """What an operator keeps for backward: whether the gradient, and how many coefficients of each sample."""
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and is_traced():
        return False, 0  # the trace is for calls with and without gradient, and backward computes what it needs
    if grad_in_forward is None:
        # An operator may not overwrite the gradient that was kept. To scale a copy of it costs a GPU more than to
        # compute it in backward; and a CPU less, except where vmap does it for a batch.
        is_one = is_compiling or not torch._C._are_functorch_transforms_active()
        logits = inputs.logits
        grad_in_forward = is_one and logits.device.type == "cpu" and _grad_in_forward(logits, options)
    return grad_in_forward, 0 if grad_in_forward else devices.backend_of(inputs.logits).n_coefs(inputs, options)
