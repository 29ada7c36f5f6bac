"""Promise: a number of NumPy's is as good as one of Python's, and becomes one; what is no number is refused."""

import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import PATHS, make_case, pairwise

from lmf_triton import (
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LMFLoss,
    class_balanced_weights,
    ldam_margins,
    lmf_loss,
)

COUNTS = [50, 20, 3]
FLOATS = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "longdouble": np.longdouble,
    "array": np.array,
    "big-endian": lambda x: np.array(x, dtype=">f4"),
    "read-only": lambda x: np.broadcast_to(np.float32(x), ()),
    "fraction": Fraction,
}
INTEGERS = {
    "int8": np.int8,
    "uint8": np.uint8,
    "int64": np.int64,
    "array": np.array,
    "uint16 array": lambda n: np.array(n, dtype=np.uint16),
}
# All of them exact in float16, and none the default.
SETTINGS = {"alpha": 0.5, "beta": 0.75, "gamma": 2.5, "scale": 4.0}


@pytest.mark.filterwarnings("error:overflow")
@pairwise(path=PATHS, convert=FLOATS, name=list(SETTINGS))
def test_settings_of_the_function(device, name, convert):
    case = make_case((33, 7), torch.float32).to(device)
    arguments = (case.logits, case.target, case.margins)
    value = SETTINGS[name]
    assert torch.equal(lmf_loss(*arguments, **{name: convert(value)}), lmf_loss(*arguments, **{name: value}))


@pairwise(path=PATHS, convert=INTEGERS)
def test_ignore_index(device, convert):
    case = make_case((33, 7), torch.float32, ignore_index=3).to(device)
    expected = lmf_loss(case.logits, case.target, ignore_index=3)
    assert torch.equal(lmf_loss(case.logits, case.target, ignore_index=convert(3)), expected)


@pytest.mark.parametrize("convert", FLOATS.values(), ids=FLOATS)
def test_margins_weights_and_schedules(convert):
    assert torch.equal(ldam_margins(COUNTS, max_margin=convert(0.25)), ldam_margins(COUNTS, max_margin=0.25))
    assert torch.equal(ldam_margins(COUNTS, constant=convert(0.25)), ldam_margins(COUNTS, constant=0.25))
    expected = class_balanced_weights(COUNTS, beta=0.75)
    assert torch.equal(class_balanced_weights(COUNTS, beta=convert(0.75)), expected)
    criterion = FocalLoss()
    DeferredReweighting(criterion, COUNTS, start_epoch=0, beta=convert(0.75)).step(0)
    assert torch.equal(criterion.weight, expected)


@pytest.mark.parametrize("convert", [*list(FLOATS.values())[:3], np.array], ids=[*list(FLOATS)[:3], "array"])
@pytest.mark.parametrize("when", ["built", "assigned"])
def test_a_module_keeps_pythons(convert, when):
    """In its repr, in a pickle, and in what a schedule or a log reads of it."""
    for make, names in (
        (lambda **s: LMFLoss(COUNTS, **s), SETTINGS),
        (lambda **s: LDAMLoss(COUNTS, **s), ["scale"]),
        (FocalLoss, ["gamma"]),
    ):
        expected = make(ignore_index=3, **{name: SETTINGS[name] for name in names})
        given = {name: convert(SETTINGS[name]) for name in names} | {"ignore_index": np.int16(3)}
        criterion = make(**(given if when == "built" else {}))
        for name, value in given.items():
            setattr(criterion, name, value)
        assert repr(criterion) == repr(expected)
        assert {type(getattr(criterion, name)) for name in given} <= {float, int}
        assert b"numpy" not in pickle.dumps(criterion)
    assert type(LMFLoss(COUNTS, max_margin=convert(0.5)).max_margin) is float


NOT_REAL = [
    "1",
    None,
    1j,
    np.complex64(1),
    [1.0],
    np.ones(1),
    np.ma.masked,
    torch.tensor(1.0),
    Decimal(1),
    np.str_("1"),
]
CALLS = {name: lambda x, name=name: lmf_loss(torch.ones(2, 3), torch.tensor([0, 2]), **{name: x}) for name in SETTINGS}
CALLS["max_margin"] = lambda x: ldam_margins(COUNTS, max_margin=x)
CALLS["beta"] = lambda x: class_balanced_weights(COUNTS, beta=x)


@pytest.mark.parametrize("value", NOT_REAL, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_real_number_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be a real number, got .* of type {type(value).__name__}"):
        CALLS[name](value)


@pytest.mark.filterwarnings("error:overflow")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "value", [-1, np.float16(-1), np.float16("inf"), np.float64("nan"), 10**400, -(10**400)], ids=str
)
def test_a_number_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got"):
        CALLS[name](value)


STARTS = {
    name: lambda n, name=name: DeferredReweighting(FocalLoss(), COUNTS, **{name: n})
    for name in ("start_epoch", "start_step")
}
STARTS["the epoch or step"] = lambda n: DeferredReweighting(FocalLoss(), COUNTS, start_epoch=1).step(n)
STARTS["ignore_index"] = lambda n: lmf_loss(torch.ones(2, 3), torch.tensor([0, 2]), ignore_index=n)


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize(
    "value", ["1", 1.0, np.float32(1), np.array(1.0), np.ones(1, int), torch.tensor(1), True, np.True_], ids=repr
)
def test_what_is_no_integer_is_refused(name, value):
    """True is none, as for ``F.cross_entropy``."""
    with pytest.raises(TypeError, match=rf"{name} must be an integer, got .* of type {type(value).__name__}"):
        STARTS[name](value)
    STARTS[name](np.uint8(1))


def test_true_is_1_where_a_real_number_is_wanted():
    """As in ``F.cross_entropy(label_smoothing=True)``."""
    case = make_case((5, 7), torch.float32)
    for true in (True, np.True_):
        assert torch.equal(lmf_loss(case.logits, case.target, gamma=true), lmf_loss(case.logits, case.target, gamma=1))
