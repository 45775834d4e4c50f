"""Lowering: which uses of a weight can be packed, the activation that goes along, and the sizes tuned for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.capture.capture import capture
from fxprune.lower.layouts import choose
from fxprune.lower.layouts.choose import Chooser
from fxprune.lower.layouts.site import Choice, Packed, Site
from fxprune.lower.lower import batches, lower
from tests.oracle import assert_close


class Of(nn.Module):
    def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(16, 24), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear, x)


class Watching(Chooser):
    """Packs whatever fits, and remembers the sites it was asked about."""

    def __init__(self) -> None:
        super().__init__(only="nonzeros")
        self.sites: list[Site] = []

    def choose(self, site: Site) -> tuple[Choice, Packed | None]:
        self.sites.append(site)
        return super().choose(site)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_with_one_reader_goes_into_the_kernel(name: str) -> None:
    model, x = Of(lambda f, x: ACTIVATIONS[name](f(x)) + 1).eval(), torch.randn(5, 16)
    program = capture(model, (x,), {}).program
    chooser = Watching()
    packed, lowered = lower(program, ["linear.weight"], chooser)
    assert [site.activation for site in chooser.sites] == [name]
    assert lowered[0].choice.layout == "nonzeros"
    assert name.partition("_")[0] not in " ".join(str(n.target) for n in packed.graph.nodes)
    assert "linear.weight" not in packed.state_dict() and "linear.weight.values" in packed.state_dict()
    assert "linear.weight" in program.state_dict()
    assert_close(packed(x).detach(), model(x).detach())


def test_an_activation_beside_another_reader_stays() -> None:
    model, x = Of(lambda f, x: F.relu(y := f(x)) + y).eval(), torch.randn(5, 16)
    packed, _ = lower(capture(model, (x,), {}).program, ["linear.weight"], Watching())
    assert torch.ops.aten.relu.default in {node.target for node in packed.graph.nodes}
    assert_close(packed(x).detach(), model(x).detach())


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda f, x: f(x) + f.weight.sum(), "sum"),
        (lambda f, x: f(x) + F.embedding(torch.arange(5), f.weight)[:, :1], "embedding"),
        (lambda f, x: f(x) @ f.weight, "both as"),
        (lambda f, x: F.linear(x.bfloat16(), f.weight.bfloat16()), "the op"),
        (lambda f, x: x + 1, "does not read it"),
    ],
)
def test_uses_that_keep_a_weight_dense(function: Callable[[nn.Linear, Tensor], Tensor], word: str) -> None:
    model, x = Of(function).eval(), torch.randn(5, 16)
    result, lowered = lower(capture(model, (x,), {}).program, ["linear.weight"], Watching())
    assert lowered[0].choice.layout == "dense" and word in lowered[0].choice.refused["nonzeros"]
    assert_close(result(x).detach(), model(x).detach())


def test_a_site_is_asked_about_at_the_rows_it_will_see() -> None:
    model, x = Of(lambda f, x: f(x)).eval(), torch.randn(2, 7, 16)
    captured = capture(model, (x,), {})
    (batch,) = [str(size) for want in captured.entry.inputs for size in want.sizes if isinstance(size, str)]  # pyright: ignore
    asked: list[tuple[list[int], tuple[int, ...], tuple[int, ...]]] = [
        ([], (), (14,)), ([], (1, 4, 8), (7, 28, 56)), ([1], (), (7,)), ([2, 5], (), (14, 35)), ([2], (4, 8), (28, 56))
    ]  # fmt: skip
    for examples, sizes, rows in asked:
        chooser = Watching()
        own = [{batch: size} for size in examples] or [{}]
        lower(captured.program, ["linear.weight"], chooser, batches(captured, own, sizes))
        assert chooser.sites[0].tokens == rows


def test_what_is_read_at_every_call_counts_as_time_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []

    def times(functions: list[Callable[[], Tensor]], *_: object) -> list[float]:
        for function in functions:
            function()
        return [1.0] * len(functions)

    monkeypatch.setattr(choose, "_times", times)
    monkeypatch.setattr(choose, "fingerprint", read.append)
    weight = torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)
    sites = [Site(name, "node", weight, None, (64,), "") for name in ("a", "b", "c")]
    original = torch.randn(64, 64)
    chooser = Chooser()
    chooser.watched = {"a": [original], "b": [original, weight]}
    # Alike in all else, they are measured apart.
    assert [chooser.choose(site)[0].reused for site in (*sites, *sites)] == [False] * 3 + [True] * 3
    assert [id(tensor) for tensor in read] == [id(original), id(original), id(weight)]
