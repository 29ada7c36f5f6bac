"""What the tests share: the paths and options that they try, and float64 from ``reference`` to compare with."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmf_triton import ldam_margins, lmf_loss
from reference import lmf as reference

IGNORED = -100
PATHS = ["kernel", "cpu"]
ANOTHER_DEVICE = "cpu, as another device"
WAYS = [*PATHS, "cpu, softmax", "cpu, extreme", ANOTHER_DEVICE]  # those of conftest.py's ``path``
UNREAD = ["kernel", ANOTHER_DEVICE]  # where nobody asks for a value
REDUCTIONS = ["none", "sum", "mean", "mean_per_term"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

every_way = pytest.mark.parametrize("path", WAYS, indirect=True)


def pairwise(**axes: Iterable[Any] | dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test with some of the axes' combinations: so many that every two values of two axes meet.

    Where one option goes wrong with another, some test shows it; what takes three at once is one axis of its own here.
    Of a dict the keys are the names.
    """
    assert len(axes) > 1, "one axis alone is pytest.mark.parametrize's"
    named = [
        list(axis.items()) if isinstance(axis, dict) else [(getattr(v, "__name__", str(v)), v) for v in axis]
        for axis in axes.values()
    ]
    combinations = list(itertools.product(*(range(len(axis)) for axis in named)))
    pairs_of = [set(itertools.combinations(enumerate(combination), 2)) for combination in combinations]
    missing, chosen = set().union(*pairs_of), []
    while missing:  # greedily
        best = max(range(len(combinations)), key=lambda i: len(pairs_of[i] & missing))
        missing -= pairs_of[best]
        chosen.append([axis[i] for axis, i in zip(named, combinations[best], strict=True)])
    values = [[value for _, value in row] for row in chosen]
    ids = ["-".join(name for name, _ in row) for row in chosen]
    return pytest.mark.parametrize(list(axes), values, ids=ids, indirect=[name for name in axes if name == "path"])


