"""fxprune makes pruned PyTorch models actually smaller and faster."""

from __future__ import annotations

from . import gradient_score, prune
from .analyze import analyze
from .calibration.calibrate import calibrate
from .calibration.recover import recover
from .errors import FxPruneError
from .measure import benchmark
from .patterns import Blocks, Channels, Existing, SemiStructured, Unstructured
from .plan import Drop, Plan, Rule
from .report import Report
from .transform import transform

__version__ = "0.1.0"
__all__ = [
    "Blocks",
    "Channels",
    "Drop",
    "Existing",
    "FxPruneError",
    "Plan",
    "Report",
    "Rule",
    "SemiStructured",
    "Unstructured",
    "analyze",
    "benchmark",
    "calibrate",
    "gradient_score",
    "prune",
    "recover",
    "transform",
]
