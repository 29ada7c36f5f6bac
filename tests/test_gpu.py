"""Promise: on a GPU nothing waits for the host, graphs capture it, and every run gives the same bits.

What only a GPU can show; the other files run there too.
"""

from dataclasses import replace

import pytest
import torch
from oracle import make_case
from torch.profiler import ProfilerActivity, profile

from lmf_triton import DeferredReweighting, FocalLoss, LMFLoss, class_balanced_weights, devices, lmf_loss, plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(32, 7), (4096, 1000), (64, 50000), (4, 19, 64, 64)]  # tiny, large, looped, dense
MODES = [True, False]


def forward_and_backward(case, grad_in_forward):
    logits = case.logits.detach().requires_grad_()
    loss = lmf_loss(logits, case.target, case.margins, grad_in_forward=grad_in_forward, **case.options)
    loss.backward(case.upstream)
    return loss.detach(), logits.grad


@pytest.fixture(params=SHAPES, ids=str)
def case(request):
    return make_case(request.param, torch.bfloat16).to(torch.device("cuda"))


def assert_no_synchronisation(case, grad_in_forward):
    forward_and_backward(case, grad_in_forward)  # compilation may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(case, grad_in_forward)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_schedule_that_counts_steps_waits_at_the_first_alone():
    criterion = FocalLoss().cuda()
    schedule = DeferredReweighting(criterion, [500, 40, 3], start_step=2)
    schedule.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        schedule.step(1)
        schedule.step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert criterion.weight.tolist() == class_balanced_weights([500, 40, 3]).tolist()


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_no_synchronisation(case, grad_in_forward):
    assert_no_synchronisation(case, grad_in_forward)


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_no_synchronisation_with_a_normalizer(case, grad_in_forward):
    for normalizer in 300, torch.tensor(300, device="cuda"), (2.5, torch.tensor(300, device="cuda")):
        reduction = "mean_per_term" if isinstance(normalizer, tuple) else "mean"
        options = {"normalizer": normalizer, "reduction": reduction}
        assert_no_synchronisation(replace(case, options=options), grad_in_forward)


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_no_synchronisation_without_triton(case, grad_in_forward, monkeypatch):
    monkeypatch.setattr(devices, "backend_of", lambda logits: plain)
    assert_no_synchronisation(case, grad_in_forward)


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_cuda_graph(case, grad_in_forward):
    """Captured once, replayed on new values."""
    logits = case.logits.detach().clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_and_backward(case, grad_in_forward)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = lmf_loss(logits, case.target, case.margins, grad_in_forward=grad_in_forward)
        (grad,) = torch.autograd.grad(loss, logits, case.upstream)
    with torch.no_grad():
        logits.copy_(-case.logits)
    graph.replay()
    expected_loss, expected_grad = forward_and_backward(
        type(case)(-case.logits, case.target, case.margins, case.upstream), grad_in_forward
    )
    assert torch.equal(loss, expected_loss)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_the_same_bits_in_100_runs(case, grad_in_forward):
    loss, grad = forward_and_backward(case, grad_in_forward)
    for _ in range(100):
        again, grad_again = forward_and_backward(case, grad_in_forward)
        assert torch.equal(loss, again)
        assert torch.equal(grad, grad_again)


def test_the_context_survives_a_target_out_of_range():
    logits = torch.zeros(1000, 7, device="cuda", requires_grad=True)
    target = torch.full((1000,), 2**60, device="cuda")
    lmf_loss(logits, target, reduction="none").sum().backward()
    torch.cuda.synchronize()
    assert logits.grad.isnan().all()
    assert torch.ones(1, device="cuda").item() == 1


@pytest.mark.parametrize(("shape", "launches"), [((32, 7), 1), ((4096, 1000), 3)])
def test_number_of_launches(shape, launches):
    """One for a tiny batch; denominators, loss and gradient, and the sum of the parts for a large one."""
    case = make_case(shape, torch.float32).to(torch.device("cuda"))
    logits = case.logits.requires_grad_()
    lmf_loss(logits, case.target, case.margins)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        lmf_loss(logits, case.target, case.margins)
        torch.cuda.synchronize()
    kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == launches, [e.name for e in kernels]


def test_peak_memory():
    """Beyond the logits: one gradient and a few floats a sample."""
    logits = torch.randn(4096, 8192, device="cuda", requires_grad=True)
    target = torch.zeros(4096, dtype=torch.long, device="cuda")
    criterion = LMFLoss(torch.arange(1, 8193)).to("cuda")
    criterion(logits, target).backward()
    logits.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    criterion(logits, target).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= logits.numel() * logits.element_size() + 64 * 4096 + 2**20


def test_more_than_2_to_the_31_elements():
    n_rows, n_classes = 70_000, 32_000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n_rows * n_classes:
        pytest.skip("needs 14 GB of free GPU memory")
    logits = torch.zeros(n_rows, n_classes, dtype=torch.bfloat16, device="cuda")
    target = torch.zeros(n_rows, dtype=torch.int32, device="cuda")
    logits[-1] = torch.linspace(-3, 3, n_classes)
    target[-1] = n_classes // 2
    leaf = logits.requires_grad_()
    (0.5 * lmf_loss(leaf, target, reduction="sum")).backward()  # not 1, so that every element is multiplied
    last = logits.detach()[-1:].clone().requires_grad_()
    (0.5 * lmf_loss(last, target[-1:], reduction="sum")).backward()
    assert torch.equal(leaf.grad[-1:], last.grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device():
    case = make_case((33, 7), torch.float32).to(torch.device("cuda:1"))
    loss, grad = forward_and_backward(case, True)
    assert loss.device == grad.device == torch.device("cuda:1")
    assert grad.isfinite().all()
