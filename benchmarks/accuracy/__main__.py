"""The paper's experiment: train with each loss on equal terms, and write tables, pictures and every prediction.

``python -m benchmarks.accuracy --dataset fashion-mnist-lt --model cnn`` writes
``benchmarks/results/accuracy/fashion-mnist-lt-cnn/``. Interrupted, the same command goes on where it stopped; with
other images, labels, weights or settings it is refused, and so is a second one on the same folder.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from tqdm import tqdm

from benchmarks.accuracy import command, models, protocol, report, results

GRAD_CAM_SEED = 0


def parse_arguments() -> argparse.Namespace:
    parser = command.make_parser(__doc__)
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=protocol.LOSSES,
        default=protocol.DEFAULT_LOSSES,
        metavar="LOSS",
        help=f"of {', '.join(protocol.LOSSES)} (default: {' '.join(protocol.DEFAULT_LOSSES)})",
    )
    return parser.parse_args()


def train_all(task: protocol.Task, settings: dict, folder: Path) -> None:
    """Train what is not finished yet, and save after each."""
    losses, names = settings["losses"], task.dataset.class_names
    keys = [(loss, seed) for seed in settings["seeds"] for loss in losses]
    # Of the seed that is explained, a run without its map is not finished: its network is gone.
    lost = {(loss, GRAD_CAM_SEED) for loss in losses if loss not in report.read_grad_cams(folder)}
    runs = {run.key: run for run in results.read_runs(folder, names) if run.key not in lost}
    pending = [key for key in keys if key not in runs]
    if pending:
        results.record_settings(folder, settings, command.environment(task))
    for loss, seed in tqdm(pending, "losses x seeds", total=len(keys), initial=len(runs), unit="run"):
        runs[loss, seed] = train_one(task, loss, seed, folder)
        command.check_weights(task, settings)
        results.write_runs(folder, [runs[key] for key in keys if key in runs], names)


def train_one(task: protocol.Task, loss: str, seed: int, folder: Path) -> results.Run:
    """Train with one loss and seed, and look at the test part once."""
    start = time.perf_counter()
    split = protocol.split(task.dataset, seed)
    counts = protocol.class_counts(task.dataset, split.train)
    criterion = protocol.make_criterion(loss, counts, **task.loss_options(counts))
    schedule = protocol.make_schedule(loss, criterion, counts, task.epochs)
    network, checkpoint = protocol.train(task, split, seed, criterion, schedule, f"{loss}, seed {seed}")
    if seed == GRAD_CAM_SEED:
        report.add_grad_cam(folder, loss, explain(task, split, network))
    return results.Run(
        loss=loss,
        seed=seed,
        indices=split.test,
        labels=task.dataset.labels[split.test],
        predicted=protocol.predict(network, task, split.test),
        best_epoch=checkpoint.epoch,
        validation_f1=checkpoint.validation_f1,
        seconds=time.perf_counter() - start,
    )


def rarest_test_image(task: protocol.Task, split: protocol.Split) -> int:
    """The first test image of the rarest class: chosen without a look at any prediction."""
    counts = protocol.class_counts(task.dataset, split.train)
    return int(split.test[task.dataset.labels[split.test] == counts.index(min(counts))][0])


def explain(task: protocol.Task, split: protocol.Split, network: nn.Module) -> dict[str, list]:
    """Grad-CAM of one test image."""
    index = rarest_test_image(task, split)
    whole = task.model.on_images(network, task.weights).to(task.device)
    return report.grad_cam(whole, models.read_image(task.model, task.dataset, index), int(task.dataset.labels[index]))


def write_report(task: protocol.Task, settings: dict, folder: Path) -> str:
    """Tables and pictures of what the folder holds; returns the tables."""
    dataset = task.dataset
    splits = [protocol.split(dataset, seed) for seed in settings["seeds"]]
    found = report.Results(
        title=task.title,
        class_names=dataset.class_names,
        training_counts=tuple(tuple(protocol.class_counts(dataset, split.train)) for split in splits),
        runs=tuple(results.read_runs(folder, dataset.class_names)),
        note=test_note(dataset.is_test is not None, [len(split.test) for split in splits]),
    )
    tables = {"table1.md": report.table_1(found), "table2.md": report.table_2(found)}
    for name, table in tables.items():
        results.replace_file(folder / name, table.encode())
    report.plot_rarest(found, folder / "rarest_classes.png")
    report.plot_confusion(found, folder / "confusion.png")
    index, maps = rarest_test_image(task, splits[GRAD_CAM_SEED]), report.read_grad_cams(folder)
    report.plot_grad_cams(
        models.read_image(task.model, dataset, index),
        int(dataset.labels[index]),
        dataset.class_names,
        {loss: maps[loss] for loss in settings["losses"]},
        f"number {index} of {dataset.name}, {dataset.source}, {dataset.licence}",
        folder / "gradcam.png",
    )
    return "\n".join(tables.values())


def test_note(is_official: bool, sizes: Sequence[int]) -> str:
    """A sentence on the test images of the seeds."""
    if is_official:
        return f"The same {sizes[0]} test images for every seed."
    return (
        f"Every seed has its own split, with about {round(sum(sizes) / len(sizes))} test images; those of two overlap."
    )


def main() -> None:
    args = parse_arguments()
    folder = command.output_folder(args)
    with results.claim(folder):
        dataset, model = command.load(args)
        settings = command.settings(args, dataset, model)
        settings |= {"losses": list(dict.fromkeys(args.losses)), "seeds": command.seeds(args)}
        results.check_settings(folder, settings)
        task = command.make_task(args, dataset, model)
        train_all(task, settings, folder)
        print(write_report(task, settings, folder))
    print(folder)


if __name__ == "__main__":
    command.run(main)
