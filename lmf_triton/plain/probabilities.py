"""The loss in plain PyTorch where each class has a share in the sample: class probabilities, or smoothed indices.

With ``l_j`` the loss if the class were ``j``, a sample's loss is ``Σ c_j l_j``, where the *share* ``c_j`` of a class is
its probability times its weight. A class without share has no say, whatever its logit.

A *view* is a softmax ``p`` of the logits and the terms that see it: both see the same one, unless LDAM has a scale.
With ``k_j`` the slope of ``l_j``, its derivative in the gap between the others' logsumexp and ``x_j``, and with
``h_j = c_j k_j / (1 - p_j)``, the gradient is ``p_j Σ h - h_j``. Losses and slopes lose accuracy only where ``1 - p_j``
cancels, and that is for a class with more than half of the probability. So a sample's *leader* is set apart: no other
class has more than half. As the target in indices.py, it is handled by the odds against it or by its gap.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reduction, shapes
from ..options import Inputs, LossOptions
from ..reduction import Number, Pair
from ..shapes import arithmetic_dtype, class_axis
from .targets import of_classes, scale_rows, targets_on_device, targets_on_host
from .terms import (
    BIG,
    LOG2_E,
    MAX_MARGIN,
    MIN_ODDS,
    focal_by_gap,
    focal_by_odds,
    ldam_by_gap,
    ldam_by_odds,
)

# Logits are worked through in pieces of about this many elements. On the CPU a piece's buffers, 12 MiB together, fit in
# the third cache: on two cores of an AMD EPYC (torch 2.15) pieces of a sixteenth take half as long again, by overheads
# of small operations, and twice as large ones a tenth. Elsewhere the size only bounds the memory.
CHUNK_ELEMENTS = 1 << 19
DEVICE_CHUNK_ELEMENTS = 1 << 22
# Of fewer logits a piece is so small a part that all buffers, and what is kept of each sample, take less memory than
# the logits; down to where that is of no account.
CHUNKS_OF_FEW = 9
MIN_CHUNK_ELEMENTS = 1 << 15

# From this many classes on, the buffers have them side by side if the logits do; otherwise they have the samples so.
MANY_CLASSES = 16

MAX_SOFTMAX_CLASSES = 1 << 24  # whose numbers float32 has

# Other powers take PyTorch longer than a logarithm and an exponential.
FAST_EXPONENTS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0)

LN_2 = math.log(2)

MAJORITY = 0.5  # of the probability; up to here nothing cancels in 1 - p


class _View(NamedTuple):
    """A softmax, and the terms that see it."""

    scale: float  # of the logits
    ldam: Number | None  # the terms' coefficients, relative to settings.factor; None for a term that is not here
    focal: Number | None
    margins: Tensor | None  # LDAM's, times scale


class _Settings(NamedTuple):
    """What is the same for all samples."""

    views: tuple[_View, ...]
    gamma: float
    adjustment: Tensor | None
    by_probability: float | Tensor  # share of a class with probability 1, for each class where there are weights
    by_smoothing: float | Tensor | None  # what label smoothing adds
    factor: Number  # of shares times losses in the reduced loss
    with_grad: bool


class _Targets(NamedTuple):
    """As targets.py has them, and none of classes for probabilities."""

    classes: Tensor | None
    ignored: Tensor | None
    weights: Tensor | None
    denominators: Pair


class _Samples(NamedTuple):
    """Some samples. The classes are the last axis of what has them, and the other axes are the same for all."""

    logits: Tensor
    grad: Tensor | None  # to be filled
    probabilities: Tensor | None  # or classes with their shares
    classes: Tensor | None
    class_shares: Tensor | None
    ignored: Tensor | None
    upstream: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Samples":
        logits, *rest = (None if tensor is None else function(tensor) for tensor in self)
        assert logits is not None
        return _Samples(logits, *rest)


class _Buffers(NamedTuple):
    """Memory of shape ``(n, C)`` for some samples, named by what it ends with."""

    shares: Tensor
    losses: Tensor  # before: logits, log2 p
    p: Tensor
    slopes: Tensor  # over 1 - p, and times what h is multiplied by in the gradient
    rest: Tensor  # 1 - p, and more
    spare: Tensor
    grad: Tensor  # the spare one, unless another view follows


class _Leader(NamedTuple):
    """A class of each sample, ``(n, 1)``; all others have at most half of the probability."""

    number: Tensor
    p: Tensor
    q: Tensor  # of all others together
    share: Tensor


_Terms = tuple[Tensor, Tensor | None]  # losses and slopes, of one term or of both


def evaluate(inputs: Inputs, options: LossOptions, grad: Tensor | None, upstream: Tensor | None = None) -> Tensor:
    """The reduced loss; fills ``grad`` with its gradient, times ``upstream`` if given."""
    logits, target, *per_class, normalizer = inputs
    dtype, on_host, axis = arithmetic_dtype(logits), shapes.on_host(logits), class_axis(logits.shape)
    margins, weight, adjustment = (None if tensor is None else tensor.to(dtype) for tensor in per_class)
    targets = _targets(target, logits, weight, normalizer, options)
    factor, relative = _coefficients(options, targets.denominators)
    views = _views(options, relative, margins)
    kept, added = 1 - options.label_smoothing, options.label_smoothing / logits.shape[axis]
    settings = _Settings(
        views,
        options.gamma,
        adjustment,
        by_probability=kept if weight is None else kept * weight,
        by_smoothing=None if added == 0 else added if weight is None else added * weight,
        factor=factor,
        with_grad=grad is not None,
    )
    samples = _samples(logits, grad, target, targets, kept, upstream)
    chunks = list(_split(samples, 0, _chunk_elements(logits.numel()) if on_host else DEVICE_CHUNK_ELEMENTS))
    if on_host and logits.numel() > 0 and _softmax_may_be_used(logits.shape[axis], views):
        losses = _evaluate_by_softmax(chunks, settings)
    else:
        losses = [_evaluate_by_gaps(chunk, settings) for chunk in chunks]

    if options.rule.per_sample:
        # No view, which autograd would not let a user change in place.
        return torch.cat(losses).mul_(factor).resize_(inputs.sample_shape)
    loss = factor * sum(reduction.total(each, on_host=on_host) for each in losses)
    return loss.to(dtype) if isinstance(loss, Tensor) else torch.tensor(loss, dtype=dtype, device=logits.device)


def _targets(
    target: Tensor, logits: Tensor, weight: Tensor | None, normalizer: Tensor | None, options: LossOptions
) -> _Targets:
    """What the targets say about each sample; the denominators are numbers on the host."""
    dtype, on_host = arithmetic_dtype(logits), shapes.on_host(logits)
    n_classes = logits.shape[class_axis(logits.shape)]
    if target.is_floating_point():
        n_samples = logits.numel() // n_classes
        found = reduction.denominators(options.rule, n_samples, None, None, normalizer, on_host=on_host)
        targets = _Targets(None, None, None, found)
    elif on_host:
        targets = _Targets(*targets_on_host(target, n_classes, weight, normalizer, options))
    else:
        targets = _Targets(*targets_on_device(target, n_classes, weight, normalizer, options, dtype))

    def converted(number: Number) -> Number:
        if isinstance(number, Tensor) and not on_host:
            return number.to(dtype)  # a coefficient over a count would be float32
        return float(number) or math.nan

    return targets._replace(denominators=Pair(*map(converted, targets.denominators)))


def _coefficients(options: LossOptions, denominators: Pair) -> tuple[Number, Pair]:
    """What the term with the larger coefficient is multiplied by; and what both terms have relative to it."""
    alpha, beta = options.alpha, options.beta
    ratio: Number = 1.0
    if options.rule.focal_by_count and options.has_ldam and options.has_focal:
        ratio = denominators.ldam / denominators.focal
    if alpha >= beta:
        return alpha / denominators.ldam, Pair(1.0, beta / alpha * ratio)
    return beta / denominators.focal, Pair(alpha / beta / ratio, 1.0)


def _views(options: LossOptions, relative: Pair, margins: Tensor | None) -> tuple[_View, ...]:
    """One view, or two where the terms see different exponentials."""
    if not options.has_ldam:
        return (_View(1.0, None, relative.focal, None),)
    margins = None if margins is None else margins * options.scale
    if not options.has_focal:
        return (_View(options.scale, relative.ldam, None, margins),)
    if options.scale == 1:
        return (_View(1.0, relative.ldam, relative.focal, margins),)
    return _View(options.scale, relative.ldam, None, margins), _View(1.0, None, relative.focal, None)


def _softmax_may_be_used(n_classes: int, views: Sequence[_View]) -> bool:
    """Whether only a leader may have a small loss, and it is left to the logits that all odds are within bounds."""
    bounds = [float(bound) for view in views if view.margins is not None for bound in view.margins.aminmax()]
    return 1 < n_classes <= MAX_SOFTMAX_CLASSES and all(0 <= bound <= MAX_MARGIN for bound in bounds)


def _samples(
    logits: Tensor, grad: Tensor | None, target: Tensor, targets: _Targets, kept: float, upstream: Tensor | None
) -> _Samples:
    """All samples, with a first axis where there is but one, and all values where one stands for all."""
    axis = class_axis(logits.shape)
    class_shares = None
    if targets.weights is not None:
        class_shares = targets.weights * kept
    elif targets.classes is not None:
        class_shares = torch.full((), kept, dtype=arithmetic_dtype(logits), device=logits.device).expand(target.shape)
    samples = _Samples(
        logits.movedim(axis, -1),
        None if grad is None else grad.movedim(axis, -1),
        target.movedim(axis, -1) if targets.classes is None else None,
        targets.classes,
        class_shares,
        targets.ignored,
        None if upstream is None else upstream.expand(logits.select(axis, 0).shape),
    )
    return samples.map(lambda tensor: tensor.unsqueeze(0)) if logits.ndim == 1 else samples


def _chunk_elements(n_elements: int) -> int:
    """About how many elements a piece has on the CPU."""
    return min(CHUNK_ELEMENTS, max(MIN_CHUNK_ELEMENTS, n_elements // CHUNKS_OF_FEW))


def _split(samples: _Samples, axis: int, n_elements: int) -> Iterator[_Samples]:
    """Pieces along this axis; and along the next ones, where one index of this one has too many elements."""
    length, total = samples.logits.shape[axis], samples.logits.numel()
    if total <= n_elements:
        yield samples
        return
    size = max(1, n_elements * length // total)
    size = math.ceil(length / math.ceil(length / size))  # as many pieces, and the last one not much smaller
    for start in range(0, length, size):
        piece = samples.map(partial(torch.narrow, dim=axis, start=start, length=min(size, length - start)))
        if axis == samples.logits.ndim - 2:
            yield piece
        else:
            yield from _split(piece, axis + 1, n_elements)


def _evaluate_by_softmax(chunks: list[_Samples], settings: _Settings) -> list[Tensor]:
    """The losses of the samples of each chunk, from a softmax and the odds against leaders; fills their gradients."""
    logits = chunks[0].logits
    classes_last = logits.shape[-1] >= MANY_CLASSES and logits.stride(-1) == 1
    size = max(chunk.logits.numel() for chunk in chunks)
    n_buffers = len(_Buffers._fields) - (len(settings.views) == 1)
    memory = torch.empty(n_buffers, size, dtype=arithmetic_dtype(logits), device=logits.device)
    losses = []
    for chunk in chunks:
        buffers = _buffers(memory, chunk.logits, classes_last)
        shares = None if _has_own_shares(settings) else _in_place_of(buffers.shares, chunk.probabilities)
        if shares is None:
            shares = _fill_shares(buffers.shares, chunk, settings)
        own_grad = _in_place_of(buffers.grad, chunk.grad)
        grad = buffers.grad if own_grad is None else own_grad
        first, *others = settings.views
        of_chunk = _by_softmax(chunk, shares, first, settings, buffers, grad)
        for view in others:
            of_chunk.add_(_by_softmax(chunk, shares, view, settings, buffers, buffers.p))
            grad.add_(buffers.p)
        losses.append(_finished(of_chunk, grad, chunk))
        if own_grad is None and chunk.grad is not None:
            chunk.grad.copy_(grad.unflatten(0, chunk.grad.shape[:-1]))
    return losses


def _buffers(memory: Tensor, logits: Tensor, classes_last: bool) -> _Buffers:
    """Memory for these logits, in which either the classes or the samples lie side by side."""
    n_classes, memory = logits.shape[-1], memory[:, : logits.numel()]
    if classes_last:
        parts = memory.unflatten(1, (-1, n_classes)).unbind()
    else:
        parts = memory.unflatten(1, (n_classes, -1)).transpose(1, 2).unbind()
    return _Buffers._make((*parts[:6], parts[-1]))


def _classes_are_last(buffers: _Buffers) -> bool:
    """Whether the classes lie side by side. For samples so, two operations beat one with three operands."""
    return buffers.p.stride(1) == 1


def _in_place_of(buffer: Tensor, tensor: Tensor | None) -> Tensor | None:
    """A tensor in the shape of this buffer, if operations with other buffers are as fast and no copy is needed."""
    if tensor is None or tensor.dtype != buffer.dtype:
        return None
    try:
        rows = tensor.view(buffer.shape)
    except RuntimeError:  # its strides do not allow that
        return None
    side_by_side = buffer.stride().index(1)
    return rows if rows.stride(side_by_side) == 1 else None


def _copy(values: Tensor, buffer: Tensor) -> Tensor:
    """The buffer of shape ``(n, C)``, with these values."""
    buffer.unflatten(0, values.shape[:-1]).copy_(values)
    return buffer


def _has_own_shares(settings: _Settings) -> bool:
    """Whether shares are other than probabilities."""
    return isinstance(settings.by_probability, Tensor) or settings.by_probability != 1


def _fill_shares(shares: Tensor, samples: _Samples, settings: _Settings) -> Tensor:
    """The shares of all classes, in memory of shape ``(n, C)``."""
    if samples.probabilities is not None:
        _copy(samples.probabilities, shares).mul_(settings.by_probability)
        return shares if settings.by_smoothing is None else shares.add_(settings.by_smoothing)
    assert samples.classes is not None and samples.class_shares is not None
    shares.zero_()
    if settings.by_smoothing is not None:
        shares.add_(settings.by_smoothing)
    return shares.scatter_add_(1, samples.classes.reshape(-1, 1), samples.class_shares.reshape(-1, 1))


def _finished(losses: Tensor, grad: Tensor | None, samples: _Samples) -> Tensor:
    """The losses; and in place the gradient times the upstream gradient. Both are 0 for ignored samples."""
    ignored = None if samples.ignored is None else samples.ignored.reshape(-1, 1)
    if grad is not None and samples.grad is not None:
        upstream = None if samples.upstream is None else samples.upstream.reshape(-1, 1)
        if upstream is not None and not (shapes.on_host(grad) and bool(upstream.isfinite().all())):
            upstream = upstream.masked_fill((grad == 0).all(1, keepdim=True), 0)  # no share, and 0 it stays
        scale_rows(grad, ignored, upstream)
    return losses if ignored is None else losses.masked_fill_(ignored.squeeze(1), 0)


def _by_softmax(
    samples: _Samples, shares: Tensor, view: _View, settings: _Settings, buffers: _Buffers, grad: Tensor
) -> Tensor:
    """The losses of a view, ``(n,)``; fills its gradient."""
    largest_p = _fill_p(samples, view, settings, buffers)
    leader = _set_leader_apart(shares, buffers) if bool((largest_p > MAJORITY).any()) else None
    of_h = -float(settings.factor) * view.scale
    _fill_losses_and_slopes(view, of_h, settings, buffers)
    if leader is not None:
        for buffer in buffers.losses, buffers.slopes:
            buffer.scatter_(1, leader.number, torch.zeros_like(leader.p))
    losses = buffers.losses.mul_(shares).sum(1).mul_(-LN_2)
    within, slope = losses.isfinite(), None
    if leader is not None:
        of_leader, slope = _of_leader(leader, view, settings)
        losses.add_(of_leader.squeeze(1))
        odds = leader.q / leader.p
        within.logical_and_(((odds >= MIN_ODDS) & (odds <= 1 / MIN_ODDS)).squeeze(1))
    if settings.with_grad:
        buffers.slopes.mul_(shares)
        _fill_gradient(grad, buffers, leader, None if slope is None else slope.mul_(of_h))

    if not bool(within.all()):  # the few are computed by themselves
        extreme = within.logical_not_().nonzero().squeeze(1)
        logits = samples.logits[torch.unravel_index(extreme, samples.logits.shape[:-1])].to(losses.dtype)
        losses[extreme], new_grad = _by_gaps(logits, shares[extreme], view, settings)
        if new_grad is not None:
            grad[extreme] = new_grad
    return losses


def _fill_p(samples: _Samples, view: _View, settings: _Settings, buffers: _Buffers) -> Tensor:
    """Fill buffers with the probabilities that this view sees and their log2; returns the largest of each sample."""
    log_p, p = buffers.losses, buffers.p
    logits, factor = _in_place_of(log_p, samples.logits), view.scale * LOG2_E
    if logits is None:
        logits = _copy(samples.logits, log_p)
    if settings.adjustment is not None:
        logits, factor = torch.mul(logits, view.scale, out=log_p).add_(settings.adjustment), LOG2_E
    # In this order: to scale large logits first would round them, but where PyTorch does both at once.
    torch.sub(logits, logits.amax(1, keepdim=True), out=log_p).mul_(factor)
    total = torch.exp2(log_p, out=p).sum(1, keepdim=True)
    log_p.sub_(total.log2())
    largest_p = total.reciprocal_()
    p.mul_(largest_p)
    return largest_p


def _set_leader_apart(shares: Tensor, buffers: _Buffers) -> _Leader:
    """Take the class with more than half of the probability, or the first where there is none, out of p."""
    p, n_classes = buffers.p, buffers.p.shape[1]
    # Rounded, p is 1 for this class and 0 for the others. PyTorch takes three times as long for an argmax.
    numbers = torch.arange(n_classes, dtype=p.dtype)
    number = torch.round(p, out=buffers.spare).mul_(numbers).sum(1, keepdim=True)
    number = number.nan_to_num_(0).clamp_max_(n_classes - 1).long()  # two halves may both be rounded up
    p_leader = p.gather(1, number)
    p_others = p.scatter_(1, number, torch.zeros_like(p_leader)).sum(1, keepdim=True)
    return _Leader(number, p_leader, p_others, shares.gather(1, number))


def _fill_losses_and_slopes(view: _View, of_h: float, settings: _Settings, buffers: _Buffers) -> None:
    """Turn log2 p into the losses / -ln 2 of classes with p up to 1/2, and fill slopes with theirs, times ``of_h``."""
    ldam, focal = (None if coefficient is None else float(coefficient) for coefficient in (view.ldam, view.focal))
    focal_term = None
    if focal is not None:
        focal_term = _fill_focal_slopes(focal, of_h, settings, buffers)
    if ldam != 1:
        buffers.losses.mul_(ldam or 0.0)  # cross-entropy, which LDAM is but for the margins
    if focal_term is not None:
        buffers.losses.addcmul_(buffers.rest, focal_term)
    elif settings.with_grad:
        buffers.slopes.zero_()
    if ldam is not None:
        _add_ldam(ldam, of_h, view.margins, settings, buffers)


def _fill_focal_slopes(coefficient: float, of_h: float, settings: _Settings, buffers: _Buffers) -> Tensor:
    """Fill rest with 1 - p, and slopes; returns what rest is multiplied by in the losses.

    The slope over ``1 - p`` is ``(1 - p)^(γ-1) · ((1 - p) - γ p ln p)``. It is a reciprocal power since of ``1 - p`` to
    the ``-1/2``, which the usual ``γ`` needs, PyTorch is three times as fast as of the root.
    """
    _, log_p, p, slopes, rest, spare, _ = buffers
    torch.sub(torch.ones((), dtype=p.dtype), p, out=rest)
    exponent = 1 - settings.gamma
    if exponent in FAST_EXPONENTS:
        divisor = torch.pow(rest, exponent, out=spare)
    else:
        divisor = torch.neg(p, out=spare).log1p_().mul_(exponent * LOG2_E).exp2_()
    if coefficient != 1:
        divisor.div_(coefficient)
    if settings.with_grad:
        torch.addcdiv(torch.zeros((), dtype=p.dtype), rest, divisor, value=of_h, out=slopes)
    log_p_over = torch.div(log_p, divisor, out=spare)
    if settings.with_grad:
        slopes.addcmul_(p, log_p_over, value=-settings.gamma * LN_2 * of_h)
    return log_p_over


def _add_ldam(coefficient: float, of_h: float, margins: Tensor | None, settings: _Settings, buffers: _Buffers) -> None:
    """Add to the losses what the margins add to the cross-entropy, and LDAM's slopes.

    With ``M = e^margin`` that is ``log(M - (M - 1) p)``, and the slope over ``1 - p`` is ``M / (M - (M - 1) p)``.
    """
    if margins is None:
        if settings.with_grad:
            buffers.slopes.add_(coefficient * of_h)
        return
    factor = margins.exp()
    if _classes_are_last(buffers):
        odds = torch.addcmul(factor, buffers.p, -margins.expm1(), out=buffers.rest)
    else:
        odds = torch.mul(buffers.p, -margins.expm1(), out=buffers.rest).add_(factor)
    if settings.with_grad:
        buffers.slopes.addcdiv_(factor, odds, value=coefficient * of_h)
    # PyTorch takes log1p in two thirds of log's time.
    buffers.losses.sub_(odds.sub_(1).log1p_(), alpha=coefficient / LN_2)


def _of_leader(leader: _Leader, view: _View, settings: _Settings) -> _Terms:
    """The leader's losses and slopes, times its share."""
    ldam = focal = None
    if view.ldam is not None:
        q = leader.q
        if view.margins is not None:
            q = q * of_classes(view.margins.exp(), leader.number)
        ldam = ldam_by_odds(leader.p, q, settings.with_grad)
    if view.focal is not None:
        focal = focal_by_odds(leader.p, leader.q, settings.gamma, settings.with_grad)
    losses, slopes = _sum(view, ldam, focal)
    return losses.mul_(leader.share), None if slopes is None else slopes.mul_(leader.share)


