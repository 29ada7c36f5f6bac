"""Promise: what can be known beforehand is said before an image is read, in one message, and nothing is left behind."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_accuracy_fingerprint import write_image, write_images
from test_accuracy_protocol import make_dataset, plain_pytorch, record  # noqa: F401 (an autouse fixture)

from benchmarks.accuracy import __main__ as experiment
from benchmarks.accuracy import beforehand, command, models, splits, sweep
from benchmarks.accuracy.methods import DEFAULT

BOTH = pytest.mark.parametrize("main", [experiment.main, sweep.main], ids=["experiment", "sweep"])


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls a command that must end before it reads an image: exit status 2 and one message, which is returned."""

    def read(*args, **options):
        raise AssertionError("an image was read")

    def call(main, *line: object) -> str:
        monkeypatch.setattr(sys, "argv", ["accuracy", "--model", "cnn", *map(str, line)])
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
            patch.setattr(Image, "open", read)
            command.run(main)
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        return err

    return call


@pytest.fixture
def data(tmp_path) -> Path:
    return write_images(tmp_path / "data")


def line(data: Path, output: Path, *options: object) -> list[object]:
    return ["--dataset", "folder", "--data", data, "--output", output, "--seeds", "2", *options]


# ------------------------------------------------------------------------------------------------------------ the data


@BOTH
def test_a_class_that_is_too_rare(refused, data, tmp_path, main):
    for i in range(2):
        write_image(data / "rare" / f"{i}.png", np.random.default_rng(i), 60)
    message = refused(main, *line(data, tmp_path / "output"))
    assert "the class 'rare' has 2 images and needs 3 images, one each for training, validation and test" in message
    assert not (tmp_path / "output").exists()


@BOTH
def test_a_seed_that_cannot_be_split_is_found_before_the_first_is_trained(refused, data, tmp_path, monkeypatch, main):
    split = splits.split

    def all_but_the_last(dataset, seed):
        if seed == 3:
            raise splits.SplitError("no way with seed 3")
        return split(dataset, seed)

    monkeypatch.setattr(splits, "split", all_but_the_last)
    assert "no way with seed 3" in refused(main, *line(data, tmp_path / "output", "--seeds", 4))
    assert not (tmp_path / "output").exists()


@BOTH
def test_a_single_class(refused, tmp_path, main):
    write_image(tmp_path / "data" / "only" / "a.png", np.random.default_rng(0), 60)
    assert "found one class only, only" in refused(main, *line(tmp_path / "data", tmp_path / "output"))


@BOTH
def test_a_class_whose_folder_is_not_utf_8(refused, data, tmp_path, main):
    name = os.fsdecode(b"Gr\xf6\xdfe")
    try:
        (data / "grey").rename(data / name)
    except OSError:
        pytest.skip("a file system that takes UTF-8 alone")
    message = refused(main, *line(data, tmp_path / "output"))
    assert r"the name of the class 'Gr\udcf6\udcdfe' is not UTF-8" in message


def test_a_name_that_only_the_locale_does_not_know_is_read():
    """As in the C locale, where Python has the bytes of a name that is UTF-8."""
    dataset = replace(make_dataset((5, 5)), class_names=("Größe".encode().decode("ascii", "surrogateescape"), "b"))
    assert beforehand.check_classes(dataset).class_names == ("Größe", "b")


def test_missing_data_leave_no_folder_and_no_parent_of_it(refused, tmp_path):
    assert "missing" in refused(experiment.main, *line(tmp_path / "none", tmp_path / "a" / "b" / "c"))
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- the model


@BOTH
@pytest.mark.parametrize(
    ("name", "package"), [("resnet50", "timm"), ("efficientnet-lite0-frozen", "efficientnet-lite-pytorch")]
)
def test_a_model_whose_package_is_absent(refused, data, tmp_path, monkeypatch, main, name, package):
    monkeypatch.setattr(models, "find_spec", lambda module: None)
    message = refused(main, *line(data, tmp_path / "output", "--model", name))
    assert f"pip install {package}" in message
    assert not (tmp_path / "output").exists()


@BOTH
def test_weights_for_a_model_that_takes_none(refused, data, tmp_path, main):
    (tmp_path / "w.pth").touch()
    message = refused(main, *line(data, tmp_path / "output", "--weights", tmp_path / "w.pth"))
    assert "cnn is trained from scratch and takes no weights" in message


@pytest.mark.parametrize("content", [b"", b"no pickle at all", "state", "tensor", "pickle", "cut"])
def test_a_file_that_does_not_hold_the_weights(refused, data, tmp_path, content):
    pytest.importorskip("efficientnet_lite_pytorch")
    path = tmp_path / "w.pth"
    if content == "pickle":
        torch.save(nothing_like_weights, path)
    elif isinstance(content, str):
        torch.save({"of another network": torch.zeros(3)} if content != "tensor" else torch.zeros(3), path)
        if content == "cut":
            path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(content)
    message = refused(
        experiment.main, *line(data, tmp_path / "output", "--model", "efficientnet-lite0-frozen", "--weights", path)
    )
    assert f"{path} does not hold the weights of efficientnet-lite0-frozen: " in message
    assert message.count("\n") == 1 and len(message) < 600 and "weights_only" not in message


def nothing_like_weights() -> None:
    """A function, which no file of weights has."""


