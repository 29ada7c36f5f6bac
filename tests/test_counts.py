"""Promise: class counts are read in whatever form people have them, or refused with what is wrong with them."""

import array
from collections import Counter, OrderedDict, UserList, deque
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch
from torch._subclasses import FakeTensorMode

from lmf_triton import (
    DeferredReweighting,
    LMFLoss,
    class_balanced_weights,
    count_classes,
    ldam_margins,
    log_prior_adjustment,
)

FUNCTIONS = [ldam_margins, class_balanced_weights, log_prior_adjustment, lambda counts: LMFLoss(counts).margins]
COUNTS = [120, 113, 7, 2]  # as small as int8 holds them
SEQUENCES = {
    "list": list,
    "tuple": tuple,
    "range": lambda c: range(4, 0, -1),
    "deque": deque,
    "UserList": UserList,
    "array.array": lambda c: array.array("b", c),
    "memoryview": lambda c: memoryview(np.array(c)),
    "decimals": lambda c: [Decimal(n) for n in c],
    "fractions": lambda c: [Fraction(2 * n, 2) for n in c],
    "list of NumPy's": lambda c: [np.uint8(n) for n in c],
    "list of tensors": lambda c: [torch.tensor(n) for n in c],
    "torch.Size": torch.Size,
    "array": np.array,
    "reversed": lambda c: np.array(c[::-1])[::-1],
    "every other": lambda c: np.repeat(c, 2)[::2],
    "broadcast": lambda c: np.broadcast_to(c[0], 4),
    "big-endian": lambda c: np.array(c, dtype=">i4"),
    "other byte order": lambda c: np.array(c, dtype=np.dtype("f8").newbyteorder()),
    "read-only": lambda c: np.frombuffer(bytes(c), dtype=np.uint8),
    "objects": lambda c: np.array(c, dtype=object),
    "float16": lambda c: np.array(c, dtype=np.float16),
    "longdouble": lambda c: np.array(c, dtype=np.longdouble),
    "uint64": lambda c: np.array(c, dtype=np.uint64),
    "nothing masked": lambda c: np.ma.array(c, mask=False),
    "np.bincount": lambda c: np.bincount(np.repeat(range(4), c)),
    "pandas Index": pd.Index,
    "pandas array": lambda c: pd.array(c, dtype="Int64"),
    "pandas column": lambda c: pd.DataFrame({"count": c})["count"],
    "tensor": torch.tensor,
    "bfloat16": lambda c: torch.tensor(c).bfloat16(),
    "torch.uint16": lambda c: torch.tensor(c, dtype=torch.uint16),
    "requires_grad": lambda c: torch.tensor(c, dtype=torch.float64, requires_grad=True),
    "expanded": lambda c: torch.tensor(c[:1]).expand(4),
    "negation noted": lambda c: torch._neg_view(-torch.tensor(c)),
    "inference": torch.inference_mode()(lambda c: torch.tensor(c)),
    "torch.bincount": lambda c: torch.bincount(torch.tensor(np.repeat(range(4), c))),
}


