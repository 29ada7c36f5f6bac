"""From class counts to LDAM margins, class-balanced weights, and the schedule that defers those weights."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn


def ldam_margins(
    class_counts: Sequence[float] | Tensor, *, max_margin: float = 0.5, constant: float | None = None
) -> Tensor:
    """Label-distribution-aware margins ``C0 / n_j^(1/4)``: the rarer the class, the wider its margin.

    Args:
        class_counts: training samples of each class, ``(C,)``, in the order of the logits; finite and positive.
        max_margin: margin of the rarest class, which sets C0; >= 0. LDAM's and LMF's authors take 0.5.
        constant: C0 itself; >= 0. With it, ``max_margin`` has no say.

    Returns:
        ``(C,)`` float32, on the device of ``class_counts`` if that is a tensor, else on PyTorch's default device.

    Raises:
        TypeError: a count or a margin is not a number.
        ValueError: a count is not finite and positive (its class is named), or a margin is negative or not finite.

    References:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", 2019, section 3.
    """
    _check_not_negative("max_margin", max_margin)
    raw = _counts(class_counts).pow(-0.25)
    if constant is None:
        margins = raw * (max_margin / raw.max())
    else:
        _check_not_negative("constant", constant)
        margins = constant * raw
    return margins.float().to(_device_for(class_counts))


def class_balanced_weights(class_counts: Sequence[float] | Tensor, *, beta: float = 0.9999) -> Tensor:
    """Weights ``(1 - beta) / (1 - beta^n_j)``, the inverse effective numbers of samples, normalised to sum to C.

    Args:
        class_counts: training samples of each class, ``(C,)``, in the order of the logits; finite and positive.
        beta: in ``[0, 1)``. 0 weighs all classes equally; towards 1 the weights become inverse class frequencies.
            (Not the coefficient ``beta`` of the focal term.)

    Returns:
        ``(C,)`` float32, on the device of ``class_counts`` if that is a tensor, else on PyTorch's default device.

    Raises:
        TypeError: a count is not a number.
        ValueError: a count is not finite and positive (its class is named), or beta is outside ``[0, 1)``.

    References:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019, eq. 2 and section 4.
    """
    if not isinstance(beta, Real):
        raise TypeError(f"beta must be a real number, got {beta!r} of type {type(beta).__name__}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta!r}")
    counts = _counts(class_counts)
    # 1 - beta^n without cancellation: for n = 1 and beta near 1 it is 1 - beta.
    log_beta = math.log(beta) if beta > 0 else -math.inf
    weights = 1 / -torch.expm1(counts * log_beta)
    return (weights * (len(weights) / weights.sum())).float().to(_device_for(class_counts))


class DeferredReweighting:
    """LDAM's schedule (DRW): train unweighted first, with class-balanced weights from ``start_epoch`` on.

    It writes into the ``weight`` buffer of a loss: any of this package's, or ``nn.CrossEntropyLoss``. A loss that was
    built without one gets a buffer of ones, which changes no value, so that its ``state_dict`` has the same keys in
    both stages and a resumed run needs nothing but ``step``::

        criterion = LDAMLoss(class_counts).to(device)
        schedule = DeferredReweighting(criterion, class_counts, start_epoch=160)
        for epoch in range(200):
            schedule.step(epoch)
            ...

    Args:
        criterion: the loss, a module with a buffer ``weight``, ``(C,)`` or ``None``.
        class_counts: training samples of each class, ``(C,)``, in the order of the logits; finite and positive.
        start_epoch: first epoch with class-balanced weights; >= 0. LDAM's authors take 160 of 200.
        beta: of :func:`class_balanced_weights`.

    Raises:
        TypeError: the criterion has no buffer ``weight``, or an argument is of the wrong type.
        ValueError: ``start_epoch`` is negative, the weight's length is not C, or as ``class_balanced_weights``.

    References:
        Cao et al. 2019, algorithm 1, with the weights of Cui et al. 2019.
    """

    def __init__(
        self,
        criterion: nn.Module,
        class_counts: Sequence[float] | Tensor,
        *,
        start_epoch: int,
        beta: float = 0.9999,
    ) -> None:
        if "weight" not in getattr(criterion, "_buffers", {}):
            raise TypeError(f"criterion must be a loss module with a buffer 'weight', got {type(criterion).__name__}")
        _check_epoch("start_epoch", start_epoch)
        self.criterion = criterion
        self.start_epoch = start_epoch
        self._deferred = class_balanced_weights(class_counts, beta=beta)
        if criterion.weight is None:
            device = next((buffer.device for buffer in criterion.buffers()), self._deferred.device)
            criterion.weight = torch.ones_like(self._deferred, device=device)
        if criterion.weight.shape != self._deferred.shape:
            raise ValueError(
                f"class_counts must have one count for each of the loss's {len(criterion.weight)} class weights, "
                f"got {len(self._deferred)}"
            )
        self._initial = criterion.weight.detach().clone()

    def step(self, epoch: int) -> None:
        """Set the weights of this epoch, the first being 0. In place: a captured CUDA graph sees them too."""
        _check_epoch("epoch", epoch)
        self.criterion.weight.copy_(self._initial if epoch < self.start_epoch else self._deferred)


def _counts(class_counts: Sequence[float] | Tensor) -> Tensor:
    """The class counts in float64 on the CPU, or an error that names the class at fault."""
    try:
        counts = torch.as_tensor(class_counts, device="cpu").detach()
        if counts.is_complex():
            raise TypeError("complex counts")
        counts = counts.to(torch.float64)
    except (TypeError, RuntimeError, ValueError) as error:
        raise TypeError(f"class_counts must be numbers, one a class, got {class_counts!r}") from error
    if counts.ndim != 1 or len(counts) == 0:
        raise ValueError(f"class_counts must have shape (C,) with C >= 1, got {tuple(counts.shape)}")
    for class_index, count in enumerate(counts.tolist()):
        if not (math.isfinite(count) and count > 0):
            raise ValueError(
                f"class_counts must be finite and positive, got {count:g} for class {class_index}: "
                "leave the class out, or give it the count 1"
            )
    return counts


def _device_for(class_counts: Sequence[float] | Tensor) -> torch.device:
    return class_counts.device if isinstance(class_counts, Tensor) else torch.get_default_device()


def _check_not_negative(name: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")


def _check_epoch(name: str, epoch: int) -> None:
    if not isinstance(epoch, int):
        raise TypeError(f"{name} must be an integer, got {epoch!r} of type {type(epoch).__name__}")
    if epoch < 0:
        raise ValueError(f"{name} must be at least 0, got {epoch}")
