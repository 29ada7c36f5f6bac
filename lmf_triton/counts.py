"""Class counts: from labels; and in the forms in which people have them -> one list, in the order of the logits."""

import math
from collections.abc import Iterator, Mapping, MappingView, Sequence
from decimal import Decimal
from numbers import Number, Real
from typing import Any, Protocol, SupportsFloat, TypeGuard

import torch
from torch import Tensor

from .checks import INTEGER_DTYPES, as_int, check_kind, check_target


class Array(Protocol):
    """What NumPy makes an array of: its own arrays, pandas Series."""

    def __array__(self) -> Any: ...


ClassCounts = Sequence[SupportsFloat] | Mapping[int, SupportsFloat] | Tensor | Array


def count_classes(target: Tensor | Sequence[int] | Array, n_classes: int, *, ignore_index: int = -100) -> Tensor:
    """Samples of each class, from labels: the ``class_counts`` of the losses, margins and weights.

    Count the labels of the training part alone, and all of them: a class that no label has is a zero here, which the
    losses refuse.

    Args:
        target: class of each sample, a tensor of any shape and integer dtype; or what :func:`torch.as_tensor` makes
            one of, such as the list that datasets of torchvision have as ``targets``.
        n_classes: C, of the logits.
        ignore_index: a label that does not count.

    Returns:
        ``(C,)`` int64, on the device of ``target``. The host waits for the labels.

    Raises:
        TypeError: the labels are not integers, or ``n_classes`` or ``ignore_index`` is none.
        ValueError: ``n_classes`` is less than 1.
        IndexError: a label is outside ``[0, C)`` and not ``ignore_index``.
    """
    size, ignored = as_int("n_classes", n_classes), as_int("ignore_index", ignore_index)
    if size < 1:
        raise ValueError(f"n_classes must be at least 1, got {size}")
    if isinstance(target, Tensor):
        check_kind("target", target, "a tensor of labels")
    else:
        target = _as_labels(target)
    if target.is_meta:
        raise TypeError(f"target must be labels, got {target!r}, whose values cannot be read")
    if target.dtype not in INTEGER_DTYPES and target.numel() > 0:  # an empty list is one of floats
        hint = ": of class probabilities or one-hot labels give target.argmax(1)" if target.ndim > 1 else ""
        raise TypeError(f"target must hold class indices of an integer dtype, got {target.dtype}{hint}")
    check_target(target, size, ignored)
    labels = target.detach().flatten().long()
    return torch.bincount(labels[labels != ignored], minlength=size)


def _as_labels(target: Any) -> Tensor:
    try:
        return torch.as_tensor(target)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"target must be a tensor of labels, or what torch.as_tensor makes one of, got {type(target).__name__}"
        ) from error


def counts_in_order(class_counts: ClassCounts) -> list[float]:
    """Samples of each class, in the order of the logits.

    No library has to convert the whole: each count is looked at by itself, so that an error can name it.

    Args:
        class_counts: a sequence, array or tensor ``(C,)`` in the order of the logits; or a container with keys (a
            dict, a ``Counter``, pandas' ``value_counts()``), in any order, whose keys are the classes 0 to C - 1.
            (Of ``value_counts().reset_index()["count"]`` the keys are ranks: nothing here can tell.)

    Raises:
        TypeError: a count is not a number (its class is named), or these are no counts: a DTensor, an iterator.
        ValueError: a count is not finite and positive (its class is named), the shape is not ``(C,)``, or the keys are
            not the classes.
    """
    if hasattr(class_counts, "columns"):
        raise ValueError(
            f"class_counts must have shape (C,), got a table, a {type(class_counts).__name__}: give a column whose "
            "index is the classes, class_counts[name], or of two columns dict(zip(labels, counts))"
        )
    counts = _by_class(class_counts) if _has_keys(class_counts) else _in_their_order(class_counts)
    _check_shape(counts, class_counts)
    return [_positive(count, class_index) for class_index, count in enumerate(counts)]


