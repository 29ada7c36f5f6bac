"""Promise: wherever ``F.cross_entropy`` stands, ours does: under a compiler, a transform, a tracer, a subclass."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import PATHS, REDUCTIONS, class_weights, make_case, pairwise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from lmf_triton import FocalLoss, LDAMLoss, LMFLoss, lmf_loss

N_CLASSES = 7
COUNTS = [900, 400, 150, 60, 30, 9, 2]
WEIGHT = class_weights(N_CLASSES)
BACKENDS = ["aot_eager", "inductor"]
SHAPES = {"rows": (9, N_CLASSES), "dense": (3, N_CLASSES, 2, 5), "one sample": (N_CLASSES,)}
MODES = [None, True, False]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit"),  # deprecated, and used all the same
    # PyTorch 2.11's Dynamo instantiates a Function itself.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def samples(shape=SHAPES["rows"], *, device="cpu", dtype=torch.float32, seed=0):
    """Logits and target, one sample ignored where there are several."""
    case = make_case(shape, dtype, seed=seed).to(torch.device(device))
    return case.logits, case.target


def loss_of(device="cpu", **options):
    """A function of logits and target, with margins and class weights."""
    module = LMFLoss(COUNTS, weight=torch.tensor(WEIGHT.tolist())).to(device)  # anew: it may have to be a fake one
    return lambda x, y: lmf_loss(x, y, module.margins, weight=module.weight, **options)


def loss_and_grad(function, logits, target):
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(logits, target)
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return loss.detach(), grad


def assert_same(function, expected, logits, target):
    """Loss and gradient of two functions, to the rounding of an upstream gradient applied before or after."""
    for actual, wanted in zip(
        loss_and_grad(function, logits, target), loss_and_grad(expected, logits, target), strict=True
    ):
        torch.testing.assert_close(actual, wanted)
        assert actual.stride() == wanted.stride()


class Model(nn.Module):
    """A classifier that computes its own loss."""

    def __init__(self, criterion):
        super().__init__()
        self.classifier = nn.Linear(4, N_CLASSES)
        self.criterion = criterion

    def forward(self, features, target):
        return self.criterion(self.classifier(features), target)


class Holder(Model):
    """One that merely has a loss."""

    def forward(self, features):
        return self.classifier(features)


# --- torch.compile ---


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, backend, **options):
    """The function under torch.compile, without graph breaks or warnings; and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    function = torch.compile(function, backend=counter, fullgraph=True, **options)

    def quietly(*arguments, **named):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
            warnings.filterwarnings("ignore", message=".*should not be instantiated")
            return function(*arguments, **named)

    return quietly, counter


@pytest.mark.parametrize("backend", BACKENDS)
@pairwise(path=PATHS, shape=SHAPES, reduction=REDUCTIONS, grad_in_forward=MODES)
def test_compiled_it_is_what_it_is_in_eager_mode(device, backend, shape, reduction, grad_in_forward):
    function = loss_of(device, reduction=reduction, grad_in_forward=grad_in_forward)
    quick, counter = compiled(function, backend)
    assert_same(quick, function, *samples(shape, device=device))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pairwise(path=PATHS, dtype=[torch.float16, torch.bfloat16, torch.float64], scale=[1.0, 30.0])
