"""Promise: wrong input raises an error that quotes what was given and what was expected; nothing is ever touched
outside the tensors."""

import os
import subprocess
import sys

import pytest
import torch
from oracle import ANOTHER_DEVICE, PATHS, REDUCTIONS, UNREAD, pairwise

from lmf_triton import FocalLoss, LMFLoss, class_balanced_weights, ldam_margins, lmf_loss
from lmf_triton.functional import lmf_loss as functional_lmf_loss

LOGITS = torch.zeros(4, 3)
TARGET = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("changes", "error", "quoted"),
    [
        ({"logits": [[0.0]]}, TypeError, ["logits", "list"]),
        ({"target": [0, 1, 2, 0]}, TypeError, ["target", "list"]),
        ({"logits": LOGITS.long()}, TypeError, ["float16", "int64"]),
        ({"logits": LOGITS.to(torch.complex64)}, TypeError, ["float32", "complex64"]),
        ({"logits": LOGITS.to(torch.float8_e4m3fn)}, TypeError, ["float16", "float8_e4m3fn"]),
        ({"logits": torch.tensor(1.0)}, ValueError, ["(C,)", "scalar"]),
        ({"logits": torch.zeros(4, 0)}, ValueError, ["at least one class", "(4, 0)"]),
        ({"target": TARGET.float()}, TypeError, ["integer", "float32"]),
        ({"target": TARGET.bool()}, TypeError, ["integer", "bool"]),
        ({"target": TARGET[:3]}, ValueError, ["(4,)", "(4, 3)", "(3,)"]),
        ({"target": torch.zeros(4, 3, dtype=torch.long)}, ValueError, ["(4,)", "(4, 3)"]),
        ({"logits": torch.zeros(4, 3, 2)}, ValueError, ["(4, 2)", "(4, 3, 2)", "(4,)"]),
        ({"margins": [0.1, 0.2, 0.3]}, TypeError, ["margins", "list"]),
        ({"margins": torch.zeros(4)}, ValueError, ["margins", "(3,)", "(4,)"]),
        ({"margins": torch.zeros(1, 3)}, ValueError, ["margins", "(3,)", "(1, 3)"]),
        ({"margins": torch.zeros(3, dtype=torch.long)}, TypeError, ["margins", "floating", "int64"]),
        ({"margins": torch.zeros(3, requires_grad=True)}, ValueError, ["margins", "requires_grad"]),
        ({"weight": torch.zeros(2)}, ValueError, ["weight", "(3,)", "(2,)"]),
        ({"weight": torch.ones(3, dtype=torch.long)}, TypeError, ["weight", "floating", "int64"]),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, ["weight", "requires_grad"]),
        ({"weight": torch.ones(3, device="meta")}, ValueError, ["weight", "meta", "cpu"]),
        ({"target": TARGET.to("meta")}, ValueError, ["target", "meta", "cpu"]),
        ({"alpha": "1"}, TypeError, ["alpha", "'1'"]),
        ({"target": TARGET.to(torch.complex64)}, TypeError, ["integer", "complex64"]),
        ({"weight": torch.ones(3).to(torch.float8_e4m3fn)}, TypeError, ["weight", "float16", "float8_e4m3fn"]),
        ({"logits": LOGITS.bool()}, TypeError, ["float16", "bool"]),
        ({"alpha": -1.0}, ValueError, ["alpha", "positive", "-1.0"]),
        ({"alpha": 10**400}, ValueError, ["alpha", "float32", "1000"]),
        ({"scale": 1e39}, ValueError, ["scale", "float32", "1e+39"]),
        ({"beta": 1e-50}, ValueError, ["beta", "float32", "1e-50"]),
        ({"ignore_index": 2**64 - 100}, ValueError, ["ignore_index", "int64", "18446744073709551516"]),
        ({"beta": float("nan")}, ValueError, ["beta", "finite", "nan"]),
        ({"gamma": -0.5}, ValueError, ["gamma", "positive", "-0.5"]),
        ({"gamma": torch.tensor(1.0)}, TypeError, ["gamma", "Tensor"]),
        ({"scale": 0.0}, ValueError, ["scale", "greater than 0", "0.0"]),
        ({"scale": float("inf")}, ValueError, ["scale", "finite", "inf"]),
        ({"alpha": 0.0, "beta": 0.0}, ValueError, ["alpha and beta", "both 0"]),
        ({"ignore_index": 1.5}, TypeError, ["ignore_index", "integer", "1.5"]),
        ({"reduction": "average"}, ValueError, ["'mean_per_term'", "'average'"]),
        ({"reduction": None}, ValueError, ["'mean_per_term'", "None"]),
        ({"reduction": ["mean"]}, ValueError, ["'mean_per_term'", "['mean']"]),
        ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "[0, 1]", "-0.1"]),
        ({"label_smoothing": 1.5}, ValueError, ["label_smoothing", "[0, 1]", "1.5"]),
        ({"label_smoothing": float("nan")}, ValueError, ["label_smoothing", "[0, 1]", "nan"]),
        ({"label_smoothing": "a tenth"}, TypeError, ["label_smoothing", "'a tenth'"]),
        ({"label_smoothing": None}, TypeError, ["label_smoothing", "None"]),
        ({"label_smoothing": torch.tensor(0.1)}, TypeError, ["label_smoothing", "Tensor"]),
        ({"logit_adjustment": [0.0] * 3}, TypeError, ["logit_adjustment", "list"]),
        ({"logit_adjustment": torch.zeros(2)}, ValueError, ["logit_adjustment", "(3,)", "(2,)"]),
        ({"logit_adjustment": torch.zeros(4, 3)}, ValueError, ["logit_adjustment", "(3,)", "(4, 3)"]),
        ({"logit_adjustment": torch.zeros(3).long()}, TypeError, ["logit_adjustment", "floating", "int64"]),
        ({"logit_adjustment": torch.zeros(3, requires_grad=True)}, ValueError, ["logit_adjustment", "requires_grad"]),
        ({"target": torch.ones(4, 3, requires_grad=True)}, ValueError, ["probabilities", "requires_grad", "detach()"]),
        ({"target": torch.ones(4, 2)}, TypeError, ["probabilities", "(4, 2)", "(4, 3)"]),
        ({"target": torch.ones(3)}, TypeError, ["probabilities", "(3,)", "(4, 3)"]),
        ({"target": torch.ones(4, 3).to(torch.float8_e4m3fn)}, TypeError, ["probabilities", "float8_e4m3fn"]),
        ({"target": torch.ones(4, 3, dtype=torch.bool)}, TypeError, ["probabilities", "bool", ".float()"]),
        ({"target": torch.ones(4, 3, device="meta")}, ValueError, ["target", "meta", "cpu"]),
        ({"grad_in_forward": 1}, TypeError, ["grad_in_forward", "True, False or None", "1"]),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else None,
)
def test_errors_quote_what_was_given_and_expected(changes, error, quoted):
    arguments = {"logits": LOGITS, "target": TARGET} | changes
    with pytest.raises(error) as caught:
        lmf_loss(**arguments)
    for words in quoted:
        assert words in str(caught.value)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        lmf_loss(LOGITS, TARGET, None, 1.0)


