"""Layouts: how masked weights are stored and multiplied. LAYOUTS lists them; choose() takes the fastest."""

from __future__ import annotations

from .nonzeros import Nonzeros
from .site import Fit, Layout, Packed, Site

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Nonzeros(),)}

__all__ = ["LAYOUTS", "Fit", "Layout", "Nonzeros", "Packed", "Site"]
