"""Tune each loss on the validation part, with as many settings for one as for another.

``python -m benchmarks.accuracy.sweep --dataset ham10000 --data PATH`` tries ``methods.CANDIDATES`` with each seed,
and writes ``sweep.csv`` and ``sweep.md`` beside the experiment's results. The test part is never looked at. With each
seed, ``python -m benchmarks.accuracy --losses lmf-tuned`` then trains what was best here. Interrupted, the same command
goes on where it stopped.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.accuracy import beforehand, command, endings, progress, protocol, report, results, splits
from benchmarks.accuracy.methods import METHODS, NotTuned, Setting

TUNED = tuple(name for name, method in METHODS.items() if method.is_tuned)


def parse_arguments() -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    parser.add_argument("--losses", nargs="+", choices=TUNED, metavar="LOSS", help=f"default: {' '.join(TUNED)}")
    return command.parse(parser)


def choices(folder: Path, keys: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Setting]:
    """The setting of each loss and seed: of a tuned one what is best on the validation part, of equals the first.

    Raises:
        NotTuned: a candidate of a tuned loss was not tried with a seed.
    """
    tried = _read(folder)
    chosen = {}
    for loss, seed in keys:
        settings = METHODS[loss].settings
        if METHODS[loss].is_tuned:
            missing = [setting for setting in settings if (loss, str(setting), seed) not in tried]
            if missing:
                raise NotTuned(
                    f"{loss}, seed {seed}: {folder} does not have {len(missing)} of its {len(settings)} settings yet. "
                    f"First run benchmarks.accuracy.sweep with --losses {loss} and otherwise the same arguments."
                )
            scores = [float(tried[loss, str(setting), seed]["validation_macro_f1"]) for setting in settings]
            chosen[loss, seed] = settings[int(np.argmax(scores))]
        else:
            chosen[loss, seed] = settings[0]
    return chosen


def _read(folder: Path) -> dict[tuple[str, str, int], dict[str, str]]:
    """Rows by loss, setting and seed; those of a damaged file that are whole."""
    path = folder / results.SWEEP
    if not path.exists():
        return {}
    rows, n_damaged = {}, 0
    for row in csv.DictReader(
        results.read_lines(path, ("loss", "setting", "seed", "validation_macro_f1", "best_epoch"))
    ):
        try:
            float(row["validation_macro_f1"]), int(row["best_epoch"])
            rows[row["loss"], row["setting"], int(row["seed"])] = row
        except (KeyError, TypeError, ValueError):
            n_damaged += 1
    if n_damaged:
        progress.say(f"{path}: {n_damaged} lines are damaged; what they had is tried again.")
    return rows


def train_all(task: protocol.Task, losses: Sequence[str], settings: dict, folder: Path) -> None:
    """Try what is not tried yet, and save after each."""
    rows = _read(folder)
    keys = [
        (loss, setting, seed)
        for seed in map(int, settings[results.SPLITS])
        for loss in losses
        for setting in METHODS[loss].settings
    ]
    pending = [key for key in keys if (key[0], str(key[1]), key[2]) not in rows]
    environment = command.environment(task) if pending else {}
    done = len(keys) - len(pending)
    for loss, setting, seed in progress.bar(pending, "sweep", total=len(keys), initial=done, unit="run", leave=True):
        trained = protocol.train(task, splits.split(task.dataset, seed), seed, setting, f"{setting}, seed {seed}")
        command.check_weights(task, settings)
        rows[loss, str(setting), seed] = {
            "loss": loss,
            "setting": str(setting),
            "seed": str(seed),
            "validation_macro_f1": f"{trained.validation_f1:.6f}",
            "best_epoch": str(trained.epoch),
            **({results.DIVERGED: str(trained.diverged)} if trained.diverged else {}),
        }
        with endings.held():
            if environment:  # with the first result, as the experiment does
                results.record_settings(folder, settings, environment)
                environment = {}
            results.replace_file(folder / results.SWEEP, results.csv_text(list(rows.values())).encode())


def table(folder: Path, title: str) -> str:
    """A line for each setting: its score, and how often it was the best of its loss. Of losses that are all tried."""
    rows = _read(folder)
    seeds = sorted({seed for _, _, seed in rows})
    scores: dict[tuple[str, str], dict[int, float]] = {}
    diverged = {(loss, setting) for (loss, setting, _), row in rows.items() if row.get(results.DIVERGED)}
    for (loss, setting, seed), row in rows.items():
        if all((loss, str(candidate), s) in rows for candidate in METHODS[loss].settings for s in seeds):
            scores.setdefault((loss, setting), {})[seed] = float(row["validation_macro_f1"])
    chosen = choices(folder, [(loss, seed) for loss in {loss for loss, _ in scores} for seed in seeds])
    lines = []
    for (loss, setting), of_seeds in scores.items():
        n_chosen = sum(str(chosen[loss, seed]) == setting for seed in seeds)
        score = report.percent([of_seeds[seed] for seed in seeds])
        lines.append((loss, setting + report.MARK * ((loss, setting) in diverged), score, str(n_chosen)))
    caption = (
        f"{title}: macro-F1 on the validation part alone, of the epoch where it is best, {len(seeds)} seed(s), mean ± "
        "standard deviation; and for how many seeds the setting is the best of its loss. The best of many is ahead by "
        "chance, too."
    )
    if diverged & scores.keys():
        caption += f"{report.MARK}: a training diverged, and counts with its best epoch before that."
    return f"{caption}\n\n{report.markdown(('loss', 'setting', 'validation macro-F1 %', 'chosen'), lines)}"


def main() -> int:
    args = parse_arguments()
    folder = command.output_folder(args)
    with command.working_in(folder):
        dataset, model = command.load(args)
        losses = beforehand.check_losses(args.losses, TUNED, model.epochs)
        settings = command.settings(args, dataset, model)
        results.check_settings(folder, settings)
        task = command.make_task(args, dataset, model)
        train_all(task, losses, settings, folder)
        text = table(folder, f"{dataset.name}, {model.name}, {settings['split']} split")
        results.replace_file(folder / "sweep.md", text.encode())
        command.show(text)
    command.show(folder)
    return endings.DIVERGED if report.MARK in text else 0


if __name__ == "__main__":
    command.run(main)
