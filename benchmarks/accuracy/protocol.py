"""The training: the same for every loss, but for the loss.

Within a seed all losses have the same split, initial weights, batches, flips and learning rate. The network kept is the
one of the epoch with the best macro-F1 on the validation part; of equals, the first.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.accuracy import progress
from benchmarks.accuracy.data import Dataset
from benchmarks.accuracy.methods import LossOptions, Method, Setting
from benchmarks.accuracy.models import Model
from benchmarks.accuracy.splits import Split, class_counts
from lmf_triton import log_prior_adjustment

EVALUATION_BATCH = 256

QUICK_IMAGES = 40  # of the most frequent class
QUICK_RAREST = 8
QUICK_EPOCHS = 3
QUICK_SEEDS = 2


def by_image(dataset: Dataset) -> Dataset:
    """The same data, whose images are dealt one by one: those of a group may lie on both sides of a split."""
    return replace(dataset, groups=None)


def shrink(dataset: Dataset) -> Dataset:
    """The first few images of each class, of the official test set too, for a quick trial of the whole command."""
    is_test = np.zeros(len(dataset), bool) if dataset.is_test is None else dataset.is_test
    first = [
        np.flatnonzero((dataset.labels == label) & (is_test == side))[:QUICK_IMAGES]
        for label in range(dataset.n_classes)
        for side in (False, True)
    ]
    kept = np.sort(np.concatenate(first))
    tail = dataset.long_tail and tuple(
        max(QUICK_RAREST, QUICK_IMAGES * count // max(dataset.long_tail)) for count in dataset.long_tail
    )
    return replace(
        dataset,
        labels=dataset.labels[kept],
        read=lambda i: dataset.read(int(kept[i])),
        files=None if dataset.files is None else [dataset.files[i] for i in kept],
        groups=None if dataset.groups is None else dataset.groups[kept],
        is_test=None if dataset.is_test is None else dataset.is_test[kept],
        long_tail=tail,
    )


@dataclass(frozen=True)
class Task:
    """What all trainings of an experiment share. ``inputs`` are of all images; see ``models.load_inputs``."""

    dataset: Dataset
    model: Model
    inputs: Tensor
    epochs: int
    device: torch.device
    weights: Path | None = None
    logit_adjustment: float = 0.0  # tau: how much of the training part's log prior every loss adds to the logits
    label_smoothing: float = 0.0

    def loss_options(self, counts: Sequence[int]) -> LossOptions:
        """What every loss is made with, given the training counts, but where its setting says otherwise."""
        adjustment = log_prior_adjustment(counts, tau=self.logit_adjustment) if self.logit_adjustment else None
        return {"label_smoothing": self.label_smoothing, "logit_adjustment": adjustment}

    def labels(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(self.dataset.labels)[indices]


class Trained(NamedTuple):
    """A network at its best epoch, the first being 1, and the macro-F1 of the validation part there.

    A training that diverges ends with that epoch. The best is one before it; where there is none, the untrained
    network, epoch 0, stands for it.
    """

    network: nn.Module
    epoch: int
    validation_f1: float
    diverged: int = 0  # the epoch whose loss or logits were not finite; 0: none


class Decision(NamedTuple):
    """What is taken off a network's logits, as tau · log prior, and the macro-F1 of the validation part with it."""

    tau: float
    validation_f1: float


