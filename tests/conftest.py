"""Every test runs on a GPU where there is one, and otherwise through Triton's interpreter on the CPU."""

import inspect
import math
import os
from functools import lru_cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import hypothesis
except ImportError:  # benchmarks.gpu runs the other tests without it
    hypothesis = None

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from oracle import ANOTHER_DEVICE, PATHS  # noqa: E402

from lmf_triton import devices, plain, shapes  # noqa: E402
from lmf_triton.plain import indices, probabilities  # noqa: E402

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
    parser.addoption("--all-recipes", action="store_true", help="fail where a recipe's packages are absent, not skip")


def pytest_collection_modifyitems(config, items):
    items[:] = items[:: config.getoption("--every")]


class AsOnAnotherDevice(TorchDispatchMode):
    """Lets nothing pass that makes the host wait, or that a device may lack; mps lacks float64."""

    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
    MISSING = ("take",)

    def __init__(self, *, has_float64: bool) -> None:
        super().__init__()
        self.has_float64 = has_float64

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.READS, f"{func} reads"
        assert func.overloadpacket.__name__ not in self.MISSING, f"{func} is missing on some devices"
        out = func(*args, **(kwargs or {}))
        assert self.has_float64 or torch.float64 not in dtypes((args, kwargs, out)), f"{func} needs float64"
        return out


def dtypes(values) -> set[torch.dtype]:
    return {value.dtype for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


def take_the_cpu_for_another_device(monkeypatch) -> None:
    """The plain backend's way on other devices, on CPU tensors."""

    def watched(function):
        def call(*args, **kwargs):
            with AsOnAnotherDevice(has_float64=torch.float64 in dtypes(args)):
                return function(*args, **kwargs)

        return call

    monkeypatch.setattr(shapes, "on_host", lambda tensor: False)
    for name in "forward", "backward", "apply_upstream":
        monkeypatch.setattr(plain, name, watched(getattr(plain, name)))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> str:
    """The backend that computes the loss: the Triton kernels ("kernel") or plain PyTorch ("cpu").

    The plain backend has two ways that few values take by themselves, and one for devices other than the CPU.
    ``every_way`` of oracle.py sends all samples that way as well, in the tests of values: elsewhere it would find
    nothing that "cpu" does not.
    """
    if request.param != "kernel":
        monkeypatch.setattr(devices, "backend_of", lambda logits: plain)
    if request.param == "cpu, softmax":
        monkeypatch.setattr(indices, "SOFTMAX_CLASSES", 1)
        monkeypatch.setattr(probabilities, "MANY_CLASSES", 1)
    if request.param == "cpu, extreme":  # every sample is taken for one
        for module in indices, probabilities:
            monkeypatch.setattr(module, "MIN_ODDS", math.inf)
        monkeypatch.setattr(probabilities, "MAJORITY", 0.0)  # every sample has a leader
    if request.param == ANOTHER_DEVICE:
        take_the_cpu_for_another_device(monkeypatch)
    return request.param


@pytest.fixture
def device(path) -> torch.device:
    """The device of the test's tensors. A test that asks for it runs once on each path."""
    return torch.device("cuda" if HAS_GPU and path == "kernel" else "cpu")


@pytest.fixture
def triton_device() -> torch.device:
    """The device of the test's tensors, for promises that only the Triton kernels make."""
    return torch.device("cuda" if HAS_GPU else "cpu")
