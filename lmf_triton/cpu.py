"""The loss in plain PyTorch operations: the same contract and formulas as the kernels, gradient in closed form.

gpu.py is its counterpart with the same three functions.
"""

import torch
from torch import Tensor

from .options import LossOptions

# Logits are worked through in pieces of about this many elements, so that the passes over a piece find it in cache.
CHUNK_ELEMENTS = 1 << 18

BIG = 1e30  # stands for infinity where inf would meet a factor 0, as in kernels.py


def forward(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    *,
    with_grad: bool,
    with_coefs: bool,
) -> tuple[Tensor, Tensor | None, None]:
    """The loss and, where asked for, its gradient. :func:`backward` needs no coefficients: it starts again."""
    grad = torch.empty_like(logits) if with_grad else None
    return _evaluate(logits, target, margins, weight, options, grad), grad, None


def backward(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None,
    weight: Tensor | None,
    coefs: None,
    upstream: Tensor,
    options: LossOptions,
) -> Tensor:
    """The gradient of the logits for this upstream gradient."""
    grad = torch.empty_like(logits)
    _evaluate(logits, target, margins, weight, options, grad, upstream)
    return grad


def scale(grad: Tensor, upstream: Tensor, *, in_place: bool) -> Tensor:
    """``upstream * grad``, rounded once; in place, nothing is done when every upstream gradient is exactly 1."""
    if upstream.ndim > 0:
        upstream = upstream.unsqueeze(1)
    if in_place and bool((upstream == 1).all()):
        return grad
    scaled = grad.to(upstream.dtype) * upstream
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
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    margins = None if margins is None else margins.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    upstream = torch.ones((), dtype=dtype) if upstream is None else upstream
    ldam, focal = torch.zeros((2, *target.shape), dtype=dtype)  # the weighted terms of each sample
    tensors = logits, target, ldam, focal, upstream.expand(target.shape), grad
    if logits.ndim == 1:
        tensors = (None if t is None else t.unsqueeze(0) for t in tensors)
    chunks = _chunks(*tensors)

    totals = None
    if options.is_mean:
        weight_total, count = torch.zeros(2, dtype=torch.float64)
        for _, target_chunk, *_ in chunks:
            kept, classes = _classes(target_chunk, options.ignore_index)
            weight_total += _weights(weight, classes, kept, dtype).sum(dtype=torch.float64)
            count += kept.sum()
        totals = weight_total, count if options.reduction == "mean_per_term" else weight_total
    for chunk in chunks:
        _evaluate_chunk(*chunk, margins, weight, options, totals)

    if options.reduction == "none":
        return ldam.add_(focal)
    if totals is None:
        return ldam.add_(focal).sum(dtype=torch.float64).to(dtype)
    # 0 / 0 = NaN where no sample is left, as in F.cross_entropy; a term whose coefficient is 0 has no say in that.
    mean = torch.zeros((), dtype=torch.float64)
    for coefficient, term, total in (options.alpha, ldam, totals[0]), (options.beta, focal, totals[1]):
        if coefficient != 0:
            mean += term.sum(dtype=torch.float64) / total
    return mean.to(dtype)


