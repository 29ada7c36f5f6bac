"""LDAM's deferred re-weighting: which class weights hold at which epoch or step."""

from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from .checks import as_int, check_plain
from .counts import ClassCounts
from .margins import class_balanced_weights
from .modules import LossModule


class DeferredReweighting:
    """LDAM's schedule (DRW): train unweighted first, with class-balanced weights from ``start_epoch`` or step on.

    It writes into the ``weight`` buffer of a loss: any of this package's, or ``nn.CrossEntropyLoss``. A loss that was
    built without one gets a buffer of ones, which changes no value, so that its ``state_dict`` has the same keys in
    both stages and a resumed run needs nothing but ``step``::

        criterion = LDAMLoss(class_counts).to(device)
        schedule = DeferredReweighting(criterion, class_counts, start_epoch=160)
        for epoch in range(200):
            schedule.step(epoch)
            ...

    Who counts optimizer steps gives ``start_step`` instead, and calls ``schedule.step(global_step)`` before the forward
    pass. The number decides alone: the schedule keeps no count that a checkpoint would have to hold.

    The first stage has the weights that the loss was built with, or was assigned: neither an earlier schedule nor a
    checkpoint of the second stage changes what a schedule starts from. (A loss of another library does not remember
    what it was built with: make its schedule before a checkpoint is loaded.) A tensor that the caller handed to the
    loss is never written to.

    Args:
        criterion: the loss, a module with a buffer ``weight``, ``(C,)`` or ``None``.
        class_counts: training samples of each class, as for :func:`lmf_triton.ldam_margins`.
        start_epoch: first epoch with class-balanced weights; >= 0. LDAM's authors take 160 of 200.
        start_step: first step with them, in place of ``start_epoch``: :meth:`step` is then given steps.
        beta: of :func:`lmf_triton.class_balanced_weights`.
        device: where the weights shall be. ``None`` is where the loss is. Only a loss of another library without
            weights, such as ``nn.CrossEntropyLoss()``, does not know where it was moved: its weights are put where
            ``class_counts`` are, if that is a tensor, else on PyTorch's default device.

    Raises:
        TypeError: the criterion has no buffer ``weight``, an argument is of the wrong type, or not one of
            ``start_epoch`` and ``start_step`` is given.
        ValueError: the start is negative, the weight's length is not C, or as ``class_balanced_weights``; or what
            the first stage starts from cannot be told, since the criterion's weights are those of the second already.

    References:
        Cao et al. 2019, algorithm 1, with the weights of Cui et al. 2019.
    """

    @overload
    def __init__(
        self,
        criterion: nn.Module,
        class_counts: ClassCounts,
        *,
        start_epoch: int,
        beta: float = ...,
        device: torch.device | str | int | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        criterion: nn.Module,
        class_counts: ClassCounts,
        *,
        start_step: int,
        beta: float = ...,
        device: torch.device | str | int | None = ...,
    ) -> None: ...
    @torch.inference_mode(False)  # a tensor made in inference mode could not be written to outside
    def __init__(
        self,
        criterion: nn.Module,
        class_counts: ClassCounts,
        *,
        start_epoch: int | None = None,
        start_step: int | None = None,
        beta: float = 0.9999,
        device: torch.device | str | int | None = None,
    ) -> None:
        if "weight" not in getattr(criterion, "_buffers", {}):
            raise TypeError(f"criterion must be a loss module with a buffer 'weight', got {type(criterion).__name__}")
        if (start_epoch is None) == (start_step is None):
            raise TypeError(f"give one of start_epoch and start_step, got {start_epoch!r} and {start_step!r}")
        weight = _weight_of(criterion)
        if weight is not None:
            check_plain("criterion.weight", weight)
        self.criterion = criterion
        if start_step is None:
            self.start = _not_negative("start_epoch", start_epoch)
        else:
            self.start = _not_negative("start_step", start_step)
        where_counts_are = class_counts.device if isinstance(class_counts, Tensor) else torch.get_default_device()
        with torch.device("cpu"):  # not meta, where it would have no values
            self._deferred = class_balanced_weights(class_counts, beta=beta)
        self._initial = _initial_weight(criterion, self._deferred)
        if self._initial.shape != self._deferred.shape:
            raise ValueError(
                f"class_counts must have one count for each of the loss's {len(self._initial)} class weights, "
                f"got {len(self._deferred)}"
            )
        if weight is None or device is not None:
            known = _device_of(criterion) if device is None else device
            criterion.weight = self._initial  # ours keeps a copy, with which it makes its weight again after to_empty
            weight = self._initial.to(where_counts_are if known is None else known, copy=True)
            criterion._buffers["weight"] = weight
            if known is None:
                criterion.register_forward_pre_hook(_check_device)
        self._own_weight(weight)

    def step(self, epoch_or_step: int) -> None:
        """Set the weights of this epoch, or step where the start is one, the first being 0.

        In place: a captured CUDA graph sees them too.
        """
        has_started = _not_negative("the epoch or step", epoch_or_step) >= self.start
        weight = _weight_of(self.criterion)
        if weight is None:
            raise RuntimeError("the loss's weight was set to None: make the schedule anew")
        check_plain("criterion.weight", weight)
        if weight.is_meta:
            raise RuntimeError(
                "the loss is on the meta device, where weights have no values: materialise it, then step"
            )
        weight = self._own_weight(weight)
        # Beside the weight from now on, so that no later step has to wait for the device.
        self._initial, self._deferred = self._initial.to(weight.device), self._deferred.to(weight.device)
        with torch.no_grad():
            weight.copy_(self._deferred if has_started else self._initial)

    def _own_weight(self, weight: Tensor) -> Tensor:
        """The loss's weight, or a copy in its place: no tensor of the caller's, who may share it with a second loss."""
        criterion = self.criterion
        if isinstance(criterion, LossModule):  # copies what it is given
            return weight
        mark = _mark_on(criterion)
        if mark is None or mark.buffer is not weight:
            criterion.weight = weight = weight.detach().clone()
        criterion.__dict__["_reweighting"] = _Mark(weight, self._initial, self._deferred)
        return weight


