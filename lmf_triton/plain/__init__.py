"""The loss in plain PyTorch operations: the same contract as the kernels, the gradient in closed form too.

fused/backend.py is its counterpart with the same functions. On the CPU values decide which way is the fastest; on any
other device nobody asks for a value, since the host would wait for it, and no float64 is used but for float64 logits,
since there may be none.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .. import shapes
from ..options import Inputs, Keep, LossOptions, is_expectation
from . import indices, probabilities


def loss_of(inputs: Inputs, options: LossOptions, grad: Tensor | None, upstream: Tensor | None = None) -> Tensor:
    """The reduced loss; fills ``grad`` with its gradient, times ``upstream`` if given."""
    evaluate = probabilities.evaluate if is_expectation(inputs, options) else indices.evaluate
    return evaluate(inputs, options, grad, upstream)


def n_coefs(inputs: Inputs, options: LossOptions) -> int:
    """None: backward computes all anew."""
    return 0


def forward(inputs: Inputs, options: LossOptions, *, keep: Keep) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss; and to keep for backward, the gradient, or the inputs from which :func:`backward` computes it."""
    grad = torch.empty_like(inputs.logits) if keep == "gradient" else None
    loss = loss_of(inputs, options, grad)
    if keep == "coefs":
        return loss, (*inputs, None)
    return loss, () if grad is None else (grad,)


def backward(kept: Sequence[Tensor | None], upstream: Tensor, options: LossOptions) -> Tensor:
    """The gradient of the logits, computed anew from the loss's own inputs."""
    *tensors, _ = kept
    inputs = Inputs(*cast(list[Tensor], tensors))
    grad = torch.empty_like(inputs.logits)
    loss_of(inputs, options, grad, upstream)
    return grad


def apply_upstream(grad: Tensor, upstream: Tensor, *, in_place: bool) -> Tensor:
    """``upstream * grad``, rounded once; in place, nothing is done when every upstream gradient is exactly 1."""
    on_host = shapes.on_host(grad)
    if upstream.ndim > 0:
        upstream = upstream.unsqueeze(1)
    if on_host and in_place and (float(upstream) == 1 if upstream.ndim == 0 else bool((upstream == 1).all())):
        return grad
    scaled = grad.to(upstream.dtype) * upstream
    if not (on_host and bool(upstream.isfinite().all())):
        scaled.masked_fill_(grad == 0, 0)  # which it stays, as an ignored sample's
    return grad.copy_(scaled) if in_place else scaled.to(grad.dtype)