def set_up(threads: int) -> None:
    """Settings of the process that repeatable and quick training needs."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    measure.keep_freed_memory()  # EfficientNet-Lite0 then takes 74 ms an image instead of 130 (AMD EPYC, one thread)


def train(task: Task, split: Split, seed: int, setting: Setting, title: str) -> Trained:
    """Train a network with this loss, and take it back to its best epoch. The test part is not looked at."""
    counts = class_counts(task.dataset, split.train)
    criterion = setting.make_criterion(counts, task.loss_options(counts)).to(task.device)
    schedule = setting.make_schedule(criterion, counts, task.epochs)
    network, model = initial_network(task, seed), task.model
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=model.learning_rate, weight_decay=model.weight_decay, fused=True)
    decay = model.make_decay(optimizer, task.epochs * math.ceil(len(split.train) / model.batch_size))
    best, best_state, diverged = Trained(network, 0, -1.0), {}, 0
    for epoch in progress.bar(range(task.epochs), title, unit="epoch"):
        if schedule is not None:
            schedule.step(epoch)
        of_epoch = batches(split.train, model.batch_size, seed, epoch)
        loss = _train_epoch(network, task, of_epoch, criterion, optimizer, decay)
        logits = predict_logits(network, task, split.validation)
        if not (math.isfinite(loss) and logits.isfinite().all()):
            diverged = epoch + 1
            break
        f1 = macro_f1(task.dataset.labels[split.validation], logits.argmax(1).numpy())
        if f1 > best.validation_f1:
            best, best_state = Trained(network, epoch + 1, f1), copy.deepcopy(network.state_dict())
    if diverged:
        progress.say(f"{title}: the training diverged in epoch {diverged}: its loss or logits are not finite.")
    if not best_state:
        return _untrained(task, split, seed, diverged)
    network.load_state_dict(best_state)
    return best._replace(diverged=diverged)


def _untrained(task: Task, split: Split, seed: int, diverged: int) -> Trained:
    """What stands for a training that diverged in its first epoch."""
    network = initial_network(task, seed)
    predicted = predict_logits(network, task, split.validation).argmax(1).numpy()
    return Trained(network, 0, macro_f1(task.dataset.labels[split.validation], predicted), diverged)


def decide(task: Task, split: Split, trained: Trained, method: Method) -> Decision:
    """The tau of a method; of several the one with the best macro-F1 on the validation part, of equals the first."""
    if not method.is_posthoc:
        return Decision(0.0, trained.validation_f1)
    logits, labels = predict_logits(trained.network, task, split.validation), task.dataset.labels[split.validation]
    log_prior = log_prior_adjustment(class_counts(task.dataset, split.train))
    scores = [macro_f1(labels, (logits - tau * log_prior).argmax(1).numpy()) for tau in method.posthoc_taus]
    return Decision(method.posthoc_taus[int(np.argmax(scores))], max(scores))


def initial_network(task: Task, seed: int) -> nn.Module:
    """The network before training: the same for all losses of a seed. Seeds what follows, too: flips and dropout."""
    torch.manual_seed(seed)
    return task.model.make_network(task.inputs, task.dataset.n_classes, task.weights).to(task.device)


def batches(indices: np.ndarray, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The indices in the order of this seed and epoch, so many at a time."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(indices)).split(size)


def _train_epoch(
    network: nn.Module,
    task: Task,
    batches: Iterable[Tensor],
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    decay: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Returns the sum of the losses, which is not finite where one of them is not."""
    network.train()
    total = torch.zeros((), device=task.device)
    for indices in batches:
        inputs = task.inputs[indices]
        if task.model.flips:
            inputs = _flip(inputs)
        optimizer.zero_grad()
        loss = criterion(network(inputs.to(task.device)), task.labels(indices).to(task.device))
        loss.backward()
        optimizer.step()
        decay.step()
        total += loss.detach()
    return total.item()


def _flip(images: Tensor) -> Tensor:
    """Each image left-right and upside down, each with probability 1/2."""
    for axis in (-1, -2):
        chosen = torch.rand(len(images), 1, 1, 1) < 0.5
        images = torch.where(chosen, images.flip(axis), images)
    return images


@torch.inference_mode()
def predict_logits(network: nn.Module, task: Task, indices: np.ndarray) -> Tensor:
    """Of each image, ``(N, C)``, on the CPU."""
    network.eval()
    chunks = torch.from_numpy(indices).split(EVALUATION_BATCH)
    return torch.cat([network(task.inputs[chunk].to(task.device)).cpu() for chunk in chunks])


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of the classes' F1; every class has images in every part of the split."""
    return float(f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0))
