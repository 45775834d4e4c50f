"""Which axes an ATen op ties: one record an op, in families. An op without one freezes the axes that it touches."""

from __future__ import annotations

from . import compare, contract, conv, create, cut, norm, pick, pointwise, recurrent, reduce, shape, signal, spatial
from .norm import STATISTICS
from .relation import RULES, Dims, Here, Relation, Resize, Value, packet_name, tensors

FAMILIES = (
    pointwise,
    contract,
    compare,
    conv,
    norm,
    spatial,
    signal,
    shape,
    cut,
    pick,
    reduce,
    create,
    recurrent,
)

__all__ = ["FAMILIES", "RULES", "STATISTICS", "Dims", "Here", "Relation", "Resize", "Value", "packet_name", "tensors"]
