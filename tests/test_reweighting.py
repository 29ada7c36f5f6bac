"""Promise: deferred re-weighting trains unweighted first, then with class-balanced weights, for any loss."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from oracle import pairwise
from torch import nn

from lmf_triton import DeferredReweighting, FocalLoss, LDAMLoss, LMFLoss, class_balanced_weights

COUNTS = [500, 40, 3]
LOSSES = {
    "LMF": lambda weight=None: LMFLoss(COUNTS, weight=weight),
    "LDAM": lambda weight=None: LDAMLoss(COUNTS, weight=weight),
    "focal": lambda weight=None: FocalLoss(weight=weight),
    "PyTorch's cross-entropy": lambda weight=None: nn.CrossEntropyLoss(weight=weight),
}


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 3, generator=generator), torch.randint(3, (16,), generator=generator)


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
def test_the_weights_set_in_at_their_epoch(make_loss):
    scheduled = make_loss()
    schedule = DeferredReweighting(scheduled, COUNTS, start_epoch=2, beta=0.999)
    balanced = make_loss(class_balanced_weights(COUNTS, beta=0.999))
    assert not torch.allclose(make_loss()(*batch()), balanced(*batch()))  # otherwise nothing is tested
    for epoch, expected in enumerate([make_loss(), make_loss(), balanced, balanced]):
        schedule.step(epoch)
        torch.testing.assert_close(scheduled(*batch()), expected(*batch()))


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
def test_the_first_stage_has_the_weights_that_the_loss_was_built_with(make_loss):
    own = torch.tensor([1.0, 2.0, 3.0])
    scheduled = make_loss(own.clone())
    schedule = DeferredReweighting(scheduled, COUNTS, start_epoch=1)
    schedule.step(1)
    assert torch.equal(scheduled.weight, class_balanced_weights(COUNTS))
    schedule.step(0)  # back, as when a run starts again from an early checkpoint
    assert torch.equal(scheduled.weight, own)


def test_a_run_resumes_from_a_state_dict_of_either_stage():
    first = LDAMLoss(COUNTS)
    DeferredReweighting(first, COUNTS, start_epoch=5).step(7)
    resumed = LDAMLoss(COUNTS)
    schedule = DeferredReweighting(resumed, COUNTS, start_epoch=5)
    resumed.load_state_dict(first.state_dict())
    schedule.step(8)
    assert torch.equal(resumed.weight, first.weight)


def test_the_weights_are_written_in_place(triton_device):
    criterion = FocalLoss().to(triton_device)
    schedule = DeferredReweighting(criterion, torch.tensor(COUNTS, device=triton_device), start_epoch=1)
    before = criterion.weight.data_ptr()
    schedule.step(3)
    assert criterion.weight.data_ptr() == before and criterion.weight.device.type == triton_device.type


def test_weights_move_with_the_loss_after_the_schedule_was_made():
    criterion = FocalLoss()
    schedule = DeferredReweighting(criterion, COUNTS, start_epoch=1)
    criterion.double()
    schedule.step(1)
    assert criterion.weight.dtype == torch.float64


def weights_at(schedule, epochs) -> list[list[float]]:
    weights = []
    for epoch in epochs:
        schedule.step(epoch)
        weights.append(schedule.criterion.weight.tolist())
    return weights


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
def test_the_weights_set_in_at_their_step(make_loss):
    """Among steps of several epochs, and when a run is resumed before or after it."""
    schedule = DeferredReweighting(make_loss(), COUNTS, start_step=40)
    first, balanced = [1.0, 1.0, 1.0], class_balanced_weights(COUNTS).tolist()
    assert weights_at(schedule, range(100)) == [first] * 40 + [balanced] * 60
    resumed = DeferredReweighting(make_loss(), COUNTS, start_step=40)
    resumed.criterion.load_state_dict(schedule.criterion.state_dict())
    assert weights_at(resumed, [20, 40, 39, 100]) == [first, balanced, first, balanced]


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("own", [None, [1.0, 2.0, 3.0]])
def test_an_epoch_has_its_weights_whatever_was_stepped_to_before(make_loss, own):
    schedule = DeferredReweighting(make_loss(own and torch.tensor(own)), COUNTS, start_epoch=2)
    first, balanced = own or [1.0, 1.0, 1.0], class_balanced_weights(COUNTS).tolist()
    epochs = [5, 0, 1, 2, 1, 7, 0]
    assert weights_at(schedule, epochs) == [balanced if epoch >= 2 else first for epoch in epochs]


@pairwise(
    make_loss=LOSSES,
    own=[None, [1.0, 2.0, 3.0]],
    between=["nothing", "half", "half and back", "bfloat16 and back", "copy", "pickle"],
)
def test_a_second_schedule_starts_where_the_first_did(make_loss, own, between):
    """The next fold, or a notebook cell run again: its first stage is not the second stage of the former."""
    criterion = make_loss(own and torch.tensor(own))
    DeferredReweighting(criterion, COUNTS, start_epoch=1).step(3)
    if between == "half":
        criterion.half()
    elif between == "half and back":
        criterion.half().float()
    elif between == "bfloat16 and back":
        criterion.bfloat16().float()
    elif between == "copy":
        criterion = copy.deepcopy(criterion)
    elif between == "pickle":
        criterion = pickle.loads(pickle.dumps(criterion))
    for counts in COUNTS, [30, 20, 10], [7, 7, 7]:
        schedule = DeferredReweighting(criterion, counts, start_epoch=1)
        expected = [own or [1.0, 1.0, 1.0], class_balanced_weights(counts).to(criterion.weight).tolist()]
        assert weights_at(schedule, [0, 1]) == expected


@pytest.mark.parametrize("make_loss", [make for name, make in LOSSES.items() if "PyTorch" not in name])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_the_second_stage_loaded_before_the_schedule(make_loss, assign):
    own = torch.tensor([1.0, 2.0, 3.0])
    first = make_loss(own)
    DeferredReweighting(first, COUNTS, start_epoch=5).step(7)
    resumed = make_loss(own)
    resumed.load_state_dict(first.state_dict(), assign=assign)
    assert torch.equal(resumed.weight, first.weight)
    schedule = DeferredReweighting(resumed, COUNTS, start_epoch=5)
    assert weights_at(schedule, [7, 0]) == [first.weight.tolist(), own.tolist()]


def test_such_a_checkpoint_of_a_loss_that_does_not_remember_is_refused():
    first = nn.CrossEntropyLoss()
    DeferredReweighting(first, COUNTS, start_epoch=5).step(7)
    resumed = nn.CrossEntropyLoss(weight=torch.ones(3))
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="make the schedule first, then load the checkpoint"):
        DeferredReweighting(resumed, COUNTS, start_epoch=5)
    resumed = nn.CrossEntropyLoss(weight=torch.ones(3))
    schedule = DeferredReweighting(resumed, COUNTS, start_epoch=5)
    resumed.load_state_dict(first.state_dict())
    assert weights_at(schedule, [0, 7]) == [[1.0, 1.0, 1.0], first.weight.tolist()]
    DeferredReweighting(nn.CrossEntropyLoss(weight=torch.ones(3)), [5, 5, 5], start_epoch=5)  # both stages are the same


# The second stage of equal counts is ones.
@pairwise(make_loss=LOSSES, counts=[COUNTS, [7, 7, 7]], assigned=[[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
def test_weights_assigned_after_a_schedule_are_what_the_next_one_starts_from(make_loss, counts, assigned):
    criterion = make_loss(torch.tensor([1.0, 2.0, 3.0]))
    DeferredReweighting(criterion, COUNTS, start_epoch=1).step(3)
    criterion.weight = torch.tensor(assigned)
    schedule = DeferredReweighting(criterion, counts, start_epoch=1)
    assert weights_at(schedule, [1, 0])[1] == assigned


# "meta" stands for a GPU here: a loss moved there, or made there, has its weights there.
@pytest.mark.parametrize("make", [FocalLoss, lambda: LMFLoss(COUNTS)], ids=["focal", "LMF"])
@pytest.mark.parametrize("moved", ["before", "after", "made there", "back and forth"])
def test_the_weights_are_where_the_loss_is(make, moved):
    with torch.device("meta" if moved == "made there" else "cpu"):
        criterion = make()
    if moved in ("before", "back and forth"):
        criterion.to("meta")
    if moved == "back and forth":
        criterion.to_empty(device="cpu")
    DeferredReweighting(criterion, COUNTS, start_epoch=1)
    if moved == "after":
        criterion.to("meta")
    assert criterion.weight.device.type == ("cpu" if moved == "back and forth" else "meta")
    criterion.to_empty(device="cpu")
    assert torch.equal(criterion.weight, torch.ones(3))


def test_buffers_say_where_a_loss_is_that_was_never_moved():
    """As of counts, margins or weights that were on a GPU from the start."""
    with_margins = LMFLoss(COUNTS)
    with_margins.margins = with_margins.margins.to("meta")
    had_a_weight = FocalLoss(weight=torch.ones(3, device="meta"))
    had_a_weight.weight = None
    for criterion in with_margins, had_a_weight:
        DeferredReweighting(criterion, COUNTS, start_epoch=1)
        assert criterion.weight.device.type == "meta"


@pytest.mark.parametrize("make", [FocalLoss, lambda: LMFLoss(COUNTS)], ids=["focal", "LMF"])
def test_a_loss_saved_whole_is_where_it_was_loaded_to(make):
    """Saved on a GPU, loaded where there is none: what it knows of its device goes with it."""
    file = io.BytesIO()
    torch.save(make(), file)
    file.seek(0)
    criterion = torch.load(file, map_location="meta", weights_only=False)
    DeferredReweighting(criterion, COUNTS, start_epoch=1)
    assert criterion.weight.device.type == "meta"


def test_casting_a_loss_does_not_move_it(triton_device):
    criterion = FocalLoss().to(triton_device).half()
    DeferredReweighting(criterion, COUNTS, start_epoch=1)
    assert criterion.weight.device.type == triton_device.type and criterion.weight.dtype == torch.float32


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
def test_epochs_may_be_of_numpy(make_loss):
    schedule = DeferredReweighting(make_loss(), COUNTS, start_epoch=np.int64(1))
    assert type(schedule.start) is int
    assert weights_at(schedule, np.arange(2)) == [[1.0, 1.0, 1.0], class_balanced_weights(COUNTS).tolist()]


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
def test_a_step_without_weights_is_refused(make_loss):
    schedule = DeferredReweighting(make_loss(), COUNTS, start_epoch=1)
    schedule.criterion.weight = None
    with pytest.raises(RuntimeError, match="weight was set to None: make the schedule anew"):
        schedule.step(0)


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
def test_the_device_may_be_given(make_loss):
    for own in (None, torch.ones(3)):
        criterion = make_loss(own)
        DeferredReweighting(criterion, COUNTS, start_epoch=1, device="meta")
        assert criterion.weight.device.type == "meta"


def test_a_loss_that_leaves_no_trace_of_its_device_says_what_to_give():
    criterion = nn.CrossEntropyLoss().to("meta")
    DeferredReweighting(criterion, COUNTS, start_epoch=1)
    logits, target = (tensor.to("meta") for tensor in batch())
    with pytest.raises(ValueError, match=r"class weights of DeferredReweighting are on cpu.*device='meta'"):
        criterion(logits, target)
    criterion(*batch())
    known = nn.CrossEntropyLoss().to("meta")
    DeferredReweighting(known, COUNTS, start_epoch=1, device="meta")
    known(logits, target)
    with_counts = nn.CrossEntropyLoss()
    DeferredReweighting(with_counts, torch.tensor(COUNTS), start_epoch=1)
    with_counts(*batch())


def test_a_step_on_the_meta_device_is_refused():
    """It would be forgotten by the time the loss gets memory."""
    with torch.device("meta"):
        criterion = LMFLoss(COUNTS)
        schedule = DeferredReweighting(criterion, COUNTS, start_epoch=1)
    with pytest.raises(RuntimeError, match=r"meta device.*materialise it, then step"):
        schedule.step(3)
    criterion.to_empty(device="cpu")
    assert weights_at(schedule, [3, 0]) == [class_balanced_weights(COUNTS).tolist(), [1.0, 1.0, 1.0]]


def test_weights_without_values_are_no_start():
    for make_loss in FocalLoss, nn.CrossEntropyLoss:
        with pytest.raises(ValueError, match="on the meta device and have no values: assign"):
            DeferredReweighting(make_loss(weight=torch.ones(3, device="meta")), COUNTS, start_epoch=1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((nn.MSELoss(), COUNTS), {"start_epoch": 1}, TypeError, "a buffer 'weight', got MSELoss"),
        ((FocalLoss(), COUNTS), {"start_epoch": -1}, ValueError, "at least 0, got -1"),
        ((FocalLoss(), COUNTS), {"start_epoch": 1.5}, TypeError, "got 1.5 of type float"),
        ((FocalLoss(), COUNTS), {"start_step": -1}, ValueError, "start_step must be at least 0, got -1"),
        (
            (FocalLoss(), COUNTS),
            {"start_step": 1e4},
            TypeError,
            "start_step must be an integer, got 10000.0 of type float",
        ),
        ((FocalLoss(), COUNTS), {}, TypeError, "one of start_epoch and start_step, got None and None"),
        ((FocalLoss(), COUNTS), {"start_epoch": 1, "start_step": 9}, TypeError, "start_step, got 1 and 9"),
        ((FocalLoss(weight=torch.ones(4)), COUNTS), {"start_epoch": 1}, ValueError, "4 class weights, got 3"),
        ((FocalLoss(), [1, 0]), {"start_epoch": 1}, ValueError, "class 1"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        DeferredReweighting(*arguments, **options)
