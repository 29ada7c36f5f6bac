"""Promise: whatever happens to a command, its files are whole, its message names the cause, and it can go on."""

import ast
import csv
import errno
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_accuracy_fingerprint import run, run_sweep, settings_of, write_image, write_images
from test_accuracy_protocol import make_task, plain_pytorch, read_csv, record, train  # noqa: F401 (autouse)

from benchmarks.accuracy import __main__ as experiment
from benchmarks.accuracy import command, compare, endings, progress, protocol, report, results, sweep, wording
from benchmarks.accuracy.methods import CANDIDATES

pytestmark = pytest.mark.slow  # whole commands, which train and write

ROOT = Path(__file__).parents[1]
CODE = sorted((ROOT / "benchmarks" / "accuracy").rglob("*.py"))
NAMES = [
    "Größe",
    "漢字",
    "😀",
    "a|b",
    "$x$ and $y_1$",
    "back\\slash",
    "line\nbreak\r",
    "<b>`c`",
    "_u_ *s*",
    "-dash",
    "#1~2",
]


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of a command's time, and few accidents have to do with them."""
    monkeypatch.setattr(experiment, "draw_pictures", lambda *args: None)


@pytest.fixture(scope="module")
def finished_once(plain_pytorch, tmp_path_factory) -> Path:  # noqa: F811
    """A folder with ``data`` and the ``output`` of lmf with two seeds."""
    folder = tmp_path_factory.mktemp("accidents")
    assert run(write_images(folder / "data"), folder / "output", "--seeds", "2") == [("lmf", 0), ("lmf", 1)]
    run_sweep(folder / "data", folder / "output", "--seeds", "2")
    return folder


@pytest.fixture
def finished(finished_once, tmp_path) -> tuple[Path, Path]:
    return finished_once / "data", Path(shutil.copytree(finished_once / "output", tmp_path / "output"))


@pytest.fixture
def ends(capsys, monkeypatch):
    """Calls a command that must end with this status, without a traceback; returns what it says after its first line.

    No signal is ignored, as under ``nohup``, and no time is long enough for a line on how far it is.
    """
    monkeypatch.setattr(progress, "LINE_SECONDS", float("inf"))
    former = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    former[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)

    def call(status: int, function, *args, **options) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit, match=str(status)):
            function(*args, **options)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return re.sub(r"^folder: 60 images in 3 classes: .*\n", "", error)

    yield call
    for number, handler in former.items():
        signal.signal(number, handler)


def metrics_of(output: Path) -> list[dict[str, str]]:
    return [{name: text for name, text in row.items() if name != "seconds"} for row in read_csv(output / "metrics.csv")]


# ------------------------------------------------------------------------------------------------------ a failed start


@pytest.mark.parametrize("function", [run, run_sweep])
def test_a_start_that_ended_before_a_result_refuses_nothing(tmp_path, monkeypatch, ends, no_pictures, function):
    data, output = write_images(tmp_path / "data"), tmp_path / "output"

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "train", interrupted)
        assert "Interrupted before anything was finished" in ends(130, function, data, output)
    assert not output.exists()
    write_image(data / "grey" / "new.png", np.random.default_rng(5), 60)
    function(data, output)


@pytest.mark.parametrize("crash", ["settings.json", "predictions.csv.gz"])
def test_files_that_a_crash_left_before_the_first_result_refuse_nothing(tmp_path, finished, no_pictures, crash):
    """Whatever is written before the first metrics; the map of a run that was not saved is written again."""
    data, output = finished
    for path in output.iterdir():
        if path.name not in {"settings.json", "gradcam.json", ".gitignore"}:
            path.unlink()
    (output / "metrics.csv.partial").write_bytes(b"half a")
    assert run(data, output, "--epochs", "3") == [("lmf", 0)]
    assert settings_of(output)["settings"]["epochs"] == 3
    assert len(settings_of(output)["sessions"]) == 1


