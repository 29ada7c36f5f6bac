"""What a reduction is: by what a mean divides, and how sums make the whole.

``RULES`` holds for both backends. The kernels follow them on the device (``load_denominators`` and ``sum_of_rows`` in
fused/rows.py), the plain backend by ``denominators`` and ``sum_of_terms``.

The loss is the sum of two terms, and a mean may divide each by a *total* of its own: the sum of the weights, or the
number of samples that take part. *Denominators* are the totals that belong to LDAM and to the focal term.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """What a reduction does."""

    per_sample: bool = False  # nothing is reduced
    is_mean: bool = False
    focal_by_count: bool = False  # a mean divides the focal term by the number of samples, not by their weights


RULES = {
    "none": Rule(per_sample=True),
    "sum": Rule(),
    "mean": Rule(is_mean=True),
    "mean_per_term": Rule(is_mean=True, focal_by_count=True),
}


Number = float | Tensor  # a tensor is 0-d, and the host does not ask for its value


class Pair(NamedTuple):
    """One number for each term."""

    ldam: Number
    focal: Number


def denominators(rule: Rule, n_samples: int, left_out: Tensor | None, weights: Tensor | None, *, on_host: bool) -> Pair:
    """What each term is divided by: 1 unless it is a mean.

    ``left_out`` and ``weights`` have one value a sample, the weights of those left out being 0. On the host there is
    NaN where there is nothing to divide by. The kernels have their own, ``totals_kernel`` and ``load_denominators``;
    where weights cancel to 0, they and other devices divide by 0 instead.
    """
    if not rule.is_mean:
        return Pair(1.0, 1.0)
    count: Number = n_samples
    if left_out is not None:
        count = n_samples - (int(left_out.sum()) if on_host else left_out.sum())
    weight_total = count if weights is None else total(weights, on_host=on_host)
    ldam, focal = weight_total, count if rule.focal_by_count else weight_total
    return Pair(ldam or math.nan, focal or math.nan) if on_host else Pair(ldam, focal)


def total(per_sample: Tensor, *, on_host: bool) -> Number:
    """The sum: for the host a number, in float64, which costs nothing there; otherwise nothing waits for it."""
    return float(per_sample.sum(dtype=torch.float64)) if on_host else per_sample.sum()


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
    return math.nan if rule.is_mean else 0.0
