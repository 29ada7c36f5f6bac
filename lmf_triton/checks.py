"""Every check of an argument of the loss, once: an error that quotes what was given and what was expected."""

import math
import sys
import warnings
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import hints
from .options import Inputs, LossOptions
from .reduction import RULES, Normalizer, Number
from .shapes import class_axis, extremes, without_classes

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
FLOAT32, INT64 = torch.finfo(torch.float32), torch.iinfo(torch.int64)


def check_options(
    alpha: float,
    beta: float,
    gamma: float,
    scale: float,
    ignore_index: int,
    reduction: str,
    label_smoothing: float = 0.0,
) -> LossOptions:
    """The options as one value, or a TypeError or ValueError that says which is wrong."""
    given = alpha, beta, gamma, scale, ignore_index, reduction, label_smoothing
    if torch.compiler.is_compiling():  # Dynamo warns of a cache
        return _check_options(*given)
    try:
        return _known_options(*given)
    except TypeError:  # not hashable, or wrong indeed
        return _check_options(*given)


def _check_options(
    alpha: float,
    beta: float,
    gamma: float,
    scale: float,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> LossOptions:
    given = {"alpha": alpha, "beta": beta, "gamma": gamma, "scale": scale}
    numbers = {name: as_float(name, value) for name, value in given.items()}
    for name, value in numbers.items():
        if not (value == 0 or FLOAT32.tiny <= value <= FLOAT32.max):
            raise ValueError(f"{name} must be 0 or positive, finite and within float32's range, got {given[name]!r}")
    if alpha == 0 and beta == 0:
        raise ValueError("alpha and beta are both 0: expected at least one term of the loss")
    if scale == 0:
        raise ValueError(f"scale must be greater than 0, got {scale!r}")
    ignore_index = as_int("ignore_index", ignore_index)
    if not INT64.min <= ignore_index <= INT64.max:
        raise ValueError(f"ignore_index must be within int64's range, got {ignore_index!r}")
    if not isinstance(reduction, str) or reduction not in RULES:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, RULES))}, got {reduction!r}")
    smoothing = as_float("label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    return LossOptions(**numbers, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)


# The same few settings come with every batch: to check them again costs as much as to check the tensors.
_known_options = lru_cache(maxsize=256, typed=True)(_check_options)


def as_float(name: str, value: object) -> float:
    """The number as Python's, infinite where that cannot hold it; a TypeError if it is none, or a tensor."""
    number = python_number(value)
    if not isinstance(number, Real):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}")
    try:
        return float(number)
    except OverflowError:
        return math.inf


def as_int(name: str, value: object) -> int:
    """The integer as Python's, or a TypeError. True is no integer, as for PyTorch."""
    number = python_number(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    return int(number)


def python_number(value: Any) -> Any:
    """Python's number for one of NumPy's, which may be an array without axes; anything else as it is."""
    is_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_numpy else value


def check_grad_in_forward(grad_in_forward: object) -> None:
    """Raise a TypeError unless it is True, False or None."""
    if not (grad_in_forward is None or isinstance(grad_in_forward, bool)):
        raise TypeError(f"grad_in_forward must be True, False or None, got {grad_in_forward!r}")


def check_inputs(inputs: Inputs) -> None:
    """Raise a TypeError or ValueError unless types, dtypes, shapes and devices fit together."""
    logits, target, margins, weight, adjustment, _ = inputs
    for name, tensor in ("logits", logits), ("target", target):
        check_kind(name, tensor, "a tensor")
    if logits.dtype not in FLOAT_DTYPES:
        hint = hints.for_logits(logits, target)
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}{hint}")
    shape = logits.shape
    if len(shape) == 0:
        raise ValueError("logits must have shape (C,), (N, C) or (N, C, d1, ..., dk), got a scalar")
    _check_target_fits(logits, target)
    n_classes = shape[class_axis(shape)]
    if n_classes == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(shape)}")
    if target.device != logits.device:
        raise ValueError(
            f"target must be on the device of logits, {logits.device}, got {target.device}: "
            "give target.to(logits.device)"
        )
    for name, per_class in ("margins", margins), ("weight", weight), ("logit_adjustment", adjustment):
        check_per_class(name, per_class, n_classes)
        if per_class is not None and per_class.device != logits.device:
            raise ValueError(
                f"{name} must be on the device of logits, {logits.device}, got {per_class.device}: "
                f"give {name}.to(logits.device), or move the loss that has it, criterion.to({str(logits.device)!r})"
            )


