"""The command line that the experiment and the sweep share: arguments -> task, folder, settings."""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from benchmarks.accuracy import (
    beforehand,
    data,
    endings,
    fingerprint,
    images,
    layout,
    methods,
    models,
    progress,
    protocol,
    results,
    splits,
)
from benchmarks.accuracy.dataset import named
from benchmarks.accuracy.wording import in_one_line

RESULTS = measure.ROOT / "benchmarks" / "results" / "accuracy"
CACHE = measure.ROOT / "benchmarks" / "cache"  # of features; Git ignores it
SEEDS = 10
MODEL = "efficientnet-lite0-frozen"  # the quickest that is worth something on photographs
SPLITS = ("grouped", "random")
CLASSES_NAMED = 10  # in the first line of a command
PACKAGES = ("captum", "efficientnet-lite-pytorch", "matplotlib", "numpy", "pillow", "scikit-learn", "scipy", "timm")
USER_ERRORS = (
    data.MissingData,
    data.MalformedData,
    models.MissingModel,
    beforehand.Refused,
    splits.SplitError,
    results.DifferentSettings,
    results.FolderInUse,
    results.CannotWrite,
    methods.NotTuned,
)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that both commands have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=data.DATASETS)
    parser.add_argument("--model", default=MODEL, choices=models.MODELS, help=f"default: {MODEL}")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default=SPLITS[0],
        help="grouped (the default): images of one lesion or patient, where the data say so, are in one part; random: "
        "each image by itself",
    )
    parser.add_argument("--seeds", type=_positive, metavar="N", help=f"the seeds 0 to N - 1 (default: {SEEDS})")
    parser.add_argument("--epochs", type=_positive, help="default: the model's")
    parser.add_argument("--learning-rate", type=_positive_number, help="default: the model's")
    parser.add_argument("--decay", choices=models.DECAYS, help="how the learning rate falls (default: the model's)")
    parser.add_argument("--image-size", type=_positive, help="height and width in pixels (default: the model's)")
    parser.add_argument(
        "--logit-adjustment",
        type=_not_negative,
        default=0.0,
        metavar="TAU",
        help="add TAU times the log prior of the training part to the logits, in training only (default: 0, none)",
    )
    parser.add_argument(
        "--label-smoothing", type=_share, default=0.0, metavar="EPS", help="of every loss, 0 to 1 (default: 0)"
    )
    parser.add_argument(
        "--data",
        type=_path,
        help=f"folder or file of the download; of --dataset folder, your own images. {layout.LAYOUTS}",
    )
    parser.add_argument(
        "--groups",
        type=_file,
        metavar="TABLE",
        help="of --dataset folder: a table (.csv or .xlsx) of two columns, the file name of an image (or its path in "
        "the folder) and its patient. All images of a patient (or of a lesion, or of what was photographed twice) are "
        "then in one part of each split: a network that was trained on some knows the others, and would seem better "
        "than it is. An image without a patient is alone (default: groups.csv in the folder, if there is one)",
    )
    parser.add_argument("--weights", type=_file, help="file of pretrained weights (default: those of the package)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--output",
        type=_path,
        help="folder of tables, pictures, predictions and settings, which name no image; gradcam.png shows one, and "
        f"Git is told to ignore it (default: {RESULTS.relative_to(measure.ROOT)}/DATASET-MODEL)",
    )
    parser.add_argument("--quick", action="store_true", help="a trial: few images and epochs, in a temporary folder")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, if each of its arguments has the effect that it asks for.

    Raises:
        Refused: one would have none.
    """
    args = parser.parse_args()
    beforehand.check_arguments(args, models.MODELS[args.model])
    return args


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _not_negative(text: str) -> float:
    number = _number(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"must be finite and at least 0, got {text}")
    return number


def _positive_number(text: str) -> float:
    number = _not_negative(text)
    if not number:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return number


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")  # as of a shell's variable that is not set
    return Path(text)


def _file(text: str) -> Path:
    path = _path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {path.absolute()}")
    return path


def run(main: Callable[[], int | None]) -> None:
    """Call the command; what its user can put right is said without a traceback."""
    endings.run(main, USER_ERRORS)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Keep other commands out of the folder of results. Whoever interrupts this one is told how to go on."""
    try:
        with results.claim(folder):
            yield
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, endings.Interrupted) else endings.SIGNALS[0]
        kept = (
            f"Interrupted. What was finished is in {folder}; the same command, with this --output, goes on from there."
            if results.has_results(folder)
            else "Interrupted before anything was finished; the same command begins anew."
        )
        raise endings.Interrupted(number, kept) from None


