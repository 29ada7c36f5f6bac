"""Promise: benchmarks.accuracy shows no result, and uses no feature, of other data, weights or settings."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_accuracy_protocol import (
    CPU,
    make_dataset,
    plain_pytorch,  # noqa: F401 (an autouse fixture)
    read_csv,
    record,
    small_frozen_model,
)

from benchmarks.accuracy import __main__ as experiment
from benchmarks.accuracy import command, compare, fingerprint, methods, models, protocol, report, splits, sweep
from benchmarks.accuracy.data import Dataset, load
from lmf_triton import class_balanced_weights

pytestmark = pytest.mark.slow  # whole commands, which train and write

ROOT = Path(__file__).parents[1]
COUNTS = {"dark": 30, "grey": 18, "light": 12}  # 60 images: parts of 42, 9 and 9
FEW_EPOCHS = ("--epochs", "2")


def write_image(path: Path, generator: np.random.Generator, brightness: int) -> None:
    """Noise of this brightness, 8x8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(brightness, brightness + 60, (8, 8), dtype=np.uint8)).save(path)


def write_images(folder: Path, seed: int = 0) -> Path:
    """``class/image.png``; another seed gives other images of the same names."""
    generator = np.random.default_rng(seed)
    for position, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            write_image(folder / name / f"{i:02}.png", generator, 60 * position)
    return folder


def arguments(data: Path, output: Path, *options: str) -> list[str]:
    line = ["--dataset", "folder", "--model", "cnn", "--data", str(data), "--output", str(output)]
    return [*line, "--seeds", "1", *FEW_EPOCHS, *options]


def run(data: Path, output: Path, *options: str, change: Callable[[Dataset], Dataset] | None = None) -> list:
    """The command in this process, with one loss and seed; returns the losses and seeds that it trained."""
    line = arguments(data, output, "--losses", "lmf", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["accuracy", *line])
        if change is not None:
            patch.setattr(command.data, "load", lambda *args: change(load(*args)))
        trained = record(patch, experiment, "train_one", lambda args, runs: runs[0].key)
        command.run(experiment.main)
    return trained


def run_sweep(data: Path, output: Path, *options: str) -> None:
    """The sweep in this process, of one loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sweep", *arguments(data, output, "--losses", "lmf-tuned", *options)])
        command.run(sweep.main)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Calls a command that must refuse: exit status 2, one message, the folder as it was. Returns the message."""

    def call(command_function: Callable[..., object], data: Path, output: Path, *options: str, **changes) -> str:
        before = all_bytes(output)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            command_function(data, output, *options, **changes)
        captured = capsys.readouterr()
        assert captured.out == ""  # no table
        assert all_bytes(output) == before
        assert str(output) in captured.err and "--output" in captured.err
        return captured.err

    return call


@pytest.fixture(scope="module")
def finished_once(plain_pytorch, tmp_path_factory) -> Path:  # noqa: F811
    """A folder with ``data`` and the ``output`` of a finished run."""
    folder = tmp_path_factory.mktemp("fingerprint")
    assert run(write_images(folder / "data"), folder / "output") == [("lmf", 0)]
    return folder


@pytest.fixture
def finished(finished_once, tmp_path) -> tuple[Path, Path]:
    """Copies of data and output, to change."""
    return Path(shutil.copytree(finished_once / "data", tmp_path / "data")), Path(
        shutil.copytree(finished_once / "output", tmp_path / "output")
    )


def settings_of(output: Path) -> dict:
    return json.loads((output / "settings.json").read_text())


# -------------------------------------------------------------------------------------------------------- other data


def replace_all(data: Path) -> None:
    write_images(data, seed=1)


def replace_one(data: Path) -> None:
    write_image(data / "grey" / "07.png", np.random.default_rng(1), 60)


def swap_two(data: Path) -> None:
    (data / "grey" / "03.png").rename(data / "kept")
    (data / "grey" / "04.png").rename(data / "grey" / "03.png")
    (data / "kept").rename(data / "grey" / "04.png")


def correct_a_label(data: Path) -> None:
    (data / "dark" / "29.png").rename(data / "grey" / "!.png")  # the first of its class: the order stays


def rename_an_image(data: Path) -> None:
    (data / "grey" / "03.png").rename(data / "grey" / "03 new.png")


