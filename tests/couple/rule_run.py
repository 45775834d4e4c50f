"""What the tests of the rules do with a call: give its tensors axes, permute, zero and slice them, and run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.couple.axis import Axis, Conflict, Size, atoms, concat, cut, divide
from fxprune.couple.indices import kept_indices
from fxprune.couple.rules import RULES, Dims, Here, Relation, Resize
from tests.couple.rule_case import Case, Given

# The axis of one dimension, from its size and its place among all dimensions of the arguments.
Shape = Callable[[int, int], Axis]


class Call:
    """A case with real tensors and their axes, tied by the rule.

    `shape` makes the axis of a dimension, so that a rule also meets axes that earlier ops have split.
    """

    def __init__(self, case: Case, shape: Shape) -> None:
        self.case = case
        self.rule: Relation = RULES[case.op]
        generator = torch.Generator().manual_seed(0)
        # Arguments by their schema names, with the defaults of those that are not given.
        self.values: dict[str, Any] = {}
        self.dims: dict[str, Any] = {}
        named: dict[str, Axis] = {}
        for index, argument in enumerate(case.target._schema.arguments):
            given = (
                case.args[index] if index < len(case.args) else case.kwargs.get(argument.name, argument.default_value)
            )
            self.values[argument.name] = _map(given, lambda g: g.make(generator))
            self.dims[argument.name] = _map(given, lambda g: _dims(g.shape, g.axes, named, shape))
        self.result = self.run(self.values)
        shapes = [tuple(x.shape) for x in flat(self.result)]
        outs = [_dims(s, case.out, named, atom_of) for s in shapes]
        self.out: Any = outs if isinstance(self.result, (list, tuple)) else outs[0]
        self.here = Here("node", case.op, {})
        try:
            self.rule.tie(self.here, self.out, **self.dims)
        except Conflict as conflict:
            self.here.freeze_all([self.out, *flat(list(self.dims.values()), Dims)], str(conflict))
            self.rule = Relation(self.rule.tie, lambda *_, **__: set())

    def run(self, values: Mapping[str, Any]) -> Any:
        """The op on copies of these arguments."""
        values = _map(dict(values), lambda x: x.clone(), Tensor)
        schema = self.case.target._schema.arguments
        keywords = {a.name: values[a.name] for a in schema if a.kwarg_only}
        return self.case.target(*[values[a.name] for a in schema if not a.kwarg_only], **keywords)

    def inputs(self) -> list[tuple[Tensor, Dims]]:
        """Every tensor argument with its axes."""
        return list(zip(flat(list(self.values.values())), flat(list(self.dims.values()), Dims), strict=True))

    def outputs(self, result: Any) -> list[tuple[Tensor, Dims]]:
        """Every output with its axes."""
        return list(zip(flat(result), flat(self.out, Dims), strict=True))

    def atoms(self, *, frozen: bool = False, mixed: bool = True) -> list[Axis]:
        """Atoms of inputs and outputs."""
        held = [*flat(list(self.dims.values()), Dims), *flat(self.out, Dims)]
        found = dict.fromkeys(atom for dims in held for axis in dims.axes for atom in atoms(axis))
        wide = [a for a in found if a.size.number > 1]
        return [a for a in wide if (frozen or not a.frozen) and (mixed or not a.mixed)]

    def change(self, edit: Callable[[Tensor, Dims], Tensor]) -> dict[str, Any]:
        """The arguments with every tensor edited."""
        edited = iter([edit(value, dims) for value, dims in self.inputs()])
        return _map(self.values, lambda _: next(edited), Tensor)

    def run_shrunk(self, values: Mapping[str, Any], keep: Mapping[Axis, Tensor]) -> Any:
        """The op on sliced arguments, its literals rewritten as passes/shrink.py does."""
        if self.rule.resize is None:
            return self.run(values)
        sizes = Resize(keep, _no_symbols)
        changed = self.rule.resize(sizes, self.out, **self.dims)
        pieces, factor = changed.pop("pieces", None), changed.pop("output_scale", None)
        if pieces is not None:
            return torch.ops.aten.split_with_sizes.default(values["self"], pieces, values.get("dim", 0))
        if (target := changed.pop("target", None)) is not None:
            return target(values["self"], **changed)
        unknown = set(changed) - set(values)
        assert not unknown, f"{self.case.op} has no arguments {unknown}"
        result = self.run({**values, **changed})
        return result if factor is None else result * factor


def _no_symbols(*_: Any) -> Any:
    raise AssertionError("no size here is symbolic")


def permuted(tensor: Tensor, dims: Dims, order: Mapping[Axis, Tensor]) -> Tensor:
    """The tensor with the indices of some atoms in another order, or with only some of them."""
    for dim, axis in enumerate(dims.axes):
        if any(atom in order for atom in atoms(axis)):
            tensor = tensor.index_select(dim, kept_indices(axis, order))
    return tensor


def removed(tensor: Tensor, dims: Dims, keep: Mapping[Axis, Tensor]) -> Tensor:
    """Which elements stand at an index that is not kept, along any dimension: bool, the tensor's shape."""
    gone = torch.zeros(tensor.shape, dtype=torch.bool)
    for dim, axis in enumerate(dims.axes):
        out = torch.ones(tensor.shape[dim], dtype=torch.bool)
        out[kept_indices(axis, keep)] = False
        gone |= out.view([-1 if i == dim else 1 for i in range(tensor.dim())])
    return gone


