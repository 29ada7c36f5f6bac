"""The losses as modules: margins and weights are buffers, the rest is one call of :func:`lmf_loss`."""

from collections.abc import Sequence

from torch import Tensor, nn

from .functional import check_options, check_per_class, lmf_loss
from .margins import ldam_margins


class _LossModule(nn.Module):
    """What the three losses share. ``settings`` are the attributes shown by ``repr``."""

    margins: Tensor | None
    weight: Tensor | None

    def __init__(self, margins: Tensor | None, weight: Tensor | None, **settings) -> None:
        super().__init__()
        check_per_class("weight", weight, None if margins is None else len(margins))
        self.register_buffer("margins", margins)
        self.register_buffer("weight", weight)
        self._setting_names = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        shown = {} if self.margins is None else {"n_classes": len(self.margins)}
        shown |= {name: getattr(self, name) for name in self._setting_names}
        shown["weight"] = None if self.weight is None else tuple(self.weight.shape)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class LMFLoss(_LossModule):
    """Large-Margin-aware Focal loss: ``alpha * LDAM + beta * Focal``, with margins from the class counts.

    The formula and the arguments that are not listed here are those of :func:`lmf_triton.lmf_loss`.

    Args:
        class_counts: training samples of each class, ``(C,)``, in the order of the logits; finite and positive.
        alpha, beta, gamma, scale: of the formula, as in ``lmf_loss``.
        max_margin: margin of the rarest class, fixed when the module is built; see :func:`lmf_triton.ldam_margins`.
        weight: class weights, ``(C,)``, any floating dtype, or ``None``.
        ignore_index, reduction: as in ``lmf_loss``.

    Shape:
        logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, float16 to float64; target the same without C, any
        integer dtype. The loss is float32 (float64 for float64 logits), a scalar or, with ``reduction="none"``, of
        the target's shape.

    Attributes:
        margins, weight: buffers, ``(C,)``; ``.to(device)`` moves them to where the logits are.

    Raises:
        TypeError, ValueError: for arguments that ``lmf_loss`` or ``ldam_margins`` refuse.

    References:
        Sadi et al. 2022, eq. 3 (https://arxiv.org/abs/2212.12741). What the authors' own code computes is
        ``LMFLoss(counts, alpha=1.5, scale=30, weight=ldam_margins(counts), reduction="mean_per_term")``.
    """

    def __init__(
        self,
        class_counts: Sequence[float] | Tensor,
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
            ldam_margins(class_counts, max_margin=max_margin),
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
        return lmf_loss(
            logits,
            target,
            self.margins,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            scale=self.scale,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class LDAMLoss(_LossModule):
    """Label-distribution-aware margin loss: LMF with ``alpha=1, beta=0``.

    Arguments, shapes and errors are those of :class:`LMFLoss`.

    References:
        Cao et al. 2019 (https://arxiv.org/abs/1906.07413). The authors take ``scale=30`` with a classifier whose
        features and weights are normalised.
    """

    def __init__(
        self,
        class_counts: Sequence[float] | Tensor,
        *,
        max_margin: float = 0.5,
        scale: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        check_options(1.0, 0.0, 0.0, scale, ignore_index, reduction)
        super().__init__(
            ldam_margins(class_counts, max_margin=max_margin),
            weight,
            max_margin=max_margin,
            scale=scale,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return lmf_loss(
            logits,
            target,
            self.margins,
            beta=0.0,
            scale=self.scale,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class FocalLoss(_LossModule):
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
        return lmf_loss(
            logits,
            target,
            alpha=0.0,
            gamma=self.gamma,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )
