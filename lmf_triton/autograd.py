"""The derivative of the loss, the same for every backend: what is kept for backward, and who may overwrite it."""

import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks, ops
from .devices import Backend
from .options import Keep, LossOptions
from .shapes import has_own_dispatch, is_traced

_AUTOGRAD = getattr(torch._C, "_autograd", None)  # its private questions, which may go away
_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_is_legacy_batch = _functorch.is_legacy_batchedtensor  # autograd's own batches, of is_grads_batched


class LMFFunction(Function):
    """Loss with an analytic gradient from a backend.

    With ``grad_in_forward`` the gradient for an upstream gradient of 1 is kept between forward and backward, and
    nothing else; otherwise the inputs and a few floats a row are, and backward computes the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        margins: Tensor | None,
        weight: Tensor | None,
        normalizer: Tensor | None,
        options: LossOptions,
        grad_in_forward: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and an empty tensor by which backward can refer to the logits' graph without keeping the logits."""
        keep: Keep = "gradient" if grad_in_forward else "coefs"
        loss, kept = backend.forward(logits, target, margins, weight, normalizer, options, keep=keep)
        link = logits.new_empty(0)
        ctx.save_for_backward(link, *kept)
        ctx.strides_for_hooks = _strides(kept) if _hooks_are_set() else None
        ctx.options, ctx.grad_in_forward, ctx.backend = options, grad_in_forward, backend
        ctx.set_materialize_grads(False)
        return loss, link

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if upstream is None:
            return (None,) * 8
        checks.check_plain("the upstream gradient", upstream)
        link, *saved = ctx.saved_tensors
        if ctx.strides_for_hooks is not None:
            saved = [_laid_out(*kept) for kept in zip(saved, ctx.strides_for_hooks, strict=True)]
        if ops_are_needed(upstream):
            return _gradient_by_operators(ctx, link, saved, upstream), *(None,) * 7
        upstream = checks.without_lazy_bits(upstream)
        if not torch.is_grad_enabled():
            return LMFFunction._gradient(ctx, saved, upstream), *(None,) * 7
        with torch.no_grad():  # create_graph=True
            grad = LMFFunction._gradient(ctx, saved, upstream)
        grad = _FirstOrderOnly.apply(grad, link, upstream)
        return grad, *(None,) * 7

    @staticmethod
    def _gradient(ctx: Any, saved: list[Any], upstream: Tensor) -> Tensor:
        backend: Backend = ctx.backend
        if not ctx.grad_in_forward:
            return backend.backward(saved, upstream, ctx.options)
        # The kept gradient is handed out, and scaled where it lies, unless another backward may ask for it, or someone
        # else has it too, as hooks on saved tensors and selective checkpointing may.
        in_place = not _graph_is_kept() and ctx.strides_for_hooks is None and _holders(saved) == _HOLDERS_OF_OURS
        return backend.apply_upstream(saved[0], upstream, in_place=in_place)


class _FirstOrderOnly(Function):
    """Identity on the gradient that ties it to what it was computed from, and refuses to be differentiated.

    Without it, a gradient penalty would silently take the gradient for a constant.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *computed_from: Tensor) -> Tensor:
        ctx.mark_dirty(grad)  # the same tensor, not a view: a view could not be changed in place
        return grad

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise checks.no_second_derivative()


class OperatorFunction(Function):
    """Loss with an analytic gradient from the operators: the derivative of ``lmf_triton::forward``.

    With ``setup_context``, which torch.func asks for, and eager mode would pay for in every call.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """What the operator returns, and an empty tensor as in :class:`LMFFunction`."""
        logits: Tensor = arguments[0]
        return *torch.ops.lmf_triton.forward(*arguments), logits.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ignore_index, reduction, _, keep_grad, _ = inputs
        _, grad, coefs, link = output
        ctx.mark_non_differentiable(grad, coefs)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.keep_grad = (ignore_index, reduction), keep_grad
        ctx.save_for_backward(link, *((grad,) if keep_grad else (coefs, *tensors)))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        others = (None,) * (ops.N_ARGUMENTS + 2)
        if upstream is None:
            return None, *others
        checks.check_plain("the upstream gradient", upstream)
        link, kept, *tensors = ctx.saved_tensors
        if ctx.keep_grad:
            return GradientOfUpstream.apply(link, upstream, kept), *others
        return GradientOfProblem.apply(link, upstream, kept, *tensors, *ctx.settings), *others

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise checks.no_forward_mode("an argument")


class _OperatorGradient(Function):
    """The gradient by an operator, tied to what it was computed from as by :class:`_FirstOrderOnly`."""

    generate_vmap_rule = True
    # Dynamo, which may trace this one, counts the parameters of forward: none of them is starred.

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise checks.no_second_derivative()


class GradientOfUpstream(_OperatorGradient):
    """From the gradient that was kept."""

    @staticmethod
    def forward(link: Tensor, upstream: Tensor, grad: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.lmf_triton.apply_upstream(grad, upstream))


