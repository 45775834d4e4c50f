"""student: the pruned program as tensors to train, and these as values of the whole model again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.calibration.batches import Batch
from fxprune.check.oracle import Oracle
from fxprune.couple.coupling import Coupling
from fxprune.couple.removal import Cuts
from fxprune.errors import InputError
from fxprune.graph.ops import widened
from fxprune.graph.program import Program, names_of_parameters
from fxprune.select.selection import Selection
from fxprune.shrink.shrink import shrink, slice_tensor


@dataclasses.dataclass(frozen=True)
class Student:
    """A pruned program of its final sizes.

    trained  parameter -> what is trained of it, float32 or wider, a leaf with gradients
    gone     parameter -> bool of the same shape, True where a mask holds it at zero
    cuts     parameter -> [(dim, indices that stay)] where the whole model has more
    dtypes   parameter -> the dtype that it has in the program
    """

    program: Program
    trained: dict[str, Tensor]
    gone: dict[str, Tensor]
    cuts: Mapping[str, Cuts]
    dtypes: dict[str, torch.dtype]

    def values(self) -> dict[str, Tensor]:
        """What is trained, rounded to what the program will hold; gradients pass as if it were not rounded."""
        return {name: _rounded(tensor, self.dtypes[name]) for name, tensor in self.trained.items()}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Puts other values in place, and zeros where a mask holds them."""
        with torch.no_grad():
            for name, value in values.items():
                self.trained[name].copy_(value)
            self.hold()

    def hold(self) -> None:
        """Puts +0.0 where a mask holds it."""
        with torch.no_grad():
            for name, gone in self.gone.items():
                self.trained[name].masked_fill_(gone, 0.0)


def make_student(
    program: Program, coupling: Coupling | None, selection: Selection, existing: Mapping[str, Tensor]
) -> Student:
    """The pruned program to train; `program` has the selection's new values, but neither its masks nor its cuts.

    `existing` are the masks that the model came with, bool, which hold biases too.

    Trained is what is masked, has a new value or shrinks, and every other vector that the graph reads, such as biases
    and the scales of norms. Other matrices, embeddings above all, know more than the data at hand can tell. Raises
    InputError where nothing is left to train.
    """
    first = names_of_parameters(program)
    cuts = {} if coupling is None else {first.get(n, n): c for n, c in coupling.kept(selection.keep).items()}
    small = program if coupling is None else shrink(program, coupling, selection.keep)
    held = {first.get(name, name): mask for name, mask in existing.items()}
    valued = {first.get(name, name) for name in selection.values}
    read = {first.get(str(n.target)) for n in small.graph.nodes if n.op == "get_attr" and n.users}
    student = Student(small, {}, {}, cuts, {})
    for name in dict.fromkeys(first.values()):
        if name not in read or not program.get_parameter(name).is_floating_point():
            continue
        tensor = small.get_parameter(name).detach()
        if tensor.dim() > 1 and name not in selection.mask and name not in valued and name not in cuts:
            continue
        student.trained[name] = widened(tensor).clone().requires_grad_()
        student.dtypes[name] = tensor.dtype
        mask = selection.mask[name].unpack() if name in selection.mask else held.get(name)
        if mask is not None:
            student.gone[name] = ~slice_tensor(mask.to(tensor.device), cuts.get(name, []))
    if not student.trained:
        raise InputError(
            "cannot train the pruned model",
            where="selection=",
            why="the graph reads no parameter that is pruned, and no bias or norm",
            do="Pass the selection of a plan that prunes weights.",
        )
    student.hold()
    return student


@torch.no_grad()
def whole_values(student: Student, values: Mapping[str, Tensor], program: Program) -> dict[str, Tensor]:
    """Trained values -> tensors of the whole model's shapes; what was cut off stays what it is in `program`."""
    result = {}
    for name, value in values.items():
        whole = program.get_parameter(name).detach().clone()
        places = [torch.arange(size, device=whole.device) for size in whole.shape]
        for dim, indices in student.cuts.get(name, []):
            places[dim] = indices.to(whole.device)
        if name in student.cuts:
            whole[torch.meshgrid(*places, indexing="ij")] = value.to(whole.dtype)
        else:
            whole.copy_(value)
        result[name] = whole
    return result


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype is dtype:
        return tensor
    return tensor + (tensor.detach().to(dtype).to(tensor.dtype) - tensor.detach())


class Tapped(Oracle):
    """Runs a program, in half precision as float32, and remembers what the nodes named in `taps` gave."""

    def __init__(self, program: Program, taps: Collection[str], values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(program, Selection(), wide=torch.float32)
        self.taps, self.values = frozenset(taps), values or {}
        self.tapped: dict[str, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        """The parameter or buffer, or what is trained of it."""
        value = self.values.get(self.canonical.get(target, target))
        return super().fetch_attr(target) if value is None else value

    def run_node(self, n: Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        if n.name in self.taps:
            self.tapped[n.name] = value
        return value

    def forward(self, batch: Batch) -> tuple[dict[str, Any], list[Any]]:
        """One batch -> (node -> its value, flat outputs)."""
        self.tapped = {}
        given = self.run(*batch.copied(), enable_io_processing=False)
        tapped, self.tapped = self.tapped, {}
        return tapped, list(given)
