"""What a result depends on, in short digests: they tell other images, labels, groups or weights from the same ones.

Every command reads and hashes all images, so that nothing about a file is trusted, neither its size nor its time:
10,000 files of 270 KB take 2 s where the system has them in memory, and 7 s from disk (AMD EPYC, one thread).
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy import images, progress
from benchmarks.accuracy.dataset import Dataset, MalformedData

LENGTH = 16  # hexadecimal digits


def digest(pieces: Iterable[bytes]) -> str:
    """Of these pieces in this order: a hash of their hashes, which moves no byte from one piece to the next unseen."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(hashlib.sha256(piece).digest())
    return total.hexdigest()[:LENGTH]


def of_data(dataset: Dataset) -> dict[str, str | None]:
    """A digest of each thing that a data set consists of; ``None`` for what it does not have."""
    return {
        "image names": None if dataset.files is None else digest(os.fsencode(path.name) for path in dataset.files),
        "image contents": of_images(dataset),
        "labels": of_numbers(dataset.labels),
        "class names": digest(name.encode(errors="surrogateescape") for name in dataset.class_names),
        "groups": of_numbers(dataset.groups),
        "test set": of_numbers(dataset.is_test),
        "long tail": of_numbers(dataset.long_tail),
    }


@lru_cache(maxsize=1)  # both the settings and the cache of features ask for it
def of_images(dataset: Dataset) -> str:
    """Of the contents of all images, in their order, whatever their names.

    Raises:
        MalformedData: some files cannot be read. The message lists them, and those that are damaged otherwise.
    """
    try:
        return digest(_content(dataset, i) for i in progress.bar(range(len(dataset)), "hashes of images"))
    except OSError as error:
        images.check(dataset.files or ())
        raise MalformedData(f"{error.filename}: {error.strerror}") from error


def _content(dataset: Dataset, index: int) -> bytes:
    if dataset.files is not None:
        return dataset.files[index].read_bytes()
    image = dataset.read(index)
    return f"{image.mode} {image.size} ".encode() + image.tobytes()


def of_numbers(numbers: Sequence[int] | np.ndarray | None) -> str | None:
    """Of whole numbers or truth values, whatever their type."""
    return None if numbers is None else digest([np.asarray(numbers, np.int64).tobytes()])


def of_weights(network: nn.Module) -> str:
    """Of all weights and buffers as loaded, whatever file or package they came from."""
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    return digest(
        piece
        for name, tensor in tensors.items()
        for piece in (
            f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(),
            tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    )