@pytest.mark.parametrize("build", [lambda: ldam_margins([1], max_margin=-1), lambda: ldam_margins([1], constant=-1)])
def test_negative_margins(build):
    with pytest.raises(ValueError, match="at least 0, got -1"):
        build()


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_effective_number_beta(beta):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        class_balanced_weights([1, 2], beta=beta)
    with pytest.raises(TypeError, match="beta must be a real number, got 'a'"):
        class_balanced_weights([1, 2], beta="a")


def test_modules_refuse_bad_settings_when_they_are_built():
    with pytest.raises(ValueError, match="reduction"):
        FocalLoss(reduction="average")
    with pytest.raises(ValueError, match="gamma"):
        LMFLoss([1, 2], gamma=-1)
    with pytest.raises(ValueError, match=r"\(2,\), got \(3,\)"):
        LMFLoss([1, 2], weight=torch.ones(3))


BAD_TARGETS = [3, -1, -99, 1000, 2**40, -(2**40)]  # 2**40 is 0 in its low 32 bits


@pairwise(path=[*PATHS, ANOTHER_DEVICE], bad=BAD_TARGETS)
def test_target_out_of_range_is_an_error_on_the_cpu_and_where_it_is_asked_for(device, path, bad):
    target = torch.tensor([0, 1, bad, 2], device=device)
    for check_target in [False, True] if path == "cpu" else [True]:
        with pytest.raises(IndexError) as caught:
            lmf_loss(LOGITS.to(device), target, check_target=check_target)
        for words in ("[0, 3)", "ignore_index=-100", f"got {bad} at index [2]"):
            assert words in str(caught.value)


