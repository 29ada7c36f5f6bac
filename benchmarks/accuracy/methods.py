"""What is compared: losses by name, each with its settings, and the way from its logits to a prediction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor, nn

from lmf_triton import (
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LMFLoss,
    class_balanced_weights,
    ldam_margins,
    log_prior_adjustment,
)

Counts = Sequence[int]
LossOptions = dict[str, float | str | Tensor | None]

BASELINE = "cross-entropy"
SMOOTHING = 0.1  # label smoothing's usual
DRW_SHARE = 0.8  # of the epochs, after which re-weighting sets in: 160 of 200 in LDAM's code

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "cross-entropy": lambda counts, **options: FocalLoss(gamma=0, **options),
    "focal": lambda counts, **options: FocalLoss(**options),
    "ldam": LDAMLoss,
    "lmf": LMFLoss,
}
WEIGHTS: dict[str, Callable[[Counts], Tensor]] = {
    "class-balanced": class_balanced_weights,
    "margins": ldam_margins,
}


class NotTuned(Exception):
    """A tuned loss is asked for before its settings were tried."""


@dataclass(frozen=True)
class Setting:
    """A loss with all its settings: what is trained. The training counts make a module of it."""

    loss: str = BASELINE  # of LOSSES
    options: tuple[tuple[str, float | str], ...] = ()  # as the loss takes them
    weights: str | None = None  # of WEIGHTS
    tau: float = 0.0  # of a logit adjustment in training
    is_deferred: bool = False  # deferred re-weighting

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in self.options]
        words += [f"{self.weights} weights"] if self.weights else []
        words += [f"tau {self.tau:g}"] if self.tau else []
        words += ["deferred re-weighting"] if self.is_deferred else []
        return ", ".join(words) or "as it is"

    @property
    def code(self) -> str:
        """The loss as a user writes it."""
        name = {"cross-entropy": "FocalLoss", "focal": "FocalLoss", "ldam": "LDAMLoss", "lmf": "LMFLoss"}[self.loss]
        arguments = [] if name == "FocalLoss" else ["counts"]
        arguments += ["gamma=0"] if self.loss == "cross-entropy" else []
        arguments += [f"{option}={value!r}" for option, value in self.options]
        arguments += [f"weight={WEIGHTS[self.weights].__name__}(counts)"] if self.weights else []
        arguments += [f"logit_adjustment=log_prior_adjustment(counts, tau={self.tau:g})"] if self.tau else []
        code = f"{name}({', '.join(arguments)})"
        start = f"start_epoch=round({DRW_SHARE:g} * epochs)"
        return f"{code} with DeferredReweighting(criterion, counts, {start})" if self.is_deferred else code

    def make_criterion(self, counts: Counts, shared: LossOptions) -> nn.Module:
        """The loss for these training counts; ``shared`` are options of all losses of an experiment, if not its own."""
        own: LossOptions = dict(self.options)
        if self.weights:
            own["weight"] = WEIGHTS[self.weights](counts)
        if self.tau:
            own["logit_adjustment"] = log_prior_adjustment(counts, tau=self.tau)
        return LOSSES[self.loss](counts, **(shared | own))

    def is_reached_in(self, epochs: int) -> bool:
        """Whether so few epochs are all of its training: deferred weights set in before the last."""
        return not self.is_deferred or _drw_start(epochs) < epochs

    def make_schedule(self, criterion: nn.Module, counts: Counts, epochs: int) -> DeferredReweighting | None:
        """The schedule of its weights, if they have one."""
        if not self.is_deferred:
            return None
        return DeferredReweighting(criterion, counts, start_epoch=_drw_start(epochs))


def _drw_start(epochs: int) -> int:
    return round(DRW_SHARE * epochs)


@dataclass(frozen=True)
class Method:
    """What is trained, and what is taken off the logits before they are compared.

    Of several settings or several ``posthoc_taus`` the validation part chooses, by macro-F1.
    """

    settings: tuple[Setting, ...]
    posthoc_taus: tuple[float, ...] = (0.0,)  # tau · log prior is taken off (Menon et al. 2021, section 4.1)

    @property
    def is_tuned(self) -> bool:
        """Whether ``benchmarks.accuracy.sweep`` has to try its settings first."""
        return len(self.settings) > 1

    @property
    def is_posthoc(self) -> bool:
        return self.posthoc_taus != (0.0,)

    @property
    def code(self) -> str:
        """What a user writes to have the same; of a tuned one the name of its loss."""
        if self.is_tuned:
            return f"{self.settings[0].loss} with the settings that metrics.csv names"
        if not self.is_posthoc:
            return self.settings[0].code
        tau = f"{self.posthoc_taus[0]:g}" if len(self.posthoc_taus) == 1 else "the tau that metrics.csv names"
        predict = f"(logits - log_prior_adjustment(counts, tau={tau})).argmax(1)"
        return f"{self.settings[0].code}; predict {predict}"


def _one(loss: str = BASELINE, **changes) -> Method:
    return Method((Setting(loss, **changes),))


def _settings(loss: str, *changes: dict) -> tuple[Setting, ...]:
    return tuple(Setting(loss, **change) for change in changes)


TAUS = tuple(i / 10 for i in range(16))
# As many settings for every loss: for cross-entropy weights, smoothing and tau, for the margins' losses their margins.
_MARGINS = tuple(
    {"options": (("scale", scale), ("max_margin", margin))} for scale, margin in product((1, 5), (0.5, 1, 2, 4))
)
CANDIDATES = {
    "cross-entropy": _settings(
        "cross-entropy",
        {},
        {"options": (("label_smoothing", SMOOTHING),)},
        {"weights": "class-balanced"},
        {"weights": "margins"},
        {"tau": 0.25},
        {"tau": 0.5},
        {"tau": 1.0},
        {"tau": 0.5, "options": (("label_smoothing", SMOOTHING),)},
    ),
    "focal": _settings(
        "focal",
        *({"options": (("gamma", gamma),), "weights": w} for gamma, w in product((0.5, 1, 1.5, 3), (None, "margins"))),
    ),
    "ldam": _settings("ldam", *_MARGINS),
    "lmf": _settings("lmf", *_MARGINS),
}

AUTHORS = (("alpha", 1.5), ("scale", 30), ("reduction", "mean_per_term"))
METHODS = {
    "cross-entropy": _one(),
    "cross-entropy-weighted": _one(weights="class-balanced"),
    "cross-entropy-margin-weighted": _one(weights="margins"),  # as the LMF authors' code weights its terms
    "cross-entropy-smoothed": _one(options=(("label_smoothing", SMOOTHING),)),
    "cross-entropy-adjusted": _one(tau=1.0),
    "cross-entropy-adjusted-half": _one(tau=0.5),
    "cross-entropy-posthoc": Method((Setting(),), (1.0,)),
    "cross-entropy-posthoc-tuned": Method((Setting(),), TAUS),
    "focal": _one("focal"),
    "focal-posthoc-tuned": Method((Setting("focal"),), TAUS),
    "ldam": _one("ldam"),
    "ldam-posthoc-tuned": Method((Setting("ldam"),), TAUS),
    "ldam-drw": _one("ldam", is_deferred=True),
    "lmf": _one("lmf"),
    "lmf-authors": _one("lmf", options=AUTHORS, weights="margins"),
    "lmf-drw": _one("lmf", is_deferred=True),
    "lmf-adjusted": _one("lmf", tau=1.0),
    "lmf-adjusted-half": _one("lmf", tau=0.5),
    "lmf-posthoc-tuned": Method((Setting("lmf"),), TAUS),
    **{f"{loss}-tuned": Method(settings) for loss, settings in CANDIDATES.items()},
}
DEFAULT = tuple(name for name, method in METHODS.items() if not method.is_tuned)
