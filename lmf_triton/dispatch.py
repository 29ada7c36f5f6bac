"""Which backend computes a loss."""

from types import ModuleType

from torch import Tensor

from . import plain

try:
    from .fused import backend as fused
except ImportError:  # Triton is not installed
    fused = None


def backend_of(logits: Tensor) -> ModuleType:
    """The module that computes the loss on the device of the logits."""
    device = logits.device.type
    if device == "cpu":
        return fused if fused is not None and fused.INTERPRETED else plain
    if device != "cuda":
        raise ValueError(f"logits must be on a CPU or CUDA (or ROCm) device, got {logits.device}")
    if fused is None:
        raise ValueError(f"logits on {logits.device} need Triton, which is not installed: pip install triton")
    return fused