@pytest.mark.parametrize("convert", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=["margins", "weights", "priors", "LMFLoss"])
def test_counts_in_the_order_of_the_logits(function, convert):
    counts = convert(COUNTS)
    assert torch.equal(function(counts), function([int(count) for count in list(counts)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_default_of_pytorch_has_a_say(dtype):
    """Neither its dtype, nor a device without values, nor a mode in which no new tensor has any."""
    expected = ldam_margins([65521, 3])
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(ldam_margins([65521, 3]), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert ldam_margins([65521, 3]).is_meta
    counts = torch.tensor([65521, 3])
    with FakeTensorMode():
        assert ldam_margins([65521, 3]).shape == ldam_margins(counts).shape == (2,)


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
    "nullable": pd.Series(LABELS, dtype="Int64").value_counts(),
    "DataFrame.value_counts()": pd.DataFrame({"label": LABELS}).value_counts(),
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
        (pd.DataFrame({"label": LABELS, "fold": 0}).value_counts(), "(1, 0), (3, 0), (0, 0), (2, 0)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [ldam_margins, class_balanced_weights, LMFLoss])
def test_other_keys_are_refused(function, counts, shown):
    with pytest.raises(ValueError, match="keys of class_counts must be the classes 0 to") as caught:
        function(counts)
    assert shown in str(caught.value)
    assert "[class_counts[name] for name in class_names]" in str(caught.value)


def test_the_keys_of_a_binary_problem_may_be_booleans():
    expected = ldam_margins([1, 2])
    assert torch.equal(ldam_margins(pd.Series([True, False, True]).value_counts()), expected)
    assert torch.equal(ldam_margins(Counter([True, False, True])), expected)


class NoSurprise:
    """Something that is no count, in a message."""

    def __repr__(self) -> str:
        return "NoSurprise()"


MASKED = np.ma.array([9, 8, 7], mask=[False, True, False])
WRONG_COUNTS = {
    "zero": ([10, 0, 5], ValueError, ["positive", "got 0 for class 1"]),
    "negative": ([10, -3, 5], ValueError, ["positive", "got -3 for class 1"]),
    "NaN": ([10, 5, float("nan")], ValueError, ["finite", "nan for class 2"]),
    "infinite": ([float("inf"), 5], ValueError, ["finite", "inf for class 0"]),
    "zero of NumPy": (np.bincount([0, 2]), ValueError, ["positive", "got 0 for class 1"]),
    "zero of a longdouble": (np.zeros(1, np.longdouble), ValueError, ["positive", "got 0.0 for class 0"]),
    "zero of a tensor": (torch.bincount(torch.tensor([0, 2])), ValueError, ["positive", "got 0 for class 1"]),
    "zero of a Counter": (Counter({1: 0, 0: 5}), ValueError, ["positive", "got 0 for class 1"]),
    "a category without samples": (
        pd.Series(pd.Categorical([0, 0], [0, 1])).value_counts(),
        ValueError,
        ["positive", "got 0 for class 1"],
    ),
    "negative decimal": ([Decimal(3), Decimal(-1)], ValueError, ["positive", "got -1 for class 1"]),
    "signaling NaN": ([Decimal("sNaN")], ValueError, ["finite", "sNaN for class 0"]),
    "beyond float64": ([3, 10**400], ValueError, ["finite", "for class 1"]),
    "string": (["many"], TypeError, ["numbers", "got 'many' of type str for class 0"]),
    "digits": ([5, "3"], TypeError, ["numbers", "got '3' of type str for class 1"]),
    "text": ("53", TypeError, ["numbers", "got '5' of type str for class 0"]),
    "complex": ([1j, 2], TypeError, ["numbers", "got 1j of type complex for class 0"]),
    "complex tensor": (torch.tensor([2 + 1j]), TypeError, ["numbers", "(2+1j)", "class 0"]),
    "None in a list": ([5, None], TypeError, ["numbers", "got None of type NoneType for class 1"]),
    "object": (np.array([5, NoSurprise()]), TypeError, ["numbers", "got NoSurprise()", "class 1"]),
    "strings of NumPy": (np.array(["5", "3"]), TypeError, ["numbers", "'5'", "class 0"]),
    "bool": ([5, True], TypeError, ["numbers", "got True of type bool for class 1"]),
    "mask": (np.array([False, True]), TypeError, ["numbers", "False", "of type bool", "class 0"]),
    "mask tensor": (torch.tensor([False, True]), TypeError, ["numbers", "False", "of type bool", "class 0"]),
    "masked": (MASKED, TypeError, ["numbers", "got masked", "class 1"]),
    "missing": (pd.Series([5, None], dtype="Int64"), TypeError, ["numbers", "got <NA>", "class 1"]),
    "missing in an array": (pd.array([5, None]), TypeError, ["numbers", "got <NA>", "class 1"]),
    "in a dict": ({1: "3", 0: 5}, TypeError, ["numbers", "got '3'", "class 1"]),
    "ragged": ([[1, 2], [3]], TypeError, ["numbers", "got [1, 2]", "class 0"]),
    "nothing": ([], ValueError, ["C >= 1", "(0,)"]),
    "nothing with keys": ({}, ValueError, ["C >= 1", "(0,)"]),
    "nothing in columns": (np.zeros((0, 3)), ValueError, ["C >= 1", "(0, 3)"]),
    "a number": (7, ValueError, ["(C,)", "()", "7"]),
    "a number of NumPy": (np.int64(7), ValueError, ["(C,)", "()", "7"]),
    "an array of one number": (np.array(7), ValueError, ["(C,)", "()", "7"]),
    "a tensor of one number": (torch.tensor(7), ValueError, ["(C,)", "()", "7"]),
    "row in a list": ([[1, 2, 3]], ValueError, ["(C,)", "(1, 3)", "np.ravel"]),
    "row": (np.array([[1, 2, 3]]), ValueError, ["(C,)", "(1, 3)", "np.ravel"]),
    "column": (np.array([[1], [2], [3]]), ValueError, ["(C,)", "(3, 1)", "np.ravel"]),
    "matrix": (np.asmatrix([1, 2, 3]), ValueError, ["(C,)", "(1, 3)", "np.ravel"]),
    "row tensor": (torch.ones(1, 3), ValueError, ["(C,)", "(1, 3)", "np.ravel"]),
    "list of columns": ([torch.ones(1), torch.ones(1)], ValueError, ["(C,)", "(2, 1)", "np.ravel"]),
    "counts for each fold": (np.ones((5, 3)), ValueError, ["(C,)", "(5, 3)"]),
    "most_common()": (Counter([1, 1, 0]).most_common(), ValueError, ["(2, 2)", "pairs", "dict(class_counts)"]),
    "records": (np.array([(1, 9), (0, 5)], "i4, i4"), ValueError, ["(2, 2)", "pairs", "dict(class_counts)"]),
    "np.unique": (np.unique([0, 0, 1, 2], return_counts=True), ValueError, ["np.unique", "dict(zip(labels"]),
    "torch.unique": (
        torch.unique(torch.tensor([0, 0, 1]), return_counts=True),
        ValueError,
        ["np.unique", "dict(zip(labels"],
    ),
    "table": (
        pd.Series([0, 0, 1]).value_counts().reset_index(),
        ValueError,
        ["DataFrame", "dict(zip(labels, counts))"],
    ),
    "to_frame()": (pd.Series([0, 0, 1]).value_counts().to_frame(), ValueError, ["DataFrame", "class_counts[name]"]),
    "generator": ((n for n in [3, 2]), TypeError, ["got generator", "only once", "list(class_counts)"]),
    "map": (map(int, "32"), TypeError, ["got map", "only once", "list(class_counts)"]),
    "values()": (Counter([1, 0]).values(), TypeError, ["got dict_values", "order", "give the dict itself"]),
    "items()": (OrderedDict({0: 5}).items(), TypeError, ["got odict_items", "order", "give the dict itself"]),
    "set": ({3, 2}, TypeError, ["order of the logits", "got set"]),
    "None": (None, TypeError, ["numbers", "got None"]),
    "missing label": (
        pd.Series([0, None], dtype="Int64").value_counts(dropna=False),
        ValueError,
        ["classes 0 to 1", "<NA>"],
    ),
    "meta": (torch.ones(3, device="meta"), TypeError, ["numbers", "'meta'", "cannot be read"]),
    "foreign bytes": (memoryview(np.array([3], ">i8")), TypeError, ["numbers", "memory at", "cannot be read"]),
    "sparse": (torch.ones(3).to_sparse(), TypeError, ["dense", "sparse_coo", "to_dense"]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("counts", "error", "quoted"), WRONG_COUNTS.values(), ids=WRONG_COUNTS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=["margins", "weights", "priors", "LMFLoss"])
def test_an_error_is_about_the_counts(function, counts, error, quoted):
    with pytest.raises(error, match="class_counts must") as caught:
        function(counts)
    for words in quoted:
        assert words in str(caught.value)
    for of_a_library in ("can't convert", "could not", "strides", "numpy.object_", "torch.as_tensor", "ambiguous"):
        assert of_a_library not in str(caught.value)


def test_what_the_errors_advise_is_accepted():
    expected = ldam_margins([2, 1, 3])
    labels, counts = np.unique([2, 0, 0, 1, 2, 2], return_counts=True)
    table = pd.Series([2, 0, 0, 1, 2, 2]).value_counts().reset_index(name="n")
    for advised in (
        dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        dict(Counter([2, 0, 0, 1, 2, 2]).most_common()),
        dict(np.array([(1, 1), (2, 3), (0, 2)], "i4, i4")),
        np.ravel(np.asmatrix([2, 1, 3])),
        np.ravel([[2], [1], [3]]),
        np.ravel(torch.tensor([[2, 1, 3]])),
        dict(zip(table["index"], table["n"], strict=True)),
        table.set_index("index")["n"],
    ):
        assert torch.equal(ldam_margins(advised), expected)


# From labels.

SEEN = [0, 3, 3, 1, 0, 0]
LABELS_IN_FORMS = {
    "list": lambda y: y,
    "tuple": tuple,
    "array": np.array,
    "pandas column": lambda y: pd.Series(y).to_numpy(),
    "tensor": torch.tensor,
    "images": lambda y: torch.tensor(y).view(1, 2, 3),
    "transposed": lambda y: torch.tensor(y).view(2, 3).t(),
    "every second": lambda y: torch.tensor(y).repeat_interleave(2)[::2],
    "negation noted": lambda y: torch._neg_view(-torch.tensor(y)),
    **{
        str(dtype): lambda y, dtype=dtype: torch.tensor(y).to(dtype)
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64)
    },
}


@pytest.mark.parametrize("convert", LABELS_IN_FORMS.values(), ids=LABELS_IN_FORMS)
def test_classes_are_counted(convert):
    counts = count_classes(convert(SEEN), 4)
    assert counts.tolist() == [3, 1, 0, 2]
    assert counts.dtype == torch.int64
    assert count_classes(convert(SEEN), 5).tolist() == [3, 1, 0, 2, 0]


def test_labels_that_do_not_count():
    labels = torch.tensor([0, -100, 3, 255, -1])
    assert count_classes(labels.masked_fill(labels > 3, -100).clamp_min(-100)[:4], 4).tolist() == [1, 0, 0, 1]
    assert count_classes(labels[[0, 2, 3]], 4, ignore_index=255).tolist() == [1, 0, 0, 1]
    assert count_classes([0, 1, 1, 3], 4, ignore_index=1).tolist() == [1, 0, 0, 1]
    assert count_classes(torch.tensor([0, 156], dtype=torch.uint8), 200).tolist()[156] == 1  # -100 of int8


@pytest.mark.parametrize("labels", [[], torch.empty(0, dtype=torch.long), torch.empty(2, 0, dtype=torch.uint8)])
def test_no_labels(labels):
    assert count_classes(labels, 3).tolist() == [0, 0, 0]


def test_one_label():
    assert count_classes(torch.tensor(2), 3).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "quoted"),
    [
        (([0, 4], 4), {}, IndexError, r"\[0, 4\).*ignore_index=-100, got 4 at index \[1\]"),
        (([[0, 1], [-1, 0]], 4), {}, IndexError, r"got -1 at index \[1, 0\]"),
        (([0.0, 1.0], 4), {}, TypeError, "integer dtype, got torch.float32"),
        ((torch.ones(2, 3), 3), {}, TypeError, r"target\.argmax\(1\)"),
        ((torch.ones(2, dtype=torch.bool), 3), {}, TypeError, "torch.bool"),
        ((torch.ones(2).long().to_sparse(), 3), {}, TypeError, "dense"),
        ((None, 3), {}, TypeError, "torch.as_tensor makes one of, got NoneType"),
        (("01", 3), {}, TypeError, "got str"),
        ((iter([0, 1]), 3), {}, TypeError, "got list_iterator"),
        (([[0], [1, 2]], 3), {}, TypeError, "got list"),
        ((torch.ones(2, dtype=torch.long, device="meta"), 3), {}, TypeError, "cannot be read"),
        (([0, 1], 0), {}, ValueError, "n_classes must be at least 1, got 0"),
        (([0, 1], 2.0), {}, TypeError, "n_classes must be an integer, got 2.0"),
        (([0, 1], 2), {"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
    ],
)
def test_labels_that_are_refused(arguments, options, error, quoted):
    with pytest.raises(error, match=quoted):
        count_classes(*arguments, **options)


def test_counts_of_labels_are_class_counts():
    labels = torch.arange(60) % 3
    torch.testing.assert_close(ldam_margins(count_classes(labels, 3)), torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="for class 3"):
        LMFLoss(count_classes(labels, 4))
