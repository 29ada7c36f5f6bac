"""Promise: whatever layout, dtype, options and values are drawn, loss and gradient stay within their error bound.

The oracle is the stable form of the equations in float64 with autograd's gradient, since the literal form of
``reference`` loses confident samples in float64 too. The bound is what float32 allows: an exponent of size E is rounded
once, which is a relative error of E * eps.
"""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import WAYS, every_way
from torch import Tensor

from lmf_triton import devices, lmf_loss, plain

SAFETY = 8  # roundings that a result may pass through beside those of its exponents
IGNORE_INDEX = 127  # held by every integer type, and never a class here


class Draw(NamedTuple):
    logits: Tensor
    target: Tensor
    margins: Tensor | None
    weight: Tensor | None
    upstream: Tensor
    options: dict[str, Any]
    grad_in_forward: bool | None


def lay_out(draw, tensor: Tensor) -> Tensor:
    """The same values in another layout: dimensions permuted in memory, padded, and offset."""
    order = draw(st.permutations(range(tensor.ndim)))
    padding = [draw(st.sampled_from([0, 0, 1, 5])) for _ in tensor.shape]
    strides, step = [0] * tensor.ndim, 1
    for dim in reversed(order):
        strides[dim] = step
        step *= tensor.shape[dim] + padding[dim]
    offset = draw(st.integers(0, 3))
    buffer = torch.full((step + offset,), 99, dtype=tensor.dtype)
    return buffer.as_strided(tensor.shape, strides, offset).copy_(tensor)


@st.composite
def draws(draw) -> Draw:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    n_classes = draw(st.sampled_from([1, 2, 3, 7, 8, 19, 33, 100]))
    n_samples = draw(st.sampled_from([1, 2, 3, 5, 17, 40]))
    space = draw(st.sampled_from([(), (), (3,), (2, 3), (1, 2, 2)]))
    shape = (n_samples, n_classes, *space)
    if draw(st.integers(0, 9)) == 0:
        shape = (n_classes,)
    sample_shape = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    class_axis = min(len(shape) - 1, 1)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))

    logits = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.0, 1e-4, 1.0, 10.0, 1e4]))
    logits = (logits + draw(st.sampled_from([0.0, 0.0, -100.0, 1e4]))).to(dtype)
    target = torch.randint(n_classes, sample_shape, generator=generator)
    is_target = torch.zeros(shape).scatter(class_axis, target.unsqueeze(class_axis), 1.0).bool()
    is_expanded = len(shape) > 1 and draw(st.integers(0, 5)) == 0
    if draw(st.booleans()) and not is_expanded:
        masked = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.9]))
        logits = logits.masked_fill(masked & ~is_target, -torch.inf)
    ignored = torch.rand(sample_shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.99]))
    target = target.masked_fill(ignored, IGNORE_INDEX)
    if draw(st.booleans()):
        target = target.to(draw(st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32])))
    logits = logits[:1].expand(shape) if is_expanded else lay_out(draw, logits)

    reduction = draw(st.sampled_from(["none", "sum", "mean", "mean_per_term"]))
    alpha, beta = draw(st.sampled_from([(1.0, 1.0), (1.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.0, 3.0)]))
    upstream = torch.randn(sample_shape if reduction == "none" else (), generator=generator)
    if reduction == "none" and draw(st.booleans()):
        upstream = torch.tensor(draw(st.sampled_from([1.0, 0.0, -2.5]))).expand(sample_shape)
    return Draw(
        logits=logits,
        target=lay_out(draw, target),
        margins=torch.rand(n_classes, generator=generator) if draw(st.booleans()) else None,
        weight=0.1 + torch.rand(n_classes, generator=generator) if draw(st.booleans()) else None,
        upstream=upstream.to(torch.float64 if dtype == torch.float64 else torch.float32),
        options={
            "alpha": alpha,
            "beta": beta,
            "gamma": draw(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 5.0])),
            "scale": draw(st.sampled_from([1.0, 1.0, 30.0])),
            "ignore_index": IGNORE_INDEX,
            "reduction": reduction,
        },
        grad_in_forward=draw(st.sampled_from([True, False, None])),
    )


class Oracle(NamedTuple):
    loss: Tensor
    grad: Tensor
    loss_bound: Tensor
    grad_bound: Tensor


