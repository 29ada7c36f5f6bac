"""A folder of one's own images as a data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.accuracy import images
from benchmarks.accuracy.dataset import Dataset
from benchmarks.accuracy.groups import find_table, join, on_other_tables, read_table
from benchmarks.accuracy.layout import FOLDER, find_classes, scan


def load_folder(data: Path | None, table: Path | None = None) -> Dataset:
    """Any images in one of ``layout.LAYOUTS``; classes and images in alphabetical order.

    Args:
        data: the folder.
        table: which image is of which patient. ``None``: ``groups.csv`` in the folder, if there is one.

    Raises:
        MissingData: there is no folder, or no image of a class.
        MalformedData: the layout is not one that is taken; files are damaged; the table does not fit the images.
    """
    root = scan(data)
    classes, notices = find_classes(root)
    paths = [path for of_class in classes.values() for path in of_class]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(of_class) for of_class in classes.values()])
    _check_files(paths)
    table = table or find_table(root.others)
    given, on_table = (None, on_other_tables(root.others)) if table is None else read_table(table, root.path, paths)
    groups, on_identical = join(root.path, paths, labels, given, images.identical(paths))
    return Dataset(
        name="folder",
        class_names=tuple(classes),
        labels=labels,
        read=lambda i: images.open_image(paths[i], "RGB"),
        files=paths,
        groups=groups,
        groups_given=given is not None,
        notices=(*notices, *on_table, *on_identical),
        **FOLDER._asdict(),
    )


def _check_files(paths: Sequence[Path]) -> None:
    """Look at the files, which reads none; where one is damaged, look for all that are, to name them in one error.

    What only reading shows is found when images are read for training, before it: reading all twice takes minutes.
    """
    if any(images.fault_of_file(path) for path in paths):
        images.check(paths)
