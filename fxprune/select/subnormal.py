"""subnormal: numbers below the least normal one, which weights that decayed end in, taken as zeros.

A processor takes some hundred cycles for each, so that a model with them is slower than with any other numbers, and
they keep channels alive that compute nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.graph.program import Program, copy_program, names_of_parameters, replace_parameter

from .mask import chunks

# Not float16: it is subnormal below 6e-5, where ordinary small weights are.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def count_subnormal(tensor: Tensor, *, hidden: bool) -> int:
    """How many elements are subnormal. With `hidden` none are, unless the largest element is so large that rounding it
    outweighs them: then no sum with it tells them from zeros.
    """
    if tensor.dtype not in _DTYPES:
        return 0
    info = torch.finfo(tensor.dtype)
    found = sum(int(((piece.abs() < info.tiny) & (piece != 0)).sum()) for piece in chunks(tensor))
    if not found or not hidden:
        return found
    largest = max(float(piece.abs().max()) for piece in chunks(tensor))
    return found if largest * info.eps >= info.tiny else 0


def flush(tensor: Tensor) -> Tensor:
    """A copy with +0.0 in place of what is below the least normal number of its dtype."""
    return torch.where(tensor.abs() < torch.finfo(tensor.dtype).tiny, tensor.new_zeros(()), tensor)


def flush_hidden(tensor: Tensor) -> Tensor:
    """The tensor, with zeros in place of subnormal elements that the others hide."""
    return flush(tensor) if count_subnormal(tensor, hidden=True) else tensor


def flush_parameters(program: Program, *, hidden: bool) -> tuple[Program, dict[str, int]]:
    """A copy with zeros in place of the subnormal elements of its parameters, and how many each had.

    The program itself where it has none. With `hidden` only those that the other elements of a parameter hide.
    """
    names = names_of_parameters(program)
    parameters = {name: program.get_parameter(name).detach() for name in dict.fromkeys(names.values())}
    found = {name: count_subnormal(tensor, hidden=hidden) for name, tensor in parameters.items()}
    found = {name: count for name, count in found.items() if count}
    if not found:
        return program, found
    result = copy_program(program)
    for name in found:
        replace_parameter(result, [n for n, first in names.items() if first == name], flush(parameters[name]))
    return result, found
