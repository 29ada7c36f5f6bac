"""Labelled images from a user's own download, in each source's published layout.

Nothing is downloaded here: a missing file is an error that says where the data can be had, and under which licence.
"""

import csv
import gzip
import re
import zlib
from ast import literal_eval
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


class MissingData(FileNotFoundError):
    """A file or package of a data set is not there; the message names it, the source and the licence."""


class MalformedData(ValueError):
    """A file of a data set is there, but not in its published layout."""


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
    is_test: np.ndarray | None = None  # (N,) bool: an official test set, kept whole
    long_tail: tuple[int, ...] | None = None  # training + validation images to draw of each class

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        return len(self.class_names)


DIGITS = Origin("scikit-learn's load_digits (UCI Optical Recognition of Handwritten Digits)", "CC BY 4.0")
DIGITS_POOL = 100  # images of each class, of 174 to 183, to draw training and validation from; the others are the test
DIGITS_SEED = 0
# 100 * 25^(-i / 9): at the quickstart's ratio of 100 the rarest class would have no image for validation.
DIGITS_LONG_TAIL = (100, 70, 49, 34, 24, 17, 12, 8, 6, 4)

FASHION_MNIST = Origin(
    "https://github.com/zalandoresearch/fashion-mnist, or the Debian package dataset-fashion-mnist", "MIT"
)
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

OPENPYXL = Origin("`pip install openpyxl`", "MIT")

