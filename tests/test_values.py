"""Promise: infinities, NaN and the extremes of a dtype follow F.cross_entropy, and stay in their own sample."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    REDUCTIONS,
    Case,
    assert_accurate,
    evaluate,
    evaluate_reference,
    every_way,
    make_case,
    pairwise,
)

from lmf_triton import devices, lmf_loss, plain

INF, NAN = math.inf, math.nan
OPTIONS = [
    {},
    {"alpha": 0.0, "gamma": 0.0},
    {"alpha": 0.0, "gamma": 0.5},
    {"beta": 0.0},
    {"scale": 30.0},
    {"beta": 0.0, "scale": 30.0},
]


def loss_and_grad(rows, target, device, dtype=torch.float32, reduction="none", **options):
    logits = torch.tensor(rows, dtype=dtype, device=device, requires_grad=True)
    margins = torch.full((logits.shape[1],), 0.25, device=device)
    target = torch.tensor(target, device=device)
    loss = lmf_loss(logits, target, margins, reduction=reduction, **options)
    loss.sum().backward()
    return loss.detach().cpu(), logits.grad.cpu()


@every_way
@pairwise(options=OPTIONS, dtype=DTYPES)
def test_masked_classes_have_probability_zero(device, options, dtype):
    """-inf at another class: as if that class were not there."""
    loss, grad = loss_and_grad([[1.0, -INF, 2.0]], [0], device, dtype, **options)
    without, grad_without = loss_and_grad([[1.0, 2.0]], [0], device, dtype, **options)
    assert torch.equal(loss, without)
    assert torch.equal(grad[:, [0, 2]], grad_without)
    assert grad[0, 1] == 0


@every_way
@pairwise(options=OPTIONS, row={"C=1": [3.0], "all others masked": [-INF, 3.0, -INF]})
def test_no_others_gives_loss_0_and_gradient_0(device, options, row):
    loss, grad = loss_and_grad([row], [len(row) // 2], device, **options)
    assert loss.item() == 0
    assert (grad == 0).all()


@every_way
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masked_target_gives_infinite_loss_and_finite_gradient(device, options):
    loss, grad = loss_and_grad([[-INF, 1.0, 2.0]], [0], device, **options)
    assert loss.item() == INF
    assert grad.isfinite().all()
    assert grad[0, 0] < 0
    assert grad.sum().abs() < 1e-5


@pytest.mark.slow
@every_way
@pairwise(
    options=OPTIONS,
    row=[
        [NAN, 1.0, 2.0],  # at the target
        [1.0, NAN, 2.0],  # at another class
        [INF, 1.0, 2.0],
        [1.0, INF, 2.0],
        [1.0, NAN, NAN],  # at every other class, where a maximum may overlook it
        [INF, -INF, -INF],
    ],
    reduction=["none", "sum"],
)
def test_nan_and_inf_spoil_their_own_sample_only(device, options, row, reduction):
    clean = [0.5, -1.0, 2.0]
    loss, grad = loss_and_grad([clean, row, clean], [0, 0, 1], device, reduction=reduction, **options)
    if reduction == "none":
        assert loss.isnan().tolist() == [False, True, False]
    else:
        assert loss.isnan()
    assert grad[1].isnan().all()
    expected, expected_grad = loss_and_grad([clean, clean], [0, 1], device, reduction=reduction, **options)
    assert torch.equal(grad[[0, 2]], expected_grad)
    assert expected.isfinite().all()


@every_way
@pairwise(
    options={
        "LMF": {},
        "focal": {"alpha": 0.0},
        "LDAM": {"beta": 0.0},
        "weighted": {"weight": torch.linspace(0.5, 2, 40)},
    },
    dtype=[torch.bfloat16, torch.float32, torch.float64],
    shape=[(24, 40), (2, 40, 3, 4)],  # classes side by side, and strided
)
def test_samples_with_large_gaps_are_exact_and_leave_the_others_their_bits(device, options, dtype, shape):
    """Gaps beyond 69 (odds of 1e30) of either sign, and beyond the exponents of float32, in every other sample."""
    ordinary = make_case(shape, dtype, reduction="none", **options).to(device)
    is_extreme = (torch.arange(ordinary.target.numel(), device=device) % 2 == 0).view(ordinary.target.shape)
    factor = torch.where(is_extreme, torch.linspace(1, 80, 24, device=device).view(is_extreme.shape), 1.0)
    mixed = replace(ordinary, logits=(ordinary.logits * factor.unsqueeze(1)).to(dtype))
    (loss, grad), (ordinary_loss, ordinary_grad) = evaluate(mixed), evaluate(ordinary)

    is_extreme = is_extreme.cpu()
    grad, ordinary_grad = grad.movedim(1, -1), ordinary_grad.movedim(1, -1)
    assert torch.equal(loss[~is_extreme], ordinary_loss[~is_extreme])
    assert torch.equal(grad[~is_extreme], ordinary_grad[~is_extreme])
    mixed = mixed.to(torch.device("cpu"))
    extreme = Case(
        mixed.logits.movedim(1, -1)[is_extreme],
        mixed.target[is_extreme],
        mixed.margins,
        mixed.upstream[is_extreme],
        mixed.options,
    )
    assert_accurate(extreme, loss[is_extreme], grad[is_extreme])


@every_way
@pytest.mark.parametrize("margin", [-100.0, -17.0, 17.0, 100.0])
def test_large_margins(device, margin):
    """Their exponentials are beyond float32's range, or nearly so."""
    case = make_case((24, 40), torch.float32, reduction="none")
    case = replace(case, margins=torch.linspace(0, margin, 40)).to(device)
    assert_accurate(case, *evaluate(case))


