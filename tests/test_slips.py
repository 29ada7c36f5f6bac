"""Promise: the usual slips are answered with what to do, and doing it gives the loss that was meant."""

import re
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import PATHS, make_case, pairwise

from lmf_triton import FocalLoss, LMFLoss, ldam_margins, lmf_loss

pytestmark = pytest.mark.slow

# 1-d logits; one value a sample; a sequence or a text; images, with sizes that tell every axis from the others.
SHAPES = [(7,), (5, 7), (5, 7, 3), (5, 7, 3, 4)]


class Slip(NamedTuple):
    """What people give in place of logits and target, and what to make of it. The samples' axes are those of target."""

    logits: str
    target: str
    advice: str  # quoted in the error, and evaluated where it is code
    shapes: list[tuple[int, ...]] = SHAPES[1:]


ONE_HOT = "F.one_hot(target, 7)"  # the classes last
SLIPS = {
    "column": Slip("logits", "target[:, None]", "target.squeeze(1)"),  # MONAI's labels
    "column of floats": Slip("logits", "target[:, None].float()", "target.squeeze(1).long()"),
    "column of one sample": Slip("logits", "target[None]", "target.squeeze(0)", [(7,)]),
    "row": Slip("logits", "target[None]", "target.reshape((5,))", [(5, 7)]),
    "last axis": Slip("logits", "target[..., None]", "target.reshape((5, 3, 4))", SHAPES[3:]),
    "no axis": Slip("logits", "target[0]", "target.reshape((1,))", [(1, 7)]),
    "flat": Slip("logits", "target.flatten()", "target.reshape((5, 3, 4))", SHAPES[3:]),
    "pooled": Slip("logits[..., None, None]", "target", "logits.flatten(1)", [(5, 7)]),
    "pooled, one axis": Slip("logits[..., None]", "target", "logits.flatten(1)", [(5, 7)]),
    "pooled, floats": Slip(
        "logits[..., None, None]", "target.float()", "logits.flatten(1) and target.long()", [(5, 7)]
    ),
    "pooled, column": Slip("logits[..., None, None]", "target[:, None]", "target.reshape((5, 1, 1))", [(5, 7)]),
    "channels last": Slip("logits.movedim(1, -1)", "target", "logits.movedim(-1, 1)", SHAPES[2:]),
    "channels last, floats": Slip(
        "logits.movedim(1, -1)", "target.double()", "logits.movedim(-1, 1) and target.long()", SHAPES[2:]
    ),
    "channels last, flat": Slip("logits.movedim(1, -1)", "target.flatten()", "logits.flatten(0, -2)", SHAPES[2:]),
    "no batch": Slip("logits[0]", "target[0]", "logits.unsqueeze(0) and target.unsqueeze(0)", [(1, 7, 3, 4)]),
    "no batch of logits": Slip("logits[0]", "target", "logits.unsqueeze(0)", [(1, 7, 3, 4)]),
    "float32": Slip("logits", "target.float()", "target.long()", SHAPES),
    "float64": Slip("logits", "target.double()", "target.long()", SHAPES),
    "mask": Slip("logits", "target.bool()", "target.long()"),
    "one-hot": Slip("logits", f"{ONE_HOT}.movedim(-1, min(1, logits.ndim - 1))", "target.argmax({axis})", SHAPES),
    "one-hot, as probabilities": Slip("logits", f"{ONE_HOT}.movedim(-1, min(1, logits.ndim - 1))", "target.float()"),
    "one-hot of bools": Slip("logits", f"{ONE_HOT}.movedim(-1, 1).bool()", "target.int().argmax(1)"),
    "one-hot of bools, as probabilities": Slip("logits", f"{ONE_HOT}.movedim(-1, 1).bool()", "target.float()"),
    "one-hot of uint8": Slip("logits", f"{ONE_HOT}.movedim(-1, 1).byte()", "target.argmax(1)"),
    "one-hot, classes last": Slip("logits", ONE_HOT, "target.argmax(-1)", SHAPES[2:]),
    "one-hot, classes last, as probabilities": Slip("logits", ONE_HOT, "target.movedim(-1, 1).float()", SHAPES[2:]),
    "probabilities, classes last": Slip("logits", f"{ONE_HOT}.double()", "target.movedim(-1, 1)", SHAPES[2:]),
    "probabilities, transposed": Slip("logits", f"{ONE_HOT}.T.float()", "target.T", [(5, 7)]),
    "one-hot of bools, classes last": Slip("logits", f"{ONE_HOT}.bool()", "target.int().argmax(-1)", SHAPES[2:]),
    "one-hot of floats, classes last": Slip("logits", f"{ONE_HOT}.half()", "target.argmax(-1)", SHAPES[2:]),
    "one-hot, transposed": Slip("logits", f"{ONE_HOT}.T", "target.argmax(0)", [(5, 7)]),
    "list": Slip("logits", "target.tolist()", "torch.as_tensor(target)"),
    "number": Slip("logits", "target.tolist()", "torch.as_tensor(target)", [(7,)]),
    "array": Slip("logits", "target.cpu().numpy()", "torch.as_tensor(target)", SHAPES),
    "logits in an array": Slip("logits.cpu().numpy()", "target", "torch.as_tensor(logits)", SHAPES),
    "output of transformers": Slip("SimpleNamespace(logits=logits)", "target", "its .logits", SHAPES),
    "dict": Slip("{'out': logits}", "target", "one of its values", SHAPES),
    "several outputs": Slip("(logits, logits)", "target", "one of its tensors"),
    "list of logits": Slip("list(logits)", "target", "torch.stack(logits)"),
    "swapped": Slip("target", "logits", "are they swapped"),
    "swapped, labels of floats": Slip("target.float()", "logits", "are they swapped"),
    "swapped, one-hot": Slip(ONE_HOT, "logits", "are they swapped", [(5, 7)]),
    "predicted classes": Slip("logits.argmax(1)", "target", "the scores of the classes"),
}
NAMES = {"F": F, "SimpleNamespace": SimpleNamespace, "torch": torch}
CASES = [(name, shape) for name, slip in SLIPS.items() for shape in slip.shapes]