FOLDER = Origin("your own images, one folder a class", "yours")
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def load(name: str, data: Path | None) -> Dataset:
    """The data set of this name.

    Args:
        name: one of ``DATASETS``.
        data: the folder (for DermaMNIST also the file) of the user's download. None: where a package has put the data,
            which digits, Fashion-MNIST and elpv allow.

    Raises:
        MissingData: a file, folder or package is not there.
        MalformedData: a file is not in its published layout.
    """
    return DATASETS[name](data)


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
    cells = [_elpv_cell(line, sheet) for line in sheet.read_text(encoding="utf-8").splitlines()]
    paths = _image_paths([image for image, _ in cells], sheet, (".",), ELPV)
    return Dataset(
        name="elpv",
        class_names=ELPV_CLASSES,
        labels=np.array([label for _, label in cells], dtype=np.int64),
        read=lambda i: _open(paths[i], "L"),
        files=paths,
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
    except (BadZipFile, KeyError, ValueError) as error:
        raise MalformedData(f"{path}: not MedMNIST's arrays: {error}") from error
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
    """HAM10000: ``HAM10000_metadata.csv`` and the two folders of images; the images of a lesion are a group."""
    sheet = _find_file(data, HAM10000_SHEETS, HAM10000)
    rows = _read_csv(sheet, ("lesion_id", "image_id", "dx"))
    for row in rows:
        if row["dx"] not in HAM10000_CLASSES:
            raise MalformedData(f"{sheet}: {row['image_id']} has the unknown class {row['dx']!r}")
    paths = _image_paths([f"{row['image_id']}.jpg" for row in rows], sheet, HAM10000_IMAGES, HAM10000)
    return Dataset(
        name="ham10000",
        class_names=HAM10000_CLASSES,
        labels=np.array([HAM10000_CLASSES.index(row["dx"]) for row in rows], dtype=np.int64),
        read=lambda i: _open(paths[i], "RGB"),
        files=paths,
        groups=_group_numbers(row["lesion_id"] for row in rows),
        **HAM10000._asdict(),
    )


def load_isic2019(data: Path | None) -> Dataset:
    """ISIC 2019: ``ISIC_2019_Training_GroundTruth.csv`` (one-hot) and ``ISIC_2019_Training_Input``.

    With ``ISIC_2019_Training_Metadata.csv`` beside them, the images of a lesion are a group; an image without a lesion
    is its own. A class without images (``UNK``, which only the challenge's hidden test had) is left out.
    """
    sheet = _find_file(data, (ISIC2019_SHEET,), ISIC2019)
    rows = _read_csv(sheet, ("image", *ISIC2019_CLASSES))
    classes = [_hot_class(row, sheet) for row in rows]
    class_names = tuple(name for name in ISIC2019_CLASSES if name in classes)
    paths = _image_paths([f"{row['image']}.jpg" for row in rows], sheet, ISIC2019_IMAGES, ISIC2019)
    return Dataset(
        name="isic2019",
        class_names=class_names,
        labels=np.array([class_names.index(name) for name in classes], dtype=np.int64),
        read=lambda i: _open(paths[i], "RGB"),
        files=paths,
        groups=_isic2019_groups([row["image"] for row in rows], sheet.with_name(ISIC2019_LESIONS)),
        **ISIC2019._asdict(),
    )


def load_odir5k(data: Path | None) -> Dataset:
    """ODIR-5K, one image an eye: Kaggle's ``full_df.csv``, else the challenge's sheet; a patient's eyes are a group.

    ``full_df.csv`` has a label for each eye. The challenge labels patients, with any number of diseases; from its sheet
    an eye gets the class of its own diagnostic keywords, and an eye with more than one class, or none, is left out.
    """
    if data is not None and (data / ODIR5K_EYES_SHEET).is_file():
        sheet = data / ODIR5K_EYES_SHEET
        eyes = [_eye_of_row(row, sheet) for row in _read_csv(sheet, ("ID", "filename", "labels"))]
    else:
        sheet = _find_file(data, (ODIR5K_EYES_SHEET, *ODIR5K_PATIENTS_SHEETS), ODIR5K)
        eyes = _eyes_of_patients(sheet)
    paths = _image_paths([eye.image for eye in eyes], sheet, ODIR5K_IMAGES, ODIR5K)
    return Dataset(
        name="odir5k",
        class_names=ODIR5K_CLASSES,
        labels=np.array([ODIR5K_CLASSES.index(eye.class_name) for eye in eyes], dtype=np.int64),
        read=lambda i: _open(paths[i], "RGB"),
        files=paths,
        groups=_group_numbers(eye.patient for eye in eyes),
        **ODIR5K._asdict(),
    )


def load_folder(data: Path | None) -> Dataset:
    """Any images as ``class/image.jpg``; classes and images in alphabetical order."""
    if data is None or not data.is_dir():
        raise FOLDER.missing(f"{data or '--data'}, a folder with class/image.jpg")
    folders = sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise FOLDER.missing(f"{data / 'class'}, a folder with the images of a class")
    paths, labels = [], []
    for label, folder in enumerate(folders):
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise FOLDER.missing(f"{folder / '*.jpg'}: no image of this class")
        paths += images
        labels += [label] * len(images)
    return Dataset(
        name="folder",
        class_names=tuple(folder.name for folder in folders),
        labels=np.array(labels, dtype=np.int64),
        read=lambda i: _open(paths[i], "RGB"),
        files=paths,
        **FOLDER._asdict(),
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
    for row in _read_xlsx(sheet, ("ID", *columns)):
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
    lesions = {row["image"]: row["lesion_id"] for row in _read_csv(sheet, ("image", "lesion_id"))}
    return _group_numbers(lesions.get(image) or image for image in images)


def _group_numbers(keys: Iterable[Hashable]) -> np.ndarray:
    """Equal numbers for equal keys, ``(N,)`` int64, counted in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _find_file(data: Path | None, names: Sequence[str], origin: Origin) -> Path:
    """The first of these files that is in the folder."""
    if data is None:
        raise origin.missing(f"{names[0]} (give its folder as --data)")
    for name in names:
        if (data / name).is_file():
            return data / name
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    raise origin.missing(f"{data / names[0]}{others}")


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a sheet with these columns, between commas or, as Dataverse's ``.tab``, tabs."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter)
        _check_columns(path, reader.fieldnames or (), columns)
        rows = list(reader)
    if not rows:
        raise MalformedData(f"{path}: no lines after the header")
    return rows


def _read_xlsx(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of the first sheet of a workbook, every cell as text."""
    if find_spec("openpyxl") is None:
        raise OPENPYXL.missing(f"the package openpyxl, which reads {path}")
    from openpyxl import load_workbook  # only this one data set needs it

    with closing(load_workbook(path, read_only=True)) as workbook:
        cells = workbook.worksheets[0].iter_rows(values_only=True)
        lines = [["" if cell is None else str(cell).strip() for cell in line] for line in cells]
    header = lines[0] if lines else []
    _check_columns(path, header, columns)
    return [dict(zip(header, line, strict=True)) for line in lines[1:] if any(line)]


def _check_columns(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    if absent := [column for column in columns if column not in header]:
        raise MalformedData(f"{path}: no column {absent[0]!r} in the header {list(header)}")


def _image_paths(names: Sequence[str], sheet: Path, folders: Sequence[str], origin: Origin) -> list[Path]:
    """Where the images that a sheet lists are: each in the first of these folders beside the sheet that has it."""
    root = sheet.parent
    found = [next((path for folder in folders if (path := root / folder / name).is_file()), None) for name in names]
    if absent := [name for name, path in zip(names, found, strict=True) if path is None]:
        places = ", ".join(str(root / folder) for folder in folders)
        raise origin.missing(f"{absent[0]}, one of {len(absent)} images of {sheet} that are not in {places}")
    return found


def _open(path: Path, mode: str) -> Image.Image:
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise MalformedData(f"{path}: more than 8 bits a channel (mode {image.mode}), which would be clipped")
        return image.convert(mode)


def _read_idx(path: Path, n_dims: int) -> np.ndarray:
    """The bytes of an idx file: a magic number, a big-endian size for each dimension, then the data."""
    if not path.is_file():
        raise FASHION_MNIST.missing(path)
    try:
        content = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(content, ">i4", count=n_dims, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims).reshape(shape)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise MalformedData(f"{path}: not a whole idx file: {error}") from error


def _check_labels(labels: np.ndarray, n_images: int, n_classes: int, where: str) -> None:
    if len(labels) != n_images:
        raise MalformedData(f"{where}: {n_images} images, but {len(labels)} labels")
    if n_images == 0 or labels.min() < 0 or labels.max() >= n_classes:
        raise MalformedData(f"{where}: expected labels from 0 to {n_classes - 1}")
