"""The losses as modules: margins and weights are buffers, the rest is one call of :func:`lmf_loss`."""

import math

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checks import check_options, check_per_class
from .counts import ClassCounts, counts_in_order
from .functional import lmf_loss
from .margins import ldam_margins

BUFFERS = ("margins", "weight")
# Arguments of the losses and of lmf_loss. Each module has some of them as attributes, and none without effect.
ARGUMENTS = ("alpha", "beta", "gamma", "max_margin", "scale", "ignore_index", "reduction", "class_counts", "margins")
ARGUMENTS += ("grad_in_forward", "check_target")


class LossModule(nn.Module):
    """What the three losses share: the buffers, and settings, which are attributes that ``repr`` shows.

    The buffers are the module's own: what is handed in or assigned is copied. Beside them the module keeps what they
    were made from, so that they can be made again where ``to_empty`` has left them without values.
    """

    margins: Tensor | None
    weight: Tensor | None
    _setting_names: tuple[str, ...] = ()
    _class_counts: tuple[float, ...] | None = None
    _given_weight: Tensor | None = None  # what the module was built with, or was assigned
    _weight_is_missing = False  # it was handed in on the meta device; NaN holds its place

    def __init__(self, class_counts: ClassCounts | None, weight: Tensor | None, **settings) -> None:
        super().__init__()
        self._setting_names = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)
        margins = None
        if "max_margin" in settings:
            self._class_counts = tuple(counts_in_order(class_counts))
            margins = ldam_margins(class_counts, max_margin=self.max_margin)
        check_per_class("weight", weight, None if margins is None else len(margins))
        self.register_buffer("margins", margins)
        self.register_buffer("weight", weight)
        self._trace = self._follow_buffers(torch.empty(0, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Write margins and weight as they were when the module was built, into the buffers that are there.

        ``to_empty`` does so by itself; whoever materialises a module in another way calls this. A weight that was
        handed in on the meta device has no values: the forward pass refuses it until it is loaded or assigned.
        """
        for name in BUFFERS:
            if getattr(self, name) is not None:
                self._write_anew(name)

    def _write_anew(self, name: str) -> None:
        buffer = getattr(self, name)
        if name == "margins":
            with torch.device(buffer.device):
                values = ldam_margins(self._class_counts, max_margin=self.max_margin)
        else:
            values = self._given_weight
            self._weight_is_missing = values is None or values.is_meta
            if self._weight_is_missing:
                values = torch.full_like(buffer, math.nan)
        with torch.no_grad():
            buffer.copy_(values)

    def _apply(self, fn, recurse=True):
        """Move or cast, by whatever method of ``nn.Module``; values that did not come along are written anew."""
        before = {name: getattr(self, name) for name in BUFFERS}
        with _Allocations() as allocations:
            super()._apply(fn, recurse)
        for name, buffer in before.items():
            is_new = buffer is not None and not getattr(self, name).is_meta
            if is_new and (buffer.is_meta or allocations.seen):
                self._write_anew(name)
        if self.margins is None and self.weight is None:
            # From the meta device nothing can be moved but by to_empty; an empty tensor has nothing to lose.
            self._trace = fn(self._trace.new_empty(0, device="cpu") if self._trace.is_meta else self._trace)
        self._trace = self._follow_buffers(self._trace)
        return self

    def _follow_buffers(self, trace: Tensor) -> Tensor:
        """An empty tensor that is where the module is, as it knows without buffers too: where they are, else itself."""
        return next((buffer.new_empty(0) for buffer in (self.margins, self.weight) if buffer is not None), trace)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, self._taken(name, tensor), persistent)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        given = self._given_weight  # of a checkpoint nobody knows what a schedule had written before it was saved
        super()._load_from_state_dict(*args, **kwargs)
        self._given_weight = given

    def __setattr__(self, name: str, value: object) -> None:
        self._check_assignment(name)
        super().__setattr__(name, self._taken(name, value))

    def _taken(self, name: str, value: object) -> object:
        """The value, of a buffer a copy: what a user hands in stays the user's. A weight is remembered as well."""
        if name not in BUFFERS or not (value is None or isinstance(value, Tensor)):
            return value
        check_per_class(name, value, None)
        if name == "weight":
            self._given_weight, self._weight_is_missing = _copy(value), False
        return _copy(value)

    def _check_assignment(self, name: str) -> None:
        """Raise an AttributeError for a setting that would be accepted without effect."""
        if name not in ARGUMENTS:
            return
        loss = type(self).__name__
        if name == "max_margin" and name in self._setting_names and name in self.__dict__:
            raise AttributeError(
                f"max_margin of a {loss} is fixed when it is built, since the margins follow from it: build another, "
                "or assign margins, criterion.margins = ldam_margins(class_counts, max_margin=...)"
            )
        has_it = name in self._setting_names if name != "margins" else self._class_counts is not None
        is_subclass = type(self).__module__ != __name__  # what it does with attributes is its own affair
        if not has_it and not is_subclass:
            raise AttributeError(f"{name} cannot be set on a {loss}, where it would have no effect")

    def _check_weight(self) -> None:
        """Refuse a weight without values, unless it was loaded or written to since then. Asks the device only then."""
        if bool(self.weight.isnan().all()):
            raise RuntimeError(
                "the loss's weight has no values: it was handed in on the meta device. Load a state_dict, assign it "
                "(criterion.weight = ...), or build the loss with a weight on another device"
            )
        self._weight_is_missing = False

    def extra_repr(self) -> str:
        shown = {} if self.margins is None else {"n_classes": len(self.margins)}
        shown |= {name: getattr(self, name) for name in self._setting_names}
        shown["weight"] = None if self.weight is None else tuple(self.weight.shape)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _evaluate(self, logits: Tensor, target: Tensor, **terms: float) -> Tensor:
        """The loss with these settings of its terms, and the module's margins, weight and averaging."""
        if self._weight_is_missing:
            self._check_weight()
        return lmf_loss(
            logits,
            target,
            self.margins,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            **terms,
        )


def _copy(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    with torch.inference_mode(False):  # a loss built in inference mode must train all the same
        return tensor.detach().clone()


class _Allocations(TorchFunctionMode):
    """Sees whether memory without values was asked for, as ``to_empty`` does for every tensor of a module."""

    WITHOUT_VALUES = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)
    seen = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen |= function in self.WITHOUT_VALUES
        return function(*args, **(kwargs or {}))


class LMFLoss(LossModule):
    """Large-Margin-aware Focal loss: ``alpha * LDAM + beta * Focal``, with margins from the class counts.

    The formula and the arguments that are not listed here are those of :func:`lmf_triton.lmf_loss`.

    Args:
        class_counts: training samples of each class, finite and positive: ``(C,)`` in the order of the logits, or a
            dict, ``Counter`` or pandas Series whose keys are the classes 0 to C - 1.
        alpha, beta, gamma, scale: of the formula, as in ``lmf_loss``.
        max_margin: margin of the rarest class, fixed when the module is built; see :func:`lmf_triton.ldam_margins`.
        weight: class weights, ``(C,)``, any floating dtype, or ``None``. Copied.
        ignore_index, reduction: as in ``lmf_loss``.

    Shape:
        logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, float16 to float64; target the same without C, any
        integer dtype. The loss is float32 (float64 for float64 logits), a scalar or, with ``reduction="none"``, of
        the target's shape.

    Attributes:
        margins, weight: buffers, ``(C,)``; ``.to(device)`` moves them to where the logits are. What is assigned to
            them is copied. After ``to_empty`` they have their values again, see :meth:`reset_parameters`.
        alpha, beta, gamma, scale, ignore_index, reduction: may be changed between steps. ``max_margin`` may not.

    Raises:
        TypeError, ValueError, NotImplementedError: for arguments that ``lmf_loss`` or ``ldam_margins`` refuse.
        AttributeError: when a setting is assigned that would have no effect.
        RuntimeError: at first use, where a weight was handed in on the meta device and never filled.

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
    ) -> None:
        check_options(alpha, beta, gamma, scale, ignore_index, reduction)
        super().__init__(
            class_counts,
            weight,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            max_margin=max_margin,
            scale=scale,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self._evaluate(logits, target, alpha=self.alpha, beta=self.beta, gamma=self.gamma, scale=self.scale)


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
    ) -> None:
        check_options(1.0, 0.0, 0.0, scale, ignore_index, reduction)
        super().__init__(
            class_counts,
            weight,
            max_margin=max_margin,
            scale=scale,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self._evaluate(logits, target, beta=0.0, scale=self.scale)


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
    ) -> None:
        check_options(0.0, 1.0, gamma, 1.0, ignore_index, reduction)
        super().__init__(None, weight, gamma=gamma, ignore_index=ignore_index, reduction=reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self._evaluate(logits, target, alpha=0.0, gamma=self.gamma)
