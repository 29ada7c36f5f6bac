"""Small facts of tensors, and of how they are looked at."""

from collections.abc import Sequence

import torch
from torch import Tensor

FEW = 64  # up to so many values Python looks at each in less time than PyTorch starts one operation


def class_axis(shape: Sequence[int]) -> int:
    """The axis of the classes in logits of shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``."""
    return min(len(shape) - 1, 1)


def without_classes(shape: torch.Size) -> torch.Size:
    """The shape of the samples."""
    axis = class_axis(shape)
    return shape[:axis] + shape[axis + 1 :]


def has_own_dispatch(tensor: Tensor) -> bool:
    """Whether its type decides what becomes of each operator: a wrapper of other tensors, or without values."""
    default = torch._C._disabled_torch_dispatch_impl
    return type(tensor).__torch_dispatch__ is not default  # pyright: ignore[reportAttributeAccessIssue]


def has_own_functions(tensor: Tensor) -> bool:
    """Whether its type may decide what becomes of each function and method; that of a Parameter does not."""
    return type(tensor).__torch_function__ is not torch._C._disabled_torch_function_impl


def is_traced() -> bool:
    """Whether TorchScript records this call, as :func:`torch.jit.is_tracing` says more slowly."""
    return torch._C._get_tracing_state() is not None


def arithmetic_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the loss."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest value; the host waits for them. NaN is seen where there are more than ``FEW``."""
    if tensor.numel() > FEW:
        low, high = tensor.aminmax()
        return low.item(), high.item()
    values = tensor.flatten().tolist()
    return min(values), max(values)


def are_within(tensor: Tensor, low: float, high: float) -> bool:
    """Whether all values are from low to high, which NaN is not; the host waits for it."""
    if tensor.numel() > FEW:
        smallest, largest = extremes(tensor)
        return smallest >= low and largest <= high
    return all(low <= value <= high for value in tensor.flatten().tolist())


def on_host(tensor: Tensor) -> bool:
    """Whether the host may ask for values, and has float64."""
    return tensor.is_cpu
