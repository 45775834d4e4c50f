"""analyze: the groups of a model that shrink together, before anything is done to it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from . import admit
from .capture import capture
from .couple import couple
from .coupling import Coupling


def analyze(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Coupling:
    """The groups of axes that keep the same indices: members, size, what is frozen and why. Prints as a table.

    `.why("encoder.q.weight", 0)` walks the ties from a dimension of a parameter to what froze it. The model is only
    traced, never run: it may be on the meta device, in which case the example inputs are taken there too. Raises
    InputError or CaptureError.
    """
    args, keywords = admit.admit_call(model, example_inputs, kwargs)
    if isinstance(model, nn.Module) and any(p.is_meta for p in model.parameters()):
        args, keywords = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, keywords))
    with admit.untouched(model) if isinstance(model, nn.Module) else contextlib.nullcontext(), torch.no_grad():
        return couple(capture(model, args, keywords, dynamic_shapes).program)
