"""Promise: what a user hands in is read as what it is or refused, stays the user's, and what comes back is theirs."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import PATHS, REDUCTIONS, make_case, pairwise, with_probabilities
from torch import nn
from torch.masked import masked_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lmf_triton
from lmf_triton import DeferredReweighting, FocalLoss, LDAMLoss, LMFLoss, devices, ldam_margins, lmf_loss, plain

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

MODES = [True, False]
TENSORS = ["logits", "target", "margins", "weight", "logit_adjustment", "normalizer"]
SOFT = [False, True]  # whether the target is class probabilities


def arguments(device, reduction="mean", *, soft=False) -> dict[str, torch.Tensor]:
    """All tensors of one call: nothing divides 33 rows of 7, one sample is ignored and one confident."""
    case = make_case((33, 7), torch.float32)
    case = (with_probabilities(case) if soft else case).to(device)
    weight = torch.linspace(0.5, 2.0, 7, device=device)
    given = {"logits": case.logits, "target": case.target, "margins": case.margins, "weight": weight}
    given["logit_adjustment"] = torch.linspace(-4, 0, 7, device=device)
    return given | ({"normalizer": torch.tensor(40.0, device=device)} if reduction.startswith("mean") else {})


def loss_and_grad(arguments, upstream=None, **options):
    logits = arguments["logits"].detach().requires_grad_()
    loss = lmf_loss(**(arguments | {"logits": logits}), **options)
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grad


def noted_negation(x):
    """The same values; in memory are their negatives."""
    lazy = torch._neg_view(-x)
    assert lazy.is_neg()
    return lazy


# --- Tensors that are not what lies in their memory ---


@pairwise(path=PATHS, name=TENSORS, grad_in_forward=MODES, soft=SOFT)
def test_a_negation_that_pytorch_only_noted(device, name, grad_in_forward, soft):
    given = arguments(device, soft=soft)
    lazy = given | {name: noted_negation(given[name])}
    for expected, actual in zip(
        loss_and_grad(given, grad_in_forward=grad_in_forward),
        loss_and_grad(lazy, grad_in_forward=grad_in_forward),
        strict=True,
    ):
        assert torch.equal(expected, actual)


def test_the_imaginary_part_of_a_conjugate(device):
    """Where people meet it, with the gradient going on to the complex tensor."""
    case = make_case((33, 7), torch.float32).to(device)
    z = torch.complex(torch.zeros_like(case.logits), -case.logits).requires_grad_()
    logits = z.conj().imag
    assert logits.is_neg()
    lmf_loss(logits, case.target, case.margins).backward()
    _, expected = loss_and_grad({"logits": case.logits, "target": case.target, "margins": case.margins})
    assert torch.equal(z.grad.imag, -expected)


@pairwise(reduction=REDUCTIONS, grad_in_forward=MODES, retain_graph=[False, True], soft=SOFT)
def test_lazy_upstream_gradients(device, reduction, grad_in_forward, retain_graph, soft):
    options = {"reduction": reduction, "grad_in_forward": grad_in_forward}
    given = arguments(device, reduction, soft=soft)
    logits = given["logits"].requires_grad_()
    upstream = torch.linspace(-1, 2, 33, device=device) if reduction == "none" else torch.tensor(0.7, device=device)
    _, expected = loss_and_grad(given, upstream, **options)
    for lazy, factor in (noted_negation(upstream), 1.0), (torch._efficientzerotensor(upstream.shape).to(device), 0.0):
        loss = lmf_loss(**given, **options)
        (grad,) = torch.autograd.grad(loss, logits, lazy, retain_graph=retain_graph)
        torch.testing.assert_close(grad, factor * expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["logits", "target", "margins", "logit_adjustment", "normalizer"])
def test_zeros_that_pytorch_only_noted(device, name):
    given = arguments(device, soft=name == "target")
    zeros = torch.zeros_like(given[name])
    lazy = torch._efficientzerotensor(zeros.shape, device=device)
    assert torch.equal(lmf_loss(**(given | {name: lazy})), lmf_loss(**(given | {name: zeros})))


@pairwise(name=TENSORS, layout=[torch.sparse_coo, "nested"], soft=SOFT)
def test_other_layouts_are_refused(name, layout, soft):
    given = arguments("cpu", soft=soft)
    tensor = given[name]
    if layout == "nested":
        other = torch.nested.nested_tensor(list(tensor)) if tensor.ndim > 1 else torch.nested.nested_tensor([tensor])
    else:
        other = tensor.to_sparse()
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor.*(nested|sparse_coo).*to_dense"):
        lmf_loss(**(given | {name: other}))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.filterwarnings("ignore:.*is not implemented in __torch_dispatch__ for MaskedTensor")
@pytest.mark.parametrize("name", TENSORS)
def test_masked_tensors_are_refused(device, name):
    """By themselves, since nothing but they knows what a mask is to mean."""
    given = arguments(device)
    with pytest.raises((TypeError, NotImplementedError), match=r"MaskedTensor|masked"):
        lmf_loss(**(given | {name: masked_tensor(given[name], given[name] > 0)}))


@pairwise(name=TENSORS[:-1], soft=SOFT)  # of a normalizer a copy is made, by PyTorch
def test_the_kernels_refuse_tensors_whose_memory_was_freed(triton_device, name, soft):
    """Their address is 0: on a GPU, reading it would take the whole process's context down."""
    given = arguments(triton_device, soft=soft)
    given[name].untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=f"{name} must have its values in memory of its own"):
        lmf_loss(**given)