@dataclass(frozen=True)
class Case:
    """One call of the loss: tensors, options, and an upstream gradient of the loss's shape."""

    logits: Tensor
    target: Tensor
    margins: Tensor | None
    upstream: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def sample_shape(self) -> torch.Size:
        axis = min(self.logits.ndim - 1, 1)
        return self.logits.shape[:axis] + self.logits.shape[axis + 1 :]

    def to(self, device: torch.device) -> "Case":
        tensors = {name: _moved(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        options = {k: _moved(v, device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return replace(self, **tensors, options=options)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor with its storage on another device: ``Tensor.to`` would change strides that are not dense."""
    if tensor.device == device:
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def make_case(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0, with_margins=True, **options) -> Case:
    """Random logits and classes, with one ignored sample and one confident one where there are samples enough."""
    generator = torch.Generator().manual_seed(seed)
    n_classes = shape[min(len(shape) - 1, 1)]
    sample_shape = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    logits = 3 * torch.randn(shape, generator=generator)
    target = torch.randint(n_classes, sample_shape, generator=generator)
    if target.numel() > 2:
        target.view(-1)[1] = options.get("ignore_index", IGNORED)
        last = logits[(-1, slice(None), *(-1,) * (len(shape) - 2))]  # a view of the last sample's classes
        last[target.view(-1)[-1]] += 15.0
    counts = torch.randint(1, 5000, (n_classes,), generator=generator)
    upstream_shape = sample_shape if options.get("reduction") == "none" else ()
    upstream = 0.5 + torch.rand(upstream_shape, generator=generator)
    return Case(
        logits.to(dtype),
        target,
        ldam_margins(counts) if with_margins else None,
        upstream.double() if dtype == torch.float64 else upstream,
        options,
    )


def with_probabilities(case: Case, dtype: torch.dtype = torch.float32) -> Case:
    """The same logits with class probabilities for targets, as people have them.

    The first sample keeps its one class, and the last, which is confident, has most of its. Those between share theirs
    with the class before, as mixup makes them, or with all; one has lost half of it, and what was ignored has nothing.
    """
    axis = min(case.logits.ndim - 1, 1)
    n_classes, kept = case.logits.shape[axis], case.target.flatten() >= 0
    classes = case.target.flatten().clamp_min(0)
    own = F.one_hot(classes, n_classes).double()
    before = F.one_hot((classes - 1) % n_classes, n_classes).double()
    smoothed = 0.9 * own + 0.1 / n_classes
    kinds = torch.arange(len(classes)) % 4  # of each sample
    mixed = torch.stack([0.75 * own + 0.25 * before, smoothed, 0.5 * own, 0.875 * smoothed])
    rows = mixed[kinds, torch.arange(len(classes))] * kept.unsqueeze(1)
    rows[:1] = own[:1] * kept[:1].unsqueeze(1)
    target = rows.view(*case.target.shape, n_classes).movedim(-1, axis).to(dtype).contiguous()
    return replace(case, target=target)


def class_weights(n_classes: int) -> Tensor:
    return torch.linspace(0.5, 2.0, n_classes)


def evaluate(case: Case, **extra) -> tuple[Tensor, Tensor]:
    """Loss and gradient from lmf_triton, on the CPU."""
    logits = case.logits.detach().requires_grad_()
    loss = lmf_loss(logits, case.target, case.margins, **case.options, **extra)
    (grad,) = torch.autograd.grad(loss, logits, case.upstream)
    return loss.detach().cpu(), grad.cpu()


def evaluate_reference(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss and gradient from the reference, computed in ``dtype``, on the CPU."""
    case = case.to(torch.device("cpu"))
    logits = case.logits.detach().to(dtype).requires_grad_()
    margins = None if case.margins is None else case.margins.to(dtype)
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    target = case.target.to(dtype if case.target.is_floating_point() else torch.int64)
    loss = reference.lmf_loss(logits, target, margins, **options)
    (grad,) = torch.autograd.grad(loss, logits, case.upstream.to(dtype))
    return loss.detach(), grad


def assert_accurate(case: Case, loss: Tensor, grad: Tensor, *, roundings: int = 1) -> None:
    """Against the float64 oracle, no worse than the reference in float32 plus a rounding unit.

    For half logits that is stricter than the reference in their own dtype: they are widened, and the only roundings
    to half are those of the stored gradient, of which there are ``roundings``. For float64 logits the oracle is no
    more exact than the result: both may have the float32 reference's error, in float64's smaller units, and a
    rounding unit. Where several classes have a share, each of these is rounded too.
    """
    exact_loss, exact_grad = evaluate_reference(case, torch.float64)
    eager_loss, eager_grad = evaluate_reference(case, torch.float32)
    is_double = case.logits.dtype == torch.float64
    assert loss.dtype == (torch.float64 if is_double else torch.float32)
    assert grad.dtype == case.logits.dtype
    n_inexact = 2 if is_double else 1
    has_shares = case.target.is_floating_point() or case.options.get("label_smoothing", 0) > 0
    shrink = n_inexact * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if is_double else 1.0

    # In one number the errors of many samples may cancel by luck; so a reduced loss counts them one by one as well.
    per_sample = replace(case, options={**case.options, "reduction": "none"}, upstream=torch.ones(case.sample_shape))
    exact_losses, eager_losses = (evaluate_reference(per_sample, d)[0] for d in (torch.float64, torch.float32))
    eager_error = max(_relative_error(eager_loss, exact_loss), _relative_error(eager_losses, exact_losses))
    n_roundings = n_inexact + has_shares
    assert _relative_error(loss, exact_loss) <= shrink * eager_error + n_roundings * torch.finfo(loss.dtype).eps

    eager_error = _relative_error(eager_grad, exact_grad)
    rounding = n_inexact * roundings * torch.finfo(grad.dtype).eps + has_shares * torch.finfo(loss.dtype).eps
    assert _relative_error(grad, exact_grad) <= shrink * eager_error + rounding


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest error, in units of the largest value."""
    largest = exact.abs().max().item()
    return (actual.double() - exact).abs().max().item() / (largest or 1.0)
