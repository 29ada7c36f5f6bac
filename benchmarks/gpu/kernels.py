"""How long each kernel of one forward and backward runs, without the host: ``python -m benchmarks.gpu.kernels``.

By PyTorch's profiler, the L2 cache being written over before each step, beside a copy of the logits by CUDA events.
Writes ``kernels.md`` to ``benchmarks/results/<device>/``.
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.problems import GPU_PROBLEMS, PROBLEMS, Problem
from lmf_triton import ldam_margins, lmf_loss

STEPS, FLUSH_BYTES = 10, 2**27  # more than the 50 MiB of an H100's L2 cache
LOSS_KERNELS = ("forward_kernel", "expectation_kernel")  # of classes, and of class probabilities


def kernel_times(problem: Problem, device: torch.device) -> tuple[float, dict[str, float]]:
    """Microseconds of a copy of the logits, the median; and of each kernel of a step, the mean."""
    batch = problem.make(device)
    margins = ldam_margins(batch.class_counts)
    cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def step() -> None:
        batch.logits.grad = None
        cache.zero_()
        lmf_loss(batch.logits, batch.target, margins).backward()

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    ours = {e.key: e.device_time_total / e.count for e in profiled.key_averages() if e.key.endswith("_kernel")}
    sums = [e.device_time_total / e.count for e in profiled.key_averages() if "reduce_kernel" in e.key]
    copies = []
    out = torch.empty_like(batch.logits)
    for _ in range(STEPS):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out.copy_(batch.logits.detach())
        end.record()
        torch.cuda.synchronize()
        copies.append(1e3 * start.elapsed_time(end))
    return statistics.median(copies), ours | {"sum of the parts": sum(sums)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--problems", nargs="+", choices=PROBLEMS, default=[p.name for p in GPU_PROBLEMS], metavar="NAME"
    )
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/<device>)")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    lines = []
    for problem in map(PROBLEMS.get, arguments.problems):
        copy, kernels = kernel_times(problem, device)
        others = "; ".join(f"{name} {t:.1f}" for name, t in kernels.items() if name not in LOSS_KERNELS and t)
        forward = sum(kernels.get(name, 0.0) for name in LOSS_KERNELS)
        lines.append([problem.name, f"{copy:.1f}", f"{forward:.1f}", f"{forward / copy:.2f}", others])
        torch.cuda.empty_cache()
    table = measure.format_table(["problem", "copy µs", "loss and gradient, µs", "of a copy", "the others, µs"], lines)
    print(table)
    folder = arguments.output or measure.results_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    facts = ", ".join(f"{key} {value}" for key, value in measure.environment(device).items())
    (folder / "kernels.md").write_text(f"{table}\n\n{facts}\n")


if __name__ == "__main__":
    main()
