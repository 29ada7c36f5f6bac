"""The loss in plain PyTorch operations: the same contract and formulas as the kernels, gradient in closed form.

gpu.py is its counterpart with the same three functions.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import LossOptions, arithmetic_dtype

# Logits are worked through in pieces of about this many elements, which bounds the memory for widened half logits. On
# two cores of an AMD EPYC (torch 2.15) smaller pieces lose more to the overhead of small operations than they gain in
# the caches, and larger ones gain nothing.
CHUNK_ELEMENTS = 1 << 22

# Within these bounds no exponential that matters is near float32's smallest, and the odds with margins are finite.
MIN_ODDS, MAX_MARGIN = 1e-30, 16

# From this many classes on, where they lie side by side, PyTorch's softmax is faster than its parts one by one: on the
# same machine by a fifth at 1000 classes, while at 8 it takes five times as long.
SOFTMAX_CLASSES = 32

LOG2_E = math.log2(math.e)  # PyTorch takes exp2 in a third of exp's time, or less

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
    if in_place and (float(upstream) == 1 if upstream.ndim == 0 else bool((upstream == 1).all())):
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
    low, high = target_range(classes, logits.shape[min(logits.ndim - 1, 1)], options.ignore_index)
    ignored = classes == options.ignore_index if low <= options.ignore_index <= high else None
    if ignored is not None:
        classes = classes.masked_fill(ignored, 0)
    weights = None if weight is None else _scale_rows(weight.to(dtype).take(classes), ignored)
    alpha, beta = _coefficients(options, target.numel(), ignored, weights)
    margins = None if margins is None else margins.to(dtype)
    terms = _Terms(options, alpha, beta, margins, _odds_are_bounded(options, margins))

    upstream = None if upstream is None else upstream.expand(target.shape)
    tensors = logits, grad, classes, ignored, weights, upstream
    if logits.ndim == 1:
        tensors = (t if t is None else t.unsqueeze(0) for t in tensors)
    losses = [_evaluate_chunk(*chunk, terms) for chunk in _chunks(*tensors)]

    if options.reduction == "none":
        return torch.cat(losses).view(target.shape)
    if math.isnan(alpha + beta):
        return torch.full((), math.nan, dtype=dtype, device=logits.device)
    return sum(loss.sum(dtype=torch.float64) for loss in losses).to(dtype)  # float64 costs nothing here


def target_range(target: Tensor, n_classes: int, ignore_index: int) -> tuple[int, int]:
    """Smallest and largest target; an IndexError names the first that is neither a class nor ``ignore_index``."""
    if target.numel() == 0:
        return 0, 0
    wide = target.long()  # uint8 has no -100, and would compare it as 156
    low, high = (int(bound) for bound in wide.aminmax())
    if low < 0 or high >= n_classes:
        wrong = ((wide < 0) | (wide >= n_classes)) & (wide != ignore_index)
        if bool(wrong.any()):
            index = wrong.nonzero()[0].tolist()
            raise IndexError(
                f"target must be in [0, {n_classes}) or ignore_index={ignore_index}, "
                f"got {int(wide[tuple(index)])} at index {index}"
            )
    return low, high


def _coefficients(
    options: LossOptions, n_samples: int, ignored: Tensor | None, weights: Tensor | None
) -> tuple[float, float]:
    """Alpha and beta, each over the denominator of its term: NaN where there is nothing to divide by."""
    if not options.is_mean:
        return options.alpha, options.beta
    count = n_samples if ignored is None else n_samples - int(ignored.sum())
    weight_total = count if weights is None else float(weights.sum(dtype=torch.float64))
    focal_total = count if options.reduction == "mean_per_term" else weight_total
    # A term whose coefficient is 0 has no say, not even by a denominator of 0.
    alpha = options.alpha / (weight_total or math.nan) if options.has_ldam else 0.0
    beta = options.beta / (focal_total or math.nan) if options.has_focal else 0.0
    return alpha, beta


class _Terms(NamedTuple):
    """The two terms of the loss, the same for all samples."""

    options: LossOptions
    alpha: float  # this and beta over their denominators
    beta: float
    margins: Tensor | None
    odds_are_bounded: bool


class _Part(NamedTuple):
    """What one softmax over the classes other than the target contributes to the gradient of a few samples."""

    exps: Tensor  # proportional to the probabilities, and 0 for the target
    total: Tensor  # their sum, or 1 where there are no others
    slope: Tensor  # of the loss in their logsumexp; minus this is the target's gradient


def _evaluate_chunk(
    logits: Tensor,
    grad: Tensor | None,
    classes: Tensor,
    ignored: Tensor | None,
    weights: Tensor | None,
    upstream: Tensor | None,
    terms: _Terms,
) -> Tensor:
    """The losses of a few samples; fills ``grad``. Axis 1 is the classes, all others are samples."""
    dtype = arithmetic_dtype(logits)
    # A gradient of the arithmetic type is the work space of its own computation.
    work_space = grad if grad is not None and grad.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    evaluate = _evaluate_by_odds if terms.odds_are_bounded and logits.numel() > 0 else _evaluate_by_gaps
    loss, parts = evaluate(logits, classes, terms, work_space)
    _scale_rows(loss, ignored, weights)
    if grad is None:
        return loss
    result = target_grad = None
    for exps, total, slope in parts:
        _scale_rows(slope, ignored, weights, upstream)
        part = exps.mul_((slope / total).unsqueeze(1))
        result = part if result is None else result.add_(part)
        target_grad = slope.neg() if target_grad is None else target_grad.sub_(slope)
    result.scatter_(1, classes.unsqueeze(1), target_grad.unsqueeze(1))
    if ignored is not None:
        result.masked_fill_(ignored.unsqueeze(1), 0)
    if result is not grad:
        grad.copy_(result)
    return loss


def _odds_are_bounded(options: LossOptions, margins: Tensor | None) -> bool:
    """Whether the odds against the target are within float32's range for all samples but a few."""
    if options.needs_scaled:
        return False
    return margins is None or max(abs(bound) for bound in torch.stack(margins.aminmax()).tolist()) <= MAX_MARGIN


