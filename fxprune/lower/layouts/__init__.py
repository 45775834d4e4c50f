"""Layouts: how masked weights are stored and multiplied. LAYOUTS lists them; choose() takes the fastest."""

from __future__ import annotations

from .bitmap import Bitmap
from .blocks import Blocks
from .cusparselt import CuSparseLt
from .nonzeros import Nonzeros
from .nonzeros8 import Nonzeros8
from .semi24 import Semi24
from .site import Layout
from .tiles import TilesLayout

_ALL: tuple[Layout, ...] = (Nonzeros(), Semi24(), CuSparseLt(), Blocks(), Nonzeros8(), Bitmap(), TilesLayout())
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ALL}
