"""Promise: deferred re-weighting trains unweighted first, then with class-balanced weights, for any loss."""

import pytest
import torch
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


def test_the_weights_are_written_in_place(device):
    criterion = FocalLoss().to(device)
    schedule = DeferredReweighting(criterion, torch.tensor(COUNTS, device=device), start_epoch=1)
    before = criterion.weight.data_ptr()
    schedule.step(3)
    assert criterion.weight.data_ptr() == before and criterion.weight.device.type == device.type


def test_weights_move_with_the_loss_after_the_schedule_was_made():
    criterion = FocalLoss()
    schedule = DeferredReweighting(criterion, COUNTS, start_epoch=1)
    criterion.double()
    schedule.step(1)
    assert criterion.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((nn.MSELoss(), COUNTS), {"start_epoch": 1}, TypeError, "a buffer 'weight', got MSELoss"),
        ((FocalLoss(), COUNTS), {"start_epoch": -1}, ValueError, "at least 0, got -1"),
        ((FocalLoss(), COUNTS), {"start_epoch": 1.5}, TypeError, "got 1.5 of type float"),
        ((FocalLoss(weight=torch.ones(4)), COUNTS), {"start_epoch": 1}, ValueError, "4 class weights, got 3"),
        ((FocalLoss(), [1, 0]), {"start_epoch": 1}, ValueError, "class 1"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        DeferredReweighting(*arguments, **options)
