"""The loss as a function: checks, and the choice between the Triton kernels and plain PyTorch."""

from functools import lru_cache
from numbers import Integral, Real
from types import ModuleType

import torch
from torch import Tensor

from . import cpu
from .autograd import LMFFunction
from .options import REDUCTIONS, LossOptions

try:
    from . import gpu
except ImportError:  # Triton is not installed
    gpu = None

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
FLOAT32, INT64 = torch.finfo(torch.float32), torch.iinfo(torch.int64)


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
    grad_in_forward: bool | None = None,
    check_target: bool = False,
) -> Tensor:
    r"""Large-Margin-aware Focal loss: a weighted sum of LDAM and focal loss, computed in one pass over the logits.

    .. math::
        \ell = w_y \left( \alpha\, \mathrm{LDAM} + \beta\, (1 - p_y)^\gamma (-\log p_y) \right), \quad
        \mathrm{LDAM} = -\log \frac{e^{s (x_y - \Delta_y)}}{e^{s (x_y - \Delta_y)} + \sum_{j \ne y} e^{s x_j}}

    with logits x, target class y, p = softmax(x), margins Δ, scale s and class weights w. Special cases:
    ``alpha=0, gamma=0`` is cross-entropy, ``alpha=0`` focal loss, ``beta=0`` LDAM.

    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float16, bfloat16, float32 or float64; any strides.
            Never modified.
        target: class of each sample, ``()``, ``(N,)`` or ``(N, d1, ..., dk)``; any integer dtype, which the kernels
            read as it is.
        margins: Δ, ``(C,)``, any floating dtype; see :func:`lmf_triton.ldam_margins`. ``None`` is no margin.
        alpha: coefficient of the LDAM term, >= 0. (Not a class weight, which other libraries call alpha.)
        beta: coefficient of the focal term, >= 0.
        gamma: focusing exponent of the focal term, >= 0.
        scale: s of the LDAM term, > 0. The paper has 1; LDAM's authors take 30 for a normalised classifier.
        weight: class weights w, ``(C,)``, any floating dtype. They multiply the whole loss of a sample and stay
            outside the focal factor.
        ignore_index: target value of samples that have loss 0 and gradient 0.
        reduction: ``"none"``; ``"sum"``; ``"mean"``, the weighted mean Σ w·l / Σ w of
            :func:`torch.nn.functional.cross_entropy`; or ``"mean_per_term"``, α·Σ w·LDAM / Σ w + β·Σ w·Focal / (number
            of samples), the averaging in the LMF authors' code. Sums and means leave out ignored samples.
        grad_in_forward: when the gradient is computed. ``True``: with the loss, so that the logits are read once.
            ``False``: in backward, from the logits and a few floats a sample (on the CPU from the loss's own
            arguments). ``None`` takes ``True`` for sums and means and ``False`` for ``"none"`` and for float16, where
            the gradient of a mean would underflow before a loss scale reaches it.
        check_target: raise on targets that are out of range on the GPU too, at the price of a synchronisation.

    Returns:
        The loss, float32 (float64 for float64 logits), a scalar or for ``"none"`` of the target's shape. The gradient
        has the logits' dtype, and their strides where they are dense (otherwise those of ``torch.empty_like``).

        On the GPU a launch covers all samples whose positions fit two strides; this holds for 1-d and 2-d logits of
        any strides, and for contiguous and channels_last ones of any dimension. Other layouts take one launch for
        each index of the dimensions that are left over.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device or option is wrong.
        IndexError: on the CPU, or with ``check_target``, a target is outside ``[0, C)`` and not ``ignore_index``.
            Otherwise the loss and the gradient of that sample are NaN.

    References:
        Sadi et al., "LMFLoss: A Hybrid Loss for Imbalanced Medical Image Classification", 2022, eq. 3
        (https://arxiv.org/abs/2212.12741); Cao et al. 2019 for LDAM (https://arxiv.org/abs/1906.07413);
        Lin et al. 2017 for focal loss (https://arxiv.org/abs/1708.02002).
    """
    try:
        options = _known_options(alpha, beta, gamma, scale, ignore_index, reduction)
    except TypeError:  # not hashable, or wrong indeed
        options = check_options(alpha, beta, gamma, scale, ignore_index, reduction)
    _check_tensors(logits, target, margins, weight)
    if not (grad_in_forward is None or isinstance(grad_in_forward, bool)):
        raise TypeError(f"grad_in_forward must be True, False or None, got {grad_in_forward!r}")
    backend = _backend(logits)
    if check_target and backend is not cpu:  # cpu.py always checks
        cpu.target_range(target, logits.shape[min(logits.ndim - 1, 1)], ignore_index)

    if not (logits.requires_grad and torch.is_grad_enabled()):
        loss, _, _ = backend.forward(logits, target, margins, weight, options, with_grad=False, with_saved=False)
        return loss
    if grad_in_forward is None:
        grad_in_forward = reduction != "none" and logits.dtype != torch.float16
    loss, _ = LMFFunction.apply(logits, target, margins, weight, options, grad_in_forward, backend)
    return loss


