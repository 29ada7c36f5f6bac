"""Promise: what docs/gains.md and the tables of HAM10000 say follows from the committed predictions."""

import json
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas
import pytest
from scipy import stats
from test_accuracy_protocol import calibration_error_by_hand, cells_of

from benchmarks.accuracy import compare, gains, report
from benchmarks.accuracy.command import RESULTS

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.name for path in RESULTS.glob("ham10000-*"))
NUMBERS = {"settings.json", "metrics.csv", "predictions.csv.gz", "gradcam.json", "sweep.csv"}
TABLES = {"table1.md", "table2.md", "differences.md", "recommendation.md", "sweep.md"}
PICTURES = {"differences.png", "confusion.png", "rarest_classes.png"}  # of numbers: none shows an image

pytestmark = pytest.mark.slow  # the files are long
if not FOLDERS and not (ROOT / ".git").exists():
    pytest.skip("the results come with a clone, not with a source distribution", allow_module_level=True)


def settings_of(folder: str) -> dict:
    return json.loads((RESULTS / folder / "settings.json").read_text())["settings"]


@lru_cache
def read(folder: str) -> compare.Results:
    return compare.read(RESULTS / folder)


@lru_cache
def predictions_of(folder: str) -> dict[tuple[str, int], pandas.DataFrame]:
    return dict(list(pandas.read_csv(RESULTS / folder / "predictions.csv.gz").groupby(["loss", "seed"])))


def figures_by_hand(predictions: pandas.DataFrame, class_names: list[str]) -> dict[str, float]:
    """From the confusion matrix, without scikit-learn or any code of the experiment."""
    n = len(class_names)
    label, predicted = predictions.label.to_numpy(), predictions.predicted.to_numpy()
    confusion = np.bincount(n * label + predicted, minlength=n * n).reshape(n, n)
    found, of_class, of_prediction = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    recall, f1 = found / of_class, 2 * found / (of_class + of_prediction)
    return {
        "accuracy": found.sum() / confusion.sum(),
        "balanced_accuracy": recall.mean(),
        "macro_precision": (found / np.maximum(of_prediction, 1)).mean(),
        "macro_f1": f1.mean(),
        "calibration_error": calibration_error_by_hand(label == predicted, predictions.confidence.to_numpy()),
        **{f"f1 {name}": value for name, value in zip(class_names, f1, strict=True)},
        **{f"recall {name}": value for name, value in zip(class_names, recall, strict=True)},
    }


def test_what_the_page_tells_of_is_there():
    assert set(gains.EXPERIMENTS.values()) <= set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_that_shows_an_image_is_committed(folder):
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    listed = subprocess.run(
        ["git", "ls-files", RESULTS / folder], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {Path(name).name for name in listed} <= NUMBERS | TABLES | PICTURES


@pytest.mark.parametrize("folder", FOLDERS)
def test_metrics_are_those_of_the_predictions(folder):
    class_names = settings_of(folder)["class names"]
    rows = pandas.read_csv(RESULTS / folder / "metrics.csv")
    assert len(rows) == len(predictions_of(folder)) > 0
    for row in rows.to_dict("records"):
        of_run = predictions_of(folder)[row["loss"], row["seed"]]
        assert of_run["index"].is_unique
        expected = figures_by_hand(of_run, class_names)
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("folder", FOLDERS)
def test_tables_are_those_of_the_predictions(folder):
    for name, text in report.tables(read(folder)).items():
        assert (RESULTS / folder / name).read_text() == text


@pytest.mark.parametrize("folder", FOLDERS)
def test_differences_by_hand(folder):
    settings, cells = settings_of(folder), cells_of(RESULTS / folder / "differences.md")
    counts = settings["class counts"].values()
    overlap = sum(sum(c["test"]) for c in counts) / sum(sum(c["train"]) for c in counts)
    figures = {key: figures_by_hand(of_run, settings["class names"]) for key, of_run in predictions_of(folder).items()}
    losses, seeds = ({key[i] for key in figures} for i in (0, 1))
    assert set(figures) == {(loss, seed) for loss in losses for seed in seeds}
    n = len(seeds)
    for column, name in enumerate(("macro_f1", "balanced_accuracy")):
        for loss in losses - {"cross-entropy"}:
            d = 100 * np.array([figures[loss, seed][name] - figures["cross-entropy", seed][name] for seed in seeds])
            expected = f"{d.mean():+.1f}"
            if n > 1:
                half = stats.t.isf(0.025 / (len(losses) - 1), n - 1) * d.std(ddof=1) * np.sqrt(1 / n + overlap)
                expected += f" [{d.mean() - half:+.1f}, {d.mean() + half:+.1f}]"
            assert cells[loss][column] == expected


@pytest.mark.parametrize("folder", FOLDERS)
def test_splits_are_what_their_name_says(folder):
    """70:15:15, with all images of HAM10000; every loss has the same test images with a seed."""
    settings = settings_of(folder)
    assert settings["split"] == ("random" if folder.endswith("-random") else "grouped")
    for of_seed in settings["class counts"].values():
        parts = np.array([of_seed[part] for part in ("train", "validation", "test")])
        assert parts.sum(0).tolist() == [327, 514, 1099, 115, 1113, 6705, 142]
        np.testing.assert_allclose(parts.sum(1) / 10015, [0.70, 0.15, 0.15], atol=0.005)
    for (_, seed), of_run in predictions_of(folder).items():
        baseline = predictions_of(folder)["cross-entropy", seed]
        assert of_run["index"].tolist() == baseline["index"].tolist()
        assert np.bincount(of_run.label).tolist() == settings["class counts"][str(seed)]["test"]


def test_the_page_has_the_table_and_is_short():
    page = (ROOT / "docs" / "gains.md").read_text()
    assert gains.table({name: read(folder) for name, folder in gains.EXPERIMENTS.items()}) in page
    words = [word for line in page.splitlines() if not line.startswith("|") for word in line.split()]
    assert len(words) <= 600
    assert (ROOT / "docs" / "gains.png").exists() and "(gains.png)" in page
