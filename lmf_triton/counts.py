"""Class counts in the forms in which people have them -> one list, in the order of the logits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from .checks import check_plain


class Array(Protocol):
    """What NumPy makes an array of: its own arrays, pandas Series."""

    def __array__(self) -> Any: ...


ClassCounts = Sequence[float] | Mapping[int, float] | Tensor | Array


def counts_in_order(class_counts: ClassCounts) -> list[float]:
    """Samples of each class, in the order of the logits.

    Args:
        class_counts: a sequence, array or tensor ``(C,)`` in the order of the logits; or a container with keys (a
            dict, a ``Counter``, pandas' ``value_counts()``), in any order, whose keys are the classes 0 to C - 1.
            (Of ``value_counts().reset_index()["count"]`` the keys are ranks: nothing here can tell.)

    Raises:
        TypeError: a count is not a number, or the counts are a DTensor.
        ValueError: a count is not finite and positive (its class is named), or the keys are not the classes.
    """
    given = _by_class(class_counts) if _has_keys(class_counts) else class_counts
    if isinstance(given, Tensor):
        check_plain("class_counts", given)
    try:
        # Python's floats get a dtype by name, since PyTorch's default may be a half one.
        dtype = None if hasattr(given, "dtype") else torch.float64
        counts = torch.as_tensor(given, dtype=dtype, device="cpu").detach()
        if counts.is_complex():
            raise TypeError("complex counts")
    except (TypeError, RuntimeError, ValueError) as error:
        raise TypeError(f"class_counts must be numbers, one a class, got {class_counts!r}") from error
    if counts.ndim != 1 or len(counts) == 0:
        raise ValueError(f"class_counts must have shape (C,) with C >= 1, got {tuple(counts.shape)}")
    numbers = [float(count) for count in counts.tolist()]
    for class_index, count in enumerate(numbers):
        if not (math.isfinite(count) and count > 0):
            raise ValueError(
                f"class_counts must be finite and positive, got {count:g} for class {class_index}: "
                "leave the class out, or give it the count 1"
            )
    return numbers


def _has_keys(class_counts: ClassCounts) -> TypeGuard[Mapping[int, float]]:
    """A pandas Series has keys and is no Mapping."""
    return hasattr(class_counts, "keys") and hasattr(class_counts, "items")


def _by_class(class_counts: Mapping[int, float]) -> list[float]:
    """The counts sorted by their keys: the container's own order is that of first sight, or of frequency."""
    items = list(class_counts.items())
    table = dict(items)
    if len(table) < len(items) or set(table) != set(range(len(table))):
        shown = ", ".join(repr(key) for key, _ in items[:10]) + (", ..." if len(items) > 10 else "")
        raise ValueError(
            f"the keys of class_counts must be the classes 0 to {len(items) - 1}, each once, got {shown}: "
            "give a list in the order of the logits instead, [class_counts[name] for name in class_names]"
        )
    return [table[class_index] for class_index in range(len(table))]
