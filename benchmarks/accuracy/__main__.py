"""Which loss to train with: each on equal terms; tables, pictures, every prediction, and a recommendation at the end.

``python -m benchmarks.accuracy --dataset folder --data PATH`` compares the losses on your own images, which lie as
``CLASS/image.jpg`` or as ``--data`` says below, and writes
``benchmarks/results/accuracy/folder-efficientnet-lite0-frozen/``; docs/own-images.md says what. Interrupted, the same
command goes on where it stopped; with other images, labels, weights or settings it is refused, and so is a second one
on the same folder. What cannot be done is said before an image is read. Exit status: 0; 2 where the message says what
to put right; 3 where a training diverged; 130 after Ctrl-C.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from benchmarks.accuracy import (
    beforehand,
    command,
    compare,
    endings,
    models,
    progress,
    protocol,
    report,
    results,
    splits,
    sweep,
)
from benchmarks.accuracy.methods import DEFAULT, METHODS, Method, Setting
from lmf_triton import log_prior_adjustment

GRAD_CAM_SEED = 0
EXPLAINED = "gradcam.png"  # shows an image
SAVING_SHARE = 10  # so many times as long as saving takes is trained before the next: all predictions are written anew


def parse_arguments() -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=METHODS,
        metavar="LOSS",
        help=f"of {', '.join(METHODS)} (default: all but {', '.join(sweep.TUNED)}, which "
        "benchmarks.accuracy.sweep has to tune first)",
    )
    return command.parse(parser)


@dataclass
class Saver:
    """Writes runs to their folder, and with the first one what they depend on.

    So a start that fails leaves nothing that refuses the next.
    """

    folder: Path
    settings: dict
    environment: dict
    class_names: Sequence[str]
    n_saved: int  # runs that the folder has
    recorded: bool = False

    def save(self, runs: Sequence[results.Run]) -> float:
        """Returns the seconds that it took. A signal waits until all is written."""
        start, n_new = time.monotonic(), len(runs) - self.n_saved
        try:
            with endings.held():
                if not self.recorded:
                    results.record_settings(self.folder, self.settings, self.environment)
                    self.recorded = True
                results.write_runs(self.folder, runs, self.class_names)
                self.n_saved = len(runs)
        except results.CannotWrite as error:
            raise results.CannotWrite(
                f"{error}. What was trained last, {n_new} run{'s' * (n_new != 1)}, is lost; all before is saved, and "
                "the same command goes on from there."
            ) from error
        return time.monotonic() - start


def train_all(task: protocol.Task, settings: dict, folder: Path) -> None:
    """Train what is not finished yet, and save after each, or as often as saving takes little of the time."""
    losses, names = settings["losses"], task.dataset.class_names
    keys = [(loss, seed) for seed in settings["seeds"] for loss in losses]
    # Of the seed that is explained, a run without its map is not finished: its network is gone.
    maps = report.read_grad_cams(folder)
    lost = {(loss, GRAD_CAM_SEED) for loss in losses if loss not in maps}
    runs = {run.key: run for run in results.read_runs(folder, names) if run.key not in lost}
    pending = [key for key in keys if key not in runs]
    chosen = sweep.choices(folder, pending)
    trainings: dict[tuple[int, Setting], list[str]] = {}  # losses that differ only in what follows the training
    for loss, seed in pending:
        trainings.setdefault((seed, chosen[loss, seed]), []).append(loss)
    saver = Saver(folder, settings, command.environment(task) if pending else {}, names, len(runs))
    saved_at, cost = time.monotonic(), 0.0
    try:
        for seed, setting in progress.bar(trainings, "losses x seeds", unit="training", leave=True):
            finished = train_one(task, setting, trainings[seed, setting], seed, folder)
            command.check_weights(task, settings)
            runs |= {run.key: run for run in finished}
            if time.monotonic() - saved_at > SAVING_SHARE * cost:
                cost, saved_at = saver.save([runs[key] for key in keys if key in runs]), time.monotonic()
    finally:
        if len(runs) > saver.n_saved:
            saver.save([runs[key] for key in keys if key in runs])


def train_one(
    task: protocol.Task, setting: Setting, losses: Sequence[str], seed: int, folder: Path
) -> list[results.Run]:
    """Train with one setting and seed, and look at the test part once for each of the losses that have it."""
    start = time.perf_counter()
    split = splits.split(task.dataset, seed)
    trained = protocol.train(task, split, seed, setting, f"{losses[0]}, seed {seed}")
    log_prior = log_prior_adjustment(splits.class_counts(task.dataset, split.train))
    logits = protocol.predict_logits(trained.network, task, split.test)
    runs = []
    for loss in losses:
        method = METHODS[loss]
        decision = protocol.decide(task, split, trained, method)
        if seed == GRAD_CAM_SEED:
            report.add_grad_cam(folder, loss, explain(task, split, trained.network, decision.tau * log_prior))
        confidence, predicted = (logits - decision.tau * log_prior).double().softmax(1).max(1)
        runs.append(
            results.Run(
                loss=loss,
                seed=seed,
                indices=split.test,
                labels=task.dataset.labels[split.test],
                predicted=predicted.numpy(),
                confidence=np.round(confidence.numpy(), results.CONFIDENCE_DECIMALS),
                choice=_choice(method, setting, decision),
                best_epoch=trained.epoch,
                validation_f1=decision.validation_f1,
                seconds=time.perf_counter() - start,
                diverged=trained.diverged,
            )
        )
    return runs


def _choice(method: Method, setting: Setting, decision: protocol.Decision) -> str:
    if method.is_tuned:
        return str(setting)
    return f"tau {decision.tau:g}" if len(method.posthoc_taus) > 1 else ""


def rarest_test_image(task: protocol.Task, split: splits.Split) -> int:
    """The first test image of the rarest class: chosen without a look at any prediction."""
    counts = splits.class_counts(task.dataset, split.train)
    return int(split.test[task.dataset.labels[split.test] == counts.index(min(counts))][0])


def explain(task: protocol.Task, split: splits.Split, network: nn.Module, taken_off: Tensor) -> dict[str, list]:
    """Grad-CAM of one test image, of the logits less what is taken off them."""
    index = rarest_test_image(task, split)
    whole = nn.Sequential(*task.model.on_images(network, task.weights), models.Shift(-taken_off)).to(task.device)
    return report.grad_cam(whole, models.read_image(task.model, task.dataset, index), int(task.dataset.labels[index]))


def write_tables(found: compare.Results, folder: Path) -> str:
    """Tables and recommendation, one after the other."""
    written = report.tables(found)
    for name, text in written.items():
        results.replace_file(folder / name, text.encode())
    return "\n".join(written.values())


def draw_pictures(found: compare.Results, task: protocol.Task, settings: dict, folder: Path) -> None:
    """Those of numbers, and the one that shows an image: Git is kept from it first."""
    report.plot_rarest(found, folder / "rarest_classes.png")
    if found.compared:
        report.plot_differences({f"{found.title}, {found.n_seeds} seeds": found}, folder / "differences.png")
    report.plot_confusion(found, folder / "confusion.png")
    dataset, maps = task.dataset, report.read_grad_cams(folder)
    index = rarest_test_image(task, splits.split(dataset, GRAD_CAM_SEED))
    results.keep_from_git(folder, EXPLAINED)
    report.plot_grad_cams(
        models.read_image(task.model, dataset, index),
        int(dataset.labels[index]),
        dataset.class_names,
        {loss: maps[loss] for loss in settings["losses"]},
        f"number {index} of {dataset.name}, {dataset.source}, {dataset.licence}",
        folder / EXPLAINED,
    )


def main() -> int:
    args = parse_arguments()
    folder = command.output_folder(args)
    with command.working_in(folder):
        dataset, model = command.load(args)
        losses = beforehand.check_losses(args.losses, DEFAULT, model.epochs)
        # Another loss is trained with all seeds that the folder has, so all their splits are compared with its own.
        args.seeds = max(len(command.seeds(args)), results.n_former_seeds(folder))
        extent = {"losses": losses, "seeds": command.seeds(args)}
        extent = results.with_former_losses(folder, extent)
        sweep.choices(folder, [(loss, seed) for loss in extent["losses"] for seed in extent["seeds"]])
        settings = command.settings(args, dataset, model) | extent
        results.check_settings(folder, settings)
        task = command.make_task(args, dataset, model)
        train_all(task, settings, folder)
        found = compare.read(folder)
        text = write_tables(found, folder)
        try:
            with report.missing_letters_said_once():
                draw_pictures(found, task, settings, folder)
        finally:  # the tables are what was waited for
            command.show(text)
    command.show(folder)
    return endings.DIVERGED if found.diverged else 0


if __name__ == "__main__":
    command.run(main)
