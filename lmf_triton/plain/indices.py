"""The loss of class indices in plain PyTorch.

On the CPU values decide which way is the fastest; off it all samples go the one way that reads none.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reduction, shapes
from ..options import Inputs, LossOptions
from ..reduction import Number, Pair
from ..shapes import arithmetic_dtype, class_axis
from .targets import of_classes, scale_rows, share, targets_on_device, targets_on_host
from .terms import LOG2_E, MAX_MARGIN, MIN_ODDS, focal_by_gap, focal_by_odds, ldam_by_gap, ldam_by_odds

# Logits are worked through in pieces of about this many elements, which bounds the memory for widened half logits. On
# two cores of an AMD EPYC (torch 2.15) smaller pieces lose more to the overhead of small operations than they gain in
# the caches, and larger ones gain nothing.
CHUNK_ELEMENTS = 1 << 22

# From this many classes on, where they lie side by side, PyTorch's softmax is faster than its parts one by one: on the
# same machine by a fifth at 1000 classes, while at 8 it takes five times as long.
SOFTMAX_CLASSES = 32
SMALL = 4096  # logits, of which the start of an operation takes longer than all its arithmetic


class _Settings(NamedTuple):
    """What is the same for all samples."""

    options: LossOptions
    denominators: Pair
    margins: Tensor | None
    adjustment: Tensor | None  # of the logits, along their axis 1
    on_host: bool
    use_odds: bool
    with_grad: bool


class _Samples(NamedTuple):
    """Some samples. Axis 1 of logits and gradient is the classes, all others are those of the samples."""

    logits: Tensor
    grad: Tensor | None  # to be filled
    classes: Tensor  # as in Targets
    ignored: Tensor | None
    weights: Tensor | None
    upstream: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Samples":
        logits, grad, classes, *rest = (None if tensor is None else function(tensor) for tensor in self)
        assert logits is not None and classes is not None
        return _Samples(logits, grad, classes, *rest)


class _Others(NamedTuple):
    """The softmax over the classes other than the target, as exps / total; each alone may have any factor."""

    exps: Tensor  # proportional to the probabilities, and 0 for the target
    total: Tensor  # their sum, or anything else where there are no others


class _Term(NamedTuple):
    """LDAM or focal loss of some samples, without coefficient, weights and denominator."""

    loss: Tensor
    slope: Tensor | None  # derivative in the target's logit, negated; may be None where no gradient is wanted
    others: _Others


_Terms = tuple[_Term | None, _Term | None]  # LDAM and focal loss, None for one that has no say
_Losses = tuple[Tensor | None, Tensor | None]


def evaluate(inputs: Inputs, options: LossOptions, grad: Tensor | None, upstream: Tensor | None = None) -> Tensor:
    """The reduced loss; fills ``grad`` with its gradient, times ``upstream`` if given."""
    logits, target, *per_class, normalizer = inputs
    dtype, on_host = arithmetic_dtype(logits), shapes.on_host(logits)
    n_classes = logits.shape[class_axis(logits.shape)]
    margins, weight, adjustment = [None if tensor is None else tensor.to(dtype) for tensor in per_class]
    if adjustment is not None:
        adjustment = _as_of_logits(adjustment, logits.ndim, options)
    if on_host:
        targets = targets_on_host(target, n_classes, weight, normalizer, options)
    else:
        targets = targets_on_device(target, n_classes, weight, normalizer, options, dtype)
    classes, ignored, weights, denominators = targets
    use_odds = on_host and _odds_may_be_used(options, margins)
    settings = _Settings(options, denominators, margins, adjustment, on_host, use_odds, with_grad=grad is not None)

    upstream = None if upstream is None else upstream.expand(target.shape)
    samples = _Samples(logits, grad, classes, ignored, weights, upstream)
    if logits.ndim == 1:
        samples = samples.map(lambda tensor: tensor.unsqueeze(0))
    chunks = [_evaluate_chunk(chunk, settings) for chunk in (_chunks(samples) if on_host else [samples])]

    coefficients = options.alpha, options.beta
    if options.rule.per_sample:
        losses = [_weighted_sum(coefficients, terms) for terms in chunks]
        return torch.cat(losses).resize_(target.shape)  # no view, which autograd would not let a user change in place
    ldam, focal = zip(*chunks, strict=True)
    sums = Pair(_total(ldam, on_host), _total(focal, on_host))
    loss = reduction.sum_of_terms(coefficients, sums, denominators)
    return loss.to(dtype) if isinstance(loss, Tensor) else torch.tensor(loss, dtype=dtype, device=logits.device)


def _as_of_logits(adjustment: Tensor, ndim: int, options: LossOptions) -> Tensor:
    """What to add to the logits themselves, where all terms see the same ones."""
    if options.needs_scaled:  # scale * (x + b / scale) = scale * x + b
        adjustment = adjustment / options.scale
    return adjustment.view(-1, *(1,) * (ndim - 2))


def _weighted_sum(coefficients: tuple[float, float], terms: _Losses) -> Tensor:
    """The loss of each sample."""
    present = [c * term for c, term in zip(coefficients, terms, strict=True) if term is not None]
    return sum(present[1:], present[0])


def _total(chunks: Sequence[Tensor | None], on_host: bool) -> Number:
    """The sum of a term."""
    return sum(reduction.total(term, on_host=on_host) for term in chunks if term is not None)


def _evaluate_chunk(samples: _Samples, settings: _Settings) -> _Losses:
    """The two weighted terms of a few samples; fills their gradient."""
    logits, grad, classes, ignored, weights, _ = samples
    dtype = arithmetic_dtype(logits)
    if settings.adjustment is not None:
        logits = logits + settings.adjustment  # which has the dtype of the arithmetic
    # A gradient of the arithmetic type is the work space of its own computation.
    work_space = grad if grad is not None and grad.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    evaluate = _evaluate_by_odds if settings.use_odds and logits.numel() > 0 else _evaluate_by_gaps
    ldam, focal = terms = evaluate(logits, classes, settings, work_space)
    losses = (
        None if ldam is None else scale_rows(ldam.loss, ignored, weights),
        None if focal is None else scale_rows(focal.loss, ignored, weights),
    )
    if grad is not None:
        _fill_gradient(grad, samples, terms, settings)
    return losses


def _fill_gradient(grad: Tensor, samples: _Samples, terms: _Terms, settings: _Settings) -> None:
    """Turn the softmax of the others, where it lies, into the gradient, weights and upstream gradient included."""
    parts: list[tuple[_Others, Tensor]] = []  # terms that share their exponentials are one
    coefficients = settings.options.alpha, settings.options.beta
    for term, coefficient, denominator in zip(terms, coefficients, settings.denominators, strict=True):
        if term is None or term.slope is None:
            continue
        slope = term.slope.mul_(share(coefficient, denominator, samples.weights, settings.on_host))
        if parts and parts[0][0] is term.others:
            parts[0][1].add_(slope)
        else:
            parts.append((term.others, slope))

    results, slopes = [], []
    for (exps, total), slope in parts:
        scale_rows(slope, samples.ignored, samples.upstream)
        results.append(exps.mul_((slope / total).unsqueeze(1)))
        slopes.append(slope)
    result, target_grad = results[0], slopes[0].neg()
    for other, slope in zip(results[1:], slopes[1:], strict=True):
        result.add_(other)
        target_grad.sub_(slope)
    result.scatter_(1, samples.classes.unsqueeze(1), target_grad.unsqueeze(1))
    if samples.ignored is not None:
        result.masked_fill_(samples.ignored.unsqueeze(1), 0)
    if result is not grad:
        grad.copy_(result)


def _odds_may_be_used(options: LossOptions, margins: Tensor | None) -> bool:
    """Whether it is left to the logits alone that the odds against the target are within bounds, as they mostly are."""
    if options.needs_scaled:
        return False
    if margins is None:
        return True
    return shapes.are_within(margins, -MAX_MARGIN, MAX_MARGIN)


def _evaluate_by_odds(logits: Tensor, classes: Tensor, settings: _Settings, work_space: Tensor) -> _Terms:
    """LDAM and focal loss, as far as needed, from the odds against the target: e^u of the gap u, without logarithm."""
    options, margins, with_grad = settings.options, settings.margins, settings.with_grad
    exps, index = _exponentials(logits, work_space), classes.unsqueeze(1)
    of_target = exps.gather(1, index)
    exps.scatter_(1, index, torch.zeros_like(of_target))  # PyTorch is twice as slow with a number in a tensor's place
    others = _Others(exps, exps.sum(1))
    p, q = of_target.squeeze(1), others.total
    odds = q / p
    extreme = None  # indices of samples out of bounds, or NaN
    if not shapes.are_within(odds, MIN_ODDS, 1 / MIN_ODDS):
        extreme = (~((odds >= MIN_ODDS) & (odds <= 1 / MIN_ODDS))).nonzero(as_tuple=True)

    ldam = focal = None
    if options.has_ldam:
        q_ldam = q if margins is None else of_classes(margins.exp(), classes).mul_(q)
        ldam = _Term(*ldam_by_odds(p, q_ldam, with_grad), others)
    if options.has_focal:
        focal = _Term(*focal_by_odds(p, q, options.gamma, with_grad), others)

    if extreme is not None:  # the few are computed by themselves
        rows = logits.movedim(1, -1)[extreme].to(exps.dtype)
        _overwrite((ldam, focal), extreme, _evaluate_by_gaps(rows, classes[extreme], settings, rows))
    return ldam, focal


def _overwrite(terms: _Terms, chosen: tuple[Tensor, ...], by: _Terms) -> None:
    """Put these terms in the place of those of the chosen samples. At scale 1 all share one softmax."""
    pairs = [(term, new) for term, new in zip(terms, by, strict=True) if term is not None and new is not None]
    for term, new in pairs:
        term.loss[chosen] = new.loss
        if term.slope is not None and new.slope is not None:
            term.slope[chosen] = new.slope
    term, new = pairs[0]
    if term.slope is not None:
        term.others.exps.movedim(1, -1)[chosen], term.others.total[chosen] = new.others


def _exponentials(logits: Tensor, work_space: Tensor) -> Tensor:
    """e^logits, up to a factor for each sample that keeps it within bounds."""
    logits = logits if logits.dtype == work_space.dtype else work_space.copy_(logits)
    if logits.numel() <= SMALL or (logits.shape[1] >= SOFTMAX_CLASSES and logits.stride(1) == 1):
        torch.softmax(logits.movedim(1, -1), -1, out=work_space.movedim(1, -1))
    else:
        torch.sub(logits, logits.amax(1, keepdim=True), out=work_space).mul_(LOG2_E).exp2_()
    return work_space


def _evaluate_by_gaps(logits: Tensor, classes: Tensor, settings: _Settings, work_space: Tensor) -> _Terms:
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

    scaled = plain = None
    if options.needs_scaled:
        log2_base = min(options.scale * LOG2_E, torch.finfo(gaps.dtype).max)
        scaled = logsumexp((gaps.mul if options.has_focal else gaps.mul_)(log2_base).exp2_(), options.scale)
    if options.needs_plain:
        plain = logsumexp(gaps.mul_(LOG2_E).exp2_(), 1.0)

    ldam = focal = None
    of_ldam = scaled or plain
    if options.has_ldam and of_ldam is not None:
        others, v = of_ldam
        v = v if margins is None else v.add(of_classes(margins, classes), alpha=options.scale)
        loss, slope = ldam_by_gap(v, with_grad)
        ldam = _Term(loss, None if slope is None else slope.mul_(options.scale), others)
    if options.has_focal and plain is not None:
        others, u = plain
        focal = _Term(*focal_by_gap(u, options.gamma), others)
    return ldam, focal


def _chunks(samples: _Samples) -> list[_Samples]:
    """Pieces of these samples along their first axis, of about ``CHUNK_ELEMENTS`` logits each."""
    n = len(samples.logits)
    size = max(1, CHUNK_ELEMENTS * n // max(1, samples.logits.numel()))
    if n <= size:
        return [samples]
    return [samples.map(itemgetter(slice(start, start + size))) for start in range(0, n, size)]
