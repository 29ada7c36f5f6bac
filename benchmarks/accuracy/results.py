"""What a run leaves in its folder, so that anyone can recompute it and an interrupted run can go on.

``predictions.csv.gz`` has every test prediction, by the number of its image and not by its name, ``metrics.csv`` what
follows from them, ``settings.json`` how they came about and what they depend on. Files are replaced as a whole: one
that a crash interrupts keeps its former content. Of one that was damaged otherwise, what it lacks is trained again.
One command at a time writes to a folder, and all results in it have one fingerprint.
"""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from benchmarks.accuracy import fingerprint, progress

PREDICTIONS, METRICS, SETTINGS = "predictions.csv.gz", "metrics.csv", "settings.json"
PREDICTION_COLUMNS = ("loss", "seed", "index", "label", "predicted", "confidence")
GRAD_CAM = "gradcam.json"
SWEEP = "sweep.csv"
LOCK = ".lock"
GIT_IGNORES = ".gitignore"
PARTIAL = ".partial"  # what the name of a file ends with that is being written
EXTENT = ("losses", "seeds")  # settings that say how much to train, change no result, and only ever grow
DESCRIPTIONS = "descriptions"  # the setting that says of each loss by its name what it is; others may be added later
DATA, SPLITS = "data", "splits"  # settings that are digests: by what they are of, and by seed
WEIGHTS = "weights"  # one of the digests of DATA
CLASS_NAMES, CLASS_COUNTS = "class names", "class counts"  # for whoever reads results without the data; DATA tells more
GROUPS = "groups"  # the setting that says of a user's own images whether a table of patients was given: one of
GIVEN, NOT_GIVEN, NOT_USED = "given", "none given", "given, not used"
GROWING = (DESCRIPTIONS, SPLITS, CLASS_COUNTS)  # an entry for each loss or seed, and more of them later
APART = (*EXTENT, *GROWING, CLASS_NAMES)  # settings that are not compared as a whole
DIVERGED = "diverged"  # the column of the epoch in which a training diverged, where one did
CONFIDENCE_DECIMALS = 3
CALIBRATION_BINS = 15  # Guo et al. 2017


class DifferentSettings(ValueError):
    """The folder holds results of other data or settings."""


class FolderInUse(Exception):
    """Another command writes to the folder."""


class CannotWrite(OSError):
    """A file or folder cannot be written; the message names it."""


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
    diverged: int = 0  # the epoch in which the training diverged; 0: it did not

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

    Folders that had to be made for it are removed again where the command leaves nothing in them.

    Raises:
        FolderInUse: another command has it.
        CannotWrite: it cannot be made or written to.
    """
    lock, made = FileLock(folder / LOCK), []
    try:
        made += [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUse(
            f"Another command is writing to {folder}. Wait until it has finished, or choose another --output."
        ) from None
    except OSError as error:
        _remove_empty(made)
        reason = "it is a file" if os.path.lexists(folder) and not folder.is_dir() else error.strerror or error
        raise CannotWrite(f"Results cannot be written to {folder}: {reason}. Choose another --output.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()  # while it is held: whoever opened it before will not take it for the new one
        lock.release()
        _remove_empty([folder, *made])


def _remove_empty(folders: Sequence[Path]) -> None:
    """Those that are empty, each before the one that it is in."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def keep_from_git(folder: Path, name: str) -> None:
    """Have Git ignore a file of a folder, wherever that lies, before the file is there.

    A ``.gitignore`` that someone else has put there keeps what it says.
    """
    path = folder / GIT_IGNORES
    former = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else f"{GIT_IGNORES}\n"
    lines = [name, f"{name}{PARTIAL}"]
    if not set(lines) <= set(former.splitlines()):
        text = "\n".join([*former.splitlines(), *lines]) + "\n"
        replace_file(path, text.encode(errors="surrogateescape"))


def fingerprint_of(settings: dict) -> str:
    """The one fingerprint of what all results of a folder depend on: not that of single losses or seeds."""
    decisive = {name: value for name, value in settings.items() if name not in APART}
    return fingerprint.digest([json.dumps(decisive, sort_keys=True).encode()])


def check_settings(folder: Path, settings: dict) -> None:
    """Whether results of these settings may be added to this folder, with whatever losses and seeds it has already.

    Raises:
        DifferentSettings: the folder holds results of other data or settings, or that do not say what they depend on.
    """
    content = read_settings(folder)
    if not has_results(folder):
        return
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
    differences += _data_differences(earlier.get(DATA, {}), settings[DATA])
    differences += [
        f"{loss} {description!r} there, {settings[DESCRIPTIONS][loss]!r} now"
        for loss, description in earlier.get(DESCRIPTIONS, {}).items()
        if settings[DESCRIPTIONS].get(loss, description) != description
    ]
    return differences or [
        f"seed {seed} splits the same images in another way (by another version of scikit-learn or NumPy)"
        for seed, split in settings[SPLITS].items()
        if earlier.get(SPLITS, {}).get(seed, split) != split
    ]


