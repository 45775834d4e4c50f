"""Packed weights of a file are looked at element by element: what a kernel would follow out of its memory is refused.

The originals pass. In each change the checksums are made anew, as somebody would who wants harm.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxprune
from fxprune.errors import FileError
from fxprune.files.container import read, write
from fxprune.files.trust.bits import fault_of_bitmap, fault_of_panels, fault_of_tiles
from fxprune.files.trust.segments import fault_of_segments, first
from fxprune.kernels.native import bitmap, segments, status, tiles
from fxprune.kernels.native.net import SPARE, pack_panels
from tests.files.test_save import MOST, cnn, mlp, transform

Tensors = dict[str, Tensor]


def changed(path: Path, change: Callable[[dict[str, Any], Tensors], Any]) -> Path:
    document, tensors = read(path)
    change(document, tensors)
    write(path, document, tensors)
    return path


def put(name: str, at: int, value: int) -> Callable[[dict[str, Any], Tensors], Any]:
    return lambda _, tensors: tensors[name].view(-1).__setitem__(at, value)


NONZEROS = {
    "a column beyond its block": put("0.weight.columns", 0, 32767),
    "a column that is less than none": put("0.weight.columns", 5, -1),
    "a row beyond its block": put("0.weight.order", 0, 500),
    "a row less than none": put("0.weight.order", 3, -1),
    "more values than the block has": put("0.weight.counts", 0, 30000),
    "fewer than none": put("0.weight.counts", 0, -3),
    "a block that begins elsewhere": put("0.weight.blocks", 5, 1 << 40),
    "more columns": put("0.weight.blocks", 1, 1 << 20),
    "more rows": put("0.weight.blocks", 0, 1 << 20),
    "other blocks of rows": put("0.weight.blocks", 2, 7),
    "other values": lambda _, tensors: tensors.update({"0.weight.values": tensors["0.weight.values"].double()}),
    "fewer values": lambda _, tensors: tensors.update({"0.weight.values": tensors["0.weight.values"][:-1].clone()}),
}
BITMAP = {
    "a bit more": put("0.weight.bits", 0, -1),
    "a bit beyond the columns": put("0.weight.bits", 1, -1),
    "a row that begins elsewhere": put("0.weight.rows", 2, 1 << 40),
    "more columns": put("0.weight.rows", 0, 96),
    "no room to read ahead": lambda _, tensors: tensors.update(
        {"0.weight.values": tensors["0.weight.values"][:-1].clone()}
    ),
}


@pytest.mark.parametrize("layout, name", [("nonzeros", n) for n in NONZEROS] + [("bitmap", n) for n in BITMAP])
def test_a_changed_packed_weight_is_refused(layout: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fxprune.save(transform(mlp(), MOST, (torch.randn(5, 40),), layout=layout), path)
    assert fxprune.load(changed(path, lambda *_: None), progress=False)
    with pytest.raises(FileError, match=r"cannot use a packed weight of the file"):
        fxprune.load(changed(path, (NONZEROS if layout == "nonzeros" else BITMAP)[name]), progress=False)


NET = {
    "a vector that no tap stands at": put("0.in_lanes.columns", 0, -1),
    "a row twice": lambda _, tensors: tensors["0.in_lanes.order"].__setitem__(0, tensors["0.in_lanes.order"][1]),
    "more values": put("0.in_lanes.counts", 2, 999),
    "values of another kind": lambda _, t: t.update({"0.in_lanes.values": t["0.in_lanes.values"].double()}),
    "a block that begins elsewhere": put("0.in_lanes.starts", 1, 1 << 30),
}


@pytest.mark.skipif(not status().available, reason="a net needs the C++ kernels")
@pytest.mark.parametrize("name", NET)
def test_a_changed_net_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fxprune.save(transform(cnn(), MOST, (torch.randn(2, 3, 9, 9),), layout="nonzeros"), path)
    assert fxprune.load(changed(path, lambda *_: None), progress=False)
    with pytest.raises(FileError, match=r"cannot use a packed weight of the file"):
        fxprune.load(changed(path, NET[name]), progress=False)


def test_a_packed_weight_that_another_op_could_write_to_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fxprune.save(transform(mlp(), MOST, (torch.randn(5, 40),), layout="nonzeros"), path)

    def write_to_columns(document: dict[str, Any], _: Tensors) -> None:
        nodes = document["graph"]["nodes"]
        place = next(place for place, node in enumerate(nodes) if node[2] == "0.weight.columns")
        # An op at the end, where it moves no other node's place.
        nodes.insert(-1, ["call_function", "grow", "aten.add_.Tensor", {"tuple": [{"node": place}, 100]}, {"dict": []}])

    with pytest.raises(FileError, match=r"node grow.*reads.*columns"):
        fxprune.load(changed(path, write_to_columns), progress=False)

    fxprune.save(transform(mlp(), MOST, (torch.randn(5, 40),), layout="nonzeros"), path)

    def compute_columns(document: dict[str, Any], _: Tensors) -> None:
        nodes = document["graph"]["nodes"]
        call = next(node for node in nodes if node[2] == "fxprune.nonzeros_linear.default")
        call[3]["tuple"][2] = {"node": 0}

    with pytest.raises(FileError, match=r"columns is computed"):
        fxprune.load(changed(path, compute_columns), progress=False)


SIZES = st.tuples(st.integers(1, 70), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99))


def drawn(o: int, i: int, density: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=generator)
    return torch.where(torch.rand(o, i, generator=generator) < density, weight, 0.0).to(dtype)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(1, 40))
def test_what_is_packed_into_segments_has_no_fault(sizes: tuple[int, int, float, int], rows: int, k: int) -> None:
    o, i, *_ = sizes
    packed, k_blocks = segments.pack(drawn(*sizes), rows, k), -(-i // k)
    whole, last = first(k), first(i - (k_blocks - 1) * k)
    assert fault_of_segments(packed, o, rows, k_blocks, whole, last) == ""
    if packed.columns.numel():
        wrong = packed.columns.clone()
        wrong[-1] = k
        assert fault_of_segments(packed._replace(columns=wrong), o, rows, k_blocks, whole, last)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 10**6))
def test_one_bit_more_is_a_fault_of_every_format_of_bits(sizes: tuple[int, int, float, int], where: int) -> None:
    weight = drawn(*sizes, torch.bfloat16)
    o, i = weight.shape
    rowwise = bitmap.pack(weight)
    assert fault_of_bitmap(*rowwise) == ""
    assert fault_of_bitmap(_with_another_bit(rowwise.bits, where), *rowwise[1:])
    tiled = tiles.pack(weight)
    assert fault_of_tiles(*tiled) == ""
    if tiled.bits.numel():
        assert fault_of_tiles(tiled.values, _with_another_bit(tiled.bits, where), *tiled[2:])
    panels = pack_panels(weight)
    count = int(panels.starts[-1])
    ask = (panels.starts, o, i, count, count + SPARE)
    assert fault_of_panels(panels.words, *ask) == ""
    assert fault_of_panels(_with_another_bit(panels.words, where), *ask)
    assert fault_of_panels(panels.words, panels.starts, o, i, count, count + SPARE - 1)


def _with_another_bit(words: Tensor, where: int) -> Tensor:
    other = words.clone()
    flat = other.view(-1).view(torch.uint8)
    flat[where % flat.numel()] ^= 1 << (where % 8)
    return other
