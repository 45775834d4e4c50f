"""spill: activations between two segments, in memory up to a limit, the rest in files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Values = dict[str, Any]


class Shelf:
    """One dict of values for each batch; put in by number, taken out once.

    What exceeds `limit` bytes goes to files in a folder that leaves with the shelf. Values that share memory still do
    when they come back.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.held = 0
        self.largest = 0
        self._in_memory: dict[int, tuple[Values, int]] = {}
        self._on_disk: set[int] = set()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, number: int, values: Values) -> None:
        """Keep the values of a batch."""
        size = _bytes(values)
        if self.held + size <= self.limit:
            self._in_memory[number] = (values, size)
            self.held += size
            self.largest = max(self.largest, self.held)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fxprune-")
        torch.save(values, self._file(number))
        self._on_disk.add(number)

    def take(self, number: int) -> Values:
        """Hand the values of a batch back."""
        if number in self._in_memory:
            values, size = self._in_memory.pop(number)
            self.held -= size
            return values
        self._on_disk.remove(number)
        file = self._file(number)
        values = torch.load(file, weights_only=True)
        file.unlink()
        return values

    def close(self) -> None:
        """Forget everything, files as well."""
        self._in_memory.clear()
        self._on_disk.clear()
        self.held = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{number}.pt"


def _bytes(values: Values) -> int:
    storages = {}
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