@every_way
def test_a_margin_whose_exponential_has_few_bits(device):
    """e^-101, which is below the smallest normal number; against a gap of 60 it leaves e^-41, which is not."""
    case = Case(
        torch.tensor([[0.0, 60.0]]), torch.tensor([0]), torch.tensor([-101.0, 0.0]), torch.tensor(1.0), {"beta": 0.0}
    ).to(device)
    loss, grad = evaluate(case)
    assert loss.item() == pytest.approx(math.exp(-41), rel=1e-5, abs=0)
    assert grad.tolist() == [pytest.approx([-math.exp(-41), math.exp(-41)], rel=1e-5, abs=0)]


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("options", [{"weight": 1e38}, {"weight": 1e30, "alpha": 1e30}], ids=str)
def test_on_the_cpu_the_sum_of_weights_and_a_weighted_coefficient_may_leave_the_range(monkeypatch, options, scale):
    monkeypatch.setattr(devices, "backend_of", lambda logits: plain)
    options = {**options, "weight": torch.full((7,), options["weight"]), "scale": scale}
    case = make_case((24, 7), torch.float32, **options)
    _, grad = evaluate(case)
    equal = replace(case, options={**options, "weight": torch.ones(7)})  # a mean does not change with its weights' unit
    _, expected = evaluate_reference(equal, torch.float64)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@every_way
def test_the_largest_scale(device):
    """Times log2(e) it is beyond float32's range."""
    rows = [[0.0, 0.5, 0.25], [0.0, 1.0, 0.25]]
    loss, grad = loss_and_grad(rows, [0, 1], device, beta=0.0, scale=3e38)
    assert loss.tolist() == pytest.approx([0.75 * 3e38, 0.0])  # of the gap 0.5 and the margin 0.25
    assert grad.tolist() == [pytest.approx([-3e38, 3e38, 0.0]), [0.0, 0.0, 0.0]]


@every_way
def test_a_coefficient_and_a_scale_whose_product_is_beyond_the_range(device):
    loss, grad = loss_and_grad([[100.0, 0.0]], [0], device, alpha=1e38, beta=0.0, scale=30.0)
    assert loss.item() == 0
    assert (grad == 0).all()


@every_way
@pytest.mark.parametrize("options", [{}, {"weight": torch.full((2,), 1e38)}], ids=["plain", "weighted"])
def test_a_sum_beyond_the_range_is_infinite(device, options):
    options = {name: value.to(device) for name, value in options.items()}
    loss, grad = loss_and_grad([[3e38, 0.0], [3e38, 0.0]], [1, 1], device, reduction="sum", **options)
    assert loss.item() == INF
    assert not grad.isnan().any()


