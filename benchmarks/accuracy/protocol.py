"""Split, losses and training: the same for every loss, but for the loss.

Within a seed all losses have the same split, initial weights, batches, flips and learning rate. The network kept is the
one of the epoch with the best macro-F1 on the validation part; of equals, the first.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import measure
from benchmarks.accuracy.data import Dataset
from benchmarks.accuracy.models import Model
from lmf_triton import DeferredReweighting, FocalLoss, LDAMLoss, LMFLoss, ldam_margins, log_prior_adjustment

# Parts of a hundred: training, validation, test.
SHARES = (70, 15, 15)
FOLD_PERCENT = 5  # groups are dealt into folds of so many percent, which the parts are made of

# The LMF authors' own training code.
BATCH_SIZE = 32
WEIGHT_DECAY = 5e-4
STEP_SHARE = 0.3  # of the training, after which the learning rate falls, and again
STEP_FACTOR = 0.1

DRW_SUFFIX = "-drw"
DRW_SHARE = 0.8  # of the epochs, after which re-weighting sets in: 160 of 200 in LDAM's code

EVALUATION_BATCH = 256

QUICK_IMAGES = 40  # of the most frequent class
QUICK_RAREST = 8
QUICK_EPOCHS = 3
QUICK_SEEDS = 2


class SplitError(ValueError):
    """A class has no image in one of the three parts."""


class Split(NamedTuple):
    """Indices of the images of each part, ascending."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@lru_cache  # every loss asks for it, and 10,000 images in 7,500 groups take 7 s (AMD EPYC, one thread)
def split(dataset: Dataset, seed: int) -> Split:
    """70:15:15 with every class's share kept, and groups kept together.

    An official test set stays whole, and the other images are split 70:15, after a long tail has been drawn from them
    where the data set asks for one.

    Raises:
        SplitError: a class has no image in one of the parts.
    """
    train_share, validation_share, test_share = SHARES
    if dataset.is_test is None:
        rest, test = _divide(dataset, np.arange(len(dataset)), test_share, train_share + validation_share, seed)
    else:
        rest, test = np.flatnonzero(~dataset.is_test), np.flatnonzero(dataset.is_test)
    if dataset.long_tail is not None:
        rest = _draw(dataset.labels, rest, dataset.long_tail, seed)
    train, validation = _divide(dataset, rest, validation_share, train_share, seed)
    divided = Split(train, validation, test)
    for part, indices in divided._asdict().items():
        for name, count in zip(dataset.class_names, class_counts(dataset, indices), strict=True):
            if count == 0:
                raise SplitError(f"{dataset.name}, seed {seed}: the {part} part has no image of the class {name!r}")
    return divided


