"""Which axes an ATen op ties: one record an op, in families. An op without one freezes the axes that it touches."""

from __future__ import annotations

from . import contract, conv, create, cut, norm, pointwise, recurrent, reduce, shape, spatial
from .norm import STATISTICS
from .relation import RULES, Dims, Here, Relation, Resize, Value, packet_name, tensors

FAMILIES = (pointwise, contract, conv, norm, spatial, shape, cut, reduce, create, recurrent)

__all__ = ["FAMILIES", "RULES", "STATISTICS", "Dims", "Here", "Relation", "Resize", "Value", "packet_name", "tensors"]