def show(text: object) -> None:
    """Print what was found; it is in files already.

    Raises:
        CannotWrite: standard output takes nothing, as on a disk that is full.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise results.CannotWrite(f"Standard output cannot be written: {error.strerror or error}") from error


def load(args: argparse.Namespace) -> tuple[data.Dataset, models.Model]:
    """Data and model as the command line wants them."""
    model = models.MODELS[args.model]
    if args.quick:
        model = replace(model, epochs=protocol.QUICK_EPOCHS)
    options = {name: getattr(args, name) for name in ("epochs", "learning_rate", "decay", "image_size")}
    model = replace(model, **{name: value for name, value in options.items() if value is not None})
    beforehand.check_model(model, args.weights)
    dataset = beforehand.check_classes(data.load(args.dataset, args.data, args.groups))
    of_classes = zip(dataset.class_names, splits.class_counts(dataset, np.arange(len(dataset))), strict=True)
    progress.say(
        f"{dataset.name}: {len(dataset):,} images in {dataset.n_classes} classes: "
        f"{named((f'{in_one_line(name)} {n:,}' for name, n in of_classes), CLASSES_NAMED)}."
    )
    for notice in dataset.notices:
        progress.say(notice)
    if args.split == "random":
        if dataset.groups_given:
            progress.say("Note: with --split random these groups are not used.")
        dataset = protocol.by_image(dataset)
    if args.quick:
        dataset = protocol.shrink(dataset)
    return dataset, model


def make_task(args: argparse.Namespace, dataset: data.Dataset, model: models.Model) -> protocol.Task:
    """What is trained, on a GPU where there is one."""
    protocol.set_up(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = models.load_inputs(model, dataset, CACHE, args.weights, device)
    return protocol.Task(
        dataset,
        model,
        inputs,
        model.epochs,
        device,
        weights=args.weights,
        logit_adjustment=args.logit_adjustment,
        label_smoothing=args.label_smoothing,
    )


def seeds(args: argparse.Namespace) -> list[int]:
    """The seeds of the command line."""
    return list(range(args.seeds or (protocol.QUICK_SEEDS if args.quick else SEEDS)))


def output_folder(args: argparse.Namespace) -> Path:
    """Where the results go: those of a quick trial never among the others, unless asked for."""
    name = f"{args.dataset}-{args.model}" + ("-random" if args.split == "random" else "")
    folder = args.output or (Path(tempfile.gettempdir()) if args.quick else RESULTS) / name
    beforehand.check_output(folder, args)
    return Path(tempfile.mkdtemp(prefix=f"{name}-")) if args.quick and not args.output else folder


def settings(args: argparse.Namespace, dataset: data.Dataset, model: models.Model) -> dict[str, object]:
    """What the results depend on besides code, versions and device; data, weights and splits as digests.

    Raises:
        SplitError: the data cannot be split with one of the seeds; no image has been read then.
    """
    dealt = {seed: splits.split(dataset, seed) for seed in progress.bar(seeds(args), "splits", unit="seed")}
    return {
        "dataset": args.dataset,
        "images": len(dataset),
        "model": args.model,
        "split": SPLITS[dataset.groups is None or dataset.groups_given is False],
        **_own_images(dataset),
        "trained": model.trained,
        "image_size": model.image_size,
        "image_mode": model.image_mode,
        "flips": model.flips,
        "epochs": model.epochs,
        "learning_rate": model.learning_rate,
        "batch_size": model.batch_size,
        "weight_decay": model.weight_decay,
        "decay": model.decay,
        "step_share": models.STEP_SHARE,
        "step_factor": models.STEP_FACTOR,
        "drw_share": methods.DRW_SHARE,
        "shares": list(splits.SHARES),
        "fold_percent": splits.FOLD_PERCENT,
        **{name: value for name in ("logit_adjustment", "label_smoothing") if (value := getattr(args, name))},
        "threads": args.threads,
        "quick": args.quick,
        results.DESCRIPTIONS: _descriptions(dataset.n_classes),
        results.DATA: fingerprint.of_data(dataset) | {results.WEIGHTS: model.weights_digest(args.weights)},
        results.SPLITS: {str(seed): split_digest(split) for seed, split in dealt.items()},
        results.CLASS_NAMES: list(dataset.class_names),
        results.CLASS_COUNTS: {str(seed): _part_counts(dataset, split) for seed, split in dealt.items()},
    }


def _own_images(dataset: data.Dataset) -> dict[str, object]:
    """Settings of a user's own images alone, which nobody else has: whether they are grouped, and how they are read."""
    if dataset.groups_given is None:
        return {}
    used = results.GIVEN if dataset.groups is not None else results.NOT_USED
    return {results.GROUPS: used if dataset.groups_given else results.NOT_GIVEN, "reading": images.READING}


def _descriptions(n_classes: int) -> dict[str, str]:
    return {name: _description(method, n_classes) for name, method in methods.METHODS.items()}


def _description(method: methods.Method, n_classes: int) -> str:
    """What a loss is: in words, and a digest of its settings and of the tensors that it makes of unequal counts."""
    counts = [10 * (i + 1) for i in range(n_classes)]
    pieces = [str(method.posthoc_taus)]
    for setting in method.settings:
        criterion = setting.make_criterion(counts, {})
        pieces += [str(setting), repr(criterion), *(str(buffer.tolist()) for buffer in criterion.buffers())]
    return f"{method.code} ({fingerprint.digest(piece.encode() for piece in pieces)})"


def _part_counts(dataset: data.Dataset, split: splits.Split) -> dict[str, list[int]]:
    return {name: splits.class_counts(dataset, indices) for name, indices in split._asdict().items()}


def split_digest(split: splits.Split) -> str:
    """Of the three parts: the same data and seed give others in another version of scikit-learn."""
    return fingerprint.digest(indices.astype(np.int64).tobytes() for indices in split)


def check_weights(task: protocol.Task, settings: dict[str, object]) -> None:
    """Whether the weights are still those of the settings: they are read again for every network.

    Raises:
        DifferentSettings: they are not.
    """
    if task.model.weights_digest(task.weights) != settings[results.DATA][results.WEIGHTS]:
        raise results.DifferentSettings(
            f"{task.weights or 'the pretrained weights'} changed during the training; what was trained last is "
            "not kept. Start again with the former weights, or with another --output."
        )


def environment(task: protocol.Task) -> dict[str, object]:
    """Device, versions, commit, date and the name of the file of weights of this session."""
    weights = {"weights": None if task.weights is None else task.weights.name}
    return measure.environment(task.device) | weights | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
