"""The forward + backward times of ``speed.py`` under pytest-benchmark: ``pytest benchmarks --benchmark-only``."""

import pytest
import torch

from benchmarks.contenders import CONTENDERS, OURS, Run
from benchmarks.measure import synchronize
from benchmarks.problems import CPU_PROBLEMS, GPU_PROBLEMS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# PyTorch's compiler warns of deprecated parts of PyTorch.
pytestmark = pytest.mark.filterwarnings("default:::torch")


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize(
    "problem", CPU_PROBLEMS if DEVICE.type == "cpu" else GPU_PROBLEMS, ids=lambda problem: problem.name
)
def test_forward_backward(benchmark, problem, contender):
    torch.compiler.reset()
    run = Run(contender, problem.make(DEVICE))
    failure = run.failure()
    if failure and contender.name != OURS:
        pytest.skip(failure)
    assert not failure

    def forward_backward():
        run.forward_backward()
        synchronize(DEVICE)

    benchmark.group = f"{problem.name} {problem.shape}"
    benchmark(forward_backward)
