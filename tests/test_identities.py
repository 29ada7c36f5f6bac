"""Promise: cross-entropy, focal loss and LDAM are special cases, and the loss has the symmetries of a softmax."""

import pytest
import torch
import torch.nn.functional as F
from oracle import class_weights, evaluate, every_way, make_case, pairwise

from lmf_triton import lmf_loss


@every_way
@pairwise(reduction=["none", "sum", "mean"], weighted=[False, True], shape=[(33, 19), (2, 7, 5, 3)])
def test_gamma_0_without_ldam_is_cross_entropy(device, reduction, weighted, shape):
    weight = class_weights(shape[1]).double() if weighted else None
    options = {"alpha": 0.0, "gamma": 0.0, "weight": weight, "reduction": reduction}
    case = make_case(shape, torch.float64, **options).to(device)
    loss, grad = evaluate(case)
    logits = case.logits.requires_grad_()
    expected = F.cross_entropy(logits, case.target, weight=case.options["weight"], reduction=reduction)
    (expected_grad,) = torch.autograd.grad(expected, logits, case.upstream)
    torch.testing.assert_close(loss, expected.detach().cpu(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(grad, expected_grad.cpu(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_without_focal_it_is_ldam(device, scale):
    """LDAM as its authors publish it: cross-entropy of scaled logits with the margin taken off the target's."""
    case = make_case((33, 19), torch.float64, beta=0.0, scale=scale, reduction="mean").to(device)
    loss, grad = evaluate(case)
    logits = case.logits.requires_grad_()
    kept = case.target.clamp_min(0)
    shift = F.one_hot(kept, 19) * case.margins[kept].unsqueeze(1)
    expected = F.cross_entropy(scale * (logits - shift), case.target)
    (expected_grad,) = torch.autograd.grad(expected, logits, case.upstream)
    torch.testing.assert_close(loss, expected.detach().cpu(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(grad, expected_grad.cpu(), rtol=1e-11, atol=1e-15)


def test_without_ldam_it_is_focal_loss(device):
    """Focal loss as Lin et al. write it, from the softmax."""
    case = make_case((33, 19), torch.float64, alpha=0.0, gamma=2.0, reduction="sum").to(device)
    loss, _ = evaluate(case)
    kept = case.target != -100
    p = case.logits.softmax(1)[kept].gather(1, case.target[kept].unsqueeze(1))
    torch.testing.assert_close(loss, ((1 - p) ** 2 * -p.log()).sum().cpu(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_loss_is_the_weighted_sum_of_its_terms(device, scale):
    case = make_case((33, 19), torch.float64, reduction="none").to(device)
    both = lmf_loss(case.logits, case.target, case.margins, alpha=1.5, beta=0.5, scale=scale, reduction="none")
    ldam = lmf_loss(case.logits, case.target, case.margins, beta=0.0, scale=scale, reduction="none")
    focal = lmf_loss(case.logits, case.target, alpha=0.0, reduction="none")
    torch.testing.assert_close(both, 1.5 * ldam + 0.5 * focal, rtol=1e-14, atol=0)


@every_way
@pairwise(dtype=[torch.float32, torch.float64], scale=[1.0, 30.0])
def test_the_gradient_of_a_sample_sums_to_zero(device, dtype, scale):
    case = make_case((33, 151), dtype, scale=scale, reduction="sum").to(device)
    _, grad = evaluate(case)
    total = grad.double().sum(1).abs()
    assert (total <= 8 * torch.finfo(dtype).eps * grad.abs().amax(1)).all()


@every_way
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_adding_a_constant_to_a_sample_changes_nothing(device, scale):
    """To the last bit, when the sum is exact: logits in steps of 1/64 and a constant of 512 fit float32."""
    case = make_case((33, 19), torch.float32, scale=scale, reduction="none").to(device)
    logits = (case.logits * 64).round() / 64
    for shift in (512.0, -512.0):
        results = []
        for x in (logits, logits + shift):
            x = x.clone().requires_grad_()
            loss = lmf_loss(x, case.target, case.margins, scale=scale, reduction="none")
            loss.sum().backward()
            results.append((loss, x.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_a_mean_does_not_depend_on_the_unit_of_the_weights(device):
    case = make_case((33, 7), torch.float32).to(device)
    weight = class_weights(7).to(device)
    once, twice = (lmf_loss(case.logits, case.target, case.margins, weight=w) for w in (weight, 2 * weight))
    assert torch.equal(once, twice)


def test_results_are_the_same_every_time(device):
    case = make_case((300, 19), torch.float32).to(device)
    loss, grad = evaluate(case)
    for _ in range(3):
        again, grad_again = evaluate(case)
        assert torch.equal(loss, again)
        assert torch.equal(grad, grad_again)