def oracle(drawn: Draw, eps: float, tiny: float) -> Oracle:
    """Loss and gradient in float64, each with the error that arithmetic of this ``eps`` and ``tiny`` may make."""
    o = drawn.options
    axis = min(drawn.logits.ndim - 1, 1)
    x = drawn.logits.double().requires_grad_()
    kept = drawn.target != o["ignore_index"]
    y = drawn.target.long().where(kept, 0)
    index = y.unsqueeze(axis)
    others = x.scatter(axis, index, -torch.inf)
    alone = others.detach().amax(axis) == -torch.inf  # no others: loss 0
    safe = others.masked_fill(alone.unsqueeze(axis), 0)
    x_y = x.gather(axis, index).squeeze(axis)
    zero = torch.zeros((), dtype=torch.float64)
    gaps = safe - x_y.unsqueeze(axis)  # before the sum, so that large logits close together lose nothing
    u = gaps.logsumexp(axis)
    margin = zero if drawn.margins is None else drawn.margins.double()[y]
    v = (o["scale"] * gaps).logsumexp(axis) + o["scale"] * margin
    focal = torch.exp(-o["gamma"] * torch.logaddexp(-u, zero)) * torch.logaddexp(u, zero)
    ldam = torch.logaddexp(v, zero)

    w = (torch.ones_like(x_y) if drawn.weight is None else drawn.weight.double()[y]).where(kept, 0).detach()
    denominators = {"mean": (w.sum(), w.sum()), "mean_per_term": (w.sum(), kept.sum().double())}
    ldam_total, focal_total = denominators.get(o["reduction"], (torch.ones((), dtype=torch.float64),) * 2)
    active = kept & ~alone
    ldam = (o["alpha"] * w / ldam_total * ldam).where(active, 0)
    focal = (o["beta"] * w / focal_total * focal).where(active, 0)
    losses = ldam + focal
    upstream = drawn.upstream.double()
    (grad,) = torch.autograd.grad((losses * upstream).sum(), x)
    grad = grad.nan_to_num(0.0)  # the rows without others

    # A row's exponents: gaps to its largest logit, times what multiplies them in either term.
    finite = x.detach().masked_fill(x.detach().isinf(), torch.nan)
    spread = (finite - x_y.detach().unsqueeze(axis)).abs().nan_to_num(0.0).amax(axis)
    steepest = max(o["scale"] if o["alpha"] else 0.0, 1 + o["gamma"] if o["beta"] else 0.0)
    relative = SAFETY * eps * (1 + steepest * (spread + margin + 1))
    loss_bound = relative * losses.detach() + tiny
    grad_bound = (relative * grad.abs().amax(axis)).unsqueeze(axis) + tiny
    if o["reduction"] == "none":
        return Oracle(losses.detach(), grad, loss_bound, grad_bound)
    loss = losses.detach().sum()
    if o["reduction"] != "sum" and not kept.any():
        loss = loss * torch.nan
    return Oracle(loss, grad, loss_bound.sum(), grad_bound)


@pytest.mark.parametrize("path", [pytest.param("kernel", marks=pytest.mark.slow), *WAYS[1:]], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(draws())
def test_loss_and_gradient_stay_within_their_bounds(device, drawn):
    arithmetic = torch.float64 if drawn.logits.dtype == torch.float64 else torch.float32
    limits, stored = torch.finfo(arithmetic), torch.finfo(drawn.logits.dtype)
    expected = oracle(drawn, limits.eps, limits.tiny)

    leaf = drawn.logits.to(device).detach().requires_grad_()
    on_device = [None if t is None else t.to(device) for t in (drawn.target, drawn.margins, drawn.weight)]
    target, margins, weight = on_device
    loss = lmf_loss(leaf, target, margins, weight=weight, grad_in_forward=drawn.grad_in_forward, **drawn.options)
    (grad,) = torch.autograd.grad(loss, leaf, drawn.upstream.to(device))

    assert loss.dtype == arithmetic
    assert loss.shape == (target.shape if drawn.options["reduction"] == "none" else ())
    assert grad.dtype == leaf.dtype
    assert grad.stride() == torch.empty_like(leaf).stride()
    assert_within(loss.detach().cpu(), expected.loss, expected.loss_bound)
    # The gradient is rounded to the logits' dtype, and once more where it was stored before its upstream was known.
    # Below the smallest normal number it is off by a step of the subnormals; in Triton's interpreter, which narrows
    # float32 subnormals to bfloat16 wrongly, by that number itself.
    is_interpreted = leaf.device.type == "cpu" and devices.backend_of(leaf) is not plain
    step = stored.tiny * (1 if is_interpreted and leaf.dtype == torch.bfloat16 else stored.eps)
    subnormal = step * (1 + drawn.upstream.abs().amax())
    assert_within(grad.cpu(), expected.grad, expected.grad_bound + 2 * (stored.eps * expected.grad.abs() + subnormal))


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    actual = actual.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    error = (actual - expected).abs().nan_to_num(0.0)
    assert (error <= bound.nan_to_num(torch.inf)).all(), f"largest excess {(error / bound).max().item():.3g}"


@every_way
def test_the_bound_notices_a_wrong_result(device):
    """A change of the loss by 0.1% is far outside the bound, so the property test can fail."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    options = {"alpha": 1.0, "beta": 1.0, "gamma": 1.5, "scale": 1.0, "ignore_index": -100, "reduction": "sum"}
    drawn = Draw(logits, torch.arange(5), None, None, torch.tensor(1.0), options, None)
    limits = torch.finfo(torch.float32)
    expected = oracle(drawn, limits.eps, limits.tiny)
    loss = lmf_loss(logits.to(device), drawn.target.to(device), **options).cpu()
    assert_within(loss, expected.loss, expected.loss_bound)
    with pytest.raises(AssertionError, match="excess"):
        assert_within(loss * 1.001, expected.loss, expected.loss_bound)
