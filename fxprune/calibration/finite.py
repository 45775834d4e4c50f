"""finite: what is refused where numbers are NaN or infinite."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from fxprune.errors import InputError

from .batches import Batch


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(tensor.isfinite().all())


def refuse_activations(name: str, node: Node, whose: str, batch: Batch, values: Tensor) -> InputError:
    """The error for a weight `name` where its inputs or outputs (`values`) in one of the models are not finite."""
    marked = ~values.isfinite()
    if batch.valid is not None and values.shape[:-1] == batch.valid.shape:
        marked &= batch.valid.unsqueeze(-1)
    if whose == "dense":
        do = "Look at this batch with the model itself: its own activations are not finite."
    else:
        do = "Give more data, prune less of the layers before it, or leave this weight out."
    return InputError(
        "cannot calibrate a weight",
        where=f'"{name}" (node {node.name})',
        why=f"the {whose} model's activations there are NaN or infinite in {batch.label_of(marked)}",
        do=do,
    )


def check_squares(name: str, *sums: Tensor) -> None:
    """Raises InputError where sums of squares of finite inputs are not finite, in float32 in which they are used."""
    if not all(is_finite(each.float()) for each in sums):
        raise InputError(
            "cannot calibrate a weight",
            where=f'"{name}"',
            why="its inputs are so large that their squares are not finite",
            do="Scale the inputs, or leave this weight out.",
        )
