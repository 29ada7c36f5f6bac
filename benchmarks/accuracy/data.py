"""Labelled images from a user's own download, in each source's published layout.

Nothing is downloaded here: a missing file is an error that says where the data can be had, and under which licence.
"""

import gzip
import os
import re
import zlib
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.accuracy.dataset import Dataset, MalformedData, Origin, group_numbers, named
from benchmarks.accuracy.dataset import MissingData as MissingData  # which load raises, too
from benchmarks.accuracy.folder import load_folder
from benchmarks.accuracy.images import is_junk, open_image
from benchmarks.accuracy.tables import each_once, read_rows, text_of

DIGITS = Origin("scikit-learn's load_digits (UCI Optical Recognition of Handwritten Digits)", "CC BY 4.0")
DIGITS_POOL = 100  # images of each class, of 174 to 183, to draw training and validation from; the others are the test
DIGITS_SEED = 0
# 100 * 25^(-i / 9): at the quickstart's ratio of 100 the rarest class would have no image for validation.
DIGITS_LONG_TAIL = (100, 70, 49, 34, 24, 17, 12, 8, 6, 4)

FASHION_MNIST = Origin(
    "https://github.com/zalandoresearch/fashion-mnist, or the Debian package dataset-fashion-mnist", "MIT"
)
IDX_BYTES = 8  # in the magic number of an idx file: unsigned bytes
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# 6000 * 100^(-i / 9), rounded down: the exponential tail of Cao et al. 2019 with ratio 100, for 6,000 images a class.
FASHION_MNIST_LONG_TAIL = (6000, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60)

ELPV = Origin("https://github.com/zae-bayern/elpv-dataset, or `pip install elpv-dataset`", "CC BY-NC-SA 4.0 (images)")
ELPV_CLASSES = ("defect 0", "defect 1/3", "defect 2/3", "defect 1")  # probability that the cell is defective

DERMAMNIST = Origin("https://medmnist.com (Zenodo, doi:10.5281/zenodo.10519652)", "CC BY-NC 4.0")
DERMAMNIST_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")  # HAM10000's names, in MedMNIST's label order
MEDMNIST_PARTS = ("train", "val", "test")
DERMAMNIST_FILES = tuple(f"dermamnist{size}.npz" for size in ("", "_64", "_128", "_224"))

HAM10000 = Origin("https://doi.org/10.7910/DVN/DBW86T (Harvard Dataverse)", "CC BY-NC 4.0")
HAM10000_CLASSES = DERMAMNIST_CLASSES
HAM10000_SHEETS = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")  # Kaggle's, Dataverse's
HAM10000_IMAGES = ("HAM10000_images_part_1", "HAM10000_images_part_2", ".")  # the archives have no folder of their own

ISIC2019 = Origin("https://challenge.isic-archive.com/data/#2019", "CC BY-NC 4.0")
ISIC2019_CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
ISIC2019_SHEET = "ISIC_2019_Training_GroundTruth.csv"
ISIC2019_LESIONS = "ISIC_2019_Training_Metadata.csv"
ISIC2019_IMAGES = ("ISIC_2019_Training_Input", "ISIC_2019_Training_Input/ISIC_2019_Training_Input")  # ISIC's, Kaggle's

ODIR5K = Origin(
    "https://odir2019.grand-challenge.org, or https://www.kaggle.com/datasets/andrewmvd/ocular-disease-recognition-odir5k",
    "not stated by its publishers",
)
ODIR5K_CLASSES = tuple("NDGCAHMO")  # normal, diabetes, glaucoma, cataract, AMD, hypertension, myopia, other
ODIR5K_EYES_SHEET = "full_df.csv"  # Kaggle's: one line an eye, with its own label
ODIR5K_PATIENTS_SHEETS = (  # the challenge's: one line a patient, with the diagnostic keywords of each eye
    "ODIR-5K_Training_Annotations(Updated)_V2.xlsx",
    "data.xlsx",
    "ODIR-5K/data.xlsx",
    "ODIR-5K/ODIR-5K/data.xlsx",
)
ODIR5K_IMAGES = (
    "preprocessed_images",
    "ODIR-5K_Training_Images",
    "ODIR-5K_Training_Images/ODIR-5K_Training_Dataset",
    "ODIR-5K_Training_Dataset",
    "Training Images",
    "ODIR-5K/Training Images",
    "ODIR-5K/ODIR-5K/Training Images",
)
# What a diagnostic keyword contains, and its class. A keyword that fits none of these is of class O.
ODIR5K_KEYWORDS = {
    "normal fundus": "N",
    "diabetic retinopathy": "D",
    "proliferative retinopathy": "D",  # nonproliferative and non proliferative too, as the sheet has both
    "glaucoma": "G",
    "cataract": "C",
    "age-related macular degeneration": "A",
    "hypertensive retinopathy": "H",
    "myopi": "M",  # pathological myopia, myopia retinopathy, myopic maculopathy
}
ODIR5K_PHOTOGRAPH_KEYWORDS = {  # these describe the photograph, not the eye
    "anterior segment image",
    "image offset",
    "lens dust",
    "low image quality",
    "no fundus image",
    "optic disk photographically invisible",
}