def test_every_session_that_adds_something_is_recorded_once(finished, no_pictures):
    data, output = finished
    n = len(settings_of(output)["sessions"])
    run(data, output, "--losses", "lmf", "focal", "ldam")
    assert len(settings_of(output)["sessions"]) == n + 1
    run(data, output, "--losses", "lmf", "focal", "ldam")
    assert len(settings_of(output)["sessions"]) == n + 1


# ------------------------------------------------------------------------------------------------------- damaged files


def damage(path: Path, fault: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": content[: 2 * len(content) // 3], "garbage": bytes(range(256)) * 4, "text": b"<html>\n"}[
            fault
        ]
    )


@pytest.mark.parametrize("fault", ["empty", "cut", "garbage", "text"])
@pytest.mark.parametrize("name", ["metrics.csv", "predictions.csv.gz", "gradcam.json", "sweep.csv"])
def test_a_damaged_file_is_named_and_what_it_lacks_is_computed_again(finished, no_pictures, capsys, name, fault):
    data, output = finished
    expected, sweep_before = metrics_of(output), (output / "sweep.csv").read_bytes()
    damage(output / name, fault)
    if name == "sweep.csv":
        run_sweep(data, output, "--seeds", "2")
    else:
        assert set(run(data, output, "--seeds", "2")) <= {("lmf", 0), ("lmf", 1)}
    assert str(output / name) in capsys.readouterr().err
    assert metrics_of(output) == expected
    assert (output / "sweep.csv").read_bytes() == sweep_before
    assert compare.read(output).n_seeds == 2


def test_of_predictions_that_are_cut_off_whole_seeds_are_kept(finished, no_pictures, capsys):
    data, output = finished
    path = output / "predictions.csv.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    whole = gzip.compress(b"".join(lines), mtime=0)
    path.write_bytes(gzip.compress(b"".join(lines[:-1]) + lines[-1][:3], mtime=0))
    assert run(data, output, "--seeds", "2") == [("lmf", 1)]
    assert "its last line is cut off" in capsys.readouterr().err
    assert path.read_bytes() == whole