def _sum(view: _View, ldam: _Terms | None, focal: _Terms | None) -> _Terms:
    """The terms that there are, times their coefficients."""
    terms = [(c, term) for c, term in ((view.ldam, ldam), (view.focal, focal)) if c is not None and term is not None]
    losses = [loss.mul_(c) for c, (loss, _) in terms]
    slopes = [slope.mul_(c) for c, (_, slope) in terms if slope is not None]
    return sum(losses[1:], losses[0]), sum(slopes[1:], slopes[0]) if slopes else None


def _fill_gradient(grad: Tensor, buffers: _Buffers, leader: _Leader | None, slope: Tensor | None) -> None:
    """The gradient from what is in the buffers: slopes times shares, as the leader's slope is."""
    p, h = buffers.p, buffers.slopes
    sum_h = whole = h.sum(1, keepdim=True)
    if leader is not None and slope is not None:
        whole = sum_h + slope + slope * leader.p / leader.q
    if _classes_are_last(buffers):
        torch.addcmul(h, p, whole, value=-1, out=grad)
    else:
        torch.sub(h, p.mul_(whole), out=grad)
    if leader is not None and slope is not None:
        grad.scatter_(1, leader.number, slope.addcmul_(leader.p, sum_h, value=-1))


def _evaluate_by_gaps(samples: _Samples, settings: _Settings) -> Tensor:
    """The same from the gaps between logits: slower, but for all options, values and devices."""
    logits = samples.logits.flatten(0, -2).to(arithmetic_dtype(samples.logits))
    shares = _fill_shares(torch.empty_like(logits), samples, settings)
    losses, grad = _by_gaps(logits, shares, settings.views[0], settings)
    for view in settings.views[1:]:
        more_losses, more_grad = _by_gaps(logits, shares, view, settings)
        losses.add_(more_losses)
        if grad is not None and more_grad is not None:
            grad.add_(more_grad)
    losses = _finished(losses, grad, samples)
    if grad is not None and samples.grad is not None:
        samples.grad.copy_(grad.unflatten(0, samples.grad.shape[:-1]))
    return losses