@BOTH
@pytest.mark.parametrize("size", [1, 20, 100, 10**7])
def test_a_size_of_images_that_the_network_does_not_take(refused, data, tmp_path, main, size):
    message = refused(main, *line(data, tmp_path / "output", "--image-size", size))
    assert f"cnn takes no images of {size} x {size} pixels: " in message


# ------------------------------------------------------------------------------------------------------- the arguments


@BOTH
@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--output", "", "must not be empty"),
        ("--data", "", "must not be empty"),
        ("--weights", "", "must not be empty"),
        ("--weights", "nowhere.pth", "no such file: /"),
        ("--learning-rate", "0", "must be positive, got 0"),
        ("--learning-rate", "-1e-3", "must be finite and at least 0"),
        ("--learning-rate", "nan", "must be finite"),
        ("--learning-rate", "fast", "must be a number, got 'fast'"),
        ("--epochs", "0", "must be at least 1"),
        ("--epochs", "2.5", "must be a whole number, got '2.5'"),
        ("--seeds", "many", "must be a whole number, got 'many'"),
        ("--image-size", "-3", "must be at least 1"),
    ],
)
def test_a_wrong_argument(refused, data, tmp_path, monkeypatch, main, option, value, reason):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert f"argument {option}: {reason}" in refused(main, *line(data, tmp_path / "output", f"{option}={value}"))
    assert sorted(tmp_path.iterdir()) == before


@BOTH
def test_a_folder_for_data_that_come_with_a_package(refused, tmp_path, main):
    assert "digits comes with its package" in refused(main, "--dataset", "digits", "--data", tmp_path)


@BOTH
@pytest.mark.parametrize("place", ["", "results", "a/b"])
def test_an_output_among_the_images(refused, data, main, place):
    """Its pictures would be images of a class the next time."""
    before = sorted(data.rglob("*"))
    assert f"The results would lie in {data / place}" in refused(main, *line(data, data / place))
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize("epochs", [1, 2])
def test_deferred_weights_that_never_set_in_are_refused_where_asked_for(refused, data, tmp_path, epochs):
    options = ("--epochs", epochs, "--losses", "lmf", "lmf-drw")
    message = refused(experiment.main, *line(data, tmp_path / "output", *options))
    assert re.search(
        rf"^lmf-drw: with {epochs} epochs? the re-weighting never sets in; at least --epochs 3", message, re.M
    )


def test_deferred_weights_that_never_set_in_are_left_out_of_the_default_with_a_word(capsys):
    assert beforehand.check_losses(None, DEFAULT, 2) == [loss for loss in DEFAULT if not loss.endswith("-drw")]
    assert "Left out are ldam-drw, lmf-drw: with 2 epochs" in capsys.readouterr().err
    for epochs in (3, 6, 40):
        assert beforehand.check_losses(None, DEFAULT, epochs) == list(DEFAULT)
        assert beforehand.check_losses(["lmf-drw", "lmf", "lmf-drw"], DEFAULT, epochs) == ["lmf-drw", "lmf"]
    assert capsys.readouterr().err == ""


def test_where_a_deferred_loss_is_not_refused_its_weights_do_set_in():
    from benchmarks.accuracy.methods import METHODS

    for epochs in range(1, 12):
        setting = METHODS["ldam-drw"].settings[0]
        criterion = setting.make_criterion([30, 10], {})
        schedule = setting.make_schedule(criterion, [30, 10], epochs)
        schedule.step(epochs - 1)
        assert setting.is_reached_in(epochs) == bool((criterion.weight != 1).any())


# ---------------------------------------------------------------------------------------------------------- the output


@BOTH
@pytest.mark.parametrize("place", ["file", "file/below", "file/below/it", "broken link"])
def test_an_output_that_is_or_lies_below_a_file(refused, data, tmp_path, main, place):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "broken link").symlink_to(tmp_path / "nowhere" / "at all")
    before = sorted(tmp_path.iterdir())
    message = refused(main, *line(data, tmp_path / place))
    assert f"Results cannot be written to {tmp_path / place}: " in message and "another --output" in message
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    assert sorted(tmp_path.iterdir()) == before


@BOTH
@pytest.mark.parametrize("where", ["folder", "lock"])
def test_an_output_on_a_place_that_is_only_read(refused, data, tmp_path, monkeypatch, main, where):
    output, make, opened = tmp_path / "new" / "output", os.mkdir, os.open

    def read_only(path, *args, **options):
        if str(path) == str(output / ".lock" if where == "lock" else output):
            raise OSError(30, "Read-only file system", str(path))
        return (opened if where == "lock" else make)(path, *args, **options)

    monkeypatch.setattr(os, "open" if where == "lock" else "mkdir", read_only)
    message = refused(main, *line(data, output))
    assert f"Results cannot be written to {output}: Read-only file system. Choose another --output." in message
    assert not (tmp_path / "new").exists()


def test_a_folder_that_was_there_and_holds_other_files_stays_as_it_was(refused, data, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "notes.txt").touch()
    write_image(data / "rare" / "0.png", np.random.default_rng(0), 60)
    refused(experiment.main, *line(data, tmp_path / "output"))
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["notes.txt"]


def test_settings_of_another_program_are_not_written_over(refused, data, tmp_path):
    path = tmp_path / "output" / "settings.json"
    path.parent.mkdir()
    path.write_text('{"theme": "dark"}', encoding="utf-8")
    assert f"{path} is damaged or not of this command" in refused(experiment.main, *line(data, tmp_path / "output"))
    assert path.read_text(encoding="utf-8") == '{"theme": "dark"}'
