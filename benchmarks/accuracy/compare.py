"""What finished runs say: differences to cross-entropy, how certain they are, and what to train with."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.accuracy import results
from benchmarks.accuracy.dataset import counted
from benchmarks.accuracy.methods import BASELINE, METHODS
from benchmarks.accuracy.results import Metrics, Run, metrics

CONFIDENCE = 0.95
FEW_SEEDS = 8  # below, an interval that allows for so many comparisons hardly excludes anything
SAME = 1e-9  # differences that vary less are the same but for rounding: two seeds can fall alike by chance
N_RAREST = 2
REMEDY = "A lower --learning-rate, with another --output, may help."  # where a training diverged

FIGURES: dict[str, Callable[[Metrics], float]] = {
    "macro-F1": lambda scores: scores.macro_f1,
    "balanced accuracy": lambda scores: scores.balanced_accuracy,
}


class Difference(NamedTuple):
    """Mean over the seeds of paired differences, and the bounds of its interval.

    ``None`` where there is no telling: for one seed, and where all seeds have the same difference.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def is_better(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def is_worse(self) -> bool:
        return self.high is not None and self.high < 0


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], *, overlap: float = 0.0, n_comparisons: int = 1
) -> Difference:
    """Mean of ``values - baseline``, seed by seed, with Student's t interval.

    Args:
        values: a figure of each seed.
        baseline: the same, of what it is compared with.
        overlap: images of the test part over those of the training part, where each seed splits the same images anew:
            the seeds are no independent samples then, and the variance of their mean is s² (1 / n + overlap).
        n_comparisons: of how many intervals all shall hold together (Bonferroni).

    Source:
        Nadeau and Bengio 2003, Inference for the generalization error, section 3 (https://doi.org/10.1023/A:1024068626366).
    """
    differences = np.array([value - other for value, other in zip(values, baseline, strict=True)])
    mean, n = float(differences.mean()), len(differences)
    if n == 1 or differences.std(ddof=1) < SAME:
        return Difference(mean, None, None)
    quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / (2 * n_comparisons), n - 1)
    half = float(quantile * differences.std(ddof=1) * math.sqrt(1 / n + overlap))
    return Difference(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Results:
    """The runs of an experiment with what is known of their data: all that tables and pictures need."""

    title: str
    class_names: tuple[str, ...]
    counts: dict[str, np.ndarray]  # by part: images of each class, the mean over the seeds
    has_own_test: bool  # every seed has a test part of its own
    is_quick: bool  # a trial of the command, of few images and epochs
    runs: tuple[Run, ...]
    groups: str | None = None  # of a user's own images: whether their groups were given

    @property
    def losses(self) -> list[str]:
        return [name for name in METHODS if any(run.loss == name for run in self.runs)]

    @property
    def n_seeds(self) -> int:
        return len({run.seed for run in self.runs})

    @property
    def rarest(self) -> list[int]:
        """The classes with the fewest training images, the rarest first."""
        return np.argsort(self.counts["train"], kind="stable")[:N_RAREST].tolist()

    @property
    def overlap(self) -> float:
        """For ``paired_difference``; with one test part for all seeds its intervals hold for that part alone."""
        return float(self.counts["test"].sum() / self.counts["train"].sum()) if self.has_own_test else 0.0

    @property
    def compared(self) -> list[str]:
        """The losses that are compared with cross-entropy: none where that is missing."""
        return [loss for loss in self.losses if loss != BASELINE] if BASELINE in self.losses else []

    @property
    def diverged(self) -> dict[str, list[int]]:
        """The seeds with which the training of a loss diverged, by the loss."""
        runs = sorted((run for run in self.runs if run.diverged), key=lambda run: run.seed)
        of_losses = {loss: [run.seed for run in runs if run.loss == loss] for loss in self.losses}
        return {loss: seeds for loss, seeds in of_losses.items() if seeds}

    def of_loss(self, loss: str) -> list[Metrics]:
        """A loss's metrics in the order of the seeds."""
        return self._metrics[loss]

    @cached_property
    def _metrics(self) -> dict[str, list[Metrics]]:
        of_losses: dict[str, list[Metrics]] = {loss: [] for loss in self.losses}
        for run in sorted(self.runs, key=lambda run: run.seed):
            of_losses[run.loss].append(metrics(run, len(self.class_names)))
        return of_losses

    def difference(self, loss: str, figure: str) -> Difference:
        """Of a loss to cross-entropy in one of ``FIGURES``."""
        ours, baseline = ([FIGURES[figure](scores) for scores in self.of_loss(name)] for name in (loss, BASELINE))
        return paired_difference(ours, baseline, overlap=self.overlap, n_comparisons=len(self.compared))


def read(folder: Path) -> Results:
    """The results in a folder, from its files alone. Seeds that not all losses have finished are left out."""
    settings = results.read_settings(folder)["settings"]
    class_names = tuple(settings[results.CLASS_NAMES])
    runs = results.read_runs(folder, class_names)
    losses = {run.loss for run in runs}
    finished = {seed for seed in {run.seed for run in runs} if {r.loss for r in runs if r.seed == seed} == losses}
    counts = [settings[results.CLASS_COUNTS][str(seed)] for seed in sorted(finished)]
    return Results(
        title=_title(settings),
        class_names=class_names,
        counts={part: np.mean([of_seed[part] for of_seed in counts], axis=0) for part in counts[0]},
        has_own_test=settings[results.DATA]["test set"] is None,
        is_quick=settings["quick"],
        groups=settings.get(results.GROUPS),
        runs=tuple(run for run in runs if run.seed in finished),
    )


def _title(settings: dict) -> str:
    """Of tables and pictures: data, model, and what changes every loss."""
    names = ("logit_adjustment", "label_smoothing")
    changed = [f"{name.replace('_', ' ')} {settings[name]:g}" for name in names if name in settings]
    split = "official test part" if settings[results.DATA]["test set"] else f"{settings['split']} split"
    if results.GROUPS in settings:
        split += f" (groups of images: {settings[results.GROUPS]})"
    return ", ".join([settings["dataset"], settings["model"], split, *changed])


def points(difference: Difference) -> str:
    """A difference in percentage points with its interval, if it has one."""
    mean = f"{100 * difference.mean:+.1f}"
    if difference.low is None:
        return mean
    return f"{mean} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def recommendation(found: Results) -> str:
    """A few sentences for whoever wants to know what to train with: which loss, by how much, with what certainty."""
    if found.is_quick:
        return "Nothing to recommend: this was a quick trial of the command.\n"
    if not found.compared:
        return f"Nothing to recommend: no loss was compared with {BASELINE}.\n"
    if BASELINE in found.diverged or found.compared == list(found.diverged):
        return f"Nothing to recommend: {diverged(found)} {REMEDY}\n"
    if found.n_seeds == 1:
        return "Nothing to recommend: one seed says nothing about chance. The same command with --seeds 10 goes on.\n"
    n_losses = counted(len(found.compared), "loss")
    lines = [
        f"What to train with, by {found.title}, {found.n_seeds} seeds, {n_losses} beside {BASELINE}.",
        "Macro-F1 counts false alarms of the rare classes, balanced accuracy counts only what is found of them. The "
        f"intervals are {100 * CONFIDENCE:.0f} %, for all losses together.",
    ]
    if found.diverged:
        lines.append(f"- Not recommended, whatever its figures: {diverged(found)} {REMEDY}")
    for figure in FIGURES:
        lines += [f"- {_advice(found, figure)}", *_warning(found, figure)]
    if found.n_seeds < FEW_SEEDS:
        lines.append(
            f"- Provisional: {found.n_seeds} seeds show large differences only, and the next may undo them. The same "
            "command with --seeds 10 goes on; to stop where a result pleases is to choose it."
        )
    if found.groups in (results.NOT_GIVEN, results.NOT_USED):
        lines.append(
            f"- Groups of images: {found.groups}. If several images are of one patient, all figures are better than "
            "they will be on new patients (docs/own-images.md)."
        )
    if not found.has_own_test:
        lines.append("- All seeds share one test part: the intervals say nothing of other images to train or test on.")
    return "\n".join(lines) + "\n"


def diverged(found: Results) -> str:
    """Which trainings diverged."""
    of_losses = [
        f"{loss} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})" for loss, seeds in found.diverged.items()
    ]
    return f"the training diverged, its loss or logits not finite, of {'; '.join(of_losses)}."


def _advice(found: Results, figure: str) -> str:
    """On the loss that is best in this figure, and what it does to the other."""
    score = 100 * np.mean([FIGURES[figure](scores) for scores in found.of_loss(BASELINE)])
    whole = [loss for loss in found.compared if loss not in found.diverged]
    better = [loss for loss in whole if found.difference(loss, figure).is_better]
    best = max(better or whole, key=lambda loss: found.difference(loss, figure).mean)
    gain = points(found.difference(best, figure))
    if not better:
        return (
            f"{figure}: no gain that these seeds can show, so {BASELINE} ({score:.1f} %) will do. Nearest to one comes "
            f"{best}, {gain} points."
        )
    (other,) = (name for name in FIGURES if name != figure)
    others = [loss for loss in better if loss != best]
    also = f" Better beyond chance, too: {', '.join(others)}." if others else ""
    return (
        f"{figure}: {best}, {gain} points over {BASELINE} ({score:.1f} %), beyond chance. It changes {other} by "
        f"{points(found.difference(best, other))}. In code: {METHODS[best].code}.{_chosen(found, best)}{also}"
    )


def _chosen(found: Results, loss: str) -> str:
    """What the seeds chose on their validation parts, each for itself."""
    chosen = sorted({run.choice for run in found.runs if run.loss == loss and run.choice})
    return f" The seeds chose {', '.join(chosen)}: choose yours on a validation part." if chosen else ""


def _warning(found: Results, figure: str) -> list[str]:
    worse = [loss for loss in found.compared if found.difference(loss, figure).is_worse]
    return [f"- {figure}: worse than {BASELINE} beyond chance: {', '.join(worse)}."] if worse else []
