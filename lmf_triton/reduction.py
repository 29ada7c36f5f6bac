"""What a reduction is: by what a mean divides, and how sums make the whole.

``RULES`` holds for both backends. The kernels follow them on the device (``load_denominators`` and ``sum_of_rows`` in
fused/rows.py), the plain backend by ``denominators`` and ``sum_of_terms``.

The loss is the sum of two terms, and a mean may divide each by a *total* of its own: the sum of the weights, or the
number of samples that take part. *Denominators* are the totals that belong to LDAM and to the focal term. Both totals
may be given instead, by a *normalizer*: of more samples than one call sees.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import FEW, arithmetic_dtype


class Rule(NamedTuple):
    """What a reduction does."""

    per_sample: bool = False  # nothing is reduced
    is_mean: bool = False
    focal_by_count: bool = False  # a mean divides the focal term by the number of samples, not by their weights
    totals_given: bool = False  # by a normalizer

    def with_totals(self, normalizer: Tensor | None) -> "Rule":
        """The rule of a call that may have a normalizer."""
        return self if normalizer is None else self._replace(totals_given=True)


RULES = {
    "none": Rule(per_sample=True),
    "sum": Rule(),
    "mean": Rule(is_mean=True),
    "mean_per_term": Rule(is_mean=True, focal_by_count=True),
}


Number = float | Tensor  # a tensor is 0-d, and the host does not ask for its value
Normalizer = Number | tuple[Number, Number]  # as a user gives it


class Pair(NamedTuple):
    """One number for each term."""

    ldam: Number
    focal: Number


def given_totals(normalizer: Normalizer, logits: Tensor) -> Tensor:
    """``(2,)``: what LDAM and the focal term are divided by, where the logits are and in the dtype of the arithmetic.

    Made on the device, of the user's as it is now. A number too, so that no kernel is compiled for its value.
    """
    if isinstance(normalizer, tuple):
        return torch.cat([given_totals(each, logits)[:1] for each in normalizer])
    dtype = arithmetic_dtype(logits)
    if not isinstance(normalizer, Tensor):
        return torch.zeros(2, dtype=dtype, device=logits.device) + float(normalizer)  # torch.full would recompile
    return torch.stack((normalizer.to(dtype),) * 2)


def denominators(
    rule: Rule,
    n_samples: int,
    left_out: Tensor | None,
    weights: Tensor | None,
    normalizer: Tensor | None,
    *,
    on_host: bool,
) -> Pair:
    """What each term is divided by: 1 unless it is a mean.

    ``left_out`` and ``weights`` have one value a sample, the weights of those left out being 0. On the host there is
    NaN where there is nothing to divide by. The kernels have their own, ``totals_kernel`` and ``load_denominators``;
    where weights cancel to 0, they and other devices divide by 0 instead.
    """
    if not rule.is_mean:
        return Pair(1.0, 1.0)
    if normalizer is not None:
        return _given_denominators(normalizer.double() if on_host else normalizer, n_samples, left_out)
    count: Number = n_samples
    if left_out is not None:
        count = n_samples - (int(left_out.sum()) if on_host else left_out.sum())
    weight_total = count if weights is None else total(weights, on_host=on_host)
    ldam, focal = weight_total, count if rule.focal_by_count else weight_total
    return Pair(ldam or math.nan, focal or math.nan) if on_host else Pair(ldam, focal)


def _given_denominators(totals: Tensor, n_samples: int, left_out: Tensor | None) -> Pair:
    """Those of a normalizer: 1 where no sample takes part, whose loss is 0 whatever the normalizer is."""
    if n_samples == 0:
        return Pair(1.0, 1.0)
    if left_out is not None:
        totals = totals.masked_fill(left_out.all(), 1)
    return Pair(*totals.unbind())


def total(per_sample: Tensor, *, on_host: bool) -> Number:
    """The sum: for the host a number, in float64, which costs nothing there; otherwise nothing waits for it."""
    if not on_host:
        return per_sample.sum()
    if per_sample.numel() <= FEW:
        return float(sum(per_sample.flatten().tolist()))
    return float(per_sample.sum(dtype=torch.float64))


def sum_of_terms(coefficients: tuple[float, float], sums: Pair, divided_by: Pair) -> Number:
    """The loss from the sums of the two terms. A coefficient of 0 takes a term out, denominator and all."""
    loss: Number = 0.0
    for coefficient, of_term, denominator in zip(coefficients, sums, divided_by, strict=True):
        if coefficient != 0:
            loss = loss + coefficient * (of_term / denominator)
    return loss


def sum_of_parts(parts: Tensor) -> Tensor:
    """The loss from the partial sums of programs: in one fixed order, so that it is the same every time."""
    return parts.sum() if parts.ndim > 0 else parts


def of_no_samples(rule: Rule) -> float:
    """The loss of an empty batch, as in ``F.cross_entropy``."""
    return math.nan if rule.is_mean and not rule.totals_given else 0.0