def flat(value: Any, kind: type = Tensor) -> list[Any]:
    """Every value of a kind in nested lists, in order."""
    if isinstance(value, kind):
        return [value]
    return [leaf for item in value for leaf in flat(item, kind)] if isinstance(value, (list, tuple)) else []


def _map(value: Any, change: Callable[[Any], Any], kind: type = Given) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change, kind) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map(item, change, kind) for item in value]
    return value


def _dims(shape: tuple[int, ...], names: str, named: dict[str, Axis], make: Shape) -> Dims:
    axes = []
    for size, name in zip(shape, names or "." * len(shape), strict=True):
        # Dimensions without a name have entries of their own, so that entries count dimensions.
        key = f"{len(named)}" if name == "." else name
        axes.append(named.setdefault(key, make(size, len(named)) if name == "." else Axis(size)))
    return Dims(tuple(axes))


def atom_of(size: int, place: int) -> Axis:
    """An axis that nothing has split."""
    return Axis(size)


def shapes() -> Iterator[tuple[str, Shape]]:
    """Ways in which earlier ops may have split the axes that a rule meets: not at all, and each in another way."""
    yield "atoms", atom_of
    for first in (0, 3):
        yield f"split axes from {first}", _in_turn(first)


def _in_turn(first: int) -> Shape:
    ways = [_product, _concat, _twice, _concat_of_products, _product_of_three, _product_of_concats]
    return lambda size, place: ways[(first + place) % len(ways)](size)


def _product(size: int, outer: int = 2) -> Axis:
    axis = Axis(size)
    if size % outer == 0 and size > outer:
        divide(axis, [Size(outer), Size(size // outer)])
    return axis


def _product_of_three(size: int) -> Axis:
    return _product(size, 3)


def _concat(size: int) -> Axis:
    axis = Axis(size)
    if size > 1:
        cut(axis, [size // 2, size - size // 2])
    return axis


def _twice(size: int) -> Axis:
    half = Axis(size // 2)
    return concat([half, half]) if size > 3 and size % 2 == 0 else Axis(size)


def _concat_of_products(size: int) -> Axis:
    return concat([_product(size - 2), Axis(2)]) if size > 3 else Axis(size)


def _product_of_concats(size: int) -> Axis:
    axis = _product(size)
    if axis.parts and (inner := axis.parts[1].size.number) > 1:
        cut(axis.parts[1], [1, inner - 1])
    return axis