def rename_a_class(data: Path) -> None:
    (data / "grey").rename(data / "half")


CHANGES = {
    replace_all: "other image contents, but the same image names, labels, class names, weights",
    replace_one: "other image contents, but the same image names, labels,",
    swap_two: "other image contents, but the same image names, labels,",
    correct_a_label: "other image names, labels, but the same image contents,",
    rename_an_image: "other image names, but the same image contents,",
    rename_a_class: "other class names, but the same image names,",
}


@pytest.mark.parametrize("change", CHANGES)
def test_results_of_other_files_are_not_shown_or_added_to(finished, refused, change):
    data, output = finished
    change(data)
    for command_function, seeds in ((run, "1"), (run, "2"), (run_sweep, "1")):
        assert CHANGES[change] in refused(command_function, data, output, "--seeds", seeds)


def test_quite_other_data_have_nothing_the_same(finished, frozen, tmp_path, refused):
    for i in range(60):
        write_image(tmp_path / "others" / "abc"[i % 3] / f"{i}.png", np.random.default_rng(i), 60)
    message = refused(run, tmp_path / "others", finished[1])
    assert "trained 'all' there, 'head' now; other image names, image contents, labels, class names, weights" in message
    assert "the same" not in message.replace("Use the same", "")


GROUPS = np.arange(60) // 2


@pytest.mark.filterwarnings("ignore:The least populated class")  # with groups, of so few images
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"labels": np.repeat([2, 1, 0], [12, 18, 30])}, "other labels, but the same image names, image contents"),
        ({}, {"groups": GROUPS}, "other groups, but"),
        ({"groups": GROUPS}, {"groups": GROUPS[::-1].copy()}, "other groups, but"),
        ({}, {"is_test": np.arange(60) % 4 == 0}, "other test set, but"),
        ({"long_tail": (20, 10, 8)}, {"long_tail": (20, 10, 9)}, "other long tail, but"),
        ({}, {"name": "other", "licence": "other"}, None),
    ],
)
def test_results_of_other_labels_and_splits_are_refused(finished_once, tmp_path, refused, before, after, message):
    data, output = finished_once / "data", tmp_path / "output"
    if "long_tail" in before:
        before = before | {"is_test": np.arange(60) % 4 == 0}
    run(data, output, change=lambda dataset: replace(dataset, **before))
    change = {"change": lambda dataset: replace(dataset, **(before | after))}
    if message is None:
        assert run(data, output, **change) == []
    else:
        assert message in refused(run, data, output, **change)


def test_the_same_data_elsewhere_are_the_same(finished, tmp_path):
    data, output = finished
    for path in data.rglob("*.png"):
        os.utime(path, (1, 1))
    elsewhere = data.rename(tmp_path / "elsewhere")
    before = all_bytes(output)
    assert run(elsewhere, output) == []
    assert all_bytes(output) == before
    assert run(elsewhere, output, "--seeds", "2") == [("lmf", 1)]


@pytest.mark.parametrize("has_test", [False, True])
def test_another_split_of_the_same_images_is_refused(finished_once, tmp_path, monkeypatch, refused, has_test):
    """With an official test set, only training and validation part change, which no prediction shows."""
    data, output, split = finished_once / "data", tmp_path / "output", splits.train_test_split
    is_test = np.arange(60) % 4 == 0 if has_test else None
    change = {"change": lambda dataset: replace(dataset, is_test=is_test)}
    run(data, output, **change)
    monkeypatch.setattr(
        splits, "train_test_split", lambda *args, random_state, **options: split(*args, random_state=7, **options)
    )
    assert "seed 0 splits the same images in another way" in refused(run, data, output, "--seeds", "2", **change)


