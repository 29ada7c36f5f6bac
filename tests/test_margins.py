"""Promise: margins, class-balanced weights and log priors are the published ones, in float32."""

import re

import numpy as np
import pytest
import torch

from lmf_triton import class_balanced_weights, ldam_margins, lmf_loss, log_prior_adjustment

HAM10000 = [6705, 1113, 1099, 514, 327, 142, 115]


def test_margins_of_ham10000_are_those_of_the_authors_code():
    """n^(-1/4), scaled so that the largest is 0.5."""
    raw = 1 / np.sqrt(np.sqrt(HAM10000))
    margins = ldam_margins(HAM10000)
    torch.testing.assert_close(margins.double().numpy(), raw * (0.5 / raw.max()), rtol=1e-7, atol=0)
    assert margins.tolist() == pytest.approx([0.181, 0.283, 0.284, 0.344, 0.385, 0.474, 0.5], abs=5e-4)
    assert margins.dtype == torch.float32


def test_the_rarest_class_gets_the_largest_margin():
    for max_margin in (0.5, 1.0, 0.0):
        assert ldam_margins(HAM10000, max_margin=max_margin).max() == max_margin


def test_a_constant_is_taken_as_it_is():
    counts = torch.tensor([1.0, 16.0, 81.0, 10000.0])
    expected = torch.tensor([3.0, 1.5, 1.0, 0.3])
    torch.testing.assert_close(ldam_margins(counts, constant=3.0), expected, rtol=1e-7, atol=0)


def test_class_balanced_weights_are_inverse_effective_numbers():
    counts, beta = np.array(HAM10000, dtype=float), 0.999
    expected = (1 - beta) / (1 - beta**counts)
    expected *= len(counts) / expected.sum()
    weights = class_balanced_weights(HAM10000, beta=beta)
    torch.testing.assert_close(weights.double().numpy(), expected, rtol=1e-6, atol=0)
    assert weights.dtype == torch.float32
    assert weights.sum().item() == pytest.approx(len(counts), rel=1e-6)


def test_the_limits_of_class_balanced_weights():
    assert class_balanced_weights(HAM10000, beta=0).tolist() == [1.0] * 7
    inverse = 1 / torch.tensor(HAM10000, dtype=torch.float64)
    near_one = class_balanced_weights(HAM10000, beta=1 - 1e-12)
    torch.testing.assert_close(near_one.double(), inverse * 7 / inverse.sum(), rtol=1e-5, atol=0)


def test_log_priors_of_ham10000():
    prior = log_prior_adjustment(HAM10000)
    assert prior.exp().tolist() == pytest.approx([n / sum(HAM10000) for n in HAM10000], rel=1e-6)
    assert prior.dtype == torch.float32
    torch.testing.assert_close(log_prior_adjustment(HAM10000, tau=0.5), 0.5 * prior)
    assert log_prior_adjustment(HAM10000, tau=0).tolist() == [0.0] * 7
    assert log_prior_adjustment([3]).tolist() == [0.0]
    assert log_prior_adjustment({1: 30, 0: 10}).exp().tolist() == pytest.approx([0.25, 0.75])


def test_log_priors_of_huge_counts():
    assert log_prior_adjustment([1e308] * 4).exp().tolist() == pytest.approx([0.25] * 4)


def test_a_log_prior_makes_balanced_softmax():
    """Ren et al. 2020, eq. 4: each class's exponential times its count."""
    logits = torch.randn(33, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.arange(33) % 7
    counts = torch.tensor(HAM10000, dtype=torch.float64)
    weighed = counts * logits.exp()
    expected = -(weighed / weighed.sum(1, keepdim=True)).gather(1, target[:, None]).log().mean()
    loss = lmf_loss(logits, target, alpha=0, gamma=0, logit_adjustment=log_prior_adjustment(HAM10000))
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # the priors are float32


@pytest.mark.parametrize(
    ("tau", "error"),
    [
        (-0.5, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (1e39, ValueError),
        ("1", TypeError),
    ],
)
def test_wrong_tau(tau, error):
    with pytest.raises(error, match=r"tau must .*" + re.escape(str(tau))):
        log_prior_adjustment(HAM10000, tau=tau)


def test_no_gradient_and_the_device_of_the_counts():
    counts = torch.tensor([3.0, 2.0], requires_grad=True)
    assert not ldam_margins(counts).requires_grad
    assert ldam_margins(counts).device == counts.device