@pytest.fixture(scope="module")
def mesh():
    """Two ranks of which this process is the first: the second is not needed to place a tensor."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pairwise(name=TENSORS, sharded=[True, False], soft=SOFT)
def test_dtensors_are_refused(mesh, name, sharded, soft):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    given = arguments("cpu", soft=soft)
    placement = Shard(0) if sharded and name in ("logits", "target") else Replicate()
    distributed = DTensor.from_local(given[name], mesh, [placement], run_check=False)
    with pytest.raises(TypeError, match=rf"(logits|{name}) must be an ordinary tensor.*to_local.*full_tensor"):
        lmf_loss(**(given | {name: distributed}))


def test_dtensors_in_other_places_are_refused(mesh):
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    given = arguments("cpu")
    weight = DTensor.from_local(given["weight"], mesh, [Replicate()], run_check=False)
    for refused in (
        lambda: FocalLoss(weight=weight),
        lambda: setattr(FocalLoss(), "weight", weight),
        lambda: ldam_margins(weight),
        lambda: DeferredReweighting(nn.CrossEntropyLoss(weight=weight), [1] * 7, start_epoch=1),
        lambda: distribute_module(LMFLoss([1] * 7), mesh).half()(given["logits"], given["target"]),
    ):
        with pytest.raises(TypeError, match=r"to_local.*full_tensor"):
            refused()
    loss = lmf_loss(**given | {"logits": given["logits"].requires_grad_()})
    upstream = DTensor.from_local(torch.tensor(3.0), mesh, [Replicate()], run_check=False)
    with pytest.raises(TypeError, match=r"upstream gradient must be an ordinary tensor.*to_local"):
        loss.backward(upstream)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None])
def test_lengths_are_compared_rightly_under_torch_compile(dynamic):
    """Symbolic, margins as a bare tensor: of the right length they pass, of another they are refused."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:  # Dynamo cannot look into Triton's interpreter
        patch.setattr(devices, "backend_of", lambda logits: plain)
        compiled = torch.compile(lmf_loss, dynamic=dynamic, backend="eager")
        for n_classes in (3, 5, 8):
            generator = torch.Generator().manual_seed(n_classes)
            logits, margins = torch.randn(6, n_classes, generator=generator), torch.rand(n_classes, generator=generator)
            target = torch.randint(n_classes, (6,), generator=generator)
            expected = lmf_loss(logits, target, margins, weight=margins)
            torch.testing.assert_close(compiled(logits, target, margins, weight=margins), expected)
            with pytest.raises(ValueError, match=r"margins must have one value a class"):
                compiled(logits, target, margins[1:], weight=margins)


