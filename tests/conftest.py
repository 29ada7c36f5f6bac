"""Every test runs on a GPU where there is one, and otherwise through Triton's interpreter on the CPU."""

import inspect
import math
import os
from functools import lru_cache

import pytest
import torch

try:
    import hypothesis
except ImportError:  # benchmarks.gpu runs the other tests without it
    hypothesis = None

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from oracle import PATHS  # noqa: E402

from lmf_triton import devices, plain  # noqa: E402

# The same draws in every run; `pytest --hypothesis-profile=long` draws new ones, for half an hour.
if hypothesis is not None:
    hypothesis.settings.register_profile("fixed", derandomize=True, max_examples=150, deadline=None)
    hypothesis.settings.register_profile("long", max_examples=5_000, deadline=None)
    hypothesis.settings.load_profile("fixed")

# The interpreter works through many small tensors, which more threads only slow down.
torch.set_num_threads(1)


def shorten_the_interpreters_preparations() -> None:
    """Half of the interpreter's time goes into searches of triton.language for its builtins, at every call.

    They are the same each time, and mostly replaced already for the kernel that makes the call. So here they are looked
    for once, and replaced where they are not. In a Triton without these private names the tests just take longer.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:  # the plain backend needs none
        return

    @lru_cache
    def names_of_builtins(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if interpreter.tl.core.is_builtin(member)]

    def patch_builtin(package, *arguments) -> None:
        names = names_of_builtins(package)
        if names and interpreter.tl.core.is_builtin(getattr(package, names[0])):
            for name in names:
                interpreter._patch_attr(package, name, getattr(package, name), *arguments)

    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = patch_builtin


if not HAS_GPU:
    shorten_the_interpreters_preparations()


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run only each N-th test: a spread of all")


def pytest_collection_modifyitems(config, items):
    items[:] = items[:: config.getoption("--every")]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> str:
    """The backend that computes the loss: the Triton kernels ("kernel") or plain PyTorch ("cpu").

    The plain backend has two ways that few values take by themselves. ``every_way`` of oracle.py sends all samples that
    way as well, in the tests of values: elsewhere it would find nothing that "cpu" does not.
    """
    if request.param != "kernel":
        monkeypatch.setattr(devices, "backend_of", lambda logits: plain)
    if request.param == "cpu, softmax":
        monkeypatch.setattr(plain, "SOFTMAX_CLASSES", 1)
    if request.param == "cpu, extreme":  # every sample is taken for one
        monkeypatch.setattr(plain, "MIN_ODDS", math.inf)
    return request.param


@pytest.fixture
def device(path) -> torch.device:
    """The device of the test's tensors. A test that asks for it runs once on each path."""
    return torch.device("cuda" if HAS_GPU and path == "kernel" else "cpu")


@pytest.fixture
def triton_device() -> torch.device:
    """The device of the test's tensors, for promises that only the Triton kernels make."""
    return torch.device("cuda" if HAS_GPU else "cpu")
