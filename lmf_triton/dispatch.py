"""Which backend computes a loss, and which way leads into it: with autograd or without."""

import torch
from torch import Tensor

from . import checks, plain
from .autograd import Backend, LMFFunction
from .options import LossOptions
from .shapes import class_axis

try:
    from .fused import backend as fused
except ImportError:  # Triton is not installed
    fused = None  # type: ignore[assignment]


def backend_of(logits: Tensor) -> Backend:
    """The module that computes the loss on the device of the logits."""
    device = logits.device.type
    if device == "cpu":
        return fused if fused is not None and fused.INTERPRETED else plain
    if device != "cuda":
        raise ValueError(f"logits must be on a CPU or CUDA (or ROCm) device, got {logits.device}")
    if fused is None:
        raise ValueError(f"logits on {logits.device} need Triton, which is not installed: pip install triton")
    return fused


def evaluate(
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    grad_in_forward: bool | None,
    check_target: bool,
) -> Tensor:
    """The loss of checked arguments, with a graph where the logits want one."""
    logits, target = checks.without_lazy_bits(logits), checks.without_lazy_bits(target)
    margins = None if margins is None else checks.without_lazy_bits(margins)
    weight = None if weight is None else checks.without_lazy_bits(weight)
    if check_target and backend is fused:  # the plain backend always checks
        checks.check_target(target, logits.shape[class_axis(logits.shape)], options.ignore_index)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return backend.forward(logits, target, margins, weight, options, keep="nothing")[0]
    if grad_in_forward is None:
        grad_in_forward = not options.rule.per_sample and logits.dtype != torch.float16
    loss: Tensor
    loss, _ = LMFFunction.apply(logits, target, margins, weight, options, grad_in_forward, backend)
    return loss
