"""The losses as modules: margins and weights are buffers, the rest is one call of :func:`lmf_loss`."""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, Final, TypedDict

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checks import check_options, check_per_class, python_number
from .counts import ClassCounts, counts_in_order
from .functional import lmf_loss
from .margins import ldam_margins
from .reduction import Normalizer

BUFFERS = ("margins", "weight", "logit_adjustment")
# What people may take for a setting of any loss. On one that has none of that name, it would have no effect.
ARGUMENTS = {"class_counts", "max_margin", *signature(lmf_loss).parameters} - {
    "logits",
    "target",
    "weight",
    "logit_adjustment",
}


class Terms(TypedDict):
    """The arguments of ``lmf_loss`` that tell one loss from another."""

    alpha: float
    beta: float
    gamma: float
    scale: float


class LossModule(nn.Module):
    """What the losses share. Each adds its constructor, whose arguments are its settings and attributes, and its terms.

    The buffers are the module's own: what is handed in or assigned is copied. Beside them the module keeps what they
    were made from, so that they can be made again where ``to_empty`` has left them without values.
    """

    margins: Tensor | None
    weight: Tensor | None
    logit_adjustment: Tensor | None
    __call__: Callable[..., Tensor]
    _settings: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__ == __name__:  # a user's subclass has the settings of its base
            cls._settings = tuple(name for name in signature(cls).parameters if name not in ("class_counts", *BUFFERS))

    def __init__(
        self,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        logit_adjustment: Tensor | None,
        check_target: bool,
        class_counts: ClassCounts = (),
        max_margin: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignore_index: int = ignore_index
        self.reduction: str = reduction
        self.label_smoothing: float = label_smoothing
        self.check_target: bool = check_target
        self._given: dict[str, Tensor | None] = {}  # the buffers that were handed in or assigned, as they were then
        self._without_values: set[str] = set()  # those that were on the meta device; NaN holds their place
        margins = None
        if "max_margin" in self._settings:
            margins = ldam_margins(class_counts, max_margin=max_margin)
            self._new_margins: Callable[[], Tensor] = partial(
                ldam_margins, counts_in_order(class_counts), max_margin=max_margin
            )
        super().register_buffer("margins", margins)
        for name, per_class in ("weight", weight), ("logit_adjustment", logit_adjustment):
            check_per_class(name, per_class, None if margins is None else len(margins))
            self.register_buffer(name, per_class)
        self._trace = self._follow_buffers(torch.empty(0, dtype=torch.float32))

    def _terms(self) -> Terms:
        raise NotImplementedError

    def _check_settings(self) -> None:
        check_options(
            **self._terms(),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    @torch.jit.unused  # a model that holds a loss may be scripted; the loss itself is not for it
    def forward(self, input: Tensor, target: Tensor, *, normalizer: Normalizer | None = None) -> Tensor:
        if self._without_values:
            self._check_values()
        return lmf_loss(
            input,
            target,
            self.margins,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            logit_adjustment=self.logit_adjustment,
            normalizer=normalizer,
            check_target=self.check_target,
            **self._terms(),
        )

    def extra_repr(self) -> str:
        shown: dict[str, object] = {} if self.margins is None else {"n_classes": len(self.margins)}
        shown |= {name: getattr(self, name) for name in self._settings}
        for name in ("weight", "logit_adjustment"):
            per_class = getattr(self, name)
            shown[name] = None if per_class is None else tuple(per_class.shape)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        # The value's type is nn.Module's, so that type checkers as well refuse the settings that a loss does not have.
        self._check_assignment(name)
        if name in BUFFERS and (value is None or isinstance(value, Tensor)):  # a Parameter is no exception
            self.register_buffer(name, value, name not in self._non_persistent_buffers_set)
        else:
            super().__setattr__(name, self._as_kept(name, value))

    def _as_kept(self, name: str, value: Any) -> Any:
        """A setting as Python's number, which ``repr`` shows; of the terms as a float.

        Dynamo takes an integer attribute for a constant, and compiles anew for each.
        """
        if name not in self._settings:
            return value
        number = python_number(value)
        is_float = name in Terms.__annotations__ or name == "label_smoothing"
        return float(number) if is_float and isinstance(number, int) and not isinstance(number, bool) else number

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if name in BUFFERS:
            check_per_class(name, tensor, None)
            self._given[name], tensor = _copy(tensor), _copy(tensor)
            self._without_values.discard(name)
        super().register_buffer(name, tensor, persistent)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        given = self._given.copy()  # of a checkpoint nobody knows what a schedule had written before it was saved
        super()._load_from_state_dict(*args, **kwargs)
        self._given = given

    def _check_assignment(self, name: str) -> None:
        """Raise an AttributeError for a setting that would be accepted without effect."""
        loss = type(self)
        if name == "max_margin" and name in self._settings and name in self.__dict__:
            raise AttributeError(
                f"max_margin of a {loss.__name__} is fixed when it is built, since the margins follow from it: build "
                "another, or assign margins, criterion.margins = ldam_margins(class_counts, max_margin=...)"
            )
        has_it = ("max_margin" if name == "margins" else name) in self._settings
        is_subclass = loss.__module__ != __name__  # what it does with attributes is its own affair
        if name in ARGUMENTS and not has_it and not is_subclass:
            raise AttributeError(f"{name} cannot be set on a {loss.__name__}, where it would have no effect")

    def reset_parameters(self) -> None:
        """Write the buffers that are there as they were built or assigned.

        ``to_empty`` does so by itself; whoever materialises a module in another way calls this. What was handed in on
        the meta device has no values: the forward pass refuses it until it is loaded or assigned.
        """
        for name, buffer in self._own_buffers().items():
            self._write_anew(name, buffer)

    def _own_buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name in BUFFERS if (buffer := getattr(self, name)) is not None}

    def _write_anew(self, name: str, buffer: Tensor) -> None:
        if name in self._given:
            values = self._given[name]
        else:
            with torch.device(buffer.device):
                values = self._new_margins()
        if values is None or (values.is_meta and not buffer.is_meta):
            self._without_values.add(name)
            values = torch.full_like(buffer, math.nan)
        with torch.no_grad():
            buffer.copy_(values)

    def _check_values(self) -> None:
        """Refuse buffers without values, unless they were loaded or written to since. Asks the device only then."""
        for name, buffer in self._own_buffers().items():
            if name in self._without_values and bool(buffer.isnan().all()):
                raise RuntimeError(
                    f"the loss's buffer {name} has no values: it was handed in on the meta device. Load a state_dict, "
                    f"assign it (criterion.{name} = ...), or hand it in on another device"
                )
        self._without_values.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LossModule":
        """Move or cast, by whatever method of ``nn.Module``; values that did not come along are written anew."""
        before = self._own_buffers()
        with _Allocations() as allocations:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._own_buffers().items():
            if not buffer.is_meta and (before[name].is_meta or allocations.seen):
                self._write_anew(name, buffer)
        if not before:
            # From the meta device nothing can be moved but by to_empty; an empty tensor has nothing to lose.
            self._trace = fn(self._trace.new_empty((0,), device="cpu") if self._trace.is_meta else self._trace)
        self._trace = self._follow_buffers(self._trace)
        return self

    def _follow_buffers(self, trace: Tensor) -> Tensor:
        """An empty tensor that is where the module is, as it knows without buffers too: where they are, else itself."""
        return next((buffer.new_empty((0,)) for buffer in self._own_buffers().values()), trace)


def _copy(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    with torch.inference_mode(False):  # a loss built in inference mode must train all the same
        return tensor.detach().clone()


class _Allocations(TorchFunctionMode):
    """Sees whether memory without values was asked for, as ``to_empty`` does for every tensor of a module."""

    WITHOUT_VALUES = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)
    seen = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func in self.WITHOUT_VALUES
        return func(*args, **(kwargs or {}))


class LMFLoss(LossModule):
    """Large-Margin-aware Focal loss: ``alpha * LDAM + beta * Focal``, with margins from the class counts.

    The formula and the arguments that are not listed here are those of :func:`lmf_triton.lmf_loss`.

    Args:
        class_counts: training samples of each class, finite and positive: ``(C,)`` in the order of the logits, or a
            dict, ``Counter`` or pandas Series whose keys are the classes 0 to C - 1.
        alpha, beta, gamma, scale: of the formula, as in ``lmf_loss``.
        max_margin: margin of the rarest class, fixed when the module is built; see :func:`lmf_triton.ldam_margins`.
        weight: class weights, ``(C,)``, any floating dtype, or ``None``. Copied.
        ignore_index, reduction, label_smoothing, check_target: as in ``lmf_loss``.
        logit_adjustment: as in ``lmf_loss``, ``(C,)``, any floating dtype, or ``None``. Copied.

    Call:
        ``criterion(input, target, *, normalizer=None)``, as the losses of ``torch.nn``: ``input`` are the logits;
        ``normalizer`` as in ``lmf_loss``.

    Shape:
        input ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, float16 to float64; target the same without C, any
        integer dtype, or the same, any floating dtype: class probabilities. The loss is float32 (float64 for float64
        logits), a scalar or, with ``reduction="none"``, of the input's shape without C.

    Attributes:
        margins, weight, logit_adjustment: buffers, ``(C,)``; ``.to(device)`` moves them to where the logits are. What
            is assigned to them is copied. After ``to_empty`` they have their values again, see
            :meth:`reset_parameters`.
        alpha, beta, gamma, scale, ignore_index, reduction, label_smoothing, check_target: may be changed between
            steps. ``max_margin`` may not.

    Raises:
        TypeError, ValueError, NotImplementedError: for arguments that ``lmf_loss`` or ``ldam_margins`` refuse.
        AttributeError: when a setting is assigned that would have no effect.
        RuntimeError: at first use, where a buffer was handed in on the meta device and never filled.

    References:
        Sadi et al. 2022, eq. 3 (https://arxiv.org/abs/2212.12741). What the authors' own code computes is
        ``LMFLoss(counts, alpha=1.5, scale=30, weight=ldam_margins(counts), reduction="mean_per_term")``.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        scale: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_adjustment: Tensor | None = None,
        check_target: bool = False,
    ) -> None:
        super().__init__(
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            logit_adjustment,
            check_target,
            class_counts,
            max_margin,
        )
        self.alpha: float = alpha
        self.beta: float = beta
        self.gamma: float = gamma
        self.max_margin: Final[float] = max_margin
        self.scale: float = scale
        self._check_settings()

    def _terms(self) -> Terms:
        return {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma, "scale": self.scale}


class LDAMLoss(LossModule):
    """Label-distribution-aware margin loss: LMF with ``alpha=1, beta=0``.

    Arguments, shapes and errors are those of :class:`LMFLoss`.

    References:
        Cao et al. 2019 (https://arxiv.org/abs/1906.07413). The authors take ``scale=30`` with a classifier whose
        features and weights are normalised.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        max_margin: float = 0.5,
        scale: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_adjustment: Tensor | None = None,
        check_target: bool = False,
    ) -> None:
        super().__init__(
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            logit_adjustment,
            check_target,
            class_counts,
            max_margin,
        )
        self.max_margin: Final[float] = max_margin
        self.scale: float = scale
        self._check_settings()

    def _terms(self) -> Terms:
        return {"alpha": 1.0, "beta": 0.0, "gamma": 0.0, "scale": self.scale}


class FocalLoss(LossModule):
    """Multi-class focal loss, ``(1 - p_y)^gamma * (-log p_y)``: LMF with ``alpha=0, beta=1``.

    Arguments, shapes and errors are those of :class:`LMFLoss`; ``gamma=0`` is cross-entropy.

    References:
        Lin et al. 2017, eq. 4 (https://arxiv.org/abs/1708.02002). Its class weight, called alpha there, is
        ``weight`` here.
    """

    def __init__(
        self,
        *,
        gamma: float = 1.5,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_adjustment: Tensor | None = None,
        check_target: bool = False,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing, logit_adjustment, check_target)
        self.gamma: float = gamma
        self._check_settings()

    def _terms(self) -> Terms:
        return {"alpha": 0.0, "beta": 1.0, "gamma": self.gamma, "scale": 1.0}
