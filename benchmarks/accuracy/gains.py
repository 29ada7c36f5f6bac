"""The table and the picture of docs/gains.md, from the committed results alone.

``python -m benchmarks.accuracy.gains`` prints the one and writes the other.
"""

import numpy as np

from benchmarks import measure
from benchmarks.accuracy import command, compare, report
from benchmarks.accuracy.compare import FIGURES, Results
from benchmarks.accuracy.methods import BASELINE, METHODS

PICTURE = measure.ROOT / "docs" / "gains.png"
EXPERIMENTS = {
    "head, grouped": "ham10000-efficientnet-lite0-frozen",
    "head, random": "ham10000-efficientnet-lite0-frozen-random",
    "last blocks, grouped": "ham10000-efficientnet-lite0-last-blocks",
    "last blocks, random": "ham10000-efficientnet-lite0-last-blocks-random",
}
NONE = "–"


def read() -> dict[str, Results]:
    """The committed results of HAM10000, by what is trained and how the images are split."""
    return {name: compare.read(command.RESULTS / folder) for name, folder in EXPERIMENTS.items()}


def table(found: dict[str, Results]) -> str:
    """A line for each loss: cross-entropy's figures, and what others add to them, in bold beyond chance."""
    first = next(iter(found.values()))
    rarest = ", ".join(first.class_names[label] for label in first.rarest)
    losses = [name for name in METHODS if any(name in results.losses for results in found.values())]
    rows = []
    for loss in losses:
        rows.append(
            (loss, *(_cell(results, loss) for results in found.values()), *_rarest_and_calibration(first, loss))
        )
    headers = (f"{name} ({results.n_seeds} seeds)" for name, results in found.items())
    return report.markdown(("loss", *headers, f"first column's recall of {rarest} %", "its ECE %"), rows)


def _rarest_and_calibration(found: Results, loss: str) -> tuple[str, str]:
    if loss not in found.losses:
        return NONE, NONE
    scores = found.of_loss(loss)
    recall = (np.mean([score.class_recall[label] for score in scores]) for label in found.rarest)
    error = np.mean([score.calibration_error for score in scores])
    return " / ".join(f"{100 * value:.0f}" for value in recall), f"{100 * error:.1f}"


def _cell(found: Results, loss: str) -> str:
    """Macro-F1 and balanced accuracy: of cross-entropy themselves, of others the differences to it."""
    if loss not in found.losses:
        return NONE
    if loss == BASELINE:
        scores = found.of_loss(loss)
        return " / ".join(f"{100 * np.mean([figure(score) for score in scores]):.1f}" for figure in FIGURES.values())
    return " / ".join(_marked(found.difference(loss, figure)) for figure in FIGURES)


def _marked(difference: compare.Difference) -> str:
    text = f"{100 * difference.mean:+.1f}"
    return f"**{text}**" if difference.is_better or difference.is_worse else text


def main() -> None:
    found = read()
    report.plot_differences({f"{name}, {each.n_seeds} seeds": each for name, each in found.items()}, PICTURE)
    command.show(table(found))


if __name__ == "__main__":
    command.run(main)
