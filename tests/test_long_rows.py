"""Promise: rows beyond one tile are looped over, or shared by programs where there are few, to the same result.

The limits of a tile are lowered, so that the interpreter meets many parts of a row in a short time.
"""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import HAS_GPU
from oracle import assert_accurate, class_weights, evaluate, make_case

from lmf_triton import lmf_loss
from lmf_triton.fused import backend, launch
from lmf_triton.fused.kernels import index

pytestmark = pytest.mark.slow

TILE = 128
INF, NAN = math.inf, math.nan


@pytest.fixture(params=["loop", "parts", "cluster"])
def path(request, monkeypatch, triton_device):
    """Rows of more than 128 classes do not fit a multiprocessor.

    On one multiprocessor no row is shared; on 132, all are here; a cluster of up to 8 holds 2048 classes.
    """
    of_device = backend._launch_device(triton_device)
    if request.param == "cluster" and HAS_GPU and of_device.max_ctas == 1:
        pytest.skip("this device, or this version of Triton, has no clusters")
    most = 2 * TILE if request.param == "cluster" else TILE
    monkeypatch.setattr(launch, "MAX_CTA_CLASSES", {4: most, 8: most})
    monkeypatch.setattr(launch, "MAX_SINGLE_PROGRAM_TILE", 2 * TILE)
    monkeypatch.setattr(launch, "MAX_SHORT_CLASSES", TILE)
    monkeypatch.setattr(launch, "WARP_TILE_CLASSES", 8)
    monkeypatch.setattr(launch, "LOOP_CLASSES", {4: TILE, 8: TILE})
    devices = {
        "loop": replace(of_device, n_multiprocessors=1, capability=(8, 0)),
        "parts": replace(of_device, n_multiprocessors=132, capability=(8, 0)),
        "cluster": of_device if HAS_GPU else launch.Device(132, (9, 0), (3, 9)),
    }
    monkeypatch.setattr(backend, "_launch_device", lambda _: devices[request.param])
    launch.plan_forward.cache_clear()
    summaries = mock.Mock(wraps=backend._summaries)
    monkeypatch.setattr(backend, "_summaries", summaries)
    launched = mock.Mock(wraps=backend._launch)
    monkeypatch.setattr(backend, "_launch", launched)
    yield
    launch.plan_forward.cache_clear()
    plans = [call.args[1] for call in launched.call_args_list if call.args[0] is index.forward_kernel]
    assert summaries.called == (request.param == "parts")
    assert all((plan.meta["num_ctas"] > 1) == (request.param == "cluster") for plan in plans)
    assert all((plan.meta["CLASS_BLOCKS"] > 1) == (request.param == "loop") for plan in plans)


