"""How fast is the loss? Time and peak memory against eager PyTorch, ``torch.compile`` and ``F.cross_entropy``.

``python -m benchmarks.speed`` prints a table and writes ``benchmarks/results/<device>/speed.csv``. Forward is
evaluation, under ``torch.no_grad()``; peak memory is that of forward + backward, above the inputs. On the CPU, glibc is
told to keep freed memory, so that page faults do not decide.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.problems import CPU_PROBLEMS, GPU_PROBLEMS, PROBLEMS, Problem
from benchmarks.timing import Comparison, Row, dtype_name, format_rows

SECONDS, QUICK_SECONDS = 4.0, 0.5  # of timing for each problem and pass, shared by the contenders
TIMES = {"forward_us": "forward µs", "forward_backward_us": "forward + backward µs"}


def measure_problem(problem: Problem, device: torch.device, seconds: float) -> list[Row]:
    """A row for each contender."""
    comparison = Comparison(problem, CONTENDERS, device)
    on_host = device.type == "cpu" or problem.launch_bound
    times = measure.host_times if on_host else measure.device_times
    return comparison.rows(
        {"target_dtype": dtype_name(problem.target_dtype)},
        {column: times(comparison.calls(column.removesuffix("_us")), device, seconds) for column in TIMES},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(f"{name} ({problem.why})" for name, problem in PROBLEMS.items())
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, metavar="NAME", help=f"of {known}")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file (default: benchmarks/results/<device>/speed.csv)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for a trial")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure.keep_freed_memory()
    environment = measure.environment(args.device)

    problems = CPU_PROBLEMS if args.device.type == "cpu" else GPU_PROBLEMS
    if args.problems:
        problems = [PROBLEMS[name] for name in args.problems]
    rows = []
    for problem in (progress := tqdm(problems)):
        progress.set_description(problem.name)
        rows += measure_problem(problem, args.device, QUICK_SECONDS if args.quick else SECONDS)

    output = args.output or measure.results_folder(args.device) / "speed.csv"
    measure.write_csv(output, rows, environment)
    print(format_rows(rows, TIMES, OURS, TIMES))
    print("F.cross_entropy does less work than LMF: no margins, no focal factor.")
    print(f"\n{environment}\n{output}")
    return 1 if any(row["failure"] for row in rows if row["contender"] == OURS) else 0


if __name__ == "__main__":
    sys.exit(main())
