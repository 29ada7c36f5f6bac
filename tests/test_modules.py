"""Promise: the modules are lmf_loss with their settings; margins and weights travel with the module."""

import copy
import inspect
import pickle

import pytest
import torch
from oracle import make_case

from lmf_triton import FocalLoss, LDAMLoss, LMFLoss, ldam_margins, lmf_loss, log_prior_adjustment

COUNTS = [500, 100, 50, 20, 10, 5, 2]
WEIGHT = torch.linspace(0.5, 2.0, 7)
ADJUSTMENT = log_prior_adjustment(COUNTS)


def test_lmf_loss_module(triton_device):
    device, case = triton_device, make_case((33, 7), torch.float32).to(triton_device)
    settings = {"alpha": 1.5, "beta": 0.5, "gamma": 2.0, "scale": 30.0, "ignore_index": 3, "reduction": "mean_per_term"}
    settings["label_smoothing"] = 0.1
    case.target[1] = 3
    module = LMFLoss(COUNTS, max_margin=0.3, weight=WEIGHT, logit_adjustment=ADJUSTMENT, **settings).to(device)
    margins = ldam_margins(COUNTS, max_margin=0.3).to(device)
    per_class = {"weight": WEIGHT.to(device), "logit_adjustment": ADJUSTMENT.to(device)}
    expected = lmf_loss(case.logits, case.target, margins, **per_class, **settings)
    assert torch.equal(module(case.logits, case.target), expected)


def test_ldam_loss_module(triton_device):
    device, case = triton_device, make_case((33, 7), torch.float32).to(triton_device)
    module = LDAMLoss(COUNTS, max_margin=0.3, scale=30.0, weight=WEIGHT, reduction="sum").to(device)
    margins = ldam_margins(COUNTS, max_margin=0.3).to(device)
    options = {"beta": 0.0, "scale": 30.0, "weight": WEIGHT.to(device), "reduction": "sum"}
    assert torch.equal(module(case.logits, case.target), lmf_loss(case.logits, case.target, margins, **options))


def test_focal_loss_module(triton_device):
    device, case = triton_device, make_case((33, 7), torch.float32).to(triton_device)
    module = FocalLoss(gamma=2.0, weight=WEIGHT, reduction="none").to(device)
    options = {"alpha": 0.0, "gamma": 2.0, "weight": WEIGHT.to(device), "reduction": "none"}
    assert torch.equal(module(case.logits, case.target), lmf_loss(case.logits, case.target, **options))


@pytest.mark.parametrize(
    "module",
    [
        LMFLoss(COUNTS, weight=WEIGHT),
        LMFLoss(COUNTS, logit_adjustment=ADJUSTMENT),
        LDAMLoss(COUNTS),
        FocalLoss(weight=WEIGHT, logit_adjustment=ADJUSTMENT),
    ],
    ids=str,
)
def test_buffers(module):
    """Buffers follow .to() and state_dict, and are no parameters."""
    names = {name for name in ("margins", "weight", "logit_adjustment") if getattr(module, name) is not None}
    assert set(module.state_dict()) == names == {name for name, _ in module.named_buffers()}
    assert not list(module.parameters())
    assert all(buffer.device.type == "meta" for buffer in copy.deepcopy(module).to("meta").buffers())
    restored = copy.deepcopy(module)
    for buffer in restored.buffers():
        buffer.zero_()
    restored.load_state_dict(module.state_dict())
    logits, target = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6])
    expected = module(logits, target)
    assert torch.equal(restored(logits, target), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(logits, target), expected)


def test_repr_shows_the_settings():
    assert repr(LMFLoss([4, 1], alpha=1.5, scale=30.0)) == (
        "LMFLoss(n_classes=2, alpha=1.5, beta=1.0, gamma=1.5, max_margin=0.5, scale=30.0, ignore_index=-100, "
        "reduction='mean', label_smoothing=0.0, check_target=False, weight=None, logit_adjustment=None)"
    )
    assert repr(FocalLoss(gamma=2.0, weight=torch.tensor([0.5, 2.0]))) == (
        "FocalLoss(gamma=2.0, ignore_index=-100, reduction='mean', label_smoothing=0.0, check_target=False, "
        "weight=(2,), logit_adjustment=None)"
    )


def test_modules_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        module = LMFLoss(COUNTS)
    assert module.margins.device.type == "meta"
    assert "n_classes=7" in repr(LMFLoss(COUNTS, weight=WEIGHT).to("meta"))


def test_settings_can_be_changed_between_steps():
    """A schedule sets attributes: alpha, beta, gamma, scale, weight."""
    module = LMFLoss(COUNTS)
    logits, target = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6])
    module.beta, module.weight = 0.0, WEIGHT
    assert torch.equal(module(logits, target), lmf_loss(logits, target, module.margins, beta=0.0, weight=WEIGHT))


