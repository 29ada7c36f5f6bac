"""What can be known before an image is read: every fault is found here, said in one message, and nothing is written.

Splits are tried before an image is read too, those of all seeds; see ``command.settings``.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from pickle import UnpicklingError

import torch

from benchmarks.accuracy import methods, progress
from benchmarks.accuracy.data import Dataset
from benchmarks.accuracy.models import MissingModel, Model

LONGEST_REASON = 300  # letters of another library's message: that of PyTorch may list hundreds of tensors
PACKAGED = ("digits",)  # data sets that come with a package and have no download


class Refused(ValueError):
    """The command cannot do what is asked; the message says why."""


def check_arguments(args: argparse.Namespace, model: Model) -> None:
    """Whether the arguments have the effect that they ask for.

    Raises:
        Refused: one would have none.
    """
    if args.weights is not None and not model.takes_weights:
        raise Refused(f"--weights {args.weights}: {model.name} is trained from scratch and takes no weights.")
    if args.groups is not None and args.dataset != "folder":
        raise Refused(
            f"--groups {args.groups} is for --dataset folder: {args.dataset} says by itself what belongs together, or "
            "nothing does."
        )
    if args.groups is not None and args.split == "random":
        raise Refused(f"--groups {args.groups} has no effect with --split random, which deals each image by itself.")
    if args.data is not None and args.dataset in PACKAGED:
        raise Refused(f"--data {args.data}: the data set {args.dataset} comes with its package and takes no folder.")


def check_output(folder: Path, args: argparse.Namespace) -> None:
    """Whether results in this folder would be taken for images by the next command.

    Raises:
        Refused: they lie where a folder is a class.
    """
    if args.dataset == "folder" and args.data is not None:
        data = args.data.resolve()
        if folder.resolve() == data or data in folder.resolve().parents:
            raise Refused(
                f"The results would lie in {folder}, among the images of --data {args.data}: give an --output."
            )


def check_losses(asked: Sequence[str] | None, default: Sequence[str], epochs: int) -> list[str]:
    """The losses to train, each once: of the default ones those whose second stage so few epochs reach.

    Raises:
        Refused: one that was asked for is never trained in full.
    """
    losses = list(dict.fromkeys(asked or default))
    short = [loss for loss in losses if not _is_reached(loss, epochs)]
    if not short:
        return losses
    enough = next(n for n in count(epochs) if all(_is_reached(loss, n) for loss in short))
    text = (
        f"{', '.join(short)}: with {epochs} epoch{'s' * (epochs != 1)} the re-weighting never sets in; at least "
        f"--epochs {enough} are needed."
    )
    if asked:
        raise Refused(text)
    progress.say(f"Left out are {text}")
    return [loss for loss in losses if loss not in short]


def _is_reached(loss: str, epochs: int) -> bool:
    return all(setting.is_reached_in(epochs) for setting in methods.METHODS[loss].settings)


def check_classes(dataset: Dataset) -> Dataset:
    """The data, with the names of its classes as letters, whatever the locale.

    Raises:
        Refused: a name is not UTF-8, so that no file could have it.
    """
    names = []
    for name in dataset.class_names:
        try:
            name.encode()
        except UnicodeEncodeError:  # bytes of a folder's name that the locale does not know
            try:
                name = os.fsencode(name).decode()
            except UnicodeError:
                raise Refused(
                    f"{dataset.name}: the name of the class {name!a} is not UTF-8. Rename its folder."
                ) from None
        names.append(name)
    return replace(dataset, class_names=tuple(names))


def check_model(model: Model, weights: Path | None) -> None:
    """Whether the network can be made, with these weights, and reads images of its size.

    Raises:
        MissingModel: its package or its weights are not there.
        Refused: the weights are of something else, or the size does not fit.
    """
    with torch.random.fork_rng(devices=()):
        try:
            encoder = model.make_encoder(weights).eval()
        except MissingModel:
            raise
        except Exception as error:  # whatever a package, a download or a file of anything at all brings about
            if not model.takes_weights:
                raise
            fault = (
                f"{weights} does not hold the weights of {model.name}" if weights else f"{model.name} cannot be made"
            )
            raise Refused(f"{fault}: {_reason(error)}") from error
        size = model.image_size
        try:
            blank = torch.zeros(1, 3 if model.image_mode == "RGB" else 1, size, size, dtype=torch.uint8)
            with torch.no_grad():
                fits = encoder(blank).shape[1] == encoder.n_features
            reason = "leave out --image-size"
        except RuntimeError as error:
            fits, reason = False, _reason(error)
    if not fits:
        raise Refused(f"{model.name} takes no images of {size} x {size} pixels: {reason}.")


def _reason(error: Exception) -> str:
    """The beginning of what another library says, in one line. Of a foreign file PyTorch advises to trust it."""
    text = " ".join(str(error).split())
    if isinstance(error, UnpicklingError) or not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text[:LONGEST_REASON]}{'…' * (len(text) > LONGEST_REASON)}"