def _check_target_fits(logits: Tensor, target: Tensor) -> None:
    """Classes have the samples' shape and an integer dtype, probabilities that of the logits and a floating one."""
    is_index = target.dtype in INTEGER_DTYPES
    if is_index and target.shape == without_classes(logits.shape):
        return
    shape, given = tuple(logits.shape), tuple(target.shape)
    if target.dtype in FLOAT_DTYPES and given == shape:
        if target.requires_grad:
            raise ValueError(
                "target has no gradient in this loss, got class probabilities with requires_grad=True: "
                "give target.detach()"
            )
        if shape[class_axis(shape)] == 1 and not torch.compiler.is_compiling():
            warnings.warn(
                f"the loss of logits with a single class is 0, got shape {shape}{hints.SINGLE_LOGIT}, with the class "
                "of each sample as target",
                UserWarning,
                stacklevel=4,  # who called lmf_loss
            )
        return
    if not is_index:
        raise TypeError(
            "target must hold class indices of an integer dtype, or class probabilities of a floating-point dtype and "
            f"the shape of logits, got {target.dtype} of shape {given} for logits of shape "
            f"{shape}{hints.for_target(logits, target)}"
        )
    raise ValueError(
        "target must have the shape of logits without the class axis, "
        f"{tuple(without_classes(logits.shape))} for logits of shape {shape}, "
        f"got {given}{hints.for_target(logits, target)}"
    )


def check_normalizer(normalizer: Normalizer, options: LossOptions, logits: Tensor) -> None:
    """Raise a TypeError or ValueError unless each denominator of the mean is a number above 0 or a tensor of one."""
    if not options.rule.is_mean:
        raise ValueError(f"normalizer stands for a mean's denominator, which reduction={options.reduction!r} has not")
    if not isinstance(normalizer, tuple):
        _check_denominator(normalizer, logits.device)
        return
    if not options.rule.focal_by_count:
        raise ValueError(f"normalizer must be one number for reduction={options.reduction!r}, got {normalizer!r}")
    if len(normalizer) != 2:
        raise ValueError(f"normalizer must be one number, or a pair (Σ w, number of samples), got {normalizer!r}")
    for number in normalizer:
        _check_denominator(number, logits.device)


def _check_denominator(number: Number, device: torch.device) -> None:
    if isinstance(number, Tensor):
        check_kind("normalizer", number, "a tensor")
        if number.dtype not in FLOAT_DTYPES + INTEGER_DTYPES:
            raise TypeError(f"normalizer must be of a floating-point or integer dtype, got {number.dtype}")
        if number.ndim != 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {tuple(number.shape)}")
        if number.requires_grad:
            raise ValueError("normalizer has no gradient in this loss, got a tensor with requires_grad=True")
        if number.device != device:
            raise ValueError(
                f"normalizer must be a number or on the device of logits, {device}, got {number.device}: give "
                f".to({str(device)!r}), or .item() of a CPU tensor"
            )
        return
    as_python = python_number(number)
    if isinstance(as_python, bool) or not isinstance(as_python, Real):
        raise TypeError(f"normalizer must be a number or a 0-d tensor, got {number!r} of type {type(number).__name__}")
    if not FLOAT32.tiny <= as_float("normalizer", number) <= FLOAT32.max:
        raise ValueError(f"normalizer must be greater than 0, finite and within float32's range, got {number!r}")


def check_classes(inputs: Inputs, ignore_index: int) -> None:
    """Raise an IndexError for a class that is out of range, at the price of a synchronisation."""
    if not inputs.has_probabilities:
        logits = inputs.logits
        check_target(inputs.target, logits.shape[class_axis(logits.shape)], ignore_index)


def check_target(target: Tensor, n_classes: int, ignore_index: int) -> tuple[int, int]:
    """Raise an IndexError that names the first target that is neither a class nor ``ignore_index``.

    Returns:
        The smallest and the largest target; 0 and 0 of none. The host waits for them.
    """
    if target.numel() == 0:
        return 0, 0
    wide = target.long()  # uint8 has no -100, and would compare it as 156
    low, high = map(int, extremes(wide))
    if low < 0 or high >= n_classes:
        wrong = ((wide < 0) | (wide >= n_classes)) & (wide != ignore_index)
        if bool(wrong.any()):
            index = wrong.nonzero()[0].tolist()
            raise IndexError(
                f"target must be in [0, {n_classes}) or ignore_index={ignore_index}, "
                f"got {int(wide[tuple(index)])} at index {index}{hints.SINGLE_LOGIT if n_classes == 1 else ''}"
            )
    return low, high