@every_way
@pairwise(
    options=[{"weight": 1e-30}, {"weight": 1e30}, {"weight": 1e-10, "alpha": 1e30}, {"weight": 1e-10, "beta": 1e30}],
    scale=[1.0, 2.0],
)
def test_weights_of_any_size_leave_a_mean_in_range(device, options, scale):
    """Neither a coefficient over the sum of weights, nor a sum of weighted losses, need be in float32's range."""
    options = {**options, "weight": torch.full((7,), options["weight"]), "scale": scale}
    case = make_case((24, 7), torch.float32, **options).to(device)
    assert_accurate(case, *evaluate(case), roundings=2)


@every_way
def test_the_terms_are_weighted_before_they_are_added(device):
    """Their sum is beyond float32's range, but not the weighted ones."""
    rows, weight = [[3e38, 0.0, 1.0]], torch.full((3,), 0.2, device=device)
    loss, grad = loss_and_grad(rows, [1], device, weight=weight)
    assert loss.item() == pytest.approx(1.2e38)
    assert grad[0, 1].item() == pytest.approx(-0.4)


@every_way
@pairwise(reduction=REDUCTIONS, grad_in_forward=[True, False], bad=[NAN, INF, -INF])
def test_ignored_samples_are_zero_whatever_they_hold(device, reduction, grad_in_forward, bad):
    rows, target = [[bad, bad, bad], [0.5, 1.0, 2.0]], [-100, 2]
    options = {"reduction": reduction, "grad_in_forward": grad_in_forward}
    loss, grad = loss_and_grad(rows, target, device, **options)
    alone, grad_alone = loss_and_grad(rows[1:], target[1:], device, **options)
    assert (grad[0] == 0).all()
    assert torch.equal(grad[1:], grad_alone)
    assert torch.equal(loss[-1] if reduction == "none" else loss, alone.squeeze())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everything_ignored(device, reduction):
    """As F.cross_entropy: a mean over nothing is NaN, its gradient 0."""
    loss, grad = loss_and_grad([[0.5, 1.0], [2.0, 1.0]], [-100, -100], device, reduction=reduction)
    assert loss.isnan().all() if reduction.startswith("mean") else (loss == 0).all()
    assert (grad == 0).all()


def test_a_term_without_a_coefficient_does_not_divide_by_its_denominator(device):
    """The weights, of which LDAM's denominator is the sum, are all 0; the focal term is divided by the count."""
    weight = torch.zeros(3, device=device)
    loss, grad = loss_and_grad([[1.0, 2.0, 3.0]], [0], device, reduction="mean_per_term", alpha=0.0, weight=weight)
    assert loss.item() == 0
    assert (grad == 0).all()


@pairwise(reduction=REDUCTIONS, shape=[(0, 5), (0, 5, 4), (3, 5, 0)])
def test_empty_batch(device, shape, reduction):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long, device=device)
    loss = lmf_loss(logits, target, reduction=reduction)
    expected = F.cross_entropy(logits, target, reduction=reduction.removesuffix("_per_term"))
    torch.testing.assert_close(loss.detach(), expected.detach(), equal_nan=True)
    loss.sum().backward()
    assert logits.grad.shape == shape


@every_way
@pairwise(options=OPTIONS, dtype=DTYPES)
def test_extremes_of_the_dtype(device, options, dtype):
    largest = torch.finfo(dtype).max
    rows = [[largest, -largest, 0.0], [-largest, largest, 0.0], [largest, largest, largest], [1e4, -1e4, 0.0]]
    loss, grad = loss_and_grad(rows, [0, 0, 0, 0], device, dtype, **options)
    assert not loss.isnan().any()
    assert (loss >= 0).all()
    assert grad.isfinite().all()
    assert loss[0] == 0
    assert loss[1] > 1e4


@every_way
@pairwise(
    row=[[0.0, 0.0, 0.0], [1e-40, -1e-40, 0.0], [1e4, -1e4, 0.0], [-INF, 0.0, 1.0], [0.0, -INF, 1.0]],
    target=[0, 1, 2],
)
def test_values_that_cross_entropy_defines(device, row, target):
    loss, grad = loss_and_grad([row], [target], device, alpha=0.0, gamma=0.0)
    logits = torch.tensor([row], requires_grad=True)
    expected = F.cross_entropy(logits, torch.tensor([target]), reduction="none")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-7)
    if expected.isfinite().all():  # its gradient of an infinite loss is what ours is, but for the sign of zeros
        expected.sum().backward()
        torch.testing.assert_close(grad, logits.grad, rtol=1e-6, atol=1e-7)
