"""Promise: any device that PyTorch has will do: by the kernels, or in plain PyTorch without waiting for the device."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import REDUCTIONS, make_case, pairwise
from torch._subclasses import FakeTensorMode

from lmf_triton import LMFLoss, devices, dispatch, lmf_loss, plain

OTHERS = ["mps", "xpu", "hpu", "xla", "mtia", "privateuseone", "meta"]
ROOT = Path(__file__).parents[1]


def logits_on(device: str) -> SimpleNamespace:
    """All that the choice of a backend looks at."""
    return SimpleNamespace(device=torch.device(device))


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(devices, "fused", None)
    monkeypatch.setattr(devices, "_why_no_triton", "ModuleNotFoundError: No module named 'triton'")
    devices._warn_without_triton.cache_clear()
    yield
    devices._warn_without_triton.cache_clear()


@pytest.mark.parametrize("device", OTHERS)
def test_other_devices_take_the_plain_path_without_a_warning(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.backend_of(logits_on(device)) is plain


@pytest.mark.parametrize("device", [*OTHERS, "cpu"])
@pytest.mark.usefixtures("without_triton")
def test_other_devices_need_no_triton(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.backend_of(logits_on(device)) is plain


def test_cuda_tensors_take_the_kernels():
    assert devices.backend_of(logits_on("cuda")) is devices.fused


@pytest.mark.usefixtures("without_triton")
def test_cuda_tensors_without_triton_take_the_plain_path_with_one_warning(monkeypatch):
    """It says what is missing, why, and stands at the line of the caller."""
    monkeypatch.setattr(dispatch, "ops_are_needed", lambda *tensors: False)  # as for tensors with values
    with FakeTensorMode():  # has CUDA tensors everywhere
        logits, target = torch.zeros(4, 3, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        with pytest.warns(
            RuntimeWarning, match=r"No module named 'triton'.*pip install triton.*triton-windows"
        ) as caught:
            assert lmf_loss(logits, target).device.type == "cuda"
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lmf_loss(logits, target, reduction="none").shape == (4,)


BROKEN = {
    "missing": ("raise ModuleNotFoundError(\"No module named 'triton'\")", "ModuleNotFoundError: No module named"),
    "without its library": ('raise OSError("libtriton.so: cannot open shared object file")', "OSError: libtriton.so"),
    "without a driver": ('raise RuntimeError("0 active drivers")', "RuntimeError: 0 active drivers"),
    "too old": ("__version__ = '1.0.0'", "AttributeError: module 'triton"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("code", "why"), BROKEN.values(), ids=BROKEN)
def test_the_package_works_with_a_triton_that_cannot_be_imported(code, why, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(code + "\n")
    (tmp_path / "triton" / "language.py").touch()
    run = """
import torch
from lmf_triton import LMFLoss, devices
logits = torch.zeros(4, 3, requires_grad=True)
LMFLoss([5, 3, 1])(logits, torch.tensor([0, 1, 2, 0])).backward()
assert logits.grad.abs().sum() > 0
print(devices._why_no_triton)
"""
    result = run_alone(run, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(why)


def run_alone(code: str, *path: Path, options=()) -> subprocess.CompletedProcess:
    """Run code in a Python of its own, whose modules are looked for in these folders first."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT, ROOT / "tests")))
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pairwise(reduction=REDUCTIONS, grad_in_forward=[True, False], dtype=[torch.float16, torch.float32, torch.float64])
def test_meta_tensors_have_a_loss_of_the_right_shape(reduction, grad_in_forward, dtype):
    case = make_case((6, 5, 2), dtype, reduction=reduction, scale=2.0)
    logits, target, margins = (tensor.to("meta") for tensor in (case.logits, case.target, case.margins))
    logits.requires_grad_()
    loss = lmf_loss(logits, target, margins, weight=margins, reduction=reduction, grad_in_forward=grad_in_forward)
    assert loss.is_meta
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == (target.shape if reduction == "none" else ())
    loss.sum().backward()
    assert logits.grad.is_meta and logits.grad.shape == logits.shape and logits.grad.dtype == dtype


def test_a_module_on_the_meta_device_has_a_loss():
    with torch.device("meta"):
        criterion = LMFLoss([3, 2, 1])
        assert criterion(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)).is_meta


# A device that is none: its tensors have their values on the CPU. It has neither float64 nor a way to read a value.
TOY = """
import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("toy")


class Toy(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(values):
        tensor = torch._C._acc.create_empty_tensor(values.shape, values.dtype)
        tensor.__class__, tensor.values_ = Toy, values
        return tensor


def run(op, *args, **kwargs):
    given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Toy)]
    assert op.__name__.split(".")[0] not in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"), f"{op} reads"
    if op is torch.ops.aten._copy_from.default:
        assert len(given) == 2, "a copy between host and device"
        op, args = torch.ops.aten.copy_.default, args[1::-1]
    args, kwargs = tree_map_only(Toy, lambda tensor: tensor.values_, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    out = op(*args, **kwargs)
    assert all(tensor.dtype != torch.float64 for tensor in tree_leaves(out)), f"{op} needs float64"
    known = {id(tensor.values_): tensor for tensor in given}
    return tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else Toy.of(t), out)


library = torch.library.Library("_", "IMPL")
library.fallback(run, "PrivateUse1")
"""


@pytest.mark.slow
def test_a_device_of_a_third_party():
    """Its loss and gradient are the CPU's, through autograd, and nothing is read nor warned of."""
    code = (
        TOY
        + """
from lmf_triton import lmf_loss
from oracle import assert_accurate, class_weights, make_case
from dataclasses import replace

for reduction in "none", "sum", "mean", "mean_per_term":
    for grad_in_forward in True, False:
        case = make_case((5, 7, 3), torch.float32, weight=class_weights(7), reduction=reduction)
        logits, target, margins, weight, upstream = (
            Toy.of(t.clone()) for t in (case.logits, case.target, case.margins, case.options["weight"], case.upstream)
        )
        assert logits.device.type == "toy"
        logits.requires_grad_()
        options = {"reduction": reduction, "grad_in_forward": grad_in_forward}
        loss = lmf_loss(logits, target, margins, weight=weight, **options)
        (grad,) = torch.autograd.grad(loss, logits, upstream)
        assert loss.device == grad.device == logits.device
        assert_accurate(case, loss.values_.detach(), grad.values_, roundings=2)
print("held", flush=True)
os._exit(0)  # PyTorch 2.11 sometimes aborts when it ends autograd's thread for such a device
"""
    )
    result = run_alone("import os\n" + code, options=["-W", "error::RuntimeWarning"])
    assert result.stdout == "held\n", result.stderr[-2000:]
