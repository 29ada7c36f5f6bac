"""Time and memory of a problem on the device: forward, backward and both, beside a copy of the logits."""

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import measure
from benchmarks.contenders import Contender, describe
from benchmarks.problems import Problem
from benchmarks.timing import Comparison, Row, format_rows

COPY = "copy"  # of the logits, to a tensor of their shape: one reading, one writing
TIMES = {
    "forward_us": "forward µs",
    "backward_us": "backward µs",
    "forward_backward_us": "both µs",
    "eager_us": "both, eager µs",
    "graph_us": "both, graph µs",
}


def measure_problem(
    problem: Problem, contenders: Sequence[Contender], device: torch.device, seconds: float
) -> list[Row]:
    """A row for each contender and for the copy: medians in microseconds, peak memory, or why there are none."""
    comparison = Comparison(problem, contenders, device)
    logits = comparison.batch.logits.detach()
    copy = {COPY: partial(torch.empty_like(logits).copy_, logits)}
    # What a compiled loss does without a gradient is compiled apart; that is left out, for its time.
    evaluated = {name: run.forward for name, run in comparison.sound.items() if not run.contender.compiled}
    training_forward = comparison.calls("training_forward")
    trained = comparison.calls("forward_backward")
    times = {
        "forward_us": measure.device_times(evaluated, device, seconds),
        "backward_us": measure.device_times(comparison.calls("backward"), device, seconds, prepare=training_forward),
        "forward_backward_us": measure.device_times(copy | trained, device, seconds),
        "eager_us": measure.host_times(trained, device, seconds) if problem.launch_bound else {},
        "graph_us": _graph_times(comparison, seconds) if problem.launch_bound else {},
    }
    return comparison.rows({"logits_mib": logits.numel() * logits.element_size() / 2**20}, times, also=(COPY,))


def _graph_times(comparison: Comparison, seconds: float) -> dict[str, float]:
    """Those that can be captured; the others are measured in the other ways all the same."""
    times = {}
    for name, call in comparison.calls("forward_backward").items():
        try:
            times |= measure.graph_times({name: call}, comparison.device, seconds)
        except RuntimeError as error:
            comparison.failures[name] = f"in a CUDA graph: {describe(error)}"
    return times


def format_problems(rows: Sequence[Row]) -> str:
    """The table for the eye."""
    return format_rows(rows, TIMES, COPY, {"forward_backward_us"})
