"""The settings of one loss, checked once and handed down as one value."""

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
