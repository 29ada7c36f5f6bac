"""How fast is the loss? Time and peak memory against eager PyTorch, ``torch.compile`` and ``F.cross_entropy``.

``python -m benchmarks.speed`` prints a table and writes ``benchmarks/results/<device>/speed.csv``. Forward is
evaluation, under ``torch.no_grad()``; peak memory is that of forward + backward, above the inputs. On the CPU, glibc is
told to keep freed memory, so that page faults do not decide.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.contenders import CONTENDERS, OURS, Run
from benchmarks.problems import CPU_PROBLEMS, GPU_PROBLEMS, PROBLEMS, Problem

SECONDS, QUICK_SECONDS = 4.0, 0.5  # of timing for each problem and pass, shared by the contenders


def measure_problem(problem: Problem, device: torch.device, seconds: float) -> list[dict[str, object]]:
    """One row for each contender: its medians and peak memory, or why there are none."""
    torch.compiler.reset()  # compile for this shape alone, as one would to train with it
    batch = problem.make(device)
    runs = {contender.name: Run(contender, batch) for contender in CONTENDERS}
    failures = {name: run.failure() for name, run in runs.items()}
    sound = {name: run for name, run in runs.items() if not failures[name]}

    on_host = device.type == "cpu" or problem.launch_bound
    times = measure.host_times if on_host else measure.device_times
    forward = times({name: run.forward for name, run in sound.items()}, device, seconds)
    forward_backward = times({name: run.forward_backward for name, run in sound.items()}, device, seconds)
    memory = {name: measure.peak_bytes(run.forward_backward, device) for name, run in sound.items()}
    return [
        {
            "problem": problem.name,
            "shape": "x".join(map(str, problem.shape)),
            "dtype": str(problem.dtype).removeprefix("torch."),
            "target_dtype": str(problem.target_dtype).removeprefix("torch."),
            "contender": name,
            "forward_us": _rounded(forward.get(name), 1e6),
            "forward_backward_us": _rounded(forward_backward.get(name), 1e6),
            "peak_mib": _rounded(memory.get(name), 2**-20),
            "failure": failures[name],
        }
        for name in runs
    ]


def _rounded(value: float | None, factor: float) -> float | None:
    return None if value is None else float(f"{value * factor:.4g}")


def format_rows(rows: Sequence[dict]) -> str:
    """The rows as a table, each time also as a multiple of ours on the same problem."""
    ours = {row["problem"]: row for row in rows if row["contender"] == OURS}
    lines = []
    for row in rows:
        cells = [f"{row['problem']} {row['shape']} {row['dtype']}", row["contender"]]
        for column in ("forward_us", "forward_backward_us"):
            time, our_time = row[column], ours[row["problem"]][column]
            cells += ["-" if time is None else f"{time:,.0f}", f"{time / our_time:.2f}" if time and our_time else "-"]
        cells.append("-" if row["peak_mib"] is None else f"{row['peak_mib']:,.3g}")
        lines.append(cells)
    header = ("problem", "loss", "forward µs", "× ours", "forward + backward µs", "× ours", "peak MiB")
    notes = [f"{row['problem']}, {row['contender']}: {row['failure']}" for row in rows if row["failure"]]
    notes.append("F.cross_entropy does less work than LMF: no margins, no focal factor.")
    return "\n".join([measure.format_table(header, lines), "", *notes])


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
    print(format_rows(rows))
    print(f"\n{environment}\n{output}")
    return 1 if any(row["failure"] for row in rows if row["contender"] == OURS) else 0


if __name__ == "__main__":
    sys.exit(main())