@pairwise(
    path=UNREAD, bad=BAD_TARGETS, reduction=REDUCTIONS, grad_in_forward=[True, False], weight=[None, [1.0, 2.0, 3.0]]
)
def test_target_out_of_range_spoils_its_own_sample_only(device, bad, grad_in_forward, reduction, weight):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(device)
    target = torch.tensor([0, -100, bad, 2, 1], device=device)
    weight = None if weight is None else torch.tensor(weight, device=device)
    options = {"weight": weight, "grad_in_forward": grad_in_forward, "reduction": reduction}
    logits.requires_grad_()
    loss = lmf_loss(logits, target, **options)
    loss.sum().backward()
    assert loss.isnan().tolist() == ([False, False, True, False, False] if reduction == "none" else True)
    assert logits.grad[2].isnan().all()
    rest = torch.tensor([0, 1, 3, 4], device=device)
    clean = logits.detach()[rest].requires_grad_()
    expected = lmf_loss(clean, target[rest], **options)
    expected.sum().backward()
    torch.testing.assert_close(logits.grad[rest], clean.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_ignore_index_that_the_target_cannot_hold_ignores_nothing(device, dtype):
    """-100 is 156 in uint8, and 300 is 44 in both."""
    n_classes = 200 if dtype == torch.uint8 else 100
    target = torch.tensor([156 if dtype == torch.uint8 else 44, 44, 0], dtype=dtype, device=device)
    logits = torch.randn(3, n_classes, generator=torch.Generator().manual_seed(0)).to(device)
    for ignore_index in (-100 if dtype == torch.uint8 else 300, 300, 2**40):
        loss = lmf_loss(logits, target, reduction="none", ignore_index=ignore_index)
        assert (loss > 0).all()


# One program and its edges; class axis strided; a row a program, of odd length; a loop over classes.
@pairwise(
    shape=[(5, 7), (33, 3), (3, 19, 5, 7), (3, 1001), (2, 33000)],
    grad_in_forward=[True, False],
    reduction=["none", "mean"],
)
def test_nothing_is_written_outside_the_gradient(triton_device, shape, grad_in_forward, reduction, monkeypatch):
    """Every new tensor lies between guards, and every element of the gradient is written."""
    guard = 4096
    buffers = []

    def guarded(like, *args, **kwargs):
        n = like.numel()
        buffer = torch.full((n + 2 * guard,), torch.nan, dtype=kwargs.get("dtype", like.dtype), device=like.device)
        buffer[:guard] = buffer[-guard:] = 7.0
        buffers.append(buffer)
        return buffer[guard : guard + n].view(like.shape)

    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(triton_device).requires_grad_()
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=torch.Generator().manual_seed(0))
    target = target.to(triton_device)
    new_empty = torch.Tensor.new_empty

    def guarded_new(like, shape, **kwargs):
        plain = new_empty(like, shape, **kwargs)
        return guarded(plain) if plain.is_floating_point() and plain.numel() > 0 else plain

    monkeypatch.setattr(torch, "empty_like", guarded)
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_new)
    loss = lmf_loss(logits, target, reduction=reduction, grad_in_forward=grad_in_forward)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.isfinite().all()
    assert buffers
    for buffer in buffers:
        assert (buffer[:guard] == 7).all()
        assert (buffer[-guard:] == 7).all()


def run_without_triton(code: str) -> subprocess.CompletedProcess:
    """Run code in a Python where Triton cannot be imported."""
    block = "import sys; sys.modules['triton'] = None\n"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_works_on_the_cpu_without_triton():
    code = """
import torch
from lmf_triton import LMFLoss
logits = torch.zeros(4, 3, requires_grad=True)
LMFLoss([5, 3, 1])(logits, torch.tensor([0, 1, 2, 0])).backward()
assert logits.grad.abs().sum() > 0
"""
    result = run_without_triton(code)
    assert result.returncode == 0, result.stderr


def test_the_package_exports_the_function():
    assert lmf_loss is functional_lmf_loss
