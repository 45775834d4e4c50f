"""The decision: scores and amounts become what stays of every weight and group."""

from .selection import Selection

__all__ = ["Selection"]
