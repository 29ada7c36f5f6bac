"""Everything that only a GPU can tell, in one command of less than eight minutes: ``python -m benchmarks.gpu``.

Runs the tests on the device; measures each named problem by CUDA events with a cold L2 cache, forward, backward and
both, with the peak memory, against a copy of the logits, PyTorch and the peers that are installed, each checked
against float64 first; compares with the targets; and writes ``benchmarks/results/<device>/``: ``tests.txt``,
``gpu.csv``, ``targets.md`` and three plots. Needs the repository, torch, triton, numpy, pytest and matplotlib; with
pytest-xdist the tests run in parallel.
"""

import argparse
import ast
import contextlib
import gc
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import measure
from benchmarks.contenders import (
    COMPILED,
    CONTENDERS,
    CROSS_ENTROPY,
    EAGER,
    LIGER,
    OURS,
    QUACK,
    RECOMPUTE,
    Contender,
    Run,
    describe,
    importable_peers,
)
from benchmarks.problems import GPU_PROBLEMS, PROBLEMS, Problem
from lmf_triton import lmf_loss

COPY = "copy"  # of the logits, to a tensor of their shape: one reading, one writing
BUDGET_SECONDS = 460  # after which no other problem is begun
TEST_SECONDS = 200  # after which the tests are stopped
GRACE_SECONDS = 15  # for their summary
SECONDS = 0.4  # of timing for each problem and pass, shared by the contenders
FIRST_TESTS = ("tests/test_gpu.py",)  # so that they are not the ones left out when the time is up
# These run nothing on the device.
OTHER_TESTS = tuple(
    f"tests/test_{name}.py" for name in ("accuracy_data", "accuracy_protocol", "benchmarks", "compile_targets")
)
SWEEP = tuple(Problem(f"rows_{n}", (n, 1000), "time against N") for n in (32, 128, 512, 2048, 8192, 32768, 131072))
# From the quickest to the slowest, so that these are the ones left out when the time is up.
PROBLEMS_IN_ORDER = (*sorted((*GPU_PROBLEMS, *SWEEP), key=lambda problem: math.prod(problem.shape)),)

Row = dict[str, object]