@pytest.mark.parametrize("source", sorted(Path(lmf_triton.__file__).parent.rglob("*.py")), ids=lambda file: file.name)
def test_no_size_is_tested_by_in(source):
    """``n in (None, len(x))`` is answered wrongly for a symbolic n; so no container made on the spot holds a size."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
            for comparator in node.comparators:
                inside = [getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(comparator)]
                assert not {"len", "shape", "numel", "size", "ndim"} & set(inside), f"line {node.lineno}"


# --- What a user hands in stays the user's ---


@pairwise(reduction=REDUCTIONS, grad_in_forward=MODES, scale=[1.0, 30.0], soft=SOFT)
def test_no_argument_is_written_to(device, reduction, grad_in_forward, scale, soft):
    given = arguments(device, reduction, soft=soft)
    upstream = torch.full((33,) if reduction == "none" else (), 0.3, device=device)
    before = {name: tensor.clone() for name, tensor in given.items()} | {"upstream": upstream.clone()}
    versions = {name: tensor._version for name, tensor in given.items()}
    loss_and_grad(given, upstream, reduction=reduction, grad_in_forward=grad_in_forward, scale=scale)
    for name, tensor in (given | {"upstream": upstream}).items():
        assert torch.equal(tensor, before[name])
    assert {name: tensor._version for name, tensor in given.items()} == versions


def storage(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("make", [lambda w: LMFLoss([3, 2, 1], weight=w), lambda w: LDAMLoss([3, 2, 1], weight=w)])
def test_buffers_alias_no_argument(make):
    weight = torch.tensor([1.0, 2.0, 3.0])
    first, second = make(weight), make(weight)
    assigned = FocalLoss()
    assigned.weight = weight
    buffers = [first.weight, second.weight, assigned.weight]
    assert len({storage(tensor) for tensor in (*buffers, weight)}) == 4
    weight.zero_()
    assert all(buffer.tolist() == [1.0, 2.0, 3.0] for buffer in buffers)


def test_registering_a_buffer_is_handing_it_in():
    weight = torch.tensor([1.0, 2.0, 3.0])
    criterion = FocalLoss(weight=torch.ones(3))
    criterion.register_buffer("weight", weight)
    schedule = DeferredReweighting(criterion, [500, 40, 3], start_epoch=1)
    schedule.step(1)
    assert weight.tolist() == [1.0, 2.0, 3.0]
    schedule.step(0)
    assert criterion.weight.tolist() == [1.0, 2.0, 3.0]


def test_margins_and_counts_alias_nothing():
    counts = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    criterion = LMFLoss(counts)
    margins = ldam_margins(counts)
    criterion.margins = margins
    assert storage(criterion.margins) != storage(margins)
    counts.fill_(7.0)
    criterion.reset_parameters()
    assert torch.equal(criterion.margins, ldam_margins([3, 2, 1]))


@pytest.mark.parametrize("make_loss", [nn.CrossEntropyLoss, FocalLoss], ids=lambda make: make.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_schedule_never_writes_to_the_callers_weights(make_loss, when):
    """Nor into a second loss that shares them; whether they came before the schedule or were assigned after it."""
    counts, shared = [500, 40, 3], torch.tensor([1.0, 2.0, 3.0])
    criterion = make_loss(weight=shared if when == "before" else None)
    second = make_loss(weight=shared)
    schedule = DeferredReweighting(criterion, counts, start_epoch=1)
    if when == "after":
        criterion.weight = shared
    schedule.step(1)
    assert shared.tolist() == second.weight.tolist() == [1.0, 2.0, 3.0]
    assert criterion.weight.tolist() != [1.0, 2.0, 3.0]


# --- A kept gradient that someone else has too ---


def test_hooks_on_saved_tensors_keep_what_they_kept(device):
    """Whatever a hook stored is the hook's: backward neither scales it nor hands it out."""
    given = arguments(device)
    stored: list[torch.Tensor] = []

    def pack(tensor):
        stored.append(tensor)
        return len(stored) - 1

    logits = given["logits"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, stored.__getitem__):
        loss = lmf_loss(**given)
    before = [tensor.clone() for tensor in stored]
    for _ in range(2):
        logits.grad = None
        loss.backward(torch.tensor(3.0, device=device), retain_graph=_ == 0)
        logits.grad.zero_()
    assert any(tensor.shape == logits.shape for tensor in stored)
    assert all(map(torch.equal, stored, before))


