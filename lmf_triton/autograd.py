"""The autograd rule of the loss, the same for every backend: what is kept for backward, and who may overwrite it."""

import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks
from .options import Keep, LossOptions

_AUTOGRAD = getattr(torch._C, "_autograd", None)  # its private questions, which may go away


class Backend(Protocol):
    """What computes the loss: the module ``plain`` or ``fused.backend``."""

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        margins: Tensor | None,
        weight: Tensor | None,
        options: LossOptions,
        *,
        keep: Keep,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss; and to keep for backward: nothing, the gradient, or what :meth:`backward` computes it from."""
        ...

    def backward(self, kept: Sequence[Tensor | None], upstream: Tensor, options: LossOptions) -> Tensor:
        """The gradient of the logits from what :meth:`forward` kept as "coefs"."""
        ...

    def apply_upstream(self, grad: Tensor, upstream: Tensor, *, in_place: bool) -> Tensor:
        """``upstream * grad``, in new memory or where the gradient lies."""
        ...


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
        options: LossOptions,
        grad_in_forward: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and an empty tensor by which backward can refer to the logits' graph without keeping the logits."""
        keep: Keep = "gradient" if grad_in_forward else "coefs"
        loss, kept = backend.forward(logits, target, margins, weight, options, keep=keep)
        link = logits.new_empty(0)
        ctx.save_for_backward(link, *kept)
        ctx.strides_for_hooks = _strides(kept) if _hooks_are_set() else None
        ctx.options, ctx.grad_in_forward, ctx.backend = options, grad_in_forward, backend
        ctx.set_materialize_grads(False)
        return loss, link

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if upstream is None:
            return (None,) * 7
        checks.check_plain("the upstream gradient", upstream)
        upstream = checks.without_lazy_bits(upstream)
        link, *saved = ctx.saved_tensors
        if ctx.strides_for_hooks is not None:
            saved = [_laid_out(*kept) for kept in zip(saved, ctx.strides_for_hooks, strict=True)]
        if not torch.is_grad_enabled():
            return LMFFunction._gradient(ctx, saved, upstream), *(None,) * 6
        with torch.no_grad():  # create_graph=True
            grad = LMFFunction._gradient(ctx, saved, upstream)
        grad = _FirstOrderOnly.apply(grad, link, upstream)
        return grad, *(None,) * 6

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
        raise RuntimeError(
            "lmf_loss has no second derivative: its gradient cannot be differentiated again "
            "(double backward, as in gradient penalties or torch.autograd.gradgradcheck)"
        )


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
