"""Promise: the loss is a well-behaved part of any autograd graph."""

import gc

import pytest
import torch
from oracle import PATHS, REDUCTIONS, Case, assert_accurate, evaluate, evaluate_reference, make_case, pairwise
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from lmf_triton import FocalLoss, LMFLoss, devices, ldam_margins, lmf_loss, plain
from lmf_triton.autograd import LMFFunction
from lmf_triton.fused import launch
from lmf_triton.plain import indices
from reference import lmf as reference

MODES = [True, False]


# Both paths together, since test_accuracy.py has every option's gradient on each, from the reference's autograd.
@pytest.mark.slow
@pairwise(
    path=PATHS,
    reduction=REDUCTIONS,
    terms=[(1.0, 1.0, 1.5), (0.0, 1.0, 0.5), (0.7, 0.0, 0.0)],
    grad_in_forward=MODES,
    scale=[1.0, 3.0],
)
def test_gradcheck(device, reduction, grad_in_forward, scale, terms):
    alpha, beta, gamma = terms
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 2, dtype=torch.float64, generator=generator).to(device).requires_grad_()
    target = torch.tensor([[0, 2], [-100, 1], [2, 2], [1, 0]], device=device)
    margins = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64, device=device)
    weight = torch.tensor([0.5, 1.0, 2.0], device=device)

    def loss(x):
        return lmf_loss(
            x,
            target,
            margins,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            scale=scale,
            weight=weight,
            reduction=reduction,
            grad_in_forward=grad_in_forward,
        )

    assert gradcheck(loss, (logits,), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("retain_graph", [False, True])  # in place, and to a copy
def test_programs_that_apply_several_tiles(triton_device, reduction, retain_graph, monkeypatch):
    """Six tiles of upstream gradients for two programs: of the last two steps, some go beyond the end."""
    monkeypatch.setattr(launch, "MAX_UPSTREAM_PROGRAMS", 2)
    launch.plan_upstream.cache_clear()
    case = make_case((3000, 7), torch.float32, reduction=reduction).to(triton_device)
    logits = case.logits.requires_grad_()
    loss = lmf_loss(logits, case.target, case.margins, reduction=reduction, grad_in_forward=True)
    gc.collect()  # Triton's interpreter leaves cycles that hold the gradient too, so that it would be copied
    (grad,) = torch.autograd.grad(loss, logits, case.upstream, retain_graph=retain_graph)
    launch.plan_upstream.cache_clear()
    assert_accurate(case, loss.detach().cpu(), grad.cpu(), roundings=2)


@pairwise(reduction=REDUCTIONS, grad_in_forward=[*MODES, None], dtype=[torch.float32, torch.bfloat16])
def test_backward_twice(device, grad_in_forward, reduction, dtype):
    """Each backward through a retained graph gives its own right answer and leaves earlier ones alone."""
    case = make_case((33, 7), dtype, reduction=reduction).to(device)
    logits = case.logits.requires_grad_()
    loss = lmf_loss(logits, case.target, case.margins, reduction=reduction, grad_in_forward=grad_in_forward)
    factors = [3.0, 0.0, 1.0, 0.5]
    grads = []
    for i, factor in enumerate(factors):
        retain = i < len(factors) - 1
        (grad,) = torch.autograd.grad(loss, logits, factor * torch.ones_like(loss), retain_graph=retain)
        grads.append(grad)
    one = grads[2]
    for factor, grad in zip(factors, grads, strict=True):
        torch.testing.assert_close(grad, factor * one, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert one.abs().max() > 0
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits, torch.ones_like(loss))


@pairwise(kind=["ones", "stride 0", "vector", "strided", "zero"], grad_in_forward=MODES)
def test_upstream_of_reduction_none(device, grad_in_forward, kind):
    case = make_case((33, 7), torch.float32, reduction="none")
    upstream = {
        "ones": torch.ones(33),
        "stride 0": torch.tensor(0.3).expand(33),
        "vector": torch.linspace(-1, 2, 33),
        "strided": torch.linspace(-1, 2, 66)[::2],
        "zero": torch.zeros(33),
    }[kind]
    case = type(case)(case.logits, case.target, case.margins, upstream, case.options).to(device)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert_accurate(case, loss, grad, roundings=2)


@pairwise(grad_in_forward=MODES, reduction=["none", "mean"])
def test_part_of_a_larger_expression(device, grad_in_forward, reduction):
    """Logits from a layer, the loss squared and added to another one: the chain rule on both sides."""
    case = make_case((33, 7), torch.float64, reduction=reduction).to(device)
    features = torch.randn(33, 5, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(0))
    layer = torch.nn.Linear(5, 7, dtype=torch.float64, device=device)

    def gradient(loss_fn):
        layer.zero_grad()
        logits = layer(features)
        loss = loss_fn(logits, case.target, case.margins, reduction=reduction)
        (loss.square().sum() / 3 + logits.square().mean()).backward()
        return layer.weight.grad.clone()

    def ours(*args, **kwargs):
        return lmf_loss(*args, grad_in_forward=grad_in_forward, **kwargs)

    def theirs(logits, target, margins, **kwargs):
        return reference.lmf_loss(logits, target, margins.double(), **kwargs)

    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_second_derivatives_are_refused(device, grad_in_forward):
    case = make_case((2, 3), torch.float64).to(device)  # small, since numerical derivatives take a call an element
    logits = case.logits.requires_grad_()
    loss = lmf_loss(logits, case.target, grad_in_forward=grad_in_forward)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)  # the first derivative is fine
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()
    penalised = torch.autograd.grad(lmf_loss(logits * 1, case.target), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(penalised[0].square().sum(), logits)  # logits that are not a leaf
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(
            lambda x: lmf_loss(x * 1, case.target, grad_in_forward=grad_in_forward), logits.detach()
        )
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradgradcheck(lambda x: lmf_loss(x, case.target, grad_in_forward=grad_in_forward), (logits,))


@pytest.mark.parametrize(
    ("reduction", "dtype", "in_forward"),
    [
        ("sum", torch.float32, True),
        ("mean", torch.bfloat16, True),
        ("mean_per_term", torch.float64, True),
        ("none", torch.float32, False),
        ("mean", torch.float16, False),
    ],
    ids=str,
)
def test_when_the_gradient_is_computed_if_nothing_is_said(device, reduction, dtype, in_forward):
    """What is kept for backward tells: a gradient, or the logits."""
    case = make_case((33, 7), dtype).to(device)
    logits = case.logits.requires_grad_()
    loss = lmf_loss(logits, case.target, reduction=reduction)
    saved = [tensor for tensor in loss.grad_fn.saved_tensors if tensor is not None and tensor.shape == logits.shape]
    assert len(saved) == 1
    assert (saved[0].data_ptr() != logits.data_ptr()) == in_forward


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_where_none_is_wanted(device, context, monkeypatch):
    case = make_case((33, 7), torch.float32).to(device)
    logits = case.logits.requires_grad_()
    expected = lmf_loss(logits, case.target, case.margins)
    monkeypatch.setattr(LMFFunction, "apply", None)
    with context():
        loss = lmf_loss(logits, case.target, case.margins)
    assert not loss.requires_grad
    assert torch.equal(loss, expected.detach())
    assert torch.equal(lmf_loss(logits.detach(), case.target, case.margins), expected.detach())


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_logits_are_never_modified(device, grad_in_forward):
    case = make_case((33, 7), torch.float32).to(device)
    logits = case.logits.clone().requires_grad_()
    lmf_loss(logits, case.target, case.margins, grad_in_forward=grad_in_forward).backward()
    assert torch.equal(logits, case.logits)
    assert logits._version == 0


def test_another_use_of_the_logits_gets_its_own_gradient(device):
    """A softmax of the same logits needs their values in backward."""
    case = make_case((33, 7), torch.float32).to(device)
    logits = case.logits.requires_grad_()
    penalty = (logits.softmax(1) * logits.log_softmax(1)).sum()
    (alone,) = torch.autograd.grad(penalty, logits, retain_graph=True)
    loss = lmf_loss(logits, case.target, case.margins)
    (grad,) = torch.autograd.grad(loss, logits)
    penalty = (logits.softmax(1) * logits.log_softmax(1)).sum()
    (both,) = torch.autograd.grad(penalty + lmf_loss(logits, case.target, case.margins), logits)
    torch.testing.assert_close(both, alone + grad)


def test_float16_gradients_of_a_mean_survive_a_loss_scale(device):
    """The mean over a million samples has gradients of 1e-6 and less, which float16 cannot hold before they are scaled.

    In the interpreter a thousand samples stand for the million: their mean counts for a thousandth.
    """
    n_samples, loss_scale = 1_000_000, 65536.0
    is_interpreted = device.type == "cpu" and devices.backend_of(torch.empty(0)) is not plain
    n = 1000 if is_interpreted else n_samples
    row = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    reference.lmf_loss(row, torch.tensor([0])).backward()
    expected = row.grad / n_samples

    logits = row.detach().half().repeat(n, 1).to(device).requires_grad_()
    loss = lmf_loss(logits, torch.zeros(n, dtype=torch.uint8, device=device))
    (loss * (n / n_samples) * loss_scale).backward()
    grad = logits.grad.double().cpu() / loss_scale
    torch.testing.assert_close(grad, expected.expand_as(grad), rtol=2e-3, atol=0)
    unscaled = expected.half()
    assert ((unscaled.double() - expected).abs() > 0.01 * expected.abs()).any()  # so the order does matter


def test_under_autocast(device):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 7, device=device)
    features = torch.randn(33, 16, device=device)
    target = torch.randint(7, (33,), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = layer(features)
        loss = lmf_loss(logits, target)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, logits)
    assert_accurate(
        Case(logits.detach(), target, None, torch.tensor(1.0, device=device)), loss.detach().cpu(), grad.cpu()
    )


