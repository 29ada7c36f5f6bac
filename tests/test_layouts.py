"""Promise: any strides and any integer target, read as they are; the gradient lies in memory as the logits do."""

import pytest
import torch
from oracle import IGNORED, Case, assert_accurate, class_weights, evaluate, make_case, pairwise

from lmf_triton import lmf_loss

# Each takes contiguous logits and returns the same values in another layout.
LAYOUTS_2D = {
    "contiguous": lambda x: x,
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 5))[:, : x.shape[1]],
    "shifted rows": lambda x: torch.nn.functional.pad(x, (3, 2))[:, 3:-2],  # not even aligned to 8 bytes
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every third class": lambda x: x.repeat_interleave(3, 1)[:, ::3],
    "transposed": lambda x: x.t().contiguous().t(),
    "one sample for all": lambda x: x[:1].expand_as(x),
    "one class for all": lambda x: x[:, :1].expand_as(x),
}
LAYOUTS_ND = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "swapped space": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],  # space does not collapse
    "cropped batch": lambda x: torch.cat([x, x, x])[1 : 1 + len(x)],
    "one image for all": lambda x: x[:1].expand_as(x),
}
MODES = [True, False]


def check(case: Case, layout, device, grad_in_forward: bool) -> None:
    logits = layout(case.logits.to(device))
    case = Case(logits, case.target, case.margins, case.upstream, case.options).to(device)
    assert case.logits.stride() == logits.stride()
    before = case.logits.clone()
    leaf = case.logits.detach().requires_grad_()
    loss = lmf_loss(leaf, case.target, case.margins, grad_in_forward=grad_in_forward, **case.options)
    (grad,) = torch.autograd.grad(loss, leaf, case.upstream)
    assert_accurate(case, loss.detach().cpu(), grad.cpu(), roundings=2)
    assert grad.stride() == torch.empty_like(logits).stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride(), strict=True))
    if span == logits.numel():  # dense
        assert grad.stride() == logits.stride()
    assert torch.equal(case.logits, before)


# Nothing divides; aligned, and more rows than one program takes.
@pairwise(layout=LAYOUTS_2D, shape=[(33, 7), (17, 256)], grad_in_forward=MODES, reduction=["none", "mean"])
def test_matrix(device, layout, grad_in_forward, reduction, shape):
    check(make_case(shape, torch.float32, reduction=reduction), layout, device, grad_in_forward)


# Images and volumes, in which neighbouring axes are of different sizes and cannot be taken for each other.
@pytest.mark.slow
@pairwise(layout=LAYOUTS_ND, shape=[(2, 5, 3, 4), (2, 3, 2, 3, 4)], grad_in_forward=MODES, reduction=["none", "mean"])
def test_dense(device, layout, grad_in_forward, reduction, shape):
    weight = class_weights(shape[1])
    check(make_case(shape, torch.float32, reduction=reduction, weight=weight), layout, device, grad_in_forward)


@pairwise(reduction=["mean_per_term", "none"], grad_in_forward=MODES)
def test_targets_that_are_columns_of_a_wider_map(device, reduction, grad_in_forward):
    """Their neighbours are two elements apart, and so the samples are several groups."""
    case = make_case((2, 5, 3, 4), torch.float32, weight=class_weights(5), reduction=reduction)
    wide = torch.full((2, 3, 9), 99)  # no class: what lies between counts for nothing
    target = wide[..., :8:2].copy_(case.target)
    case = Case(case.logits, target, case.margins, case.upstream, case.options).to(device)
    assert case.target.stride() == (27, 9, 2)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert_accurate(case, loss, grad, roundings=2)


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_several_groups_of_rows_that_are_aligned(device, grad_in_forward):
    """A crop of channels_last images: rows of 16 classes lie 16 elements apart, images further than their rows."""
    case = make_case((3, 16, 4, 5), torch.float32)
    taller = torch.zeros(3, 16, 6, 5).to(memory_format=torch.channels_last)
    logits = taller[:, :, :4].copy_(case.logits)
    case = Case(logits, case.target, case.margins, case.upstream, case.options).to(device)
    assert case.logits.stride() == (480, 1, 80, 16)
    assert_accurate(case, *evaluate(case, grad_in_forward=grad_in_forward), roundings=2)


@pytest.mark.slow
@pytest.mark.parametrize("n_classes", [1025, 33000])  # beyond one strided tile; beyond one tile of any kind
@pytest.mark.parametrize("grad_in_forward", MODES)
def test_many_classes_that_are_not_contiguous(device, n_classes, grad_in_forward):
    check(make_case((3, n_classes), torch.float32), LAYOUTS_2D["transposed"], device, grad_in_forward)


