"""What calibration sums up: the rows that a convolution reads, held against torch's own, and moments over batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fxprune.calibration.moments import Inputs, Outputs
from fxprune.calibration.unfold import Windows, windows_of
from fxprune.plan.matrix import to_matrix

aten = torch.ops.aten
CONVS = {1: (aten.conv1d, functional.conv1d), 2: (aten.conv2d, functional.conv2d), 3: (aten.conv3d, functional.conv3d)}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[int, dict, tuple[int, ...], tuple[int, ...], bool, bool]:
    """(dimensions, arguments, shape of the input, shape of the weight, channels last, without a batch)."""
    dims = draw(st.integers(1, 3))
    each = lambda low, high: st.lists(st.integers(low, high), min_size=dims, max_size=dims)  # noqa: E731
    kernel, dilation = draw(each(1, 3)), draw(each(1, 2))
    same = draw(st.sampled_from(["", "", "same", "valid"]))
    stride = [1] * dims if same == "same" else draw(each(1, 3))
    padding = same or draw(each(0, 2))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    if draw(st.booleans()):
        inputs = 1  # depthwise where there are groups
    sizes = [d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True)]
    batch = draw(st.integers(1, 3))
    given_ = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (
        dims,
        given_,
        (batch, groups * inputs, *sizes),
        (groups * outputs, inputs, *kernel),
        draw(st.booleans()) and dims > 1,
        draw(st.booleans()) and batch == 1,
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_rows_times_the_matrix_are_the_convolution(case: tuple) -> None:
    dims, arguments, x_shape, w_shape, last, alone = case
    x, weight = torch.randn(x_shape, dtype=torch.float64), torch.randn(w_shape, dtype=torch.float64)
    if last:
        x = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    x = x[0] if alone else x
    expected = CONVS[dims][1](x, weight, **arguments)
    op = CONVS[dims][0].padding if isinstance(arguments["padding"], str) else CONVS[dims][0].default
    windows = windows_of(op, (x, weight, None), arguments, w_shape)
    assert windows is not None
    groups = arguments["groups"]
    rows = windows.rows(x)
    matrix = to_matrix(weight).reshape(groups, w_shape[0] // groups, -1)
    assert rows.shape[0] == groups and rows.shape[2] == matrix.shape[2]
    torch.testing.assert_close(rows @ matrix.mT, windows.out(expected))


def test_windows_of_other_calls() -> None:
    shape = (4, 2, 3, 3)
    by_place = (None, None, None, [2, 1], [1, 0], [1, 2], False, [0, 0], 2)
    found = windows_of(aten.convolution.default, by_place, {}, shape)
    assert found == Windows((3, 3), (2, 1), ((1, 1), (0, 0)), (1, 2), 2)
    assert windows_of(aten.convolution.default, (*by_place[:6], True, [0, 0], 2), {}, shape) is None
    plain = windows_of(aten.conv2d.default, (None, None), {}, shape)
    assert plain == Windows((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    one = windows_of(aten.conv2d.default, (None, None, None, [2], [1]), {}, shape)
    assert one == Windows((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1)


# --- moments -----------------------------------------------------------------------------------------------------


def summed(x: Tensor, y: Tensor, cuts: list[int], *, centred: bool) -> tuple[Inputs, Outputs]:
    inputs, outputs = Inputs(centred=centred), Outputs()
    for a, b in zip(x.split(cuts, 1), y.split(cuts, 1), strict=True):
        outputs.add(b, inputs.add(a), inputs)
    return inputs, outputs


def moments_at_once(x: Tensor, y: Tensor, *, centred: bool) -> dict[str, Tensor]:
    x, y = x.double(), y.double()
    found = {"x": x.mean(1), "y": y.mean(1)}
    if centred:
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return {**found, "gram": x.mT @ x, "cross": y.mT @ x, "squares": y.square().sum(1)}


def close(found: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < limit


CUTS = [[200], [50] * 4, [1] * 200, [3, 0, 150, 47], [0, 1, 0, 199]]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_do_not_depend_on_the_cut(cuts: list[int], centred: bool, offset: float) -> None:
    x = torch.randn(2, 200, 7) @ torch.randn(2, 7, 7) + offset
    y = torch.randn(2, 200, 3) - 2 * offset + x[..., :3]
    inputs, outputs = summed(x, y, cuts, centred=centred)
    expected = moments_at_once(x, y, centred=centred)
    assert inputs.count == 200
    close(inputs.mean, expected["x"], 1e-6)
    close(outputs.mean(inputs), expected["y"], 1e-6)
    close(inputs.centred_gram(), expected["gram"])
    close(outputs.centred_cross(inputs), expected["cross"])
    close(outputs.centred_squares(inputs), expected["squares"])


def test_wide_inputs_of_half_types_and_many_rows() -> None:
    x, y = torch.randn(1, 5000, 4).bfloat16(), torch.randn(1, 5000, 2).bfloat16()
    inputs, outputs = summed(x, y, [1000] * 5, centred=True)
    expected = moments_at_once(x, y, centred=True)
    assert inputs.gram is not None and inputs.gram.dtype is torch.float64
    close(inputs.centred_gram(), expected["gram"])
    assert outputs.centred_cross(inputs).shape == (1, 2, 4)


def test_no_rows_at_all() -> None:
    inputs, outputs = summed(torch.zeros(1, 0, 4), torch.zeros(1, 0, 2), [0], centred=True)
    assert inputs.count == 0
    assert bool(inputs.centred_gram().eq(0).all()) and bool(outputs.centred_cross(inputs).eq(0).all())
