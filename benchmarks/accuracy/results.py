"""What a run leaves in its folder, so that anyone can recompute it and an interrupted run can go on.

``predictions.csv.gz`` has every test prediction, ``metrics.csv`` what follows from them, ``settings.json`` how they
came about and what they depend on. Files are replaced as a whole: one that a crash interrupts keeps its former content.
One command at a time writes to a folder, and all results in it have one fingerprint.
"""

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from benchmarks.accuracy import fingerprint

PREDICTIONS, METRICS, SETTINGS = "predictions.csv.gz", "metrics.csv", "settings.json"
GRAD_CAM = "gradcam.json"
SWEEP = "sweep.csv"
LOCK = ".lock"
EXTENT = ("losses", "seeds")  # settings that say how much to train, change no result, and only ever grow
DESCRIPTIONS = "descriptions"  # the setting that says of each loss by its name what it is; others may be added later
DATA, SPLITS = "data", "splits"  # settings that are digests: by what they are of, and by seed
WEIGHTS = "weights"  # one of the digests of DATA
CLASS_NAMES, CLASS_COUNTS = "class names", "class counts"  # for whoever reads results without the data; DATA tells more
GROUPS = "groups"  # the setting that says of a user's own images whether a table of patients was given
GROWING = (DESCRIPTIONS, SPLITS, CLASS_COUNTS)  # an entry for each loss or seed, and more of them later
APART = (*EXTENT, *GROWING, CLASS_NAMES)  # settings that are not compared as a whole
CONFIDENCE_DECIMALS = 3
CALIBRATION_BINS = 15  # Guo et al. 2017


class DifferentSettings(ValueError):
    """The folder holds results of other data or settings."""


class FolderInUse(Exception):
    """Another command writes to the folder."""


@dataclass(frozen=True, eq=False)
class Run:
    """One trained network: its predictions for the test part, and the epoch it was taken from."""

    loss: str
    seed: int
    indices: np.ndarray  # of the test images in the data set
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray  # probability of the predicted class, float, rounded to CONFIDENCE_DECIMALS
    choice: str  # what the validation part chose, if anything
    best_epoch: int
    validation_f1: float
    seconds: float  # of the training, which several may share, and of the prediction

    @property
    def key(self) -> tuple[str, int]:
        return self.loss, self.seed


@dataclass(frozen=True)
class Metrics:
    """Test metrics of one run; every class counts the same in the macro averages."""

    accuracy: float
    balanced_accuracy: float  # the macro average of the recalls
    macro_precision: float
    macro_f1: float
    calibration_error: float
    class_f1: tuple[float, ...]
    class_recall: tuple[float, ...]


def metrics(run: Run, n_classes: int) -> Metrics:
    """From the predictions alone. What is never predicted has precision 0."""
    precision, recall, f1, _ = precision_recall_fscore_support(
        run.labels, run.predicted, labels=range(n_classes), zero_division=0
    )
    return Metrics(
        accuracy=float(accuracy_score(run.labels, run.predicted)),
        balanced_accuracy=float(recall.mean()),
        macro_precision=float(precision.mean()),
        macro_f1=float(f1.mean()),
        calibration_error=calibration_error(run.predicted == run.labels, run.confidence),
        class_f1=tuple(f1.tolist()),
        class_recall=tuple(recall.tolist()),
    )


