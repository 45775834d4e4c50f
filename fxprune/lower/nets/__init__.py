"""Parts of a graph around convolutions or linears, computed in one call on maps whose pixels or tokens lie in lanes."""

from .lower import lower_nets

__all__ = ["lower_nets"]