@pytest.mark.slow
def test_a_million_classes(device):
    case = make_case((1, 1_000_003), torch.float32).to(device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)


@pytest.mark.parametrize("kind", ["strided", "expanded"])
def test_margins_and_weights_of_any_stride(device, kind):
    case = make_case((33, 7), torch.float32)
    values = torch.linspace(0.1, 0.9, 14)
    per_class = values[::2] if kind == "strided" else values[5:6].expand(7)
    case = Case(case.logits, case.target, per_class, case.upstream, {"weight": per_class}).to(device)
    assert not case.margins.is_contiguous()
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)


@pytest.mark.parametrize("grad_in_forward", MODES)
def test_one_sample_without_a_batch_axis(device, grad_in_forward):
    case = make_case((14,), torch.float32)
    case = Case(case.logits[::2], torch.tensor(5), case.margins[::2], case.upstream, {}).to(device)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert loss.shape == ()
    assert_accurate(case, loss, grad, roundings=2)


INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]


@pairwise(dtype=INTEGERS, kind=["contiguous", "misaligned slice", "strided", "expanded"], grad_in_forward=MODES)
def test_integer_targets(device, dtype, kind, grad_in_forward):
    ignore_index = IGNORED if dtype.is_signed else 255
    case = make_case((34, 7), torch.float32, ignore_index=ignore_index)
    target = case.target.to(dtype)
    lay_out = {
        "contiguous": lambda y: y,
        "misaligned slice": lambda y: torch.cat([y[:1], y])[1:],
        "strided": lambda y: torch.stack([y, y], 1)[:, 0],
        "expanded": lambda y: y[:1].expand_as(y),
    }[kind]
    target = lay_out(target)
    case = Case(case.logits, target, case.margins, case.upstream, case.options).to(device)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert_accurate(case, loss, grad, roundings=2)


def test_target_and_logits_are_not_copied(triton_device, monkeypatch):
    """The kernels get the tensors themselves: no contiguous(), no cast."""
    case = make_case((4, 7, 5, 3), torch.float16).to(triton_device)
    logits = LAYOUTS_ND["channels last"](case.logits).requires_grad_()
    target = torch.stack([case.target, case.target], -1)[..., 0].to(torch.int16)
    from lmf_triton.fused import backend

    seen = []
    original = backend._from
    monkeypatch.setattr(backend, "_from", lambda tensor, offset: seen.append(tensor) or original(tensor, offset))
    lmf_loss(logits, target).backward()
    for tensor in (logits, target):
        assert any(t is not None and t.data_ptr() == tensor.data_ptr() and t.dtype == tensor.dtype for t in seen)
    # Beyond them and the gradient there are a few floats a sample.
    own = {logits.data_ptr(), target.data_ptr()}
    others = [t.numel() for t in seen if t is not None and t.data_ptr() not in own and t.shape != logits.shape]
    assert max(others) <= 4 * target.numel()


@pytest.mark.parametrize(
    ("n", "n_classes", "stride"),
    [(2, 7, 2**31 + 5), (2, 16, 2**31 + 16), (3, 7, 2**30 + 5), (2100, 7, 2**20 + 5)],
    ids=["stride", "stride that is a multiple of 16", "stride x index", "class loop"],
)
@pytest.mark.parametrize("grad_in_forward", MODES)
def test_offsets_beyond_2_to_the_31(triton_device, n, n_classes, stride, grad_in_forward):
    """Rows or classes more than 2**31 elements apart in a buffer that is reserved but, between them, never touched."""
    if triton_device.type == "cuda" and torch.cuda.get_device_properties(triton_device).total_memory < 12 * 2**30:
        pytest.skip("needs 5 GB of GPU memory")
    buffer = torch.empty((n - 1) * stride + n_classes, dtype=torch.float16, device=triton_device)
    for shape, strides in ((n, n_classes), (stride, 1)), ((3, n), (1, stride)):  # far rows; far classes
        if shape[0] > 3:
            continue  # thousands of rows add nothing to a few
        case = make_case(shape, torch.float16).to(triton_device)
        logits = buffer.as_strided(shape, strides).copy_(case.logits)
        far = Case(logits, case.target, case.margins, case.upstream, case.options)
        loss, grad = evaluate(far, grad_in_forward=grad_in_forward)
        assert_accurate(far, loss, grad, roundings=2)