def test_max_margin_is_fixed():
    """It would change the repr and nothing else: the margins are there already."""
    for module in LMFLoss(COUNTS), LDAMLoss(COUNTS, max_margin=0.3):
        before = module.margins.clone(), module.max_margin
        with pytest.raises(AttributeError, match=r"max_margin of a .* fixed when it is built.*criterion\.margins ="):
            module.max_margin = 0.9
        assert torch.equal(module.margins, before[0]) and module.max_margin == before[1]
    assert "max_margin=0.3" in repr(module)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (LMFLoss(COUNTS), ["class_counts", "grad_in_forward", "normalizer"]),
        (LDAMLoss(COUNTS), ["alpha", "beta", "gamma", "class_counts"]),
        (FocalLoss(), ["alpha", "beta", "scale", "max_margin", "margins", "class_counts"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
def test_settings_that_a_loss_does_not_have_are_refused(module, names):
    for name in names:
        with pytest.raises(AttributeError, match=f"{name} cannot be set on a {type(module).__name__}.*no effect"):
            setattr(module, name, torch.ones(7) if name == "margins" else 2.0)


@pytest.mark.parametrize("module", [LMFLoss(COUNTS), LDAMLoss(COUNTS), FocalLoss()], ids=lambda m: type(m).__name__)
def test_every_setting_that_is_accepted_has_an_effect(module):
    """And none is shown that has none. What ``check_target`` does is another test's: these targets are right."""
    values = {"alpha": 2.0, "beta": 0.3, "gamma": 3.0, "scale": 4.0, "ignore_index": 2, "reduction": "sum"}
    values |= {"margins": torch.linspace(0, 3, 7), "weight": WEIGHT}
    values |= {"label_smoothing": 0.25, "logit_adjustment": ADJUSTMENT}
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    target = torch.arange(9) % 7
    shown = {part.split("=")[0] for part in module.extra_repr().split(", ")} - {
        "n_classes",
        "max_margin",
        "check_target",
    }
    assert shown <= set(values)
    for name, value in values.items():
        changed = copy.deepcopy(module)
        try:
            setattr(changed, name, value)
        except AttributeError:
            assert name not in shown
        else:
            assert not torch.equal(changed(logits, target), module(logits, target)), name
            assert name not in shown or isinstance(value, torch.Tensor) or f"{name}={value!r}" in repr(changed)


def test_a_subclass_has_the_attributes_that_it_wants():
    class Named(FocalLoss):
        def __init__(self, alpha, class_counts):
            super().__init__()
            self.alpha, self.class_counts = alpha, class_counts

        def forward(self, logits, target):
            return self.alpha * super().forward(logits, target)

    logits, target = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6])
    assert Named(0.25, COUNTS)(logits, target) == 0.25 * FocalLoss()(logits, target)


def test_a_subclass_may_use_names_of_settings_that_its_base_lacks():
    class Early(LMFLoss):
        def __init__(self, class_counts):
            self.class_counts = class_counts  # before nn.Module is there
            super().__init__(class_counts)

    class WithMargin(FocalLoss):
        def __init__(self):
            super().__init__()
            self.max_margin = 0.5

    assert Early(COUNTS).class_counts == COUNTS
    module = WithMargin()
    module.max_margin = 0.9
    assert module.max_margin == 0.9


@pytest.mark.parametrize("module", [LMFLoss(COUNTS), FocalLoss()], ids=lambda m: type(m).__name__)
def test_what_is_assigned_is_checked(module):
    with pytest.raises(ValueError, match="weight has no gradient"):
        module.weight = torch.ones(7, requires_grad=True)
    with pytest.raises(TypeError, match="weight must be of a floating-point dtype"):
        module.weight = torch.ones(7, dtype=torch.long)
    with pytest.raises(TypeError, match="weight"):
        module.weight = [1.0] * 7


def test_assigned_margins_are_remembered():
    """As an assigned weight is: those of the class counts would take their place without a word."""
    assigned = torch.linspace(0, 1, 7)
    module = LMFLoss(COUNTS)
    module.margins = assigned
    module.to("meta").to_empty(device="cpu")
    assert torch.equal(module.margins, assigned)
    module.margins = assigned.to("meta")
    module.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"margins has no values.*criterion\.margins ="):
        module(torch.zeros(1, 7), torch.tensor([0]))
    module.load_state_dict(LMFLoss(COUNTS).state_dict())
    assert torch.isfinite(module(torch.zeros(1, 7), torch.tensor([0])))


@pytest.mark.parametrize("function", [lmf_loss, LMFLoss, LDAMLoss, FocalLoss])
def test_defaults_agree(function):
    """The modules' defaults are the function's."""
    defaults = {name: p.default for name, p in inspect.signature(lmf_loss).parameters.items()}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in defaults:
            assert parameter.default == defaults[name]
        if parameter.default is not inspect.Parameter.empty and name != "margins":
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