def test_with_a_grad_scaler(device):
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    logits = make_case((33, 7), torch.float32).logits.to(device).requires_grad_()
    target = torch.randint(7, (33,), device=device)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    before = logits.detach().clone()
    (expected,) = torch.autograd.grad(lmf_loss(logits, target), logits)
    scaler.scale(lmf_loss(logits, target)).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(logits.detach(), before - expected)


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_the_kept_gradient_is_handed_out_without_a_copy(device, value, monkeypatch):
    """One gradient buffer in all: backward scales and returns the buffer that forward has filled."""
    case = make_case((33, 7), torch.float32).to(device)
    allocated = []
    empty_like = torch.empty_like

    def spy(*args, **kwargs):
        tensor = empty_like(*args, **kwargs)
        allocated.append((tensor.shape, tensor.data_ptr()))  # a second reference to the tensor would force a copy
        return tensor

    monkeypatch.setattr(torch, "empty_like", spy)
    logits = case.logits.requires_grad_()
    loss = lmf_loss(logits, case.target, case.margins)
    gc.collect()  # Triton's interpreter leaves what it held to the collector
    loss.backward(torch.full_like(loss, value))
    assert [pointer for shape, pointer in allocated if shape == logits.shape] == [logits.grad.data_ptr()]
    expected = evaluate_reference(case, torch.float64)[1] / case.upstream.item() * value
    torch.testing.assert_close(logits.grad.cpu().double(), expected, rtol=1e-5, atol=1e-7)


