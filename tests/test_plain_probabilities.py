"""The plain backend where each class has a share in the sample, against the oracle and as the design has its edges."""

import contextlib
import math
import random

import pytest
import torch
from conftest import AsOnAnotherDevice
from oracle import REDUCTIONS

from lmf_triton import plain, shapes
from lmf_triton.options import Inputs, LossOptions
from lmf_triton.plain import probabilities
from reference import lmf as reference

PLAIN_WAYS = ["softmax", "extreme", "gaps", "device"]
DEFAULTS = LossOptions(1.0, 1.0, 1.5, 1.0, -100, "none")


def evaluate(way, inputs, options, upstream=None):
    """Loss and gradient, by one of the module's ways for all samples."""
    grad = torch.empty_like(inputs.logits)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if way == "extreme":  # each sample is computed by itself
            patch.setattr(probabilities, "MIN_ODDS", math.inf)
            patch.setattr(probabilities, "MAJORITY", 0.0)
        if way == "gaps":
            patch.setattr(probabilities, "_softmax_may_be_used", lambda n_classes, views: False)
        if way == "device":
            patch.setattr(shapes, "on_host", lambda tensor: False)
            has_float64 = torch.float64 in (inputs.logits.dtype, inputs.target.dtype)
            stack.enter_context(AsOnAnotherDevice(has_float64=has_float64))
        return plain.loss_of(inputs, options, grad, upstream), grad


def evaluate_reference(inputs, options, upstream, dtype):
    tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs[:5]]
    logits, target, margins, weight, adjustment = tensors
    logits = logits.detach().requires_grad_()
    arguments = options._asdict()
    loss = reference.lmf_loss(logits, target, margins, weight=weight, logit_adjustment=adjustment, **arguments)
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss) if upstream is None else upstream.to(dtype))
    return loss.detach(), grad


def relative_error(actual, exact):
    return (actual.double() - exact).abs().max().item() / (exact.abs().max().item() or 1.0)


def make_target(kind, shape, generator):
    axis = min(1, len(shape) - 1)
    if kind == "indices":
        target = torch.randint(shape[axis], shape[:axis] + shape[axis + 1 :], generator=generator)
        if target.numel() > 1:
            target.view(-1)[0] = -100
        return target
    target = torch.rand(shape, generator=generator)
    if kind == "with zeros":
        target[torch.rand(shape, generator=generator) < 0.5] = 0
    if kind == "expanded":  # one distribution for all samples, as float64
        target = target.select(0, 0).double().expand(shape) if len(shape) > 1 else target.double()
    return target


def lay_out(tensor, layout):
    if layout == "classes last" and tensor.ndim > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    if layout == "sliced":
        return torch.stack((tensor, tensor), -1)[..., 0]
    return tensor


AXES = {
    "shape": [(7,), (5, 1), (5, 2), (5, 7), (3, 150), (2, 19, 2, 3), (2, 40, 5)],
    "layout": ["contiguous", "classes last", "transposed", "sliced"],
    "kind": ["probabilities", "with zeros", "expanded", "indices"],
    "scale": [1.0, 0.5, 30.0],
    "terms": [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)],
    "gamma": [0.0, 0.5, 1.0, 1.5, 2.3, 5.0],
    "per_class": ["nothing", "margins", "margins, weight", "weight, adjustment", "all", "negative margins"],
    "smoothing": [0.0, 0.1, 1.0],
    "reduction": REDUCTIONS,
    "dtype": [torch.float16, torch.bfloat16, torch.float32, torch.float64],
    "chunk": [1, 1 << 18],  # elements; a sample with more is a chunk by itself
}


