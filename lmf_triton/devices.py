"""What computes a loss: what a backend offers, and which one serves a device."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from . import plain
from .options import Inputs, Keep, LossOptions

_why_no_triton = ""
try:
    from .fused import backend as fused
except Exception as error:  # Triton is not installed; one that is broken raises whatever it meets
    fused = None  # type: ignore[assignment]
    _why_no_triton = f"{type(error).__name__}: {error}"


class Backend(Protocol):
    """The module ``plain`` or ``fused.backend``."""

    def n_coefs(self, inputs: Inputs, options: LossOptions) -> int:
        """Coefficients of a sample that are kept for backward; with 0, it needs nothing but the inputs."""
        ...

    def forward(self, inputs: Inputs, options: LossOptions, *, keep: Keep) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss; and to keep for backward: nothing, the gradient, or what :meth:`backward` computes it from."""
        ...

    def backward(self, kept: Sequence[Tensor | None], upstream: Tensor, options: LossOptions) -> Tensor:
        """The gradient of the logits from what :meth:`forward` kept as "coefs": its inputs and the coefficients."""
        ...

    def apply_upstream(self, grad: Tensor, upstream: Tensor, *, in_place: bool) -> Tensor:
        """``upstream * grad``, in new memory or where the gradient lies."""
        ...


def backend_of(logits: Tensor) -> Backend:
    """The module that computes the loss on the device of the logits."""
    device = logits.device.type
    if fused is None:
        if device == "cuda" and not torch.compiler.is_compiling():  # the operator will say it when it runs
            _warn_without_triton()
        return plain
    return fused if device == "cuda" or (device == "cpu" and fused.INTERPRETED) else plain


@cache
def _warn_without_triton() -> None:
    """Once in a process: there is no error, and nobody would look for what is missing."""
    warnings.warn(
        "lmf_loss runs in plain PyTorch on CUDA tensors, more slowly than by its kernels, since Triton cannot be "
        f"imported ({_why_no_triton}). On Linux: pip install triton; on Windows: pip install triton-windows",
        RuntimeWarning,
        stacklevel=6,  # who called lmf_loss
    )
