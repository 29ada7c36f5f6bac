"""Promise: what a user is told to train with follows from more than chance explains, and says how to write it."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics

import lmf_triton
from benchmarks.accuracy import compare, results
from benchmarks.accuracy.methods import METHODS


def _macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    return sklearn_metrics.f1_score(labels, predicted, average="macro")


def make_results(gains_of_losses: dict[str, tuple[float, float]], n_seeds: int = 10, **changes) -> compare.Results:
    """Predictions of two classes, 90:10, where a loss finds so many more percent of each than cross-entropy does."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], [900, 100])
    runs = []
    for seed in range(n_seeds):
        luck = generator.uniform(size=1000)
        for loss, (of_frequent, of_rare) in {"cross-entropy": (0, 0), **gains_of_losses}.items():
            share = np.where(labels == 0, 0.9 + of_frequent / 100, 0.4 + of_rare / 100)
            noise = generator.normal(0, 0.002, 1000)
            is_right = luck + noise < share
            runs.append(
                results.Run(
                    loss=loss,
                    seed=seed,
                    indices=np.arange(1000),
                    labels=labels,
                    predicted=np.where(is_right, labels, 1 - labels),
                    confidence=np.full(1000, 0.8),
                    choice="",
                    best_epoch=1,
                    validation_f1=0.5,
                    seconds=1.0,
                )
            )
    whole = {"train": np.array([4200, 467]), "test": np.array([900, 100])}
    options = {"title": "made up", "class_names": ("frequent", "rare"), "counts": whole, "has_own_test": True}
    options["is_quick"] = False
    return compare.Results(**(options | changes), runs=tuple(runs))


def test_a_loss_that_is_better_beyond_chance_is_recommended_with_its_price():
    advice = compare.recommendation(make_results({"focal": (0, 0), "cross-entropy-weighted": (-5, 40)}))
    assert "balanced accuracy: cross-entropy-weighted, +1" in advice
    assert "It changes macro-F1 by " in advice
    assert "In code: FocalLoss(gamma=0, weight=class_balanced_weights(counts))." in advice
    assert "10 seeds, 2 losses beside cross-entropy" in advice


def test_where_chance_explains_all_nothing_is_recommended():
    advice = compare.recommendation(make_results({"focal": (0, 0.5), "lmf": (0, -0.5)}))
    for figure in compare.FIGURES:
        assert f"{figure}: no gain that these seeds can show, so cross-entropy (" in advice
    assert "worse" not in advice


def test_a_loss_that_is_worse_beyond_chance_is_named():
    advice = compare.recommendation(make_results({"focal": (-20, -20), "lmf": (0, 0)}))
    for figure in compare.FIGURES:
        assert f"- {figure}: worse than cross-entropy beyond chance: focal." in advice


def test_a_certain_gain_goes_before_a_larger_uncertain_one(monkeypatch):
    found = make_results({"focal": (0, 0), "lmf": (0, 0)})
    differences = {"focal": compare.Difference(0.03, -0.01, 0.07), "lmf": compare.Difference(0.02, 0.01, 0.03)}
    monkeypatch.setattr(compare.Results, "difference", lambda self, loss, figure: differences[loss])
    assert "macro-F1: lmf, +2.0 [+1.0, +3.0] points over cross-entropy" in compare.recommendation(found)


def test_few_seeds_one_test_part_and_nothing_to_compare_are_said():
    better = {"lmf": (-5, 40)}
    assert "with --seeds 10 goes on" not in compare.recommendation(make_results(better))
    assert "with --seeds 10 goes on" in compare.recommendation(make_results(better, n_seeds=3))
    assert "quick trial" in compare.recommendation(make_results(better, is_quick=True))
    assert "one seed says nothing about chance" in compare.recommendation(make_results(better, n_seeds=1))
    assert "no loss was compared" in compare.recommendation(make_results({}))
    assert "share one test part" in compare.recommendation(make_results(better, has_own_test=False))
    assert "share one test part" not in compare.recommendation(make_results(better))


def test_where_groups_could_matter_and_were_not_given_it_is_said():
    for groups, is_said in (None, False), ("given", False), ("none given", True), ("given, not used", True):
        advice = compare.recommendation(make_results({"lmf": (-5, 40)}, groups=groups))
        assert ("better than they will be on new patients" in advice) == is_said


def test_what_the_seeds_chose_is_said_with_the_code():
    found = make_results({"cross-entropy-posthoc-tuned": (-5, 40)})
    assert "The seeds chose" not in compare.recommendation(found)
    runs = [dataclasses.replace(run, choice=f"tau 0.{run.seed % 2}") for run in found.runs]
    advice = compare.recommendation(dataclasses.replace(found, runs=tuple(runs)))
    assert "The seeds chose tau 0.0, tau 0.1: choose yours on a validation part." in advice


def test_differences_are_paired_by_seed_and_corrected_for_overlap_and_comparisons():
    """Whatever order the runs come in. The scores differ from seed to seed by much more than the losses do."""
    found = make_results({"lmf": (-5, 40), "focal": (0, 0.5)})
    f1 = {
        loss: np.array([_macro_f1(run.labels, run.predicted) for run in found.runs if run.loss == loss])
        for loss in ("lmf", "cross-entropy")
    }
    paired = f1["lmf"] - f1["cross-entropy"]
    shuffled = dataclasses.replace(found, runs=found.runs[::-1])
    for own_test, overlap in (True, 1000 / 4667), (False, 0.0):
        mean, low, high = dataclasses.replace(shuffled, has_own_test=own_test).difference("lmf", "macro-F1")
        half = stats.t.isf(0.025 / 2, 9) * paired.std(ddof=1) * np.sqrt(1 / 10 + overlap)
        assert (mean, low, high) == pytest.approx((paired.mean(), paired.mean() - half, paired.mean() + half))


@pytest.mark.parametrize("name", METHODS)
def test_the_code_of_a_method_makes_its_loss(name):
    """What the advice tells a user to write is what was trained."""
    method = METHODS[name]
    if method.is_tuned:
        return
    counts = [300, 20, 70]
    code, *predict = re.split(" with |; predict ", method.code)
    found, expected = eval(code, vars(lmf_triton) | {"counts": counts}), method.settings[0].make_criterion(counts, {})
    assert repr(found) == repr(expected)
    assert all(map(torch.equal, found.buffers(), expected.buffers()))
    assert bool(predict) == (method.is_posthoc or method.settings[0].is_deferred)


def test_calibration_error_of_known_predictions():
    """Two bins: 0.75 with half of it right, and 1.0, which belongs to the last bin, with all of it right."""
    confidence = np.array([0.75, 0.75, 1.0, 1.0])
    assert results.calibration_error(np.array([True, False, True, True]), confidence) == pytest.approx(0.125)
    assert results.calibration_error(np.ones(3, bool), np.ones(3)) == 0
    assert results.calibration_error(np.array([True, True]), np.array([0.2, 0.4])) == pytest.approx(0.7)