def _by_gaps(logits: Tensor, shares: Tensor, view: _View, settings: _Settings) -> _Terms:
    """The losses of a view, ``(n,)``, and its gradient, ``(n, C)``. Here the leader is the largest, or one of them."""
    factor = view.scale
    if settings.adjustment is not None:
        logits, factor = (logits * factor).add_(settings.adjustment), 1.0
    largest, leader = logits.max(1, keepdim=True)
    others = logits.scatter(1, leader, -torch.inf)
    second = others.amax(1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)  # there may be no others
    lead = (largest - second).masked_fill_(largest == torch.inf, torch.nan).mul_(factor)  # inf has no softmax
    others.sub_(second).mul_(factor)
    exps = others.exp()  # relative to the second, since relative to the largest they might all vanish
    total = exps.sum(1, keepdim=True)
    leader_p = (total * lead.neg().exp()).add_(1).reciprocal_()
    second_p = lead.neg().exp() * leader_p

    leader_share, without = shares.gather(1, leader), shares == 0
    losses, slope = _of_leader_by_gap(total.log() - lead, leader, view, settings)
    nll = others.neg_().add_(lead - leader_p.log())
    of_others, h = _of_others_by_gaps(exps * second_p, nll, view, settings)
    of_others.mul_(shares).masked_fill_(without, 0).scatter_(1, leader, losses.mul_(leader_share))
    nothing = without.all(1, keepdim=True)
    losses = of_others.sum(1).masked_fill_(nothing.squeeze(1), 0)
    if slope is None or h is None:
        return losses, None
    h.mul_(shares).scatter_(1, leader, torch.zeros_like(slope))
    sum_h, slope = h.sum(1, keepdim=True), slope.mul_(leader_share)
    grad = exps.mul_(sum_h * second_p + slope / total.clamp_min(1)).sub_(h)  # only the sum of none is less
    grad.scatter_(1, leader, sum_h * leader_p - slope)
    return losses, grad.mul_(settings.factor * view.scale).masked_fill_(nothing, 0)


