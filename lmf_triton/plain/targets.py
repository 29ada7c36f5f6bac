"""The targets of the plain backend that are class indices, and what follows from them for each sample."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, reduction, shapes
from ..options import LossOptions
from ..reduction import Number, Pair


class Targets(NamedTuple):
    """The targets of all samples, with what follows from them."""

    classes: Tensor  # int64, and 0 for samples without
    ignored: Tensor | None
    weights: Tensor | None  # 0 for ignored samples, NaN for those whose target is no class
    denominators: Pair


def targets_on_host(
    target: Tensor, n_classes: int, weight: Tensor | None, normalizer: Tensor | None, options: LossOptions
) -> Targets:
    """An IndexError for a target that is no class; and no more work than these targets need."""
    classes = target.long()
    low, high = checks.check_target(classes, n_classes, options.ignore_index)
    ignored = classes == options.ignore_index if low <= options.ignore_index <= high else None
    if ignored is not None:
        classes = classes.masked_fill(ignored, 0)
    weights = None if weight is None else scale_rows(of_classes(weight, classes), ignored)
    denominators = reduction.denominators(options.rule, target.numel(), ignored, weights, normalizer, on_host=True)
    return Targets(classes, ignored, weights, denominators)


def targets_on_device(
    target: Tensor,
    n_classes: int,
    weight: Tensor | None,
    normalizer: Tensor | None,
    options: LossOptions,
    dtype: torch.dtype,
) -> Targets:
    """As the kernels have it: a target that is no class makes its sample NaN, and has no say in a denominator."""
    classes = target.long()
    ignored = classes == options.ignore_index
    is_class = (classes >= 0) & (classes < n_classes)
    left_out = ~is_class | ignored
    classes = classes.masked_fill(left_out, 0)
    weights = torch.ones_like(classes, dtype=dtype) if weight is None else of_classes(weight, classes)
    weights.masked_fill_(left_out, 0)
    denominators = reduction.denominators(options.rule, target.numel(), left_out, weights, normalizer, on_host=False)
    return Targets(classes, ignored, weights.masked_fill(left_out & ~ignored, torch.nan), denominators)


def of_classes(per_class: Tensor, classes: Tensor) -> Tensor:
    """The value of each sample's class."""
    if shapes.on_host(per_class):
        return per_class.take(classes)
    # Some devices lack it.
    return per_class.index_select(0, classes.flatten()).view(classes.shape)


def scale_rows(per_sample: Tensor, ignored: Tensor | None, *factors: Tensor | None) -> Tensor:
    """In place: times the factors, and exactly 0 for ignored samples, whatever their logits and the totals are."""
    for factor in factors:
        if factor is not None:
            per_sample.mul_(factor)
    return per_sample if ignored is None else per_sample.masked_fill_(ignored, 0)


def share(coefficient: float, denominator: Number, weights: Tensor | None, on_host: bool) -> Number:
    """What multiplies the slopes of a term, so that no factor of it leaves the range: in float64, or in this order."""
    if weights is None:
        return coefficient / denominator
    if on_host:
        return (weights.double() * (coefficient / denominator)).to(weights.dtype)
    return weights / denominator * coefficient
