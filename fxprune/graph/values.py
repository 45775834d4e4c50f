"""values: new tensors in place of a program's own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .program import Program, copy_program, names_of_parameters, owner, replace_parameter


def put_values(program: Program, values: Mapping[str, Tensor]) -> Program:
    """A copy of the program with these values (parameters and buffers by name) in place of its own.

    They are copied, so that the program shares no storage with them. A tied parameter has its value under all of its
    names. Names that the program lacks, such as those of blocks that were dropped, are passed over.
    """
    if not values:
        return program
    result = copy_program(program)
    canonical = names_of_parameters(result)
    buffers = dict(result.named_buffers())
    for name, value in values.items():
        names = [alias for alias, first in canonical.items() if first == canonical.get(name)]
        if names:
            replace_parameter(result, names, value.to(result.get_parameter(name).device, copy=True))
        elif name in buffers:
            module, leaf = owner(result, name)
            module._buffers[leaf] = value.to(buffers[name].device, copy=True)
    return result
