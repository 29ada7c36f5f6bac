"""Promise: a normalizer takes the place of a mean's denominators, so that means of parts add up to the mean of all."""

import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from oracle import DTYPES, PATHS, assert_accurate, class_weights, evaluate, every_way, make_case, pairwise

from lmf_triton import FocalLoss, LDAMLoss, LMFLoss, devices, lmf_loss
from lmf_triton.fused import backend
from lmf_triton.fused.kernels import elementwise

pytestmark = pytest.mark.slow

INF, NAN = math.inf, math.nan
MEANS = ["mean", "mean_per_term"]
MODES = [True, False]
SHAPES = [
    (7,),  # one sample without a batch axis
    (33, 7),  # one program, which otherwise adds up its own rows
    (300, 7),  # several
    (5, 1001),  # a row a program
    (2, 19, 5, 3),  # class axis strided
    (10, 3, 7),  # more groups than rows in one
    (2, 33000),  # few rows, shared by programs
]


def loss_and_grad(logits, target, **options):
    logits = logits.detach().requires_grad_()
    loss = lmf_loss(logits, target, **options)
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.detach(), grad


@pairwise(shape=SHAPES, path=PATHS, reduction=MEANS, grad_in_forward=MODES, weighted=[False, True], dtype=DTYPES)
def test_against_the_oracle(device, shape, reduction, grad_in_forward, weighted, dtype):
    n_classes = shape[min(len(shape) - 1, 1)]
    weight = class_weights(n_classes) if weighted else None
    normalizer = (17.5, 40.0) if reduction == "mean_per_term" else 17.5
    case = make_case(shape, dtype, weight=weight, reduction=reduction, normalizer=normalizer).to(device)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert_accurate(case, loss, grad, roundings=2)


@every_way
@pairwise(reduction=MEANS, weighted=[False, True], grad_in_forward=MODES, scale=[1.0, 30.0], term=[{}, {"alpha": 0.0}])
def test_gradient_accumulation(device, reduction, weighted, grad_in_forward, scale, term):
    """Micro-batches of different sizes, with ignored samples; one of them has nothing else."""
    case = make_case((40, 7), torch.float64, seed=3).to(device)
    case.target[30:] = -100
    weight = class_weights(7).double().to(device) if weighted else None
    kept = case.target[case.target != -100]
    options = {"margins": case.margins, "weight": weight, "reduction": reduction, "scale": scale, **term}
    expected, expected_grad = loss_and_grad(case.logits, case.target, **options)

    weight_total = weight[kept].sum() if weighted else torch.tensor(len(kept), device=device)
    normalizer = (weight_total, len(kept)) if reduction == "mean_per_term" else weight_total
    total, grads = 0.0, []
    for logits, target in zip(case.logits.split([11, 19, 10]), case.target.split([11, 19, 10]), strict=True):
        loss, grad = loss_and_grad(logits, target, **options, normalizer=normalizer, grad_in_forward=grad_in_forward)
        total += loss
        grads.append(grad)
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat(grads), expected_grad, rtol=1e-13, atol=1e-18)


FORMS = {
    "int": 20,
    "float": 20.0,
    "numpy integer": np.int16(20),
    "numpy float": np.float16(20),
    "fraction": Fraction(40, 2),
    **{
        str(dtype): torch.tensor(20).to(dtype)
        for dtype in (*DTYPES, torch.uint8, torch.int16, torch.uint16, torch.int64)
    },
    "a view": torch.arange(30)[20],
}