class _Mark(NamedTuple):
    """What a schedule leaves on a loss of another library, for the schedules after it."""

    buffer: Tensor  # its weight, which no one else had when it was made
    initial: Tensor
    deferred: Tensor


def _weight_of(criterion: nn.Module) -> Tensor | None:
    return criterion._buffers.get("weight")


def _mark_on(criterion: nn.Module) -> _Mark | None:
    mark: _Mark | None = criterion.__dict__.get("_reweighting")
    return mark


def _initial_weight(criterion: nn.Module, deferred: Tensor) -> Tensor:
    """A copy of the weights that the criterion had before any schedule wrote to them; ones where it had none."""
    ones = torch.ones_like(deferred)
    weight = _weight_of(criterion)
    if isinstance(criterion, LossModule):
        weight = criterion._given["weight"]
    elif weight is not None:
        mark = _mark_on(criterion)
        if mark is not None and (_same(weight, mark.initial) or _same(weight, mark.deferred)):
            weight = mark.initial
        elif _same(weight, deferred) and not _same(weight, ones):
            raise ValueError(
                f"the weights of {type(criterion).__name__} are the class-balanced ones already, as in a checkpoint of "
                "the second stage: make the schedule first, then load the checkpoint"
            )
    if weight is None:
        return ones
    if weight.is_meta:
        raise ValueError(
            "the weights that the loss was built with are on the meta device and have no values: assign "
            "criterion.weight, then make the schedule"
        )
    return weight.detach().clone()


def _same(weight: Tensor, written: Tensor) -> bool:
    """Whether these weights are what a schedule wrote, even if they were cast to a half dtype and back since then."""
    if weight.shape != written.shape or weight.is_meta:
        return False
    return torch.allclose(weight.to(written), written, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=0)


def _device_of(criterion: nn.Module) -> torch.device | None:
    """Where a loss without weights is, as far as it knows."""
    if isinstance(criterion, LossModule):
        return criterion._follow_buffers(criterion._trace).device
    return next((tensor.device for tensor in (*criterion.buffers(), *criterion.parameters())), None)


def _check_device(criterion: nn.Module, inputs: tuple[object, ...]) -> None:
    """Before the forward pass of a loss that could not tell where it was moved."""
    logits, weight = next((x for x in inputs if isinstance(x, Tensor)), None), _weight_of(criterion)
    if logits is not None and weight is not None and logits.device != weight.device:
        raise ValueError(
            f"the class weights of DeferredReweighting are on {weight.device}, the input is on {logits.device}: "
            f"{type(criterion).__name__} did not know its device; make the schedule with device={str(logits.device)!r}"
        )


def _not_negative(name: str, value: object) -> int:
    number = as_int(name, value)
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return number