def test_another_split_of_a_seed_that_is_not_asked_for_is_refused_too(finished, monkeypatch, refused):
    """A loss that is added is trained with all seeds of the folder, not only with those of the command."""
    data, output = finished
    assert run(data, output, "--seeds", "2") == [("lmf", 1)]
    split = splits.train_test_split
    monkeypatch.setattr(
        splits,
        "train_test_split",
        lambda *args, random_state, **options: split(*args, random_state=7 * random_state, **options),
    )
    message = refused(run, data, output, "--losses", "focal")  # with seed 0 alone, whose split is the same
    assert "seed 1 splits the same images in another way" in message


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        (splits, "SHARES", (60, 20, 20), r"shares \[70, 15, 15\] there, \[60, 20, 20\] now"),
        (models, "STEP_FACTOR", 0.5, "step_factor 0.1 there, 0.5 now"),
        (
            methods,
            "FocalLoss",
            lambda gamma=2.0, **options: torch.nn.Dropout(gamma / 4),
            r"focal .FocalLoss\(\) .* there, .FocalLoss\(\) .* now",
        ),
        (
            methods,
            "WEIGHTS",
            methods.WEIGHTS | {"class-balanced": lambda counts: class_balanced_weights(counts, beta=0.9)},
            r"cross-entropy-weighted .* there, .* now",
        ),
        (
            methods,
            "METHODS",
            methods.METHODS | {"lmf-adjusted": methods.METHODS["lmf"]},
            r"tau=1\)\) .* there, .LMFLoss",
        ),
        (
            methods,
            "METHODS",
            methods.METHODS | {"cross-entropy-posthoc": methods.Method((methods.Setting(),), (2.0,))},
            r"cross-entropy-posthoc .*tau=1\).* there, .*tau=2\).* now",
        ),
    ],
)
def test_results_of_other_constants_of_the_code_are_refused(
    finished, monkeypatch, refused, module, name, value, message
):
    monkeypatch.setattr(module, name, value)
    assert re.search(message, refused(run, *finished))


def test_a_loss_that_there_was_not_before_is_added_to_former_results(finished, monkeypatch):
    new = methods.METHODS | {"new": methods.Method((methods.Setting("focal", (("gamma", 3),)),))}
    before = settings_of(finished[1])
    for module in (methods, experiment, sweep, compare, report):
        monkeypatch.setattr(module, "METHODS", new)
    assert run(*finished) == []
    assert run(*finished, "--losses", "lmf", "new") == [("new", 0)]
    after = settings_of(finished[1])
    assert after["fingerprint"] == before["fingerprint"]
    assert after["settings"]["descriptions"].keys() - before["settings"]["descriptions"].keys() == {"new"}


def test_a_quick_trial_is_not_added_to_a_whole_experiment(finished, refused):
    assert "quick False there, True now" in refused(run, *finished, "--quick")


@pytest.mark.parametrize("fault", ["no fingerprint", "no settings", "broken settings", "only a sweep"])
def test_results_that_do_not_say_what_they_are_of_are_refused(finished, refused, fault):
    data, output = finished
    path = output / "settings.json"
    if fault == "no fingerprint":
        path.write_text(json.dumps({"settings": settings_of(output)["settings"], "sessions": []}))
    elif fault == "broken settings":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    if fault == "only a sweep":
        shutil.rmtree(output)
        output.mkdir()
        (output / "sweep.csv").write_text("factor,value,seed\npaper,,0\n")
    for command_function in (run, run_sweep):
        assert "do not say which data they are of" in refused(command_function, data, output)


def test_settings_have_one_fingerprint_that_more_seeds_and_losses_do_not_change(finished):
    data, output = finished
    before = settings_of(output)
    run(data, output, "--seeds", "2", "--losses", "lmf", "focal")
    after = settings_of(output)
    assert re.fullmatch("[0-9a-f]{16}", after["fingerprint"]) and after["fingerprint"] == before["fingerprint"]
    assert before["settings"]["splits"].items() < after["settings"]["splits"].items()


def test_a_command_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "nothing", tmp_path / "output")
    assert not (tmp_path / "output").exists()


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def frozen(monkeypatch, tmp_path) -> Path:
    """The command's ``--model cnn`` is a frozen one, with its own cache; returns a file of weights for it."""
    monkeypatch.setitem(models.MODELS, "cnn", small_frozen_model())
    monkeypatch.setattr(command, "CACHE", tmp_path / "cache")
    weights = tmp_path / "weights.pth"
    weights.write_text("1")
    return weights


def test_weights_are_told_apart_by_their_content_not_their_name(finished_once, tmp_path, frozen, refused):
    data, output = finished_once / "data", tmp_path / "output"
    run(data, output, "--weights", str(frozen))
    frozen.write_text("2")
    message = refused(run, data, output, "--weights", str(frozen))
    assert "other weights, but the same image names, image contents" in message
    assert "other weights" in refused(run, data, output)
    renamed = tmp_path / "renamed.pth"
    renamed.write_text("1")
    assert run(data, output, "--weights", str(renamed)) == []


