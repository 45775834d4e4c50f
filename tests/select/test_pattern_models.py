"""Rows, groups and tiles in whole models: transposed layers, tables, convolutions of every kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune import Blocks, Plan, Rule, SemiStructured, Unstructured
from fxprune.errors import PlanError
from fxprune.plan.matrix import to_matrix
from fxprune.plan.plan import Sparsity
from tests.oracle import assert_close, snapshot, zeroed
from tests.select.pattern_case import random, refused

EAGER: dict[str, Any] = {"measure": False, "compile": False}


def tiles_of(weight: Tensor, r: int, c: int, inputs: int = 1) -> Tensor:
    """[tiles, r c] in flat order of the tiles."""
    matrix = to_matrix(weight, inputs)
    blocks = [tile for band in matrix.split(r) for tile in band.split(c, dim=1)]
    return torch.stack([block.flatten() for block in blocks])


class Turned(nn.Module):
    """x [..., i] @ weight [i, o] + bias, as GPT-2 stores its layers."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(i, o, seed=i))
        self.bias = nn.Parameter(random(o))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Words(nn.Module):
    """A table, a layer stored as [i, o], one as [o, i] and an odd head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 24)
        self.up = Turned(24, 32)
        self.down = nn.Linear(32, 24)
        self.head = nn.Linear(24, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(self.table(ids)))))


class Tied(Words):
    """The same, whose table is its head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 20, bias=False)
        self.head.weight = self.table.weight


class Net(nn.Module):
    """A convolution, a grouped one, a transposed one and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2)
        self.turned = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(self.turned(torch.relu(self.grouped(torch.relu(self.first(x))))))


IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def transformed(model: nn.Module, x: Tensor, sparsity: Sparsity, *names: str, scope: str = "local") -> Any:
    """Pruned where the names say, or all but embeddings."""
    model.eval()
    before = snapshot(model)
    plan = Plan([Rule(name, sparsity, scope) for name in names or ("*weight",)])
    result = fxprune.transform(model, plan, (x,), options=EAGER, progress=False)
    assert snapshot(model) == before
    with torch.no_grad():
        assert_close(result(x), zeroed(model, result)(x))
    return result


def test_a_model_with_a_turned_weight() -> None:
    torch.manual_seed(0)
    result = transformed(Words(), IDS, SemiStructured())
    masks = result.selection.mask
    assert set(masks) == {"up.weight", "down.weight", "head.weight"}
    assert bool((masks["up.weight"].unpack().view(6, 4, 32).sum(1) == 2).all())
    assert bool((masks["down.weight"].unpack().view(24, 8, 4).sum(2) == 2).all())
    assert result.selection.asked == dict.fromkeys(masks, 0.5)
    notes = "\n".join(result.report.notes)
    assert "table.weight" in notes and "looked up" in notes

    result = transformed(Words(), IDS, Blocks(0.5, (16, 12)))
    tiles = tiles_of(result.selection.mask["up.weight"].unpack(), 16, 12, inputs=0)
    assert sorted(tiles.sum(1).tolist()) == [0, 0, 192, 192]
    notes = "\n".join(result.report.notes)
    assert "its 24 outputs are no multiple of 16" in notes and "its 7 outputs are no multiple of 16" in notes


def test_rows_of_a_turned_weight_and_of_a_table() -> None:
    result = transformed(Words(), IDS, Unstructured(0.75, per_row=True), "*weight", "table.weight")
    masks = {name: mask.unpack() for name, mask in result.selection.mask.items()}
    assert bool((masks["up.weight"].sum(0) == 6).all()) and bool((masks["down.weight"].sum(1) == 8).all())
    assert bool((masks["table.weight"].sum(1) == 6).all()) and bool((masks["head.weight"].sum(1) == 6).all())


def test_a_table_that_is_also_a_head_multiplies() -> None:
    result = transformed(Tied(), IDS, SemiStructured(), "table.weight")
    keep = result.selection.mask["table.weight"].unpack()
    assert bool((keep.view(20, 6, 4).sum(2) == 2).all())


def test_convolutions() -> None:
    torch.manual_seed(0)
    x = random(2, 8, 6, 6)
    result = transformed(Net(), x, SemiStructured())
    masks = {name: mask.unpack() for name, mask in result.selection.mask.items()}
    assert set(masks) == {"first.weight", "grouped.weight", "turned.weight"}
    assert bool((masks["first.weight"].view(16, 2, 4, 3, 3).sum(2) == 2).all())
    assert bool((masks["grouped.weight"].view(16, 2, 4, 3, 3).sum(2) == 2).all())
    assert bool((masks["turned.weight"].view(4, 4, 12, 2, 2).sum(1) == 2).all())
    assert "depthwise.weight" in "\n".join(result.report.notes)

    result = transformed(Net(), x, Blocks(0.5, (4, 4)), scope="global")
    masks = {name: mask.unpack() for name, mask in result.selection.mask.items()}
    tiles = torch.cat([tiles_of(m, 4, 4, int(name != "turned.weight")) for name, m in masks.items()])
    assert set(tiles.sum(1).tolist()) == {0, 16} and int((tiles.sum(1) == 0).sum()) == round(0.5 * len(tiles))

    result = transformed(Net(), x, Unstructured(0.5, per_row=True))
    assert bool((result.selection.mask["depthwise.weight"].unpack().flatten(1).sum(1) >= 4).all())


class General(nn.Module):
    """A convolution under the name that all kinds share."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(random(8, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.convolution(x, self.weight, None, [1], [0], [1], self.transposed, [0], 1)


def test_a_convolution_by_its_general_name() -> None:
    """[8, 4, 3] has 8 inputs where it is transposed, and 4 where it is not."""
    turned = transformed(General(True), random(2, 8, 5), SemiStructured(1, 8)).selection.mask["weight"].unpack()
    assert bool((turned.sum(0) == 1).all())
    plain = transformed(General(False), random(2, 4, 5), SemiStructured(1, 4)).selection.mask["weight"].unpack()
    assert bool((plain.sum(1) == 1).all())


def test_errors_through_transform() -> None:
    plan = Plan([Rule("head.weight", Blocks(0.5, (8, 8)))])
    refused(
        PlanError, lambda: fxprune.transform(Words().eval(), plan, (IDS,), options=EAGER), "[7, 24]", "its 7 outputs"
    )
    plan = Plan([Rule("table.weight", SemiStructured())])
    refused(PlanError, lambda: fxprune.transform(Words().eval(), plan, (IDS,), options=EAGER), "[20, 24]", "looked up")
    # without inputs only the names are known
    pending = fxprune.transform(Words().eval(), Plan([Rule("up.weight", Blocks(0.5, (16, 12)))]), options=EAGER)
    assert pending(IDS).shape == (2, 4, 7)
