"""How fast is the loss? Time and peak memory against eager PyTorch, ``torch.compile`` and ``F.cross_entropy``.

``python -m benchmarks.speed`` prints a table and writes ``benchmarks/results/<device>/speed.csv``. Forward is
evaluation, under ``torch.no_grad()``; peak memory is that of forward + backward, above the inputs.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks import measure
from benchmarks.problems import CPU_PROBLEMS, GPU_PROBLEMS, PROBLEMS, Batch, Problem
from lmf_triton import ldam_margins, lmf_loss
from reference import lmf as reference

ORACLE_ELEMENTS = 2**24  # logits that the float64 oracle takes at once: about 2 GiB with its graph
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # 10 times the error of eager PyTorch, or more
SECONDS, QUICK_SECONDS = 4.0, 0.5  # of timing for each problem and pass, shared by the contenders


@dataclass(frozen=True)
class Contender:
    """A loss ``(logits, target, margins)``, and the options with which the oracle computes the same."""

    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    oracle_options: Mapping[str, float] = field(default_factory=dict)
    compiled: bool = False


def cross_entropy(logits: Tensor, target: Tensor, margins: Tensor) -> Tensor:
    """PyTorch's own loss, which takes int64 targets and has no margins."""
    return F.cross_entropy(logits, target.long())


OURS = "lmf_triton"
CONTENDERS = (
    Contender(OURS, lmf_loss),
    Contender("eager", reference.lmf_loss),
    Contender("torch.compile", reference.lmf_loss, compiled=True),
    Contender("F.cross_entropy", cross_entropy, {"alpha": 0, "gamma": 0}),
)


class Run:
    """A contender on a batch: the calls that are timed, and whether what they compute is right."""

    def __init__(self, contender: Contender, batch: Batch) -> None:
        self.contender, self.batch = contender, batch
        self.margins = ldam_margins(batch.class_counts)

    @cached_property
    def loss(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        loss = self.contender.loss
        return torch.compile(loss, dynamic=False) if self.contender.compiled else loss

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.loss(self.batch.logits, self.batch.target, self.margins)

    def forward_backward(self) -> tuple[Tensor, Tensor]:
        loss = self.loss(self.batch.logits, self.batch.target, self.margins)
        (grad,) = torch.autograd.grad(loss, self.batch.logits)
        return loss.detach(), grad

    def failure(self) -> str:
        """Why this contender cannot be timed here: it does not run, or is wrong. Empty if all is well."""
        try:
            self.forward()  # torch.compile compiles it apart from the pass with a gradient
            loss, grad = self.forward_backward()
        except Exception as error:  # no compiler, out of memory: whatever it is, the others are still measured
            reason = str(error).strip().partition("\n")[0]
            return f"{type(error).__name__}: {reason}"
        loss_error, grad_error = self._errors(loss, grad)
        tolerance = TOLERANCE[grad.dtype]
        if loss_error <= tolerance and grad_error <= tolerance:  # not so for NaN
            return ""
        return f"wrong: relative error {loss_error:.1e} of the loss, {grad_error:.1e} of the gradient"

    def _errors(self, loss: Tensor, grad: Tensor) -> tuple[float, float]:
        """Errors against the float64 oracle: of the loss, and of the gradient of the worst sample.

        A sample's error is summed over its classes, most of which have a gradient far below the target's, and is
        relative to the average sample.
        """
        n = self.batch.target.numel()
        exact_loss = exact_size = 0.0
        errors = []
        tensors = self.batch.logits.detach(), self.batch.target, grad
        size = max(1, ORACLE_ELEMENTS * len(grad) // grad.numel())
        for logits, target, grad_piece in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            exact, exact_grad = self._oracle(logits, target)
            exact_loss += exact.item() / n
            exact_size += exact_grad.abs().sum().item() / n
            errors.append((n * grad_piece.double() - exact_grad).abs().sum(1).max())
        worst = torch.stack(errors).max().item()  # Python's max would lose a NaN
        return abs(loss.item() - exact_loss) / exact_loss, worst / exact_size

    def _oracle(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.double().requires_grad_()
        options = self.contender.oracle_options
        loss = reference.lmf_loss(logits, target, self.margins, reduction="sum", **options)
        return loss.detach(), *torch.autograd.grad(loss, logits)


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