def check_options(
    alpha: float, beta: float, gamma: float, scale: float, ignore_index: int, reduction: str
) -> LossOptions:
    """The options as one value, or a TypeError or ValueError that says which is wrong."""
    for name, value in ("alpha", alpha), ("beta", beta), ("gamma", gamma), ("scale", scale):
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}")
        if not (value == 0 or FLOAT32.tiny <= value <= FLOAT32.max):
            raise ValueError(f"{name} must be 0 or positive, finite and within float32's range, got {value!r}")
    if alpha == 0 and beta == 0:
        raise ValueError("alpha and beta are both 0: expected at least one term of the loss")
    if scale == 0:
        raise ValueError(f"scale must be greater than 0, got {scale!r}")
    if not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r} of type {type(ignore_index).__name__}")
    if not INT64.min <= ignore_index <= INT64.max:
        raise ValueError(f"ignore_index must be within int64's range, got {ignore_index!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    return LossOptions(float(alpha), float(beta), float(gamma), float(scale), int(ignore_index), reduction)


# The same few settings come with every batch: to check them again costs as much as to check the tensors.
_known_options = lru_cache(maxsize=256, typed=True)(check_options)


def _check_tensors(logits: Tensor, target: Tensor, margins: Tensor | None, weight: Tensor | None) -> None:
    for name, tensor in ("logits", logits), ("target", target):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if target.dtype not in INTEGER_DTYPES:
        raise TypeError(f"target must hold class indices of an integer dtype, got {target.dtype}")
    shape = logits.shape
    if len(shape) == 0:
        raise ValueError("logits must have shape (C,), (N, C) or (N, C, d1, ..., dk), got a scalar")
    expected = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    if target.shape != expected:
        raise ValueError(
            f"target must have the shape of logits without the class axis, {tuple(expected)} for logits of shape "
            f"{tuple(shape)}, got {tuple(target.shape)}"
        )
    n_classes = shape[min(len(shape) - 1, 1)]
    if n_classes == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(shape)}")
    if target.device != logits.device:
        raise ValueError(f"target must be on the device of logits, {logits.device}, got {target.device}")
    for name, per_class in ("margins", margins), ("weight", weight):
        check_per_class(name, per_class, n_classes)
        if per_class is not None and per_class.device != logits.device:
            raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {per_class.device}")


def check_per_class(name: str, per_class: Tensor | None, n_classes: int | None) -> None:
    """Raise a TypeError or ValueError unless this is one floating-point value a class, without gradient, or None."""
    if per_class is None:
        return
    if not isinstance(per_class, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(per_class).__name__}")
    if per_class.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be of a floating-point dtype, float16 to float64, got {per_class.dtype}")
    if per_class.ndim != 1 or n_classes not in (None, len(per_class)):
        expected = "(C,)" if n_classes is None else f"({n_classes},)"
        raise ValueError(f"{name} must have one value a class, shape {expected}, got {tuple(per_class.shape)}")
    if per_class.requires_grad:
        raise ValueError(f"{name} has no gradient in this loss, got a tensor with requires_grad=True")


def _backend(logits: Tensor) -> ModuleType:
    """The module that computes the loss on the device of the logits."""
    device = logits.device.type
    if device == "cpu":
        return gpu if gpu is not None and gpu.INTERPRETED else cpu
    if device != "cuda":
        raise ValueError(f"logits must be on a CPU or CUDA (or ROCm) device, got {logits.device}")
    if gpu is None:
        raise ValueError(f"logits on {logits.device} need Triton, which is not installed: pip install triton")
    return gpu