@pytest.mark.parametrize("n_classes", [129, 600])  # one class more than fits a tile; parts that do not come out even
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"scale": 30.0}),
        (torch.float32, {"beta": 0.0, "scale": 3.0}),
        (torch.bfloat16, {"alpha": 0.0}),
        (torch.float16, {}),
        (torch.float64, {"scale": 30.0}),
    ],
    ids=str,
)
def test_against_the_oracle(path, triton_device, n_classes, dtype, options):
    case = make_case((3, n_classes), dtype, weight=class_weights(n_classes), **options).to(triton_device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean_per_term"])
@pytest.mark.parametrize("grad_in_forward", [True, False])
def test_every_reduction(path, triton_device, reduction, grad_in_forward):
    case = make_case((3, 300), torch.float32, reduction=reduction, scale=2.0).to(triton_device)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert_accurate(case, loss, grad, roundings=2)
    without = lmf_loss(case.logits, case.target, case.margins, **case.options)
    assert torch.equal(without.cpu(), loss)


@pytest.mark.parametrize("logits", ["expanded", "sliced"])
def test_strides(path, triton_device, logits):
    case = make_case((6, 300), torch.float32)
    stored = {
        "expanded": case.logits[:1].expand(6, 300),
        "sliced": torch.nn.functional.pad(case.logits, (3, 5))[:, 3:-5],
    }
    case = replace(case, logits=stored[logits]).to(triton_device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_parts_of_very_different_size(path, triton_device, scale):
    """A part far below the others, a masked part, an empty target part, a row with nothing but its target."""
    case = make_case((6, 300), torch.float32, scale=scale, reduction="none")
    logits = case.logits
    logits[0, :100] -= 1e4
    logits[2, 70:210] = -INF
    logits[3] = -INF
    logits[3, 5] = 2.0
    logits[4] = torch.full((300,), -5000.0) + torch.linspace(0, 1, 300)
    target = case.target.clone()
    target[3] = 5
    case = replace(case, logits=logits, target=target).to(triton_device)
    loss, grad = evaluate(case)
    assert loss[3] == 0 and (grad[3] == 0).all()
    finite = replace(case, logits=logits.clamp_min(-1e30).to(triton_device))  # the oracle takes no inf - inf
    assert_accurate(finite, loss, grad, roundings=2)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("at", [0, 150, 299])
def test_a_value_that_spoils_its_own_row_only(path, triton_device, value, at):
    case = make_case((4, 300), torch.float32, reduction="none")
    target = torch.tensor([1, 2, 3, 4])
    sound, sound_grad = evaluate(replace(case, target=target).to(triton_device))
    case.logits[2, at] = value
    loss, grad = evaluate(replace(case, target=target).to(triton_device))
    rows = [0, 1, 3]
    assert loss[2].isnan() and grad[2].isnan().all()
    assert torch.equal(loss[rows], sound[rows]) and torch.equal(grad[rows], sound_grad[rows])


@pytest.mark.parametrize("grad_in_forward", [True, False])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_ignored_row_is_exactly_0_whatever_its_logits(path, triton_device, value, grad_in_forward):
    """256 classes fill their tiles: where all are NaN, so is their maximum."""
    case = make_case((4, 256), torch.float32, scale=2.0)
    case.logits[1] = value
    case.logits[2, 7] = value
    case = replace(case, target=torch.tensor([1, -100, -100, 255])).to(triton_device)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert (grad[[1, 2]] == 0).all()
    rows = replace(case, logits=case.logits[[0, 3]], target=case.target[[0, 3]])
    expected_loss, expected_grad = evaluate(rows, grad_in_forward=grad_in_forward)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(grad[[0, 3]], expected_grad)


def test_a_target_out_of_range_spoils_its_own_row_only(path, triton_device):
    case = make_case((4, 300), torch.float32, reduction="none")
    case = replace(case, target=torch.tensor([3, 300, -100, 299])).to(triton_device)
    loss, grad = evaluate(case)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert grad.isnan().all(1).tolist() == [False, True, False, False]
    assert (grad[2] == 0).all()


def test_steps_of_several_blocks(path, triton_device, monkeypatch):
    """On 8 multiprocessors, 4 programs share a row of 8 blocks of classes; the last block is not full."""
    device = backend._launch_device(triton_device)
    if device.max_ctas == 1 and device.n_multiprocessors > 1:
        monkeypatch.setattr(backend, "_launch_device", lambda _: replace(device, n_multiprocessors=8))
    case = make_case((2, 1000), torch.float32, reduction="sum").to(triton_device)
    assert_accurate(case, *evaluate(case), roundings=2)


def test_rows_that_fill_the_device_are_not_shared():
    device = launch.Device(132, (8, 0), (3, 9))
    for n_rows, parts in (1, 5), (8, 5), (64, 3), (66, 2), (67, 1), (4096, 1):  # of 5 blocks of classes
        config = launch.forward_config(1, n_rows, 32769, 4, device)
        assert config.class_parts == parts
        if config.class_parts > 1:
            tile = launch.combine_config(config, n_rows)
            assert tile.block_rows >= n_rows
            assert tile.block_rows * tile.block_classes <= launch.MAX_SINGLE_PROGRAM_TILE
