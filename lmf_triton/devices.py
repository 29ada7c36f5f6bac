"""What computes a loss: what a backend offers, and which one serves a device."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from . import plain
from .options import Keep, LossOptions

try:
    from .fused import backend as fused
except ImportError:  # Triton is not installed
    fused = None  # type: ignore[assignment]


class Backend(Protocol):
    """The module ``plain`` or ``fused.backend``."""

    N_COEFS: int  # coefficients of a sample that are kept for backward

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        margins: Tensor | None,
        weight: Tensor | None,
        options: LossOptions,
        *,
        keep: Keep,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss; and to keep for backward: nothing, the gradient, or what :meth:`backward` computes it from."""
        ...

    def backward(self, kept: Sequence[Tensor | None], upstream: Tensor, options: LossOptions) -> Tensor:
        """The gradient of the logits from what :meth:`forward` kept as "coefs": its arguments and the coefficients."""
        ...

    def apply_upstream(self, grad: Tensor, upstream: Tensor, *, in_place: bool) -> Tensor:
        """``upstream * grad``, in new memory or where the gradient lies."""
        ...


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
