"""The loss as PyTorch operators, for what looks at a program before it runs, or runs it transformed.

``torch.compile``, ``torch.export``, fake tensors, ``torch.func`` and subclasses with ``__torch_dispatch__`` meet
operators ``lmf_triton::...`` where eager mode calls a backend: there an operator would cost more than all else that the
host does. For each: what it does, what it allocates where tensors have no values, and what it does with a batch of
problems, which is its rule for vmap. Their derivative is autograd.py's.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import checks, devices
from .options import Inputs, Keep, LossOptions
from .reduction import RULES
from .shapes import arithmetic_dtype, class_axis


class Problem(NamedTuple):
    """What a loss is computed from: its inputs, one after the other, and its options."""

    logits: Tensor
    target: Tensor
    margins: Tensor | None
    weight: Tensor | None
    logit_adjustment: Tensor | None
    normalizer: Tensor | None
    # alpha, beta, gamma, scale, label_smoothing: float64 on the CPU. A number in a schema would be a constant of a
    # compiled graph, and each new value a new graph; a tensor on another device would have to be waited for.
    numbers: Tensor
    ignore_index: int
    reduction: str

    @property
    def inputs(self) -> Inputs:
        return Inputs(*self[:N_INPUTS])  # type: ignore[arg-type]

    @property
    def options(self) -> LossOptions:
        alpha, beta, gamma, scale, label_smoothing = self.numbers.tolist()
        return LossOptions(alpha, beta, gamma, scale, self.ignore_index, self.reduction, label_smoothing)


N_INPUTS, N_ARGUMENTS = len(Inputs._fields), len(Problem._fields)
PROBLEM = (
    "Tensor logits, Tensor target, Tensor? margins, Tensor? weight, Tensor? logit_adjustment, Tensor? normalizer, "
    "Tensor numbers, SymInt ignore_index, str reduction"
)
OUTPUTS = "bool check_target, bool keep_grad, int n_coefs"
SCHEMAS = {
    # Compiled graphs are kept on disk, where PyTorch knows an operator by its name. So the arguments say what is
    # allocated, and nothing else does; and who changes a schema after a release gives it another name.
    # What is not kept is empty.
    "forward": f"({PROBLEM}, {OUTPUTS}) -> (Tensor loss, Tensor grad, Tensor coefs, Tensor link)",
    "backward": f"({PROBLEM}, Tensor coefs, Tensor upstream) -> Tensor",
    "apply_upstream": "(Tensor grad, Tensor upstream, Tensor link) -> Tensor",
}
_ops = torch.ops.lmf_triton


def problem_of(inputs: Inputs, options: LossOptions) -> Problem:
    """The arguments of a loss in the form that operators take."""
    numbers = options.alpha, options.beta, options.gamma, options.scale, options.label_smoothing
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    stacked = torch.stack([zero + number for number in numbers])
    return Problem(*inputs, stacked, options.ignore_index, options.reduction)


def _taken_apart(arguments: tuple[Any, ...]) -> tuple[Problem, tuple[Any, ...]]:
    """The arguments of an operator: its problem, and what else it takes."""
    return Problem(*arguments[:N_ARGUMENTS]), arguments[N_ARGUMENTS:]


# On values in memory.


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Loss, gradient and coefficients, of which those that are not to be kept are empty.

    And a link: an empty tensor by which a gradient that was kept, which has no derivative, still depends on the logits.
    """
    problem, (check_target, keep_grad, n_coefs) = _taken_apart(arguments)
    logits = problem.logits
    if check_target:
        checks.check_classes(problem.inputs, problem.ignore_index)
    keep: Keep = "gradient" if keep_grad else "coefs" if n_coefs > 0 else "nothing"
    loss, kept = devices.backend_of(logits).forward(problem.inputs, problem.options, keep=keep)
    last = kept[-1] if kept else None
    grad = last if keep == "gradient" and last is not None else logits.new_empty(0)
    coefs = last if keep == "coefs" and last is not None else loss.new_empty(0)
    return loss, grad, coefs, logits.new_empty(0)


