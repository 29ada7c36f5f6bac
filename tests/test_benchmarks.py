"""Promise: the benchmark scripts do what they say; the one for a GPU, as far as that can be tried without."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import measure, speed
from benchmarks.contenders import (
    CE_OPTIONS,
    COMPILED,
    CONTENDERS,
    OURS,
    Contender,
    Run,
    cross_entropy,
    expected_lmf,
    importable_peers,
)
from benchmarks.gpu.__main__ import write_results
from benchmarks.gpu.device_tests import run_tests
from benchmarks.gpu.measuring import COPY, format_problems, measure_problem
from benchmarks.gpu.targets import TARGETS, target_lines
from benchmarks.problems import Problem
from benchmarks.timing import Comparison, Row
from reference import lmf as reference

pytestmark = pytest.mark.slow  # whole commands, and pytest within pytest

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
EAGER_CONTENDERS = [contender for contender in CONTENDERS if not contender.compiled]
SOFT = Problem("soft", (64, 7), "", target_dtype=torch.float32)


@pytest.fixture(scope="module")
def clock() -> Iterator[None]:
    """Every call is run once, and takes as many microseconds as calls went before it."""
    ticks = itertools.count(1)

    def times(calls, device, seconds, prepare=None):
        for name, call in calls.items():
            call(*((prepare[name](),) if prepare else ()))
        return {name: 1e-6 * next(ticks) for name in calls}

    with pytest.MonkeyPatch.context() as patch:
        for name in "device_times", "host_times", "graph_times":
            patch.setattr(measure, name, times)
        yield


@pytest.fixture(scope="module")
def measured(clock) -> list[Row]:
    """Rows as on a GPU."""
    problems = [
        Problem("tiny", (32, 7), "", launch_bound=True),
        Problem("large_1k_bf16", (64, 1024), "", torch.bfloat16),
        Problem("large_64k_fp32", (2, 65536), ""),
        Problem("dense_2", (2, 2, 8, 8), "", target_dtype=torch.uint8),
        Problem("rows_32", (32, 1000), ""),
        SOFT,
        Problem("soft_dense_bf16", (2, 19, 8, 8), "", torch.bfloat16, torch.bfloat16),
    ]
    return [row for problem in problems for row in measure_problem(problem, EAGER_CONTENDERS, CPU, 0.0)]


def test_every_contender_is_checked_and_measured_on_every_problem(measured):
    names = [COPY, *(contender.name for contender in EAGER_CONTENDERS)]
    assert [row["contender"] for row in measured] == 7 * names
    assert not any(row["failure"] for row in measured)
    ours = [row for row in measured if row["contender"] == OURS]
    assert all(row[f"{what}_us"] > 0 for row in ours for what in ("forward", "backward", "forward_backward"))
    assert [row["graph_us"] is not None for row in ours] == [True, *6 * [False]]


def test_result_files_keep_their_columns(measured, clock, monkeypatch):
    monkeypatch.setattr(speed, "CONTENDERS", EAGER_CONTENDERS)
    rows = speed.measure_problem(Problem("tiny", (32, 7), ""), CPU, 0.0)
    assert list(rows[0]) == [
        *("problem", "shape", "dtype", "target_dtype", "contender"),
        *("forward_us", "forward_backward_us", "peak_mib", "failure"),
    ]
    times = ["forward_us", "backward_us", "forward_backward_us", "eager_us", "graph_us"]
    columns = ["problem", "shape", "dtype", "logits_mib", "contender", *times, "peak_mib", "failure"]
    assert all(list(row) == columns for row in measured)


def test_results_and_targets_are_written(measured, tmp_path):
    write_results(measured, tmp_path, {"device": "none"})
    assert {path.name for path in tmp_path.iterdir()} == {*("targets.md", "bandwidth.png", "time.png", "memory.png")}
    assert OURS in format_problems(measured)
    lines = {line[0]: line for line in target_lines(measured)}
    assert len(lines) == len(TARGETS)
    assert lines["torch.compile LMF"][2] == lines["Liger CE"][2] == "not measured"
    assert lines["copy, C = 1K to 32K"][2] in ("0 of 1", "1 of 1")
    assert lines["eager LMF"][2].endswith(" of 3")


@pytest.mark.parametrize(("ours_us", "met"), [(109.0, "1 of 1"), (111.0, "0 of 1")])
def test_a_target_is_met_or_missed(ours_us, met):
    row = {"problem": "large_4k_bf16", "shape": "65536x4096", "logits_mib": 512.0, "peak_mib": 512.0, "forward_us": 1.0}
    rows = [
        row | {"contender": OURS, "forward_backward_us": ours_us},
        row | {"contender": COPY, "forward_backward_us": 100.0},
    ]
    (line,) = [line for line in target_lines(rows) if line[0].startswith("copy, C = 1K")]
    assert line[2] == met


def test_a_wrong_loss_is_not_timed():
    def half(logits, target, margins):
        return torch.nn.functional.cross_entropy(logits, target) / 2

    for problem in Problem("any", (64, 7), ""), SOFT:
        batch = problem.make(CPU)
        assert "wrong" in Run(Contender("half", half, CE_OPTIONS), batch).failure()
        assert Run(Contender("whole", cross_entropy, CE_OPTIONS), batch).failure() == ""
        assert Run(CONTENDERS[0], batch).failure() == ""


@pytest.mark.parametrize("options", [{}, CE_OPTIONS, {"alpha": 0.5, "beta": 2.0, "gamma": 0.5}])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(33, 7), (5, 2), (4, 19, 3, 2)])
def test_the_loss_of_all_classes_at_once_is_the_references_of_one_after_the_other(shape, reduction, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.rand(shape, dtype=torch.float64, generator=generator)  # no row sums to 1
    target[0] = 0
    target[1, shape[1] // 2 :] = 0
    margins = torch.rand(shape[1], dtype=torch.float64, generator=generator)
    found, exact = (
        function(logits, target, margins, reduction=reduction, **options)
        for function in (expected_lmf, reference.lmf_loss)
    )
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-15)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (found, exact)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_class_probabilities_are_checked_without_a_loop_over_the_classes(monkeypatch):
    batch = Problem("soft", (8, 1000), "", target_dtype=torch.float32).make(CPU)
    monkeypatch.setattr(reference, "lmf_loss", None)
    assert not any(Run(contender, batch).failure() for contender in EAGER_CONTENDERS)


def test_a_loss_that_overwrites_its_logits_is_checked_and_leaves_the_others_theirs():
    def overwriting(logits, target, margins):
        loss = CONTENDERS[0].loss(logits, target, margins)
        logits.detach().zero_()
        return loss

    batch = Problem("any", (64, 7), "").make(CPU)
    before = batch.logits.detach().clone()
    run = Run(Contender("overwriting", overwriting, overwrites=True), batch)
    assert run.failure() == ""
    assert torch.equal(batch.logits, before)
    assert not torch.equal(run.batch.logits, before)


def test_without_a_gpu_the_command_says_what_to_run_instead():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "benchmarks.speed" in result.stderr


def test_the_tests_run_with_what_is_installed(tmp_path, monkeypatch):
    """A file that wants more is named, and not run; one that fails, or takes too long, is not passed over."""
    files = {
        "test_gpu.py": "def test_a(): pass",
        "test_wants.py": "import a_module_that_is_not_there",
        "test_other.py": "import oracle\nfrom torch import nn\ndef test_b(): pass",
        "oracle.py": "",
        "test_benchmarks.py": "assert False",
    }
    (tmp_path / "tests").mkdir()
    for name, content in files.items():
        (tmp_path / "tests" / name).write_text(content)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    output = tmp_path / "tests.txt"
    assert run_tests(output, 60)
    assert "not run, for want of a_module_that_is_not_there: tests/test_wants.py" in output.read_text()
    assert output.read_text().count("1 passed") == 2
    (tmp_path / "tests" / "test_other.py").write_text("def test_b(): assert False")
    assert not run_tests(output, 60)
    (tmp_path / "tests" / "test_other.py").write_text("import time\ndef test_b(): time.sleep(60)")
    assert not run_tests(output, 8)
    assert "stopped after 8 s" in output.read_text()


def test_peers_are_cross_entropies_that_take_two_dimensions_and_classes():
    for peer in importable_peers():
        assert not peer.dense and not peer.probabilities and peer.oracle_options and peer.name != COMPILED


def test_a_contender_is_left_out_of_problems_that_it_does_not_take():
    peer = Contender("peer", cross_entropy, CE_OPTIONS, dense=False, probabilities=False)
    classes, dense = Problem("any", (64, 7), ""), Problem("dense", (2, 7, 4, 4), "")
    ran = [[*Comparison(problem, [peer, CONTENDERS[0]], CPU).runs] for problem in (classes, dense, SOFT)]
    assert ran == [["peer", OURS], [OURS], [OURS]]
