"""Which of a user's images belong together: those of a patient, by a table, and those that are the same image."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

import numpy as np

from benchmarks.accuracy.dataset import NAMED, NO_GROUP, MalformedData, counted, group_numbers, listed, named, numbered
from benchmarks.accuracy.tables import WORKBOOK_SUFFIXES, read_lines

TABLE = "groups.csv"
TABLE_SUFFIXES = (".csv", ".tsv", ".xls", *WORKBOOK_SUFFIXES)
# Of the two columns of a table, the one before the other where it has both: a patient may have several lesions.
TITLES = (
    ("image", "file", "filename", "file_name", "image_name", "image_id", "path"),
    ("group", "patient", "patient_id", "lesion", "lesion_id"),
)
SHOWN = 10  # lines of a warning or error

Entry = tuple[int, str, str]  # number of the line, image, group


def find_table(files: Iterable[Path]) -> Path | None:
    """The table that lies in the folder of the images."""
    return next((path for path in files if path.name.casefold() == TABLE), None)


def on_other_tables(files: Iterable[Path]) -> list[str]:
    """A word on tables that lie in the folder of the images, where none was given: one may be meant."""
    tables = [path.name for path in files if path.suffix.lower() in TABLE_SUFFIXES]
    if not tables:
        return []
    return [
        f"Warning: not read: {named(tables)}. A table that says which images are of one patient is named {TABLE}, or "
        "given as --groups."
    ]


def read_table(table: Path, root: Path, paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """The group of each image, '' for one that is its own, and what its user should know.

    Raises:
        MalformedData: an image is not in the table, is in it with two groups, or cannot be told from another.
    """
    index = _Index(root, paths)
    groups: dict[int, set[str]] = {}
    ambiguous, unknown = [], []
    for number, image, group in _entries(table, index):
        found = index.find(image)
        if len(found) == 1:
            groups.setdefault(found[0], set()).add("" if group.casefold() in NO_GROUP else group)
        elif found:
            places = named(paths[i].relative_to(root).as_posix() for i in found)
            ambiguous.append(f"line {number}: {image} may be {places}: write its path within the folder")
        else:
            unknown.append(image)
    if ambiguous:
        raise MalformedData(
            f"{table}: images that cannot be told from others of the same name:\n{listed(ambiguous, SHOWN)}"
        )
    if twice := [i for i, said in groups.items() if len(said) > 1]:
        reasons = [f"{paths[i].relative_to(root).as_posix()}: {named(map(repr, sorted(groups[i])))}" for i in twice]
        raise MalformedData(
            f"{table}: {counted(len(twice), 'image')} listed with more than one group:\n{listed(reasons)}"
        )
    if absent := [path.relative_to(root).as_posix() for i, path in enumerate(paths) if i not in groups]:
        if not groups:
            raise MalformedData(
                f"{table}: no line is of an image here. It has {named(unknown)}; the folder has {named(absent)}."
            )
        raise MalformedData(
            f"{table}: {len(absent):,} of {len(paths):,} images are not in it (an image that is alone needs a line "
            f"with an empty group):\n{listed(absent, SHOWN)}{_on_unknown(unknown)}"
        )
    of_images = [groups[i].pop() for i in range(len(paths))]
    return of_images, [_summary(table, of_images) + _on_unknown(unknown)]


def _on_unknown(images: Sequence[str]) -> str:
    return f"\nLines for which there is no image here: {len(images):,} ({named(images)})" if images else ""


def _summary(table: Path, groups: Sequence[str]) -> str:
    """How the images are grouped: a mistake in the table shows in the largest group."""
    n_groups = int(group_numbers(groups).max()) + 1
    sizes = Counter(group for group in groups if group)
    largest = "".join(f"; the largest, {group!r}, has {size:,}" for group, size in sizes.most_common(1))
    return f"Note: {counted(len(groups), 'image')} in {counted(n_groups, 'group')} by {table}{largest}."


def _entries(table: Path, index: "_Index") -> list[Entry]:
    """The lines of a table with two columns, with titles or without, or with known titles among others."""
    lines = read_lines(table)
    if not lines:
        raise MalformedData(f"{table}: no lines")
    titles = [cell.casefold() for cell in lines[0][1]]
    image, group = (next((titles.index(name) for name in names if name in titles), None) for names in TITLES)
    has_titles = image is not None and group is not None
    if image is None or group is None:
        if max(len(cells) for _, cells in lines) != 2:
            raise MalformedData(
                f"{table}: needs two columns, image and patient; or a header with one of {', '.join(TITLES[0])} and "
                f"one of {', '.join(TITLES[1])}. It begins with {lines[0][1]}"
            )
        image, group = 0, 1
        has_titles = not index.find(lines[0][1][0])
    padded = [(number, cells + [""] * len(titles) + [""]) for number, cells in lines[has_titles:]]
    return [(number, cells[image], cells[group]) for number, cells in padded]


class _Index:
    """Images by what a table may call them: path within the folder, or its end, with suffix or without."""

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self.prefixes = (f"{root.absolute().as_posix()}/", f"{root.as_posix()}/", f"{root.absolute().name}/", "./")
        self.whole: dict[str, list[int]] = {}
        self.ends: dict[str, list[int]] = {}
        for i, path in enumerate(paths):
            relative = PurePath(unicodedata.normalize("NFC", path.relative_to(root).as_posix()))
            for name in (relative, relative.with_suffix("")):
                self.whole.setdefault(name.as_posix(), []).append(i)
                for start in range(len(name.parts)):
                    self.ends.setdefault("/".join(name.parts[start:]).casefold(), []).append(i)

    def find(self, image: str) -> list[int]:
        """The images that this may be: several where it is no whole path, and they have the same name."""
        name = unicodedata.normalize("NFC", image.replace("\\", "/"))
        names = [name, *(name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix))]
        for known in (self.whole, self.ends):
            for written in names:
                if found := known.get(written if known is self.whole else written.casefold()):
                    return found
        return []


def join(
    root: Path, paths: Sequence[Path], labels: np.ndarray, given: Sequence[str] | None, same: Sequence[Sequence[int]]
) -> tuple[np.ndarray | None, list[str]]:
    """A number for each image's group, where the same image is of one group, and what its user should know.

    Args:
        root: the folder of the images.
        paths: of all images.
        labels: of all images.
        given: the groups by the user's table.
        same: sets of images that are the same, by index.

    Returns:
        ``(N,)`` int64, or ``None`` where each image is alone; and notices.
    """
    if given is None and not same:
        return None, []
    groups = group_numbers(given or [""] * len(paths))
    across_groups = [of_image for of_image in same if given and len(set(groups[of_image])) > 1]
    for of_image in same:
        groups[np.isin(groups, groups[of_image])] = groups[of_image[0]]
    across_classes = [of_image for of_image in same if len(set(labels[of_image])) > 1]
    within = [of_image for of_image in same if len(set(labels[of_image])) == 1]
    sentences = (
        (
            across_classes,
            "the same image in more than one class, where at most one is right; it is used in each",
        ),
        (within, "the same image more than once; all of it is in one part of each split, unless with --split random"),
        (across_groups, "the same image in more than one group of the table; they are one group now"),
    )
    notices = [f"Warning: {text}:\n{_listed(root, paths, sets)}" for sets, text in sentences if sets]
    return numbered(groups.tolist()), notices


def _listed(root: Path, paths: Sequence[Path], sets: Sequence[Sequence[int]]) -> str:
    return listed((" = ".join(_within(root, [paths[i] for i in of_image])) for of_image in sets), SHOWN)


def _within(root: Path, paths: Sequence[Path]) -> list[str]:
    """The paths within the folder, of many the first."""
    names = [path.relative_to(root).as_posix() for path in paths]
    return names if len(names) <= NAMED else [*names[:NAMED], f"{len(names) - NAMED:,} more"]
