"""From class counts to LDAM margins, class-balanced weights and log priors."""

import math

import torch
from torch import Tensor

from .checks import as_float
from .counts import ClassCounts, counts_in_order


def ldam_margins(class_counts: ClassCounts, *, max_margin: float = 0.5, constant: float | None = None) -> Tensor:
    """Label-distribution-aware margins ``C0 / n_j^(1/4)``: the rarer the class, the wider its margin.

    Args:
        class_counts: training samples of each class, finite and positive: ``(C,)`` in the order of the logits, or a
            dict, ``Counter`` or pandas Series whose keys are the classes 0 to C - 1.
        max_margin: margin of the rarest class, which sets C0; >= 0. LDAM's and LMF's authors take 0.5.
        constant: C0 itself; >= 0. With it, ``max_margin`` has no say.

    Returns:
        ``(C,)`` float32, on the device of ``class_counts`` if that is a tensor, else on PyTorch's default device.

    Raises:
        TypeError: a count or a margin is not a number.
        ValueError: a count is not finite and positive (its class is named), the keys are not the classes, or a margin
            is negative or not finite.

    References:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", 2019, section 3.
    """
    widest = _not_negative("max_margin", max_margin)
    raw = [count**-0.25 for count in counts_in_order(class_counts)]
    factor = widest / max(raw) if constant is None else _not_negative("constant", constant)
    return _per_class([factor * each for each in raw], class_counts)


def class_balanced_weights(class_counts: ClassCounts, *, beta: float = 0.9999) -> Tensor:
    """Weights ``(1 - beta) / (1 - beta^n_j)``, the inverse effective numbers of samples, normalised to sum to C.

    Args:
        class_counts: training samples of each class, as for :func:`ldam_margins`.
        beta: in ``[0, 1)``. 0 weighs all classes equally; towards 1 the weights become inverse class frequencies.
            (Not the coefficient ``beta`` of the focal term.)

    Returns:
        ``(C,)`` float32, on the device of ``class_counts`` if that is a tensor, else on PyTorch's default device.

    Raises:
        TypeError: a count is not a number.
        ValueError: a count is not finite and positive (its class is named), the keys are not the classes, or beta is
            outside ``[0, 1)``.

    References:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019, eq. 2 and section 4.
    """
    beta = as_float("beta", beta)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta!r}")
    # 1 - beta^n without cancellation: for n = 1 and beta near 1 it is 1 - beta.
    log_beta = math.log(beta) if beta > 0 else -math.inf
    weights = [1 / -math.expm1(count * log_beta) for count in counts_in_order(class_counts)]
    factor = len(weights) / math.fsum(weights)
    return _per_class([factor * weight for weight in weights], class_counts)


def log_prior_adjustment(class_counts: ClassCounts, *, tau: float = 1.0) -> Tensor:
    """Logit adjustment ``tau * log(n_j / Σ n)``: the ``logit_adjustment`` of the losses, for training only.

    A network that is trained with it learns logits without the class frequencies of the training data, so that its
    largest logit minimises the balanced error (the mean error rate of the classes). So predict from the logits as they
    are, without the adjustment. With ``tau=1`` and ``alpha=0, gamma=0`` the loss is balanced softmax.

    Args:
        class_counts: training samples of each class, as for :func:`ldam_margins`.
        tau: how much of the log prior is added; >= 0. 0 is none.

    Returns:
        ``(C,)`` float32, none above 0, on the device of ``class_counts`` if that is a tensor, else on PyTorch's
        default device.

    Raises:
        TypeError: a count or tau is not a number.
        ValueError: a count is not finite and positive (its class is named), the keys are not the classes, or tau is
            negative, not finite or too large for float32.

    References:
        Menon et al., "Long-Tail Learning via Logit Adjustment", 2021, eq. 10 (https://arxiv.org/abs/2007.07314);
        Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", 2020, eq. 4
        (https://arxiv.org/abs/2007.10740), which is ``tau=1``.
    """
    factor = _not_negative("tau", tau)
    counts = counts_in_order(class_counts)
    largest = max(counts)
    log_total = math.log(largest) + math.log(math.fsum(count / largest for count in counts))  # the sum may overflow
    log_priors = [math.log(count) - log_total for count in counts]
    if factor * -min(log_priors) > torch.finfo(torch.float32).max:
        raise ValueError(f"tau must leave log priors within float32's range, got {tau!r}")
    return _per_class([factor * log_prior for log_prior in log_priors], class_counts)


def _per_class(values: list[float], class_counts: ClassCounts) -> Tensor:
    """The values where the counts are. Computed by Python: autocast, default dtypes and modes have no say in them."""
    device = class_counts.device if isinstance(class_counts, Tensor) else torch.get_default_device()
    with torch.inference_mode(False):  # a loss built in inference mode must train all the same
        return torch.tensor(values, dtype=torch.float32, device=device)


def _not_negative(name: str, value: float) -> float:
    number = as_float(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    return number
