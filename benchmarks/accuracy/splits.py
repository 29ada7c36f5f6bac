"""Which images are trained on, validated with and tested on: 70:15:15, every class by its share, groups kept whole.

scikit-learn deals; what it cannot deal, or deals unfairly because a class has few groups, is mended group by group.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from benchmarks.accuracy.data import Dataset

# Parts of a hundred: training, validation, test.
SHARES = (70, 15, 15)
FOLD_PERCENT = 5  # groups are dealt into folds of so many percent, which the parts are made of
# A class may have so many images more or fewer in a part than its share, or this share of them where that is more. The
# deals of HAM10000 are off by a tenth at most; of 30 images 4 or 5 are tested on.
TOLERANCE, RELATIVE_TOLERANCE = 1, 0.2
EMPTY = 1e6  # what a part without a class costs: more than any shares that are off
MAX_MENDINGS = 1000
SWAPPED = 300  # groups of which pairs are tried: their pairs are few enough, and more are not needed

Parts = list[np.ndarray]


class SplitError(ValueError):
    """A class has no image in one of the three parts."""


class Split(NamedTuple):
    """Indices of the images of each part, ascending."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@lru_cache  # every loss asks for it, and 10,000 images in 7,500 groups take a second
def split(dataset: Dataset, seed: int) -> Split:
    """70:15:15 with every class's share kept, and groups kept together.

    An official test set stays whole, and the other images are split 70:15, after a long tail has been drawn from them
    where the data set asks for one.

    Raises:
        SplitError: a class has no image in one of the parts.
    """
    check_classes(dataset)
    if dataset.is_test is None:
        return Split(*_deal(dataset, np.arange(len(dataset)), SHARES, seed))
    rest, test = np.flatnonzero(~dataset.is_test), np.flatnonzero(dataset.is_test)
    if dataset.long_tail is not None:
        rest = _draw(dataset.labels, rest, dataset.long_tail, seed)
    return Split(*_deal(dataset, rest, SHARES[:2], seed), test)


def check_classes(dataset: Dataset) -> None:
    """Whether every class has enough images, or groups of images, for any split.

    Raises:
        SplitError: a class has too few; the message has all of them.
    """
    has_own_test = dataset.is_test is None
    pool = np.ones(len(dataset), bool) if dataset.is_test is None else ~dataset.is_test
    purpose = "one each for training, validation and test" if has_own_test else "one each for training and validation"
    n_parts, unit = 3 if has_own_test else 2, "images" if dataset.groups is None else "groups of images"
    faults = []
    for label, name in enumerate(dataset.class_names):
        of_class = dataset.labels == label
        n_images = int((of_class & pool).sum())
        n_units = n_images if dataset.groups is None else len(np.unique(dataset.groups[of_class & pool]))
        n_needed = n_parts if dataset.long_tail is None else max(n_parts, dataset.long_tail[label])
        if n_units < n_needed:
            within = "" if dataset.groups is None else f" in {n_units} group{'s' * (n_units != 1)}"
            found = f"{n_images} image{'s' * (n_images != 1)}{within}"
            use = purpose if n_needed == n_parts else "to draw the long tail from"
            faults.append(f"the class {name!r} has {found} and needs {n_needed} {unit}, {use}")
        if not has_own_test and not (of_class & ~pool).any():
            faults.append(f"the class {name!r} has no image in the official test part")
    if faults:
        raise SplitError(f"{dataset.name} cannot be split: {'; '.join(faults)}.")


def class_counts(dataset: Dataset, indices: np.ndarray) -> list[int]:
    """Images of each class, in the order of the labels and so of the logits."""
    return np.bincount(dataset.labels[indices], minlength=dataset.n_classes).tolist()


def _draw(labels: np.ndarray, indices: np.ndarray, counts: Sequence[int], seed: int) -> np.ndarray:
    """So many of these images of each class, by the seed."""
    generator = np.random.default_rng(seed)
    of_classes = [indices[labels[indices] == label] for label in range(len(counts))]
    chosen = [generator.choice(of_class, n, replace=False) for of_class, n in zip(of_classes, counts, strict=True)]
    return np.sort(np.concatenate(chosen))


def _deal(dataset: Dataset, indices: np.ndarray, shares: Sequence[int], seed: int) -> Parts:
    """These images in parts of such shares."""
    parts = _deal_by_scikit_learn(dataset, indices, shares, seed)
    if parts is None or not _is_fair(dataset, parts, shares):
        parts = _deal_and_mend(dataset, indices, shares, seed)
    for name, part in zip(Split._fields, parts, strict=False):
        absent = [dataset.class_names[label] for label, n in enumerate(class_counts(dataset, part)) if not n]
        if absent:
            raise SplitError(
                f"{dataset.name}, seed {seed}: the {name} part has no image of the class {absent[0]!r}, however groups "
                "of images that belong together are dealt. --split random parts them."
            )
    return parts


def _deal_by_scikit_learn(dataset: Dataset, indices: np.ndarray, shares: Sequence[int], seed: int) -> Parts | None:
    """The last part is divided off first; ``None`` where there are fewer images than parts or folds."""
    parts, rest = [], indices
    for i in range(len(shares) - 1, 0, -1):
        try:
            rest, part = _divide(dataset, rest, shares[i], sum(shares[:i]), seed)
        except ValueError:
            return None
        parts.insert(0, part)
    return [rest, *parts]


