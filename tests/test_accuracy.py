"""Promise: loss and gradient are as accurate as the float64 oracle allows, for every size, dtype and option."""

import pytest
import torch
from oracle import DTYPES, REDUCTIONS, assert_accurate, class_weights, evaluate, every_way, make_case, pairwise

from lmf_triton import lmf_loss
from lmf_triton.fused import launch

SHAPES = [
    (7,),  # one sample without a batch axis
    (3, 1),  # one class: no others
    (33, 2),  # rows fill no block; the smallest softmax
    (300, 7),  # HAM10000's classes: nothing is aligned, more than one program
    (21, 19),  # Cityscapes
    (9, 150),  # ADE20K: beyond one power of two
    (9, 151),  # and an odd row length
    (5, 256),  # exactly one tile
    (5, 1000),  # ImageNet: one row a program
    (5, 1001),  # and an odd row length
    (2, 19, 5, 3),  # dense, class axis strided
    (10, 3, 7),  # 1-d dense: more groups than rows in one
]


# Terms of the loss with their scale, as alpha, beta, gamma, scale: together they say which exponentials there are.
TERMS = [
    (*term, scale)
    for term in [(1.0, 1.0, 1.5), (1.5, 0.5, 2.0), (0.0, 1.0, 0.0), (0.0, 2.0, 0.5), (1.0, 0.0, 1.5), (1.0, 1.0, 5.0)]
    for scale in (1.0, 30.0)
]


@pytest.mark.slow
@every_way
@pairwise(shape=SHAPES, dtype=DTYPES, reduction=["none", "mean"])
def test_sizes_and_dtypes(device, shape, dtype, reduction):
    case = make_case(shape, dtype, reduction=reduction).to(device)
    loss, grad = evaluate(case)
    # A mean's gradient is stored once and scaled once; for float16 and "none" the scale comes first.
    assert_accurate(case, loss, grad, roundings=1 if reduction == "none" or dtype == torch.float16 else 2)


@every_way
@pairwise(terms=TERMS, reduction=REDUCTIONS, weighted=[False, True], grad_in_forward=[True, False])
def test_options(device, terms, reduction, weighted, grad_in_forward):
    weight = class_weights(19) if weighted else None
    alpha, beta, gamma, scale = terms
    options = {"alpha": alpha, "beta": beta, "gamma": gamma, "scale": scale, "reduction": reduction}
    case = make_case((21, 19), torch.float32, weight=weight, **options).to(device)
    loss, grad = evaluate(case, grad_in_forward=grad_in_forward)
    assert_accurate(case, loss, grad, roundings=2 if grad_in_forward else 1)


@pairwise(ignore_index=[-100, -1, 0, 5, 255], reduction=REDUCTIONS, with_margins=[False, True])
def test_margins_and_ignore_index(device, with_margins, ignore_index, reduction):
    case = make_case(
        (40, 7), torch.float32, with_margins=with_margins, ignore_index=ignore_index, reduction=reduction
    ).to(device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)
    ignored = (case.target == ignore_index).cpu()
    assert ignored.any()
    assert (grad[ignored] == 0).all()


# The longest row in one tile, and a loop of unequal blocks; test_long_rows.py has the same with smaller tiles.
@pytest.mark.slow
@pairwise(n_classes=[32768, 40000], dtype=[torch.bfloat16, torch.float32], scale=[1.0, 30.0])
def test_long_rows(device, n_classes, dtype, scale):
    case = make_case((3, n_classes), dtype, scale=scale).to(device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)


# Launches are cached by number of samples; 5001 are tried only here, so that no other test meets these two programs.
@pytest.mark.slow
@pytest.mark.parametrize(("n_samples", "max_programs"), [(5000, 128), (5001, 2)])
def test_many_samples_share_their_denominators(device, n_samples, max_programs, monkeypatch):
    """More samples than one step of the pass over the targets: its programs' parts, and their steps, add up."""
    monkeypatch.setattr(launch, "MAX_TOTALS_PROGRAMS", max_programs)
    case = make_case((n_samples, 3), torch.float32, weight=class_weights(3), reduction="mean_per_term").to(device)
    loss, grad = evaluate(case)
    assert_accurate(case, loss, grad, roundings=2)


def test_forward_alone_equals_forward_with_gradient(device):
    """Without a gradient nothing is written but the loss, and it is the same to the last bit."""
    case = make_case((21, 19), torch.float32).to(device)
    loss, _ = evaluate(case)
    assert not case.logits.requires_grad
    without = lmf_loss(case.logits, case.target, case.margins)
    assert not without.requires_grad
    assert without.cpu().equal(loss)