DEPTH = 2  # of folders beside a sheet in which its images are looked for


def load(name: str, data: Path | None, groups: Path | None = None) -> Dataset:
    """The data set of this name.

    Args:
        name: one of ``DATASETS``.
        data: the folder (for DermaMNIST also the file) of the user's download. None: where a package has put the data,
            which digits, Fashion-MNIST and elpv allow.
        groups: for ``folder`` alone, a table of which image is of which patient.

    Raises:
        MissingData: a file, folder or package is not there.
        MalformedData: a file is not in its published layout, or is damaged.
    """
    return load_folder(data, groups) if name == "folder" else DATASETS[name](data)


def load_digits_long_tail(data: Path | None) -> Dataset:
    """The 1,797 digits of scikit-learn, 8x8; the test set is the same whatever the seed of the split."""
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(DIGITS_SEED).permutation(len(labels))
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        is_test[order[labels[order] == label][DIGITS_POOL:]] = True
    return Dataset(
        name="digits",
        class_names=tuple("0123456789"),
        labels=labels,
        read=lambda i: Image.fromarray(images[i]),
        is_test=is_test,
        long_tail=DIGITS_LONG_TAIL,
        **DIGITS._asdict(),
    )


def load_fashion_mnist(data: Path | None) -> Dataset:
    """Fashion-MNIST, 28x28: the 60,000 training images, to draw a long tail from, then the 10,000 test images."""
    folder = data or FASHION_MNIST_FOLDER
    train_images, test_images = (_read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3) for part in ("train", "t10k"))
    train_labels, test_labels = (_read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1) for part in ("train", "t10k"))
    _check_labels(train_labels, len(train_images), len(FASHION_MNIST_CLASSES), f"{folder}, training set")
    _check_labels(test_labels, len(test_images), len(FASHION_MNIST_CLASSES), f"{folder}, test set")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise MalformedData(
            f"{folder}: images of {train_images.shape[1:]} for training, {test_images.shape[1:]} for test"
        )
    images = np.concatenate([train_images, test_images])
    return Dataset(
        name="fashion-mnist-lt",
        class_names=FASHION_MNIST_CLASSES,
        labels=np.concatenate([train_labels, test_labels]).astype(np.int64),
        read=lambda i: Image.fromarray(images[i]),
        is_test=np.arange(len(images)) >= len(train_images),
        long_tail=FASHION_MNIST_LONG_TAIL,
        **FASHION_MNIST._asdict(),
    )


def load_elpv(data: Path | None) -> Dataset:
    """Solar cells in electroluminescence, 300x300 grey, by the probability of a defect: ``labels.csv`` and ``images``.

    The cells were cut out of 44 modules; which cell is of which module is not published, so there are no groups.
    """
    sheet = (data or _elpv_folder()) / "labels.csv"
    if not sheet.is_file():
        raise ELPV.missing(sheet)
    cells = [_elpv_cell(line, sheet) for line in text_of(sheet).splitlines()]
    if not cells:
        raise MalformedData(f"{sheet}: no lines")
    first, notices = each_once(sheet, [image for image, _ in cells], [label for _, label in cells], "label")
    cells = [cells[i] for i in first]
    paths = _image_paths([image for image, _ in cells], sheet, (".",), ELPV)
    return Dataset(
        name="elpv",
        class_names=ELPV_CLASSES,
        labels=np.array([label for _, label in cells], dtype=np.int64),
        read=lambda i: open_image(paths[i], "L"),
        files=paths,
        notices=notices,
        **ELPV._asdict(),
    )


