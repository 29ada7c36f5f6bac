"""Promise: what broke other libraries does not break here. Each test is named after the failure, and says where."""

import pytest
import torch
import torch.nn.functional as F
from oracle import make_case, pairwise

from lmf_triton import LMFLoss, devices, lmf_loss, plain
from reference import lmf as reference


def grad_of(loss_fn, logits):
    logits = logits.detach().clone().requires_grad_()
    loss = loss_fn(logits)
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 0.99, 2.0])
def test_nan_gradient_or_negative_loss_for_confident_samples(device, gamma):
    """LDAM-DRW #17, kornia #918, optax #1267, keras-retinanet #706: p = 1 and gamma < 1."""
    logits = torch.tensor([[50.0, 0.0], [200.0, 0.0], [1e4, 0.0], [0.0, 0.0]], device=device)
    target = torch.zeros(4, dtype=torch.long, device=device)
    _, grad = grad_of(lambda x: lmf_loss(x, target, gamma=gamma, reduction="sum"), logits)
    assert grad.isfinite().all()
    losses = lmf_loss(logits, target, gamma=gamma, reduction="none")
    assert (losses >= 0).all()
    assert not losses.signbit().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradient_rounded_before_1_is_subtracted(device, dtype):
    """Liger #1329: p rounded to half and then 1 - p taken: 20% off at p = .99, all lost at .999."""
    gap = torch.logit(torch.tensor([0.5, 0.9, 0.99, 0.999], dtype=torch.float64)).to(dtype)
    logits = torch.stack([gap, torch.zeros_like(gap)], 1).to(device)
    target = torch.zeros(4, dtype=torch.long, device=device)
    _, grad = grad_of(lambda x: lmf_loss(x, target, alpha=0.0, gamma=0.0, reduction="sum"), logits)
    exact = -torch.sigmoid(-gap.double())
    assert ((grad[:, 0].cpu() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


def test_gradient_stored_in_half_and_then_scaled(device):
    """TransformerEngine #3193: gradients of 1e-9 are 0 in float16 before a loss scale of 2**20 arrives."""
    logits = torch.tensor([[20.0, 0.0]], dtype=torch.float16, device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    _, grad = grad_of(lambda x: lmf_loss(x, target, alpha=0.0, gamma=0.0) * 2.0**20, logits)
    exact = -torch.sigmoid(torch.tensor(-20.0, dtype=torch.float64)) * 2.0**20
    assert abs(grad[0, 0].item() - exact) <= 1e-3 * abs(exact)


def test_logits_overwritten_in_forward(device):
    """Liger #272, #1251: the gradient takes the place of the logits, which another consumer still needs."""
    case = make_case((9, 7), torch.float32).to(device)
    _, alone = grad_of(lambda x: (x.softmax(1) ** 2).sum(), case.logits)
    _, loss_grad = grad_of(lambda x: lmf_loss(x, case.target), case.logits)
    _, together = grad_of(lambda x: (x.softmax(1) ** 2).sum() + lmf_loss(x, case.target), case.logits)
    torch.testing.assert_close(together, alone + loss_grad)


def test_reduction_none_with_a_varying_upstream_gradient(device):
    """Liger #421, #678, #968, TransformerEngine #2139, mmcv: only the first sample's upstream is used, or a mean."""
    case = make_case((9, 7), torch.float64).to(device)
    factors = torch.linspace(-2, 3, 9, dtype=torch.float64, device=device)
    _, grad = grad_of(lambda x: (lmf_loss(x, case.target, reduction="none") * factors).sum(), case.logits)
    _, expected = grad_of(lambda x: (reference.lmf_loss(x, case.target, reduction="none") * factors).sum(), case.logits)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("grad_in_forward", [True, False])
def test_upstream_gradient_of_stride_0_read_as_dense(device, grad_in_forward):
    """TransformerEngine #623, #2402: loss.sum().backward() expands one number."""
    case = make_case((300, 7), torch.float32).to(device)
    options = {"reduction": "none", "grad_in_forward": grad_in_forward}
    _, grad = grad_of(lambda x: lmf_loss(x, case.target, **options).sum(), case.logits)
    _, expected = grad_of(lambda x: lmf_loss(x, case.target, reduction="sum"), case.logits)
    torch.testing.assert_close(grad, expected)


def test_loss_as_part_of_a_larger_expression(device):
    """TransformerEngine #2139: an upstream gradient other than 1 is never tried."""
    case = make_case((9, 7), torch.float64).to(device)
    _, grad = grad_of(lambda x: lmf_loss(x, case.target).exp() * 3 + 1, case.logits)
    _, expected = grad_of(lambda x: reference.lmf_loss(x, case.target).exp() * 3 + 1, case.logits)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("kind", ["row stride", "transposed"])
def test_row_stride_other_than_the_number_of_classes(device, kind):
    """TransformerEngine #2734: a class stride of 1 is taken to mean contiguous rows."""
    wide = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).to(device)
    logits = wide[:, 3:10] if kind == "row stride" else wide[:, :9].t()[:7].t()
    target = torch.arange(9, device=device) % logits.shape[1]
    torch.testing.assert_close(lmf_loss(logits, target), lmf_loss(logits.contiguous(), target), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_target_slice_that_is_not_aligned(device, dtype):
    """flash-attention: y[1:] of a language model is not 16-byte aligned."""
    logits = torch.randn(32, 7, generator=torch.Generator().manual_seed(0)).to(device)
    sequence = (torch.arange(33, device=device) % 7).to(dtype)
    shifted = lmf_loss(logits, sequence[1:])
    torch.testing.assert_close(shifted, lmf_loss(logits, sequence[1:].clone()), rtol=0, atol=0)


@pytest.fixture
def fresh_memory_is_nan():
    """PyTorch's own way to find reads of memory that nothing wrote."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pairwise(reduction=["none", "sum", "mean"], grad_in_forward=[True, False])
def test_loss_of_ignored_samples_never_stored(device, reduction, grad_in_forward):
    """Liger #1338: an early return leaves whatever the allocator had."""
    logits = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).to(device)
    target = torch.full((300,), -100, device=device)
    target[7] = 3
    options = {"reduction": reduction, "grad_in_forward": grad_in_forward}
    loss, grad = grad_of(lambda x: lmf_loss(x, target, **options).sum(), logits)
    assert loss.isfinite()
    assert grad.isfinite().all()


@pairwise(grad_in_forward=[True, False], reduction=["none", "mean"])
def test_host_synchronisation(triton_device, grad_in_forward, reduction, monkeypatch):
    """Liger #1292, fla #1220: .item() and torch.equal stop the host, and CUDA graphs cannot capture them."""
    case = make_case((33, 7), torch.float32, reduction=reduction).to(triton_device)
    module = LMFLoss(torch.arange(1, 8)).to(triton_device)
    module.reduction = reduction
    options = {"reduction": reduction, "grad_in_forward": grad_in_forward}

    def refuse(*args, **kwargs):
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(torch, "equal", refuse)
    logits = case.logits.requires_grad_()
    lmf_loss(logits, case.target, module.margins, **options).backward(case.upstream)
    module(logits, case.target)


def test_the_mean_depends_on_the_order_of_atomics(device):
    """pytorch #17350, #71367: a dense mean differs from run to run."""
    case = make_case((4, 7, 9, 11), torch.float32).to(device)
    first = lmf_loss(case.logits, case.target)
    assert all(torch.equal(first, lmf_loss(case.logits, case.target)) for _ in range(5))


def test_target_out_of_range_reads_out_of_bounds(triton_device):
    """mmcv, QuACK, Unsloth, TransformerEngine: unchecked; here NaN for that sample."""
    logits = torch.zeros(3, 4, device=triton_device)
    target = torch.tensor([0, 10**12, 3], device=triton_device)
    assert lmf_loss(logits, target, reduction="none").isnan().tolist() == [False, True, False]


def test_weight_left_behind_by_to():
    """kornia, Liger: a weight that is no buffer stays on the CPU."""
    module = LMFLoss([3, 2, 1], weight=torch.ones(3)).to("meta")
    assert module.weight.device.type == module.margins.device.type == "meta"


def test_masked_mean_divides_by_every_pixel(device):
    """kornia: ignored pixels count in the denominator."""
    case = make_case((2, 5, 6, 7), torch.float32).to(device)
    case.target[0] = -100
    expected = lmf_loss(case.logits[1:], case.target[1:])
    torch.testing.assert_close(lmf_loss(case.logits, case.target), expected)


@pytest.mark.parametrize("shape", [(3, 5), (7, 33), (129, 9), (2, 3, 5, 7)], ids=str)
def test_shapes_that_divide_no_block(device, shape):
    """attorch: test shapes that all divide the block hide writes beyond the end; so the neighbours are watched."""
    n = torch.Size(shape).numel()
    buffer = torch.full((n + 2000,), 5.0, device=device)
    logits = buffer[1000 : 1000 + n].view(shape).normal_(generator=torch.Generator(device).manual_seed(0))
    before = buffer.clone()
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long, device=device)
    loss, _ = grad_of(lambda x: lmf_loss(x, target, alpha=0.0, gamma=0.0), logits)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    assert torch.equal(buffer, before)


def test_dense_logits_pay_for_a_permute(triton_device, monkeypatch):
    """No Triton peer reads (B, C, H, W) as it is; here no copy of the logits is made in any layout."""
    case = make_case((2, 7, 5, 3), torch.float32).to(triton_device)

    def refuse(*args, **kwargs):
        raise AssertionError("the logits were copied")

    for name in ("contiguous", "clone", "to", "float", "permute", "reshape"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for logits in (case.logits, case.logits.movedim(1, 3)):
        target = case.target if logits is case.logits else torch.zeros_like(logits[:, 0], dtype=torch.long)
        leaf = logits.detach().requires_grad_()
        lmf_loss(leaf, target).backward()


def test_this_file_runs_through_both_paths(device):
    """A test that runs the wrong path never fails."""
    backend = devices.backend_of(torch.zeros(1, device=device))
    assert backend in (plain, devices.fused)
    if device.type == "cuda":
        assert backend is devices.fused
