"""How people lay out a folder of images: which folders are classes, and what was found where none can be told."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.accuracy.dataset import MalformedData, MissingData, Origin, counted, named
from benchmarks.accuracy.images import IMAGE_SUFFIXES, is_image, is_junk

FOLDER = Origin("your own images, one folder a class", "yours")
# In lower case: folders that someone has dealt the images into, whose own folders are the classes.
PARTS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
LAYOUTS = (
    "Layouts that are taken: CLASS/image.jpg; CLASS/any/folders/image.jpg; train|val|test/CLASS/image.jpg, which are "
    "put together, since each seed makes its own split; and any of these within one more folder."
)
SUFFIXES = f"Images are files with the suffix {', '.join(sorted(IMAGE_SUFFIXES))}."
# What lies beside images and is left out without a word.
DOCUMENTS = frozenset(
    (".csv", ".htm", ".html", ".ini", ".json", ".log", ".md", ".pdf", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml")
)


@dataclass
class Place:
    """What is in a folder, but for what no person has put there."""

    path: Path
    images: list[Path] = field(default_factory=list)  # what has the suffix of one
    others: list[Path] = field(default_factory=list)  # other files
    folders: list["Place"] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_part(self) -> bool:
        return self.name.casefold() in PARTS

    def all_images(self) -> list[Path]:
        """Of its folders too."""
        return self.images + [path for folder in self.folders for path in folder.all_images()]

    def all_others(self) -> list[Path]:
        return self.others + [path for folder in self.folders for path in folder.all_others()]

    def filled(self) -> list["Place"]:
        """Its folders in which, at any depth, there are images."""
        return [folder for folder in self.folders if folder.all_images()]


def scan(data: Path | None) -> Place:
    """All that is in the user's folder.

    Raises:
        MissingData: there is no folder, or nothing is in it.
        MalformedData: a folder cannot be read, or is there twice by a link.
    """
    if data is not None and data.is_file():
        raise _missing(f"{data} is a file, not a folder: an archive must be unpacked\n{LAYOUTS}")
    if data is None or not data.is_dir():
        raise _missing(f"{data or '--data'}, a folder with class/image.jpg\n{LAYOUTS}")
    root = _scan(data, (), {})
    if not root.images and not root.folders:
        raise _missing(f"{data / 'class'}, a folder with the images of a class\n{data} {_holds(root)}\n{LAYOUTS}")
    return root


def _scan(folder: Path, above: tuple[str, ...], seen: dict[str, Path]) -> Place:
    """Links to folders are followed, but none may lead to one that is here already: it would give images twice."""
    real = os.path.realpath(folder)
    seen[real] = folder
    place = Place(folder)
    try:
        entries = sorted(path for path in folder.iterdir() if not is_junk(path))
    except OSError as error:
        raise MalformedData(f"{folder}: this folder cannot be read: {error.strerror}") from error
    for path in entries:
        if is_image(path):
            place.images.append(path)  # a folder of such a name too, which is then named as damaged
        elif not path.is_dir():
            place.others.append(path)
        elif (target := os.path.realpath(path)) in (*above, real):
            raise MalformedData(f"{path} leads back to {target}, in which it lies itself: by a link. Remove that link.")
        elif target in seen:
            raise MalformedData(f"{path} and {seen[target]} are the same folder, one by a link. Remove one of them.")
        else:
            place.folders.append(_scan(path, (*above, real), seen))
    return place


def find_classes(root: Place) -> tuple[dict[str, list[Path]], list[str]]:
    """The images of each class, both in alphabetical order, and what its user should know of how they were found.

    Raises:
        MissingData: a class has no images.
        MalformedData: the layout is not one that is taken, or it can be read in two ways.
    """
    top, notices = _within_outer(root)
    _check_no_loose_images(root, top)
    parts = _parts(root, top)
    if parts:
        sizes = ", ".join(f"{part.name} ({len(part.all_images()):,})" for part in parts)
        notices.append(f"Note: the images of {sizes} are put together, since each seed makes its own split.")
    elif not top.is_part:
        _check_outer_folders_are_classes(root, top)
    folders = [folder for part in parts for folder in part.folders] if parts else top.folders
    classes: dict[str, list[Path]] = {}
    for folder in sorted(folders, key=lambda folder: folder.name):
        classes[folder.name] = sorted(classes.get(folder.name, []) + folder.all_images())
    _check_none_is_empty(root, classes, folders)
    _check_names(root, list(classes))
    return classes, [*notices, *_on_nested(folders), *_on_left_out(root)]


def _within_outer(root: Place) -> tuple[Place, list[str]]:
    """The folder with those of the classes: not one around it, as archives have."""
    top = root
    while not top.images and len(top.folders) == 1 and _has_classes(top.folders[0]):
        (top,) = top.folders
    if top is root:
        return top, []
    return top, [f"Note: the classes are the folders in {top.path.relative_to(root.path)}."]


def _has_classes(place: Place) -> bool:
    """Whether folders of classes are in it, be there loose images beside them, which are refused then."""
    return len(place.filled()) > 1 if place.images else bool(place.folders)


def _check_no_loose_images(root: Place, top: Place) -> None:
    if top.images and not top.folders:
        raise _not_taken(root, f"{top.path} has {counted(len(top.images), 'image')} and no folders for classes")
    if top.images:
        loose = f"{counted(len(top.images), 'image')} ({named(path.name for path in top.images)})"
        raise _not_taken(root, f"{loose} beside the folders of the classes: nothing says their class")


def _parts(root: Place, top: Place) -> list[Place]:
    """The folders that the images are dealt into, if they are."""
    parts = [place for place in top.folders if place.is_part]
    dealt = [place for place in parts if place.filled()]
    if others := [place for place in top.folders if not place.is_part]:
        if not dealt:
            return []  # a class may be called test, too
        raise _not_taken(
            root,
            f"{_names(dealt)} with folders in them, as where images are dealt into parts, and beside them "
            f"{_names(others)}, as if those were classes",
        )
    if parts and not any(place.all_images() for place in parts):
        raise _missing(f"images: {named(f'{place.path} {_holds(place)}' for place in parts)}\n{SUFFIXES}\n{LAYOUTS}")
    if loose := [place for place in parts if place.images]:
        images = named(f"{len(place.images):,} in {place.name}" for place in loose)
        raise _not_taken(root, f"images that are in no folder of a class: {images}")
    return parts


def _check_outer_folders_are_classes(root: Place, top: Place) -> None:
    """Refuse folders of which the outer or the inner ones may be the classes: A/x, A/y, B/x, B/y."""
    if any(place.images for place in top.folders):
        return
    inner = Counter(folder.name for place in top.folders for folder in place.filled() if not folder.is_part)
    shared = [name for name, count in inner.items() if count > 1]
    if len(shared) > 1 and 2 * len(shared) >= len(inner):
        raise _not_taken(
            root,
            f"the folders {_names(top.folders)}, and in more than one of them {named(shared)}: either may be the "
            f"classes. If {_names(top.folders)} are, put them into one folder named train; if {named(shared)} are, put "
            "all images of each into one folder",
        )


def _check_none_is_empty(root: Place, classes: dict[str, list[Path]], folders: Sequence[Place]) -> None:
    """At least two classes, each with images."""
    if empty := [folder for folder in folders if not classes[folder.name]]:
        contents = named(f"{folder.path} {_holds(folder)}" for folder in empty)
        filled = [folder for folder in folders if folder not in empty]
        inner = len(filled) == 1 and len(filled[0].filled()) > 1
        hint = f"\nIf the classes are the folders in {filled[0].path}, give that as --data." if inner else ""
        raise _missing(f"no image of this class: {contents}{hint}\n{SUFFIXES}\n{LAYOUTS}")
    if len(classes) < 2:
        raise _not_taken(root, f"one class only, {named(classes)}, and two are needed at least")


def _check_names(root: Place, names: Sequence[str]) -> None:
    """Class names can be told apart: those of train and test may be one class, spelt twice."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), []).append(name)
    if same := [of_class for of_class in alike.values() if len(of_class) > 1]:
        raise _not_taken(
            root, f"folders whose names hardly differ: {named(map(repr, same[0]))}. Give one class one name"
        )