@pytest.mark.parametrize("fault", ["empty", "cut", "garbage", "text", "other json"])
def test_damaged_settings_are_refused_by_path(finished, ends, fault):
    data, output = finished
    if fault == "other json":
        (output / "settings.json").write_text("[1]", encoding="utf-8")
    else:
        damage(output / "settings.json", fault)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    for function in run, run_sweep:
        assert f"{output / 'settings.json'} is damaged" in ends(2, function, data, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


# ------------------------------------------------------------------------------------------- full, read-only, vanished


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
    ],
)
def test_a_full_or_read_only_disk_is_said_with_the_path_and_loses_nothing_that_was_saved(
    tmp_path, monkeypatch, ends, no_pictures, number, words
):
    data, output = write_images(tmp_path / "data"), tmp_path / "output"
    write, full = os.fsync, []

    def no_room(file):
        if "metrics.csv" in os.readlink(f"/proc/self/fd/{file}"):
            full.append(file)
            if len(full) > 1:  # the first run is saved
                raise OSError(number, os.strerror(number))
        write(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        patch.setattr(experiment, "SAVING_SHARE", 0)
        message = ends(2, run, data, output, "--seeds", "3")
    assert f"{output / 'metrics.csv'} cannot be written: {words}. What was trained last, 1 run, is lost" in message
    assert [row["seed"] for row in read_csv(output / "metrics.csv")] == ["0"]
    assert not list(output.glob("*.partial"))
    assert run(data, output, "--seeds", "3") == [("lmf", 1), ("lmf", 2)]


@pytest.mark.parametrize("content", [b"new", b""])
def test_a_file_is_on_disk_before_it_takes_the_place_of_the_former(tmp_path, monkeypatch, content):
    path, done = tmp_path / "file", []
    path.write_bytes(b"former")
    sync, put = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(("sync", path.read_bytes())), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *args: (done.append(("replace", path.read_bytes())), put(*args)))
    results.replace_file(path, content)
    assert done == [("sync", b"former"), ("replace", b"former")]
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_pictures_are_replaced_as_a_whole_too(finished, monkeypatch, ends):
    data, output = finished
    before = (output / "confusion.png").read_bytes()

    def no_room(source, target):
        if str(target).endswith("confusion.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        Path(source).rename(target)

    monkeypatch.setattr(os, "replace", no_room)
    assert f"{output / 'confusion.png'} cannot be written: No space" in ends(2, run, data, output)
    assert (output / "confusion.png").read_bytes() == before and not list(output.glob("*.partial"))


def test_features_that_cannot_be_kept_end_nothing(finished_once, tmp_path, monkeypatch, capsys, no_pictures):
    from test_accuracy_protocol import small_frozen_model

    from benchmarks.accuracy import models

    (tmp_path / "cache").touch()
    monkeypatch.setitem(models.MODELS, "cnn", small_frozen_model())
    monkeypatch.setattr(command, "CACHE", tmp_path / "cache" / "below a file")
    assert run(finished_once / "data", tmp_path / "output") == [("lmf", 0)]
    assert "The features are not kept for the next command: " in capsys.readouterr().err


def test_an_image_that_vanishes_is_named_and_the_tables_are_shown(finished_once, tmp_path, monkeypatch, capsys):
    data, output = Path(shutil.copytree(finished_once / "data", tmp_path / "data")), tmp_path / "output"
    trained = experiment.train_all

    def train_and_lose(*args):
        trained(*args)
        shutil.rmtree(data / "light")

    monkeypatch.setattr(experiment, "train_all", train_and_lose)
    with pytest.raises(SystemExit, match="2"):
        run(data, output)
    out, err = capsys.readouterr()
    assert "| lmf |" in out
    assert re.search(rf"{data}/light/\d\d.png: not there", err) and "Traceback" not in err


def test_an_image_that_vanishes_between_two_readings_is_named(finished_once, tmp_path, monkeypatch, ends):
    data = Path(shutil.copytree(finished_once / "data", tmp_path / "data"))
    make_task = command.make_task

    def lose_and_read(*args):
        (data / "dark" / "07.png").unlink()
        return make_task(*args)

    monkeypatch.setattr(command, "make_task", lose_and_read)
    assert f"{data / 'dark' / '07.png'}: not there" in ends(2, run, data, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")])
def test_too_little_memory_is_saidin_one_line(finished_once, tmp_path, monkeypatch, ends, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(protocol, "train", fail)
    message = ends(2, run, finished_once / "data", tmp_path / "output")
    assert message.startswith("Not enough memory: ") and message.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("function", "number"), [(run, "SIGINT"), (run, "SIGTERM"), (run, "SIGHUP"), (run_sweep, "SIGTERM")]
)
def test_a_signal_ends_with_a_line_on_how_to_go_on_and_what_was_finished_is_saved(
    finished_once, tmp_path, monkeypatch, ends, no_pictures, function, number
):
    output, original, calls, number = tmp_path / "output", protocol.train, [], getattr(signal, number)

    def interrupted(*args):
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        calls.append(args)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "train", interrupted)
        patch.setattr(experiment, "SAVING_SHARE", 10**9)  # so that all but the first are saved at the end
        message = ends(128 + number, function, finished_once / "data", output, "--seeds", "3")
    assert f"Interrupted. What was finished is in {output}; the same command, with this --output, goes on" in message
    assert message.count("\n") == 1
    trained = record(monkeypatch, protocol, "train", lambda args, result: args)
    function(finished_once / "data", output, "--seeds", "3")
    assert len(trained) == (3 if function is run else 3 * len(CANDIDATES["lmf"])) - 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("name", ["settings.json", "predictions.csv.gz", "metrics.csv"])
def test_a_second_signal_waits_until_the_files_are_written(
    finished_once, tmp_path, monkeypatch, ends, no_pictures, name
):
    output, original, write = tmp_path / "output", protocol.train, os.fsync
    calls = []

    def interrupted(*args):
        if calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(args)
        return original(*args)

    def impatient(file):
        if name in os.readlink(f"/proc/self/fd/{file}"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        write(file)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "train", interrupted)
        patch.setattr(os, "fsync", impatient)
        patch.setattr(experiment, "SAVING_SHARE", 10**9)
        ends(130, run, finished_once / "data", output, "--seeds", "2")
    assert not list(output.glob("*.partial")) and not (output / ".lock").exists()
    assert run(finished_once / "data", output, "--seeds", "2") == [("lmf", 1)]


def start(*line: object, **options) -> subprocess.Popen:
    """A command in a process of its own, as a user starts it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.accuracy", *map(str, line)],
        cwd=ROOT,
        env=environment | options.pop("env", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        **options,
    )


def test_control_c_of_a_real_command(finished_once, tmp_path):
    line = ("--dataset", "folder", "--model", "cnn", "--data", finished_once / "data", "--output", tmp_path / "output")
    process = start(*line, "--losses", "lmf", "--seeds", "9", "--epochs", "60")
    while not (tmp_path / "output" / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    first, last = err.decode().splitlines()
    assert first.startswith("folder: 60 images") and last.startswith("Interrupted. What was finished is in ")


@pytest.mark.parametrize("where", ["pipe", "full"])
def test_output_that_nobody_reads_or_nothing_takes(finished, ends, monkeypatch, where):
    data, output = finished
    (output / "confusion.png").unlink()
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") if where == "pipe" else open("/dev/full", "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        message = ends(141 if where == "pipe" else 2, run, data, output, "--seeds", "2")
        file.flush()  # as Python does at its end, and would complain
    assert message == ("" if where == "pipe" else "Standard output cannot be written: No space left on device\n")
    assert (output / "confusion.png").exists()  # all is done by then


# ----------------------------------------------------------------------------------------------------------- divergence


class Broken:
    """Losses of a training that are not finite from one epoch on, or weights that are not."""

    def __init__(self, from_epoch: int, kind: str) -> None:
        self.from_epoch, self.kind, self.original = from_epoch, kind, protocol._train_epoch
        self.epochs: dict[int, int] = {}

    def __call__(self, network, *args):
        loss = self.original(network, *args)
        epoch = self.epochs[id(network)] = self.epochs.get(id(network), 0) + 1
        if epoch < self.from_epoch:
            return loss
        if self.kind == "weights":
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.fill_(torch.nan)
            return loss
        return {"loss": float("nan"), "infinite loss": float("inf")}[self.kind]


@pytest.mark.parametrize("kind", ["weights", "loss", "infinite loss"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_training_that_diverges_ends_there_and_is_its_best_epoch_before(monkeypatch, capsys, kind, epoch):
    healthy = train(make_task(epochs=epoch - 1), "lmf") if epoch > 1 else None
    monkeypatch.setattr(protocol, "_train_epoch", Broken(epoch, kind))
    network, best, f1, diverged = train(make_task(epochs=6), "lmf")
    assert diverged == epoch
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert f"the training diverged in epoch {epoch}: its loss or logits are not finite" in capsys.readouterr().err
    if healthy is None:
        untrained = protocol.initial_network(make_task(), 0)
        assert best == 0 and 0 <= f1 <= 1
        assert torch.equal(network[-1].weight, untrained[-1].weight)
    else:
        assert 1 <= best < epoch


def test_a_learning_rate_that_is_far_too_large_is_found_out(capsys):
    assert train(make_task(epochs=3, learning_rate=1e30), "cross-entropy").diverged


def run_diverging(data: Path, output: Path, *options: str, losses=("cross-entropy", "focal", "lmf"), bad=("focal",)):
    """The command, where the trainings of some losses diverge with seed 1; returns the losses and seeds trained."""
    original, healthy = protocol.train, protocol._train_epoch

    def train_one(task, split, seed, setting, title):
        broken = seed == 1 and setting.loss in bad
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(protocol, "_train_epoch", Broken(2, "weights") if broken else healthy)
            return original(task, split, seed, setting, title)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "train", train_one)
        return run(data, output, "--seeds", "2", "--epochs", "3", "--losses", *losses, *options)


def test_divergence_is_in_tables_and_advice_and_stays_when_the_command_goes_on(finished_once, tmp_path, ends, capsys):
    data, output = finished_once / "data", tmp_path / "output"
    assert "focal, seed 1: the training diverged in epoch 2" in ends(3, run_diverging, data, output)
    before = {
        name: (output / name).read_text(encoding="utf-8") for name in ("table1.md", "table2.md", "differences.md")
    }
    for text in before.values():
        assert text.count("†") == 2 and "| focal † |" in text and "| lmf |" in text
        assert "†: the training diverged, its loss or logits not finite, of focal (seed 1)." in text
    advice = (output / "recommendation.md").read_text(encoding="utf-8")
    assert (
        "Not recommended, whatever its figures: the training diverged, its loss or logits not finite, of focal"
        in advice
    )
    assert [row["diverged"] for row in read_csv(output / "metrics.csv")] == ["", "", "", "", "2", ""]
    assert ends(3, run, data, output, "--seeds", "2", "--epochs", "3", "--losses", "lmf") == ""  # nothing trained
    for name, text in before.items():
        assert (output / name).read_text(encoding="utf-8") == text
    assert not json.dumps(report.read_grad_cams(output)).count("NaN")


def test_where_cross_entropy_or_all_others_diverge_nothing_is_recommended(finished_once, tmp_path, ends, no_pictures):
    for bad in ("cross-entropy",), ("focal", "lmf"):
        ends(3, run_diverging, finished_once / "data", tmp_path / bad[0], bad=bad)
        advice = (tmp_path / bad[0] / "recommendation.md").read_text(encoding="utf-8")
        assert advice.startswith(
            f"Nothing to recommend: the training diverged, its loss or logits not finite, of {bad[0]}"
        )
        assert "lower --learning-rate" in advice


def test_a_loss_that_diverged_is_not_recommended_though_its_figures_are_better():
    from dataclasses import replace

    from test_accuracy_advice import make_results

    found = make_results({"focal": (0, 40), "lmf": (0, 20)})
    assert "balanced accuracy: focal, +" in compare.recommendation(found)
    runs = [replace(run, diverged=4) if run.key == ("focal", 3) else run for run in found.runs]
    advice = compare.recommendation(replace(found, runs=tuple(runs)))
    assert "balanced accuracy: lmf, +" in advice and "of focal (seed 3)" in advice


def test_the_sweep_marks_settings_that_diverge(finished_once, tmp_path, ends, monkeypatch):
    monkeypatch.setattr(protocol, "_train_epoch", Broken(1, "loss"))
    ends(3, run_sweep, finished_once / "data", tmp_path)
    assert {row["diverged"] for row in read_csv(tmp_path / "sweep.csv")} == {"1"}
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert text.count("†") == 9 and "†: a training diverged" in text
    trained = record(monkeypatch, protocol, "train", lambda args, result: args)
    ends(3, run_sweep, finished_once / "data", tmp_path)
    assert trained == []


# ---------------------------------------------------------------------------------------------------- letters and names


@pytest.fixture(scope="module")
def badly_named(plain_pytorch, tmp_path_factory) -> tuple[Path, Path, str, str]:  # noqa: F811
    """Data and output of a command in a locale that knows no letter of them, and what it printed as Latin-1."""
    folder = tmp_path_factory.mktemp("names")
    generator = np.random.default_rng(0)
    for position, name in enumerate(NAMES):
        for i in range(8):
            write_image(folder / "data" / name / f"{i}.png", generator, 18 * position)
    process = start(
        *("--dataset", "folder", "--model", "cnn", "--data", folder / "data", "--output", folder / "output"),
        *("--losses", "cross-entropy", "lmf", "--seeds", "2", "--epochs", "2"),
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"},
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder / "data", folder / "output", out.decode("latin-1"), err.decode("latin-1")


def test_names_come_out_whatever_the_locale_and_the_command_goes_on_in_another(badly_named, no_pictures):
    data, output, shown, _ = badly_named
    assert "Größe" in shown and r"\u6f22\u5b57" in shown  # what Latin-1 lacks is replaced
    assert settings_of(output)["settings"]["class names"] == sorted(NAMES)
    columns = next(csv.reader(io.StringIO((output / "metrics.csv").read_bytes().decode("utf-8"), newline="")))
    assert [f"f1 {name}" for name in sorted(NAMES)] == [column for column in columns if column.startswith("f1 ")]
    assert run(data, output, "--seeds", "2", "--losses", "cross-entropy", "lmf") == []


def test_letters_without_a_glyph_are_said_once(badly_named):
    *_, error = badly_named
    start, last = error.splitlines()
    assert start.startswith("folder: 88 images in 11 classes") and "pictures show boxes" in last


def test_tables_have_as_many_cells_as_columns(badly_named):
    _, output, *_ = badly_named
    lines = (output / "table2.md").read_text(encoding="utf-8").splitlines()[2:]
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1] for line in lines]
    assert {len(line) for line in cells} == {1 + len(NAMES)}
    for name, cell in zip(sorted(NAMES), cells[0][1:], strict=True):
        assert re.fullmatch(re.escape(wording.in_one_line(name)) + r" \([56]\)", unescaped(cell).strip())


def unescaped(cell: str) -> str:
    """What Markdown shows: a backslash before punctuation is not shown; without one some marks mean something."""
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_<>\[\]$]", cell)
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell)


@pytest.mark.parametrize("name", [*NAMES, "$", "$$", r"\$x", r"$\alpha$", r"a\b $c$", "x" * 300, "tab\tand\x07bell"])
def test_a_picture_shows_a_name_letter_by_letter(name):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    text, is_mathematics = Text(0, 0, wording.in_picture(name))._preprocess_math(wording.in_picture(name))
    expected = wording.in_one_line(name)
    assert not is_mathematics
    assert text == expected or (len(text) == 40 and expected.startswith(text[:-1]) and text.endswith("…"))
    figure = Figure()
    figure.text(0, 0, wording.in_picture(name))
    with report.missing_letters_said_once():
        figure.savefig(io.BytesIO())


def test_other_warnings_of_pictures_are_still_shown(capsys):
    def draw():
        with report.missing_letters_said_once():
            for text in "Glyph 1 missing from font(s) X.", "something else", "Glyph 2 missing from font(s) X.":
                warnings.warn(text, stacklevel=1)

    with pytest.warns(UserWarning, match="something else"):
        draw()
    assert capsys.readouterr().err.count("pictures show boxes") == 1


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_every_text_file_is_read_and_written_as_utf_8(path):
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        of_module = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "")
        if name not in {"open", "open_text", "read_text", "write_text"} or of_module in {"Image", "os"}:
            continue
        is_binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in call.args[:2])
        assert is_binary or "encoding" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"


# ------------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("path", [path for path in CODE if path.name != "progress.py"], ids=lambda path: path.name)
def test_only_one_module_draws_bars(path):
    assert not re.search(r"(import|from) tqdm", path.read_text(encoding="utf-8"))


def test_a_log_has_a_line_now_and_then(capsys, monkeypatch):
    """Two loops within each other for 100 minutes: at most a line a minute, of whichever loop."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "_last_line", 0.0)
    monkeypatch.setattr(progress, "_started", 0.0)
    for _ in progress.bar(range(24), "trainings", unit="training", leave=True):
        for _ in progress.bar(iter(range(1000)), "epochs", unit="epoch", total=1000):
            clock[0] += 0.25
    lines = capsys.readouterr().err.splitlines()
    assert 90 <= len(lines) <= 100
    assert lines[0] == "epochs: 240 of 1000 (epoch), 1 min since the start"
    assert all(
        re.fullmatch(r"(trainings: \d+ of 24|epochs: \d+ of 1000) \(\w+\), \d+ min since the start", x) for x in lines
    )


def test_a_terminal_has_bars(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress.bar(range(3), "things", unit="thing", leave=True)) == [0, 1, 2]
    assert "things: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_a_log_on_a_full_disk_ends_no_training(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as log:
        monkeypatch.setattr(sys, "stderr", log)
        monkeypatch.setattr(progress, "LINE_SECONDS", 0)
        assert list(progress.bar(range(3), "things")) == [0, 1, 2]
        endings._drop_what_cannot_be_written()


def test_a_command_without_a_terminal_writes_next_to_nothing(finished_once, tmp_path, capsys, no_pictures):
    run(finished_once / "data", tmp_path / "output")
    assert capsys.readouterr().err == "folder: 60 images in 3 classes: dark 30, grey 18, light 12.\n"


# -------------------------------------------------------------------------------------------------------------- privacy


def in_git(folder: Path, *line: str) -> list[str]:
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com")
    result = subprocess.run(["git", *identity, *line], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@pytest.mark.parametrize("own", [None, "*.tmp\n!gradcam.png", "gradcam.png"])
def test_git_takes_nothing_that_shows_an_image_wherever_the_output_lies(finished_once, tmp_path, own):
    """In a repository of a user's, even in its root with a ``.gitignore`` there already."""
    in_git(tmp_path, "init", "-q")
    output = tmp_path if own else tmp_path / "my" / "results"
    if own:
        (tmp_path / ".gitignore").write_text(own, encoding="utf-8")
    assert run(finished_once / "data", output) == [("lmf", 0)]
    (output / "gradcam.png.partial").write_bytes(
        (output / "gradcam.png").read_bytes()
    )  # of a crash while it was written
    in_git(tmp_path, "add", "-A")
    staged = [Path(name) for name in in_git(tmp_path, "diff", "--cached", "--name-only")]
    assert {"metrics.csv", "confusion.png", "gradcam.json"} <= {path.name for path in staged}
    assert not {"gradcam.png", "gradcam.png.partial"} & {path.name for path in staged}
    if own:
        assert (tmp_path / ".gitignore").read_text(encoding="utf-8").startswith(own)
    else:
        assert ".gitignore" not in {path.name for path in staged}
    again = (output / ".gitignore").read_bytes()
    run(finished_once / "data", output)
    assert (output / ".gitignore").read_bytes() == again


def test_git_is_kept_off_before_the_picture_is_there(finished_once, tmp_path, monkeypatch):
    there = record(
        monkeypatch, report, "plot_grad_cams", lambda args, result: (args[-1].parent / ".gitignore").exists()
    )
    seen = []
    monkeypatch.setattr(report, "replace_file", lambda path, content: seen.append(path.name) or write(path, content))
    write = results.replace_file
    run(finished_once / "data", tmp_path / "output")
    assert there == [True] and "gradcam.png" in seen


def test_results_hold_no_name_of_an_image(tmp_path):
    """They may be those of patients. Numbers of images are, in the order of names; digests tell nothing back."""
    data, output = write_images(tmp_path / "data"), tmp_path / "output"
    for path in data.rglob("*.png"):
        path.rename(path.with_name(f"Erika-Mustermann-{path.name}"))
    run(data, output)
    run_sweep(data, output)
    for path in output.iterdir():
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert b"Mustermann" not in content and str(data).encode() not in content, path.name


def test_the_repository_ignores_the_picture_of_any_data_set():
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    for name in "folder-cnn", "isic2019-resnet50", "anything":
        assert in_git(ROOT, "check-ignore", f"benchmarks/results/accuracy/{name}/gradcam.png")


# ------------------------------------------------------------------------------------------------------ the last words


def test_an_error_of_the_code_keeps_its_traceback():
    def wrong():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        endings.run(wrong, ())


def test_sizes_and_colours_of_the_explained_picture_are_there(finished_once):
    """The picture that Git is kept from is drawn."""
    assert min(Image.open(finished_once / "output" / "gradcam.png").size) > 200


def test_the_sweep_is_read_as_the_experiment_reads_it(finished_once):
    assert len(sweep._read(finished_once / "output")) == 2 * len(CANDIDATES["lmf"])
