"""Parts of a graph around convolutions that are computed in one call, on maps whose pixels lie in lanes."""

from .lower import lower_nets

__all__ = ["lower_nets"]
