"""Promise: margins and class-balanced weights are the published ones, in float32."""

from collections import Counter
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch

from lmf_triton import DeferredReweighting, LMFLoss, class_balanced_weights, ldam_margins

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


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor, lambda c: torch.tensor(c).float()])
@pytest.mark.parametrize("function", [ldam_margins, class_balanced_weights])
def test_any_kind_of_counts(function, convert):
    assert torch.equal(function(convert(HAM10000)), function(HAM10000))


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


def test_no_gradient_and_the_device_of_the_counts():
    counts = torch.tensor([3.0, 2.0], requires_grad=True)
    assert not ldam_margins(counts).requires_grad
    assert ldam_margins(counts).device == counts.device


ORDERED = [4, 90, 1, 15]  # the order of frequency is another: 1, 3, 0, 2
LABELS = [label for label, count in enumerate(ORDERED) for _ in range(count)]
WITH_KEYS = {
    "dict": {3: 15, 0: 4, 2: 1, 1: 90},
    "Counter": Counter(LABELS[::-1]),  # in order of first sight
    "most common first": dict(Counter(LABELS).most_common()),
    "read-only": MappingProxyType({3: 15, 0: 4, 2: 1, 1: 90}),
    "NumPy's keys": {np.int64(label): np.int64(ORDERED[label]) for label in (3, 0, 2, 1)},
    "tensors": {label: torch.tensor(ORDERED[label]) for label in (3, 0, 2, 1)},
    "value_counts()": pd.Series(LABELS).value_counts(),
    "value_counts(normalize=True)": pd.Series(LABELS).value_counts(normalize=True),
    "of floats": pd.Series(LABELS, dtype=float).value_counts(),
    "of categories": pd.Series(LABELS, dtype="category").value_counts(),
    "groupby().size()": pd.DataFrame({"label": LABELS[::-1]}).groupby("label", sort=False).size(),
}


@pytest.mark.parametrize("counts", WITH_KEYS.values(), ids=WITH_KEYS)
@pytest.mark.parametrize("function", [ldam_margins, class_balanced_weights, lambda c: LMFLoss(c).margins])
def test_keys_decide_which_class_a_count_belongs_to(counts, function):
    """Their own order would put every margin on another class."""
    total = sum(ORDERED) if max(counts.values if isinstance(counts, pd.Series) else [2]) < 1 else 1
    expected = function([count / total for count in ORDERED])
    torch.testing.assert_close(function(counts), expected, rtol=1e-6, atol=0)


def test_a_schedule_reads_keys_too():
    criterion = LMFLoss(ORDERED)
    DeferredReweighting(criterion, pd.Series(LABELS).value_counts(), start_epoch=0).step(0)
    assert torch.equal(criterion.weight, class_balanced_weights(ORDERED))


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"nv": 90, "mel": 4}, "'nv', 'mel'"),  # whose class is 0?
        ({1: 90, 2: 4}, "1, 2"),  # counted from 1
        ({0: 90, 2: 4}, "0, 2"),  # nobody was of class 1
        ({-1: 3, 0: 90}, "-1, 0"),  # ignored samples were counted
        ({0: 90, 255: 4}, "0, 255"),
        ({"0": 90, "1": 4}, "'0', '1'"),
        ({0.5: 90, 1: 4}, "0.5, 1"),
        (pd.Series([90, 4], index=["nv", "mel"]), "'nv', 'mel'"),
        (pd.Series([90, 4], index=[0, 0]), "0, 0"),  # two folds joined
        (pd.DataFrame({"label": LABELS}).value_counts(), "(1,), (3,), (0,), (2,)"),
        (pd.Series(LABELS).value_counts().reset_index(), "'index'|'count'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [ldam_margins, class_balanced_weights, LMFLoss])
def test_other_keys_are_refused(function, counts, shown):
    with pytest.raises(ValueError, match="keys of class_counts must be the classes 0 to") as caught:
        function(counts)
    assert any(part in str(caught.value) for part in shown.split("|"))
    assert "[class_counts[name] for name in class_names]" in str(caught.value)


@pytest.mark.parametrize(
    "counts",
    [{1, 2}, {0: 1, 1: 2}.values(), (count for count in ORDERED), Counter(LABELS).most_common(), None, {}],
    ids=lambda counts: type(counts).__name__,
)
def test_what_has_no_order_is_refused(counts):
    with pytest.raises((TypeError, ValueError), match=r"class_counts must"):
        ldam_margins(counts)