def hold_in_cpp(tensor):
    if not tensor.is_floating_point():
        return tensor
    holder = torch.zeros_like(tensor, requires_grad=True)
    holder.grad = tensor
    return holder


def same(tensor):
    return tensor


# What is stored of a saved tensor, and what is given back of it.
OTHER_FORMS = {
    "the same": (same, same),
    "held in C++": (hold_in_cpp, lambda holder: holder.grad if holder.requires_grad else holder),
    "negation noted": (lambda t: torch._neg_view(-t) if t.is_floating_point() else t, same),
    "other strides": (lambda t: torch.stack([t, t], -1)[..., 0], same),
    "transposed": (lambda t: t.t().contiguous().t() if t.ndim == 2 else t, same),
}


@pairwise(form=OTHER_FORMS, reduction=["none", "mean"], grad_in_forward=MODES, expanded=[False, True], soft=SOFT)
def test_hooks_may_give_back_the_values_in_another_form(device, form, reduction, grad_in_forward, expanded, soft):
    """What they store stays as it is; what they give back is read as what it is."""
    given = arguments(device, reduction, soft=soft)
    if expanded:
        given["logits"] = given["logits"][:1].expand(33, 7)
    options = {"reduction": reduction, "grad_in_forward": grad_in_forward}
    upstream = torch.linspace(-1, 2, 33, device=device) if reduction == "none" else torch.tensor(3.0, device=device)
    _, expected = loss_and_grad(given, upstream, **options)
    stored = []
    store, give_back = form

    def pack(tensor):
        stored.append(store(tensor))
        return len(stored) - 1

    def unpack(index):
        return give_back(stored[index])

    logits = given["logits"].detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = lmf_loss(**(given | {"logits": logits}), **options)
    before = [unpack(i).clone() for i in range(len(stored))]
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    torch.testing.assert_close(grad, expected)
    grad.zero_()
    for i, kept in enumerate(before):
        torch.testing.assert_close(unpack(i), kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [1.0, 3.0])
def test_the_storage_of_a_saved_tensor_that_a_user_looked_at(device, value):
    given = arguments(device)
    logits = given["logits"].requires_grad_()
    loss = lmf_loss(**given)
    (storage,) = [t.untyped_storage() for t in loss.grad_fn.saved_tensors if t.shape == logits.shape]
    before = storage.clone()
    loss.backward(torch.tensor(value, device=device))
    logits.grad.zero_()
    assert storage.tolist() == before.tolist()


@pairwise(hold={"itself": lambda t: t, "alias": torch.Tensor.detach, "part": lambda t: t[:1]}, value=[1.0, 3.0])
def test_a_saved_tensor_that_a_user_looked_at(device, value, hold):
    """``grad_fn.saved_tensors`` hands it to anyone: a debugger, a plot of the graph."""
    given = arguments(device)
    logits = given["logits"].requires_grad_()
    loss = lmf_loss(**given)
    (kept,) = [hold(t) for t in loss.grad_fn.saved_tensors if t.shape == logits.shape]
    before = kept.clone()
    loss.backward(torch.tensor(value, device=device))
    logits.grad.zero_()
    assert torch.equal(kept, before)


