"""Which of LMF's settings matter? One changed at a time, judged on the validation part alone.

``python -m benchmarks.accuracy.sweep --dataset elpv --model efficientnet-lite0-frozen`` writes ``sweep.csv`` and
``sweep.md`` beside the experiment's results. The test part is never looked at. The macro-F1 is that of the epoch where
it is best, which flatters all settings alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.accuracy import command, protocol, report, results
from benchmarks.accuracy.models import HEAD_SCALE
from lmf_triton import FocalLoss, LMFLoss, class_balanced_weights, ldam_margins

Counts = Sequence[int]
MAX_MARGIN = 0.5  # the paper's
SCALES = (2, 5, 10, 30)
MAX_MARGINS = (0, 0.1, 0.25, 1, 2, 4)
COEFFICIENTS = ((1, 0), (2, 1), (1.5, 1), (1, 2), (0, 1))
GAMMAS = (0, 0.5, 1, 2, 3)


@dataclass(frozen=True)
class Variant:
    """LMF with one setting changed; ``make`` takes the training counts, and the options that all have alike."""

    factor: str
    value: str
    make: Callable[..., nn.Module]
    head: str = "linear"

    @property
    def name(self) -> str:
        return f"{self.factor} {self.value}".strip()


def _weighted(
    make_weights: Callable[[Counts], Tensor], reduction: str, counts: Counts, **options: float | Tensor | None
) -> nn.Module:
    return LMFLoss(counts, weight=make_weights(counts), reduction=reduction, **options)


PAPER = Variant("paper", "", LMFLoss)
VARIANTS = (
    PAPER,
    Variant("cross-entropy", "", lambda counts, **options: FocalLoss(gamma=0, **options)),
    Variant("authors' code", "", partial(protocol.make_criterion, "lmf-authors")),
    *(Variant("scale", f"{scale}", partial(LMFLoss, scale=scale)) for scale in SCALES),
    *(Variant("max_margin", f"{margin}", partial(LMFLoss, max_margin=margin)) for margin in MAX_MARGINS),
    # Margins are in the logits' units, and the logits of this head are cosines times HEAD_SCALE: margins of 0.5 between
    # cosines, as in LDAM, are margins of HEAD_SCALE / 2 between logits.
    Variant("head", "normalised, margins of the logits", LMFLoss, "normalised"),
    Variant(
        "head", "normalised, margins of the cosines", partial(LMFLoss, max_margin=MAX_MARGIN * HEAD_SCALE), "normalised"
    ),
    # Without weights the two averages are the same.
    *(
        Variant("averaging", f"{name} as weights, {reduction}", partial(_weighted, make_weights, reduction))
        for name, make_weights in (("margins", ldam_margins), ("class-balanced", class_balanced_weights))
        for reduction in ("mean", "mean_per_term")
    ),
    *(Variant("alpha:beta", f"{a}:{b}", partial(LMFLoss, alpha=a, beta=b)) for a, b in COEFFICIENTS),
    *(Variant("gamma", f"{gamma}", partial(LMFLoss, gamma=gamma)) for gamma in GAMMAS),
)


def train_all(task: protocol.Task, seeds: Sequence[int]) -> list[dict[str, object]]:
    """Validation macro-F1 of each variant and seed."""
    rows = []
    for seed, variant in tqdm([(seed, variant) for seed in seeds for variant in VARIANTS], "sweep", unit="run"):
        split = protocol.split(task.dataset, seed)
        counts = protocol.class_counts(task.dataset, split.train)
        criterion = variant.make(counts, **task.loss_options(counts))
        title = f"{variant.name}, seed {seed}"
        _, checkpoint = protocol.train(replace(task, head=variant.head), split, seed, criterion, None, title)
        rows.append(
            {
                "factor": variant.factor,
                "value": variant.value,
                "seed": seed,
                "validation_macro_f1": f"{checkpoint.validation_f1:.6f}",
                "best_epoch": checkpoint.epoch,
            }
        )
    return rows


def table(rows: Sequence[dict[str, object]], title: str) -> str:
    """A line for each variant, with its paired difference to the paper's setting."""
    f1 = {}
    for row in rows:  # each variant's seeds in the same order
        f1.setdefault((row["factor"], row["value"]), []).append(float(row["validation_macro_f1"]))
    paper = f1[PAPER.factor, PAPER.value]
    lines = [
        (
            f"{factor} {value}".strip(),
            report.percent(values),
            "–" if values is paper else report.points(report.paired_difference(values, paper)),
        )
        for (factor, value), values in f1.items()
    ]
    best = max(f1, key=lambda key: np.mean(f1[key]))
    caption = (
        f"{title}: LMF with one setting changed from the paper's (alpha:beta 1:1, gamma 1.5, scale 1, max_margin 0.5, "
        f"linear head, no weights). Macro-F1 on the validation part alone, of the best epoch; {len(paper)} seed(s). "
        f"Last column: mean difference in points, paired by seed, with its 95% t interval. With {len(f1)} settings, "
        f"some are ahead by chance: the best, {' '.join(best).strip()}, most of all."
    )
    return f"{caption}\n\n{report.markdown(('setting', 'validation macro-F1 %', 'setting − paper'), lines)}"


def main() -> None:
    args = command.make_parser(__doc__).parse_args()
    folder = command.output_folder(args)
    with results.claim(folder):
        dataset, model = command.load(args)
        settings = command.settings(args, dataset, model)
        results.check_settings(folder, settings)
        task = command.make_task(args, dataset, model)
        rows = train_all(task, command.seeds(args))
        command.check_weights(task, settings)
        write_report(rows, task, settings, folder)
    print(folder)


def write_report(rows: Sequence[dict[str, object]], task: protocol.Task, settings: dict, folder: Path) -> None:
    """Rows with all that they depend on, and their table, which is printed as well."""
    constants = {name: settings[name] for name in ("epochs", "learning_rate", "flips")}
    constants["fingerprint"] = results.fingerprint_of(settings)
    environment = command.environment(task)
    results.record_settings(folder, settings, environment)
    lines = [row | constants | environment for row in rows]
    results.replace_file(folder / results.SWEEP, results.csv_text(lines).encode())
    text = table(rows, task.title)
    results.replace_file(folder / "sweep.md", text.encode())
    print(text)


if __name__ == "__main__":
    command.run(main)
