"""A weight as the matrix that its products are: rows are outputs, columns are inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def to_matrix(weight: Tensor, inputs: int = 1) -> Tensor:
    """weight (2-D or more) -> matrix [o, n], whose rows are the weight's first dimension besides `inputs`.

    `inputs` is the dimension that products sum over. The columns run over all other dimensions and then over it, so
    every run of shape[inputs] columns is one position of a kernel, and neighbours in it are neighbouring channels. A
    linear [o, i] is itself, one stored as [i, o] (inputs=0) is its transpose, and a convolution [o, i, *k] has columns
    (*k, i). The result is a view wherever one exists. Raises ValueError for fewer dimensions, and for `inputs` that is
    none of them.
    """
    return weight.movedim(_dim(weight.shape, inputs), -1).flatten(1)


def from_matrix(matrix: Tensor, shape: Sequence[int], inputs: int = 1) -> Tensor:
    """matrix [o, n] -> the weight of `shape` that `to_matrix` reads as this matrix, as a view wherever one exists.

    Raises ValueError as `to_matrix` does, and for a matrix that is not that of such a weight.
    """
    dim = _dim(shape, inputs)
    rest = [size for other, size in enumerate(shape) if other != dim]
    if list(matrix.shape) != matrix_shape(shape, dim):
        raise ValueError(f"a matrix {list(matrix.shape)} is no weight {list(shape)} with inputs in dimension {dim}")
    return matrix.reshape(*rest, shape[dim]).movedim(-1, dim)


def matrix_shape(shape: Sequence[int], inputs: int = 1) -> list[int]:
    """The shape [o, n] of `to_matrix`, from the weight's shape alone. Raises ValueError as `to_matrix` does."""
    dim = _dim(shape, inputs)
    rows, *others = (size for other, size in enumerate(shape) if other != dim)
    columns = shape[dim]
    for size in others:
        columns *= size
    return [rows, columns]


def _dim(shape: Sequence[int], inputs: int) -> int:
    if len(shape) < 2:
        raise ValueError(f"a weight of shape {list(shape)} is no matrix: it has fewer than 2 dimensions")
    if not -len(shape) <= inputs < len(shape):
        raise ValueError(f"a weight of shape {list(shape)} has no dimension {inputs}")
    return inputs % len(shape)
