"""A training script as a user may write it, with every public name. Type checkers read it, and a test runs it."""

from array import array
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from lmf_triton import (
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LMFLoss,
    class_balanced_weights,
    count_classes,
    ldam_margins,
    lmf_loss,
    log_prior_adjustment,
)

Normalizer = float | Tensor | tuple[float | Tensor, float | Tensor]

N_CLASSES = 3
EPOCHS = 4


class AnnealedFocalLoss(FocalLoss):
    """A loss of one's own on top of one of these, with a coefficient that they do not have."""

    def __init__(self, alpha: float, *, final_gamma: float, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = alpha
        self.final_gamma = final_gamma

    def forward(self, input: Tensor, target: Tensor, *, normalizer: Normalizer | None = None) -> Tensor:
        return self.alpha * super().forward(input, target, normalizer=normalizer)

    def step(self) -> None:
        self.gamma += 0.5 * (self.final_gamma - self.gamma)


def make_data() -> tuple[Tensor, Tensor]:
    """Classes of 20, 8 and 2 samples."""
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([0] * 20 + [1] * 8 + [2] * 2)
    return torch.randn(len(target), 4, generator=generator) + target[:, None], target


def margins_and_weights(target: Tensor) -> tuple[Tensor, Tensor]:
    """Class counts come in many forms."""
    labels: list[int] = target.tolist()
    as_list = [labels.count(c) for c in range(N_CLASSES)]
    for margins in (
        ldam_margins(as_list),
        ldam_margins(tuple(as_list), max_margin=0.5),
        ldam_margins(Counter(labels)),
        ldam_margins(dict(enumerate(as_list))),
        ldam_margins(np.bincount(labels)),
        ldam_margins([Fraction(n, len(labels)) for n in as_list]),
        ldam_margins([Decimal(n) for n in as_list]),
        ldam_margins(deque(as_list)),
        ldam_margins(array("l", as_list)),
        ldam_margins(torch.bincount(target, minlength=N_CLASSES)),
        ldam_margins(count_classes(target, N_CLASSES)),
        ldam_margins(count_classes(labels, N_CLASSES, ignore_index=-1)),
    ):
        assert_type(margins, Tensor)
    weights = assert_type(class_balanced_weights(as_list, beta=0.999), Tensor)
    return ldam_margins(as_list, constant=0.6), weights


def settings_of(criterion: LMFLoss) -> dict[str, float]:
    """For the log: settings are what they were given as, not "Tensor | Module"."""
    alpha: float = criterion.alpha
    beta: float = criterion.beta
    gamma: float = criterion.gamma
    scale: float = criterion.scale
    max_margin: float = criterion.max_margin
    ignore_index: int = criterion.ignore_index
    assert_type(criterion.reduction, str)
    assert_type(criterion.margins, Tensor | None)
    assert_type(criterion.weight, Tensor | None)
    return {
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "scale": scale,
        "max_margin": max_margin,
        "ignore_index": ignore_index,
    }


def train(criterion: LMFLoss | LDAMLoss | FocalLoss | nn.CrossEntropyLoss, start_epoch: int) -> float:
    inputs, target = make_data()
    model = nn.Linear(4, N_CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = DeferredReweighting(criterion, Counter(target.tolist()), start_epoch=start_epoch, beta=0.999)
    losses: list[float] = []
    for epoch in range(EPOCHS):
        schedule.step(epoch)
        loss = criterion(model(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if isinstance(criterion, AnnealedFocalLoss):
            criterion.step()
    by_steps = DeferredReweighting(criterion, Counter(target.tolist()), start_step=start_epoch * len(inputs))
    by_steps.step(EPOCHS * len(inputs))
    assert_type(by_steps.start, int)
    assert_type(schedule.criterion, nn.Module)
    return losses[-1] / losses[0]


def by_the_function(target: Tensor, logits: Tensor) -> Tensor:
    """Each kind of argument, alone and together."""
    margins, weights = margins_and_weights(target)
    per_sample = assert_type(lmf_loss(logits, target, reduction="none"), Tensor)
    total = lmf_loss(logits, target, None, alpha=0, gamma=2, weight=None, reduction="sum")
    mean = lmf_loss(
        logits,
        target,
        margins,
        alpha=1.5,
        beta=0.5,
        gamma=2.0,
        scale=30.0,
        weight=weights,
        ignore_index=-1,
        reduction="mean_per_term",
        label_smoothing=0.1,
        logit_adjustment=log_prior_adjustment(torch.bincount(target), tau=0.5),
        normalizer=(weights[target].sum(), len(target)),
        grad_in_forward=False,
        check_target=True,
    )
    parts = [lmf_loss(logits[i::2], target[i::2], normalizer=len(target)) for i in range(2)]
    one_hot = nn.functional.one_hot(target, N_CLASSES).float()
    mixed = assert_type(lmf_loss(logits, 0.75 * one_hot + 0.25 * one_hot.flip(0), margins), Tensor)
    return per_sample.mean() + total + mean + mixed + parts[0] + parts[1]


def accumulate(criterion: LMFLoss | LDAMLoss | FocalLoss, inputs: Tensor, target: Tensor) -> Tensor:
    """Micro-batches whose gradients add up to that of the whole."""
    normalizers: list[Normalizer] = [len(target), float(len(target)), torch.tensor(len(target))]
    losses = [
        criterion(input=inputs[part::2], target=target[part::2], normalizer=normalizer)
        for normalizer in normalizers
        for part in range(2)
    ]
    criterion.check_target = True
    losses.append(assert_type(criterion.forward(inputs, target, normalizer=len(target)), Tensor))
    return assert_type(torch.stack(losses), Tensor)


def main() -> None:
    inputs, target = make_data()
    counts = torch.bincount(target)
    lmf = LMFLoss(
        counts,
        alpha=1.5,
        beta=1.0,
        gamma=1.5,
        max_margin=0.4,
        scale=2.0,
        weight=class_balanced_weights(counts),
        ignore_index=-1,
        reduction="mean_per_term",
        label_smoothing=0.1,
        logit_adjustment=log_prior_adjustment(counts),
        check_target=False,
    )
    assert_type(lmf(inputs[:, :N_CLASSES], target), Tensor)
    lmf.gamma, lmf.ignore_index, lmf.reduction, lmf.weight = 2, -100, "mean", None
    lmf.label_smoothing, lmf.logit_adjustment = 0, None
    lmf.margins = ldam_margins(counts, max_margin=0.5)
    print(lmf, settings_of(lmf))
    ldam = LDAMLoss(counts.tolist(), max_margin=0.5, scale=30.0, weight=None, ignore_index=-100, reduction="mean")
    focal = FocalLoss(
        gamma=2.0, weight=torch.ones(N_CLASSES), reduction="mean", label_smoothing=0.1, logit_adjustment=None
    )
    annealed = AnnealedFocalLoss(0.25, final_gamma=0.5, gamma=focal.gamma)
    print([train(criterion, start_epoch=2) for criterion in (lmf, ldam, focal, annealed, nn.CrossEntropyLoss())])
    print(annealed.gamma + ldam.scale + ldam.max_margin + annealed.alpha)
    logits = inputs[:, :N_CLASSES].clone().requires_grad_()
    by_the_function(target, logits).backward()
    print([accumulate(criterion, logits.detach(), target) for criterion in (lmf, ldam, focal)])
    print(logits.grad)


if __name__ == "__main__":
    main()
