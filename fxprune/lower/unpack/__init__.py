"""A program with packed weights back to plain ATen ops."""

from .unpack import unpack

__all__ = ["unpack"]