def _evaluate_chunk(
    logits: Tensor,
    target: Tensor,
    ldam: Tensor,
    focal: Tensor,
    upstream: Tensor,
    grad: Tensor | None,
    margins: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    totals: tuple[Tensor, Tensor] | None,
) -> None:
    """Fill the terms and the gradient of a few samples; the class axis is axis 1, all others are sample axes."""
    dtype = ldam.dtype
    has_ldam, has_focal, unit_scale = options.alpha != 0, options.beta != 0, options.scale == 1
    kept, classes = _classes(target, options.ignore_index)
    index = classes.unsqueeze(1)

    # Row statistics: m, the largest of the other logits, and the sums of their exponentials relative to m. A gradient
    # of the arithmetic type is the work space of its own computation.
    gaps = grad if grad is not None and grad.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    gaps.copy_(logits).scatter_(1, index, -torch.inf)
    m = gaps.amax(1)
    m.masked_fill_(m == -torch.inf, 0)
    gaps.sub_(m.unsqueeze(1))
    scaled = gaps.mul(options.scale).exp_() if has_ldam and not unit_scale else None
    plain = gaps.exp_() if has_focal or unit_scale else None
    plain_sum = None if plain is None else plain.sum(1)
    scaled_sum = None if scaled is None else scaled.sum(1)

    # The two terms, and their slopes in the gap between the others and the target. An infinite x_y has no softmax.
    x_y = logits.gather(1, index).squeeze(1).to(dtype)
    gap = (m - x_y).masked_fill_(x_y == torch.inf, torch.nan)
    weights = _weights(weight, classes, kept, dtype)
    ldam_weights, focal_weights = (weights, weights) if totals is None else (weights / total for total in totals)
    plain_slope = torch.zeros_like(ldam)
    scaled_slope = torch.zeros_like(ldam)
    if has_focal:
        value, slope = _focal(gap + plain_sum.log(), options.gamma)
        torch.mul(weights, value, out=focal).mul_(options.beta)
        plain_slope += slope.mul_(focal_weights).mul_(options.beta)
    if has_ldam:
        shifted = gap if margins is None else gap + margins[classes]
        v = shifted + plain_sum.log() if unit_scale else options.scale * shifted + scaled_sum.log()
        value, _, slope, _ = _softplus_and_sigmoid(v)
        torch.mul(weights, value, out=ldam).mul_(options.alpha)
        slope.mul_(ldam_weights).mul_(options.alpha * options.scale)
        (plain_slope if unit_scale else scaled_slope).add_(slope)
    ignored = None if bool(kept.all()) else ~kept
    if ignored is not None:  # exactly 0, whatever their logits and the denominators are
        ldam.masked_fill_(ignored, 0)
        focal.masked_fill_(ignored, 0)
    if grad is None:
        return

    parts = [
        exponentials.mul_((upstream * slope / _nonzero(total)).unsqueeze(1))
        for exponentials, slope, total in ((plain, plain_slope, plain_sum), (scaled, scaled_slope, scaled_sum))
        if exponentials is not None
    ]
    result = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
    result.scatter_(1, index, (-upstream * (plain_slope + scaled_slope)).unsqueeze(1))
    if ignored is not None:
        result.masked_fill_(ignored.unsqueeze(1), 0)
    if result is not grad:
        grad.copy_(result)


def _chunks(logits: Tensor, *others: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Pieces of these tensors along their first axis, of about ``CHUNK_ELEMENTS`` logits each."""
    n = len(logits)
    size = max(1, CHUNK_ELEMENTS * n // max(1, logits.numel()))
    tensors = (logits, *others)
    return [tuple(None if t is None else t[start : start + size] for t in tensors) for start in range(0, n, size)]


def _classes(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Whether each sample takes part in the loss, and its class as int64 (0 where it does not)."""
    classes = target.long()  # before the comparison: uint8 has no -100, and would compare it as 156
    kept = classes != ignore_index
    return kept, classes.where(kept, 0)


def _weights(weight: Tensor | None, classes: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight of each sample, 0 where it is ignored."""
    return kept.to(dtype) if weight is None else weight[classes].where(kept, 0)


def _softplus_and_sigmoid(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """softplus(z), softplus(-z), sigmoid(z) and sigmoid(-z) from one exponential that cannot overflow."""
    t = z.abs().neg_().exp_()
    log1p_t = t.log1p()
    larger = (1 + t).reciprocal_()
    smaller = t.mul_(larger)
    positive = z >= 0
    return (
        z.clamp_min(0).add_(log1p_t),
        z.neg().clamp_min_(0).add_(log1p_t),
        larger.where(positive, smaller),
        smaller.where(positive, larger),
    )


def _focal(u: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of samples with gap u = logsumexp(others) - x_y; and its derivative in u."""
    u = u.clamp_min(-BIG)  # gamma = 0 at u = -inf: exp(-0 * inf) would be NaN
    nll, neg_log_q, q, p = _softplus_and_sigmoid(u)  # -log p_y, -log(1 - p_y), 1 - p_y, p_y
    factor = neg_log_q.mul_(-gamma).exp_()
    p_nll = p.mul_(nll.clamp_max(BIG))  # tends to 0 as u grows: 0 * inf would be NaN
    return factor * nll, p_nll.mul_(gamma).add_(q).mul_(factor)


def _nonzero(total: Tensor) -> Tensor:
    """A sum over no class is replaced by 1: its slope is 0."""
    return total.masked_fill(total == 0, 1)
