"""Promise: samples that are confidently right or wrong keep full relative accuracy, judged by exact values."""

import mpmath
import torch
from oracle import every_way, pairwise

from lmf_triton import lmf_loss

RIGHT = [5.0, 15.0, 20.0, 40.0, 80.0, 100.0]  # at 15, (1 - p)**gamma in float32 is 30% off; at 20 it is 0
GAPS = RIGHT + [-gap for gap in RIGHT]
GAMMAS = [0.0, 0.5, 1.0, 1.5, 2.0, 5.0]
N_OTHERS = 3
MARGIN = 0.25  # exact in binary


def exact(gap: float, gamma: float, term: str) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Loss and its gradient in the target's logit, for a target that leads each of the others by ``gap``."""
    with mpmath.workdps(120):

        def loss(x_y):
            shifted = x_y - MARGIN if term == "ldam" else x_y
            nll = mpmath.log1p(N_OTHERS * mpmath.exp(-shifted))
            return nll if term == "ldam" else (-mpmath.expm1(-nll)) ** gamma * nll

        return loss(mpmath.mpf(gap)), mpmath.diff(loss, mpmath.mpf(gap))


@every_way
@pairwise(dtype=[torch.float32, torch.float64], term=[("ldam", 0.0)] + [("focal", gamma) for gamma in GAMMAS])
def test_against_exact_values(device, dtype, term):
    name, gamma = term
    logits = torch.zeros(len(GAPS), 1 + N_OTHERS, dtype=dtype, device=device)
    logits[:, 2] = torch.tensor(GAPS)
    target = torch.full((len(GAPS),), 2, device=device)
    margins = torch.full((1 + N_OTHERS,), MARGIN, device=device)
    terms = {"ldam": {"beta": 0.0}, "focal": {"alpha": 0.0, "gamma": gamma}}
    logits.requires_grad_()
    losses = lmf_loss(logits, target, margins, reduction="none", **terms[name])
    losses.sum().backward()

    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for gap, loss, grad in zip(GAPS, losses.tolist(), logits.grad.tolist(), strict=True):
        exact_loss, exact_slope = exact(gap, gamma, name)
        # Exponents of size (1 + gamma) * gap are rounded once; below the smallest normal number nothing is relative.
        tolerance = eps * (4 + (1 + gamma) * abs(gap))
        assert loss >= 0
        assert abs(loss - exact_loss) <= tolerance * abs(exact_loss) + tiny
        assert abs(grad[2] - exact_slope) <= tolerance * abs(exact_slope) + tiny
        for other in (0, 1, 3):
            assert abs(grad[other] + exact_slope / N_OTHERS) <= tolerance * abs(exact_slope) + tiny
