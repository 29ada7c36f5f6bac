"""The forward + backward times of ``speed.py`` under pytest-benchmark: ``pytest benchmarks --benchmark-only``."""

import pytest
import torch

from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.measure import synchronize
from benchmarks.problems import CPU_PROBLEMS, GPU_PROBLEMS
from benchmarks.timing import Comparison

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# PyTorch's compiler warns of deprecated parts of PyTorch.
pytestmark = pytest.mark.filterwarnings("default:::torch")


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize(
    "problem", CPU_PROBLEMS if DEVICE.type == "cpu" else GPU_PROBLEMS, ids=lambda problem: problem.name
)
def test_forward_backward(benchmark, problem, contender):
    comparison = Comparison(problem, [contender], DEVICE)
    failure = comparison.failures[contender.name]
    if failure and contender.name != OURS:
        pytest.skip(failure)
    assert not failure
    call = comparison.calls("forward_backward")[contender.name]

    def forward_backward():
        call()
        synchronize(DEVICE)

    benchmark.group = f"{problem.name} {problem.shape}"
    benchmark(forward_backward)