def test_compiled_in_other_dtypes(device, backend, dtype, scale):
    function = loss_of(device, scale=scale)
    quick, _ = compiled(function, backend)
    assert_same(quick, function, *samples(device=device, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pairwise(path=PATHS, reduction=["mean", "none"])
def test_batch_sizes_take_few_graphs(device, backend, reduction):
    criterion = LMFLoss(COUNTS, weight=WEIGHT, reduction=reduction).to(device)
    quick, counter = compiled(criterion, backend, dynamic=True)
    for n_samples in (2, 3, 4, 5, 8, 9, 16, 17):
        assert_same(quick, criterion, *samples((n_samples, N_CLASSES), device=device, seed=n_samples))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("setting", ["gamma", "alpha", "beta", "scale", "weight", "normalizer"])
def test_schedules_of_settings_take_few_graphs(setting):
    criterion = LMFLoss(COUNTS, weight=WEIGHT)
    quick, counter = compiled(criterion, "aot_eager")
    logits, target = samples()
    for step in range(14):
        value = 0.5 + 0.25 * step
        named = {"normalizer": 5 + step} if setting == "normalizer" else {}
        if setting != "normalizer":
            setattr(criterion, setting, value * WEIGHT if setting == "weight" else value)
        assert_same(lambda x, y: quick(x, y, **named), lambda x, y: criterion(x, y, **named), logits, target)  # noqa: B023
    assert counter.frame_count <= 3


@pairwise(path=PATHS, criterion={"lmf": LMFLoss(COUNTS), "ldam": LDAMLoss(COUNTS, scale=30), "focal": FocalLoss()})
def test_a_compiled_training_step(device, criterion):
    torch.manual_seed(0)
    model = Model(criterion).to(device)
    twin = copy.deepcopy(model)
    quick, _ = compiled(model, "aot_eager")
    features, target = torch.randn(9, 4, device=device), samples(device=device)[1]
    for network, step in (twin, twin), (model, quick):
        step(features, target).backward()
        torch.optim.SGD(network.parameters(), lr=0.1).step()
    for actual, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted)


@pairwise(kind=[nn.Parameter, nn.Buffer], name=["logits", "weight"])
def test_parameters_and_buffers_under_a_compiler(kind, name):
    logits, target = samples()
    weight = WEIGHT.clone()
    if name == "logits":
        logits = kind(logits)
    else:
        weight = nn.Parameter(weight, requires_grad=False) if kind is nn.Parameter else kind(weight)
    quick, _ = compiled(lambda x, y: lmf_loss(x, y, weight=weight), "aot_eager")
    torch.testing.assert_close(quick(logits, target), lmf_loss(logits, target, weight=WEIGHT))


def test_schedules_of_whole_numbers_take_few_graphs():
    """Dynamo takes an integer attribute of a module for a constant."""
    criterion = LMFLoss(COUNTS)
    quick, counter = compiled(criterion, "aot_eager")
    for gamma in range(1, 9):
        criterion.gamma = gamma
        assert_same(quick, criterion, *samples())
    assert counter.frame_count <= 3
    function, counter = compiled(lambda x, y, i: lmf_loss(x, y, ignore_index=i), "aot_eager")
    for ignored in range(-8, 0):
        logits, target = samples()
        target = target.masked_fill(target == -100, ignored)
        torch.testing.assert_close(function(logits, target, ignored), lmf_loss(logits, target, ignore_index=ignored))
    assert counter.frame_count <= 3


def test_compiled_without_a_gradient(device):
    function = loss_of(device)
    quick, _ = compiled(function, "aot_eager")
    logits, target = samples(device=device)
    torch.testing.assert_close(quick(logits, target), function(logits, target))
    with torch.no_grad():
        torch.testing.assert_close(quick(logits.requires_grad_(), target), function(logits, target))


def test_compiled_strides_are_those_of_eager_mode(device):
    logits, target = samples((3, N_CLASSES, 2, 5), device=device)
    quick, _ = compiled(loss_of(device), "aot_eager")
    assert_same(quick, loss_of(device), logits.contiguous(memory_format=torch.channels_last), target)


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_compiled_autograd(device, grad_in_forward):
    function = loss_of(device, grad_in_forward=grad_in_forward)
    logits, target = samples(device=device)
    expected = loss_and_grad(function, logits, target)
    logits.requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        function(logits, target).backward()
    torch.testing.assert_close(logits.grad, expected[1])


@pytest.mark.parametrize(("path", "check_target"), [("cpu", False), ("kernel", True)], indirect=["path"])
def test_a_compiled_function_raises_what_eager_mode_raises(device, check_target):
    quick, _ = compiled(loss_of(device, check_target=check_target), "aot_eager")
    logits, target = samples(device=device)
    with pytest.raises(IndexError, match=r"target must be in \[0, 7\).*got 7 at index \[3\]"):
        quick(logits, target.index_fill(0, torch.tensor(3, device=device), 7))


# --- torch.export, fake tensors, operators ---


@pytest.mark.parametrize("strict", [True, False])
def test_export(device, strict):
    torch.manual_seed(0)
    model = Model(LMFLoss(COUNTS, weight=WEIGHT)).to(device)
    features, target = torch.randn(9, 4, device=device), samples(device=device)[1]
    sizes = {0: torch.export.Dim("n", min=2, max=1000)}
    program = torch.export.export(model, (features, target), dynamic_shapes=(sizes, sizes), strict=strict)
    assert any("lmf_triton" in str(node.target) for node in program.graph.nodes)
    features, target = torch.randn(30, 4, device=device), samples((30, N_CLASSES), device=device)[1]
    exported = program.module()
    torch.testing.assert_close(exported(features, target), model(features, target))
    exported(features, target).backward()
    model(features, target).backward()
    torch.testing.assert_close(exported.classifier.weight.grad, model.classifier.weight.grad)


@pairwise(path=PATHS, shape=SHAPES, reduction=REDUCTIONS, grad_in_forward=MODES)
def test_fake_tensors_are_those_of_eager_mode(device, shape, reduction, grad_in_forward):
    logits, target = samples(shape, device=device)
    real = loss_and_grad(loss_of(device, reduction=reduction, grad_in_forward=grad_in_forward), logits, target)
    mode = FakeTensorMode()
    with mode:
        function = loss_of(device, reduction=reduction, grad_in_forward=grad_in_forward)
        fake = loss_and_grad(function, *(mode.from_tensor(tensor) for tensor in (logits, target)))
    for actual, wanted in zip(fake, real, strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert actual.device == wanted.device


def test_a_whole_step_on_fake_tensors():
    with FakeTensorMode():
        model = Model(LMFLoss(COUNTS, weight=torch.ones(N_CLASSES)))
        model(torch.randn(1000000, 4), torch.zeros(1000000, dtype=torch.long)).backward()
        assert model.classifier.weight.grad.shape == (N_CLASSES, 4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_the_meta_device(reduction):
    logits, target = (tensor.to("meta") for tensor in samples())
    loss, grad = loss_and_grad(lambda x, y: lmf_loss(x, y, reduction=reduction), logits, target)
    assert (loss.device.type, loss.shape) == ("meta", target.shape if reduction == "none" else ())
    assert grad.shape == logits.shape


LAYOUTS = {
    "rows": lambda: samples(),
    "transposed": lambda: (samples()[0].t().contiguous().t(), samples()[1]),
    "dense": lambda: samples((3, N_CLASSES, 2, 5)),
    "channels last": lambda: (
        samples((3, N_CLASSES, 2, 5))[0].contiguous(memory_format=torch.channels_last),
        samples((3, N_CLASSES, 2, 5))[1],
    ),
    "gaps": lambda: (samples((9, 2 * N_CLASSES))[0][:, ::2], samples()[1]),
    "one sample": lambda: samples((N_CLASSES,)),
    "no sample": lambda: samples((0, N_CLASSES)),
    "one class": lambda: (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)),
}


@pairwise(path=PATHS, layout=LAYOUTS, reduction=REDUCTIONS, keep=["nothing", "gradient", "coefs"])
def test_operators_pass_opcheck(path, layout, reduction, keep):
    logits, target = layout()
    n_coefs = 4 if path == "kernel" and keep == "coefs" else 0
    per_class = [torch.rand(logits.shape[min(logits.ndim - 1, 1)]) + 0.5 for _ in range(2)]
    normalizer = torch.tensor([5.0, 4.0]) if reduction.startswith("mean") else None
    numbers = torch.tensor([1.0, 1.0, 1.5, 1.0, 0.0], dtype=torch.float64)
    problem = (logits, target, *per_class, None, normalizer, numbers, -100, reduction)
    loss, _, coefs, link = torch.ops.lmf_triton.forward(*problem, False, keep == "gradient", n_coefs)
    upstream = torch.rand(loss.shape)
    calls = [
        (torch.ops.lmf_triton.forward, (logits.requires_grad_(), *problem[1:], True, keep == "gradient", n_coefs)),
        (torch.ops.lmf_triton.backward, (logits.detach(), *problem[1:], coefs, upstream)),
        (torch.ops.lmf_triton.apply_upstream, (torch.rand_like(logits), upstream, link)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


# --- torch.func and its relatives ---


def gradients_one_by_one(function, logits, target):
    return torch.stack([loss_and_grad(function, x, y)[1] for x, y in zip(logits, target, strict=True)])


@pairwise(path=PATHS, shape=SHAPES, reduction=REDUCTIONS, grad_in_forward=MODES, scale=[1.0, 30.0])
def test_grad_and_value(device, shape, reduction, grad_in_forward, scale):
    function = loss_of(device, reduction=reduction, grad_in_forward=grad_in_forward, scale=scale)
    logits, target = samples(shape, device=device)
    grad, value = torch.func.grad_and_value(lambda x: function(x, target).sum())(logits)
    expected = loss_and_grad(function, logits, target)
    torch.testing.assert_close((value, grad), (expected[0].sum(), expected[1]))


@pairwise(path=PATHS, reduction=REDUCTIONS, samples_each=[None, 4], options=[{}, {"normalizer": 3.0}])
def test_gradients_of_samples_by_vmap(device, reduction, samples_each, options):
    """Per-sample gradients, as differential privacy and influence functions take them."""
    if options and not reduction.startswith("mean"):
        options = {}
    function = loss_of(device, reduction=reduction, **options)
    if samples_each is None:
        logits, target = samples(device=device)
        keep = target != -100  # alone, its mean is NaN
        logits, target = logits[keep], target[keep]
    else:
        logits, target = samples((5, N_CLASSES, samples_each), device=device)
        logits = logits.movedim(1, 2)
        target = target.masked_fill(torch.arange(5, device=device)[:, None] == 2, 0)
    grads = torch.func.vmap(torch.func.grad(lambda x, y: function(x, y).sum()))(logits, target)
    torch.testing.assert_close(grads, gradients_one_by_one(function, logits, target))
    losses = torch.func.vmap(function)(logits, target)
    torch.testing.assert_close(losses, torch.stack([function(x, y) for x, y in zip(logits, target, strict=True)]))


@pytest.mark.parametrize("name", ["logits", "target", "margins", "weight", "normalizer"])
@pytest.mark.parametrize("reduction", ["mean", "mean_per_term"])
def test_a_batch_of_one_argument(device, name, reduction):
    logits, target = samples(device=device)
    given = {"logits": logits, "target": target, "margins": WEIGHT, "weight": WEIGHT, "normalizer": torch.tensor(5.0)}
    given = {key: tensor.to(device) for key, tensor in given.items()}
    one = given.pop(name)
    batch = torch.stack([one, one.flip(0) if one.ndim else 2 * one, one], dim=-1)

    def function(value):
        tensors = given | {name: value}
        fixed = tensors.pop("logits")
        zeros = torch.zeros_like(logits)
        return torch.func.grad_and_value(lambda x: lmf_loss(fixed + x, **tensors, reduction=reduction))(zeros)

    grads, losses = torch.func.vmap(function, in_dims=-1)(batch)
    expected = [function(value) for value in batch.unbind(-1)]
    torch.testing.assert_close(grads, torch.stack([grad for grad, _ in expected]))
    torch.testing.assert_close(losses, torch.stack([loss for _, loss in expected]))


@pairwise(path=PATHS, reduction=REDUCTIONS, grad_in_forward=MODES)
def test_jacobians(device, reduction, grad_in_forward):
    function = loss_of(device, reduction=reduction, grad_in_forward=grad_in_forward)
    logits, target = samples(device=device)
    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(lambda x: function(x, target), logits)
    torch.testing.assert_close(torch.func.jacrev(lambda x: function(x, target))(logits), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch has no faster way for a batch of upstream gradients
        torch.testing.assert_close(jacobian(lambda x: function(x, target), logits, vectorize=True), expected)


@pairwise(path=PATHS, reduction=REDUCTIONS, grad_in_forward=MODES)
def test_batches_of_upstream_gradients(device, reduction, grad_in_forward):
    function = loss_of(device, reduction=reduction, grad_in_forward=grad_in_forward)
    logits, target = samples(device=device)
    logits.requires_grad_()
    loss = function(logits, target)
    upstream = torch.rand(3, *loss.shape, device=device)

    def grad(each, **options):
        return torch.autograd.grad(loss, logits, each, retain_graph=True, **options)[0]

    expected = torch.stack([grad(each) for each in upstream])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(grad(upstream, is_grads_batched=True), expected)
    torch.testing.assert_close(torch.func.vmap(grad)(upstream), expected)


@pairwise(
    path=PATHS,
    dtype=[torch.float16, torch.bfloat16, torch.float32, torch.float64],
    weight_dtype=[torch.float16, torch.bfloat16, torch.float32, torch.float64],
)
def test_dtypes_of_a_batch(device, dtype, weight_dtype):
    weight = WEIGHT.to(device, weight_dtype)
    logits, target = (tensor.to(device) for tensor in batch_of(3, 301))  # whose sum bfloat16 cannot hold
    logits = logits.to(dtype)
    grad = torch.func.grad_and_value(lambda x, y: lmf_loss(x, y, weight=weight))
    grads, losses = torch.func.vmap(grad)(logits, target)
    expected = [grad(x, y) for x, y in zip(logits, target, strict=True)]
    torch.testing.assert_close(grads, torch.stack([each for each, _ in expected]))
    torch.testing.assert_close(losses, torch.stack([each for _, each in expected]))


def test_nested_vmaps(device):
    function = loss_of(device)
    logits, target = samples((6, N_CLASSES, 4), device=device)
    logits, target = logits.movedim(1, 2).reshape(2, 3, 4, N_CLASSES), target.reshape(2, 3, 4).clamp_min(0)
    grad = torch.func.grad(function)
    expected = torch.stack([torch.stack([grad(x, y) for x, y in zip(*pair)]) for pair in zip(logits, target)])  # noqa: B905
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(grad))(logits, target), expected)


def test_functional_call_and_ensembles(device):
    criterion = LMFLoss(COUNTS, weight=WEIGHT).to(device)
    logits, target = samples(device=device)
    other = WEIGHT.flip(0).to(device)
    changed = torch.func.functional_call(criterion, {"weight": other}, (logits, target))
    torch.testing.assert_close(changed, lmf_loss(logits, target, criterion.margins, weight=other))
    weights = torch.stack([criterion.weight, other])
    both = torch.func.vmap(lambda w: torch.func.functional_call(criterion, {"weight": w}, (logits, target)))(weights)
    torch.testing.assert_close(both, torch.stack([criterion(logits, target), changed]))


def test_a_level_that_the_loss_is_not_about(device):
    """Two levels of grad, of which the inner one differentiates something else."""
    function = loss_of(device)
    logits, target = samples(device=device)
    one = torch.ones((), device=device)
    grad = torch.func.grad(lambda x: torch.func.grad(lambda z: function(x, target) * z)(one))(logits)
    torch.testing.assert_close(grad, loss_and_grad(function, logits, target)[1])


@pytest.mark.parametrize("function", [lmf_loss, F.cross_entropy])
def test_no_grad_within_a_transform_holds_for_all_levels(device, function):
    logits, target = samples(device=device)
    logits.requires_grad_()  # outside of the transform

    def product(x):
        with torch.no_grad():
            loss = function(x, target)
        return (x * loss).sum()

    grad = torch.func.grad(product)(logits)
    assert not grad.requires_grad
    torch.testing.assert_close(grad, function(logits, target).detach().expand_as(grad))


SECOND = {
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).sum())(x),
    "jacrev of grad": lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vjp of vjp": lambda f, x: torch.func.vjp(lambda y: torch.func.vjp(f, y)[1](f(y))[0], x)[1](x),
    "jacfwd of grad": lambda f, x: torch.func.jacfwd(torch.func.grad(f))(x),
}


@pairwise(path=PATHS, transform=SECOND, grad_in_forward=MODES)
def test_second_derivatives_by_transforms_are_refused(device, transform, grad_in_forward):
    function = loss_of(device, grad_in_forward=grad_in_forward)
    logits, target = samples(device=device)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"lmf_loss has no (second|derivative in forward)"):
        transform(lambda x: function(x, target), logits)


