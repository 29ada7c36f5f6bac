"""Who is measured: this package, PyTorch in three ways, and peers; each checked against float64 before it is timed."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Batch, Problem
from lmf_triton import ldam_margins, lmf_loss
from reference import lmf as reference

ORACLE_ELEMENTS = 2**24  # logits that the float64 oracle takes at once: about 2 GiB with its graph
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # 10 times the error of eager PyTorch, or more


@dataclass(frozen=True)
class Contender:
    """A loss ``(logits, target, margins)``, and the options with which the oracle computes the same."""

    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    oracle_options: Mapping[str, float] = field(default_factory=dict)
    compiled: bool = False
    overwrites: bool = False  # the logits, with their gradient
    dense: bool = True  # takes (N, C, d1, ..., dk); otherwise only (N, C)
    probabilities: bool = True  # takes class probabilities; otherwise only classes

    def takes(self, problem: Problem) -> bool:
        is_dense, has_probabilities = len(problem.shape) > 2, problem.target_dtype.is_floating_point
        return (self.dense or not is_dense) and (self.probabilities or not has_probabilities)


def cross_entropy(logits: Tensor, target: Tensor, margins: Tensor) -> Tensor:
    """PyTorch's own loss, which takes int64 targets or probabilities, and has no margins."""
    return F.cross_entropy(logits, target if target.is_floating_point() else target.long())


def eager(logits: Tensor, target: Tensor, margins: Tensor) -> Tensor:
    """LMF as people write it. Of probabilities the reference takes one class after the other, which nobody would."""
    of_target = expected_lmf if target.is_floating_point() else reference.lmf_loss
    return of_target(logits, target, margins)


def expected_lmf(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.5,
    reduction: str = "mean",
) -> Tensor:
    """LMF of class probabilities, ``(N, C, d1, ..., dk)``, for all classes at once from one log-softmax; of scale 1.

    Were j a sample's class, LDAM would be ``-log(e^-m p / (e^-m p + 1 - p))`` with p = p_j and m = margin_j, which is
    ``m - log p + log(1 + p (e^-m - 1))``. It is inexact where some p is near 1, as is ``1 - p`` in the focal factor.
    """
    m = margins.to(logits.dtype).view(-1, *(1,) * (logits.ndim - 2))
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    ldam = m - log_p + torch.log1p(p * torch.expm1(-m))
    focal = (1 - p) ** gamma * -log_p
    loss = (target * (alpha * ldam + beta * focal)).sum(1)
    return loss.sum() if reduction == "sum" else loss.mean()


OURS, RECOMPUTE = "lmf_triton", "lmf_triton, gradient in backward"
EAGER, COMPILED, CROSS_ENTROPY = "eager", "torch.compile", "F.cross_entropy"
LIGER, QUACK, FLASH = "Liger CE", "QuACK CE", "flash-attn CE"
CE_OPTIONS = {"alpha": 0, "gamma": 0}
CONTENDERS = (
    Contender(OURS, lmf_loss),
    Contender(EAGER, eager),
    Contender(COMPILED, eager, compiled=True),
    Contender(CROSS_ENTROPY, cross_entropy, CE_OPTIONS),
)


def importable_peers() -> list[Contender]:
    """Cross-entropy by the kernels of other libraries, where these can be imported. It is less work than LMF."""
    peers = []
    with contextlib.suppress(Exception):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        liger = LigerCrossEntropyLoss()
        peers.append(_peer(LIGER, lambda x, y, _: liger(x, y.long()), overwrites=True))
    with contextlib.suppress(Exception):
        from quack.cross_entropy import cross_entropy as quack

        peers.append(_peer(QUACK, lambda x, y, _: quack(x, y.long()).mean()))
    with contextlib.suppress(Exception):
        from flash_attn.losses.cross_entropy import CrossEntropyLoss

        flash = CrossEntropyLoss()
        peers.append(_peer(FLASH, lambda x, y, _: flash(x, y.long())))
    return peers


def _peer(name: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor], *, overwrites: bool = False) -> Contender:
    """A cross-entropy of classes alone, and of two dimensions."""
    return Contender(name, loss, CE_OPTIONS, overwrites=overwrites, dense=False, probabilities=False)


def describe(error: Exception) -> str:
    """Its kind, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class Run:
    """A contender on a batch: the calls that are timed, and whether what they compute is right."""

    def __init__(self, contender: Contender, batch: Batch) -> None:
        if contender.overwrites:
            batch = replace(batch, logits=batch.logits.detach().clone().requires_grad_())
        self.contender, self.batch = contender, batch
        self.margins = ldam_margins(batch.class_counts)

    @cached_property
    def loss(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        loss = self.contender.loss
        return torch.compile(loss, dynamic=False) if self.contender.compiled else loss

    def forward(self) -> Tensor:
        """Evaluation: no gradient will be asked for."""
        with torch.no_grad():
            return self.training_forward()

    def training_forward(self) -> Tensor:
        return self.loss(self.batch.logits, self.batch.target, self.margins)

    def backward(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.batch.logits)[0]

    def forward_backward(self) -> tuple[Tensor, Tensor]:
        loss = self.training_forward()
        return loss.detach(), self.backward(loss)

    def failure(self) -> str:
        """Why this contender cannot be timed here: it does not run, or is wrong. Empty if all is well."""
        intact = self.batch.logits.detach().clone() if self.contender.overwrites else self.batch.logits.detach()
        try:
            errors = self._errors(intact, *self.forward_backward())
        except Exception as error:  # no compiler, out of memory: whatever it is, the others are still measured
            return describe(error)
        if all(error <= TOLERANCE[intact.dtype] for error in errors):  # not so for NaN
            return ""
        return "wrong: relative error {:.1e} of the loss, {:.1e} of the gradient".format(*errors)

    def _errors(self, logits: Tensor, loss: Tensor, grad: Tensor) -> tuple[float, float]:
        """Errors against the float64 oracle: of the loss, and of the gradient of the worst sample.

        A sample's error is summed over its classes, most of which have a gradient far below the target's, and is
        relative to the average sample.
        """
        n = grad.numel() // grad.shape[1]
        exact_loss = exact_size = 0.0
        errors = []
        size = max(1, ORACLE_ELEMENTS * len(grad) // grad.numel())
        tensors = logits, self.batch.target, grad
        for piece, target, grad_piece in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            exact, exact_grad = self._oracle(piece, target)
            exact_loss += exact.item() / n
            exact_size += exact_grad.abs().sum().item() / n
            errors.append((n * grad_piece.double() - exact_grad).abs().sum(1).max())
        worst = torch.stack(errors).max().item()  # Python's max would lose a NaN
        return abs(loss.item() - exact_loss) / exact_loss, worst / exact_size

    def _oracle(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.double().requires_grad_()
        # Random logits have no class near certainty, where expected_lmf would be inexact.
        oracle = expected_lmf if target.is_floating_point() else reference.lmf_loss
        loss = oracle(logits, target, self.margins, reduction="sum", **self.contender.oracle_options)
        return loss.detach(), *torch.autograd.grad(loss, logits)
