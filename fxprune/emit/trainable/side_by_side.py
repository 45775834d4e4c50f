"""side_by_side: one model's graphs of eval and train mode side by side, and what differs about each node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.graph.memory import DROPOUTS, writes
from fxprune.graph.note import some
from fxprune.graph.program import arguments

from .regions import Flat, Step

aten = torch.ops.aten

_NORMS = {aten.batch_norm.default, aten.instance_norm.default}


@dataclasses.dataclass(frozen=True)
class Inserted:
    """An op that only the train graph has: a dropout with rate `p`, or `contiguous`, which goes in for both modes.

    (A tensor that is contiguous as it is leaves no `contiguous` in a graph; attention's outputs are so by mode.)
    All that read a value through one `name` share one draw.
    """

    name: str
    op: Any
    p: float | None


@dataclasses.dataclass(frozen=True)
class ModeArguments:
    """What is different about one node in train mode.

    `differs`: argument name in the op's schema -> (eval, train). `inserted`: name of a node that it reads -> the ops
    that the value goes through first. `counter`: the buffer that counts a norm's batches; `cumulative` says that the
    momentum is one over it. `no_grad`: the model computes this node without gradients, in both modes.
    """

    differs: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    inserted: Mapping[str, tuple[Inserted, ...]] = dataclasses.field(default_factory=dict)
    counter: str | None = None
    cumulative: bool = False
    no_grad: bool = False


class Mismatch(Exception):
    """The graphs of the two modes are not the same ops; the text says where they part."""


class Walk:
    """Two graphs side by side; raises Mismatch where they part by more than the arguments of modes."""

    def __init__(self, evals: Flat, trains: Flat, state: set[str], cumulative: set[str]) -> None:
        self._evals, self._trains, self._state, self._cumulative = evals, trains, state, cumulative
        # train node -> the eval node that it is, and the ops between that only the train graph has
        self._values: dict[Node, tuple[Node, tuple[Inserted, ...]]] = {}
        # eval node -> its input, where it is a `contiguous` that the train graph does not have
        self._only_eval: dict[Node, Node] = {}
        # train node -> the batch counter that it is, for every `add_` of one; those that no norm has claimed yet
        self._counted: dict[Node, str] = {}
        self._counters: list[str] = []

    def modes(self) -> dict[str, ModeArguments]:
        """Node name -> what train mode changes about it."""
        found: dict[str, ModeArguments] = {}
        waiting = list(reversed(self._evals.steps))
        without: dict[Node, None] = {}
        for step in self._trains.steps:
            counter = self._counter(step.node)
            if counter is not None:
                self._counted[step.node] = counter
                self._counters.append(counter)
                continue
            while (change := self._pair(waiting[-1], step) if waiting else None) is None:
                if self._insert(step):
                    break
                if not waiting or waiting[-1].node.target is not aten.contiguous.default:
                    expected = waiting[-1].node.name if waiting else "no op"
                    raise Mismatch(f"train mode has {step.node.name} where eval mode has {expected}")
                node = waiting.pop().node
                self._only_eval[node] = self._eval_value(node.args[0])
            if change is None:
                continue
            ours = waiting.pop()
            self._values[step.node] = (ours.node, ())
            if step.no_grad and not ours.no_grad and _is_differentiable(ours.node):
                without[ours.node] = None
            if change != ModeArguments():
                if not ours.is_outer:
                    raise Mismatch(f"{ours.node.name} differs inside a region of its own")
                found[ours.node.name] = change
        if waiting or self._counters:
            raise Mismatch(f"train mode lacks {waiting[-1].node.name if waiting else 'a norm'}")
        if self._evals.out_spec != self._trains.out_spec:
            raise Mismatch("train mode returns another structure")
        for node in self._evals.outer(without):
            found[node.name] = dataclasses.replace(found.get(node.name, ModeArguments()), no_grad=True)
        return found

    def _counter(self, node: Node) -> str | None:
        """The name of the batch counter that a node advances by one."""
        if node.target is not aten.add_.Tensor or node.args[1] != 1:
            return None
        source = self._trains.resolve(node.args[0])
        name = self._counted.get(source) or self._trains.name_of(source)
        return name if name.endswith("num_batches_tracked") else None

    def _insert(self, step: Step) -> bool:
        """Whether this is an op that the train graph may have in addition; it is then noted."""
        node = step.node
        source = self._trains.resolve(node.args[0]) if node.args else None
        if not isinstance(source, Node) or source not in self._values:
            return False
        value, before = self._values[source]
        if node.target in DROPOUTS and arguments(node)["train"]:
            rate = float(arguments(node)["p"])
            inserted = Inserted(node.name, node.target, rate)
        elif node.target is aten.contiguous.default and not node.kwargs:
            inserted = Inserted(node.name, node.target, None)
        else:
            return False
        self._values[node] = (value, (*before, inserted))
        return True

    def _eval_value(self, value: Any) -> Any:
        value = self._evals.resolve(value)
        return self._only_eval.get(value, value) if isinstance(value, Node) else value

    def _pair(self, ours: Step, theirs: Step) -> ModeArguments | None:
        """How the second differs from the first by mode, or None where they are two different things."""
        a, b = ours.node, theirs.node
        if (a.op, ours.context) != (b.op, theirs.context) or (a.op != "placeholder" and a.target != b.target):
            return None
        if a.op == "placeholder":
            return ModeArguments()
        first, second = arguments(a), arguments(b)
        if first.keys() != second.keys():
            return None
        differs: dict[str, tuple[Any, Any]] = {}
        through: dict[Node, tuple[Inserted, ...]] = {}
        for name, value in first.items():
            if self._same(value, second[name], through):
                continue
            if not isinstance(a.target, torch._ops.OpOverload) or not _is_mode(value, second[name]):
                return None
            differs[name] = (value, second[name])
        inserted = {node.name: chain for node, chain in through.items() if chain}
        counter = self._counter_of(a) if a.target in _NORMS else None
        cumulative = counter is not None and counter.rpartition(".")[0] in self._cumulative
        if cumulative:
            differs.pop("momentum", None)
        if counter is not None:
            self._counters.remove(counter)
        return ModeArguments(differs, inserted, counter, cumulative)

    def _counter_of(self, norm: Node) -> str | None:
        mean = self._evals.name_of(arguments(norm)["running_mean"])
        counter = mean.removesuffix("running_mean") + "num_batches_tracked"
        return counter if counter in self._counters else None

    def _same(self, ours: Any, theirs: Any, through: dict[Node, tuple[Inserted, ...]]) -> bool:
        """Whether two arguments are the same value; `through` collects what is inserted before what is read."""
        if isinstance(theirs, Node):
            if not isinstance(ours, Node):
                return False
            a, b = self._eval_value(ours), self._trains.resolve(theirs)
            if a in self._evals.attributes or b in self._trains.attributes:
                return self._same_attribute(a, b)
            value, chain = self._values.get(b, (None, ()))
            return value is a and through.setdefault(ours, chain) == chain
        if isinstance(theirs, (list, tuple)):
            return (
                isinstance(ours, (list, tuple))
                and len(ours) == len(theirs)
                and all(self._same(x, y, through) for x, y in zip(ours, theirs, strict=True))
            )
        if isinstance(theirs, dict):
            return isinstance(ours, dict) and self._same([*ours.items()], [*theirs.items()], through)
        return type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs))

    def _same_attribute(self, ours: Node, theirs: Node) -> bool:
        if ours not in self._evals.attributes or theirs not in self._trains.attributes:
            return False
        (name, a), (other, b) = self._evals.attributes[ours], self._trains.attributes[theirs]
        if name == other and name in self._state:
            return True
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, torch.fx.GraphModule) and isinstance(b, torch.fx.GraphModule):
            return a.code == b.code
        return a is b


def beyond(evals: Flat, trains: Flat) -> str:
    """What the train graph does with outputs, parameters or state that the eval graph has not, in words; or nothing."""
    more = []
    if evals.out_spec != trains.out_spec:
        ours, theirs = (flat.out_spec.num_leaves if flat.out_spec is not None else 1 for flat in (evals, trains))
        leaves = f"{theirs} outputs where eval mode returns {ours}" if ours != theirs else "another structure"
        more.append(f"returns {leaves}")
    known = {name for names in evals.parameters() for name in names}
    read = [names[0] for names in trains.parameters() if known.isdisjoint(names)]
    if read:
        more.append(f"reads {some(read)}, which eval mode does not")
    written = {trains.name_of(memory) for step in trains.steps for memory in writes(step.node)}
    written = {name for name in written if name and not name.endswith("num_batches_tracked")}
    if written:
        more.append(f"writes to {some(sorted(written))}")
    return " and ".join(more)


def _is_differentiable(node: Node) -> bool:
    value = node.meta.get("val")
    floating = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return node.op == "call_function" and floating


def _is_mode(ours: Any, theirs: Any) -> bool:
    """Whether two literals can differ by mode alone: flags and rates, but no sizes, which are integers."""
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return isinstance(ours, bool) and isinstance(theirs, bool)
    numbers = isinstance(ours, (int, float)) and isinstance(theirs, (int, float))
    return numbers and (isinstance(ours, float) or isinstance(theirs, float))
