"""Promise: a logit adjustment is added to each term's own softmax, as accurately as if the logits had come with it."""

from dataclasses import replace

import pytest
import torch
from oracle import (
    DTYPES,
    PATHS,
    REDUCTIONS,
    assert_accurate,
    class_weights,
    evaluate,
    every_way,
    make_case,
    pairwise,
    with_probabilities,
)
from test_accuracy import TERMS

from lmf_triton import LMFLoss, lmf_loss, log_prior_adjustment
from lmf_triton.fused import backend, launch

HAM10000 = [6705, 1113, 1099, 514, 327, 142, 115]
SHAPES = [(7,), (5, 1), (300, 7), (3, 600), (2, 19, 5, 3), (2, 40, 5, 3), (10, 3, 7)]  # of each kind of launch


def adjustment(n_classes: int) -> torch.Tensor:
    """A log prior of long-tailed counts."""
    return log_prior_adjustment([1000 * 0.9 ** (j % 60) + 1 for j in range(n_classes)])


@pytest.mark.slow
@every_way
@pairwise(shape=SHAPES, dtype=DTYPES, reduction=["none", "mean"], terms=[TERMS[0], TERMS[1], TERMS[8], TERMS[9]])
def test_sizes_and_dtypes(device, shape, dtype, reduction, terms):
    alpha, beta, gamma, scale = terms
    options = {"alpha": alpha, "beta": beta, "gamma": gamma, "scale": scale, "reduction": reduction}
    b = adjustment(shape[min(1, len(shape) - 1)])
    case = make_case(shape, dtype, logit_adjustment=b, **options).to(device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=1 if reduction == "none" or dtype == torch.float16 else 2)


@pytest.mark.slow
@pairwise(path=PATHS, terms=TERMS, reduction=REDUCTIONS, weighted=[False, True], grad_in_forward=[True, False])
def test_options(device, terms, reduction, weighted, grad_in_forward):
    weight = class_weights(19) if weighted else None
    alpha, beta, gamma, scale = terms
    options = {"alpha": alpha, "beta": beta, "gamma": gamma, "scale": scale, "reduction": reduction}
    case = make_case((21, 19), torch.float32, weight=weight, logit_adjustment=adjustment(19), **options).to(device)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert_accurate(case, loss, grad, roundings=2 if grad_in_forward else 1)


@pytest.mark.slow
@pairwise(kind=["cluster", "loop", "shared"], terms=[TERMS[0], TERMS[9]], grad_in_forward=[True, False])
def test_long_rows(triton_device, kind, terms, grad_in_forward, monkeypatch):
    """With smaller tiles than a GPU has: on a cluster, looped over, and shared by programs."""
    device = launch.Device(132 if kind == "shared" else 2, (9, 0) if kind == "cluster" else (8, 0), (3, 9))
    if triton_device.type == "cuda":
        pytest.skip("launches are chosen for another device")
    monkeypatch.setattr(backend, "_launch_device", lambda _: device)
    monkeypatch.setattr(launch, "MAX_CTA_CLASSES", {4: 512, 8: 512})
    monkeypatch.setattr(launch, "LOOP_CLASSES", {4: 512, 8: 512})
    launch.plan_forward.cache_clear()
    alpha, beta, gamma, scale = terms
    options = {"alpha": alpha, "beta": beta, "gamma": gamma, "scale": scale}
    case = make_case((3, 2001), torch.float32, logit_adjustment=adjustment(2001), **options)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    launch.plan_forward.cache_clear()
    assert_accurate(case, loss, grad, roundings=2)


@pytest.mark.slow
@every_way
@pairwise(dtype=[torch.float16, torch.bfloat16, torch.float32, torch.float64], scale=[1.0, 30.0], strided=[False, True])
def test_dtypes_and_strides_of_the_adjustment(device, dtype, scale, strided):
    b = adjustment(19).to(dtype)
    b = torch.stack([b, b], 1)[:, 0] if strided else b
    case = make_case((21, 19), torch.float32, scale=scale, logit_adjustment=b).to(device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)