def test_functionalize(device):
    function = loss_of(device)
    logits, target = samples(device=device)
    expected = loss_and_grad(function, logits, target)
    functionalize = torch.func.functionalize
    torch.testing.assert_close(functionalize(function)(logits, target), expected[0])
    for gradient in functionalize(torch.func.grad(function)), torch.func.grad(functionalize(function)):
        torch.testing.assert_close(gradient(logits, target), expected[1])


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "vjp": lambda f: lambda x, y: torch.func.vjp(lambda z: f(z, y), x)[1](torch.ones((), device=x.device))[0],
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f)),
    "vmap": torch.func.vmap,
}


@pairwise(path=PATHS, transform=TRANSFORMS, reduction=["mean", "sum"], grad_in_forward=MODES)
def test_compiled_transforms(device, transform, reduction, grad_in_forward):
    """In one graph. Where Dynamo broke off within a transform, PyTorch 2.11 gave zeros."""
    transformed = transform(loss_of(device, reduction=reduction, grad_in_forward=grad_in_forward))
    logits, target = samples(device=device)
    target = target.clamp_min(0)
    quick, counter = compiled(transformed, "aot_eager")
    torch.testing.assert_close(quick(logits, target), transformed(logits, target))
    assert counter.frame_count == 1


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))])
def test_transforms_of_what_is_compiled(device, transform):
    """Dynamo does not look into the operators."""
    function = loss_of(device)
    logits, target = samples(device=device)
    if transform is not torch.func.grad:
        target = target.clamp_min(0)
    counter = CompileCounterWithBackend("aot_eager")
    quick = torch.compile(function, backend=counter)
    torch.testing.assert_close(transform(quick)(logits, target), transform(function)(logits, target))
    assert counter.frame_count <= 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_symbolic_trace_of_a_batch_is_for_all_sizes(reduction):
    function = torch.func.vmap(lambda x, y: lmf_loss(x, y, reduction=reduction))
    trace = make_fx(function, tracing_mode="symbolic")(*batch_of(9, 6))
    for sizes in (18, 3), (4, 6):
        torch.testing.assert_close(trace(*batch_of(*sizes)), function(*batch_of(*sizes)))


