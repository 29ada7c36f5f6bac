"""Promise: whatever can be split is split, near 70:15:15 in every class, groups whole; and what was split stays so."""

import warnings

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold
from test_accuracy_protocol import make_dataset

from benchmarks.accuracy import splits
from benchmarks.accuracy.data import Dataset

SEEDS = range(20)


def grouped(counts, groups, **options):
    """Classes one after the other, so that a test can say which images are a group."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return Dataset(
        name="rows",
        class_names=tuple(f"class {label}" for label in range(len(counts))),
        labels=labels,
        read=lambda i: None,
        source="this test",
        licence="none",
        groups=np.asarray(groups),
        **options,
    )


def parts_of(dataset, seed):
    """The parts, after a look that nothing is lost, twice there, or parted from its group."""
    parts = splits.split(dataset, seed)
    assert sorted(np.concatenate(parts)) == list(range(len(dataset)))
    if dataset.groups is not None:
        of_parts = [set(dataset.groups[part]) for part in parts]
        assert len(set.union(*of_parts)) == sum(map(len, of_parts))
    return parts


def two_of_each(n_classes: int, n_lesions: int) -> np.ndarray:
    return np.arange(2 * n_classes * n_lesions) // 2


def of_any_size(n_classes: int, n_lesions: int, n_images: int) -> np.ndarray:
    """Each lesion once, and the other images of a class by chance among its lesions."""
    generator = np.random.default_rng(0)
    of_class = [
        np.sort(np.concatenate([np.arange(n_lesions), generator.integers(0, n_lesions, n_images - n_lesions)]))
        for _ in range(n_classes)
    ]
    return np.concatenate([label * n_lesions + groups for label, groups in enumerate(of_class)])


@pytest.mark.parametrize("groups", [two_of_each(7, 15), of_any_size(7, 15, 30)], ids=["twos", "any size"])
def test_seven_classes_of_fifteen_lesions_are_split_with_every_seed(groups):
    dataset = grouped([30] * 7, groups)
    tested = np.zeros(len(dataset))
    for seed in SEEDS:
        parts = parts_of(dataset, seed)
        for part in parts[1:]:
            assert set(splits.class_counts(dataset, part)) <= {4, 5}  # of 4.5; twos have only even numbers
        tested[parts.test] += 1
    assert tested.max() <= 12 and (tested > 0).mean() > 0.8  # chance chooses which


@pytest.mark.parametrize("n_images", [3, 5, 10, 19, 21])
@pytest.mark.parametrize("has_groups", [False, True])
def test_three_images_of_a_class_or_more_can_be_split(has_groups, n_images):
    """Below twenty, scikit-learn refuses groups; below seven, it leaves parts of images without a class."""
    counts = [n_images] * 4
    dataset = grouped(counts, np.arange(sum(counts))) if has_groups else make_dataset(counts)
    for seed in SEEDS:
        parts = [splits.class_counts(dataset, part) for part in parts_of(dataset, seed)]
        assert np.min(parts) >= 1
        if has_groups:
            assert np.abs(np.array(parts[1:]) - 0.15 * n_images).max() <= 1


def test_a_rare_class_beside_a_frequent_one_is_in_every_part():
    for dataset in make_dataset((100, 3)), grouped((100, 3), np.arange(103)):
        for seed in SEEDS:
            assert splits.class_counts(dataset, parts_of(dataset, seed).test) == [15, 1]


def test_a_group_that_is_half_of_its_class_is_kept_whole_and_the_others_are_dealt():
    groups = np.concatenate([np.repeat(range(6), [30, 6, 6, 6, 6, 6]), np.arange(6, 66)])
    dataset = grouped((60, 60), groups)
    for seed in SEEDS:
        parts = parts_of(dataset, seed)
        assert 0 in dataset.groups[parts.train]  # a test part of half a class would be further off
        assert np.min([splits.class_counts(dataset, part) for part in parts]) >= 6


def test_patients_who_have_several_classes_are_kept_whole():
    generator = np.random.default_rng(0)
    labels, patients = generator.integers(0, 4, 300), generator.integers(0, 40, 300)
    order = np.argsort(labels, kind="stable")
    dataset = grouped(np.bincount(labels), patients[order])
    for seed in SEEDS:
        counts = np.array([splits.class_counts(dataset, part) for part in parts_of(dataset, seed)])
        assert np.abs(counts[1:] / counts.sum(0) - 0.15).max() < 0.05


def test_an_official_test_set_with_groups_leaves_few_groups_to_deal():
    is_test = np.tile(np.arange(10) < 4, 3)
    dataset = grouped((10, 10, 10), np.arange(30) // 2, is_test=is_test)
    for seed in SEEDS:
        parts = splits.split(dataset, seed)
        assert np.array_equal(parts.test, np.flatnonzero(is_test))
        assert splits.class_counts(dataset, parts.validation) == [2, 2, 2]


@pytest.mark.parametrize(
    ("dataset", "messages"),
    [
        (
            make_dataset((100, 2)),
            ["'class 1' has 2 images and needs 3 images, one each for training, validation and test"],
        ),
        (make_dataset((1, 50, 2)), ["'class 0' has 1 image and", "'class 2' has 2 images and"]),
        (
            grouped((30, 6), np.r_[np.arange(30), [30, 30, 30, 31, 31, 31]]),
            ["'class 1' has 6 images in 2 groups and needs 3 groups of images"],
        ),
        (
            make_dataset((5, 5), is_test=np.arange(10) < 9),
            ["and needs 2 images, one each for training and validation"],
        ),
        (make_dataset((5, 5), is_test=np.zeros(10, bool)), ["'class 0' has no image in the official test part"]),
        (
            make_dataset((20, 20), is_test=np.arange(40) % 2 == 0, long_tail=(30, 4)),
            ["needs 30 images, to draw the long tail from"],
        ),
    ],
)
def test_a_class_that_no_seed_can_split_is_said_with_what_it_needs(dataset, messages):
    with pytest.raises(splits.SplitError) as error:
        splits.split(dataset, 0)
    for message in messages:
        assert message in str(error.value)
    assert "n_splits" not in str(error.value)


def test_groups_that_no_deal_spreads_are_an_error_that_names_part_and_class():
    """Four groups, and a class of each three of them: whichever two are in one part, a class lacks another part."""
    triples = [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
    dataset = grouped([3] * 4, np.concatenate(triples))
    with pytest.raises(
        splits.SplitError, match=r"seed 3: the \w+ part has no image of the class 'class \d'.*--split r"
    ):
        splits.split(dataset, 3)


@pytest.mark.parametrize(("n_classes", "n_folds"), [(2, 17), (7, 20), (9, 17), (20, 20)])  # NumPy adds eight at a time
def test_folds_are_those_of_scikit_learn(n_classes, n_folds):
    """Results that are there say which images were tested, so no deal may change."""
    generator = np.random.default_rng(n_classes)
    shares = 0.6 ** np.arange(n_classes)
    labels = generator.choice(n_classes, 1000, p=shares / shares.sum())
    groups = generator.integers(0, 600, 1000)
    for seed in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, expected = (
                list(dealer(n_folds, shuffle=True, random_state=seed).split(labels, labels, groups))
                for dealer in (splits._Dealer, StratifiedGroupKFold)
            )
        for (_, ours), (_, theirs) in zip(found, expected, strict=True):
            assert np.array_equal(ours, theirs)


def test_lesions_of_any_number_of_images_are_tested_as_often():
    """scikit-learn's folds begin with the largest, which would always be tested."""
    groups = of_any_size(7, 15, 30)
    sizes, dataset = np.bincount(groups), grouped([30] * 7, groups)
    tested = np.mean(
        [np.isin(np.arange(len(sizes)), groups[splits.split(dataset, seed).test]) for seed in range(40)], 0
    )
    for of_size in sizes == 1, sizes == 2, sizes >= 3:
        assert tested[of_size].mean() == pytest.approx(0.15, abs=0.04)


def test_a_fair_deal_is_scikit_learns(monkeypatch):
    """Of classes with many groups nothing is mended."""
    generator = np.random.default_rng(0)
    dataset = grouped((600, 120, 60), generator.integers(0, 400, 780))
    monkeypatch.setattr(splits, "_deal_and_mend", None)
    for seed in range(5):
        splits.split(dataset, seed)


def test_the_same_seed_mends_the_same_way_and_another_in_another():
    first, again = (grouped([30] * 3, two_of_each(3, 15)) for _ in range(2))
    assert all(map(np.array_equal, splits.split(first, 3), splits.split(again, 3)))
    assert not np.array_equal(splits.split(first, 3).test, splits.split(first, 4).test)


def test_no_warning_of_scikit_learn_is_shown():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits.split(grouped((400, 10), np.arange(410)), 0)