def _of_leader_by_gap(u: Tensor, number: Tensor, view: _View, settings: _Settings) -> _Terms:
    """The leader's losses and slopes by its gap to the others, without its share."""
    ldam = focal = None
    if view.ldam is not None:
        v = u if view.margins is None else u + of_classes(view.margins, number)
        ldam = ldam_by_gap(v, settings.with_grad)
    if view.focal is not None:
        focal = focal_by_gap(u, settings.gamma)
    return _sum(view, ldam, focal)


def _of_others_by_gaps(p: Tensor, nll: Tensor, view: _View, settings: _Settings) -> _Terms:
    """The losses of classes with p up to 1/2, and their slopes over 1 - p, without their shares."""
    ldam = focal = None
    log_rest = torch.log1p(-p)
    if view.ldam is not None:
        v = nll + log_rest
        ldam = ldam_by_gap(v if view.margins is None else v.add_(view.margins), settings.with_grad)
    if view.focal is not None:
        power = (settings.gamma * log_rest).exp_()  # (1 - p)^gamma
        p_nll = p * nll.clamp_max(BIG)  # 0 where p is: 0 * inf would be NaN
        focal = nll * power, p_nll.mul_(settings.gamma).add_(1 - p).mul_(power)
    losses, slopes = _sum(view, ldam, focal)
    return losses, None if slopes is None else slopes.div_(1 - p)