def backward(*arguments: Any) -> Tensor:
    """The gradient of the logits from the coefficients, which may not have been kept, times the upstream gradient."""
    problem, (coefs, upstream) = _taken_apart(arguments)
    backend = devices.backend_of(problem.logits)
    inputs, options = problem.inputs, problem.options
    n_coefs = backend.n_coefs(inputs, options)
    if coefs.numel() == 0 and n_coefs > 0:
        coefs = forward(*problem, False, False, n_coefs)[2]
    return backend.backward((*inputs, coefs), upstream, options)


def apply_upstream(grad: Tensor, upstream: Tensor, _: Tensor) -> Tensor:
    """The gradient that was kept, times the upstream gradient."""
    return devices.backend_of(grad).apply_upstream(grad, upstream, in_place=False)


# On tensors without values.


def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    """As :func:`forward` allocates it."""
    problem, (_, keep_grad, n_coefs) = _taken_apart(arguments)
    logits, shape = problem.logits, problem.inputs.sample_shape
    loss = logits.new_empty(shape if RULES[problem.reduction].per_sample else (), dtype=arithmetic_dtype(logits))
    grad = torch.empty_like(logits) if keep_grad else logits.new_empty(0)
    coefs = loss.new_empty((*shape, n_coefs) if n_coefs > 0 else 0)
    return loss, grad, coefs, logits.new_empty(0)


def gradient_fake(like: Tensor, *_: Any) -> Tensor:
    """As :func:`backward` and :func:`apply_upstream` allocate it."""
    return torch.empty_like(like)


# On a batch of problems. Where the loss of each is one sum of its samples' losses over one number, the samples of all
# problems go through the operator together, and are reduced afterwards. Other problems go one after the other.


class Batch(NamedTuple):
    """Arguments of an operator. Those that differ from problem to problem have an axis for that."""

    arguments: tuple[Any, ...]
    axes: tuple[int | None, ...]
    size: int

    def one(self, i: int) -> tuple[Any, ...]:
        """The arguments of one problem."""
        pairs = zip(self.arguments, self.axes, strict=True)
        return tuple(argument if axis is None else argument.select(axis, i) for argument, axis in pairs)

    def leading(self, i: int) -> Tensor:
        """An argument with the problems as its first axis, expanded if it is the same for all."""
        argument: Tensor = self.arguments[i]
        axis = self.axes[i]
        return argument.expand(self.size, *argument.shape) if axis is None else argument.movedim(axis, 0)


class Problems(NamedTuple):
    """A batch of problems that are one sum each."""

    logits: Tensor  # (problem, ...)
    target: Tensor  # (problem, ...)
    problem: Problem  # what is the same for all

    @classmethod
    def of(cls, batch: Batch) -> "Problems | None":
        """None if the batch is none of such."""
        problem, _ = _taken_apart(batch.arguments)
        others_differ = any(axis is not None for axis in batch.axes[2:N_ARGUMENTS])
        weighs = problem.weight is not None and not problem.target.is_floating_point()
        two_denominators = RULES[problem.reduction].focal_by_count and weighs
        is_other = others_differ or two_denominators or problem.normalizer is not None
        return None if is_other else cls(batch.leading(0), batch.leading(1), problem)

    @property
    def shape(self) -> torch.Size:
        """Problems and their samples."""
        return self.logits.select(1 + class_axis(self.logits.shape[1:]), 0).shape

    def samples(self) -> Problem:
        """All samples as those of one problem, which is not reduced."""
        logits, target = (_flat(tensor, len(self.shape)) for tensor in self[:2])
        return self.problem._replace(logits=logits, target=target, reduction="none")

    def denominators(self) -> Tensor | int:
        """What the sum of each problem's losses is divided by."""
        if not RULES[self.problem.reduction].is_mean:
            return 1
        if self.target.is_floating_point():
            return prod(self.shape[1:])
        target = _rows(self.target).long()
        kept = target != self.problem.ignore_index
        weight = self.problem.weight
        if weight is None:
            return kept.sum(1)
        classes = target.clamp(0, weight.shape[0] - 1).flatten()
        weights = weight.to(arithmetic_dtype(self.logits)).index_select(0, classes).view(target.shape)
        return (weights * kept).sum(1)

    def losses(self, check_target: bool) -> Tensor:
        """The loss of each problem."""
        losses: Tensor = _ops.forward(*self.samples(), check_target, False, 0)[0]
        if RULES[self.problem.reduction].per_sample:
            return losses.view(self.shape)
        return _rows(losses.view(self.shape)).sum(1) / self.denominators()

    def gradients(self, upstream: Tensor) -> Tensor:
        """The gradient of the logits of each problem."""
        if not RULES[self.problem.reduction].per_sample:
            upstream = _per_sample(upstream / self.denominators(), self.shape)
        gradient = _gradient(*self.samples(), _flat(upstream, len(self.shape)))
        return gradient.view(self.logits.shape)


