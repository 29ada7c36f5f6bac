"""LDAM and focal loss of samples in plain PyTorch, from the one number that each needs of its logits.

That is the gap ``u = logsumexp(others) - x_y`` between the other classes and the target, or the odds against the
target, ``e^u``, which need no logarithm but have bounds. Each function returns the losses and their slopes, the
derivatives in ``u``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Odds from this to its reciprocal are computed from exponentials, of which none that matters is then near float32's
# smallest. Margins of this size at most leave them finite.
MIN_ODDS = 1e-30
MAX_MARGIN = 16

LOG2_E = math.log2(math.e)  # PyTorch takes exp2 in a third of exp's time, or less

BIG = 1e30  # stands for infinity where inf would meet a factor 0, as in fused/math.py


def ldam_by_odds(p: Tensor, q: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """LDAM of samples, margins included: ``p`` of the target and ``q`` of the others together, up to a factor."""
    slope = (p + q).reciprocal_().mul_(q) if with_slope else None
    return (q / p).log1p_(), slope


def focal_by_odds(p: Tensor, q: Tensor, gamma: float, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Focal loss of samples: ``p`` of the target and ``q`` of the others together, up to a factor."""
    odds = q / p
    nll = odds.log1p()
    factor = odds.reciprocal_().log1p_().mul_(-gamma * LOG2_E).exp2_()  # (1 - p)^gamma; a power of q is less exact
    slope = None
    if with_slope:
        slope = torch.addcmul(q, p, nll, value=gamma).mul_(factor).div_(p + q)  # a softmax of many is not quite 1
    return nll.mul_(factor), slope


def ldam_by_gap(v: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """LDAM of samples with gap v, margins and scale included."""
    return softplus(v), v.sigmoid() if with_slope else None


def focal_by_gap(u: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of samples with gap u, which is overwritten."""
    u = u.clamp_min_(-BIG)  # gamma = 0 at u = -inf: exp(-0 * inf) would be NaN
    nll, q = softplus(u), u.sigmoid()  # -log p_y, 1 - p_y
    u.neg_()
    factor = softplus(u).mul_(-gamma).exp_()  # (1 - p_y)^gamma
    p_nll = u.sigmoid_().mul_(nll.clamp_max(BIG))  # tends to 0 as u grows: 0 * inf would be NaN
    return nll.mul_(factor), p_nll.mul_(gamma).add_(q).mul_(factor)


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z). Beyond 40 it is z to the last bit of float64, and e^z is not taken where it would overflow."""
    return F.softplus(z, threshold=40)
