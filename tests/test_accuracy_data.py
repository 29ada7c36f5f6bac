"""Each data set of benchmarks.accuracy, read from small files that the test writes in the source's published layout."""

import csv
import gzip
import re
import struct
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from openpyxl import Workbook
from PIL import Image

from benchmarks.accuracy import fingerprint
from benchmarks.accuracy.data import (
    DATASETS,
    DIGITS_LONG_TAIL,
    FASHION_MNIST_FOLDER,
    FASHION_MNIST_LONG_TAIL,
    Dataset,
    MalformedData,
    MissingData,
    load,
)

RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128)


def write_image(path: Path, color: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), color).save(path)


def write_sheet(path: Path, *rows: Sequence[object], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def colors(dataset: Dataset) -> list[tuple[int, int, int]]:
    """Which of the four colours each image has; JPEG changes them a little. Its file is the one that is read."""
    assert_files_are_read(dataset)
    palette = np.array([RED, GREEN, BLUE, GREY])
    means = [np.asarray(dataset.read(i).convert("RGB")).mean((0, 1)) for i in range(len(dataset))]
    distances = np.array([np.abs(palette - mean).max(1) for mean in means])
    assert distances.min(1).max() < 5
    return [tuple(palette[i].tolist()) for i in distances.argmin(1)]


def assert_files_are_read(dataset: Dataset) -> None:
    """The files that tell these images from others are those of the images, in the same order."""
    assert len(dataset.files) == len(dataset)
    for i, path in enumerate(dataset.files):
        image = dataset.read(i)
        assert np.array_equal(np.asarray(Image.open(path).convert(image.mode)), np.asarray(image))


def class_of_each(dataset: Dataset) -> list[str]:
    assert dataset.labels.dtype == np.int64
    return [dataset.class_names[label] for label in dataset.labels]


def assert_names(error: pytest.ExceptionInfo, dataset: str, *parts: object) -> None:
    """The message names the file, and the source and the licence where it can be had."""
    if dataset in SOURCES:
        source, licence = SOURCES[dataset]
        parts = (*parts, f"source: {source}", f"licence: {licence}")
    for part in parts:
        assert str(part) in str(error.value)


SOURCES = {
    "fashion-mnist-lt": ("https://github.com/zalandoresearch/fashion-mnist", "MIT"),
    "elpv": ("https://github.com/zae-bayern/elpv-dataset", "CC BY-NC-SA 4.0"),
    "dermamnist": ("https://medmnist.com", "CC BY-NC 4.0"),
    "ham10000": ("https://doi.org/10.7910/DVN/DBW86T", "CC BY-NC 4.0"),
    "isic2019": ("https://challenge.isic-archive.com", "CC BY-NC 4.0"),
    "odir5k": ("https://odir2019.grand-challenge.org", "not stated"),
}
FIRST_FILES = {
    "fashion-mnist-lt": "train-images-idx3-ubyte.gz",
    "elpv": "labels.csv",
    "dermamnist": "dermamnist.npz",
    "ham10000": "HAM10000_metadata.csv",
    "isic2019": "ISIC_2019_Training_GroundTruth.csv",
    "odir5k": "full_df.csv",
    "folder": "class",
}


@pytest.mark.parametrize("name", FIRST_FILES)
def test_an_empty_folder_is_an_error_that_says_what_is_missing_and_where_it_can_be_had(name, tmp_path):
    with pytest.raises(MissingData) as error:
        load(name, tmp_path)
    assert_names(error, name, f"missing: {tmp_path / FIRST_FILES[name]}")


@pytest.mark.parametrize("name", ["dermamnist", "ham10000", "isic2019", "odir5k", "folder"])
def test_a_data_set_that_no_package_brings_asks_for_a_folder(name):
    with pytest.raises(MissingData) as error:
        load(name, None)
    assert_names(error, name, "--data")


def test_all_the_data_sets_are_covered_here():
    assert set(DATASETS) == {"digits", *FIRST_FILES} == {"digits", "folder", *SOURCES}


# ------------------------------------------------------------------------------------------------------------- digits


def test_digits_have_a_long_tail_and_a_test_set_that_does_not_change():
    dataset, again = load("digits", None), load("digits", None)
    counts = np.bincount(dataset.labels[~dataset.is_test])
    assert (counts == 100).all() and len(dataset) == 1797 and dataset.is_test.sum() == 797
    assert dataset.long_tail == DIGITS_LONG_TAIL and max(dataset.long_tail) == 100 and min(dataset.long_tail) >= 4
    assert np.array_equal(dataset.is_test, again.is_test)
    image = dataset.read(0)
    assert (image.mode, image.size) == ("L", (8, 8)) and np.asarray(image).max() > 200
    assert dataset.n_classes == len(dataset.long_tail) == 10


# ------------------------------------------------------------------------------------------------------ Fashion-MNIST


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion_mnist(folder: Path) -> np.ndarray:
    """Three training and two test images of 28x28; returns all five."""
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    write_idx(folder / "train-images-idx3-ubyte.gz", images[:3])
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.array([9, 0, 3]))
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images[3:])
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.array([6, 1]))
    return images


