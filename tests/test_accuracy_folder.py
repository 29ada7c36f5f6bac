"""Promise: a folder of one's own images is taken in each usual layout, or said to be in none, with what was found."""

import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_accuracy_data import BLUE, GREEN, RED, assert_names, class_of_each, colors, write_image

from benchmarks.accuracy import __main__ as experiment
from benchmarks.accuracy import command
from benchmarks.accuracy.data import Dataset, MalformedData, MissingData, load
from benchmarks.accuracy.layout import LAYOUTS

REFUSED = (MissingData, MalformedData)


def write(root: Path, *names: str) -> Path:
    """An image of another colour at each of these paths; a path that ends with a slash is an empty folder."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            number = sum(1 for _ in root.rglob("*"))
            write_image(root / name, (number, 5 * number % 256, 100))
    return root


def images_of(dataset: Dataset, root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in dataset.class_names}
    for name, path in zip(class_of_each(dataset), dataset.files, strict=True):
        found[name].append(path.relative_to(root).as_posix())
    return found


def refusal(root: Path) -> str:
    with pytest.raises(REFUSED) as error:
        load("folder", root)
    assert LAYOUTS in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------ layouts


def test_a_folder_of_classes(tmp_path):
    write_image(tmp_path / "tail" / "b.JPG", GREEN)
    write_image(tmp_path / "tail" / "a.png", RED)
    write_image(tmp_path / "head" / "c.jpeg", BLUE)
    (tmp_path / "head" / "notes.txt").write_text("not an image")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "README.md").write_text("not a class")
    dataset = load("folder", tmp_path)
    assert dataset.class_names == ("head", "tail") and dataset.labels.tolist() == [0, 1, 1]
    assert colors(dataset) == [BLUE, RED, GREEN]
    assert {dataset.read(i).mode for i in range(3)} == {"RGB"}
    assert dataset.notices == () and dataset.groups is None and dataset.groups_given is False


def test_images_in_folders_within_a_class_are_of_the_class_and_so_are_those_beside_them(tmp_path):
    write(tmp_path, "nv/2019/a.png", "nv/2019/deep/er/b.png", "nv/c.png", "mel/a.png")
    dataset = load("folder", tmp_path)
    assert images_of(dataset, tmp_path) == {
        "mel": ["mel/a.png"],
        "nv": ["nv/2019/a.png", "nv/2019/deep/er/b.png", "nv/c.png"],
    }
    (notice,) = dataset.notices
    assert "2 images in folders within those of the classes, taken into these: nv/2019" in notice and "groups" in notice


@pytest.mark.parametrize(
    "parts", [("train", "val", "test"), ("training", "validation", "testing"), ("Train", "Test"), ("TRAIN", "valid")]
)
def test_parts_are_put_together(parts, tmp_path):
    for part in parts:
        write(tmp_path, f"{part}/nv/a.png", f"{part}/mel/a.png")  # the same names in each
    write(tmp_path, f"{parts[0]}/bcc/b.png")  # a class that the others do not have
    dataset = load("folder", tmp_path)
    assert images_of(dataset, tmp_path) == {
        "bcc": [f"{parts[0]}/bcc/b.png"],
        "mel": [f"{part}/mel/a.png" for part in sorted(parts)],
        "nv": [f"{part}/nv/a.png" for part in sorted(parts)],
    }
    (notice,) = dataset.notices
    assert f"{parts[0]} (3)" in notice and f"{parts[1]} (2)" in notice and "own split" in notice


def test_a_loose_image_beside_classes_is_named_in_whatever_folder_they_lie(tmp_path):
    for outer in "", "archive/", "archive/data/":
        write(tmp_path / outer.replace("/", "-"), *(f"{outer}{name}.png" for name in ("nv/a", "mel/b", "loose")))
        assert "1 image (loose.png) beside the folders of the classes" in refusal(tmp_path / outer.replace("/", "-"))


def test_a_part_without_images_is_said_to_be_so(tmp_path):
    write(tmp_path, "train/nv/a.png", "train/mel/a.png", "val/")
    (notice,) = load("folder", tmp_path).notices
    assert "train (2), val (0)" in notice


@pytest.mark.parametrize("outer", ["archive", "archive/skin lesions", "train", "archive/train"])
@pytest.mark.parametrize("inner", ["", "train/", "test/"])
def test_folders_around_the_classes_are_passed(outer, inner, tmp_path):
    names = [f"{outer}/{inner}nv/a.png", f"{outer}/{inner}mel/sub/a.png"]
    if inner:
        names.append(f"{outer}/val/mel/a.png")
    dataset = load("folder", write(tmp_path, *names, "__MACOSX/._nv/"))
    assert dataset.class_names == ("mel", "nv") and len(dataset) == len(names)
    assert (
        dataset.notices[0] == f"Note: the classes are the folders in {outer}."
        if not inner
        else outer in str(dataset.notices)
    )


def test_classes_may_be_called_as_parts_are(tmp_path):
    dataset = load("folder", write(tmp_path, "car/a.png", "bus/b.png", "train/c.png"))
    assert dataset.class_names == ("bus", "car", "train") and dataset.notices == ()
    dataset = load("folder", write(tmp_path / "2", "control/a.png", "test/b.png"))
    assert dataset.class_names == ("control", "test")


def test_parts_within_the_classes(tmp_path):
    dataset = load("folder", write(tmp_path, *(f"{c}/{p}/a.png" for c in ("nv", "mel") for p in ("train", "test"))))
    assert dataset.class_names == ("mel", "nv") and len(dataset) == 4


def test_what_no_person_put_there_is_no_image_and_no_class(tmp_path):
    write(tmp_path, "nv/a.png", "mel/b.png", "nv/._a.png", "__MACOSX/nv/._a.png", "__MACOSX/nv/a.png", ".hidden/a.png")
    write(tmp_path, "nv/.thumbs/a.png", "nv/__MACOSX/c.png", "@eaDir/nv/a.png", "nv/@eaDir/a.png")
    for name in ("nv/.DS_Store", ".DS_Store", "nv/Thumbs.db", "nv/desktop.ini"):
        (tmp_path / name).touch()
    dataset = load("folder", tmp_path)
    assert images_of(dataset, tmp_path) == {"mel": ["mel/b.png"], "nv": ["nv/a.png"]} and dataset.notices == ()


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif"])
def test_suffixes_that_are_taken(suffix, tmp_path):
    write(tmp_path, f"nv/a{suffix}", f"nv/b{suffix.upper()}", "mel/c.TIFF", "mel/d.webp", "mel/e f ü.png")
    dataset = load("folder", tmp_path)
    assert len(dataset) == 5 and dataset.notices == ()
    assert {dataset.read(i).mode for i in range(5)} == {"RGB"}


def test_files_that_may_be_images_of_another_kind_are_not_left_out_without_a_word(tmp_path):
    write(tmp_path, "nv/a.png", "mel/b.png")
    for name in (
        "nv/c.heic",
        "mel/sub/d.HEIC",
        "nv/IM0001",
        "nv/e.dcm",
        "f.nii.gz",
        "LICENSE",
        "nv/label.txt",
        "x.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    notice, on_table = load("folder", tmp_path).notices
    assert "not read: x.csv" in on_table and "groups.csv" in on_table
    for words in ("2 .heic (mel/sub/d.HEIC)", "2 without a suffix (LICENSE)", "1 .dcm (nv/e.dcm)", "1 .gz (f.nii.gz)"):
        assert words in notice
    assert ".txt" not in notice and ".csv" not in notice and ".webp" in notice  # the last, of what is taken


# ----------------------------------------------------------------------------------------------------------- refusals


def test_images_without_folders_of_classes(tmp_path):
    message = refusal(write(tmp_path, "a.png", "b.png"))
    assert f"{tmp_path} has 2 images and no folders for classes" in message


def test_images_beside_the_folders_of_classes(tmp_path):
    message = refusal(write(tmp_path, "a.png", "nv/a.png", "mel/a.png"))
    assert "1 image (a.png) beside the folders of the classes" in message


@pytest.mark.parametrize("outer", ["", "archive/"])
def test_a_class_without_images(outer, tmp_path):
    write(tmp_path, f"{outer}head/a.jpg", f"{outer}tail/", f"{outer}other/sub/")
    with pytest.raises(MissingData) as error:
        load("folder", tmp_path)
    assert_names(error, "folder", tmp_path / outer / "tail", "no image", "tail is empty", "other is empty")


def test_a_class_with_files_of_another_kind_alone(tmp_path):
    write(tmp_path, "nv/a.png", "mel/")
    for name in ("1.heic", "2.heic", "list.txt"):
        (tmp_path / "mel" / name).touch()
    message = refusal(tmp_path)
    assert "mel has only 2 .heic (1.heic), 1 .txt (list.txt)" in message and ".jpeg" in message


def test_one_folder_with_the_classes_beside_one_with_none(tmp_path):
    message = refusal(write(tmp_path, "images/nv/a.png", "images/mel/b.png", "annotations/"))
    assert (
        "annotations is empty" in message and "give that as --data" in message and str(tmp_path / "images") in message
    )


@pytest.mark.parametrize("names", [("nv/a.png",), ("archive/nv/a.png", "archive/nv/b.png"), ("train/nv/a.png",)])
def test_one_class_alone(names, tmp_path):
    assert "one class only, nv" in refusal(write(tmp_path, *names))


def test_parts_without_classes(tmp_path):
    message = refusal(write(tmp_path, "train/a.png", "test/b.png"))
    assert "images that are in no folder of a class: 1 in test, 1 in train" in message


def test_a_part_without_classes_beside_one_with_them(tmp_path):
    message = refusal(write(tmp_path, "train/nv/a.png", "train/mel/a.png", "test/1.png", "test/2.png"))
    assert "no folder of a class: 2 in test" in message


def test_parts_beside_classes(tmp_path):
    message = refusal(write(tmp_path, "train/nv/a.png", "train/mel/a.png", "nv/a.png"))
    assert "train with folders in them" in message and "nv, as if those were classes" in message


def test_empty_parts(tmp_path):
    message = refusal(write(tmp_path, "train/nv/", "test/"))
    assert "missing: images" in message and f"{tmp_path / 'train'} is empty" in message


@pytest.mark.parametrize(
    "names",
    [
        ("site A/nv/1.png", "site A/mel/1.png", "site B/nv/1.png", "site B/mel/1.png"),
        ("fold 1/nv/1.png", "fold 1/mel/1.png", "fold 2/nv/1.png", "fold 2/mel/1.png", "fold 2/bcc/1.png"),
        ("8863/0/1.png", "8864/0/1.png", "8864/1/1.png", "8865/1/1.png"),  # a patient's folders of two classes
        ("nv/left/1.png", "nv/right/1.png", "mel/left/1.png", "mel/right/1.png"),
    ],
)
@pytest.mark.parametrize("outer", ["", "archive/"])
def test_folders_that_can_be_read_in_two_ways(names, outer, tmp_path):
    message = refusal(write(tmp_path, *(outer + name for name in names)))
    assert "either may be the classes" in message
    for name in names[0].split("/")[:2]:
        assert name in message
    # What the message says to do for the first reading.
    (tmp_path / outer / "train").mkdir()
    for folder in {name.split("/")[0] for name in names}:
        (tmp_path / outer / folder).rename(tmp_path / outer / "train" / folder)
    assert set(load("folder", tmp_path).class_names) == {name.split("/")[0] for name in names}


@pytest.mark.parametrize("names", [("p1", "p2", "p3", "p4"), ("p1", "p2", "p3", "p1")])
def test_folders_of_patients_within_classes(names, tmp_path):
    a, b, c, d = names
    dataset = load("folder", write(tmp_path, f"nv/{a}/1.png", f"nv/{b}/1.png", f"mel/{c}/1.png", f"mel/{d}/1.png"))
    assert dataset.class_names == ("mel", "nv")
    assert "a table of groups must say" in str(dataset.notices)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Nevus", "nevus"), ("nevus", "nevus "), ("Bösartig", unicodedata.normalize("NFD", "Bösartig"))],
)
@pytest.mark.parametrize("in_parts", [True, False])
def test_classes_whose_names_hardly_differ(one, other, in_parts, tmp_path):
    first, second = ("train/", "test/") if in_parts else ("", "")
    message = refusal(write(tmp_path, f"{first}{one}/a.png", f"{second}{other}/a.png", f"{first}mel/a.png"))
    assert repr(one) in message and repr(other) in message


@pytest.mark.parametrize("kind", ["file", "nothing", "empty", "documents"])
def test_no_folder_or_an_empty_one(kind, tmp_path):
    data = tmp_path / "data"
    if kind == "file":
        data.write_bytes(b"PK")
    elif kind in ("empty", "documents"):
        data.mkdir()
    if kind == "documents":
        (data / "a.heic").touch()
    message = refusal(data)
    assert str(data) in message
    assert {"file": "unpacked", "nothing": "missing", "empty": "is empty", "documents": "1 .heic"}[kind] in message


# -------------------------------------------------------------------------------------------------------------- links


def test_links_to_images_and_folders_are_followed(tmp_path):
    write(tmp_path / "there", "nv/a.png", "b.png")
    data = write(tmp_path / "data", "mel/c.png")
    (data / "nv").symlink_to(tmp_path / "there" / "nv")
    (data / "mel" / "b.png").symlink_to(tmp_path / "there" / "b.png")
    assert images_of(load("folder", data), data) == {"mel": ["mel/b.png", "mel/c.png"], "nv": ["nv/a.png"]}


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_link_in_a_circle_does_not_hang(target, tmp_path):
    data = write(tmp_path / "data", "nv/sub/a.png", "mel/b.png")
    (data / "nv" / "sub" / "loop").symlink_to(target)
    with pytest.raises(MalformedData, match=r"loop\S* leads back to .*in which it lies itself"):
        load("folder", data)


def test_a_folder_that_is_there_twice(tmp_path):
    write(tmp_path, "nv/a.png", "mel/b.png")
    (tmp_path / "current").symlink_to("nv")
    with pytest.raises(MalformedData, match=r"nv and \S*current are the same folder"):
        load("folder", tmp_path)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path, "nv/a.png", "mel/b.png")
    iterdir = Path.iterdir

    def denied(path):
        if path.name == "nv":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(MalformedData, match="nv: this folder cannot be read: Permission denied"):
        load("folder", tmp_path)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_what_was_left_out_and_refuses_in_one_message(tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "data", "train/nv/a.png", "test/nv/b.png", "train/mel/c.png")
    (data / "train" / "nv" / "d.heic").touch()
    line = ["accuracy", "--dataset", "folder", "--model", "cnn", "--output", str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", [*line, "--data", str(data)])
    args = experiment.parse_arguments()
    dataset, _ = command.load(args)
    said = capsys.readouterr().err
    assert "put together" in said and "1 .heic" in said and len(dataset) == 3
    write(data, "loose.png")
    with pytest.raises(SystemExit, match="2"):
        command.run(experiment.main)
    captured = capsys.readouterr()
    assert "loose.png" in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not (tmp_path / "output").exists()


def test_help_says_which_layouts_are_taken_and_what_a_group_is_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy", "--help"])
    with pytest.raises(SystemExit, match="0"):
        experiment.parse_arguments()
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert re.sub(r"\s+", " ", LAYOUTS) in text
    assert "images of a patient" in text and "would seem better than it is" in text and "groups.csv" in text


def test_an_image_of_16_bits_is_refused_rather_than_clipped(tmp_path):
    write(tmp_path, "tail/b.png", "head/")
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "head" / "a.png")
    dataset = load("folder", tmp_path)
    with pytest.raises(MalformedData, match=r"a\.png: more than 8 bits"):
        dataset.read(0)
