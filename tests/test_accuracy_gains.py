"""Promise: what is said of the losses follows from committed predictions; advice, from more than chance explains."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics
from test_accuracy_protocol import cells_of, check_metrics, read_csv

from benchmarks.accuracy import compare, gains, report, results
from benchmarks.accuracy.command import RESULTS
from benchmarks.accuracy.methods import METHODS

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.name for path in RESULTS.glob("ham10000-*"))
NUMBERS = {"settings.json", "metrics.csv", "predictions.csv.gz", "gradcam.json", "sweep.csv"}
TABLES = {"table1.md", "table2.md", "differences.md", "recommendation.md", "sweep.md"}
PICTURES = {"trade.png", "confusion.png", "rarest_classes.png"}  # of numbers: none shows an image


def class_names_of(folder: str) -> list[str]:
    return json.loads((RESULTS / folder / "settings.json").read_text())["settings"]["class names"]


def test_all_that_the_page_tells_of_is_committed():
    assert set(gains.EXPERIMENTS.values()) <= set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_that_shows_an_image_is_committed(folder):
    assert {path.name for path in (RESULTS / folder).iterdir()} <= NUMBERS | TABLES | PICTURES | {"gradcam.png"}
    assert "benchmarks/results/accuracy/ham10000-*/gradcam.png" in (ROOT / ".gitignore").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_metrics_are_those_of_the_committed_predictions(folder):
    check_metrics(RESULTS / folder, class_names_of(folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_tables_are_those_of_the_committed_predictions(folder):
    for name, text in report.tables(compare.read(RESULTS / folder)).items():
        assert (RESULTS / folder / name).read_text() == text


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_differences_by_hand(folder):
    """From predictions.csv.gz and settings.json alone, without any code of the experiment."""
    settings = json.loads((RESULTS / folder / "settings.json").read_text())["settings"]
    found = {}
    for line in read_csv(RESULTS / folder / "predictions.csv.gz"):
        found.setdefault(line["loss"], {}).setdefault(int(line["seed"]), []).append(
            (int(line["label"]), int(line["predicted"]))
        )
    counts = settings["class counts"].values()
    overlap = sum(sum(c["test"]) for c in counts) / sum(sum(c["train"]) for c in counts)
    for column, score in enumerate((_macro_f1, sklearn_metrics.balanced_accuracy_score)):
        scores = {
            loss: np.array([score(*np.array(of_seeds[seed]).T) for seed in sorted(of_seeds)])
            for loss, of_seeds in found.items()
        }
        cells = cells_of(RESULTS / folder / "differences.md")
        for loss in scores.keys() - {"cross-entropy"}:
            difference = 100 * (scores[loss] - scores["cross-entropy"])
            n = len(difference)
            half = stats.t.isf(0.025 / (len(scores) - 1), n - 1) * difference.std(ddof=1) * np.sqrt(1 / n + overlap)
            mean = difference.mean()
            assert cells[loss][column] == f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def _macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    return sklearn_metrics.f1_score(labels, predicted, average="macro")


@pytest.mark.parametrize("folder", FOLDERS)
def test_splits_are_what_their_name_says(folder):
    """The parts are 70:15:15, by the committed counts; every test image is predicted once by every loss and seed."""
    settings = json.loads((RESULTS / folder / "settings.json").read_text())["settings"]
    assert settings["split"] == ("random" if folder.endswith("-random") else "grouped")
    for of_seed in settings["class counts"].values():
        parts = np.array([of_seed[part] for part in ("train", "validation", "test")])
        assert parts.sum() == 10015
        assert parts.sum(0).tolist() == [327, 514, 1099, 115, 1113, 6705, 142]
        np.testing.assert_allclose(parts.sum(1) / 10015, [0.70, 0.15, 0.15], atol=0.005)


def test_the_page_has_the_table_and_says_it_shortly():
    page = (ROOT / "docs" / "gains.md").read_text()
    table = gains.table(gains.read())
    assert table in page
    words = [word for line in page.splitlines() if not line.startswith("|") for word in line.split()]
    assert len(words) <= 600
    assert (ROOT / "docs" / "gains.png").exists() and "(gains.png)" in page


# ---------------------------------------------------------------------------------------------------- the advice


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
    return compare.Results(**(options | changes), runs=tuple(runs))


def test_a_loss_that_is_better_beyond_chance_is_recommended_with_its_price():
    advice = compare.recommendation(make_results({"focal": (0, 0), "cross-entropy-weighted": (-5, 40)}))
    assert "balanced accuracy: cross-entropy-weighted, +1" in advice
    assert "Its macro-F1: " in advice
    assert "10 seeds, 2 comparisons" in advice


def test_where_chance_explains_all_nothing_is_recommended():
    advice = compare.recommendation(make_results({"focal": (0, 0.5), "lmf": (0, -0.5)}))
    for figure in compare.FIGURES:
        assert f"{figure}: no difference to cross-entropy that these seeds can show" in advice
    assert "Worse" not in advice


def test_a_loss_that_is_worse_beyond_chance_is_named():
    advice = compare.recommendation(make_results({"focal": (-20, -20), "lmf": (0, 0)}))
    assert "Worse than cross-entropy beyond chance in macro-F1: focal." in advice


def test_a_certain_gain_goes_before_a_larger_uncertain_one(monkeypatch):
    found = make_results({"focal": (0, 0), "lmf": (0, 0)})
    differences = {"focal": compare.Difference(0.03, -0.01, 0.07), "lmf": compare.Difference(0.02, 0.01, 0.03)}
    monkeypatch.setattr(compare.Results, "difference", lambda self, loss, figure: differences[loss])
    assert "macro-F1: lmf, +2.0 [+1.0, +3.0] points" in compare.recommendation(found)


def test_few_seeds_one_test_part_and_nothing_to_compare_are_said():
    better = {"lmf": (-5, 40)}
    assert "--seeds 10 goes on from here" not in compare.recommendation(make_results(better))
    assert "--seeds 10 goes on from here" in compare.recommendation(make_results(better, n_seeds=3))
    assert "one seed says nothing about chance" in compare.recommendation(make_results(better, n_seeds=1))
    assert "no loss was compared" in compare.recommendation(make_results({}))
    assert "share one test part" in compare.recommendation(make_results(better, has_own_test=False))
    assert "share one test part" not in compare.recommendation(make_results(better))


def test_more_losses_make_every_interval_wider():
    few = make_results({"lmf": (-5, 40)}).difference("lmf", "macro-F1")
    many = make_results({name: (-5, 40) for name in METHODS if name != "cross-entropy"}).difference("lmf", "macro-F1")
    assert many.high - many.low > few.high - few.low


def test_calibration_error_of_known_predictions():
    """Two bins: 0.75 with half of it right, and 1.0, which belongs to the last bin, with all of it right."""
    confidence = np.array([0.75, 0.75, 1.0, 1.0])
    assert results.calibration_error(np.array([True, False, True, True]), confidence) == pytest.approx(0.125)
    assert results.calibration_error(np.ones(3, bool), np.ones(3)) == 0
    assert results.calibration_error(np.array([True, True]), np.array([0.2, 0.4])) == pytest.approx(0.7)
