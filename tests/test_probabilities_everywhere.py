"""Promise: with class probabilities, label smoothing or a logit adjustment, ours stands wherever F.cross_entropy does.

As test_everywhere.py has it for class indices alone, with its helpers.
"""

import pytest
import torch
import torch.nn.functional as F
from oracle import PATHS, REDUCTIONS, class_weights, make_case, pairwise, with_probabilities
from test_everywhere import (  # noqa: F401
    BACKENDS,
    COUNTS,
    MODES,
    N_CLASSES,
    SECOND,
    TRANSFORMS,
    Model,
    Tagged,
    assert_same,
    compiled,
    gradients_one_by_one,
    loss_and_grad,
    nothing_compiled_before,
)
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from lmf_triton import LMFLoss, devices, lmf_loss, log_prior_adjustment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

WEIGHT = class_weights(N_CLASSES)
ADJUSTMENT = log_prior_adjustment(COUNTS)
# Of each kind: whether the target is probabilities, and settings.
KINDS = {
    "probabilities": (True, {}),
    "smoothed": (False, {"label_smoothing": 0.1}),
    "adjusted": (False, {"logit_adjustment": ADJUSTMENT}),
    "all": (True, {"label_smoothing": 0.1, "logit_adjustment": ADJUSTMENT, "scale": 30.0}),
}
SHAPES = {"rows": (9, N_CLASSES), "dense": (3, N_CLASSES, 2, 5), "one sample": (N_CLASSES,)}


def samples(kind, shape=SHAPES["rows"], *, device="cpu", dtype=torch.float32, seed=0):
    """Logits and target."""
    case = make_case(shape, dtype, seed=seed)
    case = (with_probabilities(case) if kind[0] else case).to(torch.device(device))
    return case.logits, case.target


def criterion_of(kind, device="cpu", **options):
    return LMFLoss(COUNTS, weight=WEIGHT, **kind[1], **options).to(device)


def loss_of(kind, device="cpu", **options):
    """A function of logits and target; everything else it makes anew, since it may have to be a fake one."""
    per_class = {"weight": torch.tensor(WEIGHT.tolist(), device=device)}
    if "logit_adjustment" in kind[1]:
        per_class["logit_adjustment"] = torch.tensor(ADJUSTMENT.tolist(), device=device)
    margins = torch.linspace(0.1, 0.5, N_CLASSES, device=device)
    return lambda x, y: lmf_loss(x, y, margins, **(kind[1] | per_class | options))


# --- torch.compile, torch.export, fake tensors, operators ---


@pytest.mark.parametrize("backend", BACKENDS)
@pairwise(path=PATHS, kind=KINDS, shape=SHAPES, reduction=REDUCTIONS, grad_in_forward=MODES)
def test_compiled_it_is_what_it_is_in_eager_mode(device, backend, kind, shape, reduction, grad_in_forward):
    function = loss_of(kind, device, reduction=reduction, grad_in_forward=grad_in_forward)
    quick, counter = compiled(function, backend)
    assert_same(quick, function, *samples(kind, shape, device=device))
    assert counter.frame_count == 1


@pairwise(path=PATHS, kind=KINDS, reduction=["mean", "none"])
def test_batch_sizes_take_few_graphs(device, kind, reduction):
    criterion = criterion_of(kind, device, reduction=reduction)
    quick, counter = compiled(criterion, "aot_eager", dynamic=True)
    for n_samples in (2, 3, 4, 5, 8, 9, 16, 17):
        assert_same(quick, criterion, *samples(kind, (n_samples, N_CLASSES), device=device, seed=n_samples))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("setting", ["label_smoothing", "logit_adjustment"])
def test_schedules_of_settings_take_few_graphs(setting):
    criterion = LMFLoss(COUNTS, logit_adjustment=ADJUSTMENT)
    quick, counter = compiled(criterion, "aot_eager")
    for step in range(14):
        value = step / 20
        setattr(criterion, setting, value * ADJUSTMENT if setting == "logit_adjustment" else value)
        assert_same(quick, criterion, *samples(KINDS["adjusted"]))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_export(device, kind):
    model = Model(criterion_of(kind)).to(device)
    features, target = torch.randn(9, 4, device=device), samples(kind, device=device)[1]
    sizes = {0: torch.export.Dim("n", min=2, max=1000)}
    exported = torch.export.export(model, (features, target), dynamic_shapes=(sizes, sizes)).module()
    features, target = torch.randn(30, 4, device=device), samples(kind, (30, N_CLASSES), device=device)[1]
    torch.testing.assert_close(exported(features, target), model(features, target))


