"""What a report says of runtimes follows the form of the result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Channels, Plan, Rule, Unstructured
from fxprune.emit.runtimes import runtimes_of


def test_what_is_smaller_is_faster_everywhere() -> None:
    found = runtimes_of(shrunk=True, layouts=["dense"])
    assert all(row.faster for row in found) and "your own class" in str(found)


@pytest.mark.parametrize("layout", ["nonzeros", "bitmap", "tiles"])
def test_zeros_are_faster_where_there_are_kernels_for_them(layout: str) -> None:
    found = runtimes_of(shrunk=False, layouts=["dense", layout])
    for name, faster in {"fxprune": True, "AOTInductor": True, "onnxruntime": False, "OpenVINO": False}.items():
        assert found[name].faster is faster
    assert layout in found["fxprune"].why and "multiplied" in found["onnxruntime"].why
    with pytest.raises(KeyError):
        found["your own class"]


def test_two_of_four_are_said_to_be_what_tensorrt_takes_and_no_package_does() -> None:
    found = runtimes_of(shrunk=False, layouts=["semi24"])
    assert found["TensorRT"].faster and not found["TensorRT"].tested
    assert found["AOTInductor"].faster is False and "Triton" in found["AOTInductor"].why


def test_nothing_is_promised_of_a_model_that_lost_nothing() -> None:
    assert all(row.faster is None for row in runtimes_of(shrunk=False, layouts=[]))


def test_a_report_has_the_runtimes_of_its_own_form() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    quick = {"options": {"compile": False, "measure": False}, "progress": False}
    x = torch.randn(3, 32)
    shrunk = fxprune.transform(model, Plan([Rule("*", Channels(0.5))]), (x,), **quick)
    assert shrunk.report.runtimes["onnxruntime"].faster
    quick["options"]["layout"] = "bitmap"  # pyright: ignore
    packed = fxprune.transform(model, Plan([Rule("2.weight", Unstructured(0.5))]), (x,), **quick)
    assert packed.report.runtimes["onnxruntime"].faster is False