def test_fashion_mnist(tmp_path):
    images = write_fashion_mnist(tmp_path)
    dataset = load("fashion-mnist-lt", tmp_path)
    assert class_of_each(dataset) == ["Ankle boot", "T-shirt/top", "Dress", "Shirt", "Trouser"]
    assert dataset.is_test.tolist() == [False, False, False, True, True]
    assert dataset.read(0).mode == "L"
    assert np.array_equal([np.asarray(dataset.read(i)) for i in range(5)], images)
    assert dataset.long_tail == FASHION_MNIST_LONG_TAIL and dataset.groups is None


def test_fashion_mnist_with_a_file_missing(tmp_path):
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(MissingData) as error:
        load("fashion-mnist-lt", tmp_path)
    assert_names(error, "fashion-mnist-lt", tmp_path / "t10k-labels-idx1-ubyte.gz")


@pytest.mark.parametrize("fault", ["truncated", "not gzip", "cut before compression", "images for labels", "empty"])
def test_fashion_mnist_with_a_damaged_file(fault, tmp_path):
    write_fashion_mnist(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-6])
    elif fault in ("not gzip", "empty"):
        path.write_bytes(b"<html>" if fault == "not gzip" else b"")
    elif fault == "cut before compression":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    else:
        path.write_bytes((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    with pytest.raises(MalformedData, match=path.name):
        load("fashion-mnist-lt", tmp_path)


def test_fashion_mnist_with_images_of_two_sizes(tmp_path):
    write_fashion_mnist(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((2, 32, 32)))
    with pytest.raises(MalformedData, match=r"images of \(28, 28\) for training, \(32, 32\) for test"):
        load("fashion-mnist-lt", tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"), [([9, 0], "3 images, but 2 labels"), ([9, 0, 10], "labels from 0 to 9")]
)
def test_fashion_mnist_with_labels_that_do_not_fit(labels, message, tmp_path):
    write_fashion_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array(labels))
    with pytest.raises(MalformedData, match=message):
        load("fashion-mnist-lt", tmp_path)


@pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_real_fashion_mnist():
    dataset = load("fashion-mnist-lt", None)
    assert np.bincount(dataset.labels[~dataset.is_test]).tolist() == [6000] * 10
    assert np.bincount(dataset.labels[dataset.is_test]).tolist() == [1000] * 10


# --------------------------------------------------------------------------------------------------------------- elpv


def write_elpv(folder: Path) -> None:
    """Four grey cells, with the column widths of the published ``labels.csv``."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, (probability, kind) in enumerate(
        [
            ("1.0               ", "mono"),
            ("0.0               ", "poly"),
            ("0.3333333333333333", "mono"),
            ("0.6666666666666666", "poly"),
        ]
    ):
        Image.new("L", (300, 300), 50 * i).save(folder / "images" / f"cell000{i + 1}.png")
        lines.append(f"images/cell000{i + 1}.png  {probability}  {kind}\n")
    (folder / "labels.csv").write_text("".join(lines))


def assert_is_written_elpv(dataset: Dataset) -> None:
    assert class_of_each(dataset) == ["defect 1", "defect 0", "defect 1/3", "defect 2/3"]
    assert dataset.labels.tolist() == [3, 0, 1, 2]
    assert_files_are_read(dataset)
    images = [dataset.read(i) for i in range(4)]
    assert {(image.mode, image.size) for image in images} == {("L", (300, 300))}
    assert [image.getpixel((7, 7)) for image in images] == [0, 50, 100, 150]
    assert dataset.long_tail is None and dataset.is_test is None


def test_elpv_of_a_folder(tmp_path):
    write_elpv(tmp_path)
    assert_is_written_elpv(load("elpv", tmp_path))


def test_elpv_of_the_installed_package(tmp_path, monkeypatch):
    write_elpv(tmp_path / "elpv_dataset" / "data")
    (tmp_path / "elpv_dataset" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "elpv_dataset", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert_is_written_elpv(load("elpv", None))


def test_elpv_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)  # the import system's word for "not there"
    with pytest.raises(MissingData) as error:
        load("elpv", None)
    assert_names(error, "elpv", "the package elpv-dataset")


def test_elpv_with_an_image_missing(tmp_path):
    write_elpv(tmp_path)
    (tmp_path / "images" / "cell0003.png").unlink()
    with pytest.raises(MissingData) as error:
        load("elpv", tmp_path)
    assert_names(error, "elpv", "images/cell0003.png", tmp_path / "labels.csv")


@pytest.mark.parametrize("line", ["images/cell0001.png  0.5  mono", "images/cell0001.png  1.0", "cell, 2.0, mono", ""])
def test_elpv_with_a_malformed_line(line, tmp_path):
    write_elpv(tmp_path)
    with (tmp_path / "labels.csv").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(MalformedData, match=r"labels\.csv: not an image, a probability"):
        load("elpv", tmp_path)


def test_elpv_with_lines_twice_and_of_other_encodings(tmp_path):
    write_elpv(tmp_path)
    sheet = tmp_path / "labels.csv"
    text = sheet.read_text()
    for encoding in ("utf-16", "utf-8-sig"):
        sheet.write_bytes((text + text.splitlines()[0] + "\n").encode(encoding))
        dataset = load("elpv", tmp_path)
        assert_is_written_elpv(dataset)
        assert "1 line left out" in dataset.notices[0]
    sheet.write_text(text + "images/cell0001.png  0.0  mono\n")
    with pytest.raises(MalformedData, match=r"(?s)more than one label.*images/cell0001\.png: 0, 3"):
        load("elpv", tmp_path)
    sheet.write_text("")
    with pytest.raises(MalformedData, match="no lines"):
        load("elpv", tmp_path)


def test_the_real_elpv():
    pytest.importorskip("elpv_dataset")  # its images are CC BY-NC-SA: the user's own install, not a need of ours
    dataset = load("elpv", None)
    assert np.bincount(dataset.labels).tolist() == [1508, 295, 106, 715]
    assert (dataset.read(2623).mode, dataset.read(2623).size) == ("L", (300, 300))


# --------------------------------------------------------------------------------------------------------- DermaMNIST


def write_dermamnist(path: Path, size: int = 28, **changes: np.ndarray) -> np.ndarray:
    """Three training images, one of validation and two test images; returns all six."""
    images = np.random.default_rng(1).integers(0, 256, (6, size, size, 3)).astype(np.uint8)
    labels = np.array([[5], [0], [6], [4], [5], [3]], dtype=np.uint8)  # (n, 1), as MedMNIST has them
    arrays = {"train_images": images[:3], "val_images": images[3:4], "test_images": images[4:]}
    arrays |= {"train_labels": labels[:3], "val_labels": labels[3:4], "test_labels": labels[4:]}
    np.savez_compressed(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return images


def test_dermamnist(tmp_path):
    images = write_dermamnist(tmp_path / "dermamnist.npz")
    dataset = load("dermamnist", tmp_path)
    assert class_of_each(dataset) == ["nv", "akiec", "vasc", "mel", "nv", "df"]
    assert dataset.is_test.tolist() == [False, False, False, False, True, True]
    assert dataset.read(0).mode == "RGB"
    assert np.array_equal([np.asarray(dataset.read(i)) for i in range(6)], images)


def test_dermamnist_of_another_size(tmp_path):
    write_dermamnist(tmp_path / "dermamnist.npz")
    write_dermamnist(tmp_path / "dermamnist_64.npz", size=64)
    assert load("dermamnist", tmp_path).read(0).size == (28, 28)
    assert load("dermamnist", tmp_path / "dermamnist_64.npz").read(0).size == (64, 64)
    small, large = (fingerprint.of_data(load("dermamnist", tmp_path / f"dermamnist{name}.npz")) for name in ("", "_64"))
    assert [name for name in small if small[name] != large[name]] == ["image contents"]
    (tmp_path / "dermamnist.npz").unlink()
    assert load("dermamnist", tmp_path).read(0).size == (64, 64)


def test_dermamnist_with_the_named_file_missing(tmp_path):
    with pytest.raises(MissingData) as error:
        load("dermamnist", tmp_path / "dermamnist_224.npz")
    assert_names(error, "dermamnist", f"missing: {tmp_path / 'dermamnist_224.npz'}\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_labels": None}, "val_labels"),
        ({"test_labels": np.array([[5], [7]])}, "labels from 0 to 6"),
        ({"val_labels": np.array([[4], [4]])}, "6 images, but 7 labels"),
        ({"val_images": np.zeros((1, 28, 28, 3), np.float32)}, "must be uint8"),
        ({"val_images": np.zeros((1, 28), np.uint8)}, "must be uint8"),
        ({"val_images": np.array([None])}, "not MedMNIST's arrays"),
    ],
)
def test_dermamnist_with_malformed_arrays(changes, message, tmp_path):
    write_dermamnist(tmp_path / "dermamnist.npz", **changes)
    with pytest.raises(MalformedData, match=message):
        load("dermamnist", tmp_path)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "one array", "bytes inside"])
def test_dermamnist_of_an_unfinished_download(damage, tmp_path):
    path = tmp_path / "dermamnist.npz"
    write_dermamnist(path)
    content = path.read_bytes()
    if damage == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        inside = content[:2000] + bytes(500) + content[2500:]
        changed = {"half": content[: len(content) // 2], "empty": b"", "text": b"<html>", "bytes inside": inside}
        path.write_bytes(changed[damage])
    with pytest.raises(MalformedData, match=r"dermamnist\.npz"):
        load("dermamnist", tmp_path)


# ----------------------------------------------------------------------------------------------------------- HAM10000

HAM10000_HEADER = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
HAM10000_ROWS = (
    ("HAM_0000118", "ISIC_0027419", "bkl", "histo", "80.0", "male", "scalp"),
    ("HAM_0002730", "ISIC_0026769", "nv", "follow_up", "", "unknown", "back"),
    ("HAM_0000118", "ISIC_0025030", "bkl", "histo", "80.0", "male", "scalp"),
    ("HAM_0001466", "ISIC_0031633", "akiec", "histo", "75.0", "male", "ear"),
)


def write_ham10000(folder: Path, sheet: str = "HAM10000_metadata.csv", delimiter: str = ",") -> None:
    write_sheet(folder / sheet, HAM10000_HEADER, *HAM10000_ROWS, delimiter=delimiter)
    write_image(folder / "HAM10000_images_part_1" / "ISIC_0026769.jpg", GREEN)
    write_image(folder / "HAM10000_images_part_1" / "ISIC_0025030.jpg", BLUE)
    write_image(folder / "HAM10000_images_part_2" / "ISIC_0027419.jpg", RED)
    write_image(folder / "HAM10000_images_part_2" / "ISIC_0031633.jpg", GREY)


@pytest.mark.parametrize(
    ("sheet", "delimiter"),
    [("HAM10000_metadata.csv", ","), ("HAM10000_metadata", ","), ("HAM10000_metadata.tab", "\t")],
)
def test_ham10000(sheet, delimiter, tmp_path):
    write_ham10000(tmp_path, sheet, delimiter)
    dataset = load("ham10000", tmp_path)
    assert class_of_each(dataset) == ["bkl", "nv", "bkl", "akiec"]
    assert dataset.class_names == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    assert colors(dataset) == [RED, GREEN, BLUE, GREY]
    assert dataset.read(0).mode == "RGB"
    assert dataset.groups.tolist() == [0, 1, 0, 2] and dataset.is_test is None


def test_ham10000_with_images_beside_the_sheet(tmp_path):
    write_ham10000(tmp_path)
    for part in ("HAM10000_images_part_1", "HAM10000_images_part_2"):
        for path in (tmp_path / part).iterdir():
            path.rename(tmp_path / path.name)
    assert colors(load("ham10000", tmp_path)) == [RED, GREEN, BLUE, GREY]


def test_ham10000_with_an_image_missing(tmp_path):
    write_ham10000(tmp_path)
    (tmp_path / "HAM10000_images_part_2" / "ISIC_0031633.jpg").unlink()
    with pytest.raises(MissingData) as error:
        load("ham10000", tmp_path)
    assert_names(error, "ham10000", "ISIC_0031633.jpg, one of 1 images", tmp_path / "HAM10000_images_part_2")


def test_ham10000_with_an_unknown_class(tmp_path):
    write_ham10000(tmp_path)
    write_sheet(tmp_path / "HAM10000_metadata.csv", HAM10000_HEADER, ("HAM_1", "ISIC_0026769", "scc", "", "", "", ""))
    with pytest.raises(MalformedData, match="ISIC_0026769 has the unknown class 'scc'"):
        load("ham10000", tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((("image_id", "dx"), ("ISIC_0026769", "nv")), "no column 'lesion_id'"),
        ((HAM10000_HEADER,), "no lines"),
        ((), "no column"),
    ],
)
def test_ham10000_with_a_malformed_sheet(rows, message, tmp_path):
    write_ham10000(tmp_path)
    write_sheet(tmp_path / "HAM10000_metadata.csv", *rows)
    with pytest.raises(MalformedData, match=message):
        load("ham10000", tmp_path)


@pytest.mark.parametrize(
    ("images", "suffix"),
    [
        ("HAM10000_images", "jpg"),
        ("ham10000_images_part_1", "jpg"),
        ("all images", "JPG"),
        ("archive/ham10000_images_part_1", "jpg"),
        (".", "JPG"),
    ],
)
def test_ham10000_with_its_images_in_another_folder(images, suffix, tmp_path):
    write_sheet(tmp_path / "HAM10000_metadata.csv", HAM10000_HEADER, *HAM10000_ROWS)
    for name, color in (("0026769", GREEN), ("0025030", BLUE), ("0027419", RED), ("0031633", GREY)):
        write_image(tmp_path / images / f"ISIC_{name}.{suffix}", color)
        write_image(tmp_path / "__MACOSX" / images / f"ISIC_{name}.{suffix}", GREY)
    assert colors(load("ham10000", tmp_path)) == [RED, GREEN, BLUE, GREY]


def test_ham10000_with_an_image_in_two_other_folders(tmp_path):
    write_ham10000(tmp_path)
    (tmp_path / "HAM10000_images_part_1").rename(tmp_path / "small")
    write_image(tmp_path / "large" / "ISIC_0026769.jpg", RED)
    with pytest.raises(MalformedData, match=r"ISIC_0026769\.jpg is in several places.*large.*small"):
        load("ham10000", tmp_path)


def test_ham10000_with_its_sheet_in_lower_case(tmp_path):
    write_ham10000(tmp_path, "ham10000_metadata.CSV")
    assert class_of_each(load("ham10000", tmp_path)) == ["bkl", "nv", "bkl", "akiec"]


@pytest.mark.parametrize("empty", ["", " ", "nan", "None"])
def test_ham10000_with_images_without_a_lesion(empty, tmp_path):
    write_ham10000(tmp_path)
    rows = [(empty if i in (1, 3) else row[0], *row[1:]) for i, row in enumerate(HAM10000_ROWS)]
    write_sheet(tmp_path / "HAM10000_metadata.csv", HAM10000_HEADER, *rows)
    assert load("ham10000", tmp_path).groups.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("changed", [{"dx": "mel"}, {"lesion_id": "HAM_0000001"}, {"lesion_id": ""}])
def test_ham10000_with_an_image_under_two_classes_or_lesions(changed, tmp_path):
    write_ham10000(tmp_path)
    row = dict(zip(HAM10000_HEADER, HAM10000_ROWS[1], strict=True)) | changed
    write_sheet(tmp_path / "HAM10000_metadata.csv", HAM10000_HEADER, *HAM10000_ROWS, tuple(row.values()))
    with pytest.raises(MalformedData) as error:
        load("ham10000", tmp_path)
    assert "1 image listed with more than one class or lesion" in str(error.value)
    assert "ISIC_0026769: 'mel' of" in str(error.value) or "ISIC_0026769: 'nv' of" in str(error.value)


def test_ham10000_with_a_line_twice_has_the_image_once(tmp_path):
    write_ham10000(tmp_path)
    write_sheet(tmp_path / "HAM10000_metadata.csv", HAM10000_HEADER, *HAM10000_ROWS, HAM10000_ROWS[0], HAM10000_ROWS[1])
    dataset = load("ham10000", tmp_path)
    assert colors(dataset) == [RED, GREEN, BLUE, GREY] and dataset.groups.tolist() == [0, 1, 0, 2]
    assert "2 lines left out" in dataset.notices[0] and "ISIC_0027419, ISIC_0026769" in dataset.notices[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_sheet_as_programs_write_it(encoding, delimiter, end, tmp_path):
    write_ham10000(tmp_path)
    rows = [HAM10000_HEADER, *(tuple(f" {cell}" for cell in (*row[:6], "rücken")) for row in HAM10000_ROWS), ("",) * 7]
    text = end.join(delimiter.join(row) for row in rows) + end
    (tmp_path / "HAM10000_metadata.csv").write_bytes(text.encode(encoding))
    dataset = load("ham10000", tmp_path)
    assert colors(dataset) == [RED, GREEN, BLUE, GREY] and dataset.groups.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: content.rindex(b"ISIC_0031633") + 14], "has the unknown class"),
        (lambda content: content[: content.rindex(b"histo") - 3], "ISIC_0031633 has the unknown class 'aki"),
        (lambda content: content.replace(b"back", b'"back'), "unexpected end of data"),
        (lambda content: content.replace(b"back", b"back, left, above"), "line 3 has 9 cells, and the header 7"),
        (lambda content: content.replace(b"dx_type", b"dx"), "'dx' is there twice"),
        (lambda content: bytes(200), "zero bytes"),
        (lambda content: content.decode().encode("utf-16")[:-1], "cut off or damaged"),
        (lambda content: b"PK\x03\x04" + content, "a workbook or archive"),
        (lambda content: b"", "no column 'lesion_id'"),
        (lambda content: content[: content.index(b"\n")], "no lines"),
    ],
)
def test_a_damaged_sheet_is_a_clear_error(damage, message, tmp_path):
    write_ham10000(tmp_path)
    sheet = tmp_path / "HAM10000_metadata.csv"
    sheet.write_bytes(damage(sheet.read_bytes()))
    with pytest.raises(MalformedData) as error:
        load("ham10000", tmp_path)
    assert message in str(error.value) and str(sheet) in str(error.value)


# ---------------------------------------------------------------------------------------------------------- ISIC 2019

ISIC2019_HEADER = ("image", "MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
ISIC2019_SHEET = "ISIC_2019_Training_GroundTruth.csv"
ISIC2019_IMAGES = {
    "ISIC_0000000": RED,
    "ISIC_0000016_downsampled": GREEN,  # a part of the published names end so
    "ISIC_0026769": BLUE,
    "ISIC_0053453": GREY,
}


def one_hot(image: str, *classes: str) -> tuple[str, ...]:
    return (image, *("1.0" if name in classes else "0.0" for name in ISIC2019_HEADER[1:]))


def write_isic2019(folder: Path, images: str = "ISIC_2019_Training_Input") -> None:
    classes = ("NV", "MEL", "NV", "SCC")
    rows = [one_hot(image, name) for image, name in zip(ISIC2019_IMAGES, classes, strict=True)]
    write_sheet(folder / ISIC2019_SHEET, ISIC2019_HEADER, *rows)
    for image, color in ISIC2019_IMAGES.items():
        write_image(folder / images / f"{image}.jpg", color)


@pytest.mark.parametrize("images", ["ISIC_2019_Training_Input", "ISIC_2019_Training_Input/ISIC_2019_Training_Input"])
def test_isic2019_leaves_out_classes_without_images(images, tmp_path):
    write_isic2019(tmp_path, images)
    dataset = load("isic2019", tmp_path)
    assert dataset.class_names == ("MEL", "NV", "SCC")
    assert dataset.labels.tolist() == [1, 0, 1, 2] and class_of_each(dataset) == ["NV", "MEL", "NV", "SCC"]
    assert colors(dataset) == [RED, GREEN, BLUE, GREY]
    assert dataset.read(0).mode == "RGB" and dataset.groups is None


def test_isic2019_groups_the_images_of_a_lesion(tmp_path):
    write_isic2019(tmp_path)
    write_sheet(
        tmp_path / "ISIC_2019_Training_Metadata.csv",
        ("image", "age_approx", "anatom_site_general", "lesion_id", "sex"),
        ("ISIC_0053453", "55.0", "anterior torso", "BCN_0003925", "female"),
        ("ISIC_0026769", "30.0", "", "", "female"),
        ("ISIC_0000016_downsampled", "", "upper extremity", "", ""),
        ("ISIC_0000000", "55.0", "anterior torso", "BCN_0003925", "female"),
    )
    assert load("isic2019", tmp_path).groups.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "row",
    [
        one_hot("ISIC_0000000"),
        one_hot("ISIC_0000000", "NV", "MEL"),
        ("ISIC_0000000", "0.5", "0.5", *["0.0"] * 7),
        ("ISIC_0000000", "1.0"),
        ("ISIC_0000000", "MEL", *["0.0"] * 8),
    ],
    ids=["no 1", "two 1s", "no whole number", "too short", "text"],
)
def test_isic2019_with_a_malformed_label(row, tmp_path):
    write_isic2019(tmp_path)
    write_sheet(tmp_path / ISIC2019_SHEET, ISIC2019_HEADER, one_hot("ISIC_0026769", "NV"), row)
    with pytest.raises(MalformedData, match="ISIC_0000000 needs a 1 for one class and 0 for the others"):
        load("isic2019", tmp_path)


def test_isic2019_with_an_image_missing(tmp_path):
    write_isic2019(tmp_path)
    (tmp_path / "ISIC_2019_Training_Input" / "ISIC_0026769.jpg").unlink()
    with pytest.raises(MissingData) as error:
        load("isic2019", tmp_path)
    assert_names(error, "isic2019", "ISIC_0026769.jpg", tmp_path / "ISIC_2019_Training_Input")


def test_isic2019_with_an_image_under_two_classes_or_lesions_or_twice(tmp_path):
    write_isic2019(tmp_path)
    rows = [one_hot(image, name) for image, name in zip(ISIC2019_IMAGES, ("NV", "MEL", "NV", "SCC"), strict=True)]
    write_sheet(tmp_path / ISIC2019_SHEET, ISIC2019_HEADER, *rows, rows[3])
    dataset = load("isic2019", tmp_path)
    assert colors(dataset) == [RED, GREEN, BLUE, GREY] and "ISIC_0053453" in dataset.notices[0]
    lesions = tmp_path / "ISIC_2019_Training_Metadata.csv"
    write_sheet(lesions, ("image", "lesion_id"), ("ISIC_0000000", "A"), ("ISIC_0000000", "A"), ("ISIC_0053453", "nan"))
    assert load("isic2019", tmp_path).groups.tolist() == [0, 1, 2, 3]
    write_sheet(lesions, ("image", "lesion_id"), ("ISIC_0000000", "A"), ("ISIC_0000000", "B"))
    with pytest.raises(MalformedData, match=r"(?s)Metadata.*more than one lesion.*ISIC_0000000: 'A', 'B'"):
        load("isic2019", tmp_path)
    write_sheet(tmp_path / ISIC2019_SHEET, ISIC2019_HEADER, *rows, one_hot("ISIC_0053453", "NV"))
    with pytest.raises(MalformedData, match=r"(?s)GroundTruth.*more than one class.*ISIC_0053453: 'NV', 'SCC'"):
        load("isic2019", tmp_path)


@pytest.mark.parametrize(("images", "suffix"), [("train", "jpg"), ("isic_2019_training_input", "JPG")])
def test_isic2019_with_its_images_in_another_folder(images, suffix, tmp_path):
    write_isic2019(tmp_path, images)
    for path in list((tmp_path / images).iterdir()):
        path.rename(path.with_suffix(f".{suffix}"))
    assert colors(load("isic2019", tmp_path)) == [RED, GREEN, BLUE, GREY]


# ------------------------------------------------------------------------------------------------------------ ODIR-5K

ODIR5K_PATIENT = ("ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus")
ODIR5K_PATIENT += ("Left-Diagnostic Keywords", "Right-Diagnostic Keywords", *"NDGCAHMO")
ODIR5K_EYE = (*ODIR5K_PATIENT, "filepath", "labels", "target", "filename")


def patient(number: int, left: str, right: str, diseases: str) -> tuple[object, ...]:
    flags = (int(name in diseases) for name in "NDGCAHMO")
    return (number, 60, "Female", f"{number}_left.jpg", f"{number}_right.jpg", left, right, *flags)


def eye(number: int, side: str, label: str, patient_label: str = "C") -> tuple[object, ...]:
    name = f"{number}_{side}.jpg"
    target = str([int(label == f"['{other}']") for other in "NDGCAHMO"])
    return (*patient(number, "cataract", "normal fundus", patient_label), f"../input/{name}", label, target, name)


def write_full_df(folder: Path, *eyes: tuple[object, ...]) -> None:
    write_sheet(folder / "full_df.csv", ODIR5K_EYE, *eyes)


def test_odir5k_takes_the_label_of_the_eye_from_kaggles_sheet(tmp_path):
    write_full_df(tmp_path, eye(0, "right", "['N']"), eye(4690, "left", "['O']"), eye(0, "left", "['C']"))
    write_image(tmp_path / "preprocessed_images" / "0_right.jpg", RED)
    write_image(tmp_path / "preprocessed_images" / "4690_left.jpg", GREEN)
    write_image(tmp_path / "ODIR-5K" / "ODIR-5K" / "Training Images" / "0_left.jpg", BLUE)
    write_image(tmp_path / "ODIR-5K" / "ODIR-5K" / "Training Images" / "0_right.jpg", GREY)  # the raw one comes second
    dataset = load("odir5k", tmp_path)
    assert dataset.class_names == ("N", "D", "G", "C", "A", "H", "M", "O")
    assert class_of_each(dataset) == ["N", "O", "C"] and dataset.groups.tolist() == [0, 1, 0]
    assert colors(dataset) == [RED, GREEN, BLUE]
    assert dataset.read(0).mode == "RGB"


@pytest.mark.parametrize("label", ["[]", "['N', 'D']", "['X']", "N", "", "['N'"])
def test_odir5k_with_a_malformed_label(label, tmp_path):
    write_full_df(tmp_path, eye(0, "left", "['C']"), eye(7, "left", label))
    with pytest.raises(MalformedData, match=r"full_df\.csv: 7_left\.jpg needs a list of one class"):
        load("odir5k", tmp_path)


def test_odir5k_with_an_image_missing(tmp_path):
    write_full_df(tmp_path, eye(0, "left", "['C']"), eye(1, "left", "['N']"))
    write_image(tmp_path / "preprocessed_images" / "0_left.jpg", RED)
    with pytest.raises(MissingData) as error:
        load("odir5k", tmp_path)
    assert_names(error, "odir5k", "1_left.jpg", tmp_path / "full_df.csv", tmp_path / "preprocessed_images")


def write_workbook(path: Path, *rows: Sequence[object]) -> None:
    workbook = Workbook()
    for row in rows:
        workbook.active.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    workbook.save(path)


@pytest.mark.parametrize(
    ("sheet", "images"),
    [
        ("ODIR-5K_Training_Annotations(Updated)_V2.xlsx", "ODIR-5K_Training_Images/ODIR-5K_Training_Dataset"),
        ("ODIR-5K/ODIR-5K/data.xlsx", "ODIR-5K/ODIR-5K/Training Images"),
    ],
)
def test_odir5k_takes_the_label_of_the_eye_from_its_keywords_in_the_challenges_sheet(sheet, images, tmp_path):
    write_workbook(
        tmp_path / sheet,
        ODIR5K_PATIENT,
        patient(0, "cataract", "normal fundus", "C"),
        patient(2, "laser spot，moderate non proliferative retinopathy", "lens dust，drusen", "DO"),
        patient(14, "anterior segment image", "low image quality,hypertensive retinopathy", "H"),
    )
    for name, color in (("0_left", RED), ("0_right", GREEN), ("2_right", BLUE), ("14_right", GREY)):
        write_image(tmp_path / images / f"{name}.jpg", color)
    dataset = load("odir5k", tmp_path)  # without 2_left, of two classes, and 14_left, of none
    assert class_of_each(dataset) == ["C", "N", "O", "H"]
    assert colors(dataset) == [RED, GREEN, BLUE, GREY]
    assert dataset.groups.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("keywords", "class_name"),
    [
        ("lens dust，normal fundus", "N"),
        ("mild nonproliferative retinopathy", "D"),
        ("severe proliferative diabetic retinopathy", "D"),
        ("suspected glaucoma", "G"),
        ("Cataract", "C"),
        ("wet age-related macular degeneration", "A"),
        ("hypertensive retinopathy", "H"),
        ("pathological myopia，myopic maculopathy", "M"),
        ("central serous chorioretinopathy", "O"),
        ("maculopathy", "O"),
    ],
)
def test_odir5k_knows_the_keywords(keywords, class_name, tmp_path):
    write_workbook(tmp_path / "data.xlsx", ODIR5K_PATIENT, patient(1, keywords, "no fundus image", class_name))
    write_image(tmp_path / "Training Images" / "1_left.jpg", RED)
    assert class_of_each(load("odir5k", tmp_path)) == [class_name]


def test_odir5k_with_a_malformed_workbook(tmp_path):
    write_workbook(tmp_path / "data.xlsx", ODIR5K_PATIENT[:5], patient(0, "", "", "")[:5])
    with pytest.raises(MalformedData, match="no column 'Left-Diagnostic Keywords'"):
        load("odir5k", tmp_path)
    write_workbook(tmp_path / "data.xlsx", ODIR5K_PATIENT, patient(0, "no fundus image", "", ""))
    with pytest.raises(MalformedData, match="no eye with diagnostic keywords of one class"):
        load("odir5k", tmp_path)


def test_odir5k_says_what_reads_its_workbook(tmp_path, monkeypatch):
    (tmp_path / "data.xlsx").touch()
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingData, match="the package openpyxl"):
        load("odir5k", tmp_path)


def write_bare_workbook(path: Path, dimension: str, *rows: Sequence[object]) -> None:
    """As other programs write it: cells with their text in them, none where there is nothing, and this dimension."""
    write_workbook(path, *rows)
    lines = "".join(
        f'<row r="{i}">{"".join(_cell(i, j, value) for j, value in enumerate(row) if value not in (None, ""))}</row>'
        for i, row in enumerate(rows, 1)
    )
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    sheet = files["xl/worksheets/sheet1.xml"].decode()
    sheet = re.sub(r"<sheetData.*</sheetData>", lambda _: f"<sheetData>{lines}</sheetData>", sheet, flags=re.DOTALL)
    files["xl/worksheets/sheet1.xml"] = re.sub(r"<dimension[^>]*/>", dimension, sheet).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def _cell(i: int, j: int, value: object) -> str:
    column = chr(ord("A") + j)
    return f'<c r="{column}{i}" t="inlineStr"><is><t>{value}</t></is></c>'


@pytest.mark.parametrize(
    "dimension", ["", '<dimension ref="A1"/>', '<dimension ref="A1:C2"/>', '<dimension ref="A1:ZZ99"/>']
)
def test_odir5k_of_a_workbook_by_another_program(dimension, tmp_path):
    rows = [("ID", "Left-Fundus", "Right-Fundus", "Left-Diagnostic Keywords", "Right-Diagnostic Keywords", "N", "note")]
    rows += [(0, "0_left.jpg", "0_right.jpg", "cataract", "normal fundus", 1), ()]
    rows += [(4, "4_left.jpg", "4_right.jpg", "glaucoma"), (" 5 ", "", "5_right.jpg", "", "drusen ", "", "x")]
    write_bare_workbook(tmp_path / "data.xlsx", dimension, *rows)
    for name, color in (("0_left", RED), ("0_right", GREEN), ("4_left", BLUE), ("5_right", GREY)):
        write_image(tmp_path / "Training Images" / f"{name}.jpg", color)
    dataset = load("odir5k", tmp_path)
    assert class_of_each(dataset) == ["C", "N", "G", "O"] and dataset.groups.tolist() == [0, 0, 1, 2]
    assert colors(dataset) == [RED, GREEN, BLUE, GREY]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "not a whole workbook"),
        (lambda content: content[:-10], "not a whole workbook"),
        (lambda content: b"", "not a whole workbook"),
        (lambda content: b"ID,Left-Fundus\n", "not a whole workbook"),
        (lambda content: content[:300] + bytes(100) + content[400:], "not a whole workbook"),
    ],
)
def test_odir5k_of_a_damaged_workbook(damage, message, tmp_path):
    path = tmp_path / "data.xlsx"
    write_workbook(path, ODIR5K_PATIENT, patient(0, "cataract", "normal fundus", "C"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MalformedData) as error:
        load("odir5k", tmp_path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"), [((), "no column 'ID'"), ((ODIR5K_PATIENT,), "no lines after the header")]
)
def test_odir5k_of_an_empty_workbook(rows, message, tmp_path):
    write_workbook(tmp_path / "data.xlsx", *rows)
    with pytest.raises(MalformedData, match=message):
        load("odir5k", tmp_path)


def test_odir5k_with_a_line_twice(tmp_path):
    for name in ("0_left", "0_right"):
        write_image(tmp_path / "Training Images" / f"{name}.jpg", RED if name == "0_left" else GREEN)
    first = patient(0, "cataract", "normal fundus", "C")
    write_workbook(tmp_path / "data.xlsx", ODIR5K_PATIENT, first, first)
    dataset = load("odir5k", tmp_path)
    assert colors(dataset) == [RED, GREEN] and "2 lines left out" in dataset.notices[0]
    write_workbook(tmp_path / "data.xlsx", ODIR5K_PATIENT, first, patient(0, "glaucoma", "normal fundus", "G"))
    with pytest.raises(MalformedData, match=r"(?s)more than one class or patient.*0_left\.jpg: 'C' of '0', 'G' of '0'"):
        load("odir5k", tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_odir5k_of_kaggles_sheet_saved_by_excel(encoding, tmp_path):
    write_full_df(tmp_path, eye(0, "right", "['N']"), eye(0, "left", "['C']"))
    sheet = tmp_path / "full_df.csv"
    sheet.write_bytes(sheet.read_text().replace("cataract", "cataract，drusen").encode(encoding))
    write_image(tmp_path / "preprocessed_images" / "0_right.jpg", RED)
    write_image(tmp_path / "preprocessed_images" / "0_left.jpg", GREEN)
    dataset = load("odir5k", tmp_path)
    assert (
        class_of_each(dataset) == ["N", "C"] and colors(dataset) == [RED, GREEN] and dataset.groups.tolist() == [0, 0]
    )


def test_odir5k_without_a_patients_number(tmp_path):
    rows = [("", *eye(0, "right", "['N']")[1:]), ("", *eye(0, "left", "['C']")[1:])]
    write_full_df(tmp_path, *rows)
    write_image(tmp_path / "preprocessed_images" / "0_right.jpg", RED)
    write_image(tmp_path / "preprocessed_images" / "0_left.jpg", GREEN)
    assert load("odir5k", tmp_path).groups.tolist() == [0, 1]