def load_dermamnist(data: Path | None) -> Dataset:
    """DermaMNIST at any of its sizes: HAM10000 shrunk to squares, in one ``.npz``.

    The official test part is the test set. The official training and validation parts are drawn together into ours,
    so that each seed has its own. The parts are MedMNIST's: images of one lesion lie on both sides of them, and the
    file does not say which. HAM10000 itself has no such leak.
    """
    path = _dermamnist_file(data)
    try:
        with np.load(path) as arrays:
            # A list of views, since the arrays take 1.5 GB at 224x224.
            images = [image for part in MEDMNIST_PARTS for image in arrays[f"{part}_images"]]
            labels = [arrays[f"{part}_labels"].ravel() for part in MEDMNIST_PARTS]  # (n, 1) in the file
    except (BadZipFile, EOFError, KeyError, OSError, TypeError, ValueError, zlib.error) as error:
        raise MalformedData(f"{path}: not MedMNIST's arrays, or cut off: {error}") from error
    if any(image.dtype != np.uint8 or image.ndim not in (2, 3) for image in images):
        raise MalformedData(f"{path}: not MedMNIST's arrays: images must be uint8, (N, H, W) or (N, H, W, 3)")
    n_test = len(labels[-1])
    labels = np.concatenate(labels)
    _check_labels(labels, len(images), len(DERMAMNIST_CLASSES), str(path))
    return Dataset(
        name="dermamnist",
        class_names=DERMAMNIST_CLASSES,
        labels=labels.astype(np.int64),
        read=lambda i: Image.fromarray(images[i]),
        is_test=np.arange(len(labels)) >= len(labels) - n_test,
        **DERMAMNIST._asdict(),
    )


def load_ham10000(data: Path | None) -> Dataset:
    """HAM10000: ``HAM10000_metadata.csv`` and the two folders of images; the images of a lesion are a group.

    An image without a lesion is its own group.
    """
    sheet = _find_file(data, HAM10000_SHEETS, HAM10000)
    rows = read_rows(sheet, ("lesion_id", "image_id", "dx"))
    for row in rows:
        if row["dx"] not in HAM10000_CLASSES:
            raise MalformedData(f"{sheet}: {row['image_id']} has the unknown class {row['dx']!r}")
    facts = [(row["dx"], row["lesion_id"]) for row in rows]
    first, notices = each_once(sheet, [row["image_id"] for row in rows], facts, "class or lesion")
    rows = [rows[i] for i in first]
    paths = _image_paths([f"{row['image_id']}.jpg" for row in rows], sheet, HAM10000_IMAGES, HAM10000)
    return Dataset(
        name="ham10000",
        class_names=HAM10000_CLASSES,
        labels=np.array([HAM10000_CLASSES.index(row["dx"]) for row in rows], dtype=np.int64),
        read=lambda i: open_image(paths[i], "RGB"),
        files=paths,
        groups=group_numbers(row["lesion_id"] for row in rows),
        notices=notices,
        **HAM10000._asdict(),
    )


def load_isic2019(data: Path | None) -> Dataset:
    """ISIC 2019: ``ISIC_2019_Training_GroundTruth.csv`` (one-hot) and ``ISIC_2019_Training_Input``.

    With ``ISIC_2019_Training_Metadata.csv`` beside them, the images of a lesion are a group; an image without a lesion
    is its own. A class without images (``UNK``, which only the challenge's hidden test had) is left out.
    """
    sheet = _find_file(data, (ISIC2019_SHEET,), ISIC2019)
    rows = read_rows(sheet, ("image", *ISIC2019_CLASSES))
    classes = [_hot_class(row, sheet) for row in rows]
    first, notices = each_once(sheet, [row["image"] for row in rows], classes, "class")
    rows, classes = [rows[i] for i in first], [classes[i] for i in first]
    class_names = tuple(name for name in ISIC2019_CLASSES if name in classes)
    paths = _image_paths([f"{row['image']}.jpg" for row in rows], sheet, ISIC2019_IMAGES, ISIC2019)
    return Dataset(
        name="isic2019",
        class_names=class_names,
        labels=np.array([class_names.index(name) for name in classes], dtype=np.int64),
        read=lambda i: open_image(paths[i], "RGB"),
        files=paths,
        groups=_isic2019_groups([row["image"] for row in rows], sheet.with_name(ISIC2019_LESIONS)),
        notices=notices,
        **ISIC2019._asdict(),
    )


