"""What to do about the usual slips, as the end of an error's message; empty where nobody can tell.

Asked only once something was found to be wrong. Nothing here reads the values of a tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from numbers import Number

import torch
from torch import Tensor

from .shapes import class_axis

Shape = tuple[int, ...]

ONE_SAMPLE = " (logits of shape (C,) are one sample's: a batch has (N, C), and a binary problem two logits a sample)"
SINGLE_LOGIT = (
    ": there is a single logit a sample, and a binary problem needs two of them, "
    "torch.cat([torch.zeros_like(logits), logits], 1)"
)


def for_other_types(name: str, given: object) -> str:
    """How to make a tensor of what is none."""
    if hasattr(given, "logits"):  # what models of transformers return
        return ": give its .logits"
    if isinstance(given, Mapping):  # what torchvision's segmentation models return
        return ": give one of its values"
    if isinstance(given, Sequence) and any(isinstance(item, Tensor) for item in given):
        return f": give one of its tensors, or torch.stack({name})"
    if isinstance(given, list | tuple | Number) or hasattr(given, "__array__"):
        return f": give torch.as_tensor({name})"
    return ""


def for_logits(logits: Tensor, target: Tensor) -> str:
    """What logits are that are no floating-point tensor."""
    if logits.is_complex():
        return ""
    if target.is_floating_point():
        return ": logits come first and the target second, are they swapped?"
    return ": give the scores of the classes, not the class that they predict"


def for_target(logits: Tensor, target: Tensor) -> str:
    """How to make class indices of a target whose dtype or shape is wrong, or logits that fit it."""
    shape, given = tuple(logits.shape), tuple(target.shape)
    if not shape or target.is_complex():
        return ""
    is_index = not target.is_floating_point() and target.dtype != torch.bool
    if target.is_floating_point() and len(given) > 1 and given[1] > 1 and given[:1] + given[2:] == shape:
        return ": logits come first and the target second, are they swapped?"
    if shape[class_axis(shape)] == 1:
        return SINGLE_LOGIT
    for with_classes, axis, remedy in _with_classes(shape):
        if given == with_classes:
            return _for_scores(target, axis, remedy) + (ONE_SAMPLE if len(shape) == 1 else "")
    for slip, right_logits, right_target in _slips(shape, given):
        if given == slip:
            right_target += "" if is_index else ".long()"
            changed = [right for right in (right_logits, right_target) if right not in ("logits", "target")]
            return f": give {' and '.join(changed)}"
    return ""


def for_per_class(name: str, per_class: Tensor, n_classes: int | None) -> str:
    """What to do with margins or weights that are not one value a class."""
    if per_class.ndim > 1 and per_class.numel() == max(per_class.shape):
        return f": give {name}.flatten()"
    return SINGLE_LOGIT if n_classes == 1 and len(per_class) == 2 else ""


def _for_scores(target: Tensor, axis: int, remedy: str) -> str:
    counted = "target.int()" if target.dtype == torch.bool else "target"  # of bool there is no argmax
    classes = f"the class of each sample, {counted}.argmax({axis})"
    if target.is_floating_point():
        return f": give class probabilities in the shape of logits, {remedy}, or {classes}"
    return f": for a one-hot target give {classes}, or class probabilities of a floating-point dtype, {remedy}.float()"


def _with_classes(shape: Shape) -> Iterator[tuple[Shape, int, str]]:
    """Shapes of targets with an axis of the classes, that axis, and how to make the logits' shape of them."""
    yield shape, class_axis(shape), "target"
    yield shape[:1] + shape[2:] + shape[1:2], -1, "target.movedim(-1, 1)"  # as F.one_hot makes it
    if len(shape) == 2:
        yield shape[::-1], 0, "target.T"


def _slips(shape: Shape, given: Shape) -> Iterator[tuple[Shape, str, str]]:
    """Shapes of targets that people give by mistake for logits of this shape, and what fits: logits and target."""
    expected = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    yield expected, "logits", "target"  # of which the dtype is wrong
    if len(shape) == 1:
        yield (1,), "logits", "target.squeeze(0)"
        return
    yield (*shape[:1], 1, *shape[2:]), "logits", "target.squeeze(1)"
    if prod(shape[2:]) == 1:  # (N, C, 1, 1), as pooling leaves it
        yield shape[:1], "logits.flatten(1)", "target"
    if len(shape) > 2:
        yield shape[:-1], "logits.movedim(-1, 1)", "target"  # classes last
        yield shape[1:], "logits.unsqueeze(0)", "target.unsqueeze(0)"  # no axis of the samples
        yield (1, *shape[1:]), "logits.unsqueeze(0)", "target"
        yield (prod(shape[:-1]),), "logits.flatten(0, -2)", "target"  # classes last, the target flat
    yield (prod(expected),), "logits", f"target.reshape({expected})"
    if [size for size in given if size != 1] == [size for size in expected if size != 1]:
        yield given, "logits", f"target.reshape({expected})"
