"""Who is measured: this package, PyTorch in three ways, and peers; each checked against float64 before it is timed."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import Batch
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


def cross_entropy(logits: Tensor, target: Tensor, margins: Tensor) -> Tensor:
    """PyTorch's own loss, which takes int64 targets and has no margins."""
    return F.cross_entropy(logits, target.long())


OURS, RECOMPUTE = "lmf_triton", "lmf_triton, gradient in backward"
EAGER, COMPILED, CROSS_ENTROPY = "eager", "torch.compile", "F.cross_entropy"
LIGER, QUACK, FLASH = "Liger CE", "QuACK CE", "flash-attn CE"
CE_OPTIONS = {"alpha": 0, "gamma": 0}
CONTENDERS = (
    Contender(OURS, lmf_loss),
    Contender(EAGER, reference.lmf_loss),
    Contender(COMPILED, reference.lmf_loss, compiled=True),
    Contender(CROSS_ENTROPY, cross_entropy, CE_OPTIONS),
)


def importable_peers() -> list[Contender]:
    """Cross-entropy by the kernels of other libraries, where these can be imported. It is less work than LMF."""
    peers = []
    with contextlib.suppress(Exception):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        liger = LigerCrossEntropyLoss()
        peers.append(Contender(LIGER, lambda x, y, _: liger(x, y.long()), CE_OPTIONS, overwrites=True, dense=False))
    with contextlib.suppress(Exception):
        from quack.cross_entropy import cross_entropy as quack

        peers.append(Contender(QUACK, lambda x, y, _: quack(x, y.long()).mean(), CE_OPTIONS, dense=False))
    with contextlib.suppress(Exception):
        from flash_attn.losses.cross_entropy import CrossEntropyLoss

        flash = CrossEntropyLoss()
        peers.append(Contender(FLASH, lambda x, y, _: flash(x, y.long()), CE_OPTIONS, dense=False))
    return peers


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
        n = self.batch.target.numel()
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
        options = self.contender.oracle_options
        loss = reference.lmf_loss(logits, target, self.margins, reduction="sum", **options)
        return loss.detach(), *torch.autograd.grad(loss, logits)
