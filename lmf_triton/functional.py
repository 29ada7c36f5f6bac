"""The loss as a function."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import checks, devices, dispatch
from .options import Inputs
from .reduction import Normalizer


def lmf_loss(
    logits: Tensor,
    target: Tensor,
    margins: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.5,
    scale: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_adjustment: Tensor | None = None,
    normalizer: Normalizer | None = None,
    grad_in_forward: bool | None = None,
    check_target: bool = False,
) -> Tensor:
    r"""Large-Margin-aware Focal loss: a weighted sum of LDAM and focal loss, computed in one pass over the logits.

    .. math::
        \ell = w_y \left( \alpha\, \mathrm{LDAM} + \beta\, (1 - p_y)^\gamma (-\log p_y) \right), \quad
        \mathrm{LDAM} = -\log \frac{e^{s (x_y - \Delta_y)}}{e^{s (x_y - \Delta_y)} + \sum_{j \ne y} e^{s x_j}}

    with logits x, target class y, p = softmax(x), margins Δ, scale s and class weights w. Special cases:
    ``alpha=0, gamma=0`` is cross-entropy, ``alpha=0`` focal loss, ``beta=0`` LDAM.

    With class probabilities q the loss is :math:`\sum_j q_j \ell_j`, the sum of the losses that the sample would have
    if its class were j, with that class's margin and weight: so mixup's is exactly λ·ℓ_a + (1 - λ)·ℓ_b.

    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float16, bfloat16, float32 or float64; any strides.
            Never modified.
        target: class of each sample, ``()``, ``(N,)`` or ``(N, d1, ..., dk)``; any integer dtype, which the kernels
            read as it is. Or class probabilities, of the logits' shape, any floating dtype and any strides: they need
            not sum to 1, and are taken as they are. A class whose probability or weight is 0 contributes exactly 0,
            though its logit be -inf.
        margins: Δ, ``(C,)``, any floating dtype; see :func:`lmf_triton.ldam_margins`. ``None`` is no margin.
        alpha: coefficient of the LDAM term, >= 0. (Not a class weight, which other libraries call alpha.)
        beta: coefficient of the focal term, >= 0.
        gamma: focusing exponent of the focal term, >= 0.
        scale: s of the LDAM term, > 0. The paper has 1; LDAM's authors take 30 for a normalised classifier.
        weight: class weights w, ``(C,)``, any floating dtype. They multiply the whole loss of a sample and stay
            outside the focal factor.
        ignore_index: target value of samples that have loss 0 and gradient 0. It has no say over probabilities.
        reduction: ``"none"``; ``"sum"``; ``"mean"``, the weighted mean Σ w·l / Σ w of
            :func:`torch.nn.functional.cross_entropy`; or ``"mean_per_term"``, α·Σ w·LDAM / Σ w + β·Σ w·Focal / (number
            of samples), the averaging in the LMF authors' code. Sums and means leave out ignored samples. Of class
            probabilities both means divide by the number of samples, as ``cross_entropy`` does.
        label_smoothing: ε in [0, 1]: the target's probabilities (1 for its class) become (1 - ε)·q + ε / C. As in
            ``cross_entropy``, it leaves a mean's denominator as it is.
        logit_adjustment: b, ``(C,)``, any floating dtype, added to the logits of each softmax: the focal term sees
            x + b, LDAM s·(x_y - Δ_y) + b_y against s·x_j + b_j. For training only, see
            :func:`lmf_triton.log_prior_adjustment`.
        normalizer: what a mean is divided by, in place of its own denominator: a number above 0, or a 0-d tensor on the
            logits' device, which is read there. ``"mean_per_term"`` takes a pair ``(Σ w, number of samples)`` too; one
            number stands for both. It makes means of parts exact. Under gradient accumulation give each micro-batch
            Σ w of all of them (without ``weight`` the number of their samples, which is Hugging Face's
            ``num_items_in_batch``; that counts labels, not weights). Under DDP, which averages the ranks' gradients,
            give the total over all ranks, divided by the world size. With everything ignored the loss is then 0.
        grad_in_forward: when the gradient is computed. ``True``: with the loss, so that the logits are read once.
            ``False``: in backward, from the logits and a few floats a sample (on the CPU from the loss's own
            arguments). ``None`` takes ``True`` for sums and means and ``False`` for ``"none"`` and for float16, where
            the gradient of a mean would underflow before a loss scale reaches it.
        check_target: raise on classes that are out of range off the CPU too, at the price of a synchronisation.

    Returns:
        The loss, float32 (float64 for float64 logits), a scalar or for ``"none"`` one number a sample. The gradient
        has the logits' dtype, and their strides where they are dense (otherwise those of ``torch.empty_like``).

        A launch of the kernels covers all samples whose positions fit two strides; this holds for 1-d and 2-d logits of
        any strides, and for contiguous and channels_last ones of any dimension. Other layouts take one launch for
        each index of the dimensions that are left over.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or a tensor whose values the loss cannot read: a DTensor
            (give ``.to_local()`` or ``.full_tensor()``), a sparse one.
        ValueError: a shape, device or option is wrong.
        IndexError: on the CPU, or with ``check_target``, a target is outside ``[0, C)`` and not ``ignore_index``.
            Otherwise the loss and the gradient of that sample are NaN.
        NotImplementedError: a tensor carries a tangent of forward-mode AD, or is wrapped by a transform of torch.func.

    References:
        Sadi et al., "LMFLoss: A Hybrid Loss for Imbalanced Medical Image Classification", 2022, eq. 3
        (https://arxiv.org/abs/2212.12741); Cao et al. 2019 for LDAM (https://arxiv.org/abs/1906.07413);
        Lin et al. 2017 for focal loss (https://arxiv.org/abs/1708.02002); Menon et al. 2021 for the logit adjustment
        (https://arxiv.org/abs/2007.07314); Szegedy et al. 2016 for label smoothing (https://arxiv.org/abs/1512.00567).
    """
    tensors: tuple[object, ...] = (logits, target, margins, weight, logit_adjustment)
    if normalizer is not None:
        tensors += normalizer if isinstance(normalizer, tuple) else (normalizer,)
    if has_torch_function(tensors):  # subclasses decide what becomes of a call, as of PyTorch's own functions
        loss: Tensor = handle_torch_function(
            lmf_loss,
            tensors,
            logits,
            target,
            margins,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            scale=scale,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logit_adjustment=logit_adjustment,
            normalizer=normalizer,
            grad_in_forward=grad_in_forward,
            check_target=check_target,
        )
        return loss
    options = checks.check_options(alpha, beta, gamma, scale, ignore_index, reduction, label_smoothing)
    inputs = Inputs(logits, target, margins, weight, logit_adjustment)
    checks.check_inputs(inputs)
    if normalizer is not None:
        checks.check_normalizer(normalizer, options, logits)
    checks.check_grad_in_forward(grad_in_forward)
    return dispatch.evaluate(_backend, inputs, normalizer, options, grad_in_forward, check_target)


def _backend(logits: Tensor) -> devices.Backend:
    """What computes the loss in eager mode; tools that execute compiled kernels put their own in its place."""
    return devices.backend_of(logits)