def run_tests(output: Path, seconds: float) -> bool:
    """Run the tests on the device, their output going to a file; whether all of them passed within the time."""
    workers = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    files = [str(path.relative_to(measure.ROOT)) for path in sorted((measure.ROOT / "tests").glob("test_*.py"))]
    without = {file: missing for file in files if (missing := missing_modules(measure.ROOT / file))}
    rest = [file for file in files if file not in {*FIRST_TESTS, *OTHER_TESTS, *without}]
    deadline = time.monotonic() + seconds
    passed = True
    with output.open("w") as file:
        for selection, parallel in (FIRST_TESTS, []), (rest, workers):
            command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *parallel, *selection]
            left = max(1.0, deadline - time.monotonic())
            # Its own session, so that its workers end with it.
            process = subprocess.Popen(
                command, cwd=measure.ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                passed &= process.wait(left) == 0
            except subprocess.TimeoutExpired:
                passed = False
                _stop(process)
                file.write(f"\nstopped after {seconds:.0f} s\n")
                file.flush()
            except BaseException:
                _stop(process)
                raise
        for name, missing in without.items():
            file.write(f"not run, for want of {', '.join(sorted(missing))}: {name}\n")
    words = ("FAILED", "ERROR", "stopped", "not run")
    lines = output.read_text(errors="replace").splitlines()
    print("\n".join(["tests:", *(line for line in lines if re.search(r" in \d", line) or line.startswith(words)), ""]))
    return passed


def _stop(process: subprocess.Popen) -> None:
    """Interrupt pytest, so that it says what failed; if it does not listen, end it and its workers."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def missing_modules(path: Path) -> set[str]:
    """Modules that a test file imports and that are not installed."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    roots = {name.partition(".")[0] for name in names} - {"oracle"}  # which lies beside the tests
    return {root for root in roots if importlib.util.find_spec(root) is None}


def measure_problem(
    problem: Problem, contenders: Sequence[Contender], device: torch.device, seconds: float
) -> list[Row]:
    """A row for each contender and for the copy: medians in microseconds, peak memory, or why there are none."""
    torch.compiler.reset()  # compile for this shape alone, as one would to train with it
    batch = problem.make(device)
    is_dense = len(problem.shape) > 2
    runs = {c.name: Run(c, batch) for c in contenders if c.dense or not is_dense}
    failures = {name: run.failure() for name, run in runs.items()}
    sound = {name: run for name, run in runs.items() if not failures[name]}
    copied = torch.empty_like(batch.logits)
    copy = {COPY: partial(copied.copy_, batch.logits.detach())}

    # What a compiled loss does without a gradient is compiled apart; that is left out, for its time.
    evaluated = {name: run.forward for name, run in sound.items() if not run.contender.compiled}
    trained = {name: run.forward_backward for name, run in sound.items()}
    columns = {
        "forward_us": measure.device_times(evaluated, device, seconds),
        "backward_us": measure.device_times(
            {name: run.backward for name, run in sound.items()},
            device,
            seconds,
            prepare={name: run.training_forward for name, run in sound.items()},
        ),
        "forward_backward_us": measure.device_times(copy | trained, device, seconds),
    }
    if problem.launch_bound:
        columns["eager_us"] = measure.host_times(trained, device, seconds)
        columns["graph_us"] = {}
        for name, call in trained.items():
            try:
                columns["graph_us"] |= measure.graph_times({name: call}, device, seconds)
            except RuntimeError as error:  # what cannot be captured is measured in the other ways all the same
                failures[name] = f"in a CUDA graph: {describe(error)}"
    peaks = {name: measure.peak_bytes(run.forward_backward, device) for name, run in sound.items()}
    facts = {
        "problem": problem.name,
        "shape": "x".join(map(str, problem.shape)),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "logits_mib": batch.logits.numel() * batch.logits.element_size() / 2**20,
    }
    return [
        {
            **facts,
            "contender": name,
            **{
                column: _microseconds(columns.get(column, {}).get(name))
                for column in ("forward_us", "backward_us", "forward_backward_us", "eager_us", "graph_us")
            },
            "peak_mib": peaks[name] / 2**20 if name in peaks else None,
            "failure": failures.get(name, ""),
        }
        for name in (COPY, *runs)
    ]


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{1e6 * seconds:.4g}")


@dataclass(frozen=True)
class Target:
    """A bound on a ratio of ours to another contender's time, or of memory, on some problems."""

    what: str
    applies: Callable[[Row], bool]  # to our row
    ratio: Callable[[Row, dict[str, Row]], float | None]  # of our row, given all rows of its problem
    limit: float


def _over(other: str, column: str = "forward_backward_us") -> Callable[[Row, dict[str, Row]], float | None]:
    """Our time over the other's."""

    def ratio(ours: Row, rows: dict[str, Row]) -> float | None:
        theirs = rows.get(other, {}).get(column)
        return ours[column] / theirs if ours[column] and theirs else None

    return ratio


def _over_one_read(ours: Row, rows: dict[str, Row]) -> float | None:
    """Our forward pass over half a copy."""
    return ours["forward_us"] / (rows[COPY]["forward_backward_us"] / 2) if ours["forward_us"] else None


def _memory(ours: Row, rows: dict[str, Row]) -> float | None:
    """Our peak memory over one gradient."""
    return ours["peak_mib"] / ours["logits_mib"] if ours["peak_mib"] else None


def _n_classes(row: Row) -> int:
    return int(str(row["shape"]).split("x")[1])


def _n_samples(row: Row) -> int:
    return math.prod(map(int, str(row["shape"]).split("x"))) // _n_classes(row)


def _is_large(row: Row) -> bool:
    return str(row["problem"]).startswith("large")


def _is_short_or_dense(row: Row) -> bool:
    return str(row["problem"]).startswith(("short", "dense"))


def _is_tiny(row: Row) -> bool:
    return row["problem"] == "tiny"


TARGETS = (
    Target("copy, C = 1K to 32K", lambda r: _is_large(r) and _n_classes(r) <= 32768, _over(COPY), 1.10),
    Target("copy, C = 64K to 256K", lambda r: _is_large(r) and _n_classes(r) > 32768, _over(COPY), 1.35),
    Target("copy, short rows and dense", _is_short_or_dense, _over(COPY), 1.25),
    Target("F.cross_entropy, N = 32, C = 7, eager mode", _is_tiny, _over(CROSS_ENTROPY, "eager_us"), 1.0),
    Target("eager LMF, N = 32, C = 7, eager mode", _is_tiny, _over(EAGER, "eager_us"), 0.25),
    Target("eager LMF", lambda r: _is_large(r) or _is_short_or_dense(r), _over(EAGER), 1 / 8),
    Target("torch.compile LMF", lambda r: _is_large(r) or _is_short_or_dense(r), _over(COMPILED), 1 / 2),
    Target("Liger CE", _is_large, _over(LIGER), 1 / 1.5),
    Target("QuACK CE", _is_large, _over(QUACK), 1 / 1.2),
    Target("one gradient, peak memory", _is_large, _memory, 1.01),
    Target("one read, forward alone", lambda r: _is_large(r) or _is_short_or_dense(r), _over_one_read, 1.10),
)


def target_lines(rows: Sequence[Row]) -> list[list[str]]:
    """For each target: how many of its problems meet it, and the worst."""
    problems: dict[str, dict[str, Row]] = {}
    for row in rows:
        problems.setdefault(str(row["problem"]), {})[str(row["contender"])] = row
    lines = []
    for target in TARGETS:
        ratios = {
            name: target.ratio(of_problem[OURS], of_problem)
            for name, of_problem in problems.items()
            if OURS in of_problem and target.applies(of_problem[OURS])
        }
        ratios = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        if not ratios:
            lines.append([target.what, f"{target.limit:.3g}", "not measured", "-", "-"])
            continue
        worst = max(ratios, key=ratios.get)
        met = sum(ratio <= target.limit for ratio in ratios.values())
        median = sorted(ratios.values())[len(ratios) // 2]
        lines.append(
            [
                target.what,
                f"{target.limit:.3g}",
                f"{met} of {len(ratios)}",
                f"{median:.3g}",
                f"{ratios[worst]:.3g} ({worst})",
            ]
        )
    return lines


TARGET_HEADER = ("ours over", "target", "met", "median", "worst")
COLORS = {OURS: "#0072B2", RECOMPUTE: "#56B4E9", EAGER: "#999999", COMPILED: "#E69F00", CROSS_ENTROPY: "#D55E00"}
COLORS |= {COPY: "#000000", LIGER: "#CC79A7", QUACK: "#009E73", "flash-attn CE": "#F0E442"}


def plot_bandwidth(rows: Sequence[Row], path: Path) -> None:
    """Useful traffic (one reading, one writing of the logits) a second against C, forward + backward."""
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), ("bfloat16", "float32"), strict=True):
        large = [row for row in rows if _is_large(row) and row["dtype"] == dtype and row["forward_backward_us"]]
        for name in dict.fromkeys(row["contender"] for row in large):
            points = sorted((_n_classes(row), _gigabytes_a_second(row)) for row in large if row["contender"] == name)
            style = "--" if name == COPY else "o-"
            axes.plot(*zip(*points, strict=True), style, color=COLORS.get(name), label=name, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("classes")
        axes.set_title(dtype)
        axes.set_ylim(bottom=0)
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("GB/s of useful traffic, forward + backward")
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def _gigabytes_a_second(row: Row) -> float:
    return 2 * row["logits_mib"] * 2**20 / row["forward_backward_us"] / 1e3


def plot_lines(rows: Sequence[Row], x: Callable[[Row], float], y: str, labels: tuple[str, str], path: Path) -> None:
    """One line a contender, both axes logarithmic."""
    figure = Figure(figsize=(6.5, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted((x(row), row[y]) for row in rows if row["contender"] == name and row[y])
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=COLORS.get(name), label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def write_results(rows: Sequence[Row], output: Path, environment: dict) -> None:
    """The targets and the plots of what has been measured; the table is written as it grows."""
    header = ["| " + " | ".join(TARGET_HEADER) + " |", "|" + "---|" * len(TARGET_HEADER)]
    lines = header + ["| " + " | ".join(line) + " |" for line in target_lines(rows)]
    described = ", ".join(f"{name} {value}" for name, value in environment.items())
    (output / "targets.md").write_text("\n".join([*lines, "", described, ""]))
    plot_bandwidth(rows, output / "bandwidth.png")
    sweep = [row for row in rows if str(row["problem"]).startswith("rows_")]
    samples = lambda row: math.prod(map(int, row["shape"].split("x"))) / _n_classes(row)  # noqa: E731
    plot_lines(
        sweep, samples, "forward_backward_us", ("samples, C = 1000", "µs, forward + backward"), output / "time.png"
    )
    large = [row for row in rows if _is_large(row) and row["dtype"] == "float32"]
    plot_lines(
        large, lambda row: row["logits_mib"], "peak_mib", ("MiB of logits", "peak MiB above"), output / "memory.png"
    )


def format_rows(rows: Sequence[Row]) -> str:
    """The table for the eye: each time also as a multiple of the copy."""
    copies = {row["problem"]: row["forward_backward_us"] for row in rows if row["contender"] == COPY}
    lines = []
    for row in rows:
        times = [row[column] for column in ("forward_us", "backward_us", "forward_backward_us", "eager_us", "graph_us")]
        total, copy = row["forward_backward_us"], copies.get(row["problem"])
        cells = [f"{row['problem']} {row['shape']} {row['dtype']}", row["contender"]]
        cells += ["-" if value is None else f"{value:,.4g}" for value in times]
        cells += [f"{total / copy:.2f}" if total and copy else "-"]
        cells += ["-" if row["peak_mib"] is None else f"{row['peak_mib']:,.4g}"]
        lines.append(cells)
    header = (
        "problem",
        "loss",
        "forward µs",
        "backward µs",
        "both µs",
        "both, eager µs",
        "both, graph µs",
        "× copy",
        "MiB",
    )
    failures = [f"{row['problem']}, {row['contender']}: {row['failure']}" for row in rows if row["failure"]]
    return "\n".join([measure.format_table(header, lines), "", *failures])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--problems", nargs="+", choices=PROBLEMS, metavar="NAME", help="only these, and no sweep over N"
    )
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/<device>)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing a pass (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="begin no problem after so many seconds")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(
            2, "benchmarks.gpu needs a GPU, and PyTorch sees none. `python -m benchmarks.speed` measures a CPU.\n"
        )

    start = time.monotonic()
    device = torch.device("cuda")
    output = args.output or measure.results_folder(device)
    output.mkdir(parents=True, exist_ok=True)
    environment = measure.environment(device)
    passed = args.no_tests or run_tests(output / "tests.txt", TEST_SECONDS)

    contenders = (CONTENDERS[0], Contender(RECOMPUTE, partial(lmf_loss, grad_in_forward=False)), *CONTENDERS[1:])
    contenders += tuple(importable_peers())
    rows: list[Row] = []
    try:
        for problem in [PROBLEMS[name] for name in args.problems] if args.problems else PROBLEMS_IN_ORDER:
            if time.monotonic() - start > args.budget:
                print(f"time is up: {problem.name} is not measured")
                continue
            # A compiler takes seconds for each.
            chosen = [c for c in contenders if not (c.compiled and problem in SWEEP)]
            try:
                rows += measure_problem(problem, chosen, device, args.seconds)
            except Exception as error:  # one problem that breaks must not take the others' figures along
                print(f"{problem.name}: {describe(error)}")
                passed = False
            gc.collect()
            torch.cuda.empty_cache()
            if rows:
                measure.write_csv(output / "gpu.csv", rows, environment)
            print(f"{time.monotonic() - start:5.0f} s  {problem.name}", flush=True)
    finally:
        if rows:
            write_results(rows, output, environment)
            print(format_rows([row for row in rows if row["contender"] in (OURS, COPY) or row["failure"]]))
            print(measure.format_table(TARGET_HEADER, target_lines(rows)))
    print(f"\n{environment}\n{output}")
    wrong = [row for row in rows if row["failure"] and row["contender"] in (OURS, RECOMPUTE)]
    return 0 if passed and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