def test_weights_of_another_version_of_their_package_are_refused(finished_once, tmp_path, frozen, monkeypatch, refused):
    data, output = finished_once / "data", tmp_path / "output"
    run(data, output)
    newer = replace(models.MODELS["cnn"], make_encoder=lambda weights: small_frozen_model().make_encoder(frozen))
    monkeypatch.setitem(models.MODELS, "cnn", newer)
    assert "other weights" in refused(run, data, output)


def test_statistics_of_pixels_that_come_with_the_weights_count(frozen):
    model = small_frozen_model()
    encoder = model.make_encoder(None)
    before = fingerprint.of_weights(encoder)
    encoder.std += 0.1
    assert fingerprint.of_weights(encoder) != before


def test_a_network_from_scratch_has_the_same_digest_every_time():
    cnn = models.MODELS["cnn"]
    state = torch.get_rng_state()
    assert cnn.weights_digest(None) == cnn.weights_digest(Path("ignored"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("command_function", [run, run_sweep])
def test_weights_replaced_during_the_training_end_it(
    finished_once, tmp_path, frozen, monkeypatch, capsys, command_function
):
    train = protocol.train

    def replace_and_train(*args):
        frozen.write_text("2")
        return train(*args)

    monkeypatch.setattr(protocol, "train", replace_and_train)
    output = tmp_path / "output"
    with pytest.raises(SystemExit, match="2"):
        command_function(finished_once / "data", output, "--weights", str(frozen))
    assert f"{frozen} changed during the training" in capsys.readouterr().err
    assert not (output / "metrics.csv").exists() and not (output / "sweep.csv").exists()


# ------------------------------------------------------------------------------------------------ the cache of features


def features(data: Path, cache: Path, weights: Path | None = None) -> torch.Tensor:
    return models.load_inputs(small_frozen_model(), load("folder", data), cache, weights, CPU)


def expected_features(data: Path, weights: Path | None = None) -> torch.Tensor:
    model = small_frozen_model()
    return models.encode(model, model.make_encoder(weights), models.read_images(model, load("folder", data)))


def spare_sixteen(data: Path) -> None:
    """Replace 44 of 60 images, but not 16 evenly spaced ones."""
    paths, other = sorted(data.rglob("*.png")), np.random.default_rng(1)
    kept = set(np.linspace(0, len(paths) - 1, 16).astype(int).tolist())
    for i in set(range(len(paths))) - kept:
        write_image(paths[i], other, 60)


@pytest.mark.parametrize("change", [spare_sixteen, replace_one, swap_two])
def test_features_of_other_images_are_not_used(finished, tmp_path, change):
    data, _ = finished
    before = features(data, tmp_path / "cache")
    change(data)
    after = features(data, tmp_path / "cache")
    assert torch.equal(after, expected_features(data)) and not torch.equal(after, before)


def test_features_of_other_weights_are_not_used(finished_once, tmp_path, frozen):
    data, cache = finished_once / "data", tmp_path / "cache"
    features(data, cache, frozen)
    frozen.write_text("2")
    assert torch.equal(features(data, cache, frozen), expected_features(data, frozen))


@pytest.mark.parametrize("change", [correct_a_label, rename_a_class, rename_an_image])
def test_features_do_not_depend_on_labels_and_names(finished, tmp_path, change):
    data, _ = finished
    before = features(data, tmp_path / "cache")
    change(data)
    assert are_cached(data, tmp_path / "cache")
    assert torch.equal(features(data, tmp_path / "cache"), before)


def damage(path: Path, fault: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    if fault == "another array":
        np.savez(path, features=np.zeros((59, 5), np.float32))
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[:middle],
                "text": b"<html>",
                "a byte changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            }[fault]
        )


@pytest.mark.parametrize("fault", ["empty", "cut", "text", "a byte changed", "another array"])
def test_damaged_features_are_computed_anew(finished_once, tmp_path, fault):
    data, cache = finished_once / "data", tmp_path / "cache"
    before = features(data, cache)
    (path,) = cache.glob("*.np*")
    damage(path, fault)
    assert torch.equal(features(data, cache), before)
    assert are_cached(data, cache)


def are_cached(data: Path, cache: Path) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        computed = record(patch, models, "encode", lambda args, result: result)
        features(data, cache)
    return not computed


def test_two_commands_may_compute_the_same_features_at_once(finished_once, tmp_path, monkeypatch):
    data, cache, replace_file = finished_once / "data", tmp_path / "cache", os.replace
    inner = []

    def replace_late(source, target):
        """The other command writes the same features while this one is about to."""
        monkeypatch.setattr(os, "replace", replace_file)
        inner.append(features(data, cache))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    outer = features(data, cache)
    assert torch.equal(outer, expected_features(data)) and torch.equal(inner[0], outer)
    assert are_cached(data, cache)
    assert len(list(cache.iterdir())) == 2  # and .gitignore: nothing half done is left


# ------------------------------------------------------------------------------------------------- two commands at once


def test_a_folder_that_another_process_writes_is_refused_until_it_dies(tmp_path, capsys):
    data, output = write_images(tmp_path / "data"), tmp_path / "output"
    options = ("--seeds", "4", "--epochs", "60", "--losses", "lmf")
    other = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.accuracy", *arguments(data, output, *options)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: (output / "metrics.csv").exists(), other)
        for command_function in (run, run_sweep):
            with pytest.raises(SystemExit, match="2"):
                command_function(data, output, *options[:4])
            error = capsys.readouterr().err
            assert f"Another command is writing to {output}." in error and "Traceback" not in error
        assert other.poll() is None
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    finished_keys = {(row["loss"], int(row["seed"])) for row in read_csv(output / "metrics.csv")}
    trained = run(data, output, *options)
    assert finished_keys and sorted(finished_keys | set(trained)) == [("lmf", seed) for seed in range(4)]
    assert not finished_keys & set(trained)
    assert len(read_csv(output / "metrics.csv")) == 4
    assert not (output / ".lock").exists()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_a_lock_that_a_crash_left_stops_nobody(finished):
    data, output = finished
    (output / ".lock").touch()
    assert run(data, output, "--seeds", "2") == [("lmf", 1)]


# ----------------------------------------------------------------------------------------------------------- the sweep


def test_the_sweep_stands_beside_results_of_the_same_fingerprint(finished, refused):
    data, output = finished
    run(data, output, "--seeds", "2")
    before = settings_of(output)
    run_sweep(data, output)
    after = settings_of(output)
    assert after["settings"] == before["settings"]
    assert {row["loss"] for row in read_csv(output / "sweep.csv")} == {"lmf-tuned"}
    assert run(data, output, "--seeds", "3") == [("lmf", 2)]
    assert "epochs 2 there, 1 now" in refused(run_sweep, data, output, "--epochs", "1")


def test_an_experiment_is_not_added_to_a_sweep_of_other_data(finished, tmp_path, refused):
    data, _ = finished
    output = tmp_path / "sweep"
    run_sweep(data, output)
    replace_one(data)
    assert "other image contents" in refused(run, data, output)
    assert "other image contents" in refused(run_sweep, data, output)


# ------------------------------------------------------------------------------------------------------- the digests


def test_a_digest_knows_where_a_part_ends():
    assert fingerprint.digest([b"ab", b"c"]) != fingerprint.digest([b"a", b"bc"])
    assert fingerprint.digest([b"a", b"b"]) != fingerprint.digest([b"b", b"a"])


def test_images_without_files_are_told_apart_by_their_pixels():
    dataset = make_dataset((5, 5))
    changed = replace(dataset, read=lambda i: dataset.read(i).point(lambda value: value ^ (i == 3)))
    larger = replace(dataset, read=lambda i: dataset.read(i).resize((16, 16)))
    digests = [fingerprint.of_data(each) for each in (dataset, make_dataset((5, 5)), changed, larger)]
    assert digests[0] == digests[1]
    assert len({digest.pop("image contents") for digest in digests}) == 3
    assert digests[0] == digests[2] == digests[3]


def test_a_quick_trial_hashes_the_images_that_it_reads(finished_once):
    dataset = load("folder", finished_once / "data")
    few = protocol.shrink(replace(dataset, labels=np.zeros(60, np.int64)))  # 40 of a class
    assert len(few.files) == len(few) == 40
    for i in range(len(few)):
        assert np.array_equal(np.asarray(Image.open(few.files[i]).convert("RGB")), np.asarray(few.read(i)))