def load_odir5k(data: Path | None) -> Dataset:
    """ODIR-5K, one image an eye: Kaggle's ``full_df.csv``, else the challenge's sheet; a patient's eyes are a group.

    ``full_df.csv`` has a label for each eye. The challenge labels patients, with any number of diseases; from its sheet
    an eye gets the class of its own diagnostic keywords, and an eye with more than one class, or none, is left out.
    """
    if data is not None and (data / ODIR5K_EYES_SHEET).is_file():
        sheet = data / ODIR5K_EYES_SHEET
        eyes = [_eye_of_row(row, sheet) for row in read_rows(sheet, ("ID", "filename", "labels"))]
    else:
        sheet = _find_file(data, (ODIR5K_EYES_SHEET, *ODIR5K_PATIENTS_SHEETS), ODIR5K)
        eyes = _eyes_of_patients(sheet)
    facts = [(eye.class_name, eye.patient) for eye in eyes]
    first, notices = each_once(sheet, [eye.image for eye in eyes], facts, "class or patient")
    eyes = [eyes[i] for i in first]
    paths = _image_paths([eye.image for eye in eyes], sheet, ODIR5K_IMAGES, ODIR5K)
    return Dataset(
        name="odir5k",
        class_names=ODIR5K_CLASSES,
        labels=np.array([ODIR5K_CLASSES.index(eye.class_name) for eye in eyes], dtype=np.int64),
        read=lambda i: open_image(paths[i], "RGB"),
        files=paths,
        groups=group_numbers(eye.patient for eye in eyes),
        notices=notices,
        **ODIR5K._asdict(),
    )


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": load_digits_long_tail,
    "fashion-mnist-lt": load_fashion_mnist,
    "elpv": load_elpv,
    "dermamnist": load_dermamnist,
    "ham10000": load_ham10000,
    "isic2019": load_isic2019,
    "odir5k": load_odir5k,
    "folder": load_folder,
}


def _elpv_folder() -> Path:
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise ELPV.missing("the package elpv-dataset")
    return Path(spec.origin).parent / "data"


def _dermamnist_file(data: Path | None) -> Path:
    """The file itself, or the one of the smallest images in a folder."""
    if data is not None and data.suffix == ".npz":
        return _find_file(data.parent, (data.name,), DERMAMNIST)
    return _find_file(data, DERMAMNIST_FILES, DERMAMNIST)


def _elpv_cell(line: str, sheet: Path) -> tuple[str, int]:
    """Image and label of a line with an image, the probability of a defect, and ``mono`` or ``poly``."""
    fields = re.fullmatch(r"(\S+)\s+(\d+\.\d+)\s+(mono|poly)\s*", line)
    thirds = 3 * float(fields[2]) if fields else -1.0
    if round(thirds) not in range(len(ELPV_CLASSES)) or abs(thirds - round(thirds)) > 0.01:
        raise MalformedData(f"{sheet}: not an image, a probability of 0, 1/3, 2/3 or 1, and mono or poly: {line!r}")
    return fields[1], round(thirds)


class Eye(NamedTuple):
    """An image of ODIR-5K."""

    image: str
    class_name: str
    patient: str


def _eye_of_row(row: dict[str, str], sheet: Path) -> Eye:
    """A line of Kaggle's sheet, whose ``labels`` is a Python list of one class: ``['N']``."""
    try:
        (class_name,) = literal_eval(row["labels"])
        ODIR5K_CLASSES.index(class_name)
    except (SyntaxError, TypeError, ValueError):
        message = f"{sheet}: {row['filename']} needs a list of one class of {ODIR5K_CLASSES}: {row['labels']!r}"
        raise MalformedData(message) from None
    return Eye(row["filename"], class_name, row["ID"])


def _eyes_of_patients(sheet: Path) -> list[Eye]:
    eyes = []
    columns = [f"{side}-{column}" for side in ("Left", "Right") for column in ("Fundus", "Diagnostic Keywords")]
    for row in read_rows(sheet, ("ID", *columns)):
        for side in ("Left", "Right"):
            classes = _classes_of_keywords(row[f"{side}-Diagnostic Keywords"])
            if len(classes) == 1:
                eyes.append(Eye(row[f"{side}-Fundus"], classes.pop(), row["ID"]))
    if not eyes:
        raise MalformedData(f"{sheet}: no eye with diagnostic keywords of one class")
    return eyes


def _classes_of_keywords(keywords: str) -> set[str]:
    """The classes of an eye; the sheet separates its keywords by commas, mostly full-width ones."""
    found = {keyword.strip().lower() for keyword in re.split("[,，]", keywords)} - ODIR5K_PHOTOGRAPH_KEYWORDS - {""}
    return {next((name for word, name in ODIR5K_KEYWORDS.items() if word in keyword), "O") for keyword in found}


