"""sizes: which sizes changed where, read off two graphs of one model, before and after it shrank."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxprune.graph.program import Program, arguments, fetch_any

_NO_STACK = "_empty_nn_module_stack"
# Frames of a stack trace that are torch's say nothing of the user's code.
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')

# What a kernel does, or a slice, is said in whole numbers that are no sizes.
STEPS = frozenset(("padding", "stride", "dilation", "kernel_size", "step", "output_padding"))

Known = dict[int, Counter[int]]


@dataclasses.dataclass(frozen=True)
class Literal:
    """A number in the arguments of an op that changed: where the op stands in the code, and in which module."""

    path: str
    old: int
    new: int
    place: str


@dataclasses.dataclass
class Seen:
    """What was seen in one module: old size -> how often it became which.

    literals    in arguments of ops that its forward calls itself
    own, shapes in its own parameters; in tensors that its forward makes or reads itself
    children    in parameters of its direct children
    below, under  in arguments, and in tensors and parameters, anywhere inside it
    """

    literals: Known = dataclasses.field(default_factory=dict)
    own: Known = dataclasses.field(default_factory=dict)
    children: Known = dataclasses.field(default_factory=dict)
    shapes: Known = dataclasses.field(default_factory=dict)
    below: Known = dataclasses.field(default_factory=dict)
    under: Known = dataclasses.field(default_factory=dict)


class Sizes:
    """The sizes that changed between two programs, by the module that owns them."""

    def __init__(self, before: Program, after: Program) -> None:
        self.literals: list[Literal] = []
        self._seen: dict[str, Seen] = {}
        self._nodes(before, after)
        self._tensors(before, after)

    def at(self, path: str) -> Seen:
        """What was seen in the module of this path."""
        return self._seen.get(path, _NOTHING)

    def all(self) -> Known:
        """Old size -> how often it became which, in the whole model."""
        seen = self.at("")
        found: Known = {}
        for known in (seen.below, seen.under):
            for old, news in known.items():
                found.setdefault(old, Counter()).update(news)
        return found

    def news_of(self, old: int) -> list[int]:
        """What a size became anywhere, the most frequent first, without itself."""
        return [new for new, _ in self.all().get(old, Counter()).most_common() if new != old]

    def _nodes(self, before: Program, after: Program) -> None:
        copies = {node.name: node for node in after.graph.nodes}
        for old in before.graph.nodes:
            new = copies.get(old.name)
            if old.op != "call_function" or new is None:
                continue
            paths = paths_of(old)
            for a, b in _literals(old, new):
                self._record(paths, "literals", "below", a, b)
                if a != b:
                    self.literals.append(Literal(paths[-1], a, b, place_of(old)))
            for mine, theirs in zip([old, *old.all_input_nodes], [new, *new.all_input_nodes]):
                for a, b in _shapes(mine.meta.get("val"), theirs.meta.get("val")):
                    self._record(paths, "shapes", "under", a, b)

    def _tensors(self, before: Program, after: Program) -> None:
        left = tensors_read(after)
        for name, tensor in tensors_read(before).items():
            if name not in left:
                continue
            names = name.split(".")[:-1]
            paths = [".".join(names[:depth]) for depth in range(len(names) + 1)]
            for a, b in _shapes(tensor, left[name]):
                self._record(paths, "own", "under", a, b)
                if len(paths) > 1:
                    _count(self._of(paths[-2]).children, a, b)

    def _record(self, paths: list[str], own: str, below: str, old: int, new: int) -> None:
        _count(getattr(self._of(paths[-1]), own), old, new)
        for path in paths:
            _count(getattr(self._of(path), below), old, new)

    def _of(self, path: str) -> Seen:
        return self._seen.setdefault(path, Seen())


_NOTHING = Seen()


def tensors_read(program: Program) -> dict[str, Tensor]:
    """The tensors that ops of a program read, by name. What else it fetches is a graph, as of a region of autocast."""
    names = dict.fromkeys(str(node.target) for node in program.graph.find_nodes(op="get_attr") if node.users)
    found = {name: fetch_any(program, name) for name in names}
    return {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}


def paths_of(node: Node) -> list[str]:
    """The paths of the modules that an op was traced in, outer before inner; a second call of a module is no other."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path.partition("@")[0] for key, (path, _) in stack.items() if not key.startswith(_NO_STACK)]
    return list(dict.fromkeys(["", *paths]))


def place_of(node: Node) -> str:
    """The last line of the user's code that an op comes from, as file:line; "" where the graph does not say."""
    frames = _FRAME.findall(str(node.meta.get("stack_trace") or ""))
    own = [f"{file}:{line}" for file, line in frames if "/torch/nn/modules/" not in file]
    return own[-1] if own else ""


def _count(known: Known, old: int, new: int) -> None:
    known.setdefault(old, Counter())[new] += 1


def _literals(old: Node, new: Node) -> Iterator[tuple[int, int]]:
    """(before, after) of every number in the arguments of an op."""
    a, b = arguments(old), arguments(new)
    if old.target is not new.target and "split_sizes" in b:
        at = int(b.get("dim") or 0)
        values: Any = old.meta.get("val")
        yield from _pairs([piece.shape[at] for piece in values], b["split_sizes"])
        return
    for name, value in a.items():
        # A dimension, or a kernel's step, is a number too, but no size that stays.
        if "dim" not in name and name not in STEPS:
            yield from _pairs(value, b.get(name))


def _pairs(a: Any, b: Any) -> Iterator[tuple[int, int]]:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for x, y in zip(a, b):
            yield from _pairs(x, y)
    elif type(a) is int and type(b) is int:
        yield a, b


def _shapes(a: Any, b: Any) -> Iterator[tuple[int, int]]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield from _pairs(list(a.shape), list(b.shape))
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        for x, y in zip(a, b):
            yield from _shapes(x, y)