@pairwise(reduction=REDUCTIONS, grad_in_forward=MODES, value=[float("inf"), float("nan")])
def test_ignored_samples_stay_zero_under_any_upstream(device, grad_in_forward, reduction, value):
    """As in F.cross_entropy, where an overflow of the loss scale does not reach them either."""
    case = make_case((33, 7), torch.float32, reduction=reduction).to(device)
    logits = case.logits.requires_grad_()
    loss = lmf_loss(logits, case.target, reduction=reduction, grad_in_forward=grad_in_forward)
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, value))
    assert (grad[1] == 0).all()
    assert not grad[0].isfinite().any()


def test_the_cpu_path_works_through_chunks(monkeypatch):
    """Chunks of a few samples, the last one shorter, give what one chunk gives."""
    monkeypatch.setattr(devices, "backend_of", lambda logits: plain)
    for shape in (33, 7), (5, 7, 3):
        for reduction in REDUCTIONS:
            case = make_case(shape, torch.float64, reduction=reduction)
            whole = evaluate(case)
            monkeypatch.setattr(indices, "CHUNK_ELEMENTS", 2 * case.logits[0].numel())
            pieces = evaluate(case)
            monkeypatch.undo()
            monkeypatch.setattr(devices, "backend_of", lambda logits: plain)
            for one, other in zip(whole, pieces, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@pairwise(path=PATHS, name=["logits", "margins", "weight"], requires_grad=[False, True], reduction=["none", "mean"])
def test_tangents_of_forward_mode_are_refused(device, reduction, name, requires_grad):
    """Neither dropped, which would be a derivative of 0, nor right for some arguments and options only."""
    case = make_case((5, 7), torch.float32).to(device)
    given = {"logits": case.logits, "margins": case.margins, "weight": torch.ones(7, device=device)}
    if requires_grad:
        given["logits"] = given["logits"].requires_grad_()
    with forward_ad.dual_level():
        lmf_loss(given.pop("logits"), case.target, **given, reduction=reduction)  # no tangent, no error
        given = {"logits": case.logits, **given}
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(NotImplementedError, match=f"no derivative in forward mode.*{name} carries a tangent"):
            lmf_loss(given.pop("logits"), case.target, **given, reduction=reduction)


@pairwise(path=PATHS, reduction=["none", "mean"])
def test_forward_mode_by_other_names(device, reduction):
    case = make_case((5, 7), torch.float32).to(device)

    def loss(x):
        return lmf_loss(x, case.target, case.margins, reduction=reduction)

    def jacobian(x):
        return torch.autograd.functional.jacobian(loss, x, vectorize=True, strategy="forward-mode")

    x = case.logits
    for derivative in (
        lambda: torch.func.jvp(loss, (x,), (torch.ones_like(x),)),
        lambda: torch.func.jacfwd(loss)(x),
        lambda: torch.func.linearize(loss, x),
        lambda: torch.func.jvp(lambda y: loss(2 * y), (x,), (torch.ones_like(x),)),
        lambda: jacobian(x),
    ):
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            derivative()


@pairwise(path=PATHS, grad_in_forward=MODES, reduction=["none", "mean"])
def test_a_tangent_of_the_upstream_gradient_is_refused(device, grad_in_forward, reduction):
    case = make_case((5, 7), torch.float32).to(device)
    logits = case.logits.requires_grad_()
    loss = lmf_loss(logits, case.target, reduction=reduction, grad_in_forward=grad_in_forward)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        with pytest.raises(NotImplementedError, match="upstream gradient carries a tangent"):
            torch.autograd.grad(loss, logits, upstream)


def test_a_tangent_that_a_module_or_counts_carry_is_refused():
    """Their copies would have none."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        criterion = FocalLoss()
        for refused in (
            lambda: FocalLoss(weight=dual),
            lambda: setattr(criterion, "weight", dual),
            lambda: ldam_margins(dual),
            lambda: LMFLoss(dual),
        ):
            with pytest.raises(NotImplementedError, match="carries a tangent"):
                refused()
