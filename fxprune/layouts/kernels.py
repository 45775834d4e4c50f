"""kernels: triton_kernels, which is installed inside this package but lies beside it in the repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_kernels import activation, bitmap, blocks, gemv24, language, nonzeros, prune24
else:
    from ..triton_kernels import activation, bitmap, blocks, gemv24, language, nonzeros, prune24

__all__ = ["activation", "bitmap", "blocks", "gemv24", "language", "nonzeros", "prune24"]