@pytest.mark.parametrize("way", PLAIN_WAYS)
@pytest.mark.parametrize("seed", range(100))
def test_values(way, seed, monkeypatch):
    """Within twice the reference's error and two units: in few samples errors are a matter of luck."""
    draw = random.Random(seed)
    shape, layout, kind, scale, terms, gamma, per_class, smoothing, reduction, dtype, chunk = map(
        draw.choice, AXES.values()
    )
    monkeypatch.setattr(probabilities, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(seed)
    logits = lay_out((2 * torch.randn(shape, generator=generator)).to(dtype), layout)
    target = make_target(kind, shape, generator)
    n_classes = shape[min(1, len(shape) - 1)]
    margins, weight, bias = (torch.rand(n_classes, generator=generator) for _ in range(3))
    inputs = Inputs(
        logits,
        target,
        -margins if "negative" in per_class else margins / 2 if "margins" in per_class or per_class == "all" else None,
        weight + 0.2 if "weight" in per_class or per_class == "all" else None,
        (bias + 0.01).log() if "adjustment" in per_class or per_class == "all" else None,
    )
    options = LossOptions(*terms, gamma, scale, -100, reduction, smoothing)
    upstream = torch.rand(target.shape if kind == "indices" else target.select(min(1, len(shape) - 1), 0).shape)
    upstream = upstream if reduction == "none" else torch.tensor(0.7)

    exact, rough = (evaluate_reference(inputs, options, upstream, d) for d in (torch.float64, torch.float32))
    shrink = 2.0**-29 if dtype == torch.float64 else 1.0
    for result, of_exact, of_rough in zip(evaluate(way, inputs, options, upstream), exact, rough, strict=True):
        if n_classes == 1:  # whose 1 - p is 0, to a power that may be negative
            of_exact, of_rough = of_exact.nan_to_num(0), of_rough.nan_to_num(0)
        units = 2 * torch.finfo(result.dtype).eps
        assert relative_error(result, of_exact) <= 2 * shrink * relative_error(of_rough, of_exact) + units
    assert (evaluate(way, inputs, options)[0] >= 0).all()


@pytest.mark.parametrize("way", PLAIN_WAYS)
def test_classes_without_share_have_no_say(way):
    logits, target = torch.randn(3, 5), torch.rand(3, 5)
    without = torch.tensor([0, 2, 4])
    target[:, without] = 0
    expected = evaluate("softmax", Inputs(logits.clone(), target), DEFAULTS)
    loss, grad = evaluate(way, Inputs(logits, target), DEFAULTS)
    torch.testing.assert_close((loss, grad), expected)
    logits[0, 0] = -math.inf
    loss, grad = evaluate(way, Inputs(logits, target), DEFAULTS)
    without_it = evaluate("softmax", Inputs(logits[:1, 1:].clone(), target[:1, 1:]), DEFAULTS)
    torch.testing.assert_close((loss[:1], grad[:1, 1:]), without_it)
    assert grad[0, 0] == 0


@pytest.mark.parametrize("way", PLAIN_WAYS)
def test_edges_stay_in_their_rows(way):
    logits, target = torch.randn(6, 4), torch.rand(6, 4) + 0.1
    expected = evaluate("softmax", Inputs(logits.clone(), target.clone()), DEFAULTS)
    logits[0, 1] = -math.inf  # with a share
    logits[1, 2] = math.nan
    logits[2, 3] = math.inf
    logits[3] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    target[3] = 0
    loss, grad = evaluate(way, Inputs(logits, target), DEFAULTS)
    assert loss[0] == math.inf and grad[0].isfinite().all()
    assert loss[1:3].isnan().all() and grad[1:3].isnan().all()
    assert loss[3] == 0 and (grad[3] == 0).all()
    torch.testing.assert_close((loss[4:], grad[4:]), (expected[0][4:], expected[1][4:]))


@pytest.mark.parametrize("way", PLAIN_WAYS)
@pytest.mark.parametrize("lead", [20, 60, 200])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5])
def test_confident_samples_keep_their_accuracy(way, lead, gamma):
    """With one class alone it is the loss of an index; mixed, the sum of such losses."""
    logits = torch.tensor([[0.3, lead + 0.7, -0.4, 0.7]])
    options = DEFAULTS._replace(gamma=gamma)
    margins = torch.tensor([0.1, 0.2, 0.3, 0.4])
    shares = torch.tensor([0.2, 0.5, 0.0, 0.1])
    loss, grad = evaluate(way, Inputs(logits, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), margins), options)
    one = evaluate("index", Inputs(logits.double(), torch.tensor([1]), margins.double()), options)
    torch.testing.assert_close((loss.double(), grad.double()), one, rtol=1e-5, atol=1e-37)
    loss, grad = evaluate(way, Inputs(logits, shares[None], margins), options)
    parts = [evaluate("index", Inputs(logits.double(), torch.tensor([j]), margins.double()), options) for j in range(4)]
    expected = [sum(float(share) * part[i] for share, part in zip(shares, parts, strict=True)) for i in (0, 1)]
    torch.testing.assert_close([loss.double(), grad.double()], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", PLAIN_WAYS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_per_term"])
def test_nothing_to_average(way, reduction):
    options = DEFAULTS._replace(reduction=reduction, label_smoothing=0.1)
    expected = 0.0 if reduction == "sum" else math.nan
    nothing = torch.full((3,), -100)
    loss, grad = evaluate(way, Inputs(torch.randn(3, 4), nothing), options)
    torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
    assert (grad == 0).all()
    for target in torch.rand(0, 4), nothing[:0]:
        loss, _ = evaluate(way, Inputs(torch.randn(0, 4), target), options)
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
    loss, _ = evaluate(way, Inputs(torch.randn(3, 4), nothing, normalizer=torch.tensor([2.0, 3.0])), options)
    torch.testing.assert_close(loss, torch.tensor(0.0))