def check_per_class(name: str, per_class: Tensor | None, n_classes: int | None) -> None:
    """Raise a TypeError or ValueError unless this is one floating-point value a class, without gradient, or None."""
    if per_class is None:
        return
    check_kind(name, per_class, "a tensor or None")
    if per_class.dtype not in FLOAT_DTYPES:
        hint = "" if per_class.is_complex() else f": give {name}.float()"
        raise TypeError(f"{name} must be of a floating-point dtype, float16 to float64, got {per_class.dtype}{hint}")
    # No test by "in" here: of a symbolic length, torch.compile answers it wrongly.
    if per_class.ndim != 1 or (n_classes is not None and per_class.shape[0] != n_classes):
        expected = "(C,)" if n_classes is None else f"({n_classes},)"
        hint = hints.for_per_class(name, per_class, n_classes)
        raise ValueError(f"{name} must have one value a class, shape {expected}, got {tuple(per_class.shape)}{hint}")
    if per_class.requires_grad:
        raise ValueError(
            f"{name} has no gradient in this loss, got a tensor with requires_grad=True: give {name}.detach()"
        )


def check_kind(name: str, tensor: Tensor, expected: str) -> None:
    """Refuse what is no tensor, and tensors that are no strided array of this process's own values."""
    if not isinstance(tensor, Tensor):
        hint = hints.for_other_types(name, tensor)
        raise TypeError(f"{name} must be {expected}, got {type(tensor).__name__}{hint}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, of layout torch.strided, got {kind}: see Tensor.to_dense()")
    check_plain(name, tensor)


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of which more would be lost than the loss can see: parts, tangents.

    Raises:
        TypeError: a DTensor.
        NotImplementedError: a tensor with a tangent of forward-mode AD.
    """
    if type(tensor) is not Tensor and _is_dtensor(tensor):
        raise TypeError(
            f"{name} must be an ordinary tensor, got a DTensor, which this loss does not support yet: give each "
            "process its part, .to_local(), and reduce the losses over the processes, or the whole, .full_tensor()"
        )
    # Outside any dual level, as nearly always, there are no tangents.
    in_dual_level = getattr(forward_ad, "_current_level", 0) >= 0
    if in_dual_level and _has_tangent(tensor):
        raise no_forward_mode(name)


def _is_dtensor(tensor: Tensor) -> bool:
    # No module of DTensors, no DTensor: to import it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _has_tangent(tensor: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:  # batches of them, which PyTorch cannot take apart
        return True


def no_forward_mode(name: str) -> NotImplementedError:
    """The error for a derivative in forward mode."""
    return NotImplementedError(
        "lmf_loss has no derivative in forward mode (torch.autograd.forward_ad, torch.func.jvp and jacfwd): "
        f"{name} carries a tangent; use backward(), torch.autograd.grad or jacobian in reverse mode"
    )


def no_second_derivative() -> RuntimeError:
    """The error for a derivative of the gradient."""
    return RuntimeError(
        "lmf_loss has no second derivative: its gradient cannot be differentiated again "
        "(double backward, as in gradient penalties or torch.autograd.gradgradcheck)"
    )


def check_readable(**tensors: Tensor | None) -> None:
    """Raise a TypeError for tensors without memory of their own, which a kernel would read at address 0.

    Such are subclasses that hold other tensors, and those of ``FakeTensorMode``.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not _has_memory(tensor):
            raise TypeError(
                f"{name} must have its values in memory of its own, which the kernels read: got a "
                f"{type(tensor).__name__} without, as in FakeTensorMode or a wrapper of other tensors"
            )


def _has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0 or tensor.is_meta  # on meta, launches are only recorded
    except RuntimeError:  # there is no pointer to ask for
        return False


def without_lazy_bits(tensor: Tensor) -> Tensor:
    """The same values as they lie in memory: PyTorch may only have noted that they are negated, or all 0."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.clone() if tensor._is_zerotensor() else tensor
