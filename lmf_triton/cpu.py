"""The loss in plain PyTorch operations: the same contract and formulas as the kernels, gradient in closed form.

gpu.py is its counterpart with the same three functions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import LossOptions, arithmetic_dtype

# Logits are worked through in pieces of about this many elements, which bounds the memory for widened half logits. On
# two cores of an AMD EPYC (torch 2.15) this is the best of 2^17 to 2^22: smaller pieces lose more to the overhead of
# small operations than they gain in the caches.
CHUNK_ELEMENTS = 1 << 21

# From this many classes on, and where the class axis is strided, PyTorch's softmax is faster than its parts one by one:
# on the same machine by a quarter at 32 and 1000 classes, while at 8 it takes three times as long.
SOFTMAX_CLASSES = 32

BIG = 1e30  # stands for infinity where inf would meet a factor 0, as in kernels.py


def forward(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    *,
    with_grad: bool,
    with_saved: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...] | None]:
    """The loss and, where asked for, its gradient, and the tensors from which :func:`backward` computes it."""
    grad = torch.empty_like(logits) if with_grad else None
    loss = _evaluate(logits, target, margins, weight, options, grad)
    return loss, grad, (logits, target, margins, weight) if with_saved else None


def backward(saved: tuple[Tensor | None, ...], upstream: Tensor, options: LossOptions) -> Tensor:
    """The gradient of the logits, computed anew from the loss's own arguments."""
    logits, target, margins, weight = saved
    grad = torch.empty_like(logits)
    _evaluate(logits, target, margins, weight, options, grad, upstream)
    return grad


def apply_upstream(grad: Tensor, upstream: Tensor, *, in_place: bool) -> Tensor:
    """``upstream * grad``, rounded once; in place, nothing is done when every upstream gradient is exactly 1."""
    if upstream.ndim > 0:
        upstream = upstream.unsqueeze(1)
    if in_place and bool((upstream == 1).all()):
        return grad
    scaled = grad.to(upstream.dtype) * upstream
    if not bool(upstream.isfinite().all()):
        scaled.masked_fill_(grad == 0, 0)  # which it stays, as an ignored sample's
    return grad.copy_(scaled) if in_place else scaled.to(grad.dtype)


def _evaluate(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    grad: Tensor | None,
    upstream: Tensor | None = None,
) -> Tensor:
    """The reduced loss; fills ``grad`` with its gradient, times ``upstream`` if given."""
    dtype = arithmetic_dtype(logits)
    classes = target.long()
    ignored = classes == options.ignore_index  # in int64: uint8 has no -100, and would compare it as 156
    ignored = ignored if bool(ignored.any()) else None
    if ignored is not None:
        classes = classes.masked_fill(ignored, 0)
    weights = None if weight is None else _scale_rows(weight.to(dtype)[classes], ignored)
    margin = None if margins is None else margins.to(dtype)[classes]
    ldam_total, focal_total = _totals(options, target.numel(), ignored, weights)

    upstream = None if upstream is None else upstream.expand(target.shape)
    tensors = logits, grad, classes, ignored, weights, margin, upstream
    if logits.ndim == 1:
        tensors = (t if t is None else t.unsqueeze(0) for t in tensors)
    terms = [_evaluate_chunk(*chunk, options, ldam_total, focal_total) for chunk in _chunks(*tensors)]

    if options.reduction == "none":
        losses = [sum(term for term in chunk if term is not None) for chunk in terms]
        return torch.cat(losses).view(target.shape)
    # A float64 sum costs nothing here. A term whose coefficient is 0 has no say, not even by a denominator of 0.
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    for ldam, focal in terms:
        for term, total in (ldam, ldam_total), (focal, focal_total):
            if term is not None:
                loss += term.sum(dtype=torch.float64) / total
    return loss.to(dtype)


def _totals(
    options: LossOptions, n_samples: int, ignored: Tensor | None, weights: Tensor | None
) -> tuple[float, float]:
    """The denominators of the two terms: 1 for sums, NaN where there is nothing to divide by."""
    if not options.is_mean:
        return 1.0, 1.0
    count = n_samples if ignored is None else n_samples - int(ignored.sum())
    weight_total = count if weights is None else float(weights.sum(dtype=torch.float64))
    focal_total = count if options.reduction == "mean_per_term" else weight_total
    return weight_total or math.nan, focal_total or math.nan