def error_of(*arguments, **options) -> str:
    """What the loss says, which quotes what was given."""
    with pytest.raises((TypeError, ValueError)) as caught:
        lmf_loss(*arguments, **options)
    message = str(caught.value)
    assert ", got " in message
    return message


def warning_of(*arguments) -> str:
    """What the loss says where it is right all the same: one class has probability 1."""
    with pytest.warns(UserWarning, match="the loss of logits with a single class is 0") as caught:
        assert lmf_loss(*arguments) == 0
    assert caught[0].filename == __file__
    return str(caught[0].message)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_the_advice_gives_the_loss_that_was_meant(device, name, shape):
    case = make_case(shape, torch.float32).to(device)
    meant = {"logits": case.logits, "target": case.target.clamp(min=0, max=1 if name == "mask" else None)}
    slip = SLIPS[name]
    given = {"logits": eval(slip.logits, NAMES, meant), "target": eval(slip.target, NAMES, meant)}
    advice = slip.advice.format(axis=min(1, len(shape) - 1))
    message = error_of(**given)
    assert advice in message
    if advice.startswith(("logits.", "target.", "torch.")):  # not words
        right = dict(given)
        for code in advice.split(" and "):
            right[re.search("logits|target", code)[0]] = eval(code, NAMES, given).to(device)
        torch.testing.assert_close(lmf_loss(**right), lmf_loss(**meant))


PROBABILITIES = torch.tensor([[0.25, 0.75], [0.5, 0.5]])


def test_probabilities_as_logits_are_not_guessed_at(device):
    """They are logits like any others."""
    target = torch.tensor([0, 1], device=device)
    logits = PROBABILITIES.to(device)
    torch.testing.assert_close(lmf_loss(logits, target, alpha=0, gamma=0), F.cross_entropy(logits, target))


def test_probabilities_that_require_a_gradient_are_refused(device):
    target = PROBABILITIES.to(device).requires_grad_()
    assert "give target.detach()" in error_of(torch.zeros(2, 2, device=device), target)


@pytest.mark.parametrize("target", [torch.tensor([5, 1]), torch.ones(2, 5), torch.ones(7, 7, dtype=torch.long)])
def test_where_nobody_can_tell_there_is_no_advice(target):
    message = error_of(torch.zeros(3, 4), target)
    assert message.endswith(f"{tuple(target.shape)}" if target.dtype == torch.long else "for logits of shape (3, 4)")