def _has_keys(class_counts: ClassCounts) -> TypeGuard[Mapping[int, SupportsFloat]]:
    """A pandas Series has keys and is no Mapping."""
    return hasattr(class_counts, "keys") and hasattr(class_counts, "items")


def _by_class(class_counts: Mapping[int, SupportsFloat]) -> list[Any]:
    """The counts sorted by their keys: the container's own order is that of first sight, or of frequency."""
    # DataFrame.value_counts() of one column has keys (label,).
    items = [(key[0] if isinstance(key, tuple) and len(key) == 1 else key, n) for key, n in class_counts.items()]
    table = dict(items)
    if len(table) < len(items) or set(table) != set(range(len(table))):
        shown = ", ".join(repr(_python_value(key)) for key, _ in items[:10]) + (", ..." if len(items) > 10 else "")
        raise ValueError(
            f"the keys of class_counts must be the classes 0 to {len(items) - 1}, each once, got {shown}: "
            "give a list in the order of the logits instead, [class_counts[name] for name in class_names]"
        )
    return [table[class_index] for class_index in range(len(table))]


def _in_their_order(class_counts: Any) -> list[Any]:
    """The counts of what has no keys."""
    if isinstance(class_counts, Number) or getattr(class_counts, "ndim", 1) == 0:
        raise ValueError(f"class_counts must have shape (C,) with C >= 1, got (), a single number: {class_counts}")
    if not (hasattr(class_counts, "__len__") and hasattr(class_counts, "__getitem__")):
        raise TypeError(
            "class_counts must be numbers, one a class, in the order of the logits or with the classes as keys, "
            f"got {class_counts if class_counts is None else type(class_counts).__name__}{_remedy(class_counts)}"
        )
    if isinstance(class_counts, Tensor):
        check_kind("class_counts", class_counts, "a tensor")
    try:
        return class_counts.tolist() if isinstance(class_counts, Tensor) else list(class_counts)
    except RuntimeError as error:  # on the meta device, of FakeTensorMode, or a memoryview of foreign bytes
        raise TypeError(
            f"class_counts must be numbers, one a class, got {class_counts!r}, whose values cannot be read"
        ) from error


def _remedy(class_counts: Any) -> str:
    """What to do with counts that have no order to rely on."""
    if isinstance(class_counts, MappingView):
        return ": its order is not that of the logits, give the dict itself"
    if isinstance(class_counts, Iterator):
        return ": it can be read only once, give list(class_counts)"
    return ""


def _check_shape(counts: list[Any], class_counts: Any) -> None:
    """Raise a ValueError where there are no counts, or rows of them."""
    rows = [row for row in map(_python_value, counts) if isinstance(row, list | tuple)]
    if counts and not (len(rows) == len(counts) and all(len(row) == len(rows[0]) for row in rows)):
        return
    shape = (len(rows), len(rows[0])) if rows else (0,)
    if getattr(class_counts, "ndim", 1) > 1:  # rows of a matrix are matrices
        shape = tuple(class_counts.shape)
    hint = ""
    if isinstance(class_counts, tuple) and len(rows) == 2 and hasattr(class_counts[0], "tolist"):
        hint = ": of labels and counts, as np.unique returns them, give dict(zip(labels.tolist(), counts.tolist()))"
    elif shape[:1] == (1,) or shape[1:] == (1,):
        hint = ": give np.ravel(class_counts)"
    elif rows and len(rows[0]) == 2:
        hint = ": of pairs of label and count give dict(class_counts)"
    raise ValueError(f"class_counts must have shape (C,) with C >= 1, got {shape}{hint}")


def _python_value(count: Any) -> Any:
    """A number of NumPy or PyTorch as Python's; lists and tuples of what holds several."""
    return count.tolist() if hasattr(count, "tolist") else count


def _positive(count: Any, class_index: int) -> float:
    value = _python_value(count)
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise TypeError(
            f"class_counts must be numbers, one a class, got {count!r} of type {type(count).__name__} "
            f"for class {class_index}"
        )
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer beyond float64; a signaling NaN of decimals
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(
            f"class_counts must be finite and positive, got {value} for class {class_index}: "
            "leave the class out, or give it the count 1"
        )
    return number
