"""What one loss is computed from: its tensors and its settings, checked once and handed down as two values."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .reduction import RULES, Rule
from .shapes import without_classes

# What a forward pass keeps for backward: the gradient, or the coefficients (whatever a backend has) to compute it from.
Keep = Literal["nothing", "gradient", "coefs"]


class Inputs(NamedTuple):
    """The tensors of one loss."""

    logits: Tensor
    target: Tensor
    margins: Tensor | None = None
    weight: Tensor | None = None
    logit_adjustment: Tensor | None = None
    normalizer: Tensor | None = None  # (2,), what :func:`reduction.given_totals` made of the user's

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same of each tensor that is there."""
        return Inputs._make([None if tensor is None else function(tensor) for tensor in self])

    @property
    def has_probabilities(self) -> bool:
        """Whether the target has a number for each class of a sample, not its class."""
        return self.target.is_floating_point()

    @property
    def sample_shape(self) -> torch.Size:
        """The shape of a loss that is not reduced."""
        return without_classes(self.target.shape) if self.has_probabilities else self.target.shape


class LossOptions(NamedTuple):
    """Arguments of :func:`lmf_triton.lmf_loss` that are not tensors; floats are Python floats."""

    alpha: float
    beta: float
    gamma: float
    scale: float
    ignore_index: int
    reduction: str
    label_smoothing: float = 0.0

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


def is_expectation(inputs: Inputs, options: LossOptions) -> bool:
    """Whether several classes have a share of a sample, so that its loss is a sum over classes of losses.

    An adjustment too needs such a sum's two softmaxes where the two terms have one each: the largest logit is not the
    same class in both.
    """
    if inputs.has_probabilities or options.label_smoothing != 0:
        return True
    return inputs.logit_adjustment is not None and options.needs_plain and options.needs_scaled