def _evaluate_chunk(
    logits: Tensor,
    grad: Tensor | None,
    classes: Tensor,
    ignored: Tensor | None,
    weights: Tensor | None,
    margin: Tensor | None,
    upstream: Tensor | None,
    options: LossOptions,
    ldam_total: float,
    focal_total: float,
) -> tuple[Tensor | None, Tensor | None]:
    """The two weighted terms of a few samples; fills ``grad``. Axis 1 is the classes, all others are samples."""
    dtype = arithmetic_dtype(logits)
    has_ldam, has_focal, unit_scale = options.has_ldam, options.has_focal, options.scale == 1
    index = classes.unsqueeze(1)

    # Row statistics: m, the largest of the other logits, and the sums of their exponentials relative to m. A gradient
    # of the arithmetic type is the work space of its own computation.
    work_space = grad if grad is not None and grad.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    gaps = work_space.copy_(logits).scatter_(1, index, -torch.inf)
    m = gaps.amax(1)
    plain_sum = scaled_sum = None
    plain_is_normalised = not options.needs_scaled and (gaps.shape[1] >= SOFTMAX_CLASSES or gaps.stride(1) != 1)
    if plain_is_normalised:
        plain, plain_sum = _softmax_(gaps, m)
        m.clamp_min_(torch.finfo(dtype).min)
    else:
        m.clamp_min_(torch.finfo(dtype).min)  # finite also where there are no others, or all are at -inf
        gaps.sub_(m.unsqueeze(1))
        if options.needs_scaled:
            scaled = (gaps.mul if has_focal else gaps.mul_)(options.scale).exp_()
            scaled_sum = scaled.sum(1)
        if options.needs_plain:
            plain = gaps.exp_()
            plain_sum = plain.sum(1)

    # The two terms, and their slopes in the gap between the others and the target. An infinite x_y has no softmax.
    x_y = logits.gather(1, index).squeeze(1).to(dtype)
    gap = m.sub_(x_y).masked_fill_(x_y == torch.inf, torch.nan)
    u = None if plain_sum is None else gap + plain_sum.log()
    ldam = focal = plain_slope = scaled_slope = None
    if has_ldam:
        v = u if unit_scale else scaled_sum.log().add_(gap, alpha=options.scale)
        v = v if margin is None else v.add(margin, alpha=options.scale)
        ldam = _scale_rows(_softplus(v).mul_(options.alpha), ignored, weights)
        slope = v.sigmoid().mul_(options.alpha * options.scale / ldam_total)
        plain_slope, scaled_slope = (slope, None) if unit_scale else (None, slope)
    if has_focal:
        value, slope = _focal(u, options.gamma)
        focal = _scale_rows(value.mul_(options.beta), ignored, weights)
        slope.mul_(options.beta / focal_total)
        plain_slope = slope if plain_slope is None else plain_slope.add_(slope)
    if grad is None:
        return ldam, focal

    result = target_grad = None
    if plain_slope is not None:
        _scale_rows(plain_slope, ignored, weights, upstream)
        coefficient = plain_slope.unsqueeze(1) if plain_is_normalised else _coefficient(plain_slope, plain_sum)
        result, target_grad = plain.mul_(coefficient), plain_slope.neg()
    if scaled_slope is not None:
        _scale_rows(scaled_slope, ignored, weights, upstream)
        part = scaled.mul_(_coefficient(scaled_slope, scaled_sum))
        result = part if result is None else result.add_(part)
        target_grad = scaled_slope.neg() if target_grad is None else target_grad.sub_(scaled_slope)
    result.scatter_(1, index, target_grad.unsqueeze(1))
    if ignored is not None:
        result.masked_fill_(ignored.unsqueeze(1), 0)
    if result is not grad:
        grad.copy_(result)
    return ldam, focal


def _chunks(logits: Tensor, *others: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Pieces of these tensors along their first axis, of about ``CHUNK_ELEMENTS`` logits each."""
    n, tensors = len(logits), (logits, *others)
    size = max(1, CHUNK_ELEMENTS * n // max(1, logits.numel()))
    if n <= size:
        return [tensors]
    return [tuple(None if t is None else t[start : start + size] for t in tensors) for start in range(0, n, size)]


def _scale_rows(per_sample: Tensor, ignored: Tensor | None, *factors: Tensor | None) -> Tensor:
    """In place: times the factors, and exactly 0 for ignored samples, whatever their logits and the totals are."""
    for factor in factors:
        if factor is not None:
            per_sample.mul_(factor)
    return per_sample if ignored is None else per_sample.masked_fill_(ignored, 0)


def _softmax_(others: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """In place: softmax over the classes, and the sums of exponentials relative to the largest, m, that it implies.

    The largest has the probability 1 / sum. Where all others are at -inf, both are 0.
    """
    torch.softmax(others, 1, out=others)
    total = others.amax(1).reciprocal_()
    no_others = m == -torch.inf
    if bool(no_others.any()):
        others.masked_fill_(no_others.unsqueeze(1), 0)
        total.masked_fill_(no_others, 0)
    return others, total


def _coefficient(slope: Tensor, total: Tensor) -> Tensor:
    """What multiplies the exponentials. Their sum is at least 1, that of the largest, unless there are no others."""
    return (slope / total.clamp_min(1)).unsqueeze(1)


def _softplus(z: Tensor) -> Tensor:
    """log(1 + e^z). Beyond 40 it is z to the last bit of float64, and e^z is not taken where it would overflow."""
    return F.softplus(z, threshold=40)


def _focal(u: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of samples with gap u = logsumexp(others) - x_y; and its derivative in u."""
    u = u.clamp_min_(-BIG)  # gamma = 0 at u = -inf: exp(-0 * inf) would be NaN
    nll, q = _softplus(u), u.sigmoid()  # -log p_y, 1 - p_y
    u.neg_()
    factor = _softplus(u).mul_(-gamma).exp_()  # (1 - p_y)^gamma
    p_nll = u.sigmoid_().mul_(nll.clamp_max(BIG))  # tends to 0 as u grows: 0 * inf would be NaN
    return nll.mul_(factor), p_nll.mul_(gamma).add_(q).mul_(factor)
