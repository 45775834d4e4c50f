"""Trust: whether packed weights of a file are of their format, so that a kernel that reads them stays in their memory.

The kernels look at shapes and at where blocks begin, at every call, and take what stands in the blocks on trust: who
packed them knew. A file's packed tensors are looked at once, element by element, when it is loaded.
"""

from __future__ import annotations

from .validate import validate

__all__ = ["validate"]