class GradientOfProblem(_OperatorGradient):
    """From the coefficients that were kept."""

    @staticmethod
    def forward(
        link: Tensor,
        upstream: Tensor,
        coefs: Tensor,
        logits: Tensor,
        target: Tensor,
        margins: Tensor | None,
        weight: Tensor | None,
        normalizer: Tensor | None,
        numbers: Tensor,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        problem = logits, target, margins, weight, normalizer, numbers, ignore_index, reduction
        return cast(Tensor, torch.ops.lmf_triton.backward(*problem, coefs, upstream))


def _forward_with_derivative(keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """``lmf_triton::forward`` where autograd looks: with a graph, if one is wanted."""
    if torch.is_grad_enabled() and arguments[0].requires_grad:
        if torch._C._are_functorch_transforms_active():
            raise checks.no_functionalize()
        outputs: tuple[Tensor, ...] = OperatorFunction.apply(*arguments)
        return outputs[:3]
    with torch._C._AutoDispatchBelowAutograd():
        operator = torch.ops.lmf_triton.forward.default
        below: tuple[Tensor, ...] = operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
    return below


ops.LIBRARY.impl("forward", _forward_with_derivative, "Autograd", with_keyset=True)


def by_operator(*arguments: Any) -> Tensor:
    """The loss by ``lmf_triton::forward``. The transforms of torch.func do not see a Function within an operator."""
    loss: Tensor
    active = transforms()
    if active and "Functionalize" not in active:
        loss, *_ = OperatorFunction.apply(*arguments)
        return loss
    if active and arguments[0].requires_grad:
        raise checks.no_functionalize()
    loss, *_ = torch.ops.lmf_triton.forward(*arguments)
    return loss


def transforms() -> list[str]:
    """The names of torch.func's transforms that are active, and not those of a call that Dynamo traces."""
    if torch.compiler.is_dynamo_compiling() or not torch._C._are_functorch_transforms_active():
        return []
    return [interpreter.key().name for interpreter in _functorch.get_interpreter_stack() or ()]


def ops_are_needed(*tensors: Tensor | None) -> bool:
    """Whether these tensors, or what surrounds the call, are about more than values in memory."""
    if torch.compiler.is_compiling() or is_traced() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    for tensor in tensors:  # in each call of eager mode: the common answer comes first
        if tensor is None:
            continue
        if tensor.is_meta or (type(tensor) is not Tensor and has_own_dispatch(tensor)) or _is_legacy_batch(tensor):
            return True
    return False


def _gradient_by_operators(ctx: Any, link: Tensor, saved: list[Any], upstream: Tensor) -> Tensor:
    """The gradient from what :class:`LMFFunction` saved."""
    gradient: Tensor
    if ctx.grad_in_forward:
        gradient = GradientOfUpstream.apply(link, upstream, *saved)
        return gradient
    logits, target, margins, weight, normalizer, coefs = saved
    problem = ops.problem_of(logits, target, margins, weight, normalizer, ctx.options)
    gradient = GradientOfProblem.apply(link, upstream, link if coefs is None else coefs, *problem)  # link is empty too
    return gradient


def _graph_is_kept() -> bool:
    """Whether the backward pass in progress was called with retain_graph=True or create_graph=True."""
    # PyTorch has no public name for this. Its own compiled backward asks the same question for the same reason:
    # may a saved buffer be overwritten? Were the name to go away, "yes, kept" costs a copy and is always right.
    ask = getattr(_AUTOGRAD, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def _hooks_are_set() -> bool:
    """Whether ``saved_tensors_hooks`` are in force; no public name says so, and "yes" costs a copy and is right."""
    ask = getattr(_AUTOGRAD, "_top_saved_tensors_default_hooks", None)
    return True if ask is None else ask(True) is not None


def _strides(tensors: tuple[Tensor | None, ...]) -> list[tuple[int, ...] | None]:
    return [None if tensor is None else tensor.stride() for tensor in tensors]


def _laid_out(tensor: Tensor | None, strides: tuple[int, ...] | None) -> Tensor | None:
    """What a hook gave back as it was saved: the values in memory, with these strides."""
    if tensor is None or strides is None:
        return None
    tensor = checks.without_lazy_bits(tensor)
    if tensor.stride() == strides or 0 in strides:  # what was expanded is read with any strides
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _holders(saved: list[Any]) -> tuple[int, ...] | None:
    """How many hold the one tensor of this list, in Python and in C++, and its memory; None where that is not told.

    Without a local variable for either, since a debugger that looks at them would be counted.
    """
    try:
        return (
            sys.getrefcount(saved[0]),
            saved[0]._use_count(),
            sys.getrefcount(saved[0].untyped_storage()),
            torch._C._storage_Use_Count(saved[0].untyped_storage()._cdata),
        )
    except (AttributeError, RuntimeError):  # private names, or a tensor without storage
        return None


def _holders_of_ours() -> tuple[int, ...] | float:
    """What ``_holders`` says of a tensor that a graph holds and nobody else. Versions of Python and PyTorch differ."""
    with torch.inference_mode(False):
        holder = torch.zeros(1, device="cpu", requires_grad=True)
        holder.grad = torch.zeros_like(holder)  # held in C++, as what is saved for backward is
        holders = _holders([holder.grad])
    return float("nan") if holders is None else holders  # NaN equals nothing: always a copy


_HOLDERS_OF_OURS = _holders_of_ours()
