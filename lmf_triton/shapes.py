"""Small facts of a tensor of logits."""

from collections.abc import Sequence

import torch
from torch import Tensor


def class_axis(shape: Sequence[int]) -> int:
    """The axis of the classes in logits of shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``."""
    return min(len(shape) - 1, 1)


def arithmetic_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the loss."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
