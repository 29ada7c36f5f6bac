"""The LMF loss (LDAM + focal) for imbalanced classification: loss and gradient in one Triton kernel."""

from .counts import count_classes
from .functional import lmf_loss
from .margins import class_balanced_weights, ldam_margins, log_prior_adjustment
from .modules import FocalLoss, LDAMLoss, LMFLoss
from .schedule import DeferredReweighting

__version__ = "0.1.0"

__all__ = [
    "DeferredReweighting",
    "FocalLoss",
    "LDAMLoss",
    "LMFLoss",
    "class_balanced_weights",
    "count_classes",
    "ldam_margins",
    "lmf_loss",
    "log_prior_adjustment",
]