def test_selective_checkpointing_that_must_save_the_gradient(triton_device):
    """Everything may be saved on a GPU; the interpreter itself computes with tensors, which may not."""
    given = arguments(triton_device)
    stored: list[torch.Tensor] = []

    def policy(context, operator, *args, **kwargs):
        is_gradient = operator is torch.ops.lmf_triton.forward.default
        return CheckpointPolicy.MUST_SAVE if is_gradient else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        # The interpreter lets PyTorch see that the kernels write the same values again.
        caching, cached = create_selective_checkpoint_contexts(policy, allow_cache_entry_mutation=True)
        stored.append(caching)
        return caching, cached

    logits = given["logits"].requires_grad_()
    loss = checkpoint(lambda x: lmf_loss(**(given | {"logits": x})), logits, use_reentrant=False, context_fn=contexts)
    kept = [entry for entry in tensors_of(stored[0]) if entry.shape == logits.shape]
    before = [tensor.clone() for tensor in kept]
    assert kept
    loss.backward(torch.tensor(3.0, device=triton_device))
    assert all(map(torch.equal, kept, before))
    _, expected = loss_and_grad(given, torch.tensor(3.0, device=triton_device))
    torch.testing.assert_close(logits.grad, expected)


def tensors_of(mode) -> list[torch.Tensor]:
    """What a caching mode of selective checkpointing has stored."""
    found = []
    for outputs in mode.storage.values():
        for leaf in torch.utils._pytree.tree_leaves(list(outputs.values()) if isinstance(outputs, dict) else outputs):
            value = getattr(leaf, "val", leaf)
            found += [value] if isinstance(value, torch.Tensor) else []
    return found


# --- What comes back is the user's ---


IN_PLACE = {
    "masked": lambda loss: loss.masked_fill_(torch.arange(loss.numel(), device=loss.device).view(loss.shape) < 3, 0.0),
    "assigned": lambda loss: loss.__setitem__(..., 2 * loss.detach()) if loss.ndim == 0 else loss.__setitem__(0, 0.0),
    "scaled": lambda loss: loss.mul_(3.0),
    "added": lambda loss: loss.add_(1.0),
    "divided": lambda loss: loss.div_(4.0),
}


@pairwise(change=IN_PLACE, reduction=REDUCTIONS, shape=[(33, 7), (7,), (2, 5, 3, 4)], grad_in_forward=MODES, soft=SOFT)
def test_the_loss_may_be_changed_in_place(device, shape, reduction, grad_in_forward, change, soft):
    case = make_case(shape, torch.float32)
    case = (with_probabilities(case) if soft else case).to(device)

    def gradient(in_place: bool):
        logits = case.logits.detach().clone().requires_grad_()
        loss = lmf_loss(logits, case.target, case.margins, reduction=reduction, grad_in_forward=grad_in_forward)
        loss = loss if in_place else loss * 1.0
        change(loss)
        loss.sum().backward()
        return logits.grad if logits.grad is not None else torch.zeros_like(logits)

    torch.testing.assert_close(gradient(True), gradient(False))


@pairwise(reduction=REDUCTIONS, soft=SOFT)
def test_a_loss_without_gradient_may_be_changed_in_place(device, reduction, soft):
    given = arguments(device, reduction, soft=soft)
    with torch.no_grad():
        loss = lmf_loss(**given, reduction=reduction)
        expected = 3 * loss
        loss.mul_(3)
    assert torch.equal(loss, expected)
    assert not loss._is_view()


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_the_gradient_may_be_changed_in_place(device, grad_in_forward):
    """With ``create_graph`` too, where it has a history."""
    given = arguments(device)
    _, expected = loss_and_grad(given)
    logits = given["logits"].requires_grad_()
    (grad,) = torch.autograd.grad(lmf_loss(**given, grad_in_forward=grad_in_forward), logits, create_graph=True)
    grad.mul_(2).add_(1)
    torch.testing.assert_close(grad.detach(), 2 * expected + 1)


def test_every_tensor_argument_is_tried_here():
    """A new one belongs into ``TENSORS``."""
    annotations = {name: str(p.annotation) for name, p in inspect.signature(lmf_loss).parameters.items()}
    assert [name for name, annotation in annotations.items() if "Tensor" in annotation] == TENSORS
