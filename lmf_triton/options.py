"""The settings of one loss, checked once by functional.py and handed down as one value; and its arithmetic dtype."""

from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "sum", "mean", "mean_per_term")


class LossOptions(NamedTuple):
    """Arguments of :func:`lmf_triton.lmf_loss` that are not tensors; floats are Python floats."""

    alpha: float
    beta: float
    gamma: float
    scale: float
    ignore_index: int
    reduction: str

    @property
    def has_ldam(self) -> bool:
        return self.alpha != 0

    @property
    def has_focal(self) -> bool:
        return self.beta != 0

    @property
    def needs_plain(self) -> bool:
        """Whether exponentials of the logits themselves are needed: those of the scaled ones may be the same."""
        return self.has_focal or self.scale == 1

    @property
    def needs_scaled(self) -> bool:
        return self.has_ldam and self.scale != 1

    @property
    def is_mean(self) -> bool:
        return self.reduction in ("mean", "mean_per_term")


def arithmetic_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the loss."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
