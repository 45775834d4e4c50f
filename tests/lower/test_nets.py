"""Convolutions that are computed in one call: which parts of a graph become a net, and that the net is right."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.kernels import native

op = torch.ops.fxprune.net.default
needs_kernel = pytest.mark.skipif(not native.status().available, reason="needs a C++ compiler")


def conv(i: int, o: int, k: int = 3, **more: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=more.pop("padding", k // 2), **more)  # pyright: ignore


class Model(nn.Module):
    """Layers by name and a function of them and the input."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plain() -> nn.Module:
    return nn.Sequential(
        conv(3, 16, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), conv(16, 24),
        nn.SiLU(), nn.AvgPool2d(2), conv(24, 8, 1), nn.ReLU6(),
    )  # fmt: skip


def residual() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        y = m.c(F.relu_(m.b(x)))
        y += m.d(x)
        y = F.relu_(y)
        return F.hardswish(m.e(y)) + y

    return Model(
        run, a=conv(3, 16), b=conv(16, 16, stride=2), c=conv(16, 24), d=conv(16, 24, 1, stride=2), e=conv(24, 24)
    )


def inverted() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = F.hardtanh(m.wide(x), 0.0, 6.0)
        return x + m.narrow(F.hardtanh(m.depth(y), 0.0, 6.0))

    wide = {"wide": conv(8, 24, 1), "depth": conv(24, 24, groups=24), "narrow": conv(24, 8, 1)}
    return Model(run, stem=conv(3, 8, stride=2), **wide)


def squeezed() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        y = F.silu(m.a(x))
        s = F.relu(m.down(F.adaptive_avg_pool2d(y, 1)))
        return m.b(y * torch.sigmoid(m.up(s)))

    return Model(run, a=conv(3, 16), down=conv(16, 8, 1), up=conv(8, 16, 1), b=conv(16, 8, 5))


def dense() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        a = m.a(x)
        b = torch.cat([a, F.relu(m.b(a))], 1)
        c = torch.cat([b, F.gelu(m.c(b)), a], 1)
        return m.d(F.max_pool2d(c, 2, 2, ceil_mode=True)).mean((2, 3))

    return Model(run, a=conv(3, 8), b=conv(8, 4), c=conv(12, 4, 1), d=conv(24, 8, dilation=2, padding=2))


def grouped() -> nn.Module:
    return nn.Sequential(conv(4, 16), nn.ReLU(), conv(16, 24, groups=4, bias=False), nn.Hardswish(), conv(24, 6, 1))


def same() -> nn.Module:
    strips = nn.Conv2d(8, 8, (1, 4), padding="same"), nn.Conv2d(8, 8, (3, 1), padding="valid", stride=(2, 3))
    return nn.Sequential(conv(3, 8), *strips)


def unet() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        b = F.relu(m.b(F.max_pool2d(a, 2, ceil_mode=True)))
        b = F.interpolate(b, scale_factor=2.0, mode="nearest")
        b = F.interpolate(b, (36, 66), mode="nearest")
        return m.c(torch.cat([F.interpolate(a, (34, 63)), F.interpolate(a, (34, 63))], 1)).mean((2, 3), True) + m.d(b)

    return Model(run, a=conv(3, 8), b=conv(8, 8), c=conv(16, 4), d=conv(8, 4))


def constants() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        y = F.relu(m.a(x)) + m.place
        return m.scale * m.b(y * m.place) + m.c(y)

    model = Model(run, a=conv(3, 16), b=conv(16, 8), c=conv(16, 8, 1))
    model.register_buffer("place", torch.randn(1, 16, 17, 21))
    model.register_buffer("scale", torch.randn(1, 8, 1, 1))
    return model


def transposed() -> nn.Module:
    """Of each kind of kernel and stride, one with an activation and one beside a sum; and a shuffle."""

    def run(m: Model, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        up = F.relu(m.twice(y)) + m.overlapping(y)
        odd = m.odd(y)
        found = m.b(up) + F.pixel_shuffle(m.c(y), 2), m.d(odd), m.same(y) * y
        return torch.cat([each.flatten(1) for each in found], 1)

    return Model(
        run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 32), d=conv(4, 4),
        twice=nn.ConvTranspose2d(8, 8, 2, 2), overlapping=nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2, bias=False),
        odd=nn.ConvTranspose2d(8, 4, (3, 5), (2, 3), (1, 0), (1, 2), dilation=(3, 1)),
        same=nn.ConvTranspose2d(8, 8, 3, 1, 1),
    )  # fmt: skip


MODELS = [plain, residual, inverted, squeezed, dense, grouped, same, unet, constants, transposed]