def batch_of(n_problems, n_samples):
    generator = torch.Generator().manual_seed(n_problems)
    logits = torch.randn(n_problems, n_samples, N_CLASSES, generator=generator)
    return logits, torch.randint(N_CLASSES, (n_problems, n_samples), generator=generator)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_no_problems(reduction):
    loss = torch.func.vmap(lambda x, y: lmf_loss(x, y, reduction=reduction))(*batch_of(0, 6))
    assert loss.shape == ((0, 6) if reduction == "none" else (0,))


# --- TorchScript and fx ---

CRITERIA = {
    "lmf": lambda: LMFLoss(COUNTS, weight=WEIGHT),
    "ldam": lambda: LDAMLoss(COUNTS),
    "focal": lambda: FocalLoss(),
    "nn": lambda: nn.CrossEntropyLoss(weight=WEIGHT),  # what ours are to be like
}


@pytest.mark.parametrize("make_loss", CRITERIA.values(), ids=CRITERIA)
def test_a_model_that_holds_a_loss(make_loss):
    model, features = Holder(make_loss()), torch.randn(9, 4)
    for taken in torch.jit.script(model), torch.jit.trace(model, features), symbolic_trace(model):
        assert torch.equal(taken(features), model(features))


@pytest.mark.parametrize("make_loss", CRITERIA.values(), ids=CRITERIA)
def test_a_model_that_computes_its_loss_is_traced_symbolically(make_loss):
    model = Model(make_loss())
    graph = symbolic_trace(model)
    for n_samples in 9, 5:
        features, target = torch.randn(n_samples, 4), samples((n_samples, N_CLASSES))[1]
        assert torch.equal(graph(features, target), model(features, target))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks of shapes
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_trace_computes_the_loss_anew(device, requires_grad):
    model = Model(LMFLoss(COUNTS, weight=WEIGHT)).to(device)
    model.requires_grad_(requires_grad)
    target = samples(device=device)[1]
    trace = torch.jit.trace(model, (torch.randn(9, 4, device=device), target))
    features, target = torch.randn(5, 4, device=device), samples((5, N_CLASSES), device=device)[1]
    torch.testing.assert_close(trace(features, target), model(features, target))
    if requires_grad:
        trace(features, target).backward()
        traced = model.classifier.weight.grad.clone()
        model.zero_grad()
        model(features, target).backward()
        torch.testing.assert_close(traced, model.classifier.weight.grad)