@pytest.mark.filterwarnings("error:overflow encountered")
@pytest.mark.parametrize("normalizer", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("reduction", MEANS)
def test_forms(device, normalizer, reduction):
    """A number of any type, a 0-d tensor of any; twice the same in a pair is one for both."""
    case = make_case((33, 7), torch.float32).to(device)
    normalizer = normalizer.to(device) if isinstance(normalizer, torch.Tensor) else normalizer
    expected = lmf_loss(case.logits, case.target, case.margins, reduction="sum") / 20
    pairs = [(normalizer, 20), (20.0, normalizer)] if reduction == "mean_per_term" else []
    for each in (normalizer, *pairs):
        loss = lmf_loss(case.logits, case.target, case.margins, reduction=reduction, normalizer=each)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pairwise(path=PATHS, grad_in_forward=MODES, first=[True, False])
def test_each_term_has_its_own(device, grad_in_forward, first):
    case = make_case((33, 7), torch.float64).to(device)
    term = {"beta": 0.0} if first else {"alpha": 0.0}
    expected = loss_and_grad(case.logits, case.target, margins=case.margins, reduction="sum", **term)
    # The other denominator has no say, were it 0.
    normalizer = (20.0, torch.tensor(0.0, device=device)) if first else (torch.tensor(0.0, device=device), 20.0)
    options = {"reduction": "mean_per_term", "normalizer": normalizer, "grad_in_forward": grad_in_forward, **term}
    found = loss_and_grad(case.logits, case.target, margins=case.margins, **options)
    for sum_of, mean in zip(expected, found, strict=True):
        torch.testing.assert_close(mean, sum_of / 20, rtol=1e-13, atol=0)


@every_way
@pairwise(
    value=[3.0, 0.0, INF, NAN], reduction=MEANS, grad_in_forward=MODES, shape=[(2, 3), (300, 3), (0, 3), (2, 33000)]
)
def test_with_everything_ignored_the_loss_is_0_whatever_it_is(device, value, reduction, grad_in_forward, shape):
    logits, target = torch.randn(shape, device=device), torch.full(shape[:1], -100, device=device)
    for weight in None, torch.ones(shape[1], device=device):
        options = {"reduction": reduction, "grad_in_forward": grad_in_forward, "weight": weight}
        loss, grad = loss_and_grad(logits, target, **options, normalizer=torch.tensor(value, device=device))
        assert loss == 0
        assert (grad == 0).all()


@every_way
@pairwise(
    value=[0.0, INF, NAN],
    shape=[(3, 5), (300, 5)],
    reduction=MEANS,
    weighted=[False, True],
    grad_in_forward=MODES,
)
def test_a_tensor_that_is_no_count_gives_what_division_gives(
    device, value, shape, reduction, weighted, grad_in_forward
):
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(shape, generator=generator), torch.randint(5, shape[:1], generator=generator)
    target[1] = -100
    logits, target = logits.to(device), target.to(device)
    weight = class_weights(5).to(device) if weighted else None
    options = {"weight": weight, "grad_in_forward": grad_in_forward}
    total, total_grad = loss_and_grad(logits, target, reduction="sum", **options)
    normalizer = torch.tensor(value, device=device)
    loss, grad = loss_and_grad(logits, target, reduction=reduction, normalizer=normalizer, **options)
    assert torch.equal(loss.nan_to_num(7.0), (total / normalizer).nan_to_num(7.0))
    assert (grad[1] == 0).all()
    expected = (total_grad / normalizer).nan_to_num(7.0)
    expected[1] = 0
    assert torch.equal(grad.nan_to_num(7.0), expected)


def test_a_confident_sample_over_0_is_nan(device):
    """As 0 / 0 is, where the sample is there."""
    logits, target = torch.tensor([[1e4, 0.0]], device=device), torch.tensor([0], device=device)
    assert lmf_loss(logits, target, normalizer=torch.tensor(0.0, device=device)).isnan()


@pairwise(bad=[3, -1], grad_in_forward=MODES, shape=[(3, 3), (300, 3)], value=[2.0, 0.0])
def test_a_target_out_of_range_is_nan_among_ignored_ones(triton_device, bad, grad_in_forward, shape, value):
    logits, target = torch.randn(shape, device=triton_device), torch.full(shape[:1], -100, device=triton_device)
    target[1] = bad
    normalizer = torch.tensor(value, device=triton_device)
    loss, grad = loss_and_grad(logits, target, normalizer=normalizer, grad_in_forward=grad_in_forward)
    assert loss.isnan()
    assert grad.isnan().all(1).tolist() == [i == 1 for i in range(shape[0])]
    assert (grad[[0, 2]] == 0).all()


LOGITS, TARGET = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("normalizer", "error", "quoted"),
    [
        (True, TypeError, ["number or a 0-d tensor", "True", "bool"]),
        ("4", TypeError, ["'4'", "str"]),
        (4j, TypeError, ["4j", "complex"]),
        ([4.0, 4.0], TypeError, ["[4.0, 4.0]", "list"]),
        (np.array([4.0]), TypeError, ["ndarray"]),
        (np.bool_(True), TypeError, ["bool"]),
        (0, ValueError, ["greater than 0", "0"]),
        (0.0, ValueError, ["greater than 0", "0.0"]),
        (-4, ValueError, ["greater than 0", "-4"]),
        (INF, ValueError, ["finite", "inf"]),
        (NAN, ValueError, ["finite", "nan"]),
        (10**400, ValueError, ["float32's range", "1000"]),
        (1e39, ValueError, ["float32's range", "1e+39"]),
        (1e-50, ValueError, ["float32's range", "1e-50"]),
        (torch.tensor([4.0]), ValueError, ["0-d tensor", "(1,)"]),
        (torch.ones(4), ValueError, ["0-d tensor", "(4,)"]),
        (torch.tensor(True), TypeError, ["integer dtype", "bool"]),
        (torch.tensor(4j), TypeError, ["integer dtype", "complex64"]),
        (torch.tensor(4.0, requires_grad=True), ValueError, ["no gradient", "requires_grad"]),
        (torch.tensor(4.0, device="meta"), ValueError, ["device of logits, cpu", "meta", ".to('cpu')", ".item()"]),
    ],
    ids=str,
)
def test_what_is_no_denominator_is_refused(normalizer, error, quoted):
    for arguments in (
        {"normalizer": normalizer},
        {"normalizer": normalizer, "reduction": "mean_per_term"},
        {"normalizer": (normalizer, 4), "reduction": "mean_per_term"},
        {"normalizer": (4, normalizer), "reduction": "mean_per_term"},
    ):
        with pytest.raises(error) as caught:
            lmf_loss(LOGITS, TARGET, **arguments)
        for words in ("normalizer", *quoted):
            assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "quoted"),
    [
        ({"normalizer": (4, 4)}, ValueError, ["one number", "'mean'", "(4, 4)"]),
        ({"normalizer": (4, 4, 4), "reduction": "mean_per_term"}, ValueError, ["pair", "(4, 4, 4)"]),
        ({"normalizer": (), "reduction": "mean_per_term"}, ValueError, ["pair", "()"]),
        ({"normalizer": 4, "reduction": "none"}, ValueError, ["'none'", "denominator"]),
        ({"normalizer": 4, "reduction": "sum"}, ValueError, ["'sum'", "denominator"]),
        ({"normalizer": (4, 4), "reduction": "sum"}, ValueError, ["'sum'", "denominator"]),
    ],
    ids=str,
)
def test_reductions_have_as_many_denominators_as_they_have(arguments, error, quoted):
    with pytest.raises(error) as caught:
        lmf_loss(LOGITS, TARGET, **arguments)
    for words in ("normalizer", *quoted):
        assert words in str(caught.value)


