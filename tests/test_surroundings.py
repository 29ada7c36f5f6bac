"""Promise: the surroundings of a call change no number; and a loss that was moved or materialised has its values."""

import contextlib
import copy
import pickle

import pytest
import torch
from oracle import make_case, pairwise, with_probabilities
from torch import nn
from torch._subclasses import FakeTensorMode

from lmf_triton import (
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LMFLoss,
    class_balanced_weights,
    ldam_margins,
    lmf_loss,
    log_prior_adjustment,
)

INTEGERS = [70000, 6705, 1113, 142, 1]  # 70000 is beyond float16, 6705 beyond bfloat16's precision
FLOATS = [70000.5, 6705.1, 1113.3, 142.7, 1.0]
DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHT = torch.tensor([0.3, 1.1, 2.7, 3.3, 5.1])


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN too
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "autocast bfloat16": lambda: torch.autocast(DEVICE_TYPE, dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast(DEVICE_TYPE, dtype=torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": deterministic,
    "anomaly detection": torch.autograd.detect_anomaly,
}
COUNTS = {"integers": INTEGERS, "floats": FLOATS, "tensor": torch.tensor(FLOATS, dtype=torch.float64)}
pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")


@pairwise(surroundings=SURROUNDINGS, counts=COUNTS)
def test_margins_and_weights_are_the_same_to_the_bit(surroundings, counts):
    functions = (
        ldam_margins,
        lambda c: ldam_margins(c, constant=0.7),
        class_balanced_weights,
        log_prior_adjustment,
        lambda c: LMFLoss(c, weight=WEIGHT).margins,
        lambda c: LDAMLoss(c, max_margin=0.3).margins,
        lambda c: LMFLoss(c, weight=WEIGHT).weight,
        lambda c: FocalLoss(logit_adjustment=WEIGHT).logit_adjustment,
    )
    expected = [function(counts) for function in functions]
    with surroundings():
        found = [function(counts) for function in functions]
    for before, after in zip(expected, found, strict=True):
        assert after.dtype == torch.float32
        assert not after.is_inference()
        assert after.is_meta or torch.equal(before, after)
        if isinstance(counts, torch.Tensor):
            assert after.device == counts.device


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_a_schedule_made_and_stepped_there(surroundings):
    def weights():
        criterion = FocalLoss(weight=WEIGHT)
        schedule = DeferredReweighting(criterion, FLOATS, start_epoch=1)
        found = []
        for epoch in (0, 1):
            schedule.step(epoch)
            found.append(criterion.weight.clone())
        return found

    expected = weights()
    with surroundings():
        found = weights()
    assert all(map(torch.equal, expected, found))


@pairwise(
    surroundings=SURROUNDINGS,
    dtype=[torch.bfloat16, torch.float32, torch.float64],
    reduction=["none", "mean_per_term"],
    scale=[1.0, 30.0],
    soft=[False, True],
)
def test_loss_and_gradient_are_the_same_to_the_bit(device, surroundings, reduction, dtype, scale, soft):
    case = make_case((33, 7), dtype, reduction=reduction)
    case = (with_probabilities(case) if soft else case).to(device)
    weight = torch.linspace(0.5, 2.0, 7, device=device)

    def loss_and_grad(with_grad=True):
        logits = case.logits.detach().requires_grad_(with_grad)
        loss = lmf_loss(logits, case.target, case.margins, weight=weight, reduction=reduction, scale=scale)
        return (loss.detach(), *(torch.autograd.grad(loss, logits, torch.ones_like(loss)) if with_grad else ()))

    without_graph = surroundings in (torch.no_grad, torch.inference_mode)
    expected = loss_and_grad(not without_graph)
    with surroundings():
        found = loss_and_grad(not without_graph)
    for before, after in zip(expected, found, strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_a_loss_built_in_inference_mode_trains():
    with torch.inference_mode():
        criterion = LMFLoss(FLOATS, weight=WEIGHT.clone(), reduction="none")
        schedules = [DeferredReweighting(c, FLOATS, start_epoch=0) for c in (FocalLoss(), nn.CrossEntropyLoss())]
    for schedule in schedules:
        schedule.step(0)
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    criterion(logits, torch.tensor([0, 1, 4])).sum().backward()
    DeferredReweighting(criterion, FLOATS, start_epoch=0).step(0)
    assert logits.grad.isfinite().all()


# --- Meta device and to_empty ---

LOSSES = {
    "LMF": lambda: LMFLoss(FLOATS, max_margin=0.3),
    "LMF, weighted": lambda: LMFLoss(FLOATS, weight=WEIGHT),
    "LDAM": lambda: LDAMLoss(INTEGERS, weight=WEIGHT),
    "focal": lambda: FocalLoss(),
    "focal, weighted": lambda: FocalLoss(weight=WEIGHT),
}


class Model(nn.Module):
    """A loss that is part of a model, as it often is."""

    def __init__(self, make_loss) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.criterion = make_loss()


@pytest.fixture
def fresh_memory_is_nan():
    with deterministic():
        assert torch.empty(3).isnan().all()
        yield


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pairwise(make_loss=LOSSES, start=["meta", "cpu", "moved to meta"], dtype=[None, torch.float16])
def test_to_empty_of_a_model_leaves_the_loss_its_values(make_loss, start, dtype):
    with torch.device("meta" if start == "meta" else "cpu"):
        model = Model(make_loss)
    if start == "moved to meta":
        model.to("meta")
    if dtype is not None:
        model.to(dtype)
    model.to_empty(device="cpu")
    expected = make_loss().state_dict()
    assert model.criterion.state_dict().keys() == expected.keys()
    for name, buffer in model.criterion.state_dict().items():
        assert torch.equal(buffer, expected[name].to(dtype or torch.float32))
    assert model.layer.weight.isnan().all()  # so the memory was new


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pairwise(make_loss=LOSSES, how=["buffers", "to_empty of one module", "zeros"])
def test_reset_parameters_for_other_ways_to_materialise(make_loss, how):
    with torch.device("meta"):
        criterion = make_loss()
    if how == "buffers":
        for name, buffer in criterion.named_buffers():
            criterion._buffers[name] = torch.empty_like(buffer, device="cpu")
    elif how == "zeros":
        criterion._apply(lambda t: torch.zeros_like(t, device="cpu"))
    else:
        criterion.to_empty(device="cpu", recurse=False)  # as FSDP does it
    with torch.device("meta"):  # where a framework may still be
        criterion.reset_parameters()
    expected = make_loss().state_dict()
    assert all(torch.equal(buffer, expected[name]) for name, buffer in criterion.state_dict().items())


MOVES = {
    "half": nn.Module.half,
    "double and back": lambda module: module.double().float(),
    "to a device": lambda module: module.to("cpu"),
    "shared": nn.Module.share_memory,
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_other_moves_keep_values_that_were_changed(move):
    """Loaded, assigned or written in place: only memory without values is written anew."""
    criterion = LMFLoss([4, 1], weight=torch.ones(2))
    criterion.margins = torch.tensor([0.125, 0.25])
    criterion.weight.copy_(torch.tensor([3.0, float("nan")]))
    moved = move(criterion)
    assert moved.margins.tolist() == [0.125, 0.25]
    assert moved.weight[0] == 3 and moved.weight[1].isnan()


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("fill", ["load", "load by assignment", "assign", "write", None])
def test_a_weight_that_was_handed_in_without_values(fill):
    """An error at first use, and only if nobody has filled it until then."""
    with torch.device("meta"):
        criterion = LMFLoss(FLOATS, weight=class_balanced_weights(FLOATS))
    criterion.to_empty(device="cpu")
    complete = LMFLoss(FLOATS, weight=WEIGHT)
    if fill == "assign":
        criterion.weight = WEIGHT
    elif fill == "write":  # as torch.distributed.checkpoint does, into what state_dict() returns
        criterion.state_dict()["weight"].copy_(WEIGHT)
    elif fill is not None:
        criterion.load_state_dict(complete.state_dict(), assign=fill == "load by assignment")
    logits, target = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 4])
    if fill is None:
        with pytest.raises(RuntimeError, match=r"weight has no values.*meta device.*state_dict.*criterion\.weight ="):
            criterion(logits, target)
    else:
        assert torch.equal(criterion(logits, target), complete(logits, target))


AFTERWARDS = {
    "half": nn.Module.half,
    "double": nn.Module.double,
    "copy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "functional_call": lambda module: (
        torch.func.functional_call(module, {"weight": WEIGHT}, (torch.zeros(1, 5), torch.zeros(1, dtype=torch.long))),
        module,
    )[1],
    "meta and back": lambda module: module.to("meta").to_empty(device="cpu"),
}


