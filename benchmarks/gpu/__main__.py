"""Everything that only a GPU can tell, in one command of less than eight minutes: ``python -m benchmarks.gpu``.

Runs the tests on the device; measures each named problem by CUDA events with a cold L2 cache, forward, backward and
both, with the peak memory, against a copy of the logits, PyTorch and the peers that are installed, each checked
against float64 first; compares with the targets; and writes ``benchmarks/results/<device>/``: ``tests.txt``,
``gpu.csv``, ``targets.md`` and three plots. Needs the repository, torch, triton, numpy, pytest and matplotlib; with
pytest-xdist the tests run in parallel.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.contenders import CONTENDERS, OURS, RECOMPUTE, Contender, describe, importable_peers
from benchmarks.gpu import plots, targets
from benchmarks.gpu.device_tests import run_tests
from benchmarks.gpu.measuring import COPY, format_problems, measure_problem
from benchmarks.problems import GPU_PROBLEMS, PROBLEMS, Problem
from benchmarks.timing import Row
from lmf_triton import lmf_loss

BUDGET_SECONDS = 460  # after which no other problem is begun
TEST_SECONDS = 200  # after which the tests are stopped
SECONDS = 0.4  # of timing for each problem and pass, shared by the contenders
SWEEP = tuple(Problem(f"rows_{n}", (n, 1000), "time against N") for n in (32, 128, 512, 2048, 8192, 32768, 131072))
# From the quickest to the slowest, so that these are the ones left out when the time is up.
PROBLEMS_IN_ORDER = (*sorted((*GPU_PROBLEMS, *SWEEP), key=lambda problem: math.prod(problem.shape)),)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--problems", nargs="+", choices=PROBLEMS, metavar="NAME", help="only these, and no sweep over N"
    )
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/<device>)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing a pass (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="begin no problem after so many seconds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(
            2, "benchmarks.gpu needs a GPU, and PyTorch sees none. `python -m benchmarks.speed` measures a CPU.\n"
        )
    return arguments


def measured(names: list[str] | None, device: torch.device, seconds: float, deadline: float) -> Iterator[list[Row]]:
    """The rows of each problem that there is time for; none of one that breaks, so that it takes no others along."""
    contenders = (CONTENDERS[0], Contender(RECOMPUTE, partial(lmf_loss, grad_in_forward=False)), *CONTENDERS[1:])
    contenders += tuple(importable_peers())
    for problem in [PROBLEMS[name] for name in names] if names else PROBLEMS_IN_ORDER:
        start = time.monotonic()
        if start > deadline:
            print(f"time is up: {problem.name} is not measured")
            continue
        # A compiler takes seconds for each.
        chosen = [c for c in contenders if not (c.compiled and problem in SWEEP)]
        rows = []
        try:
            rows = measure_problem(problem, chosen, device, seconds)
        except Exception as error:
            print(f"{problem.name}: {describe(error)}")
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{time.monotonic() - start:5.0f} s  {problem.name}", flush=True)
        yield rows


def write_results(rows: list[Row], output: Path, environment: dict) -> None:
    """The targets and the plots of what has been measured; the table is written as it grows."""
    (output / "targets.md").write_text(targets.markdown(rows, environment))
    plots.draw(rows, output)


def main() -> int:
    arguments = parse_arguments()
    deadline = time.monotonic() + arguments.budget
    device = torch.device("cuda")
    output = arguments.output or measure.results_folder(device)
    output.mkdir(parents=True, exist_ok=True)
    environment = measure.environment(device)
    sound = arguments.no_tests or run_tests(output / "tests.txt", TEST_SECONDS)

    rows: list[Row] = []
    try:
        for of_problem in measured(arguments.problems, device, arguments.seconds, deadline):
            sound &= bool(of_problem)
            rows += of_problem
            if rows:
                measure.write_csv(output / "gpu.csv", rows, environment)
    finally:
        if rows:
            write_results(rows, output, environment)
            print(format_problems([row for row in rows if row["contender"] in (OURS, COPY) or row["failure"]]))
            print(measure.format_table(targets.HEADER, targets.target_lines(rows)))
    print(f"\n{environment}\n{output}")
    wrong = [row for row in rows if row["failure"] and row["contender"] in (OURS, RECOMPUTE)]
    return 0 if sound and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