# --- What it costs ---


@pairwise(shape=[(33, 7), (300, 7), (2, 33000)], grad_in_forward=MODES)
def test_another_value_is_no_other_launch(triton_device, shape, grad_in_forward):
    """All that a launch is compiled for is the same, and no pass over the targets adds up what is given."""
    launches = []
    case = make_case(shape, torch.float32).to(triton_device)

    def recorded(kernel, plan, *arguments, **constexprs):
        others = [None if isinstance(a, torch.Tensor) else a for a in arguments]
        launches[-1].append((kernel, plan, others, constexprs))
        launch(kernel, plan, *arguments, **constexprs)

    launch = backend._launch
    with mock.patch.object(backend, "_launch", recorded):
        for normalizer in 3, 17.25, torch.tensor(8, device=triton_device):
            launches.append([])
            loss_and_grad(case.logits, case.target, normalizer=normalizer, grad_in_forward=grad_in_forward)
    assert launches[0] == launches[1] == launches[2]
    assert elementwise.totals_kernel not in [kernel for kernel, *_ in launches[0]]


@pairwise(path=PATHS, reduction=MEANS)
def test_the_upstream_gradient_stays_1(device, reduction, monkeypatch):
    """Nothing is divided after the loss: what was stored with it is handed out as it is."""
    upstreams = []
    module = devices.backend_of(torch.empty(0, device=device))
    apply_upstream = module.apply_upstream

    def spy(grad, upstream, *, in_place):
        upstreams.append(upstream.item())
        return apply_upstream(grad, upstream, in_place=in_place)

    monkeypatch.setattr(module, "apply_upstream", spy)
    case = make_case((33, 7), torch.float32).to(device)
    lmf_loss(case.logits.requires_grad_(), case.target, reduction=reduction, normalizer=12).backward()
    assert upstreams == [1.0]


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_it_may_change_after_the_loss(device, grad_in_forward):
    """As a running total of tokens does."""
    case = make_case((33, 7), torch.float32).to(device)
    normalizer = torch.tensor(12.0, device=device)
    logits = case.logits.requires_grad_()
    loss = lmf_loss(logits, case.target, normalizer=normalizer, grad_in_forward=grad_in_forward)
    normalizer.add_(100)
    (grad,) = torch.autograd.grad(loss, logits)
    _, expected = loss_and_grad(case.logits, case.target, normalizer=12, grad_in_forward=grad_in_forward)
    assert torch.equal(grad, expected)


# --- Modules ---


@pytest.mark.parametrize("make", [lambda **o: LMFLoss([5, 3, 1], **o), lambda **o: LDAMLoss([5, 3, 1], **o), FocalLoss])
def test_modules_take_it_where_they_are_called(make):
    logits, target = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    for reduction, normalizer in ("mean", 9), ("mean", torch.tensor(9)), ("mean_per_term", (9, 9.0)):
        loss = make(reduction=reduction)(input=logits, target=target, normalizer=normalizer)
        torch.testing.assert_close(loss, make(reduction="sum")(logits, target) / 9)
    with pytest.raises(TypeError, match="positional"):
        make()(logits, target, 9)
    with pytest.raises(AttributeError, match="normalizer cannot be set"):
        make().normalizer = 9


@pytest.mark.parametrize("make", [lambda **o: LMFLoss([5, 3, 1], **o), lambda **o: LDAMLoss([5, 3, 1], **o), FocalLoss])
def test_modules_check_targets_where_they_are_told_to(make, triton_device):
    logits, target = torch.zeros(3, 3, device=triton_device), torch.tensor([0, 3, 1], device=triton_device)
    criterion = make().to(triton_device)
    assert criterion(logits, target).isnan()
    for checking in make(check_target=True).to(triton_device), criterion:
        criterion.check_target = True
        assert "check_target=True" in repr(checking)
        with pytest.raises(IndexError, match="got 3 at index"):
            checking(logits, target)
