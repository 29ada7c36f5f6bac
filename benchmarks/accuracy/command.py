"""The command line that the experiment and the sweep share: arguments -> task, folder, settings."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.accuracy import data, models, protocol, results

RESULTS = measure.ROOT / "benchmarks" / "results" / "accuracy"
CACHE = measure.ROOT / "benchmarks" / "cache"  # of features; Git ignores it
SEEDS = 5
PACKAGES = ("captum", "efficientnet-lite-pytorch", "matplotlib", "numpy", "pillow", "scikit-learn", "scipy", "timm")
USER_ERRORS = (
    data.MissingData,
    data.MalformedData,
    models.MissingModel,
    protocol.SplitError,
    results.DifferentSettings,
)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that both commands have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=data.DATASETS)
    parser.add_argument("--model", required=True, choices=models.MODELS)
    parser.add_argument("--seeds", type=_positive, metavar="N", help=f"the seeds 0 to N - 1 (default: {SEEDS})")
    parser.add_argument("--epochs", type=_positive, help="default: the model's")
    parser.add_argument("--learning-rate", type=float, help="default: the model's")
    parser.add_argument("--data", type=Path, help="folder or file of the download")
    parser.add_argument("--weights", type=_file, help="file of pretrained weights (default: those of the package)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.relative_to(measure.ROOT)}/DATASET-MODEL")
    parser.add_argument("--quick", action="store_true", help="a trial: few images and epochs, in a temporary folder")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {path}")
    return path


def run(main: Callable[[], None]) -> None:
    """Call the command; what its user can put right is said without a traceback."""
    try:
        main()
    except USER_ERRORS as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def make_task(args: argparse.Namespace) -> protocol.Task:
    """Data and model of the command line, on a GPU where there is one."""
    protocol.set_up(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset, model = data.load(args.dataset, args.data), models.MODELS[args.model]
    if args.quick:
        dataset = protocol.shrink(dataset)
    if args.learning_rate is not None:
        model = replace(model, learning_rate=args.learning_rate)
    inputs = models.load_inputs(model, dataset, CACHE, args.weights, device)
    epochs = args.epochs or (protocol.QUICK_EPOCHS if args.quick else model.epochs)
    return protocol.Task(dataset, model, inputs, epochs, device, weights=args.weights)


def seeds(args: argparse.Namespace) -> list[int]:
    """The seeds of the command line."""
    return list(range(args.seeds or (protocol.QUICK_SEEDS if args.quick else SEEDS)))


def output_folder(args: argparse.Namespace) -> Path:
    """Where the results go: those of a quick trial never among the others, unless asked for."""
    if args.output:
        return args.output
    name = f"{args.dataset}-{args.model}"
    return Path(tempfile.mkdtemp(prefix=f"{name}-")) if args.quick else RESULTS / name


def settings(args: argparse.Namespace, task: protocol.Task) -> dict[str, object]:
    """What the results depend on besides code, versions and device."""
    return {
        "dataset": args.dataset,
        "images": len(task.dataset),
        "model": args.model,
        "weights": None if args.weights is None else args.weights.name,
        "image_size": task.model.image_size,
        "flips": task.model.flips,
        "seeds": seeds(args),
        "epochs": task.epochs,
        "learning_rate": task.model.learning_rate,
        "batch_size": protocol.BATCH_SIZE,
        "weight_decay": protocol.WEIGHT_DECAY,
        "step_share": protocol.STEP_SHARE,
        "step_factor": protocol.STEP_FACTOR,
        "drw_share": protocol.DRW_SHARE,
        "threads": args.threads,
        "quick": args.quick,
    }


def environment(device: torch.device) -> dict[str, object]:
    """Device, versions, commit and date of this session."""
    return measure.environment(device) | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
