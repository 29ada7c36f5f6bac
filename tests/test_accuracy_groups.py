"""Promise: images of one patient, and the same image, share a part of every split; a table that fits not is refused."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from openpyxl import Workbook
from test_accuracy_data import write_image, write_sheet
from test_accuracy_fingerprint import write_images

from benchmarks.accuracy import __main__ as experiment
from benchmarks.accuracy import command, compare, fingerprint, splits
from benchmarks.accuracy.data import Dataset, MalformedData, load

IMAGES = ("mel/1.png", "mel/2.png", "mel/x.JPG", "nv/3.png", "nv/4.png", "nv/sub/5.png")
PATIENTS = ("p1", "p2", "", "p1", "", "p2")
GROUPS = [0, 1, 2, 0, 3, 1]


def write(root: Path, *names: str) -> Path:
    for i, name in enumerate(names or IMAGES):
        write_image(root / name, (10 * i, 0, 100))
    return root


def write_table(
    path: Path, images: Sequence[str] = IMAGES, header: Sequence[str] = ("image", "patient"), **options
) -> Path:
    write_sheet(path, header, *zip(images, PATIENTS, strict=True), **options)
    return path


def refusal(data: Path, table: Path | None = None) -> str:
    with pytest.raises(MalformedData) as error:
        load("folder", data, table)
    return str(error.value)


def notice_of(dataset: Dataset, word: str) -> str:
    (notice,) = [notice for notice in dataset.notices if word in notice]
    return notice


# -------------------------------------------------------------------------------------------------------------- tables


def test_a_table_says_which_images_are_of_one_patient(tmp_path):
    data = write(tmp_path / "data")
    dataset = load("folder", data, write_table(tmp_path / "patients.csv"))
    assert [path.relative_to(data).as_posix() for path in dataset.files] == list(IMAGES)
    assert dataset.groups.tolist() == GROUPS and dataset.groups.dtype == np.int64
    assert dataset.groups_given is True
    notice = notice_of(dataset, "patients.csv")
    assert "6 images in 4 groups" in notice and "the largest, 'p1', has 2" in notice


@pytest.mark.parametrize("name", ["groups.csv", "Groups.CSV"])
def test_groups_csv_in_the_folder_is_taken_by_itself(name, tmp_path):
    write_table(write(tmp_path / "data") / name)
    assert load("folder", tmp_path / "data").groups.tolist() == GROUPS
    everyone = write_table(tmp_path / "all.csv")
    everyone.write_text(everyone.read_text().replace("p2", "p1"))
    assert load("folder", tmp_path / "data", everyone).groups.tolist() == [0, 0, 1, 0, 2, 0]


WAYS = {
    "whole path": lambda name: name,
    "file name": lambda name: name.split("/")[-1],
    "without suffix": lambda name: name.split("/")[-1].split(".")[0],
    "path without suffix": lambda name: name.rsplit(".", 1)[0],
    "backslashes": lambda name: name.replace("/", "\\"),
    "from here": lambda name: f"./{name}",
    "with the folder": lambda name: f"data/{name}",
    "in another case": lambda name: name.upper(),
    "with blanks": lambda name: f"  {name} ",
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_name_an_image(way, tmp_path):
    data = write(tmp_path / "data")
    table = write_table(tmp_path / "groups.csv", [WAYS[way](name) for name in IMAGES])
    assert load("folder", data, table).groups.tolist() == GROUPS


def test_absolute_paths(tmp_path, monkeypatch):
    data = write(tmp_path / "data")
    table = write_table(tmp_path / "groups.csv", [str(data / name) for name in IMAGES])
    monkeypatch.chdir(tmp_path)
    assert load("folder", Path("data"), table).groups.tolist() == GROUPS


def test_paths_within_an_outer_folder_and_parts(tmp_path):
    names = ("train/mel/1.png", "train/nv/2.png", "test/mel/1.png", "test/nv/2.png")
    data = write(tmp_path / "data", *(f"archive/{name}" for name in names))
    write_sheet(data / "groups.csv", ("image", "patient"), *zip(names, "abba", strict=True))
    dataset = load("folder", data)
    assert dict(zip((str(p.relative_to(data / "archive")) for p in dataset.files), dataset.groups, strict=True)) == {
        "test/mel/1.png": 0,
        "train/mel/1.png": 1,
        "test/nv/2.png": 1,
        "train/nv/2.png": 0,
    }


@pytest.mark.parametrize(
    "header",
    [None, ("image", "patient"), ("Datei", "Patient"), ("file", "Case"), ("FileName", "Patient_ID"), ("a", "b")],
)
@pytest.mark.parametrize(
    ("encoding", "delimiter"),
    [("utf-8", ","), ("utf-8-sig", ";"), ("utf-16", "\t"), ("utf-16-le", ","), ("utf-16-be", ";"), ("cp1252", ";")],
)
def test_tables_as_programs_write_them(header, encoding, delimiter, tmp_path):
    names = [*IMAGES[:5], "nv/sub/5ü.png"]
    data = write(tmp_path / "data", *names)
    rows = [*([header] if header else []), *zip(names, PATIENTS, strict=True)]
    text = "\r\n".join(delimiter.join(row) for row in rows) + "\r\n\r\n" + delimiter + "\r\n"
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    assert load("folder", data, tmp_path / "t.csv").groups.tolist() == GROUPS


def test_columns_among_others_and_a_workbook(tmp_path):
    data = write(tmp_path / "data")
    rows = [("age", "lesion_id", "patient_id", "image")]
    rows += [
        (50 + i, f"lesion {i}", patient, name) for i, (name, patient) in enumerate(zip(IMAGES, PATIENTS, strict=True))
    ]
    write_sheet(tmp_path / "t.csv", *rows)
    workbook = Workbook()
    for row in rows:
        workbook.active.append(row)
    workbook.save(tmp_path / "t.xlsx")
    for name in ("t.csv", "t.xlsx"):  # a patient may have several lesions: the column of the patients comes first
        assert load("folder", data, tmp_path / name).groups.tolist() == GROUPS


@pytest.mark.parametrize("empty", ["", "nan", "NaN", "None", "null", "N/A", "#N/A"])
def test_an_image_without_a_patient_is_alone(empty, tmp_path):
    data = write(tmp_path / "data")
    write_sheet(tmp_path / "t.csv", ("image", "patient"), *((name, empty) for name in IMAGES))
    assert load("folder", data, tmp_path / "t.csv").groups.tolist() == [0, 1, 2, 3, 4, 5]


def test_images_that_are_not_in_the_table_are_named(tmp_path):
    data = write(tmp_path / "data")
    write_sheet(tmp_path / "t.csv", ("image", "patient"), ("mel/1.png", "a"), ("nv/9.png", "a"), ("3.png", "b"))
    message = refusal(data, tmp_path / "t.csv")
    assert "4 of 6 images are not in it" in message and "an empty group" in message
    for name in (IMAGES[1], IMAGES[2], IMAGES[4], IMAGES[5]):
        assert f"\n  {name}\n" in message
    assert "Lines for which there is no image here: 1 (nv/9.png)" in message.replace("is of", "are of")


def test_a_table_of_other_images_altogether(tmp_path):
    data = write(tmp_path / "data")
    table = write_table(tmp_path / "t.csv", [f"Z:\\study\\{i}.tif" for i in range(10, 16)])
    with pytest.raises(MalformedData, match=r"no line is of an image here\. It has Z:.*; the folder has mel/1\.png"):
        load("folder", data, table)


def test_lines_of_images_that_are_not_there_are_said_to_be_so(tmp_path):
    data = write(tmp_path / "data")
    table = write_table(tmp_path / "t.csv")
    table.write_text(table.read_text() + "nv/9.png,p1\nother/1.png,p7\n")
    dataset = load("folder", data, table)
    assert dataset.groups.tolist() == GROUPS
    assert "Lines for which there is no image here: 2 (nv/9.png, other/1.png)" in notice_of(dataset, "t.csv")


def test_an_image_of_two_patients_is_refused_and_a_line_that_repeats_another_is_not(tmp_path):
    data = write(tmp_path / "data")
    table = write_table(tmp_path / "t.csv")
    text = table.read_text()
    table.write_text(f"{text}1.png,p1\n")
    assert load("folder", data, table).groups.tolist() == GROUPS
    table.write_text(f"{text}mel\\1.png,p2\nnv/4,p9\n")
    message = refusal(data, table)
    assert "2 images listed with more than one group" in message
    assert "mel/1.png: 'p1', 'p2'" in message and "nv/4.png: '', 'p9'" in message


def test_a_name_of_several_images_is_refused(tmp_path):
    data = write(tmp_path / "data", "mel/1.png", "nv/1.png", "nv/2.png", "nv/2.jpg")
    write_sheet(tmp_path / "t.csv", ("image", "patient"), ("1.png", "a"), ("nv/2", "b"), ("2.png", "b"), ("2.jpg", "b"))
    message = refusal(data, tmp_path / "t.csv")
    assert "line 2: 1.png may be mel/1.png, nv/1.png: write its path" in message
    assert "line 3: nv/2 may be nv/2.jpg, nv/2.png" in message
    write_sheet(
        tmp_path / "t.csv", ("mel/1.png", "a"), ("nv/1.png", "a"), ("2.png", "b"), ("2.jpg", "b")
    )  # a header is no must
    assert load("folder", data, tmp_path / "t.csv").groups.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no lines"),
        (b"\n\n", "no lines"),
        (b"image\nmel/1.png\n", "needs two columns"),
        (b"image,age,name\nmel/1.png,50,x\n", "needs two columns"),
        (b'image,patient\n"mel/1.png,p1\nmel/2.png,p2\n', "line"),
        (b"PK\x03\x04" + bytes(100), "a workbook or archive"),
        (bytes(100), "zero bytes"),
        ("image,patient\nmel/1.png,ä".encode("utf-16")[:-1], "cut off or damaged"),
    ],
)
def test_a_damaged_table_is_refused(content, message, tmp_path):
    data = write(tmp_path / "data")
    (data / "groups.csv").write_bytes(content)
    text = refusal(data)
    assert message in text and str(data / "groups.csv") in text


# ------------------------------------------------------------------------------------------------------ the same image


def test_the_same_image_is_of_one_group_and_said_to_be_there_twice(tmp_path):
    data = write(tmp_path / "data")
    shutil.copy(data / "mel" / "1.png", data / "mel" / "copy.png")
    shutil.copy(data / "nv" / "3.png", data / "nv" / "sub" / "3.png")
    dataset = load("folder", data)
    groups = {
        path.relative_to(data).as_posix(): group for path, group in zip(dataset.files, dataset.groups, strict=True)
    }
    assert groups["mel/1.png"] == groups["mel/copy.png"] and groups["nv/3.png"] == groups["nv/sub/3.png"]
    assert len(set(groups.values())) == 6 and dataset.groups_given is False
    notice = notice_of(dataset, "more than once")
    assert notice.splitlines()[1:] == ["  mel/1.png = mel/copy.png", "  nv/3.png = nv/sub/3.png"]


def test_the_same_image_in_two_classes_is_a_warning(tmp_path):
    data = write(tmp_path / "data")
    shutil.copy(data / "mel" / "1.png", data / "nv" / "other.png")
    dataset = load("folder", data)
    notice = notice_of(dataset, "more than one class")
    assert notice.startswith("Warning: ") and "mel/1.png = nv/other.png" in notice
    assert len(dataset) == 7 and len(set(dataset.groups)) == 6
    assert not any("more than once" in notice for notice in dataset.notices)


def test_the_same_image_in_parts(tmp_path):
    data = write(tmp_path / "data", "train/mel/1.png", "train/nv/2.png", "test/nv/3.png")
    shutil.copy(data / "train" / "mel" / "1.png", data / "test" / "nv" / "1.png")
    assert "test/nv/1.png" in notice_of(load("folder", data), "more than one class")


def test_patients_with_the_same_image_are_one_group(tmp_path):
    data = write(tmp_path / "data")
    table = write_table(data / "groups.csv")
    shutil.copy(data / "mel" / "1.png", data / "mel" / "copy.png")  # of p1
    shutil.copy(data / "mel" / "x.JPG", data / "mel" / "copy of x.JPG")
    table.write_text(table.read_text() + "copy.png,p2\ncopy of x.JPG,p3\n")
    dataset = load("folder", data)
    names = [path.name for path in dataset.files]
    assert names == ["1.png", "2.png", "copy of x.JPG", "copy.png", "x.JPG", "3.png", "4.png", "5.png"]
    assert dataset.groups.tolist() == [0, 0, 1, 0, 1, 0, 2, 0]
    assert "1.png = mel/copy.png" in notice_of(dataset, "more than one group of the table")


def test_images_of_the_same_size_are_not_the_same(tmp_path):
    for name, colour in (("a/1.bmp", 1), ("a/2.bmp", 2), ("b/3.bmp", 3)):
        write_image(tmp_path / name, (colour, 0, 0))
    dataset = load("folder", tmp_path)
    assert dataset.groups is None and dataset.notices == ()


def test_many_warnings_are_cut(tmp_path):
    for i in range(40):
        for copy in range(9):
            write_image(tmp_path / "ab"[copy % 2] / f"{i:02}-{copy}.png", (i, 0, 0))
    lines = notice_of(load("folder", tmp_path), "more than one class").splitlines()
    assert len(lines) == 12 and lines[-1] == "  and 30 more"
    assert lines[1].count(" = ") == 5 and lines[1].endswith("4 more")


# ---------------------------------------------------------------------------------------------------------- the command


def parse(monkeypatch, data: Path, *options: str):
    line = ["accuracy", "--dataset", "folder", "--model", "cnn", "--data", str(data), "--seeds", "1", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [*line, *options])
    return command.make_parser(None).parse_args()


def write_paired(folder: Path) -> Path:
    """60 images of 30 patients, whose two are of one class; returns the table."""
    data = write_images(folder / "data")
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))
    write_sheet(folder / "patients.csv", ("image", "patient"), *((name, f"p{i // 2}") for i, name in enumerate(names)))
    return folder / "patients.csv"


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_no_patient_is_in_two_parts_and_the_settings_say_that_groups_were_given(tmp_path, monkeypatch):
    table = write_paired(tmp_path)
    said = {}
    for options in ((), ("--groups", str(table)), ("--split", "random")):
        args = parse(monkeypatch, tmp_path / "data", *options)
        dataset, model = command.load(args)
        said[options] = command.settings(args, dataset, model)
        if options == ("--groups", str(table)):
            parts = splits.split(dataset, 0)
            assert sum(len(set(dataset.groups[part])) for part in parts) == 30
    shutil.copy(table, tmp_path / "data" / "groups.csv")
    args = parse(monkeypatch, tmp_path / "data", "--split", "random")
    assert command.settings(args, *command.load(args))["groups"] == "given, not used"
    words = [(settings["split"], settings["groups"]) for settings in said.values()]
    assert words == [("random", "none given"), ("grouped", "given"), ("random", "none given")]
    titles = [compare._title(settings | {"quick": False}) for settings in said.values()]
    assert "random split (groups of images: none given)" in titles[0]
    assert "grouped split (groups of images: given)" in titles[1]


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_copies_alone_are_no_groups_that_were_given(tmp_path, monkeypatch):
    data = write_images(tmp_path / "data")
    shutil.copy(data / "dark" / "01.png", data / "dark" / "copy.png")
    args = parse(monkeypatch, data)
    dataset, model = command.load(args)
    settings = command.settings(args, dataset, model)
    assert dataset.groups is not None and (settings["split"], settings["groups"]) == ("random", "none given")


@pytest.mark.parametrize("options", [("--dataset", "digits"), ("--split", "random")])
def test_groups_that_would_have_no_effect_are_refused(options, tmp_path, monkeypatch, capsys):
    table = write_paired(tmp_path)
    line = ["--dataset", "folder", "--data", str(tmp_path / "data"), "--groups", str(table), *options]
    monkeypatch.setattr(sys, "argv", ["accuracy", *line, "--output", str(tmp_path / "output")])
    with pytest.raises(SystemExit, match="2"):
        command.run(experiment.main)
    captured = capsys.readouterr()
    assert captured.err.startswith("--groups") and captured.out == "" and not (tmp_path / "output").exists()


def test_a_table_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, tmp_path, "--groups", str(tmp_path / "none.csv"))
    assert "no such file" in capsys.readouterr().err


def test_the_digest_of_the_data_tells_groups_from_none(tmp_path):
    data = write(tmp_path / "data")
    table = write_table(tmp_path / "t.csv")
    with_groups, without = (fingerprint.of_data(load("folder", data, given)) for given in (table, None))
    assert [name for name in without if with_groups[name] != without[name]] == ["groups"]
    assert json.dumps(with_groups)


def test_a_published_data_set_has_no_settings_of_ones_own_images(monkeypatch):
    assert command._own_images(load("digits", None)) == {}
