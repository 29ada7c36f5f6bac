"""What a data set is, and how one that is not there, or not as it should be, is said to be so."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

NAMED = 5  # things in a sentence, of many
LISTED = 50  # lines below each other, of many
# What a table says of an image whose lesion or patient is not known: nothing, or what other programs make of that.
NO_GROUP = {"", "#n/a", "n/a", "nan", "none", "null"}


class MissingData(FileNotFoundError):
    """A file or package of a data set is not there; the message names it, the source and the licence."""


class MalformedData(ValueError):
    """A file of a data set is there, but not in its published layout, or cannot be read."""


class Origin(NamedTuple):
    """Where a data set can be had, and on which terms."""

    source: str
    licence: str

    def missing(self, what: object) -> MissingData:
        """The error for something of this data set that is not there."""
        return MissingData(f"missing: {what}\nsource: {self.source}\nlicence: {self.licence}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, read one at a time."""

    name: str
    class_names: tuple[str, ...]  # in label order
    labels: np.ndarray  # (N,) int64 in [0, C)
    read: Callable[[int], Image.Image]  # the i-th image, mode "L" or "RGB"
    source: str
    licence: str
    files: Sequence[Path] | None = None  # of the images, where each has its own
    groups: np.ndarray | None = None  # (N,) int64: images of one lesion or patient must share a part of the split
    groups_given: bool | None = None  # whether the user said what belongs together; None: it is for the data to say
    is_test: np.ndarray | None = None  # (N,) bool: an official test set, kept whole
    long_tail: tuple[int, ...] | None = None  # training + validation images to draw of each class
    notices: tuple[str, ...] = ()  # what its user should know: how it was understood, what was left out

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        return len(self.class_names)


def group_numbers(keys: Iterable[str]) -> np.ndarray:
    """Equal numbers for equal keys, ``(N,)`` int64, counted in order of appearance. An empty key is its own group."""
    return numbered(i if key.strip().casefold() in NO_GROUP else key for i, key in enumerate(keys))


def numbered(keys: Iterable[Hashable]) -> np.ndarray:
    """Equal numbers for equal keys, ``(N,)`` int64, counted in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def named(things: Iterable[object], shown: int = NAMED) -> str:
    """In a sentence; of many the first, and how many there are besides."""
    words = [str(thing) for thing in things]
    more = f" and {len(words) - shown:,} more" if len(words) > shown else ""
    return ", ".join(words[:shown]) + more


def listed(things: Iterable[object], shown: int = LISTED) -> str:
    """Below each other; of many the first, and how many there are besides."""
    lines = [f"  {thing}" for thing in things]
    more = [f"  and {len(lines) - shown:,} more"] if len(lines) > shown else []
    return "\n".join(lines[:shown] + more)


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural but for 1."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"1 {noun}" if number == 1 else f"{number:,} {plural}"
