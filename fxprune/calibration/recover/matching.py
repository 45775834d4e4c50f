"""matching: how far a pruned program is from the dense one, inside and at its outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.calibration.batches import Batch
from fxprune.calibration.layer import find_layers
from fxprune.calibration.padding import Padding, counting, find_padding
from fxprune.errors import InputError
from fxprune.graph.ops import NORMS, widened
from fxprune.graph.program import Program
from fxprune.graph.weights import uses

aten = torch.ops.aten

# More places than this say nothing new, and each holds one activation of the dense model.
_MOST = 24

Seen = tuple[Mapping[str, Any], Sequence[Any]]
Loss = Callable[[Any, Any], Tensor]


def nodes_to_match(program: Program, pruned: Iterable[str]) -> list[str]:
    """The nodes whose values a pruned program should keep, at most 24, in the graph's order.

    These are the sums that close residual branches, or what a norm makes of them where it alone reads them. A graph
    without such sums has the outputs of its `pruned` weights instead.
    """
    every = [name for name, places in uses(program).items() if any(use.kind for use in places)]
    layers, _ = find_layers(program, every)
    found = {_behind(layer.branch.way[-1]) for layer in layers.values() if layer.branch is not None}
    if not found:
        found = {layer.node for layer in find_layers(program, pruned)[0].values()}
    names = [node.name for node in program.graph.nodes if node in found]
    if len(names) <= _MOST:
        return names
    step = (len(names) - 1) / (_MOST - 1)
    return [names[round(place * step)] for place in range(_MOST)]


def _behind(node: Node) -> Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in NORMS and users[0].args[0] is node else node


def same_shape(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    """The nodes that have floating values of one shape on both sides."""
    return [
        name
        for name, wanted in teacher.items()
        if isinstance(wanted, Tensor)
        and wanted.is_floating_point()
        and isinstance(found := student.get(name), Tensor)
        and found.shape == wanted.shape
    ]


class Distance:
    """The mean over matched nodes of relative squared errors, and the same over outputs or a user's loss of them.

    `program` is the dense one, and `taps` are its matched nodes; a user's loss gets outputs in its structure. Raises
    InputError where a user's loss gives no single number.
    """

    def __init__(self, program: Program, taps: Collection[str], loss: Loss | None) -> None:
        self._program, self._loss = program, loss
        self._outputs = pytree.tree_leaves(program.graph.output_node().args)
        self._matched = [n for n in program.graph.nodes if n.name in taps or n in self._outputs]
        self._paddings: Mapping[str, Padding] | None = None
        self._padded: set[str] = set()

    def __call__(self, student: Seen, teacher: Seen, batch: Batch) -> Tensor:
        """What each side saw on one batch -> the loss, a scalar."""
        valid = self._valid(batch)
        inside = [relative_error(student[0][n], wanted, valid(n, wanted)) for n, wanted in teacher[0].items()]
        parts = [_mean(inside)] if inside else []
        if self._loss is not None:
            given = [self._program.graph.process_outputs(list(side[1])) for side in (student, teacher)]
            parts.append(self._checked(self._loss(*given)))
        else:
            triples = zip(self._outputs, student[1], teacher[1], strict=True)
            outside = [relative_error(a, b, valid(n.name, b)) for n, a, b in triples if _is_real(a) and _is_real(b)]
            parts += [_mean(outside)] if outside else []
        if not parts:
            raise InputError(
                "cannot compare the pruned model with the dense one",
                why="neither an output nor a residual sum holds real numbers",
                do="Let the model return what leads to its output, such as logits, or give loss=.",
            )
        return _sum(parts)

    @property
    def note(self) -> str:
        """What did not go as it should up to now, in words."""
        if not self._padded:
            return ""
        return f"padding could not be told from text in {', '.join(sorted(self._padded))}, so it counts there as well"

    def _valid(self, batch: Batch) -> Callable[[str, Tensor], Tensor | None]:
        """Node, its value -> which of its leading one or two sizes count, bool; None where all do."""
        if batch.valid is not None and self._paddings is None:
            self._paddings = find_padding(self._program, [batch], self._matched)
        paddings = self._paddings or {}

        def valid(name: str, value: Tensor) -> Tensor | None:
            padding = paddings.get(name, Padding.UNKNOWN)
            if batch.valid is None or padding is Padding.WITHOUT:
                return None
            found = (counting(value.shape[:dims], batch.valid, padding) for dims in (2, 1))
            counts = next((each for each in found if each is not None), None)
            if counts is None:
                self._padded.add(name)
            return counts

        return valid

    def _checked(self, found: Any) -> Tensor:
        if isinstance(found, Tensor) and found.numel() == 1 and found.is_floating_point():
            return found.reshape(())
        what = (
            f"a tensor {list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        )
        raise InputError(
            "cannot train with this loss",
            where="loss=",
            why=f"it returned {what}, and not a real tensor of one number",
            do="Write loss(student_outputs, teacher_outputs) so that it returns one, such as a mean.",
        )


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return _sum(parts) / len(parts)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def relative_error(found: Tensor, wanted: Tensor, valid: Tensor | None) -> Tensor:
    """The mean squared difference of two tensors of one shape over the variance of the second, a scalar.

    Only the positions that `valid` names count, bool of the leading one or two sizes, and only what is wanted finite
    or NaN: an infinity in an output is a mask, and no number to come near to.
    """
    found, wanted = widened(found), widened(wanted)
    counts = ~wanted.isinf()
    if valid is not None:
        counts = counts & valid.reshape(*valid.shape, *[1] * (wanted.dim() - valid.dim()))
    if bool(counts.all()):
        squares, spread = (found - wanted).square().mean(), wanted.var(correction=0)
    else:
        kept = wanted[counts]
        if not kept.numel():
            return wanted.new_zeros(())
        squares = torch.where(counts, found - wanted, 0.0).square().sum() / kept.numel()
        spread = kept.var(correction=0)
    # What is the same everywhere has no spread to compare with.
    return squares / torch.where(spread > 0, spread, 1.0)
