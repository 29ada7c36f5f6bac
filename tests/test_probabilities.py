"""Promise: targets may be class probabilities, or indices with label smoothing, as accurately as plain indices.

The loss is the sum of the losses that the sample would have if its class were j, times probability and weight of j.
"""

from dataclasses import replace

import mpmath
import pytest
import torch
import torch.nn.functional as F
from oracle import (
    ANOTHER_DEVICE,
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

from lmf_triton import lmf_loss
from lmf_triton.fused import backend, launch

pytestmark = pytest.mark.filterwarnings("ignore:the loss of logits with a single class is 0")

# As in test_accuracy.py, with fewer of the long ones: the oracle takes each class as the target, one after the other.
SHAPES = [
    (7,),  # one sample without a batch axis
    (3, 1),  # one class: no others
    (33, 2),  # the smallest softmax
    (300, 7),  # more than one program, nothing is aligned
    (21, 19),
    (9, 151),
    (3, 600),  # one row a program
    (2, 19, 5, 3),  # dense, class axis strided: each class is a tile
    (2, 40, 5, 3),  # and tiles of several classes
    (10, 3, 7),  # more groups than rows in one
]
TERMS = [
    (*term, scale)
    for term in [(1.0, 1.0, 1.5), (1.5, 0.5, 2.0), (0.0, 1.0, 0.0), (0.0, 2.0, 0.5), (1.0, 0.0, 1.5), (1.0, 1.0, 5.0)]
    for scale in (1.0, 30.0)
]
SOFT = {"probabilities": {}, "smoothed": {"label_smoothing": 0.1}, "both": {"label_smoothing": 0.25}}


KINDS = list(SOFT)
# The ways of the plain backend that few samples take have tests of their own, in test_plain_probabilities.py.
each_path = pytest.mark.parametrize("path", [*PATHS, ANOTHER_DEVICE], indirect=True)


def make_soft(kind: str, *args, target_dtype=torch.float32, **options):
    """A case of this kind of target."""
    case = make_case(*args, **options, **SOFT[kind])
    return case if kind == "smoothed" else with_probabilities(case, target_dtype)


@pytest.mark.slow
@each_path
@pairwise(shape=SHAPES, dtype=DTYPES, reduction=["none", "mean"], kind=KINDS)
def test_sizes_and_dtypes(device, shape, dtype, reduction, kind):
    case = make_soft(kind, shape, dtype, reduction=reduction).to(device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=1 if reduction == "none" or dtype == torch.float16 else 2)


@pytest.mark.slow
@every_way
@pairwise(terms=TERMS, reduction=REDUCTIONS, weighted=[False, True], grad_in_forward=[True, False], kind=KINDS)
def test_options(device, terms, reduction, weighted, grad_in_forward, kind):
    weight = class_weights(19) if weighted else None
    alpha, beta, gamma, scale = terms
    options = {"alpha": alpha, "beta": beta, "gamma": gamma, "scale": scale, "reduction": reduction}
    case = make_soft(kind, (21, 19), torch.float32, weight=weight, **options).to(device)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert_accurate(case, loss, grad, roundings=2 if grad_in_forward else 1)


@pytest.mark.slow
@pairwise(
    layout=["cluster", "loop"], dtype=[torch.bfloat16, torch.float32, torch.float64], scale=[1.0, 30.0], kind=KINDS
)
def test_long_rows(triton_device, layout, dtype, scale, kind, monkeypatch):
    """Rows on a cluster, and rows in a loop, with smaller tiles than a GPU has."""
    of_device = replace(backend._launch_device(triton_device), capability=(9, 0), triton_version=(3, 9))
    if layout == "loop":
        of_device = replace(of_device, capability=(8, 0))
    if triton_device.type == "cuda" and of_device != backend._launch_device(triton_device):
        pytest.skip("this GPU and compiler do not launch so")
    monkeypatch.setattr(backend, "_launch_device", lambda _: of_device)
    # So that a multiprocessor holds an eighth of these rows.
    n_classes = {torch.float64: 4096}.get(dtype, 1024) * (1 if scale == 1 else 2)
    monkeypatch.setattr(launch, "MAX_CTA_CLASSES", {4: n_classes, 8: n_classes})
    plans = []
    plan = launch.plan_expectation.__wrapped__
    monkeypatch.setattr(launch, "plan_expectation", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
    case = make_soft(kind, (3, 1001), dtype, scale=scale)
    if dtype != torch.float64:  # of which the oracle, no more exact, would be further off than the kernel
        case.logits[0, [5, 700]] = 12.0  # the largest twice, in different lanes of a loop
    case = case.to(triton_device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)
    (used,) = plans
    assert (used.meta["num_ctas"] > 1) == (layout == "cluster")
    assert (used.meta["CLASS_BLOCKS"] > 1) == (layout == "loop")


LAYOUTS = {
    "contiguous": lambda q: q.contiguous(),
    "channels_last": lambda q: q.movedim(1, -1).contiguous().movedim(-1, 1),
    "class axis first": lambda q: q.movedim(1, 0).contiguous().movedim(0, 1),
    "a part of more": lambda q: F.pad(q, (1, 2)).unfold(-1, q.shape[-1], 1)[..., 1, :],
    "every second": lambda q: torch.stack([q, q + 1], -1)[..., 0],
    "the same for all samples": lambda q: q[:1].expand(q.shape),
    "the same for all classes": lambda q: q[:, :1].expand(q.shape),
    "backwards": lambda q: q.flip(0).contiguous()[:: q.shape[0] - 1] if q.shape[0] == 2 else q,
}


@pytest.mark.slow
@each_path
@pairwise(
    shape=[(33, 7), (2, 19, 5, 3)],
    of_logits=list(LAYOUTS)[:5],
    of_target=LAYOUTS,
    dtype=[torch.float16, torch.float32, torch.float64],
)
def test_any_strides_and_dtype_of_the_probabilities(device, shape, of_logits, of_target, dtype):
    case = make_soft("both", shape, torch.float32, reduction="none", target_dtype=dtype)
    case = replace(case, logits=LAYOUTS[of_logits](case.logits), target=of_target(case.target)).to(device)
    before = case.target.clone()
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad)
    assert torch.equal(case.target, before)


# Identities.


@pytest.mark.slow
@each_path
@pairwise(
    reduction=["none", "sum", "mean"],
    weighted=[False, True],
    shape=[(33, 19), (2, 7, 5, 3), (5, 1)],
    smoothing=[0.0, 0.1, 1.0],
    kind=["probabilities", "indices"],
)
def test_gamma_0_without_ldam_is_cross_entropy(device, reduction, weighted, shape, smoothing, kind):
    weight = class_weights(shape[1]).double() if weighted else None
    options = {"alpha": 0.0, "gamma": 0.0, "weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    case = make_case(shape, torch.float64, **options)
    case = (with_probabilities(case, torch.float64) if kind == "probabilities" else case).to(device)
    loss, grad = evaluate(case)
    logits = case.logits.requires_grad_()
    expected = F.cross_entropy(
        logits, case.target, weight=case.options["weight"], reduction=reduction, label_smoothing=smoothing
    )
    (expected_grad,) = torch.autograd.grad(expected, logits, case.upstream)
    torch.testing.assert_close(loss, expected.detach().cpu(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(grad, expected_grad.cpu(), rtol=1e-12, atol=1e-15)


@each_path
@pairwise(shape=[(33, 19), (2, 7, 5, 3), (5, 1)], scale=[1.0, 30.0], reduction=["none", "sum"])
def test_one_hot_is_the_index(device, shape, scale, reduction):
    """To a rounding unit: the two are not summed in the same order."""
    options = {"scale": scale, "reduction": reduction, "weight": class_weights(shape[1])}
    case = make_case(shape, torch.float32, **options)
    one_hot = F.one_hot(case.target.clamp_min(0), shape[1]).movedim(-1, 1).float()
    one_hot.masked_fill_((case.target < 0).unsqueeze(1), 0)
    by_index, by_one_hot = (evaluate(replace(case, target=t).to(device)) for t in (case.target, one_hot))
    for index, hot in zip(by_index, by_one_hot, strict=True):
        torch.testing.assert_close(hot, index, rtol=4e-7, atol=4e-7 * index.abs().max().item())


@each_path
@pairwise(share=[0.0, 0.25, 0.5, 1.0], scale=[1.0, 30.0])
def test_a_mixed_pair_is_the_mixture_of_two_losses(device, share, scale):
    case = make_case((33, 19), torch.float64, scale=scale, reduction="none").to(device)
    a = case.target.clamp_min(0)
    b = a.roll(1)
    mixed = share * F.one_hot(a, 19).double() + (1 - share) * F.one_hot(b, 19).double()
    loss, grad = evaluate(replace(case, target=mixed))
    (loss_a, grad_a), (loss_b, grad_b) = (evaluate(replace(case, target=t)) for t in (a, b))
    torch.testing.assert_close(loss, share * loss_a + (1 - share) * loss_b, rtol=1e-14, atol=0)
    torch.testing.assert_close(grad, share * grad_a + (1 - share) * grad_b, rtol=1e-12, atol=1e-15)


@pairwise(reduction=REDUCTIONS, weighted=[False, True], shape=[(33, 7), (2, 19, 5, 3)])
def test_no_smoothing_changes_no_bit(device, reduction, weighted, shape):
    weight = class_weights(shape[1]) if weighted else None
    case = make_case(shape, torch.float32, weight=weight, reduction=reduction)
    for target in case.target, with_probabilities(case).target:
        without = replace(case, target=target).to(device)
        with_0 = replace(without, options=without.options | {"label_smoothing": 0.0})
        for result, expected in zip(evaluate(with_0), evaluate(without), strict=True):
            assert torch.equal(result, expected)


@each_path
@pairwise(dtype=[torch.float32, torch.float64], scale=[1.0, 30.0], kind=KINDS)
def test_the_gradient_of_a_sample_sums_to_zero(device, dtype, scale, kind):
    case = make_soft(kind, (33, 151), dtype, scale=scale, reduction="sum").to(device)
    _, grad = evaluate(case)
    total = grad.double().sum(1).abs()
    assert (total <= 16 * torch.finfo(dtype).eps * grad.abs().amax(1)).all()


def test_results_are_the_same_every_time(device):
    case = make_soft("both", (300, 19), torch.float32).to(device)
    loss, grad = evaluate(case)
    for _ in range(3):
        again, grad_again = evaluate(case)
        assert torch.equal(loss, again)
        assert torch.equal(grad, grad_again)


def test_forward_alone_equals_forward_with_gradient(device):
    case = make_soft("both", (21, 19), torch.float32).to(device)
    loss, _ = evaluate(case)
    without = lmf_loss(case.logits, case.target, case.margins, label_smoothing=0.25)
    assert without.cpu().equal(loss)


# Confident samples.

LEADS = [0.0, 1.0, 5.0, 20.0, 60.0, 86.0, 90.0, 200.0]
GAMMAS = [0.0, 0.5, 1.5, 5.0]
MARGINS = [0.5, 0.25, 0.125]


def exact(lead: float, q: list[float], gamma: float, scale: float) -> tuple[list, list]:
    """LDAM and focal loss of logits (0, lead, 0.5), and their gradients."""
    logits = [mpmath.mpf(0), mpmath.mpf(lead), mpmath.mpf("0.5")]

    def ldam(*x):
        total = mpmath.mpf(0)
        for j, share in enumerate(q):
            others = mpmath.fsum(mpmath.exp(scale * x[i]) for i in range(3) if i != j)
            total += share * mpmath.log1p(others / mpmath.exp(scale * (x[j] - MARGINS[j])))
        return total

    def focal(*x):
        total = mpmath.mpf(0)
        for j, share in enumerate(q):
            odds = mpmath.fsum(mpmath.exp(x[i] - x[j]) for i in range(3) if i != j)
            total += share * (odds / (1 + odds)) ** gamma * mpmath.log1p(odds)
        return total

    with mpmath.workdps(250):
        values = [term(*logits) for term in (ldam, focal)]
        grads = [[mpmath.diff(term, tuple(logits), tuple(int(i == j) for i in range(3))) for j in range(3)]
                 for term in (ldam, focal)]  # fmt: skip
    return values, grads


@pytest.mark.slow
@every_way
@pairwise(
    dtype=[torch.float32, torch.float64], gamma=GAMMAS, scale=[1.0, 4.0], q=[[0, 1, 0], [0.25, 0.75, 0], [0.5, 0, 0.25]]
)
def test_confident_samples_against_exact_values(device, dtype, gamma, scale, q):
    """Relative error of the loss at most 1e-5 in float32, whatever the lead, and never negative."""
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    logits = torch.zeros(len(LEADS), 3, dtype=dtype, device=device)
    logits[:, 1] = torch.tensor(LEADS)
    logits[:, 2] = 0.5
    target = torch.tensor(q, dtype=torch.float32, device=device).expand(len(LEADS), 3)
    margins = torch.tensor(MARGINS, device=device)
    for term, options in enumerate([{"beta": 0.0, "scale": scale}, {"alpha": 0.0, "gamma": gamma}]):
        x = logits.clone().requires_grad_()
        losses = lmf_loss(x, target, margins, reduction="none", **options)
        losses.sum().backward()
        for lead, loss, grad in zip(LEADS, losses.tolist(), x.grad.tolist(), strict=True):
            values, grads = exact(lead, q, gamma, scale)
            tolerance = eps * (8 + (1 + gamma) * scale * lead)
            assert loss >= 0
            assert abs(loss - values[term]) <= min(tolerance, 1e-5) * values[term] + tiny
            largest = max(map(abs, grads[term]))
            for g, expected in zip(grad, grads[term], strict=True):
                assert abs(g - expected) <= tolerance * largest + tiny


# Edges.


@every_way
@pairwise(kind=KINDS, gamma=[0.0, 0.5, 1.5], scale=[1.0, 30.0])
def test_masked_classes(device, kind, gamma, scale):
    """A class at -inf without a share contributes 0, as if it were not there; with one the loss is infinite."""
    case = make_case((4, 7), torch.float64, gamma=gamma, scale=scale, reduction="none", **SOFT[kind])
    case = replace(case, target=torch.tensor([0, 3, 5, 6]))
    weight = torch.ones(7, dtype=torch.float64)
    if kind == "smoothed":
        weight[2] = 0  # which takes the class its share
    else:
        target = torch.rand(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        target[:, 2] = 0
        weight[2] = 0 if kind == "both" else 1
        case = replace(case, target=target)
    masked = case.logits.clone()
    masked[:, 2] = -torch.inf
    far = case.logits.clone()
    far[:, 2] = -1e4  # the oracle is NaN at -inf
    case = replace(case, options=case.options | {"weight": weight})
    loss, grad = evaluate(replace(case, logits=masked).to(device))
    expected, expected_grad = evaluate(replace(case, logits=far).to(device))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)
    assert (grad[:, 2] == 0).all()

    weight = torch.ones(7, dtype=torch.float64)
    if not case.target.is_floating_point() or kind == "both":
        shared = replace(case, options=case.options | {"weight": weight})
    else:
        shared = replace(case, target=case.target + 0.125)
    loss, grad = evaluate(replace(shared, logits=masked).to(device))
    assert (loss == torch.inf).all()
    assert grad.isfinite().all()


@every_way
@pairwise(
    kind=["probabilities", "smoothed"],
    value=[torch.nan, torch.inf, "all -inf"],
    scale=[1.0, 30.0],
    shape=[(5, 7), (5, 7, 3)],
)
def test_what_has_no_softmax_is_nan_and_nothing_else(device, kind, value, scale, shape):
    case = make_soft(kind, shape, torch.float32, scale=scale, reduction="none")
    broken = case.logits.clone()
    sample = (2, slice(None), *([1] if len(shape) > 2 else []))
    if value == "all -inf":
        broken[sample] = -torch.inf
    else:
        broken[(2, 4, *sample[2:])] = value
    whole, whole_grad = evaluate(case.to(device))
    loss, grad = evaluate(replace(case, logits=broken).to(device))
    is_broken = torch.zeros(case.sample_shape, dtype=torch.bool)
    is_broken[(2, *sample[2:])] = True
    assert torch.equal(loss.isnan(), is_broken)
    assert torch.equal(grad.isnan(), is_broken.unsqueeze(1).expand(shape))
    assert torch.equal(loss[~is_broken], whole[~is_broken])
    kept = ~is_broken.unsqueeze(1).expand(shape)
    assert torch.equal(grad[kept], whole_grad[kept])


@every_way
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_samples_without_any_share_are_0_whatever_their_logits(device, scale):
    logits = torch.randn(4, 7)
    logits[0, 3], logits[1], logits[2, 2] = torch.nan, -torch.inf, torch.inf
    logits = logits.to(device).requires_grad_()
    loss = lmf_loss(logits, torch.zeros(4, 7, device=device), scale=scale, reduction="none")
    loss.sum().backward()
    assert (loss == 0).all()
    assert (logits.grad == 0).all()


@each_path
@pairwise(tied=[2, 3, 7], scale=[1.0, 30.0], gamma=[0.0, 1.5])
def test_equal_largest_logits(device, tied, scale, gamma):
    case = make_soft("both", (5, 7), torch.float32, scale=scale, gamma=gamma)
    logits = case.logits.clone()
    logits[:, :tied] = 9.0
    case = replace(case, logits=logits).to(device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)


@each_path
@pairwise(kind=KINDS, scale=[1.0, 30.0])
def test_one_class(device, kind, scale):
    case = make_soft(kind, (5, 1), torch.float32, scale=scale).to(device)
    loss, grad = evaluate(case)
    assert loss == 0
    assert (grad == 0).all()


@pairwise(kind=KINDS, reduction=REDUCTIONS, shape=[(0, 7), (0, 7, 3), (2, 7, 0)])
def test_an_empty_batch_is_as_in_cross_entropy(device, kind, reduction, shape):
    case = make_case(shape, torch.float32, **SOFT[kind])
    target = case.target if kind == "smoothed" else torch.zeros(shape)
    logits = case.logits.to(device).requires_grad_()
    loss = lmf_loss(
        logits, target.to(device), reduction=reduction, label_smoothing=SOFT[kind].get("label_smoothing", 0.0)
    )
    expected = F.cross_entropy(case.logits, target, reduction="mean" if reduction == "mean_per_term" else reduction)
    torch.testing.assert_close(loss.cpu(), expected, equal_nan=True)
    loss.sum().backward()
    assert logits.grad.shape == shape


@each_path
def test_probabilities_need_not_sum_to_1(device):
    case = make_soft("probabilities", (21, 19), torch.float64, reduction="none").to(device)
    once, twice = (evaluate(replace(case, target=t)) for t in (case.target.double(), 2 * case.target.double()))
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-14, atol=0)


def test_ignore_index_has_no_say_over_probabilities(device):
    case = make_soft("probabilities", (21, 19), torch.float32).to(device)
    options = [{"ignore_index": i} for i in (-100, 0, 3)]
    first, *others = (evaluate(replace(case, options=case.options | each)) for each in options)
    for other in others:
        assert torch.equal(other[0], first[0])
        assert torch.equal(other[1], first[1])


@each_path
def test_smoothed_targets_out_of_range(device, path):
    target = torch.tensor([3, -1, 7, -100, 6], device=device)
    logits = torch.randn(5, 7, device=device, requires_grad=True)
    if path.startswith("cpu") and "another" not in path:
        with pytest.raises(IndexError, match=r"got -1 at index \[1\]"):
            lmf_loss(logits, target, label_smoothing=0.1)
        return
    loss = lmf_loss(logits, target, label_smoothing=0.1, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True, False, False]
    assert logits.grad.isnan().all(1).tolist() == [False, True, True, False, False]
    assert loss[3] == 0
    assert (logits.grad[3] == 0).all()


@each_path
@pairwise(kind=KINDS, upstream=[0.0, 1.0, 3.0, torch.inf], reduction=["none", "mean"])
def test_upstream_gradients(device, kind, upstream, reduction):
    """0 is 0, and what has nothing stays 0 under an infinite one."""
    case = make_soft(kind, (21, 19), torch.float32, reduction=reduction)
    case = replace(case, upstream=torch.full_like(case.upstream, upstream)).to(device)
    _, grad = evaluate(case)
    _, whole = evaluate(replace(case, upstream=torch.ones_like(case.upstream)))
    if upstream == torch.inf:
        assert (grad[1] == 0).all() == (kind != "both")  # by smoothing every class has something
    else:
        torch.testing.assert_close(grad, upstream * whole, rtol=0, atol=1e-6 * upstream * whole.abs().max().item())


@each_path
@pairwise(grad_in_forward=[True, False], upstream=[0.0, 1.0], kind=["probabilities", "smoothed"])
def test_a_nan_is_nan_whatever_the_upstream_gradient(device, grad_in_forward, upstream, kind):
    case = make_soft(kind, (5, 7), torch.float32)
    case.logits[2, 4] = torch.nan
    case = replace(case, upstream=torch.full_like(case.upstream, upstream)).to(device)
    _, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert grad[2].isnan().all()


@every_way
def test_no_sample_overflows_beside_a_confident_one(device):
    logits = torch.tensor([[-66.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]], device=device, requires_grad=True)
    target = torch.full((2, 4), 0.25, device=device)
    lmf_loss(logits, target, alpha=1e10, beta=0.0, reduction="sum").backward()
    expected = torch.tensor([-1.0, 1 / 3, 1 / 3, 1 / 3]) * 2.5e9
    torch.testing.assert_close(logits.grad[0].cpu(), expected, rtol=1e-6, atol=0)


def test_a_graph_that_is_kept_can_be_used_again(device):
    case = make_soft("both", (21, 19), torch.float32).to(device)
    for grad_in_forward in True, False:
        logits = case.logits.clone().requires_grad_()
        loss = lmf_loss(logits, case.target, case.margins, grad_in_forward=grad_in_forward)
        first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
