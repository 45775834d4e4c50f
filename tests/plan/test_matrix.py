"""A weight as a matrix: which element stands where, and back again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.plan.matrix import from_matrix, matrix_shape, to_matrix

shapes = st.lists(st.integers(0, 4), min_size=2, max_size=5)


def numbered(shape: list[int]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


@settings(deadline=None, max_examples=150)
@given(shape=shapes, data=st.data(), dtype=st.sampled_from([torch.float32, torch.bool, torch.float16]))
def test_there_and_back(shape: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    inputs = data.draw(st.integers(-len(shape), len(shape) - 1))
    weight = (numbered(shape) % 3 if dtype is torch.bool else numbered(shape)).to(dtype)
    matrix = to_matrix(weight, inputs)
    assert list(matrix.shape) == matrix_shape(shape, inputs)
    back = from_matrix(matrix, shape, inputs)
    assert back.dtype is dtype and back.shape == weight.shape and torch.equal(back, weight)


@settings(deadline=None, max_examples=150)
@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=5), data=st.data())
def test_where_each_element_stands(shape: list[int], data: st.DataObject) -> None:
    """Column = position in the other dimensions, in order, times the inputs, plus the input."""
    inputs = data.draw(st.integers(0, len(shape) - 1))
    weight = numbered(shape)
    matrix = to_matrix(weight, inputs)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        rest = [(at, size) for dim, (at, size) in enumerate(zip(index, shape, strict=True)) if dim != inputs]
        column = 0
        for at, size in rest[1:]:
            column = column * size + at
        column = column * shape[inputs] + index[inputs]
        assert matrix[rest[0][0], column] == weight[tuple(index)]


def test_linears_are_views() -> None:
    weight = torch.randn(3, 5)
    same, turned = to_matrix(weight), to_matrix(weight, 0)
    assert same.data_ptr() == turned.data_ptr() == weight.data_ptr()
    assert torch.equal(same, weight) and torch.equal(turned, weight.t())
    assert from_matrix(turned, weight.shape, 0).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_multiplies_by_its_matrix(groups: int) -> None:
    conv = nn.Conv2d(4, 6, (2, 3), groups=groups, bias=False).double()
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    matrix = to_matrix(conv.weight.detach()).view(groups, 6 // groups, -1)
    patch = x[0].view(groups, 4 // groups, 2, 3).permute(0, 2, 3, 1).reshape(groups, -1, 1)  # channel fastest
    torch.testing.assert_close(torch.bmm(matrix, patch).flatten(), conv(x).detach().flatten())


def test_a_transposed_convolution_has_its_inputs_first() -> None:
    weight = torch.randn(4, 6, 3, dtype=torch.float64)  # [i, o, k]
    x = torch.randn(4, dtype=torch.float64)
    out = F.conv_transpose1d(x.view(1, 4, 1), weight)[0]  # [o, k]: one input spreads over the kernel
    assert torch.allclose(to_matrix(weight, 0).view(6, 3, 4) @ x, out)


def test_what_is_no_matrix() -> None:
    for shape in ([], [3]):
        with pytest.raises(ValueError, match="fewer than 2"):
            to_matrix(torch.zeros(shape))
        with pytest.raises(ValueError, match="fewer than 2"):
            from_matrix(torch.zeros(1, 3), shape)
    for inputs in (2, -3):
        with pytest.raises(ValueError, match=f"no dimension {inputs}"):
            to_matrix(torch.zeros(3, 4), inputs)
    with pytest.raises(ValueError, match=r"\[4, 3\].*\[3, 4\]"):
        from_matrix(torch.zeros(4, 3), [3, 4])
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        from_matrix(torch.zeros(3, 4), [3, 4], 0)
