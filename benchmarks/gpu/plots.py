"""The pictures of what has been measured."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import COMPILED, CROSS_ENTROPY, EAGER, FLASH, LIGER, OURS, QUACK, RECOMPUTE
from benchmarks.gpu.measuring import COPY
from benchmarks.gpu.targets import is_large, n_classes, n_samples
from benchmarks.timing import Row

COLORS = {
    OURS: "#0072B2",
    RECOMPUTE: "#56B4E9",
    EAGER: "#999999",
    COMPILED: "#E69F00",
    CROSS_ENTROPY: "#D55E00",
    COPY: "#000000",
    LIGER: "#CC79A7",
    QUACK: "#009E73",
    FLASH: "#F0E442",
}


def draw(rows: Sequence[Row], folder: Path) -> None:
    """All of them."""
    plot_bandwidth([row for row in rows if is_large(row) and row["forward_backward_us"]], folder / "bandwidth.png")
    over_samples = [row for row in rows if row["problem"].startswith("rows_")]
    labels = ("samples, C = 1000", "µs, forward + backward")
    plot_lines(over_samples, n_samples, "forward_backward_us", labels, folder / "time.png")
    large = [row for row in rows if is_large(row) and row["dtype"] == "float32"]
    labels = ("MiB of logits", "peak MiB above")
    plot_lines(large, lambda row: row["logits_mib"], "peak_mib", labels, folder / "memory.png")


def plot_bandwidth(rows: Sequence[Row], path: Path) -> None:
    """Useful traffic (one reading, one writing of the logits) a second against C, forward + backward."""
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), ("bfloat16", "float32"), strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        for name in dict.fromkeys(row["contender"] for row in of_dtype):
            points = sorted((n_classes(row), _gigabytes_a_second(row)) for row in of_dtype if row["contender"] == name)
            _plot_points(axes, points, name, "--" if name == COPY else "o-")
        axes.set_xlabel("classes")
        axes.set_title(dtype)
        axes.set_ylim(bottom=0)
        _style(axes)
    figure.supylabel("GB/s of useful traffic, forward + backward")
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def plot_lines(rows: Sequence[Row], x: Callable[[Row], float], y: str, labels: tuple[str, str], path: Path) -> None:
    """One line a contender, both axes logarithmic."""
    figure = Figure(figsize=(6.5, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted((x(row), row[y]) for row in rows if row["contender"] == name and row[y])
        if points:
            _plot_points(axes, points, name, "o-")
    axes.set_yscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    _style(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def _gigabytes_a_second(row: Row) -> float:
    return 2 * row["logits_mib"] * 2**20 / row["forward_backward_us"] / 1e3


def _plot_points(axes: Axes, points: Sequence[tuple[float, float]], name: str, style: str) -> None:
    axes.plot(*zip(*points, strict=True), style, color=COLORS.get(name), label=name, markersize=4)


def _style(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
