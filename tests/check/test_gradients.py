"""The backward pass that every trainable result is held to: what it compares with what, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune import Channels, Drop, Plan, Rule, Unstructured
from fxprune.check import gradients
from fxprune.emit import deliver
from fxprune.errors import CheckError
from tests.structured_oracle import Net, net, randomised, shrunk

MASKS = Plan([Rule("*", Unstructured(0.5))])
CHANNELS = Plan([Rule("*", Channels(0.5, align=1))])
ASKED = "gradients = pruned model's"
GRAPH = "gradients = captured graph's, pruned"


def mlp() -> Any:
    return randomised(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)))


def student(model: Any, *args: Any, plan: Plan | None = MASKS, **more: Any) -> Any:
    return shrunk(model, *args, plan=plan, trainable=True, **more)


def rows(result: Any) -> list[str]:
    found = [row for row in result.report.checks if row.what.startswith("gradients")]
    assert all(row.ok for row in found)
    return [row.what for row in found]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Uncopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("one of a kind")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.linear(x).relu())


def normed() -> Any:
    model = net(
        lambda m, x: m.last(m.norm(m.first(x))), first=nn.Linear(8, 16), norm=nn.LayerNorm(16), last=nn.Linear(16, 4)
    )
    return model


WITH_MODEL: dict[str, tuple[Callable[[], Any], Plan | None]] = {
    "nothing": (mlp, None),
    "masks": (mlp, MASKS),
    "channels": (mlp, CHANNELS),
    "a recurrent layer": (
        lambda: net(lambda m, x: m.last(m.lstm(x[None])[0]), lstm=nn.LSTM(8, 8), last=nn.Linear(8, 4)),
        CHANNELS,
    ),
}
WITH_GRAPH: dict[str, tuple[Callable[[], Any], Plan | None]] = {
    "a statistic": (normed, Plan([Rule("first.weight", Channels(0.5, unit="mixed", align=1))])),
    "dropped blocks": (lambda: nn.Sequential(Block(), Block(), Block()).eval(), Plan([Drop("1")])),
    "no copy": (lambda: Uncopied().eval(), CHANNELS),
    "an ExportedProgram": (lambda: torch.export.export(mlp(), (torch.randn(4, 8),)), CHANNELS),
}


@pytest.mark.parametrize("kind", [*WITH_MODEL, *WITH_GRAPH])
def test_the_row_says_what_was_compared(kind: str) -> None:
    make, plan = {**WITH_MODEL, **WITH_GRAPH}[kind]
    assert rows(student(make(), torch.randn(4, 8), plan=plan)) == [ASKED if kind in WITH_MODEL else GRAPH]


def stop(value: Tensor) -> Tensor:
    return value.detach()


def double(value: Tensor) -> Tensor:
    return value + (value - value.detach())


def wrong(change: Callable[[Tensor], Tensor], place: int) -> Callable[[Any], None]:
    """Puts a function of the same values and other gradients behind one of the linear layers of a result."""

    def tamper(result: Any) -> None:
        layers = [n for n in result.graph.nodes if n.op == "call_module"]
        node = [n for n in layers if isinstance(result.get_submodule(n.target), nn.Linear)][place]
        with result.graph.inserting_after(node):
            changed = result.graph.call_function(change, (node,))
        node.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)
        result.recompile()

    return tamper


TAMPERED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an output without gradient": (wrong(stop, -1), "output 0: it has no gradient"),
    "a gradient that stops": (wrong(stop, 0), 'gradient of "0.(weight|bias)" differs'),
    "a gradient twice as large": (wrong(double, 0), 'gradient of "0.(weight|bias)" differs by 1.00e\\+00'),
    "a frozen parameter": (lambda r: r.get_parameter("3.bias").requires_grad_(False), '"3.bias" does not train'),
}


@pytest.mark.parametrize("plan", [None, MASKS, CHANNELS])
@pytest.mark.parametrize("kind", TAMPERED)
def test_a_wrong_gradient_is_refused(kind: str, plan: Plan | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper, words = TAMPERED[kind]
    emit = deliver.emit_trainable

    def tampered(*args: Any, **more: Any) -> Any:
        result = emit(*args, **more)
        tamper(result)
        return result

    monkeypatch.setattr(deliver, "emit_trainable", tampered)
    with pytest.raises(CheckError, match=words):
        student(mlp(), torch.randn(4, 8), plan=plan)
    assert student(mlp(), torch.randn(4, 8), plan=plan, check=False).report.checks == []


@pytest.mark.parametrize("asked", [True, False])
def test_inputs_that_require_gradients_are_compared(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2.0)
        return m.linear(x) + y.detach() + y

    emit = deliver.emit_trainable

    def tampered(*args: Any, **more: Any) -> Any:
        result = emit(*args, **more)
        for node in result.graph.nodes:
            if node.target is torch.ops.aten.detach.default:
                node.replace_all_uses_with(node.args[0])
        result.recompile()
        return result

    call = (torch.randn(4, 8), torch.randn(4, 8, requires_grad=asked))
    model = net(forward, linear=nn.Linear(8, 8))
    assert rows(student(model, *call)) == [ASKED]
    monkeypatch.setattr(deliver, "emit_trainable", tampered)
    if asked:
        with pytest.raises(CheckError, match='gradient of "input 1" differs'):
            student(model, *call)
    else:
        student(model, *call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_cancels_is_held_to_the_models_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.last(F.softmax(m.q(x) @ m.k(x).transpose(-1, -2), -1) @ m.v(x))

    wide, narrow = nn.Linear(32, 400), (nn.Linear(400, 24) for _ in range(3))
    model = net(attend, first=wide, **dict(zip("qkv", narrow)), last=nn.Linear(24, 8)).to(dtype)
    x, plan = torch.randn(2, 50, 32, dtype=dtype), Plan([Rule("first.weight", Channels(0.5, align=1))])
    rounding: list[dict[str, float]] = []
    own = gradients._rounding
    monkeypatch.setattr(gradients, "_rounding", lambda *args: (rounding.append(own(*args)), rounding[-1])[1])
    result = student(model, x, plan=plan)
    assert rows(result) == [ASKED]
    told = [row for row in result.report.checks if row.what == ASKED and row.tolerance > 1e-3]
    assert all("own rounding" in row.verdict for row in told)
    # Nothing but rounding is left of that gradient, and rounding is all that is allowed.
    assert 0.1 < rounding[0]["k.bias"] < 100
    assert rounding[0]["v.weight"] < 1e4 * torch.finfo(dtype).eps
    # The bias of the keys adds the same to all scores of a query, which softmax takes out again.
    monkeypatch.setattr(gradients, "_ROUNDINGS", 0.0)
    with pytest.raises(CheckError, match=r'gradient of "k[.]bias" differs'):
        student(model, x, plan=plan)


def test_a_model_that_goes_backward_in_train_mode_alone_is_not_compared() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.training):
                return self.linear(x)

    result = student(Guarded().eval(), torch.randn(4, 8))
    assert rows(result) == []
    assert [n.level for n in result.report.notes if "gradients were not compared" in n] == ["warning"]
    result.train()(torch.randn(4, 8)).sum().backward()
    assert result.get_parameter("linear.weight").grad is not None


def test_a_model_without_a_backward_pass_is_told() -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            raise RuntimeError("forward only")

    result = student(net(lambda m, x: Forward.apply(m.linear(x)), linear=nn.Linear(8, 8)), torch.randn(4, 8))
    told = [n for n in result.report.notes if "gradients were not compared" in n]
    assert rows(result) == [] and "forward only" in told[0] and told[0].level == "warning"


def test_the_users_parameters_get_no_gradient() -> None:
    model = mlp()
    student(model, torch.randn(4, 8))
    assert all(p.grad is None for p in model.parameters())


def test_a_call_of_an_outer_model_is_not_taken_for_the_copys() -> None:
    model = Net(lambda m, x: m.linear(x).relu(), linear=nn.Linear(8, 8)).eval()
    own = model.forward
    model.forward = lambda *args: own(*args)
    assert rows(student(model, torch.randn(4, 8), plan=None)) == [GRAPH]


def test_a_group_norm_over_an_image_in_channels_last_ends_nothing() -> None:
    model = Net(lambda m, x: m.conv(m.norm(x)), norm=nn.GroupNorm(2, 4), conv=nn.Conv2d(4, 8, 3)).eval()
    images = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    assert rows(student(model, images)) == [ASKED]
