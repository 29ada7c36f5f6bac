"""Promise: what other code defines is reproduced: PyTorch's cross_entropy, LDAM's and LMF's authors' own formulas.

The formulas stand here a second time on purpose, as their sources write them, sharing nothing with ``reference``.
"""

import pytest
import torch
import torch.nn.functional as F
from oracle import pairwise

from lmf_triton import LDAMLoss, LMFLoss, ldam_margins, lmf_loss

SHAPES = [(5,), (3, 5), (3, 5, 7), (3, 5, 2, 4), (2, 5, 2, 1, 3)]
COUNTS = [6705, 1113, 1099, 514, 327, 142, 115]  # HAM10000


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(ours, theirs, logits, device):
    """Losses and gradients of two functions of the logits."""
    results = []
    for function, x in ((ours, logits.to(device)), (theirs, logits.clone())):
        x.requires_grad_()
        loss = function(x)
        (grad,) = torch.autograd.grad(loss, x, torch.linspace(1, 2, loss.numel()).to(loss).view(loss.shape))
        results.append((loss.detach().cpu(), grad.cpu()))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13, equal_nan=True)


@pairwise(
    shape=SHAPES,
    reduction=["none", "sum", "mean"],
    ignore_index=[-100, -1, 1],
    weighted=[False, True],
    term={"focal": {"alpha": 0.0, "gamma": 0.0}, "ldam": {"beta": 0.0}},
)
def test_cross_entropy_with_class_indices(device, shape, reduction, ignore_index, weighted, term):
    """Both terms are cross-entropy without focus and margin: each weight, each kind of ignore_index."""
    logits = random(*shape)
    sample_shape = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    weight = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if weighted else None
    on_device = weight.to(device) if weighted else None
    target = torch.randint(5, sample_shape, generator=torch.Generator().manual_seed(2))
    if ignore_index < 0 and target.numel() > 1:
        target.view(-1)[0] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction}
    compare(
        lambda x: lmf_loss(x, target.to(device), weight=on_device, **term, **options),
        lambda x: F.cross_entropy(x, target, weight=weight, **options),
        logits,
        device,
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_ldam_as_its_authors_publish_it(device, weighted):
    """kaidic/LDAM-DRW: s = 30, the margin taken off the target's logit, cross_entropy with the class weights."""
    target = torch.arange(21) % 7
    weight = torch.linspace(0.5, 2, 7) if weighted else None
    criterion = LDAMLoss(COUNTS, max_margin=0.5, scale=30, weight=weight).to(device)

    raw = 1.0 / torch.tensor(COUNTS, dtype=torch.float64).sqrt().sqrt()
    margin_of_class = (raw * (0.5 / raw.max())).float().double()

    def theirs(x):
        chosen = torch.zeros_like(x, dtype=torch.bool).scatter(1, target.view(-1, 1), True)
        lowered = x - (chosen.double() @ margin_of_class).view(-1, 1)
        output = torch.where(chosen, lowered, x)
        return F.cross_entropy(30 * output, target, weight=None if weight is None else weight.double())

    compare(lambda x: criterion(x, target.to(device)), theirs, random(21, 7), device)


@pytest.mark.parametrize("ignored", [False, True])
def test_lmf_as_its_authors_compute_it(device, ignored):
    """Adnan-Sadi/LMFLOSS: margins as margins and as weights, LDAM divided by the sum of weights, focal by the count."""
    target = torch.arange(21) % 7
    if ignored:
        target[::4] = -100
    criterion = LMFLoss(COUNTS, alpha=1.5, scale=30, weight=ldam_margins(COUNTS), reduction="mean_per_term").to(device)
    m = ldam_margins(COUNTS).double()

    def theirs(x):
        x, y = x[target != -100], target[target != -100]
        scaled = 30 * (x - F.one_hot(y, 7) * m[y].view(-1, 1))
        ldam = F.nll_loss(scaled.log_softmax(1), y, weight=m, reduction="sum") / m[y].sum()
        p = x.softmax(1)[torch.arange(len(y)), y]
        focal = ((1 - p) ** 1.5 * m[y] * -p.log()).mean()
        return 1.5 * ldam + 1.0 * focal

    compare(lambda x: criterion(x, target.to(device)), theirs, random(21, 7), device)