# --- Subclasses ---


class Tagged(torch.Tensor):
    """Like MONAI's MetaTensor and fastai's TensorBase: what comes of it is one of its kind, and some methods differ."""

    functions: list = []  # noqa: RUF012

    def new_empty(self, size, dtype=None, device=None, requires_grad=False):
        assert isinstance(size, tuple)
        return torch.empty(size, dtype=dtype, device=device, requires_grad=requires_grad)

    def new_zeros(self):
        raise AssertionError("another method of this name")

    resolve_neg = view = expand = new_zeros

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.functions.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Quiet(torch.Tensor):
    """As PyTorch's Parameter and Buffer: a subclass that no function notices."""

    __torch_function__ = torch._C._disabled_torch_function_impl


@pairwise(
    path=PATHS,
    subclass=[torch.Tensor, Tagged, Quiet],
    name=["logits", "target", "weight", "all"],
    reduction=["mean", "none"],
)
def test_subclasses_give_what_cross_entropy_gives(device, subclass, name, reduction):
    def of(function):
        logits, target = samples(device=device)
        given = {"logits": logits, "target": target, "weight": WEIGHT.to(device)}
        given = {k: t.as_subclass(subclass) if name in (k, "all") else t for k, t in given.items()}
        logits = given.pop("logits").requires_grad_()
        target = given.pop("target")
        loss = function(logits, target, **given, reduction=reduction)
        loss.sum().backward()
        return loss, logits.grad

    ours, theirs = of(lambda *a, **k: lmf_loss(*a, **k, alpha=0, gamma=0)), of(F.cross_entropy)
    assert [type(tensor) for tensor in ours] == [type(tensor) for tensor in theirs]
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.Tensor(actual), torch.Tensor(wanted))