def _hot_class(row: dict[str, str], sheet: Path) -> str:
    """The class of a line with a 1 for its class and 0 for the others."""
    try:
        hot = [float(row[name]) for name in ISIC2019_CLASSES]
    except (TypeError, ValueError):
        hot = []
    if sorted(hot) != [0.0] * (len(ISIC2019_CLASSES) - 1) + [1.0]:
        raise MalformedData(f"{sheet}: {row['image']} needs a 1 for one class and 0 for the others")
    return ISIC2019_CLASSES[hot.index(1.0)]


def _isic2019_groups(images: list[str], sheet: Path) -> np.ndarray | None:
    if not sheet.is_file():
        return None
    rows = read_rows(sheet, ("image", "lesion_id"))
    lesions = {row["image"]: row["lesion_id"] for row in rows}
    each_once(sheet, [row["image"] for row in rows], [row["lesion_id"] for row in rows], "lesion")
    return group_numbers(lesions.get(image, "") for image in images)


def _find_file(data: Path | None, names: Sequence[str], origin: Origin) -> Path:
    """The first of these files that is in the folder; where there is none, of those that differ in case only."""
    if data is None:
        raise origin.missing(f"{names[0]} (give its folder as --data)")
    for name in names:
        if (data / name).is_file():
            return data / name
    others = {path.name.casefold(): path for path in sorted(data.iterdir()) if path.is_file()} if data.is_dir() else {}
    for name in names:
        if name.casefold() in others:
            return others[name.casefold()]
    also = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    raise origin.missing(f"{data / names[0]}{also}")


def _image_paths(names: Sequence[str], sheet: Path, folders: Sequence[str], origin: Origin) -> list[Path]:
    """Where the images that a sheet lists are: each in the first of these folders beside the sheet that has it.

    What is in none of them may be in another folder, as where someone has merged or renamed them, whatever its case.

    Raises:
        MissingData: an image is nowhere.
        MalformedData: an image is in several other folders.
    """
    root = sheet.parent
    found = [next((path for folder in folders if (path := root / folder / name).is_file()), None) for name in names]
    if None in found:
        others = _files_by_name(root)
        found = [
            path or _only_one(name, sheet, others.get(Path(name).name.casefold(), []))
            for name, path in zip(names, found, strict=True)
        ]
    if absent := [name for name, path in zip(names, found, strict=True) if path is None]:
        places = ", ".join(str(root / folder) for folder in folders)
        raise origin.missing(f"{absent[0]}, one of {len(absent)} images of {sheet} that are not in {places}")
    return [path for path in found if path is not None]


def _only_one(name: str, sheet: Path, paths: Sequence[Path]) -> Path | None:
    if len(paths) > 1:
        raise MalformedData(f"{sheet}: its image {name} is in several places, so that none is sure: {named(paths)}")
    return paths[0] if paths else None


def _files_by_name(root: Path) -> dict[str, list[Path]]:
    """The files of a folder, its folders, and theirs, by their names in lower case."""
    files: dict[str, list[Path]] = {}
    for path in _walk(root, DEPTH):
        files.setdefault(path.name.casefold(), []).append(path)
    return files


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        paths = sorted(Path(entry.path) for entry in entries)
    for path in paths:
        if is_junk(path):
            continue
        if path.is_file():
            yield path
        elif depth and path.is_dir():
            yield from _walk(path, depth - 1)


def _read_idx(path: Path, n_dims: int) -> np.ndarray:
    """The bytes of an idx file: a magic number, a big-endian size for each dimension, then the data."""
    if not path.is_file():
        raise FASHION_MNIST.missing(path)
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:4] != bytes((0, 0, IDX_BYTES, n_dims)):
            raise ValueError(f"it begins with {content[:4]!r}")
        shape = np.frombuffer(content, ">i4", count=n_dims, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims).reshape(shape)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise MalformedData(f"{path}: not a whole idx file: {error}") from error


def _check_labels(labels: np.ndarray, n_images: int, n_classes: int, where: str) -> None:
    if len(labels) != n_images:
        raise MalformedData(f"{where}: {n_images} images, but {len(labels)} labels")
    if n_images == 0 or labels.min() < 0 or labels.max() >= n_classes:
        raise MalformedData(f"{where}: expected labels from 0 to {n_classes - 1}")