def _on_nested(folders: Sequence[Place]) -> list[str]:
    """What is taken from folders within those of the classes."""
    nested = [(folder.name, inner) for folder in folders for inner in folder.filled()]
    if not nested:
        return []
    n_images = sum(len(inner.all_images()) for _, inner in nested)
    where = named(f"{name}/{inner.name}" for name, inner in nested)
    return [
        f"Note: {counted(n_images, 'image')} in folders within those of the classes, taken into these: {where}. "
        "Which are of one patient, a table of groups must say."
    ]


def _on_left_out(root: Place) -> list[str]:
    """Files that may be images, though not of a suffix that is taken."""
    others = [path for path in root.all_others() if path.suffix.lower() not in DOCUMENTS]
    if not others:
        return []
    return [f"Warning: left out, as they are no images by their suffix: {_kinds(root, others)}. {SUFFIXES}"]


def _holds(place: Place) -> str:
    """What a folder without images has in it."""
    others = place.all_others()
    return f"has only {_kinds(place, others)}" if others else "is empty"


def _kinds(place: Place, paths: Iterable[Path]) -> str:
    """How many files there are of each suffix, with one of them."""
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(path.suffix.lower() or "without a suffix", []).append(path)
    return named(f"{len(files):,} {kind} ({files[0].relative_to(place.path)})" for kind, files in kinds.items())


def _names(places: Iterable[Place]) -> str:
    return named(place.name for place in places)


def _missing(what: str) -> MissingData:
    """The error for images that are not there; nobody else has them."""
    return MissingData(f"missing: {what}")


def _not_taken(root: Place, found: str) -> MalformedData:
    """The error for a layout that is none of those that are taken."""
    return MalformedData(f"{root.path}: found {found}.\n{LAYOUTS}")