def forward_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, tuple[int, ...]]:
    """Rule of ``forward``. No coefficients are kept: :func:`backward_vmap` computes its own."""
    *problem, check_target, keep_grad, _ = arguments
    batch = Batch(tuple(problem), in_dims[:N_ARGUMENTS], info.batch_size)
    problems = Problems.of(batch)
    if problems is not None:
        loss = problems.losses(check_target)
    else:
        loss = torch.stack([_ops.forward(*batch.one(i), check_target, False, 0)[0] for i in range(batch.size)])
    grad, coefs, link = (dtype_of.new_empty(batch.size, 0) for dtype_of in (problem[0], loss, problem[0]))
    if keep_grad:
        grad, _ = backward_vmap(info, (*batch.axes, None, 0), *problem, coefs, torch.ones_like(loss))
    return (loss, grad, coefs, link), (0, 0, 0, 0)


def backward_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Rule of ``backward``."""
    *problem, _, upstream = arguments
    batch = Batch((*problem, upstream), (*in_dims[:N_ARGUMENTS], in_dims[-1]), info.batch_size)
    problems = Problems.of(batch)
    if problems is not None:
        return problems.gradients(batch.leading(-1)), 0
    return torch.stack([_gradient(*batch.one(i)) for i in range(batch.size)]), 0


def apply_upstream_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[Tensor, int]:
    """Rule of ``apply_upstream``."""
    batch = Batch(arguments, in_dims, info.batch_size)
    grad, upstream = batch.leading(0), batch.leading(1)
    link = grad.new_empty(0)
    of_samples = grad.select(1 + class_axis(grad.shape[1:]), 0)  # the shape that a target has
    upstream = _per_sample(upstream, of_samples.shape) if upstream.ndim == 1 else upstream
    n_axes = of_samples.ndim
    scaled: Tensor = _ops.apply_upstream(_flat(grad, n_axes), _flat(upstream, n_axes), link)
    return scaled.view(grad.shape), 0


def _gradient(*arguments: Any) -> Tensor:
    """The gradient of a problem of which no coefficients were kept."""
    *problem, upstream = arguments
    gradient: Tensor = _ops.backward(*problem, upstream.new_empty(0), upstream)
    return gradient


def _flat(tensor: Tensor, n_axes: int) -> Tensor:
    """Problems and samples as one axis, where ``n_axes``, the target's, say that there is one of samples."""
    return tensor.flatten(0, 1) if n_axes > 1 else tensor


def _rows(of_samples: Tensor) -> Tensor:
    """The samples of each problem as a row."""
    return of_samples.flatten(1) if of_samples.ndim > 1 else of_samples.unsqueeze(1)


def _per_sample(of_problems: Tensor, shape: torch.Size) -> Tensor:
    """A number for each problem, expanded over its samples."""
    return of_problems.view(-1, *(1,) * (len(shape) - 1)).expand(shape)


def _register() -> torch.library.Library:
    library = torch.library.Library("lmf_triton", "DEF")
    rules: dict[str, tuple[Callable[..., Any], ...]] = {
        "forward": (forward, forward_fake, forward_vmap),
        "backward": (backward, gradient_fake, backward_vmap),
        "apply_upstream": (apply_upstream, gradient_fake, apply_upstream_vmap),
    }
    for name, (on_values, fake, vmap) in rules.items():
        library.define(name + SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
        # On every device. Dynamo, which sees the operator, would compile what it does where vmap is outside of it.
        library.impl(name, _disable_dynamo(on_values), "CompositeExplicitAutograd")
        torch.library.register_fake(f"lmf_triton::{name}", fake, lib=library)
        torch.library.register_vmap(f"lmf_triton::{name}", _disable_dynamo(vmap), lib=library)
    return library


LIBRARY = _register()  # operators live as long as this does
