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
    loss = torch.empty(target.shape, dtype=dtype)
    upstream = torch.ones((), dtype=dtype) if upstream is None else upstream
    batch = [logits, target, loss, upstream.expand(target.shape), grad]
    if logits.ndim == 1:
        batch = [t if t is None else t.unsqueeze(0) for t in batch]
    chunks = _chunks(*batch)

    ldam_factor, focal_factor = options.alpha, options.beta
    if options.is_mean:
        # Tensors, so that a denominator of 0 gives inf and the loss 0 * inf = NaN, as in F.cross_entropy.
        weight_total = torch.zeros((), dtype=dtype)
        count = torch.zeros((), dtype=dtype)
        for _, target_chunk, *_ in chunks:
            kept, classes = _classes(target_chunk, options.ignore_index)
            count += kept.sum()
            weight_total += _weights(weight, classes, kept, dtype).sum()
        ldam_factor = ldam_factor / weight_total
        focal_factor = focal_factor / (count if options.reduction == "mean_per_term" else weight_total)

    for chunk in chunks:
        _evaluate_chunk(*chunk, margins, weight, options, ldam_factor, focal_factor)
    if options.reduction == "none":
        return loss
    loss = loss.sum()
    if options.is_mean:
        for coefficient, factor in (options.alpha, ldam_factor), (options.beta, focal_factor):
            if coefficient != 0:
                loss = loss + 0 * factor
    return loss


def _evaluate_chunk(
    logits: Tensor,
    target: Tensor,
    loss: Tensor,
    upstream: Tensor,
    grad: Tensor | None,
    margins: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    ldam_factor: float | Tensor,
    focal_factor: float | Tensor,
) -> None:
    """Fill ``loss`` and ``grad`` for a few samples; the class axis is axis 1, all else are sample axes."""
    dtype = loss.dtype
    has_ldam, has_focal, unit_scale = options.alpha != 0, options.beta != 0, options.scale == 1
    kept, classes = _classes(target, options.ignore_index)
    index = classes.unsqueeze(1)

    # The largest logit m of the others, their distance to it, and the sums of their exponentials. A gradient of the
    # arithmetic type is the work space of its own computation.
    x_y = logits.gather(1, index).squeeze(1).to(dtype)
    gaps = grad if grad is not None and grad.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    gaps.copy_(logits).scatter_(1, index, -torch.inf)
    m = gaps.amax(1)
    m.masked_fill_(m == -torch.inf, 0)
    gaps.sub_(m.unsqueeze(1))
    scaled = None if unit_scale or not has_ldam else gaps.mul(options.scale).exp_()
    plain = gaps.exp_() if has_focal or unit_scale else None
    plain_sum = None if plain is None else plain.sum(1)
    scaled_sum = None if scaled is None else scaled.sum(1)

    # Loss, and its slopes in the gaps of the two kinds.
    gap = (m - x_y).masked_fill_(x_y == torch.inf, torch.nan)
    weights = _weights(weight, classes, kept, dtype)
    loss.zero_()
    plain_slope = torch.zeros_like(loss)
    scaled_slope = torch.zeros_like(loss)
    if has_focal:
        focal, d_focal = _focal(gap + plain_sum.log(), options.gamma)
        factor = focal_factor * weights
        loss += factor * focal
        plain_slope += factor * d_focal
    if has_ldam:
        shifted = gap if margins is None else gap + margins[classes]
        ldam, _, d_ldam, _ = _softplus_and_sigmoid(
            shifted + plain_sum.log() if unit_scale else options.scale * shifted + scaled_sum.log()
        )
        factor = ldam_factor * weights
        loss += factor * ldam
        (plain_slope if unit_scale else scaled_slope).add_(factor * d_ldam, alpha=options.scale)
    ignored = None if bool(kept.all()) else ~kept
    if ignored is not None:
        loss.masked_fill_(ignored, 0)
    if grad is None:
        return

    result = torch.zeros((), dtype=dtype)
    if plain is not None:
        result = plain.mul_((upstream * plain_slope / _nonzero(plain_sum)).unsqueeze(1))
    if scaled is not None:
        scaled.mul_((upstream * scaled_slope / _nonzero(scaled_sum)).unsqueeze(1))
        result = scaled if plain is None else result.add_(scaled)
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
