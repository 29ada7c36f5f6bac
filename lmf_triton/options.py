"""The settings of one loss, checked once and handed down as one value."""

from typing import Literal, NamedTuple

from .reduction import RULES, Rule

# What a forward pass keeps for backward: the gradient, or the coefficients (whatever a backend has) to compute it from.
Keep = Literal["nothing", "gradient", "coefs"]


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
    def rule(self) -> Rule:
        return RULES[self.reduction]
