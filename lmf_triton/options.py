"""The settings of one loss, checked once by functional.py and handed down as one value."""

from typing import NamedTuple

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
    def is_mean(self) -> bool:
        return self.reduction in ("mean", "mean_per_term")
