"""Weights that a model's own code multiplies by constant masks: captured as weights with zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fxprune
from fxprune import Existing, Plan, Rule, Unstructured
from fxprune.capture.capture import capture

x = torch.randn(3, 8)


class Masked(nn.Module):
    """A linear layer whose weight `product` masks."""

    def __init__(self, product: Callable[[Any], Tensor], mask: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.head = nn.Linear(6, 4)
        self.register_buffer("mask", torch.rand(6, 8) < 0.4 if mask is None else mask)
        self.other = nn.Buffer(torch.rand(6, 8) < 0.4)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.product(self)))


ROWS = torch.tensor([1.0, 0, 1, 1, 0, 1]).unsqueeze(1)
FOLDED: dict[str, tuple[Callable[[Any], Tensor], Tensor | None]] = {
    "bool": (lambda m: m.weight * m.mask, None),
    "mask first": (lambda m: m.mask * m.weight, None),
    "float": (lambda m: m.weight * m.mask.to(m.weight.dtype), None),
    "integers": (lambda m: m.weight * m.mask, torch.arange(48).view(6, 8) % 2),
    "rows": (lambda m: m.weight * m.mask, ROWS),
    "two masks": (lambda m: m.weight * (m.mask & m.other), None),
    "made in place": (lambda m: m.weight * (torch.arange(8) % 3 == 0), None),
    "written out": (lambda m: m.weight * torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0]), None),
    "nothing kept": (lambda m: m.weight * m.mask, torch.zeros(6, 8)),
}


def written_in_place(m: Any) -> Tensor:
    product = m.weight * m.mask
    product.mul_(2.0)
    return product


def written_through_a_view(m: Any) -> Tensor:
    product = m.weight * m.mask
    product[0] = product[0] * 2
    return product


def mask_written_later(m: Any) -> Tensor:
    mask = torch.zeros(6, 8)
    mask[:, 4:] = 1
    return m.weight * mask


def copy_written_later(m: Any) -> Tensor:
    mask = m.mask.float().clone()
    mask[0] = 1
    return m.weight * mask


LEFT: dict[str, tuple[Callable[[Any], Tensor], Tensor | None]] = {
    "no zeros": (lambda m: m.weight * m.mask, torch.ones(6, 8)),
    "other factors": (lambda m: m.weight * m.mask, torch.full((6, 8), 0.5)),
    "read without it": (lambda m: m.weight * m.mask + 0.1 * m.weight, None),
    "another mask": (lambda m: m.weight * m.mask + m.weight * m.other, None),
    "wider": (lambda m: m.weight.sum(0) * m.mask, None),
    "a gate": (lambda m: m.weight * m.mask, torch.zeros(())),
    "written in place": (written_in_place, None),
    "written through a view": (written_through_a_view, None),
    "mask written later": (mask_written_later, None),
    "copy written later": (copy_written_later, None),
    "double": (lambda m: (m.weight * m.mask).float(), (torch.arange(48).view(6, 8) % 2).double()),
}


@pytest.mark.parametrize("case", FOLDED)
def test_masks_are_folded(case: str) -> None:
    model = Masked(*FOLDED[case]).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected, wanted = model(x).detach(), model.product(model).detach()
    captured = capture(model, (x,), {})
    kept = captured.existing["weight"]
    assert torch.equal(captured.program.get_parameter("weight"), wanted + 0.0)
    assert torch.equal(kept, (wanted != 0)) and not any(
        n.startswith("mask") for n, _ in captured.program.named_buffers()
    )
    assert [n.target for n in captured.program.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.linear.default
    ] * 2
    # It is read as any weight that was pruned, under its own name.
    fast = fxprune.transform(
        model,
        Plan([Rule("weight", Existing()), Rule("head.weight", Unstructured(0.5))]),
        (x,),
        options={"compile": False, "layout": "nonzeros"},
        progress=False,
    )
    # Rows of zeros leave as a whole, and nothing is left to be packed.
    packed = {"head.weight"} if case == "rows" else {"weight", "head.weight"}
    assert {row.name: row.layout for row in fast.report.weights} == dict.fromkeys(packed, "nonzeros")
    assert any(note.endswith("constant masks in the model: 1") for note in fast.report.notes)
    plain = fxprune.transform(model, None, (x,), options={"compile": False}, progress=False)
    torch.testing.assert_close(plain(x), expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    exported = torch.export.export(model, (x,))
    assert torch.equal(capture(exported, (x,), {}).existing["weight"], kept)


@pytest.mark.parametrize("case", LEFT)
def test_what_is_no_mask_or_not_only_one_is_left(case: str) -> None:
    model = Masked(*LEFT[case]).eval()
    captured = capture(model, (x.to(model.product(model).dtype),), {})
    assert captured.existing == {} and captured.program.get_parameter("weight") is model.weight
    fast = fxprune.transform(model, None, (x,), options={"compile": False}, progress=False)
    torch.testing.assert_close(fast(x), model(x).detach())


def test_a_weight_that_is_handed_out_is_left() -> None:
    class Handing(Masked):
        def forward(self, x: Tensor) -> Any:
            product = self.product(self)
            return self.head(F.linear(x, product)), product.T

    model = Handing(*FOLDED["bool"]).eval()
    assert capture(model, (x,), {}).existing == {}
    fast = fxprune.transform(model, None, (x,), options={"compile": False}, progress=False)
    first, handed = fast(x)
    handed.mul_(0)
    assert torch.equal(fast(x)[0], first)


def test_a_mask_that_trains_is_left() -> None:
    model = Masked(lambda m: m.weight * m.gate).eval()
    model.gate = nn.Parameter(torch.cat([torch.zeros(3, 8), torch.ones(3, 8)]))
    assert capture(model, (x,), {}).existing == {}
    model.gate.requires_grad_(False)
    assert capture(model, (x,), {}).existing.keys() == {"weight"}


def test_zeros_of_a_hook_and_of_a_mask_are_both_there() -> None:
    model = Masked(*FOLDED["bool"]).eval()
    prune.l1_unstructured(model, "weight", 0.5)
    both = (model.weight_mask != 0) & model.mask
    captured = capture(model, (x,), {})
    assert torch.equal(captured.existing["weight"], both)
    assert torch.equal(captured.program.get_parameter("weight") != 0, both)


def test_a_model_without_values_is_analysed() -> None:
    with torch.device("meta"):
        model = Masked(*FOLDED["bool"]).eval()
        assert fxprune.analyze(model, (torch.empty(3, 8),))


def test_a_fixed_size_is_still_told() -> None:
    class Fixed(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(3, 8))

    model = Fixed(*FOLDED["bool"]).eval()
    notes = capture(model, (x,), {}).notes
    assert any("constant masks" in note for note in notes) and any("dim 0" in note for note in notes)


def test_a_mask_that_hides_no_number_is_left() -> None:
    model = Masked(lambda m: m.weight * m.mask, torch.tensor([1.0, 0] * 24).view(6, 8)).eval()
    with torch.no_grad():
        model.weight[0, 1] = torch.inf
    assert capture(model, (x,), {}).existing == {}


def test_masks_that_depend_on_inputs_are_left() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * (x.sum() > 0))

    model = Gated().eval()
    captured = capture(model, (x,), {})
    assert captured.existing == {} and captured.program.get_parameter("weight") is model.weight


def test_tied_weights_are_masked_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.mask = nn.Buffer(torch.rand(8, 8) < 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.a.weight * self.mask, self.a.bias)
            return F.linear(y, self.b.weight * self.mask, self.b.bias)

    model = Tied().eval()
    captured = capture(model, (x,), {})
    assert captured.existing.keys() == {"a.weight", "b.weight"}
    assert captured.program.get_parameter("a.weight") is captured.program.get_parameter("b.weight")
    fast = fxprune.transform(
        model, Plan([Rule("*", Existing())]), (x,), options={"compile": False, "layout": "nonzeros"}, progress=False
    )
    torch.testing.assert_close(fast(x), model(x).detach())
    assert "nonzeros" in {row.layout for row in fast.report.weights}
