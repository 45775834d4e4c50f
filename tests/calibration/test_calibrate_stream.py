"""Both programs side by side: what an output is corrected by, what is held between two segments, and where."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import Plan, Rule, Unstructured
from fxprune.calibration import stream as streaming
from fxprune.calibration.calibrate import calibrate
from fxprune.calibration.layer import find_layers
from fxprune.calibration.segments import plan_segments
from fxprune.calibration.spill import Shelf
from fxprune.calibration.stream import Side
from fxprune.capture.capture import capture
from tests.structured_oracle import net

# --- the way to a sum --------------------------------------------------------------------------------------------


def plain(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return m.last(y).relu() + (h + m.lin(y))


def other_first(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return torch.add(h, m.lin(y))


def in_place(m: Any, y: Tensor, h: Tensor) -> Tensor:
    h = h * 1
    h += m.lin(y)
    return h


def scaled(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return h + m.scale * m.lin(y) / 3


def view_and_transpose(m: Any, y: Tensor, h: Tensor) -> Tensor:
    heads = m.lin(y).view(-1, 6, 2, 4).transpose(1, 2)
    return heads.reshape(-1, 6, 8) + h


def rolled(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return torch.roll(m.lin(y), 2, 1) * -0.5 + h


def dropped(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return h + m.dropout(m.lin(y).permute(1, 0, 2)).permute(1, 0, 2)


def with_position(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return (m.lin(y) + m.position) + h


def normed(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return m.norm(m.lin(y).transpose(1, 2)).transpose(1, 2) + h


def sliced(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return m.lin(y)[:, 1:4] + h[:, :3]


def some_silent(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return m.lin(y) * m.mask + h * m.mask


CHAINS: list[Callable[..., Any]] = [
    plain,
    other_first,
    in_place,
    scaled,
    view_and_transpose,
    rolled,
    dropped,
    with_position,
    normed,
    sliced,
    some_silent,
]


def twice_read(m: Any, y: Tensor, h: Tensor) -> Tensor:
    z = m.lin(y)
    return (h + z) * z


def curved(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return h + m.lin(y).relu()


def gated(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return h + m.lin(y) * h.sigmoid()


def repeated(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return m.lin(y.mean(1, keepdim=True)) * m.position + h


def batch_statistics(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return h + m.own(m.lin(y).transpose(1, 2)).transpose(1, 2)


def with_factor(m: Any, y: Tensor, h: Tensor) -> Tensor:
    return torch.add(h, m.lin(y), alpha=2)


def written_later(m: Any, y: Tensor, h: Tensor) -> Tensor:
    h = h * 1
    z = m.lin(y)
    h[:, :2].add_(m.last(m.last(z.relu()).relu())[:, :2])
    return m.lin(y + 1) + h


def model_of(chain: Callable[..., Any]) -> Any:
    parts: dict[str, Any] = dict(pre=nn.Linear(8, 8), lin=nn.Linear(8, 8), last=nn.Linear(8, 8))
    parts |= dict(scale=nn.Parameter(torch.rand(8)), position=nn.Parameter(torch.randn(6, 8)))
    parts |= dict(norm=nn.BatchNorm1d(8), dropout=nn.Dropout(0.5), mask=(torch.arange(8) % 3 > 0).float())
    parts |= dict(own=nn.BatchNorm1d(8, track_running_stats=False))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.pre(x)
        return chain(m, h.tanh(), h)

    return net(forward, **parts)


def staged(model: Any, x: Tensor) -> tuple[Any, dict[str, Any]]:
    program = capture(model, (x,), {}).program
    layers, _ = find_layers(program, ["pre.weight", "lin.weight"])
    return program, {
        layer.name: layer for segment in plan_segments(program, layers.values()) for layer in segment.layers
    }


@pytest.mark.parametrize("chain", CHAINS, ids=lambda f: f.__name__)
def test_the_wanted_output_makes_the_sum_the_dense_one(chain: Any) -> None:
    model, x = model_of(chain), torch.randn(3, 6, 8)
    program, layers = staged(model, x)
    branch = layers["lin.weight"].branch
    assert branch is not None
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    nodes = nodes[: nodes.index(branch.way[-1])]
    envs: list[dict[Any, Any]] = []
    sides = [Side(program, {}), Side(program, {"pre.weight": model.pre.weight.detach() * 0.5})]
    for side in sides:
        env: dict[Any, Any] = {next(n for n in program.graph.nodes if n.op == "placeholder"): x.clone()}
        side.run(nodes, env)
        envs.append(env)
    layer, (dense, pruned) = layers["lin.weight"], envs
    correction = streaming._correction(layer, dense, pruned, sides[0])
    assert isinstance(correction, Tensor) and correction.shape == dense[layer.node].shape
    # What the whole way comes to with the dense operands, and with the pruned ones and the corrected output.
    expected = streaming._follow(branch, layer.node, dense[layer.node], dense, dense, sides[0])
    moved = streaming._follow(branch, layer.node, dense[layer.node] + correction, dense, pruned, sides[0])
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)
    for other in branch.others.values():
        assert float((pruned[other] - dense[other]).abs().max()) > 0.1


@pytest.mark.parametrize(
    "chain", [twice_read, curved, gated, repeated, batch_statistics, with_factor], ids=lambda f: f.__name__
)
def test_a_way_that_cannot_be_gone_back_is_no_branch(chain: Any) -> None:
    _, layers = staged(model_of(chain), torch.randn(3, 6, 8))
    assert layers["lin.weight"].branch is None


def test_the_other_side_is_known_only_when_all_of_it_is_written() -> None:
    def late(m: Any, x: Tensor) -> Tensor:
        h = m.pre(x)
        z = m.lin(h)
        h[:, :2].add_(m.last(m.last(m.last(h).relu()).relu())[:, :2])
        return z + h

    def early(m: Any, x: Tensor) -> Tensor:
        h = m.pre(x)
        z = m.lin(h)
        h[:, :2].relu_()
        return z + h

    for forward, known in ((late, False), (early, False)):
        model = net(forward, pre=nn.Linear(8, 8), lin=nn.Linear(8, 8), last=nn.Linear(8, 8))
        program = capture(model, (torch.randn(3, 6, 8),), {}).program
        layers, _ = find_layers(program, ["pre.weight", "lin.weight", "last.weight"])
        # The memory is written after the linear has read it, so no segment knows it when the linear is fitted.
        found = [
            s for segment in plan_segments(program, layers.values()) for s in segment.layers if s.name == "lin.weight"
        ]
        assert len(found) == 1 and (found[0].branch is not None) == known


# --- what is held between two segments -----------------------------------------------------------------------------


def test_a_shelf_gives_back_what_was_put() -> None:
    whole = torch.randn(4, 6)
    values: dict[str, Any] = {
        "whole": whole,
        "view": whole[:, 2:],
        "turned": torch.randn(3, 5).t(),
        "wide": torch.randn(1, 3).expand(4, 3),
        "ids": torch.arange(7),
        "flag": torch.tensor(True),
        "many": (torch.ones(2), [torch.zeros(3), None]),
        "size": 5,
        "sizes": torch.Size([2, 3]),
        "share": 0.5,
        "half": torch.randn(3).bfloat16(),
    }
    for limit in (0, 1 << 20, float("inf")):
        shelf = Shelf(limit)
        shelf.put(0, values)
        shelf.put(1, {})
        found = shelf.take(0)
        assert found.keys() == values.keys() and shelf.take(1) == {}
        assert found["size"] == 5 and found["share"] == 0.5 and tuple(found["sizes"]) == (2, 3)
        assert torch.equal(found["many"][1][0], torch.zeros(3)) and found["many"][1][1] is None
        for key in ("whole", "view", "turned", "wide", "ids", "flag", "half"):
            assert torch.equal(found[key], values[key]) and found[key].stride() == values[key].stride()
        found["whole"].fill_(7)
        assert bool(found["view"].eq(7).all())  # they still are one memory
        whole.copy_(torch.randn(4, 6))
        assert shelf.held == 0
        shelf.close()


def test_a_shelf_counts_memory_once_and_fills_files_beyond_its_limit(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole = torch.zeros(100)
    shelf = Shelf(850)
    shelf.put(0, {"a": whole, "b": whole[:50]})
    assert shelf.held == 400 and not list(tmp_path.iterdir())
    shelf.put(1, {"a": whole.clone()})
    shelf.put(2, {"a": whole.clone()})
    assert shelf.held == 800 and len(list(tmp_path.rglob("*.pt"))) == 1
    assert torch.equal(shelf.take(2)["a"], whole) and not list(tmp_path.rglob("*.pt"))
    shelf.put(2, {"a": whole.clone()})
    shelf.close()
    assert not list(tmp_path.iterdir()) and shelf.largest == 800


def residual(m: Any, x: Tensor) -> Tensor:
    for a, b in ((m.a, m.b), (m.c, m.d)):
        x = x + b(a(F.layer_norm(x, (8,))).relu_())
    return m.e(x)


def deep() -> Any:
    return net(
        residual, a=nn.Linear(8, 24), b=nn.Linear(24, 8), c=nn.Linear(8, 24), d=nn.Linear(24, 8), e=nn.Linear(8, 4)
    )


PLAN = Plan([Rule("*", Unstructured(0.6))])


def assert_same(one: Any, other: Any) -> None:
    assert one.values.keys() == other.values.keys() and one.mask.keys() == other.mask.keys()
    assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)
    assert all(torch.equal(one.mask[name].bits, other.mask[name].bits) for name in one.mask)
    assert {n: f.method for n, f in one.fits.items()} == {n: f.method for n, f in other.fits.items()}


def test_activations_in_files_change_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = deep()
    data = [torch.randn(6, 5, 8), torch.randn(6, 7, 8), torch.randn(6, 9, 8)]
    held = calibrate(model, PLAN, data, progress=False)
    assert not list(tmp_path.iterdir())
    used: list[int] = []
    real = Shelf.put

    def put(self: Shelf, number: int, values: Any) -> None:
        real(self, number, values)
        used.append(len(list(tmp_path.rglob("*.pt"))))

    monkeypatch.setattr(Shelf, "put", put)
    for memory in (0, 1500, 0.0):
        assert_same(held, calibrate(model, PLAN, data, progress=False, memory=memory))
    assert max(used) == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_files_leave_when_calibration_ends_early(error: type[BaseException], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[int] = []

    def fail(*_: Any) -> None:
        seen.append(len(list(tmp_path.rglob("*.pt"))))
        raise error

    module = importlib.import_module("fxprune.calibration.calibrate")
    monkeypatch.setattr(module, "fit_weight", fail)
    with pytest.raises(error):
        calibrate(deep(), PLAN, [torch.randn(6, 5, 8)], progress=False, memory=0)
    assert seen == [1] and not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_number_of_layers(monkeypatch: Any) -> None:
    held: list[int] = []
    real = Shelf.close

    def close(self: Shelf) -> None:
        held.append(self.largest)
        real(self)

    monkeypatch.setattr(Shelf, "close", close)
    for layers in (2, 6):
        model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(layers)]).eval()
        calibrate(model, PLAN, [torch.randn(50, 8)], progress=False)
    assert held[0] == held[1] > 0
