"""Every test runs on a GPU where there is one, and otherwise through Triton's interpreter on the CPU."""

import math
import os

import pytest
import torch

try:
    import hypothesis
except ImportError:  # benchmarks.gpu runs the other tests without it
    hypothesis = None

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from lmf_triton import functional, plain  # noqa: E402

# The same draws in every run; `pytest --hypothesis-profile=long` draws new ones, for half an hour.
if hypothesis is not None:
    hypothesis.settings.register_profile("fixed", derandomize=True, max_examples=150, deadline=None)
    hypothesis.settings.register_profile("long", max_examples=5_000, deadline=None)
    hypothesis.settings.load_profile("fixed")

# The interpreter works through many small tensors, which more threads only slow down.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run only each N-th test: a spread of all")


def pytest_collection_modifyitems(config, items):
    items[:] = items[:: config.getoption("--every")]


@pytest.fixture(params=["triton", "cpu", "cpu, softmax", "cpu, extreme"])
def device(request, monkeypatch) -> torch.device:
    """The device of the test's tensors. The test runs through the Triton kernels and the CPU path's three ways."""
    if request.param == "triton":
        return torch.device("cuda" if HAS_GPU else "cpu")
    monkeypatch.setattr(functional, "_backend", lambda logits: plain)
    if request.param == "cpu, softmax":
        monkeypatch.setattr(plain, "SOFTMAX_CLASSES", 1)
    if request.param == "cpu, extreme":  # every sample is taken for one
        monkeypatch.setattr(plain, "MIN_ODDS", math.inf)
    return torch.device("cpu")


@pytest.fixture
def triton_device() -> torch.device:
    """The device of the test's tensors, for promises that only the Triton kernels make."""
    return torch.device("cuda" if HAS_GPU else "cpu")
