"""The derivative of the loss, the same for every backend: what is kept for backward, and who may overwrite it."""

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._functorch import autograd_function as _functorch_rules
from torch.autograd import Function, forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import checks, ops
from .devices import Backend
from .options import Inputs, Keep, LossOptions
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
        adjustment: Tensor | None,
        normalizer: Tensor | None,
        options: LossOptions,
        grad_in_forward: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and an empty tensor by which backward can refer to the logits' graph without keeping the logits."""
        keep: Keep = "gradient" if grad_in_forward else "coefs"
        inputs = Inputs(logits, target, margins, weight, adjustment, normalizer)
        loss, kept = backend.forward(inputs, options, keep=keep)
        link = logits.new_empty(0)
        ctx.save_for_backward(link, *kept)
        ctx.strides_for_hooks = _strides(kept) if _hooks_are_set() else None
        ctx.options, ctx.grad_in_forward, ctx.backend = options, grad_in_forward, backend
        ctx.set_materialize_grads(False)
        return loss, link

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if upstream is None:
            return (None,) * 9
        checks.check_plain("the upstream gradient", upstream)
        link, *saved = ctx.saved_tensors
        if ctx.strides_for_hooks is not None:
            saved = [_laid_out(*kept) for kept in zip(saved, ctx.strides_for_hooks, strict=True)]
        if not torch.is_grad_enabled():
            return LMFFunction._gradient(ctx, link, saved, upstream), *(None,) * 8
        with torch.no_grad():  # create_graph=True
            grad = LMFFunction._gradient(ctx, link, saved, upstream)
        grad = _FirstOrderOnly.apply(grad, link, upstream)
        return grad, *(None,) * 8

    @staticmethod
    def _gradient(ctx: Any, link: Tensor, saved: list[Any], upstream: Tensor) -> Tensor:
        if ops_are_needed(upstream):
            return _gradient_by_operators(ctx, link, saved, upstream)
        backend: Backend = ctx.backend
        upstream = checks.without_lazy_bits(upstream)
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


class OperatorFunction(_SingleLevelFunction):
    """The derivative of ``lmf_triton::forward`` at one level of torch.func's transforms, or outside of them.

    It is within the operator, so that whatever looks at a program sees the operator alone.
    """

    @staticmethod
    def forward(ctx: Any, keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = _within_function("forward", keys, arguments)
        *tensors, ignore_index, reduction, _, keep_grad, _ = arguments
        _, grad, coefs, link = outputs
        ctx.mark_non_differentiable(grad, coefs)
        ctx.save_for_backward(*((grad, link) if keep_grad else (coefs, *tensors)))
        ctx.settings, ctx.keep_grad = (ignore_index, reduction), keep_grad
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        others = (None,) * (ops.N_ARGUMENTS + 2)
        if upstream is None:
            return None, None, *others
        checks.check_plain("the upstream gradient", upstream)
        kept, *tensors = ctx.saved_tensors
        if ctx.keep_grad:
            return None, torch.ops.lmf_triton.apply_upstream(kept, upstream, *tensors), *others
        return None, torch.ops.lmf_triton.backward(*tensors, *ctx.settings, kept, upstream), *others


class OperatorGradient(_SingleLevelFunction):
    """That of ``lmf_triton::backward`` and ``::apply_upstream``: there is none."""

    @staticmethod
    def forward(ctx: Any, keys: Any, name: str, *arguments: Any) -> Tensor:
        return cast(Tensor, _within_function(name, keys, arguments))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise checks.no_second_derivative()


def _below_autograd(name: str, keys: Any, arguments: tuple[Any, ...]) -> Any:
    """What the operator gives to those below this level: the next one, which may want a derivative too, or values."""
    operator = getattr(torch.ops.lmf_triton, name).default
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def _within_function(name: str, keys: Any, arguments: tuple[Any, ...]) -> Any:
    """The same where a Function's forward has switched off what the next level may want."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(name, keys, arguments)


def _with_derivative(name: str) -> Callable[..., Any]:
    """The operator where autograd looks: with a graph, if one is wanted."""

    def evaluate(keys: Any, *arguments: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        for tensor in tensors:  # a tangent of this level, which may be no one's who called the loss
            checks.check_plain("an argument", tensor)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return _below_autograd(name, keys, arguments)
        with _functorch_rules.enable_single_level_autograd_function():  # type: ignore[attr-defined]
            if name == "forward":
                return OperatorFunction.apply(keys, *arguments)  # type: ignore[attr-defined]
            return OperatorGradient.apply(keys, name, *arguments)  # type: ignore[attr-defined]

    return _disable_dynamo(evaluate)


for _name in ops.SCHEMAS:
    ops.LIBRARY.impl(_name, _with_derivative(_name), "Autograd", with_keyset=True)


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
    if ctx.grad_in_forward:
        return cast(Tensor, torch.ops.lmf_triton.apply_upstream(saved[0], upstream, link))
    *inputs, coefs = saved
    problem = ops.problem_of(Inputs(*inputs), ctx.options)
    coefs = link if coefs is None else coefs  # as empty
    return cast(Tensor, torch.ops.lmf_triton.backward(*problem, coefs, upstream))


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
