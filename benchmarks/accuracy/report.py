"""Tables and pictures of finished runs: the paper's Table 1, Table 2, Figures 1 and 2, and confusion matrices."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from captum.attr import LayerGradCam
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from benchmarks.accuracy.protocol import DRW_SUFFIX
from benchmarks.accuracy.results import GRAD_CAM, Metrics, Run, metrics, replace_file

LMF = "lmf"
CONFIDENCE = 0.95
DPI = 150
MAX_BARS = 5  # classes in the picture of the rarest
MAX_ANNOTATED = 10  # classes whose confusion matrix still has room for numbers
# After Okabe and Ito: the colour-blind tell them apart too. Re-weighting is hatched.
COLORS = {
    "cross-entropy": "#BBBBBB",
    "focal": "#56B4E9",
    "ldam": "#E69F00",
    "lmf": "#0072B2",
    "lmf-authors": "#009E73",
}


class Difference(NamedTuple):
    """Mean over the seeds of paired differences, and the bounds of its interval (``None`` for one seed)."""

    mean: float
    low: float | None
    high: float | None


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Mean of ``values - baseline``, seed by seed, with Student's t interval."""
    differences = np.subtract(values, baseline)
    mean, n = float(differences.mean()), len(differences)
    if n == 1:
        return Difference(mean, None, None)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return Difference(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Results:
    """The runs of an experiment, grouped by loss, with what the tables say about the data."""

    title: str
    class_names: tuple[str, ...]
    training_counts: tuple[tuple[int, ...], ...]  # of each seed
    runs: tuple[Run, ...]
    note: str  # on the test set

    @property
    def losses(self) -> list[str]:
        return list(dict.fromkeys(run.loss for run in self.runs))

    @property
    def n_seeds(self) -> int:
        return len({run.seed for run in self.runs})

    @property
    def counts(self) -> list[int]:
        """Training images of each class, the mean over the seeds."""
        return np.mean(self.training_counts, axis=0).round().astype(int).tolist()

    def of_loss(self, loss: str) -> list[Metrics]:
        """A loss's metrics in the order of the seeds."""
        runs = sorted((run for run in self.runs if run.loss == loss), key=lambda run: run.seed)
        return [metrics(run, len(self.class_names)) for run in runs]


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation in percent; of one value, itself."""
    mean = f"{100 * np.mean(values):.1f}"
    return f"{mean} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def points(difference: Difference) -> str:
    """A difference in percentage points with its interval, if it has one."""
    mean = f"{100 * difference.mean:+.1f}"
    if difference.low is None:
        return mean
    return f"{mean} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows)) + "\n"


def table_1(results: Results) -> str:
    """Accuracy and macro averages of each loss, and the paired difference of LMF's macro-F1 to it."""
    lines = []
    for loss in results.losses:
        scores = results.of_loss(loss)
        difference = "–"
        if loss != LMF and LMF in results.losses:
            lmf_f1 = [score.macro_f1 for score in results.of_loss(LMF)]
            difference = points(paired_difference(lmf_f1, [score.macro_f1 for score in scores]))
        columns = zip(*((s.accuracy, s.macro_precision, s.macro_recall, s.macro_f1) for s in scores), strict=True)
        lines.append((loss, *map(percent, columns), difference))
    header = ("loss", "accuracy %", "macro precision %", "macro recall %", "macro-F1 %", "LMF − loss, macro-F1")
    return f"{_caption(results)}\n\n{markdown(header, lines)}"


def _caption(results: Results) -> str:
    caption = f"{results.title}, {_seeds(results)}. {results.note}"
    if results.n_seeds > 1:
        caption += (
            f" Mean ± standard deviation over the seeds. Last column: mean difference in points, paired by seed, with "
            f"its {100 * CONFIDENCE:.0f}% t interval over the seeds (of each comparison by itself)."
        )
    return caption


def _seeds(results: Results) -> str:
    return "1 seed" if results.n_seeds == 1 else f"{results.n_seeds} seeds"


def table_2(results: Results) -> str:
    """F1 of each class, with its number of training images."""
    class_f1 = {loss: np.array([score.class_f1 for score in results.of_loss(loss)]) for loss in results.losses}
    lines = [
        (name, str(results.counts[label]), *(percent(f1[:, label]) for f1 in class_f1.values()))
        for label, name in enumerate(results.class_names)
    ]
    header = ("class", "training images", *(f"{loss}, F1 %" for loss in results.losses))
    return f"{results.title}, {_seeds(results)}: F1 of each class.\n\n{markdown(header, lines)}"


def plot_rarest(results: Results, path: Path) -> None:
    """Figure 1: F1 of the rarest classes, rarest last."""
    n_shown = min(MAX_BARS, max(3, math.ceil(len(results.class_names) / 2)), len(results.class_names))
    shown = sorted(range(len(results.class_names)), key=lambda label: -results.counts[label])[-n_shown:]
    figure = Figure(figsize=(10, 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(results.losses)
    for i, loss in enumerate(results.losses):
        f1 = np.array([score.class_f1 for score in results.of_loss(loss)])[:, shown]
        axes.bar(
            np.arange(n_shown) + (i - (len(results.losses) - 1) / 2) * width,
            f1.mean(0),
            width,
            yerr=f1.std(0, ddof=1) if len(f1) > 1 else None,
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
            label=f"{loss} (macro-F1 {percent([score.macro_f1 for score in results.of_loss(loss)])} %)",
            **_style(loss),
        )
    axes.set_xticks(range(n_shown), [f"{results.class_names[label]}\n{results.counts[label]}" for label in shown])
    axes.set_xlabel("class, and its number of training images")
    axes.set_ylabel("F1 on the test set")
    axes.set_ylim(0, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    spread = ": mean and standard deviation over the seeds" if results.n_seeds > 1 else ""
    figure.suptitle(f"{results.title}, {_seeds(results)}, the rarest classes{spread}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def _style(loss: str) -> dict[str, str]:
    style = {"color": COLORS[loss.removesuffix(DRW_SUFFIX)], "edgecolor": "white", "linewidth": 0}
    return style | {"hatch": "///"} if loss.endswith(DRW_SUFFIX) else style


def plot_confusion(results: Results, path: Path) -> None:
    """Confusion matrices of all seeds together, each row in percent of its class."""
    n_columns = min(4, len(results.losses))
    n_rows = math.ceil(len(results.losses) / n_columns)
    figure = Figure(figsize=(3.2 * n_columns + 1.5, 3.9 * n_rows + 1), dpi=DPI, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    labels = range(len(results.class_names))
    for axes, loss in zip(panels.flat, results.losses, strict=False):
        runs = [run for run in results.runs if run.loss == loss]
        counts = sum(confusion_matrix(run.labels, run.predicted, labels=labels) for run in runs)
        image = _draw_matrix(axes, 100 * counts / counts.sum(1, keepdims=True), results.class_names)
        axes.set_title(loss)
    for axes in panels.flat[len(results.losses) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=panels, label="% of the class's test images", shrink=0.6)
    figure.supxlabel("predicted")
    figure.supylabel("class")
    figure.suptitle(f"{results.title}, test images of {_seeds(results)}")
    _save(figure, path)


def _draw_matrix(axes: Axes, percentages: np.ndarray, class_names: Sequence[str]):
    image = axes.imshow(percentages, cmap="cividis", vmin=0, vmax=100)
    axes.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(class_names)), class_names, fontsize=7)
    axes.tick_params(labelbottom=True)
    if len(class_names) <= MAX_ANNOTATED:
        for (row, column), value in np.ndenumerate(percentages):
            color = "black" if value > 60 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=color)
    return image


def grad_cam(network: nn.Module, image: np.ndarray, label: int) -> dict[str, list]:
    """Where an image speaks for this class and against the others: Grad-CAM, and all probabilities.

    It is that of the class's log-probability in the encoder's feature maps. Of the logit alone, as in the method's
    paper, it is empty for nearly every image of a rare class, whose logit is negative.

    Args:
        network: from images to logits, its encoder first; see ``Model.on_images``.
        image: uint8, ``(1 or 3, H, W)``.
        label: this class.
    """
    with_log_softmax = nn.Sequential(network, nn.LogSoftmax(1)).eval()
    batch = torch.from_numpy(image)[None].to(next(network.parameters()).device)
    heat = LayerGradCam(with_log_softmax, network[0].maps).attribute(batch, target=label, relu_attributions=True)
    with torch.no_grad():
        probabilities = network(batch).softmax(1)
    return {"map": _rounded(heat[0, 0]), "probabilities": _rounded(probabilities[0])}


def _rounded(values: Tensor) -> list:
    """Six significant digits."""
    return np.vectorize(lambda value: float(f"{value:.6g}"))(values.detach().cpu().double().numpy()).tolist()


def read_grad_cams(folder: Path) -> dict[str, dict[str, list]]:
    """The maps of each loss so far."""
    path = folder / GRAD_CAM
    return json.loads(path.read_text()) if path.exists() else {}


def add_grad_cam(folder: Path, loss: str, result: dict[str, list]) -> None:
    """Keep the map of a loss, whose network is not kept."""
    results = read_grad_cams(folder) | {loss: result}
    replace_file(folder / GRAD_CAM, (json.dumps(results) + "\n").encode())


def plot_grad_cams(
    image: np.ndarray,
    label: int,
    class_names: Sequence[str],
    maps: dict[str, dict[str, list]],
    origin: str,
    path: Path,
) -> None:
    """Figure 2: one test image, and where each loss's network sees its class in it; each map by its own maximum."""
    n_columns = min(4, 1 + len(maps))
    n_rows = math.ceil((1 + len(maps)) / n_columns)
    figure = Figure(figsize=(2.6 * n_columns, 3.0 * n_rows + 0.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    picture = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    for axes in panels.flat[: 1 + len(maps)]:
        axes.imshow(picture, cmap="gray")
    panels.flat[0].set_title(f"class: {class_names[label]}\n", fontsize=9)
    for axes, (loss, result) in zip(panels.flat[1:], maps.items(), strict=False):
        heat = np.array(result["map"], dtype=np.float32)
        if heat.any():
            heat = np.asarray(Image.fromarray(heat).resize(picture.shape[1::-1], Image.Resampling.BILINEAR))
            axes.imshow(heat, cmap="inferno", alpha=0.55, vmin=0)
        best = int(np.argmax(result["probabilities"]))
        axes.set_title(f"{loss}\n{class_names[best]}: {100 * result['probabilities'][best]:.0f} %", fontsize=9)
    figure.suptitle("Grad-CAM of the class's log-probability; below each loss its prediction", fontsize=10)
    figure.supxlabel(f"image: {origin}", fontsize=7)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
