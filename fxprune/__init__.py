"""fxprune makes pruned PyTorch models actually smaller and faster."""

from __future__ import annotations

from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.recover.recover import recover
from fxprune.emit.report import Report
from fxprune.files.export import export
from fxprune.files.load import load
from fxprune.files.pretrained import from_pretrained, save_pretrained
from fxprune.files.save import save
from fxprune.graph.environment import VERSION
from fxprune.measure.benchmark import benchmark
from fxprune.own_class.write_back import write_back
from fxprune.plan.patterns import Blocks, Channels, Existing, SemiStructured, Unstructured
from fxprune.plan.plan import Drop, Plan, Rule

from . import gradient_score, prune
from .analyze import analyze
from .errors import FxPruneError, FxPruneWarning
from .transform import transform

__version__ = VERSION
__all__ = [
    "Blocks",
    "Channels",
    "Drop",
    "Existing",
    "FxPruneError",
    "FxPruneWarning",
    "Plan",
    "Report",
    "Rule",
    "SemiStructured",
    "Unstructured",
    "analyze",
    "benchmark",
    "calibrate",
    "export",
    "from_pretrained",
    "gradient_score",
    "load",
    "prune",
    "recover",
    "save",
    "save_pretrained",
    "transform",
    "write_back",
]
