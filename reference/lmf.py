"""The equations of the LMF loss, literally, in plain PyTorch with autograd's own backward.

In float64 this is the oracle of the tests; in the logits' own dtype it is the "eager PyTorch" of every benchmark.
No numerical tricks: `1 - p` cancels for confident samples, as it does in the code that people write by hand.

Every function takes logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)`` and a target without the class axis;
``lmf_loss`` also one with it, of class probabilities.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _class_axis(logits: Tensor) -> int:
    return 0 if logits.ndim == 1 else 1


def _of_target(per_class: Tensor, target: Tensor) -> Tensor:
    """``per_class[..., target, ...]`` along the class axis: one value a sample."""
    axis = _class_axis(per_class)
    return per_class.gather(axis, target.unsqueeze(axis)).squeeze(axis)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """``-log p_y`` of every sample, ``p = softmax(logits)``."""
    return -_of_target(logits.log_softmax(_class_axis(logits)), target)


def focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """``(1 - p_y)^gamma * (-log p_y)`` of every sample (Lin et al. 2017, eq. 4)."""
    nll = cross_entropy(logits, target)
    return (1 - torch.exp(-nll)) ** gamma * nll


def _adjusted(logits: Tensor, adjustment: Tensor | None) -> Tensor:
    """The logits plus one number for each class (Menon et al. 2021, eq. 10)."""
    if adjustment is None:
        return logits
    axis = _class_axis(logits)
    return logits + adjustment.to(logits.dtype).view(-1, *(1,) * (logits.ndim - 1 - axis))


def ldam(
    logits: Tensor, target: Tensor, margins: Tensor | None, scale: float, adjustment: Tensor | None = None
) -> Tensor:
    """Cross-entropy of ``scale * (x_y - margin_y, x_others)`` for every sample (Cao et al. 2019, eq. 13).

    An adjustment of the logits belongs to a softmax of scale 1: it is added to the scaled logits.
    """
    if margins is not None:
        axis = _class_axis(logits)
        shift = torch.zeros_like(logits).scatter(
            axis, target.unsqueeze(axis), margins.to(logits.dtype)[target].unsqueeze(axis)
        )
        logits = logits - shift
    return cross_entropy(_adjusted(scale * logits, adjustment), target)


def lmf_loss(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.5,
    scale: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_adjustment: Tensor | None = None,
    normalizer: float | Tensor | tuple[float | Tensor, float | Tensor] | None = None,
) -> Tensor:
    """``w_y * (alpha * LDAM + beta * Focal)``, reduced (Sadi et al. 2022, eq. 3).

    A target of the logits' shape holds the probability of each class: the loss is then the sum of the losses that the
    sample would have if its class were j, times weight and probability of j. So it is with label smoothing.

    ``normalizer`` takes the place of what a mean divides by, or of both that ``"mean_per_term"`` divides by.
    """
    if target.is_floating_point():
        kept = torch.ones_like(target.select(_class_axis(logits), 0), dtype=torch.bool)
        probabilities = target.to(logits.dtype)
        w = kept.to(logits.dtype)  # each sample counts as one
    else:
        kept = target != ignore_index
        target = torch.where(kept, target, 0).long()
        probabilities = None
        w = torch.ones_like(target, dtype=logits.dtype) if weight is None else weight.to(logits.dtype)[target]
        w = torch.where(kept, w, 0)

    denominators = w.sum(), kept.sum() if reduction == "mean_per_term" else w.sum()
    if normalizer is not None:
        denominators = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)

    if label_smoothing != 0 and probabilities is None:
        probabilities = torch.zeros_like(logits).scatter(_class_axis(logits), target.unsqueeze(_class_axis(logits)), 1)
    if probabilities is not None:
        probabilities = (1 - label_smoothing) * probabilities + label_smoothing / logits.shape[_class_axis(logits)]

    def expected(loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighted loss of every sample: of its class, or of each class in turn."""
        if probabilities is None:
            return w * loss(target)
        total = torch.zeros_like(w)
        for j, q in enumerate(probabilities.unbind(_class_axis(logits))):
            q = q if weight is None else weight[j].to(logits.dtype) * q
            # What has no share contributes 0, though its loss be infinite: 0 * inf is NaN, and so is its gradient.
            of_class = loss(torch.full_like(total, j, dtype=torch.long))
            total = total + q * torch.where(q == 0, 0, of_class)
        return total

    # A term with coefficient 0 is left out, so that an infinite loss does not turn into 0 * inf.
    terms = []
    if alpha != 0:
        terms.append((expected(lambda y: alpha * ldam(logits, y, margins, scale, logit_adjustment)), denominators[0]))
    if beta != 0:
        terms.append((expected(lambda y: beta * focal(_adjusted(logits, logit_adjustment), y, gamma)), denominators[1]))
    terms = [(torch.where(kept, term, 0), denominator) for term, denominator in terms]

    if reduction == "mean_per_term":
        return sum(term.sum() / denominator for term, denominator in terms)
    loss = sum(term for term, _ in terms)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / denominators[0]
    raise ValueError(f"unknown reduction {reduction!r}")