def test_a_subclass_sees_one_function():
    Tagged.functions.clear()
    logits, target = samples()
    lmf_loss(logits.as_subclass(Tagged), target, normalizer=2.0)
    assert Tagged.functions == [lmf_loss]


@pytest.mark.parametrize("make_loss", [LMFLoss, LDAMLoss], ids=lambda loss: loss.__name__)
def test_counts_and_weights_of_a_subclass(make_loss):
    counts = torch.tensor(COUNTS).as_subclass(Tagged)
    criterion = make_loss(counts, weight=WEIGHT.as_subclass(Tagged))
    expected = make_loss(COUNTS, weight=WEIGHT)
    torch.testing.assert_close(torch.Tensor(criterion(*samples())), expected(*samples()))


@pairwise(path=PATHS, reduction=["mean", "none"], grad_in_forward=MODES)
def test_wrappers_of_tensors_meet_operators(device, reduction, grad_in_forward):
    logits, target = samples(device=device)
    function = loss_of(device, reduction=reduction, grad_in_forward=grad_in_forward)
    both = TwoTensor(logits.clone(), 2 * logits).requires_grad_()
    loss = function(both, TwoTensor(target, target))
    loss.backward(torch.ones_like(loss))
    for part, scaled in ("a", logits), ("b", 2 * logits):
        expected = loss_and_grad(function, scaled, target)
        torch.testing.assert_close((getattr(loss, part).detach(), getattr(both.grad, part)), expected)