def _divide(
    dataset: Dataset, indices: np.ndarray, share: int, other_share: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide by ``other_share : share``, in this order."""
    labels = dataset.labels[indices]
    try:
        if dataset.groups is None:
            size = share / (share + other_share)
            other, part = train_test_split(indices, test_size=size, stratify=labels, random_state=seed)
        else:
            n_folds, n_of_part = (share + other_share) // FOLD_PERCENT, share // FOLD_PERCENT
            dealer = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
            folds = [indices[fold] for _, fold in dealer.split(indices, labels, dataset.groups[indices])]
            other, part = np.concatenate(folds[n_of_part:]), np.concatenate(folds[:n_of_part])
    except ValueError as error:  # fewer images than parts, or than classes in a part
        raise SplitError(f"{dataset.name}, seed {seed}: {error}") from error
    return np.sort(other), np.sort(part)


def _draw(labels: np.ndarray, indices: np.ndarray, counts: Sequence[int], seed: int) -> np.ndarray:
    """So many of these images of each class, by the seed."""
    generator = np.random.default_rng(seed)
    of_classes = [indices[labels[indices] == label] for label in range(len(counts))]
    chosen = [generator.choice(of_class, n, replace=False) for of_class, n in zip(of_classes, counts, strict=True)]
    return np.sort(np.concatenate(chosen))


def class_counts(dataset: Dataset, indices: np.ndarray) -> list[int]:
    """Images of each class, in the order of the labels and so of the logits."""
    return np.bincount(dataset.labels[indices], minlength=dataset.n_classes).tolist()


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


BASE_LOSSES = ("cross-entropy", "focal", "ldam", "lmf", "lmf-authors")
LOSSES = (*BASE_LOSSES, *(f"{name}{DRW_SUFFIX}" for name in BASE_LOSSES))
DEFAULT_LOSSES = (*BASE_LOSSES, "ldam-drw", "lmf-drw")


LossOptions = dict[str, float | Tensor | None]  # that every loss takes, and all losses of an experiment have alike


def make_criterion(name: str, counts: Sequence[int], **options: float | Tensor | None) -> nn.Module:
    """A loss by its name, with the paper's options and these; "-drw" is its schedule's matter."""
    return {
        "cross-entropy": lambda: FocalLoss(gamma=0, **options),
        "focal": lambda: FocalLoss(**options),
        "ldam": lambda: LDAMLoss(counts, **options),
        "lmf": lambda: LMFLoss(counts, **options),
        "lmf-authors": lambda: LMFLoss(
            counts, alpha=1.5, scale=30, weight=ldam_margins(counts), reduction="mean_per_term", **options
        ),
    }[name.removesuffix(DRW_SUFFIX)]()


def make_schedule(name: str, criterion: nn.Module, counts: Sequence[int], epochs: int) -> DeferredReweighting | None:
    """Deferred re-weighting for the names that end in "-drw"."""
    if not name.endswith(DRW_SUFFIX):
        return None
    return DeferredReweighting(criterion, counts, start_epoch=round(DRW_SHARE * epochs))


@dataclass(frozen=True)
class Task:
    """What all trainings of an experiment share. ``inputs`` are of all images; see ``models.load_inputs``."""

    dataset: Dataset
    model: Model
    inputs: Tensor
    epochs: int
    device: torch.device
    head: str = "linear"
    weights: Path | None = None
    logit_adjustment: float = 0.0  # tau: how much of the training part's log prior every loss adds to the logits
    label_smoothing: float = 0.0

    @property
    def title(self) -> str:
        """Of tables and pictures: data, model, and what changes every loss."""
        options = {"logit adjustment": self.logit_adjustment, "label smoothing": self.label_smoothing}
        changed = [f"{name} {value:g}" for name, value in options.items() if value]
        return ", ".join([self.dataset.name, self.model.name, *changed])

    def loss_options(self, counts: Sequence[int]) -> LossOptions:
        """What every loss is made with, given the training counts. Predictions come from the logits as they are."""
        adjustment = log_prior_adjustment(counts, tau=self.logit_adjustment) if self.logit_adjustment else None
        return {"label_smoothing": self.label_smoothing, "logit_adjustment": adjustment}

    def labels(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(self.dataset.labels)[indices]


class Checkpoint(NamedTuple):
    """The best epoch, the first being 1, and its macro-F1 on the validation part."""

    epoch: int
    validation_f1: float


def set_up(threads: int) -> None:
    """Settings of the process that repeatable and quick training needs."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    measure.keep_freed_memory()  # EfficientNet-Lite0 then takes 74 ms an image instead of 130 (AMD EPYC, one thread)


def train(
    task: Task, split: Split, seed: int, criterion: nn.Module, schedule: DeferredReweighting | None, title: str
) -> tuple[nn.Module, Checkpoint]:
    """Train a network with this loss, and take it back to its best epoch. The test part is not looked at."""
    network = initial_network(task, split, seed)
    criterion = criterion.to(task.device)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=task.model.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
    )
    n_steps = task.epochs * math.ceil(len(split.train) / BATCH_SIZE)
    # Counted in steps, so that the shares hold for a few epochs too.
    decay = torch.optim.lr_scheduler.StepLR(optimizer, max(1, round(STEP_SHARE * n_steps)), STEP_FACTOR)
    best, best_state = Checkpoint(0, -1.0), {}
    for epoch in tqdm(range(task.epochs), title, unit="epoch", leave=False):
        if schedule is not None:
            schedule.step(epoch)
        _train_epoch(network, task, batches(split.train, seed, epoch), criterion, optimizer, decay)
        f1 = macro_f1(task.dataset.labels[split.validation], predict(network, task, split.validation))
        if f1 > best.validation_f1:
            best, best_state = Checkpoint(epoch + 1, f1), copy.deepcopy(network.state_dict())
    network.load_state_dict(best_state)
    return network, best


def initial_network(task: Task, split: Split, seed: int) -> nn.Module:
    """The network before training: the same for all losses of a seed. Seeds what follows, too: flips and dropout."""
    torch.manual_seed(seed)
    training_inputs = task.inputs[torch.from_numpy(split.train)]
    network = task.model.make_network(training_inputs, task.dataset.n_classes, task.head, task.weights)
    return network.to(task.device)


def batches(indices: np.ndarray, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The indices in the order of this seed and epoch, ``BATCH_SIZE`` at a time."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(indices)).split(BATCH_SIZE)


def _train_epoch(
    network: nn.Module,
    task: Task,
    batches: Iterable[Tensor],
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    decay: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    network.train()
    for indices in batches:
        inputs = task.inputs[indices]
        if task.model.flips:
            inputs = _flip(inputs)
        optimizer.zero_grad()
        criterion(network(inputs.to(task.device)), task.labels(indices).to(task.device)).backward()
        optimizer.step()
        decay.step()


def _flip(images: Tensor) -> Tensor:
    """Each image left-right and upside down, each with probability 1/2."""
    for axis in (-1, -2):
        chosen = torch.rand(len(images), 1, 1, 1) < 0.5
        images = torch.where(chosen, images.flip(axis), images)
    return images


@torch.inference_mode()
def predict(network: nn.Module, task: Task, indices: np.ndarray) -> np.ndarray:
    """The most probable class of each image, int64."""
    network.eval()
    chunks = torch.from_numpy(indices).split(EVALUATION_BATCH)
    return torch.cat([network(task.inputs[chunk].to(task.device)).argmax(1).cpu() for chunk in chunks]).numpy()


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of the classes' F1; every class has images in every part of the split."""
    return float(f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0))