def _divide(
    dataset: Dataset, indices: np.ndarray, share: int, other_share: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide by ``other_share : share``, in this order."""
    labels = dataset.labels[indices]
    if dataset.groups is None:
        size = share / (share + other_share)
        other, part = train_test_split(indices, test_size=size, stratify=labels, random_state=seed)
    else:
        n_folds, n_of_part = (share + other_share) // FOLD_PERCENT, share // FOLD_PERCENT
        dealer = _Dealer(n_folds, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class")  # where that harms, it is mended
            folds = [indices[fold] for _, fold in dealer.split(indices, labels, dataset.groups[indices])]
        other, part = np.concatenate(folds[n_of_part:]), np.concatenate(folds[:n_of_part])
    return np.sort(other), np.sort(part)


class _Dealer(StratifiedGroupKFold):
    """Finds the same folds, all at a time: a tenth of the time. Without this private method it just takes longer."""

    def _find_best_fold(self, y_counts_per_fold: np.ndarray, y_cnt: np.ndarray, group_y_counts: np.ndarray) -> int:
        n = self.n_splits
        proposed = np.repeat(y_counts_per_fold[None], n, axis=0)
        proposed[range(n), range(n)] += group_y_counts
        # The same operations in the same order: the last bit decides between folds that are alike.
        spreads = (proposed / y_cnt.reshape(1, 1, -1)).std(axis=1).mean(axis=1).tolist()
        sizes = y_counts_per_fold.sum(axis=1).tolist()
        best, least, size = 0, np.inf, np.inf
        for fold, spread in enumerate(spreads):
            is_close = abs(spread - least) <= 1e-8 + 1e-5 * abs(least)  # np.isclose
            if spread < least or (is_close and sizes[fold] < size):
                best, least, size = fold, spread, sizes[fold]
        return best


def _is_fair(dataset: Dataset, parts: Parts, shares: Sequence[int]) -> bool:
    """Whether every class is in every part and, with groups, near its share there: stratifying images sees to that."""
    counts = np.array([class_counts(dataset, part) for part in parts])
    if dataset.groups is None:
        return bool((counts > 0).all())
    meant = np.array(shares)[:, None] / sum(shares) * counts.sum(0)
    allowed = np.maximum(TOLERANCE, RELATIVE_TOLERANCE * meant)
    return bool((counts > 0).all() and (np.abs(counts - meant) <= allowed).all())


def _deal_and_mend(dataset: Dataset, indices: np.ndarray, shares: Sequence[int], seed: int) -> Parts:
    """Deal groups at random, then move one or swap two as long as that brings classes nearer to their shares."""
    generator = np.random.default_rng(seed)
    keys = np.arange(len(indices)) if dataset.groups is None else dataset.groups[indices]
    _, group_of_image = np.unique(keys, return_inverse=True)
    n_groups = int(group_of_image.max()) + 1
    counts = np.zeros((n_groups, dataset.n_classes))
    np.add.at(counts, (group_of_image, dataset.labels[indices]), 1)
    share = np.array(shares) / sum(shares)
    part_of_group = generator.choice(len(shares), n_groups, p=share)
    mending = _Mending(counts, part_of_group, share[:, None] * counts.sum(0))
    for _ in range(MAX_MENDINGS):
        if not (mending.move(generator) or mending.swap(generator)):
            break
    return [indices[part_of_group[group_of_image] == i] for i in range(len(shares))]


class _Mending(NamedTuple):
    """Groups on their way to better parts; ``part`` is changed in place."""

    counts: np.ndarray  # (groups, classes): images
    part: np.ndarray  # (groups,)
    meant: np.ndarray  # (parts, classes): images

    @property
    def totals(self) -> np.ndarray:
        return np.stack([self.counts[self.part == i].sum(0) for i in range(len(self.meant))])

    def cost(self, totals: np.ndarray, part: int | np.ndarray) -> np.ndarray:
        """Of a part with such totals: chi-squared, and much for each class that it lacks."""
        meant = self.meant[part]
        return ((totals - meant) ** 2 / np.maximum(meant, 1e-9)).sum(-1) + EMPTY * ((totals == 0) & (meant > 0)).sum(-1)

    def move(self, generator: np.random.Generator) -> bool:
        """The best move of one group to another part, if any is better than none. Of equals chance chooses."""
        totals, numbers = self.totals, np.arange(len(self.meant))
        before = self.cost(totals, numbers)
        leave = self.cost(totals[self.part] - self.counts, self.part) - before[self.part]
        arrive = self.cost(totals[None] + self.counts[:, None], numbers) - before
        gain = _rounded(leave[:, None] + arrive)
        gain[np.arange(len(self.part)), self.part] = 0
        if gain.min() >= 0:
            return False
        group, part = generator.choice(np.argwhere(gain == gain.min()))
        self.part[group] = part
        return True

    def swap(self, generator: np.random.Generator) -> bool:
        """The best swap of two groups in different parts, of some groups, if any is better than none."""
        totals, n_groups = self.totals, len(self.part)
        tried = generator.permutation(n_groups)[:SWAPPED]
        best, swapped = 0.0, None
        for a in range(len(self.meant)):
            for b in range(a):
                of_a, of_b = tried[self.part[tried] == a], tried[self.part[tried] == b]
                if not len(of_a) or not len(of_b):
                    continue
                change = self.counts[of_b][None] - self.counts[of_a][:, None]
                gain = self.cost(totals[a] + change, a) - self.cost(totals[a], a)
                gain = _rounded(gain + self.cost(totals[b] - change, b) - self.cost(totals[b], b))
                i, j = np.unravel_index(gain.argmin(), gain.shape)
                if gain[i, j] < best:
                    best, swapped = gain[i, j], (of_a[i], of_b[j])
        if swapped is None:
            return False
        first, second = swapped
        self.part[[first, second]] = self.part[[second, first]]
        return True


def _rounded(gain: np.ndarray) -> np.ndarray:
    """So that gains that are the same but for rounding are the same on every machine."""
    return gain.round(6)