@pairwise(path=PATHS, kind=KINDS, shape=SHAPES, reduction=REDUCTIONS, grad_in_forward=MODES)
def test_fake_tensors_are_those_of_eager_mode(device, kind, shape, reduction, grad_in_forward):
    options = {"reduction": reduction, "grad_in_forward": grad_in_forward}
    logits, target = samples(kind, shape, device=device)
    real = loss_and_grad(loss_of(kind, device, **options), logits, target)
    mode = FakeTensorMode()
    with mode:
        fake = loss_and_grad(loss_of(kind, device, **options), *(mode.from_tensor(t) for t in (logits, target)))
    for actual, wanted in zip(fake, real, strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_on_the_meta_device(kind):
    logits, target = (tensor.to("meta") for tensor in samples(kind))
    loss, grad = loss_and_grad(loss_of(kind, "meta", reduction="none"), logits, target)
    assert (loss.device.type, loss.shape, grad.shape) == ("meta", (9,), logits.shape)


@pairwise(path=PATHS, kind=KINDS, shape=SHAPES, reduction=REDUCTIONS, keep=["nothing", "gradient", "coefs"])
def test_operators_pass_opcheck(path, kind, shape, reduction, keep):
    logits, target = samples(kind, shape)
    smoothing = kind[1].get("label_smoothing", 0.0)
    adjustment = ADJUSTMENT if "logit_adjustment" in kind[1] else None
    numbers = torch.tensor([1.0, 1.0, 1.5, kind[1].get("scale", 1.0), smoothing], dtype=torch.float64)
    normalizer = torch.tensor([5.0, 4.0]) if reduction.startswith("mean") else None
    problem = (logits, target, WEIGHT / 4, WEIGHT, adjustment, normalizer, numbers, -100, reduction)
    n_coefs = 4 if path == "kernel" and keep == "coefs" and not kind[0] and smoothing == 0 else 0
    loss, _, coefs, link = torch.ops.lmf_triton.forward(*problem, False, keep == "gradient", n_coefs)
    upstream = torch.rand(loss.shape)
    calls = [
        (torch.ops.lmf_triton.forward, (logits.requires_grad_(), *problem[1:], True, keep == "gradient", n_coefs)),
        (torch.ops.lmf_triton.backward, (logits.detach(), *problem[1:], coefs, upstream)),
        (torch.ops.lmf_triton.apply_upstream, (torch.rand_like(logits), upstream, link)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


# --- torch.func ---


@pairwise(path=PATHS, kind=KINDS, shape=SHAPES, reduction=REDUCTIONS, grad_in_forward=MODES)
def test_grad_and_value(device, kind, shape, reduction, grad_in_forward):
    function = loss_of(kind, device, reduction=reduction, grad_in_forward=grad_in_forward)
    logits, target = samples(kind, shape, device=device)
    grad, value = torch.func.grad_and_value(lambda x: function(x, target).sum())(logits)
    expected = loss_and_grad(function, logits, target)
    torch.testing.assert_close((value, grad), (expected[0].sum(), expected[1]))


@pairwise(path=PATHS, kind=KINDS, reduction=REDUCTIONS, samples_each=[None, 4])
def test_gradients_of_samples_by_vmap(device, kind, reduction, samples_each):
    function = loss_of(kind, device, reduction=reduction)
    if samples_each is None:
        logits, target = samples(kind, device=device)
        target = target if kind[0] else target.clamp_min(0)  # an ignored one's mean is NaN alone
    else:
        logits, target = samples(kind, (5, N_CLASSES, samples_each), device=device)
        logits = logits.movedim(1, 2)
        target = target.movedim(1, 2) if kind[0] else target
    grads = torch.func.vmap(torch.func.grad(lambda x, y: function(x, y).sum()))(logits, target)
    torch.testing.assert_close(grads, gradients_one_by_one(function, logits, target))
    losses = torch.func.vmap(function)(logits, target)
    torch.testing.assert_close(losses, torch.stack([function(x, y) for x, y in zip(logits, target, strict=True)]))


@pytest.mark.parametrize("name", ["logits", "target", "weight", "logit_adjustment"])
@pairwise(kind=["probabilities", "all"], reduction=["mean", "mean_per_term"])
def test_a_batch_of_one_argument(device, name, kind, reduction):
    kind = KINDS[kind]
    logits, target = samples(kind, device=device)
    given = {"logits": logits, "target": target, "weight": WEIGHT, "logit_adjustment": ADJUSTMENT}
    given = {key: tensor.to(device) for key, tensor in given.items()}
    one = given.pop(name)
    batch = torch.stack([one, one.flip(0), one], dim=-1)
    options = {"reduction": reduction} | {k: v for k, v in kind[1].items() if k != "logit_adjustment"}

    def function(value):
        tensors = given | {name: value}
        fixed = tensors.pop("logits")
        return torch.func.grad_and_value(lambda x: lmf_loss(fixed + x, **tensors, **options))(torch.zeros_like(logits))

    grads, losses = torch.func.vmap(function, in_dims=-1)(batch)
    expected = [function(value) for value in batch.unbind(-1)]
    torch.testing.assert_close(grads, torch.stack([grad for grad, _ in expected]))
    torch.testing.assert_close(losses, torch.stack([loss for _, loss in expected]))


@pairwise(path=PATHS, kind=KINDS, reduction=["mean", "none"])
def test_jacobians(device, kind, reduction):
    function = loss_of(kind, device, reduction=reduction)
    logits, target = samples(kind, device=device)
    expected = torch.autograd.functional.jacobian(lambda x: function(x, target), logits)
    torch.testing.assert_close(torch.func.jacrev(lambda x: function(x, target))(logits), expected)


@pairwise(path=PATHS, kind=KINDS, transform=TRANSFORMS)
def test_compiled_transforms(device, kind, transform):
    transformed = transform(loss_of(kind, device))
    logits, target = samples(kind, device=device)
    target = target if kind[0] else target.clamp_min(0)
    quick, counter = compiled(transformed, "aot_eager")
    torch.testing.assert_close(quick(logits, target), transformed(logits, target))
    assert counter.frame_count == 1


@pairwise(path=PATHS, kind=KINDS, transform=SECOND)
def test_second_derivatives_are_refused(device, kind, transform):
    function = loss_of(kind, device)
    logits, target = samples(kind, device=device)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"lmf_loss has no (second|derivative in forward)"):
        transform(lambda x: function(x, target), logits)


def test_a_symbolic_trace_of_a_batch_is_for_all_sizes():
    def batch_of(n_problems, n_samples):
        generator = torch.Generator().manual_seed(n_problems)
        logits = torch.randn(n_problems, n_samples, N_CLASSES, generator=generator)
        return logits, torch.rand(n_problems, n_samples, N_CLASSES, generator=generator)

    function = torch.func.vmap(lambda x, y: lmf_loss(x, y, reduction="mean"))
    trace = make_fx(function, tracing_mode="symbolic")(*batch_of(9, 6))
    for sizes in (18, 3), (4, 6):
        torch.testing.assert_close(trace(*batch_of(*sizes)), function(*batch_of(*sizes)))


# --- Subclasses, mixed precision, checkpointing, accumulation ---


@pairwise(
    path=PATHS,
    kind=["probabilities", "smoothed"],
    subclass=[torch.Tensor, Tagged],
    name=["logits", "target", "weight", "all"],
    reduction=["mean", "none"],
)
def test_subclasses_give_what_cross_entropy_gives(device, kind, subclass, name, reduction):
    kind = KINDS[kind]

    def of(function, **options):
        logits, target = samples(kind, device=device)
        given = {"logits": logits, "target": target, "weight": WEIGHT.to(device)}
        given = {k: t.as_subclass(subclass) if name in (k, "all") else t for k, t in given.items()}
        logits = given.pop("logits").requires_grad_()
        loss = function(logits, given.pop("target"), **given, **kind[1], **options, reduction=reduction)
        loss.sum().backward()
        return loss, logits.grad

    ours, theirs = of(lmf_loss, alpha=0, gamma=0), of(F.cross_entropy)
    assert [type(tensor) for tensor in ours] == [type(tensor) for tensor in theirs]
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.Tensor(actual), torch.Tensor(wanted))


def test_an_adjustment_of_a_subclass():
    logits, target = samples(KINDS["adjusted"])
    tagged = lmf_loss(logits, target, logit_adjustment=ADJUSTMENT.as_subclass(Tagged))
    assert type(tagged) is Tagged
    torch.testing.assert_close(torch.Tensor(tagged), lmf_loss(logits, target, logit_adjustment=ADJUSTMENT))


@pairwise(path=PATHS, kind=KINDS, reduction=["mean", "none"], grad_in_forward=MODES)
def test_wrappers_of_tensors_meet_operators(device, kind, reduction, grad_in_forward):
    logits, target = samples(kind, device=device)
    function = loss_of(kind, device, reduction=reduction, grad_in_forward=grad_in_forward)
    both = TwoTensor(logits.clone(), 2 * logits).requires_grad_()
    loss = function(both, TwoTensor(target, target))
    loss.backward(torch.ones_like(loss))
    for part, scaled in ("a", logits), ("b", 2 * logits):
        expected = loss_and_grad(function, scaled, target)
        torch.testing.assert_close((getattr(loss, part).detach(), getattr(both.grad, part)), expected)


@pairwise(path=PATHS, kind=KINDS, dtype=[torch.bfloat16, torch.float16])
def test_autocast_and_loss_scales(device, kind, dtype):
    """The loss of half logits under autocast is float32, and a loss scale is taken off again."""
    torch.manual_seed(0)
    model = Model(criterion_of(kind)).to(device)
    features, target = torch.randn(9, 4, device=device), samples(kind, device=device)[1]
    grads = []
    for loss_scale in 1.0, 2.0**8:
        with torch.autocast(device.type, dtype):
            loss = model(features, target)
        assert loss.dtype == torch.float32
        (loss_scale * loss).backward()
        grads.append(model.classifier.weight.grad / loss_scale)
        model.zero_grad()
    torch.testing.assert_close(grads[0], grads[1], rtol=0.02, atol=0.02)


@pairwise(path=PATHS, kind=KINDS, use_reentrant=[True, False], grad_in_forward=MODES)
def test_activation_checkpointing(device, kind, use_reentrant, grad_in_forward):
    function = loss_of(kind, device, grad_in_forward=grad_in_forward)
    logits, target = samples(kind, device=device)

    expected = loss_and_grad(function, logits, target)
    loss = checkpoint(function, logits.requires_grad_(), target, use_reentrant=use_reentrant)
    loss.backward()
    torch.testing.assert_close((loss.detach(), logits.grad), expected)


@pairwise(path=PATHS, kind=KINDS, reduction=["mean", "mean_per_term"], grad_in_forward=MODES)
def test_gradient_accumulation(device, kind, reduction, grad_in_forward):
    """Parts of a batch, each with the denominators of the whole, add up to it."""
    logits, target = samples(kind, (40, N_CLASSES), device=device)
    options = {"reduction": reduction, "grad_in_forward": grad_in_forward}
    whole = loss_and_grad(loss_of(kind, device, **options), logits, target)
    kept = torch.ones(40, device=device) if kind[0] else (target != -100).float()
    weights = kept if kind[0] else WEIGHT.to(device)[target.clamp_min(0)] * kept
    normalizer = (weights.sum(), kept.sum()) if reduction == "mean_per_term" else weights.sum()
    function = loss_of(kind, device, **options, normalizer=normalizer)
    parts = [loss_and_grad(function, *part) for part in zip(logits.split(17), target.split(17), strict=True)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0])
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole[1])


