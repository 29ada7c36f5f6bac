"""The loss in plain PyTorch operations: the same contract as the kernels, the gradient in closed form too.

fused/backend.py is its counterpart with the same three functions.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import LossOptions
from .shapes import arithmetic_dtype, class_axis

# Logits are worked through in pieces of about this many elements, which bounds the memory for widened half logits. On
# two cores of an AMD EPYC (torch 2.15) smaller pieces lose more to the overhead of small operations than they gain in
# the caches, and larger ones gain nothing.
CHUNK_ELEMENTS = 1 << 22

# Odds against the target from this to its reciprocal are computed from exponentials, of which none that matters is
# then near float32's smallest. Margins of this size at most leave them finite.
MIN_ODDS = 1e-30
MAX_MARGIN = 16

# From this many classes on, where they lie side by side, PyTorch's softmax is faster than its parts one by one: on the
# same machine by a fifth at 1000 classes, while at 8 it takes five times as long.
SOFTMAX_CLASSES = 32

LOG2_E = math.log2(math.e)  # PyTorch takes exp2 in a third of exp's time, or less

BIG = 1e30  # stands for infinity where inf would meet a factor 0, as in fused/math.py


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
    low, high = target_range(classes, logits.shape[class_axis(logits.shape)], options.ignore_index)
    ignored = classes == options.ignore_index if low <= options.ignore_index <= high else None
    if ignored is not None:
        classes = classes.masked_fill(ignored, 0)
    margins, weight = (t if t is None else t.to(dtype) for t in (margins, weight))
    weights = None if weight is None else _scale_rows(weight.take(classes), ignored)
    totals = _totals(options, target.numel(), ignored, weights)
    settings = _Settings(options, totals, margins, _odds_may_be_used(options, margins), with_grad=grad is not None)

    upstream = None if upstream is None else upstream.expand(target.shape)
    tensors = logits, grad, classes, ignored, weights, upstream
    if logits.ndim == 1:
        tensors = (t if t is None else t.unsqueeze(0) for t in tensors)
    chunks = [_evaluate_chunk(*chunk, settings) for chunk in _chunks(*tensors)]

    coefficients = options.alpha, options.beta
    if options.reduction == "none":
        losses = [
            sum(c * term for c, term in zip(coefficients, terms, strict=True) if term is not None) for terms in chunks
        ]
        return torch.cat(losses).resize_(target.shape)  # no view, which autograd would not let a user change in place
    loss = 0.0  # in float64, which costs nothing here
    for coefficient, total, *terms in zip(coefficients, totals, *chunks, strict=True):
        if coefficient != 0:  # otherwise it has no say, not even by a denominator of 0
            loss += coefficient * sum(float(term.sum(dtype=torch.float64)) for term in terms) / total
    return torch.tensor(loss, dtype=dtype, device=logits.device)


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


class _Settings(NamedTuple):
    """What is the same for all samples."""

    options: LossOptions
    totals: tuple[float, float]
    margins: Tensor | None
    use_odds: bool
    with_grad: bool


class _Others(NamedTuple):
    """The softmax over the classes other than the target. Only the ratio of the two counts."""

    exps: Tensor  # proportional to the probabilities, and 0 for the target
    total: Tensor  # their sum, or anything else where there are no others


class _Term(NamedTuple):
    """LDAM or focal loss of some samples, without coefficient, weights and denominator."""

    loss: Tensor
    slope: Tensor | None  # derivative in the target's logit, negated; may be None where no gradient is wanted
    others: _Others


def _evaluate_chunk(
    logits: Tensor,
    grad: Tensor | None,
    classes: Tensor,
    ignored: Tensor | None,
    weights: Tensor | None,
    upstream: Tensor | None,
    settings: _Settings,
) -> tuple[Tensor | None, Tensor | None]:
    """The two weighted terms of a few samples; fills ``grad``. Axis 1 is the classes, all others are samples."""
    dtype, options = arithmetic_dtype(logits), settings.options
    # A gradient of the arithmetic type is the work space of its own computation.
    work_space = grad if grad is not None and grad.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    evaluate = _evaluate_by_odds if settings.use_odds and logits.numel() > 0 else _evaluate_by_gaps
    terms = evaluate(logits, classes, settings, work_space)
    losses = tuple(term if term is None else _scale_rows(term.loss, ignored, weights) for term in terms)
    if grad is None:
        return losses

    parts: list[tuple[_Others, Tensor]] = []  # terms that share their exponentials are one
    coefficients = options.alpha, options.beta
    for term, coefficient, total in zip(terms, coefficients, settings.totals, strict=True):
        if term is None:
            continue
        # In float64 no factor of it leaves the range.
        scale = coefficient / total if weights is None else (weights.double() * (coefficient / total)).to(dtype)
        slope = term.slope.mul_(scale)
        if parts and parts[0][0] is term.others:
            parts[0][1].add_(slope)
        else:
            parts.append((term.others, slope))

    result = target_grad = None
    for (exps, total), slope in parts:
        _scale_rows(slope, ignored, upstream)
        part = exps.mul_((slope / total).unsqueeze(1))
        result = part if result is None else result.add_(part)
        target_grad = slope.neg() if target_grad is None else target_grad.sub_(slope)
    result.scatter_(1, classes.unsqueeze(1), target_grad.unsqueeze(1))
    if ignored is not None:
        result.masked_fill_(ignored.unsqueeze(1), 0)
    if result is not grad:
        grad.copy_(result)
    return losses


def _odds_may_be_used(options: LossOptions, margins: Tensor | None) -> bool:
    """Whether it is left to the logits alone that the odds against the target are within bounds, as they mostly are."""
    if options.needs_scaled:
        return False
    return margins is None or all(abs(float(bound)) <= MAX_MARGIN for bound in margins.aminmax())


def _evaluate_by_odds(
    logits: Tensor, classes: Tensor, settings: _Settings, work_space: Tensor
) -> tuple[_Term | None, _Term | None]:
    """LDAM and focal loss, as far as needed, from the odds against the target: e^u of the gap u, without logarithm."""
    options, margins, with_grad = settings.options, settings.margins, settings.with_grad
    exps, index = _exponentials(logits, work_space), classes.unsqueeze(1)
    of_target = exps.gather(1, index)
    exps.scatter_(1, index, torch.zeros_like(of_target))  # PyTorch is twice as slow with a number in a tensor's place
    others = _Others(exps, exps.sum(1))
    odds = others.total / of_target.squeeze(1)
    low, high = (float(bound) for bound in odds.aminmax())  # cheaper than a mask, which is seldom needed
    extreme = None  # indices of samples out of bounds, or NaN
    if not (low >= MIN_ODDS and high <= 1 / MIN_ODDS):
        extreme = (~((odds >= MIN_ODDS) & (odds <= 1 / MIN_ODDS))).nonzero(as_tuple=True)

    ldam = focal = None
    if options.has_ldam:
        ldam_odds = odds if margins is None else odds * margins.exp().take(classes)
        slope = (ldam_odds + 1).reciprocal_().mul_(ldam_odds) if with_grad else None
        ldam = _Term(ldam_odds.log1p(), slope, others)
    if options.has_focal:
        nll = odds.log1p()
        factor = odds.reciprocal().log1p_().mul_(-options.gamma * LOG2_E).exp2_()  # (1 - p)^gamma, by -log(1 - p)
        slope = None
        if with_grad:
            p = (odds + 1).reciprocal_()
            slope = (odds * p).addcmul_(p, nll, value=options.gamma).mul_(factor)
        focal = _Term(nll.mul_(factor), slope, others)

    if extreme is not None:  # the few are computed by themselves; at scale 1 their terms share one softmax too
        rows = logits.movedim(1, -1)[extreme].to(exps.dtype)
        extreme_terms = _evaluate_by_gaps(rows, classes[extreme], settings, rows)
        for term, extreme_term in zip((ldam, focal), extreme_terms, strict=True):
            if term is not None:
                term.loss[extreme] = extreme_term.loss
                if with_grad:
                    term.slope[extreme] = extreme_term.slope
        if with_grad:
            shared = next(term.others for term in extreme_terms if term is not None)
            exps.movedim(1, -1)[extreme], others.total[extreme] = shared
    return ldam, focal


def _exponentials(logits: Tensor, work_space: Tensor) -> Tensor:
    """e^logits, up to a factor for each sample that keeps it within bounds."""
    logits = logits if logits.dtype == work_space.dtype else work_space.copy_(logits)
    if logits.shape[1] >= SOFTMAX_CLASSES and logits.stride(1) == 1:
        torch.softmax(logits.movedim(1, -1), -1, out=work_space.movedim(1, -1))
    else:
        torch.sub(logits, logits.amax(1, keepdim=True), out=work_space).mul_(LOG2_E).exp2_()
    return work_space


def _evaluate_by_gaps(
    logits: Tensor, classes: Tensor, settings: _Settings, work_space: Tensor
) -> tuple[_Term | None, _Term | None]:
    """The same from the gaps between logits: slower, but for all options and values."""
    options, margins, with_grad = settings.options, settings.margins, settings.with_grad
    index = classes.unsqueeze(1)
    x_y = logits.gather(1, index).squeeze(1).to(work_space.dtype)
    gaps = work_space.copy_(logits).scatter_(1, index, -torch.inf)
    largest = gaps.amax(1).clamp_min_(torch.finfo(gaps.dtype).min)  # where there are no others, or all are at -inf
    gaps.sub_(largest.unsqueeze(1))
    largest_gap = largest.sub_(x_y).masked_fill_(x_y == torch.inf, torch.nan)  # an infinite x_y has no softmax

    def logsumexp(exps: Tensor, scale: float) -> tuple[_Others, Tensor]:
        """The others of these exponentials, and the gap of their logsumexp to the target."""
        total = exps.sum(1)
        gap = total.log().add_(largest_gap, alpha=scale)
        return _Others(exps, total.clamp_min_(1)), gap  # the largest's is 1, so that only the sum of none is less

    if options.needs_scaled:
        log2_base = min(options.scale * LOG2_E, torch.finfo(gaps.dtype).max)
        scaled, v = logsumexp((gaps.mul if options.has_focal else gaps.mul_)(log2_base).exp2_(), options.scale)
    if options.needs_plain:
        plain, u = logsumexp(gaps.mul_(LOG2_E).exp2_(), 1.0)

    ldam = focal = None
    if options.has_ldam:
        others, gap = (scaled, v) if options.needs_scaled else (plain, u)
        gap = gap if margins is None else gap.add(margins.take(classes), alpha=options.scale)
        ldam = _Term(_softplus(gap), gap.sigmoid().mul_(options.scale) if with_grad else None, others)
    if options.has_focal:
        focal = _Term(*_focal(u, options.gamma), plain)
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