def calibration_error(is_right: np.ndarray, confidence: np.ndarray) -> float:
    """Expected calibration error: |accuracy - mean confidence| in bins of equal width, weighted by their images.

    Source:
        Guo et al. 2017, eq. 3 (https://arxiv.org/abs/1706.04599). A bin has its upper end.
    """
    bins = np.ceil(confidence * CALIBRATION_BINS).astype(int)
    excess = np.bincount(bins, weights=is_right - confidence, minlength=CALIBRATION_BINS + 1)
    return float(np.abs(excess).sum() / len(confidence))


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder. The lock is the operating system's, which takes it from a command that dies.

    Raises:
        FolderInUse: another command has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUse(
            f"Another command is writing to {folder}. Wait until it has finished, or choose another --output."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()  # while it is held: whoever opened it before will not take it for the new one
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # where a command failed before it left anything


def fingerprint_of(settings: dict) -> str:
    """The one fingerprint of what all results of a folder depend on: not that of single losses or seeds."""
    decisive = {name: value for name, value in settings.items() if name not in APART}
    return fingerprint.digest([json.dumps(decisive, sort_keys=True).encode()])


def check_settings(folder: Path, settings: dict) -> None:
    """Whether results of these settings may be added to this folder, with whatever losses and seeds it has already.

    Raises:
        DifferentSettings: the folder holds results of other data or settings, or that do not say what they depend on.
    """
    if not any((folder / name).exists() for name in (SETTINGS, METRICS, PREDICTIONS, GRAD_CAM, SWEEP)):
        return
    content = read_settings(folder)
    if "fingerprint" not in content:
        raise DifferentSettings(
            f"{folder} holds results that do not say which data they are of ({SETTINGS} has no fingerprint, as in "
            "earlier versions), so that nothing can be added to them. Choose another --output, or remove the folder."
        )
    if differences := _differences(content["settings"], settings):
        raise DifferentSettings(
            f"{folder} holds results of other data or settings: {'; '.join(differences)}. "
            "Use the same, choose another --output, or remove the folder."
        )


def _differences(earlier: dict, settings: dict) -> list[str]:
    """What keeps results of these settings from standing beside the earlier ones, in words."""
    compared = {name: None for name in (*earlier, *settings) if name not in (*APART, DATA)}
    differences = [
        f"{name} {earlier.get(name)!r} there, {settings.get(name)!r} now"
        for name in compared
        if earlier.get(name) != settings.get(name)
    ]
    differences += _data_differences(earlier[DATA], settings[DATA])
    differences += [
        f"{loss} {description!r} there, {settings[DESCRIPTIONS][loss]!r} now"
        for loss, description in earlier.get(DESCRIPTIONS, {}).items()
        if settings[DESCRIPTIONS].get(loss, description) != description
    ]
    return differences or [
        f"seed {seed} splits the same images in another way (by another version of scikit-learn or NumPy)"
        for seed, split in settings[SPLITS].items()
        if earlier[SPLITS].get(seed, split) != split
    ]


def _data_differences(earlier: dict, data: dict) -> list[str]:
    """What of the data differs and, so that nobody looks there, what does not."""
    other = [name for name in data if earlier.get(name) != data[name]]
    same = [name for name in data if name not in other and data[name] is not None]
    clauses = (f"other {', '.join(other)}" if other else "", f"but the same {', '.join(same)}" if same else "")
    return [", ".join(filter(None, clauses))] if other else []


def read_settings(folder: Path) -> dict:
    """What the folder says of its results: nothing where the file is missing or is no JSON."""
    try:
        return json.loads((folder / SETTINGS).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def n_former_seeds(folder: Path) -> int:
    """How many seeds the folder was asked for before."""
    return len(read_settings(folder).get("settings", {}).get("seeds", ()))


def with_former_losses(folder: Path, settings: dict) -> dict:
    """The settings, with the losses that the folder was asked for before."""
    former = read_settings(folder).get("settings", {}).get("losses", ())
    return settings | {"losses": list(dict.fromkeys([*former, *settings["losses"]]))}


def record_settings(folder: Path, settings: dict, environment: dict) -> None:
    """Write the settings, and add this session's environment to those of the sessions before it."""
    content = read_settings(folder)
    earlier = content.get("settings", {})
    merged = earlier | settings | {name: earlier.get(name, {}) | settings[name] for name in GROWING}
    content = {
        "fingerprint": fingerprint_of(merged),
        "settings": merged,
        "sessions": [*content.get("sessions", ()), environment],
    }
    replace_file(folder / SETTINGS, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_runs(folder: Path, runs: Sequence[Run], class_names: Sequence[str]) -> None:
    """Both files, a line for each prediction and each run; the metrics last, so that they never lack predictions."""
    # An image's predictions side by side compress to a tenth of what those of a run side by side do.
    lines = [
        (run.seed, index, position, run.loss, label, predicted, f"{confidence:.{CONFIDENCE_DECIMALS}f}")
        for position, run in enumerate(runs)
        for index, label, predicted, confidence in zip(
            *(array.tolist() for array in (run.indices, run.labels, run.predicted, run.confidence)), strict=True
        )
    ]
    predictions = [
        {
            "loss": loss,
            "seed": seed,
            "index": index,
            "label": label,
            "predicted": predicted,
            "confidence": confidence,
        }
        for seed, index, _, loss, label, predicted, confidence in sorted(lines)
    ]
    # Without the time, so that the same predictions are the same bytes.
    replace_file(folder / PREDICTIONS, gzip.compress(csv_text(predictions).encode(), mtime=0))
    rows = [_metrics_row(run, class_names) for run in runs]
    replace_file(folder / METRICS, csv_text(rows).encode())


def _metrics_row(run: Run, class_names: Sequence[str]) -> dict[str, object]:
    scores = metrics(run, len(class_names))
    numbers = {
        "accuracy": scores.accuracy,
        "balanced_accuracy": scores.balanced_accuracy,
        "macro_precision": scores.macro_precision,
        "macro_f1": scores.macro_f1,
        "calibration_error": scores.calibration_error,
        "validation_macro_f1": run.validation_f1,
        **{f"f1 {name}": f1 for name, f1 in zip(class_names, scores.class_f1, strict=True)},
        **{f"recall {name}": recall for name, recall in zip(class_names, scores.class_recall, strict=True)},
    }
    return {
        "loss": run.loss,
        "seed": run.seed,
        "choice": run.choice,
        "best_epoch": run.best_epoch,
        "seconds": f"{run.seconds:.1f}",
        **{name: f"{number:.6f}" for name, number in numbers.items()},
    }


def read_runs(folder: Path, class_names: Sequence[str]) -> list[Run]:
    """The finished runs: those in both files, whose metrics are those of their predictions."""
    if not (folder / METRICS).exists() or not (folder / PREDICTIONS).exists():
        return []
    with gzip.open(folder / PREDICTIONS, "rt", newline="") as file:
        predictions: dict[tuple[str, int], list[tuple[str, ...]]] = {}
        for line in csv.DictReader(file):
            images = predictions.setdefault((line["loss"], int(line["seed"])), [])
            images.append(tuple(line[name] for name in ("index", "label", "predicted", "confidence")))
    with (folder / METRICS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = []
    for row in rows:
        key = row["loss"], int(row["seed"])
        if key not in predictions:
            continue
        *numbers, confidence = zip(*predictions[key], strict=True)
        indices, labels, predicted = (np.array(column, dtype=np.int64) for column in numbers)
        run = Run(
            *key,
            indices=indices,
            labels=labels,
            predicted=predicted,
            confidence=np.array(confidence, dtype=np.float64),
            choice=row["choice"],
            best_epoch=int(row["best_epoch"]),
            validation_f1=float(row["validation_macro_f1"]),
            seconds=float(row["seconds"]),
        )
        if {name: str(value) for name, value in _metrics_row(run, class_names).items()} == row:
            runs.append(run)
    return runs


def csv_text(rows: Sequence[dict[str, object]]) -> str:
    """The rows as CSV, under the names of the first."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it has the old content or the new at any moment, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