def pruned(model: nn.Module, amount: float = 0.8) -> nn.Module:
    """The model with the zeros that the plan of `result_of` makes."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            torch.nn.utils.prune.l1_unstructured(module, "weight", amount)
            torch.nn.utils.prune.remove(module, "weight")
    return model


def result_of(model: nn.Module, x: Tensor, amount: float = 0.8, layout: str | None = "nonzeros") -> nn.Module:
    torch._dynamo.reset()
    plan = Plan([Rule("*", Unstructured(amount))])
    options = {"layout": layout, "compile": False, "measure": False}
    return fxprune.transform(model, plan, (x,), options=options, progress=False)


def nets(result: nn.Module) -> list[torch.fx.Node]:
    return [node for node in result.graph.nodes if node.target is op]  # pyright: ignore


def left(result: nn.Module) -> list[str]:
    return [str(n.target) for n in result.graph.nodes if n.op == "call_function" and "aten" in str(n.target)]  # pyright: ignore


@needs_kernel
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_becomes_one_net(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(2, channels, 17, 21)
    result = result_of(model, x)
    assert len(nets(result)) == 1 and not any("conv" in name or "relu" in name for name in left(result))
    wanted = pruned(model)
    for images in (1, 2, 5, 19):
        again = torch.randn(images, channels, 17, 21)
        for each in (again, again.to(memory_format=torch.channels_last)):
            got, want = result(each), wanted(each)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert got.shape == want.shape
    assert {row.layout for row in result.report.weights} <= {"nonzeros", "dense"}


def two_parts() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(x))).softmax(1)
        return m.c(y)

    return Model(run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8))


def around() -> nn.Module:
    """What the second convolution adds hangs on the first through an op that no net has."""

    def run(m: Model, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) + y.cumsum(2)

    return Model(run, a=conv(3, 8), b=conv(8, 8))


def read_before_it_is_written() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        y = m.a(x)
        flat = y.flatten(1)
        z = F.relu_(y)
        return m.b(z).flatten(1) + flat

    return Model(run, a=conv(8, 8), b=conv(8, 8))


def written_outside() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        x = x * 1.0
        y = m.a(x)
        x.cumsum_(2)
        return m.b(y) + x

    return Model(run, a=conv(8, 8), b=conv(8, 8))


def writes_its_input() -> nn.Module:
    def run(m: Model, x: Tensor) -> Tensor:
        y = m.a(x)
        x += 1.0
        return F.relu_(x * 1.0) + m.b(y)

    return Model(run, a=conv(8, 8), b=conv(8, 8))


def twice() -> nn.Module:
    """One layer for two inputs of a sum, and a map joined with itself."""

    def run(m: Model, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.b(y) + m.b(y)
        return m.c(torch.cat([z, z, y], 1)) + y + y

    return Model(run, a=conv(3, 8), b=conv(8, 8), c=conv(24, 8))


@needs_kernel
@pytest.mark.parametrize(
    ("make", "many"),
    [
        (two_parts, 2),
        (around, 1),
        (read_before_it_is_written, 2),
        (written_outside, 0),
        (writes_its_input, 0),
        (twice, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_lies_between_stays_where_it_is(make: Callable[[], nn.Module], many: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, model.a.in_channels, 9, 10)  # pyright: ignore
    result = result_of(model, x)
    assert len(nets(result)) == many
    wanted = pruned(model)
    for images in (1, 3):
        again = torch.randn(images, *x.shape[1:])
        torch.testing.assert_close(result(again.clone()), wanted(again.clone()), rtol=1e-4, atol=1e-5)


def lines() -> nn.Module:
    """Kernels over lines, with all that may lie between."""

    def run(m: Model, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        z = F.gelu(m.c(F.relu_(m.b(y)))) + y
        z = torch.cat([F.max_pool1d(z, 3, 2, 1), F.avg_pool1d(z, 2, ceil_mode=False)[..., :20]], 1)
        return m.d(z * z).mean(2)

    one = nn.Conv1d
    layers = one(3, 16, 5, padding=2), one(16, 16, 3, padding="same", dilation=2), one(16, 16, 1), one(32, 8, 3, 2)
    return Model(run, **dict(zip("abcd", layers)))


@needs_kernel
def test_convolutions_over_lines_are_nets() -> None:
    torch.manual_seed(0)
    model = lines().eval()
    result = result_of(model, torch.randn(2, 3, 40))
    # What is sliced off parts them.
    assert len(nets(result)) == 2 and not any("conv" in name or "pool" in name for name in left(result)[:-3])
    with torch.no_grad():
        for layer in model.children():
            torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.8)
    for images in (1, 2, 5, 19):
        x = torch.randn(images, 3, 40)
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_line_without_a_batch_and_a_weight_that_two_read_stay() -> None:
    torch.manual_seed(0)
    alone, shared = nn.Conv1d(8, 8, 3), Model(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Conv1d(8, 8, 3, padding=1))
    for model, x in ((alone, torch.randn(8, 30)), (shared, torch.randn(2, 8, 30))):
        result = result_of(model.eval(), x)
        torch.nn.utils.prune.l1_unstructured(model if model is alone else model.a, "weight", 0.8)
        assert not nets(result)
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)


@needs_kernel
def test_what_dead_channels_leave_at_the_borders_is_added_in_the_net() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 16, 1), nn.ReLU(), conv(16, 16, groups=16), nn.ReLU(), conv(16, 8, 1), conv(8, 8)
    ).eval()
    model = pruned(model, 0.5)
    with torch.no_grad():
        model[0].weight[:8] = 0.0  # pyright: ignore
        model[0].bias.fill_(1.0)  # pyright: ignore
    x = torch.randn(1, 3, 20, 20)
    options = {"layout": "nonzeros", "compile": False, "measure": False}
    result = fxprune.transform(model, None, (x,), options=options, progress=False)
    (call,) = nets(result)
    assert [node.op for node in call.args[0]] == ["placeholder", "get_attr"]  # pyright: ignore
    assert not left(result)
    for images in (1, 3):
        again = torch.randn(images, 3, 20, 20)
        torch.testing.assert_close(result(again), model(again), rtol=1e-4, atol=1e-5)


@needs_kernel
def test_few_zeros_and_another_layout_make_no_net() -> None:
    model, x = plain().eval(), torch.randn(1, 3, 32, 32)
    assert not nets(result_of(model, x, 0.1, "dense")) and not nets(result_of(model, x, 0.1))
    assert not nets(result_of(model, x, 0.8, "dense"))


@needs_kernel
def test_few_zeros_are_told() -> None:
    row = result_of(plain().eval(), torch.randn(1, 3, 32, 32), 0.1).report["0.weight"]
    assert row.layout == "dense" and "10.0% zeros are too few" in row.refused["nonzeros"]


@needs_kernel
def test_a_weight_that_two_read_is_counted_for_each() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.a(self.a(x)), self.a.weight, padding=1).relu() * self.a.weight.sum()

    model, x = Tied().eval(), torch.randn(1, 8, 9, 9)
    result = result_of(model, x)
    row = result.report["a.weight"]
    held = {name: value.nbytes for name, value in result.state_dict().items() if not name.endswith("dense")}
    assert row.layout == "nonzeros"
    assert result.report.bytes == sum(held.values()) - held.get("a.bias", 0)


@needs_kernel
def test_other_dtypes_and_convolutions_stay() -> None:
    x = torch.randn(1, 3, 8, 8)
    assert not nets(result_of(plain().eval().double(), torch.randn(1, 3, 32, 32).double()))
    # No plain convolution is this one: it reads less than it would be padded by.
    within = nn.Sequential(nn.ConvTranspose2d(3, 8, 1, 1, padding=1), nn.ReLU()).eval()
    assert not nets(result_of(within, x))


@needs_kernel
def test_sizes_that_are_not_known_until_the_call() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.ReLU6()).eval()
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    result = fxprune.transform(
        model, Plan([Rule("*", Unstructured(0.8))]), (torch.randn(2, 3, 16, 24),),
        dynamic_shapes=({0: torch.export.Dim("batch"), 2: height, 3: width},),
        options={"layout": "nonzeros", "compile": False, "measure": False}, progress=False,
    )  # fmt: skip
    assert len(nets(result)) == 1
    wanted = pruned(model)
    for size in ((1, 3, 16, 24), (3, 3, 7, 9), (2, 3, 40, 2), (1, 3, 90, 61)):
        x = torch.randn(size)
        torch.testing.assert_close(result(x), wanted(x), rtol=1e-4, atol=1e-5)


@needs_kernel
def test_a_net_is_copied_and_pickled() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    result = result_of(plain().eval(), x)
    want = result(x)
    assert torch.equal(copy.deepcopy(result)(x), want)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)


@needs_kernel
def test_compiled_the_result_is_the_same() -> None:
    torch.manual_seed(0)
    model, x = residual().eval(), torch.randn(2, 3, 12, 12)
    torch._dynamo.reset()
    plan = Plan([Rule("*", Unstructured(0.8))])
    options = {"layout": "nonzeros", "measure": False}
    result = fxprune.transform(model, plan, (x,), options=options, progress=False)
    assert "Inductor" in result.report.compiled
    wanted = pruned(model)
    for images in (1, 2, 6):
        again = torch.randn(images, 3, 12, 12)
        torch.testing.assert_close(result(again), wanted(again), rtol=1e-4, atol=1e-5)


@needs_kernel
def test_nets_that_follow_one_another_and_hand_out_what_they_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second net reads what the first one made, in the memory format of images; both are outputs."""
    monkeypatch.setenv("FXPRUNE_CHECK", "2")

    def run(m: Model, x: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        y = F.relu(m.a(x))
        z = m.b(y.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2))
        return y, m.c(y), F.relu(m.d(z + y)), z

    torch.manual_seed(0)
    model = Model(run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 8)).eval()  # pyright: ignore
    for x in (torch.randn(2, 3, 9, 7), torch.randn(2, 3, 9, 7).to(memory_format=torch.channels_last)):
        result = result_of(model, x)
        assert len(nets(result)) == 3
        for got, want in zip(result(x), pruned(model)(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