BINARY = {
    "column": lambda x, y: error_of(x, y[:, None]),
    "BCE's column": lambda x, y: warning_of(x, y[:, None].float()),
    "floats": lambda x, y: error_of(x, y.float()),
    "images": lambda x, y: warning_of(x[..., None, None].expand(4, 1, 3, 3), torch.ones(4, 1, 3, 3)),
    "margins of two classes": lambda x, y: error_of(x, torch.zeros_like(y), ldam_margins([3, 1])),
    "weights of two classes": lambda x, y: error_of(x, torch.zeros_like(y), weight=torch.ones(2)),
}


@pytest.mark.parametrize("slip", BINARY.values(), ids=BINARY)
def test_a_single_logit_for_two_classes(slip):
    logits, target = torch.tensor([[0.5], [-1.0], [2.0], [0.0]]), torch.tensor([0, 1, 1, 0])
    assert "torch.cat([torch.zeros_like(logits), logits], 1)" in slip(logits, target)


def test_a_single_logit_with_a_second_class(device):
    logits, target = torch.tensor([[0.5], [-1.0]], device=device), torch.tensor([0, 1], device=device)
    with pytest.raises(IndexError, match=r"got 1 at index \[1\]: .*torch\.cat\(\[torch"):
        lmf_loss(logits, target, check_target=True)
    mended = lmf_loss(torch.cat([torch.zeros_like(logits), logits], 1), target, alpha=0, gamma=0)
    torch.testing.assert_close(mended, F.binary_cross_entropy_with_logits(logits[:, 0], target.float()))


def test_a_batch_of_single_logits_may_be_one_sample():
    message = error_of(torch.zeros(4), torch.tensor([0, 1, 1, 0]))
    assert "argmax(0)" in message and "a batch has (N, C), and a binary problem two logits a sample" in message


PER_CLASS = {
    "list": ([1.0] * 3, "torch.as_tensor({name})"),
    "array": (np.ones(3, dtype=np.float32), "torch.as_tensor({name})"),
    "integers": (torch.ones(3, dtype=torch.long), "{name}.float()"),
    "mask": (torch.ones(3, dtype=torch.bool), "{name}.float()"),
    "row": (torch.ones(1, 3), "{name}.flatten()"),
    "column": (torch.ones(3, 1), "{name}.flatten()"),
    "broadcast over images": (torch.ones(1, 3, 1, 1), "{name}.flatten()"),
    "parameter": (torch.nn.Parameter(torch.ones(3)), "{name}.detach()"),
}


@pairwise(path=PATHS, name=["margins", "weight", "logit_adjustment"], slip=PER_CLASS)
def test_margins_and_weights(device, name, slip):
    given, advice = slip
    given = given.to(device) if isinstance(given, torch.Tensor) else given
    logits, target = torch.zeros(2, 3, device=device), torch.tensor([0, 2], device=device)
    advice = advice.format(name=name)
    assert error_of(logits, target, **{name: given}).endswith(f": give {advice}")
    right = eval(advice, NAMES, {name: given}).to(device)
    expected = lmf_loss(logits, target, **{name: torch.ones(3, device=device)})
    assert torch.equal(lmf_loss(logits, target, **{name: right}), expected)


@pytest.mark.parametrize("name", ["target", "margins", "weight", "logit_adjustment"])
def test_another_device(name):
    """A meta tensor stands for one on a GPU. No value is asked for: it has none."""
    given = {"logits": torch.zeros(2, 3), "target": torch.tensor([0, 2]), "margins": torch.ones(3), "weight": None}
    given |= {"weight": given["margins"], "logit_adjustment": given["margins"]}
    message = error_of(**given | {name: given[name].to("meta")})
    assert f"device of logits, cpu, got meta: give {name}.to(logits.device)" in message
    assert ("criterion.to('cpu')" in message) == (name != "target")


@pytest.mark.parametrize("make", [FocalLoss, lambda: LMFLoss([4] * 3)], ids=["focal", "LMF"])
def test_modules_say_the_same(make):
    with pytest.raises(ValueError, match=r"got \(2, 1\): give target\.squeeze\(1\)$"):
        make()(torch.zeros(2, 3), torch.tensor([[0], [2]]))


def test_no_value_is_read_for_an_advice():
    """On the meta device there is none."""
    logits, target = torch.empty(5, 7, 1, 1, device="meta"), torch.empty(5, device="meta", dtype=torch.long)
    assert "logits.flatten(1)" in error_of(logits, target)
    assert "argmax(-1)" in error_of(logits, torch.empty(5, 1, 1, 7, device="meta"))