@pairwise(afterwards=AFTERWARDS, context=[contextlib.nullcontext, torch.inference_mode])
def test_a_weight_without_values_is_never_used(afterwards, context):
    """Whatever else is done to the module before it is first used."""
    with torch.device("meta"):
        criterion = FocalLoss(weight=torch.ones(5))
    with context():
        criterion.to_empty(device="cpu")
    criterion = afterwards(criterion)
    logits, target = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 4])
    if afterwards is AFTERWARDS["functional_call"]:  # which filled it for one call
        assert criterion(logits, target).isnan()
    else:
        with pytest.raises(RuntimeError, match="weight has no values"):
            criterion(logits, target)


def test_a_model_that_only_pretends_to_have_memory():
    """FakeTensorMode, in which people count a model's memory before it has any."""
    with FakeTensorMode():
        criterion = FocalLoss(weight=torch.ones(5)).half()
        assert criterion.weight.dtype == torch.float16
        criterion.to_empty(device="cpu")


def test_what_a_user_applies_to_the_buffers_is_not_undone():
    criterion = FocalLoss(weight=WEIGHT)
    criterion._apply(lambda tensor: 2 * tensor)
    assert torch.equal(criterion.weight, 2 * WEIGHT)


def test_counts_without_values_are_refused():
    with pytest.raises(TypeError, match="class_counts must be numbers"):
        LMFLoss(torch.tensor([3, 2, 1], device="meta"))
