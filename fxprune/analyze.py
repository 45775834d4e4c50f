"""analyze: the groups of a model that shrink together, before anything is done to it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxprune.capture.capture import capture
from fxprune.check.calls import Call
from fxprune.couple.couple import couple
from fxprune.couple.coupling import Coupling

from .capture import admit
from .errors import CaptureError
from .graph.computed import fold_weights


def analyze(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Coupling:
    """The groups of axes that keep the same indices: members, size, what is frozen and why. Prints as a table.

    `.why("encoder.q.weight", 0)` walks the ties from a dimension of a parameter to what froze it. The model is only
    traced, and run only where that fails, to tell why. It may be on the meta device, in which case the example inputs
    are taken there too. Raises InputError or CaptureError.
    """
    args, keywords = admit.admit_call(model, example_inputs, kwargs)
    if not isinstance(model, nn.Module) or not any(p.is_meta for p in model.parameters()):
        admit.admit_model(model)
    else:
        # All else that admit_model asks is about values.
        if model.training and not isinstance(model, torch.fx.GraphModule):
            raise admit.in_training("analyze", type(model).__name__)
        args, keywords = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, keywords))
    example = Call("example", args, keywords)
    with admit.untouched(model) if isinstance(model, nn.Module) else contextlib.nullcontext(), torch.no_grad():
        try:
            program = capture(model, args, keywords, dynamic_shapes).program
        except CaptureError:
            # Where the model itself refuses the call, the call is at fault and no line of the model.
            admit.run_model(model, *example.copy())
            raise
        # As in a result for inference, which computes weights once.
        return couple(fold_weights(program)[0])