def _data_differences(earlier: dict, data: dict) -> list[str]:
    """What of the data differs and, so that nobody looks there, what does not."""
    other = [name for name in data if earlier.get(name) != data[name]]
    same = [name for name in data if name not in other and data[name] is not None]
    clauses = (f"other {', '.join(other)}" if other else "", f"but the same {', '.join(same)}" if same else "")
    return [", ".join(filter(None, clauses))] if other else []


def has_results(folder: Path) -> bool:
    """Whether there is a result: what a command wrote before its first one counts for nothing."""
    return any((folder / name).exists() for name in (METRICS, PREDICTIONS, SWEEP))


def read_settings(folder: Path) -> dict:
    """What the folder says of its results: nothing where it has none, or the file is missing.

    Raises:
        DifferentSettings: the file is damaged, or was not written by this command.
    """
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not (isinstance(content, dict) and isinstance(content.get("settings"), dict)):
        raise DifferentSettings(
            f"{path} is damaged or not of this command, so that results beside it do not say which data they are of. "
            "Put back a whole copy, choose another --output, or remove the folder."
        )
    return content if has_results(folder) else {}


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
        dict(zip(PREDICTION_COLUMNS, (loss, seed, index, label, predicted, confidence), strict=True))
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
        **({DIVERGED: run.diverged} if run.diverged else {}),
    }


def read_runs(folder: Path, class_names: Sequence[str]) -> list[Run]:
    """The finished runs: those in both files, whose metrics are those of their predictions. Others are named."""
    if not (folder / METRICS).exists() or not (folder / PREDICTIONS).exists():
        return []
    predictions: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for line in csv.DictReader(read_lines(folder / PREDICTIONS, PREDICTION_COLUMNS)):
        values = tuple(line[name] or "" for name in PREDICTION_COLUMNS)
        predictions.setdefault(values[:2], []).append(values[2:])
    runs, damaged = [], []
    for row in csv.DictReader(read_lines(folder / METRICS, ("loss", "seed"))):
        key = row.get("loss") or "", row.get("seed") or ""
        try:
            runs.append(_run_of(row, predictions.get(key, []), class_names))
        except (KeyError, TypeError, ValueError):
            damaged.append(", seed ".join(key))
    if damaged:
        progress.say(
            f"{folder / METRICS} and {PREDICTIONS} beside it do not agree on, or lack a part of: {'; '.join(damaged)}. "
            "That is trained again."
        )
    return runs


def _run_of(row: dict[str, str], predictions: Sequence[tuple[str, ...]], class_names: Sequence[str]) -> Run:
    """The run of a line of metrics.

    Raises:
        KeyError, TypeError, ValueError: the line or its predictions are not whole, or do not agree.
    """
    *numbers, confidence = zip(*predictions, strict=True)
    indices, labels, predicted = (np.array(column, dtype=np.int64) for column in numbers)
    run = Run(
        loss=row["loss"],
        seed=int(row["seed"]),
        indices=indices,
        labels=labels,
        predicted=predicted,
        confidence=np.array(confidence, dtype=np.float64),
        choice=row["choice"],
        best_epoch=int(row["best_epoch"]),
        validation_f1=float(row["validation_macro_f1"]),
        seconds=float(row["seconds"]),
        diverged=int(row.get(DIVERGED) or 0),
    )
    expected = {name: str(value) for name, value in _metrics_row(run, class_names).items()}
    if {DIVERGED: "", **expected} != {DIVERGED: "", **row}:
        raise ValueError("the metrics are not those of the predictions")
    return run


def read_lines(path: Path, columns: Iterable[str]) -> list[str]:
    """The whole lines of a CSV file with these columns, gzipped or not; of a damaged one those before the damage."""
    lines, fault = [], ""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", newline="", encoding="utf-8") as file:
            for line in file:  # one by one: a damaged file has some before it fails
                lines.append(line)
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        fault = str(error)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        fault = fault or "its last line is cut off"
    absent = set(columns).difference(*csv.reader(lines[:1]))
    if lines and absent:
        lines, fault = [], fault or f"it has no column {min(absent)!r}"
    if fault or not lines:
        progress.say(f"{path} is damaged ({fault or 'it is empty'}): what it lacks is trained again.")
    return lines


def csv_text(rows: Sequence[dict[str, object]]) -> str:
    """The rows as CSV, under the names that any of them has."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it has the old content or the new at any moment, whatever happens, a power cut included.

    Raises:
        CannotWrite: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()