@every_way
@pairwise(scale=[1.0, 30.0], term=[{}, {"alpha": 0.0}, {"beta": 0.0}])
def test_it_is_the_same_as_other_logits(device, scale, term):
    """Where the loss has one softmax: of x + b, or of scale * (x + b / scale)."""
    if scale != 1 and "beta" not in term:
        term = {"alpha": 0.0}
    case = make_case((33, 7), torch.float64, scale=scale, reduction="none", **term).to(device)
    b = adjustment(7).double().to(device)
    adjusted = replace(case, options=case.options | {"logit_adjustment": b})
    moved = replace(case, logits=case.logits + (b if "beta" not in term else b / scale))
    for result, expected in zip(evaluate(adjusted), evaluate(moved), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-13)


@every_way
def test_equal_logits_of_ham10000(device):
    """The adjustment belongs to a softmax of scale 1: 30 times as much would make this loss 122."""
    logits, target = torch.zeros(1, 7, device=device), torch.tensor([6], device=device)
    b = log_prior_adjustment(HAM10000).to(device)
    loss = lmf_loss(logits, target, beta=0, scale=30, logit_adjustment=b)
    torch.testing.assert_close(loss.cpu(), -log_prior_adjustment(HAM10000)[6], rtol=1e-6, atol=0)
    assert loss.item() == pytest.approx(4.47, abs=0.005)


@every_way
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_no_adjustment_and_zeros_are_the_same(device, scale):
    case = make_case((33, 19), torch.float32, scale=scale).to(device)
    zeros = replace(case, options=case.options | {"logit_adjustment": torch.zeros(19, device=device)})
    for result, expected in zip(evaluate(zeros), evaluate(case), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-7)


@every_way
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_classes_may_be_ruled_out(device, scale):
    """-inf is probability 0, as in the logits."""
    case = make_case((33, 7), torch.float64, scale=scale, reduction="none").to(device)
    target = case.target.clamp_min(0) % 6
    b = torch.zeros(7, dtype=torch.float64, device=device)
    b[6] = -torch.inf
    loss, grad = evaluate(replace(case, target=target, options=case.options | {"logit_adjustment": b}))
    without = replace(case, logits=case.logits[:, :6], target=target, margins=case.margins[:6])
    expected, expected_grad = evaluate(without)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad[:, :6], expected_grad, rtol=1e-12, atol=1e-15)
    assert (grad[:, 6] == 0).all()


@every_way
@pairwise(soft=[False, True], scale=[1.0, 4.0], logit=[30.0, 1e3, 1e4])
def test_a_large_logit_that_is_taken_back_rounds_no_other(device, soft, scale, logit):
    """An adjustment may be a mask: what it takes away has no say in the accuracy of what is left."""
    case = make_case((33, 7), torch.float32, scale=scale, reduction="none")
    case.logits[:, 0] = logit
    case = replace(case, target=case.target.clamp_min(1))
    case = with_probabilities(case) if soft else case
    if soft:
        case.target[:, 0] = 0
    b = torch.zeros(7)
    b[0] = -2 * scale * logit
    case = replace(case, options=case.options | {"logit_adjustment": b}).to(device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad)


def test_a_module_with_its_prior(device):
    case = make_case((33, 7), torch.float32).to(device)
    criterion = LMFLoss(HAM10000, logit_adjustment=log_prior_adjustment(HAM10000)).to(device)
    b = criterion.logit_adjustment
    expected = lmf_loss(case.logits, case.target, criterion.margins, logit_adjustment=b)
    assert torch.equal(criterion(case.logits, case.target), expected)
    criterion.logit_adjustment = None
    assert torch.equal(criterion(case.logits, case.target), LMFLoss(HAM10000).to(device)(case.logits, case.target))
