"""Tables and pictures of finished runs: the paper's Tables 1 and 2, its Figures 1 and 2, differences, confusion."""

import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from captum.attr import LayerGradCam
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from benchmarks.accuracy import progress
from benchmarks.accuracy.compare import CONFIDENCE, FIGURES, Difference, Results, diverged, points, recommendation
from benchmarks.accuracy.methods import BASELINE, METHODS
from benchmarks.accuracy.results import CALIBRATION_BINS, GRAD_CAM, replace_file
from benchmarks.accuracy.wording import in_markdown, in_picture

DPI = 150
MARK = " †"  # behind a loss of which a training diverged
MAX_HALF = 8  # points beside the outermost mean that a picture of differences still shows
EXPERIMENT_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#777777")
MAX_SHOWN = 5  # classes in the picture of the rarest
MAX_ANNOTATED = 10  # classes whose confusion matrix still has room for numbers
# After Okabe and Ito: the colour-blind tell them apart too.
COLORS = {
    "cross-entropy": "#777777",
    "focal": "#56B4E9",
    "ldam": "#E69F00",
    "lmf": "#0072B2",
}


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation in percent; of one value, itself."""
    mean = f"{100 * np.mean(values):.1f}"
    return f"{mean} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows)) + "\n"


def tables(found: Results) -> dict[str, str]:
    """All that is written in words, by the names of the files: a function of the results alone."""
    return {
        "table1.md": table_1(found),
        "table2.md": table_2(found),
        "differences.md": differences(found),
        "recommendation.md": recommendation(found),
    }


def table_1(found: Results) -> str:
    """Accuracy, macro averages, the rarest classes and calibration."""
    rarest = [f"recall of {in_markdown(found.class_names[label])} %" for label in found.rarest]
    lines = []
    for loss in found.losses:
        scores = found.of_loss(loss)
        columns = [
            [(s.accuracy, s.balanced_accuracy, s.macro_precision, s.macro_f1)[i] for s in scores] for i in range(4)
        ]
        columns += [[s.class_recall[label] for s in scores] for label in found.rarest]
        lines.append((_marked(loss, found), *map(percent, columns), percent([s.calibration_error for s in scores])))
    header = ("loss", "accuracy %", "balanced accuracy %", "macro precision %", "macro-F1 %", *rarest, "ECE %")
    return f"{_caption(found)}\n\n{markdown(header, lines)}"


def _caption(found: Results) -> str:
    n_test = round(float(found.counts["test"].sum()))
    own = "Every seed has its own split; their test parts overlap." if found.has_own_test else "One test part for all."
    caption = f"{found.title}, {_seeds(found)}, {n_test} test images. {own}"
    if found.n_seeds > 1:
        caption += " Mean ± standard deviation over the seeds."
    return (
        f"{caption} Balanced accuracy is macro recall; ECE the expected calibration error of softmax(logits), whatever "
        f"the loss's scale, {CALIBRATION_BINS} bins.{_on_divergence(found)}"
    )


def _marked(loss: str, found: Results) -> str:
    return loss + MARK * (loss in found.diverged)


def _on_divergence(found: Results) -> str:
    """For a caption, where a training diverged."""
    if not found.diverged:
        return ""
    return f"{MARK}: {diverged(found)} It counts with its best epoch before that, or as the untrained network."


def _seeds(found: Results) -> str:
    return "1 seed" if found.n_seeds == 1 else f"{found.n_seeds} seeds"


def table_2(found: Results) -> str:
    """F1 of each class, with its number of training images."""
    class_f1 = {loss: np.array([score.class_f1 for score in found.of_loss(loss)]) for loss in found.losses}
    lines = [
        (_marked(loss, found), *(percent(f1[:, label]) for label in range(len(found.class_names))))
        for loss, f1 in class_f1.items()
    ]
    counts = found.counts["train"].round().astype(int)
    names = map(in_markdown, found.class_names)
    header = ("loss", *(f"{name} ({count})" for name, count in zip(names, counts, strict=True)))
    caption = f"{found.title}, {_seeds(found)}: F1 of each class in percent, with its number of training images."
    return f"{caption}{_on_divergence(found)}\n\n{markdown(header, lines)}"


def differences(found: Results) -> str:
    """Paired differences of every loss to cross-entropy."""
    if not found.compared:
        return f"{found.title}: no loss to compare with {BASELINE}.\n"
    lines = [
        (_marked(loss, found), *(points(found.difference(loss, figure)) for figure in FIGURES))
        for loss in found.compared
    ]
    caption = f"{found.title}, {_seeds(found)}: difference to {BASELINE} in points, paired by seed"
    if found.n_seeds > 1:
        corrected = (
            "allow for the overlap of the splits (Nadeau and Bengio 2003)"
            if found.has_own_test
            else "are over the seeds, for this pool of training images and this test part alone"
        )
        caption += (
            f". The intervals {corrected}, and of a column's {len(found.compared)} all hold together with "
            f"{100 * CONFIDENCE:.0f} % (Bonferroni)"
        )
    return f"{caption}.{_on_divergence(found)}\n\n{markdown(('loss', *FIGURES), lines)}"


def plot_rarest(found: Results, path: Path) -> None:
    """Figure 1: F1 of the rarest classes, rarest last."""
    n_shown = min(MAX_SHOWN, max(3, math.ceil(len(found.class_names) / 2)), len(found.class_names))
    counts = found.counts["train"]
    shown = sorted(range(len(found.class_names)), key=lambda label: -counts[label])[-n_shown:]
    figure = Figure(figsize=(2.6 + 2 * n_shown, 1.4 + 0.28 * len(found.losses)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, n_shown, squeeze=False, sharex=True, sharey=True)
    for axes, label in zip(panels.flat, shown, strict=True):
        for row, loss in enumerate(found.losses):
            f1 = np.array([score.class_f1[label] for score in found.of_loss(loss)])
            spread = f1.std(ddof=1) if len(f1) > 1 else None
            axes.errorbar(f1.mean(), row, xerr=spread, fmt="o", markersize=4, elinewidth=0.9, color=_color(loss))
        axes.set_title(f"{in_picture(found.class_names[label])} ({counts[label]:.0f})", fontsize=9)
        axes.set_yticks(range(len(found.losses)), [_marked(loss, found) for loss in found.losses], fontsize=8)
        axes.xaxis.grid(True, color="#DDDDDD", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels.flat[0].invert_yaxis()
    spread = ": mean and standard deviation over the seeds" if found.n_seeds > 1 else ""
    figure.suptitle(f"{found.title}, {_seeds(found)}, the rarest classes{spread}", fontsize=9)
    figure.supxlabel("F1 on the test part (above: class, and its number of training images)", fontsize=9)
    _save(figure, path)


def _color(loss: str) -> str:
    return COLORS[METHODS[loss].settings[0].loss]


def plot_differences(experiments: Mapping[str, Results], path: Path) -> None:
    """Differences to cross-entropy with their intervals: a panel for each figure, a colour for each experiment."""
    losses = [loss for loss in METHODS if any(loss in found.compared for found in experiments.values())]
    height = 1.6 + (0.16 + 0.14 * len(experiments)) * len(losses)
    figure = Figure(figsize=(9, height), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(FIGURES), sharey=True)
    for axes, name in zip(panels, FIGURES, strict=True):
        means = []
        for position, (title, found) in enumerate(experiments.items()):
            shown = [loss for loss in losses if loss in found.compared]
            differences = [found.difference(loss, name) for loss in shown]
            means += [100 * difference.mean for difference in differences]
            offset = (position - (len(experiments) - 1) / 2) * 0.7 / len(experiments)
            for loss, difference in zip(shown, differences, strict=True):
                _draw_difference(axes, difference, losses.index(loss) + offset, EXPERIMENT_COLORS[position])
            axes.plot([], [], "o", markersize=4, color=EXPERIMENT_COLORS[position], label=title)
        axes.axvline(0, color="#999999", linewidth=0.8)
        # Two or three seeds have intervals of a hundred points, which would leave no room for the rest.
        axes.set_xlim(min(0, *means) - MAX_HALF, max(0, *means) + MAX_HALF)
        axes.set_xlabel(f"{name}: difference to {BASELINE}, points", fontsize=8)
        axes.set_yticks(range(len(losses)), losses, fontsize=8)
        axes.xaxis.grid(True, color="#DDDDDD", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    _save(figure, path)


def _draw_difference(axes: Axes, difference: Difference, row: float, color: str) -> None:
    """Filled where the interval excludes 0."""
    is_clear = difference.is_better or difference.is_worse
    if difference.low is not None and difference.high is not None:
        axes.plot([100 * difference.low, 100 * difference.high], [row, row], color=color, linewidth=0.9)
    face = color if is_clear else "white"
    axes.plot(100 * difference.mean, row, "o", markersize=4, color=color, markerfacecolor=face)


def plot_confusion(found: Results, path: Path) -> None:
    """Confusion matrices of all seeds together, each row in percent of its class."""
    n_columns = min(4, len(found.losses))
    n_rows = math.ceil(len(found.losses) / n_columns)
    figure = Figure(figsize=(3.2 * n_columns + 1.5, 3.9 * n_rows + 1), dpi=DPI, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    labels = range(len(found.class_names))
    for axes, loss in zip(panels.flat, found.losses, strict=False):
        runs = [run for run in found.runs if run.loss == loss]
        counts = sum(confusion_matrix(run.labels, run.predicted, labels=labels) for run in runs)
        image = _draw_matrix(axes, 100 * counts / counts.sum(1, keepdims=True), found.class_names)
        axes.set_title(_marked(loss, found))
    for axes in panels.flat[len(found.losses) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=panels, label="% of the class's test images", shrink=0.6)
    figure.supxlabel("predicted")
    figure.supylabel("class")
    figure.suptitle(f"{found.title}, test images of {_seeds(found)}")
    _save(figure, path)


def _draw_matrix(axes: Axes, percentages: np.ndarray, class_names: Sequence[str]):
    image = axes.imshow(percentages, cmap="cividis", vmin=0, vmax=100)
    names = [in_picture(name) for name in class_names]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
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
    """The maps of each loss so far; of a damaged file none, with a word."""
    path = folder / GRAD_CAM
    if not path.exists():
        return {}
    try:
        maps = json.loads(path.read_text(encoding="utf-8"))
        return {loss: {name: maps[loss][name] for name in ("map", "probabilities")} for loss in maps}
    except (KeyError, TypeError, ValueError):
        progress.say(f"{path} is damaged: the runs that it explains are trained again.")
        return {}


def add_grad_cam(folder: Path, loss: str, result: dict[str, list]) -> None:
    """Keep the map of a loss, whose network is not kept."""
    maps = read_grad_cams(folder) | {loss: result}
    replace_file(folder / GRAD_CAM, (json.dumps(maps) + "\n").encode())


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
    panels.flat[0].set_title(f"class: {in_picture(class_names[label])}\n", fontsize=9)
    for axes, (loss, result) in zip(panels.flat[1:], maps.items(), strict=False):
        heat = np.array(result["map"], dtype=np.float32)
        if heat.any():
            heat = np.asarray(Image.fromarray(heat).resize(picture.shape[1::-1], Image.Resampling.BILINEAR))
            axes.imshow(heat, cmap="inferno", alpha=0.55, vmin=0)
        best = int(np.argmax(result["probabilities"]))
        axes.set_title(
            f"{loss}\n{in_picture(class_names[best])}: {100 * result['probabilities'][best]:.0f} %", fontsize=9
        )
    figure.suptitle("Grad-CAM of the class's log-probability; below each loss its prediction", fontsize=10)
    figure.supxlabel(f"image: {origin}", fontsize=7)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    replace_file(path, file.getvalue())


@contextmanager
def missing_letters_said_once() -> Iterator[None]:
    """One word on all the letters that matplotlib's fonts lack, for a warning a letter and picture."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    missing = [warning for warning in caught if "missing from" in str(warning.message)]
    for warning in caught:
        if warning not in missing:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing:
        progress.say("Some letters are in no font of matplotlib's: pictures show boxes for them; tables have them.")