@pairwise(path=PATHS, kind=KINDS, normalizer=[3.0, torch.tensor(3.0), (2.0, 3.0)], shape=SHAPES)
def test_normalizers(device, kind, normalizer, shape):
    logits, target = samples(kind, shape, device=device)
    reduction = "mean_per_term" if isinstance(normalizer, tuple) else "mean"
    found = loss_and_grad(loss_of(kind, device, reduction=reduction, normalizer=normalizer), logits, target)
    of_ldam, of_focal = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
    expected = [
        sum(parts)
        for parts in zip(
            (t / of_ldam for t in loss_and_grad(loss_of(kind, device, reduction="sum", beta=0.0), logits, target)),
            (t / of_focal for t in loss_and_grad(loss_of(kind, device, reduction="sum", alpha=0.0), logits, target)),
            strict=True,
        )
    ]
    torch.testing.assert_close(found, tuple(expected))


def test_a_normalizer_without_any_sample_that_takes_part():
    logits, target = torch.randn(5, 7), torch.full((5,), -100)
    assert lmf_loss(logits, target, label_smoothing=0.1, normalizer=3.0) == 0
    assert lmf_loss(torch.randn(0, 7), torch.rand(0, 7), normalizer=3.0) == 0


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_on_a_device_without_kernels(kind, monkeypatch):
    """Where Triton cannot be had, the plain backend computes the same."""
    from lmf_triton import plain

    expected = loss_and_grad(loss_of(kind), *samples(kind))
    monkeypatch.setattr(devices, "backend_of", lambda logits: plain)
    torch.testing.assert_close(loss_and_grad(loss_of(kind), *samples(kind)), expected)