def _evaluate_by_odds(logits: Tensor, classes: Tensor, terms: _Terms, work_space: Tensor) -> tuple[Tensor, list[_Part]]:
    """Losses, and their gradient's part, from the odds against the target: fast, where these are bounded."""
    options, alpha, beta, margins, _ = terms
    exps, index = _exponentials(logits, work_space), classes.unsqueeze(1)
    of_target = exps.gather(1, index)
    exps.scatter_(1, index, torch.zeros_like(of_target))  # PyTorch is twice as slow with a number in a tensor's place
    total = exps.sum(1)
    odds = total / of_target.squeeze(1)
    low, high = (float(bound) for bound in odds.aminmax())
    is_extreme = None
    if not (low >= MIN_ODDS and high <= 1 / MIN_ODDS):
        is_extreme = ~((odds >= MIN_ODDS) & (odds <= 1 / MIN_ODDS))  # or NaN

    loss = slope = None
    if options.has_ldam:
        ldam_odds = odds if margins is None else odds * margins.exp().take(classes)
        loss, slope = ldam_odds.log1p().mul_(alpha), ldam_odds.div(ldam_odds + 1).mul_(alpha)
    if options.has_focal:
        p = (odds + 1).reciprocal_()
        factor = odds.reciprocal().log1p_().mul_(-options.gamma * LOG2_E).exp2_()  # (1 - p)^gamma, by -log(1 - p)
        focal_slope, nll = odds * p, odds.log1p_()
        focal_slope.addcmul_(p, nll, value=options.gamma)
        if loss is None:
            loss, slope = nll.mul_(factor).mul_(beta), focal_slope.mul_(factor).mul_(beta)
        else:
            loss.addcmul_(nll, factor, value=beta)
            slope.addcmul_(focal_slope, factor, value=beta)

    if is_extreme is not None:  # the few are computed by themselves
        rows = logits.movedim(1, -1)[is_extreme].to(exps.dtype)
        loss[is_extreme], (part,) = _evaluate_by_gaps(rows, classes[is_extreme], terms, rows)
        exps.movedim(1, -1)[is_extreme], total[is_extreme], slope[is_extreme] = part
    return loss, [_Part(exps, total, slope)]


def _exponentials(logits: Tensor, work_space: Tensor) -> Tensor:
    """e^logits, up to a factor for each sample that keeps it within bounds."""
    logits = logits if logits.dtype == work_space.dtype else work_space.copy_(logits)
    if logits.shape[1] >= SOFTMAX_CLASSES and logits.stride(1) == 1:
        torch.softmax(logits.movedim(1, -1), -1, out=work_space.movedim(1, -1))
    else:
        torch.sub(logits, logits.amax(1, keepdim=True), out=work_space).mul_(LOG2_E).exp2_()
    return work_space


def _evaluate_by_gaps(logits: Tensor, classes: Tensor, terms: _Terms, work_space: Tensor) -> tuple[Tensor, list[_Part]]:
    """Losses, and their gradient's parts, from the gaps between logits: for all options and values."""
    options, alpha, beta, margins, _ = terms
    has_focal, scale, index = options.has_focal, options.scale, classes.unsqueeze(1)
    x_y = logits.gather(1, index).squeeze(1).to(work_space.dtype)
    gaps = work_space.copy_(logits).scatter_(1, index, -torch.inf)
    largest = gaps.amax(1).clamp_min_(torch.finfo(gaps.dtype).min)  # where there are no others, or all are at -inf
    gaps.sub_(largest.unsqueeze(1))
    largest_gap = largest.sub_(x_y).masked_fill_(x_y == torch.inf, torch.nan)  # an infinite x_y has no softmax
    if options.needs_scaled:
        scaled = (gaps.mul if has_focal else gaps.mul_)(scale * LOG2_E).exp2_()
        scaled_sum = scaled.sum(1)
        v = scaled_sum.log().add_(largest_gap, alpha=scale)
    if options.needs_plain:
        plain = gaps.mul_(LOG2_E).exp2_()
        plain_sum = plain.sum(1)
        u = plain_sum.log().add_(largest_gap)

    # The two terms, and their slopes in the gap between the others' logsumexp and the target.
    loss = plain_slope = scaled_slope = None
    if options.has_ldam:
        gap = v if options.needs_scaled else u
        gap = gap if margins is None else gap.add(margins.take(classes), alpha=scale)
        loss, slope = _softplus(gap).mul_(alpha), gap.sigmoid().mul_(alpha * scale)
        plain_slope, scaled_slope = (None, slope) if options.needs_scaled else (slope, None)
    if has_focal:
        focal, slope = _focal(u, options.gamma)
        loss = focal.mul_(beta) if loss is None else loss.add_(focal, alpha=beta)
        plain_slope = slope.mul_(beta) if plain_slope is None else plain_slope.add_(slope, alpha=beta)
    # The largest of the others has the exponential 1, so that only the sum of none is less.
    parts = [] if plain_slope is None else [_Part(plain, plain_sum.clamp_min_(1), plain_slope)]
    return loss, parts if scaled_slope is None else [*parts, _Part(scaled, scaled_sum.clamp_min_(1), scaled_slope)]


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
