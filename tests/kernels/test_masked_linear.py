"""masked_linear, the op for training with masks as bits, and the trainable results that are made of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune import Plan, Rule, Unstructured
from fxprune.capture import admit
from fxprune.capture.capture import capture
from fxprune.emit.trainable.module import emit_trainable, origin_of
from fxprune.errors import InputError
from fxprune.kernels.masked_linear import masked_linear, op
from fxprune.select.mask import PackedMask
from tests.emit.trainable_models import assert_same
from tests.kernels.kernel_case import CPU

DEVICES = [CPU, pytest.param("cuda", marks=pytest.mark.cuda)]


def operands(
    *leading: int, o: int = 5, i: int = 13, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, ...]:
    keep = torch.rand(o, i) < 0.4
    x, weight, bias = (torch.randn(*size, dtype=dtype, device=device) for size in ((*leading, i), (o, i), (o,)))
    return x, weight, PackedMask.pack(keep).bits.to(device), bias, keep.to(device)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_values_and_gradients_are_those_of_the_product(leading: tuple[int, ...]) -> None:
    x, weight, bits, bias, keep = operands(*leading)
    assert_same(op(x, weight, bits, bias), F.linear(x, weight * keep, bias))
    assert_same(masked_linear(x, weight, bits), F.linear(x, weight * keep))
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    if x.numel():
        assert torch.autograd.gradcheck(lambda x, w, b: op(x, w, bits, b), (x, weight, bias))
        assert torch.autograd.gradcheck(lambda x, w: op(x, w, bits, None), (x, weight))
    op(x, weight, bits, bias).sum().backward()
    assert weight.grad is not None and not weight.grad[~keep].any()


def test_gradients_of_gradients() -> None:
    x, weight, bits, bias, _ = operands(3)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w, b: op(x, w, bits, b), (x, weight, bias))


def test_a_batch_without_rows_and_doubles_under_autocast() -> None:
    x, weight, bits, bias, keep = operands(0)
    op(x.requires_grad_(), weight.requires_grad_(), bits, bias).sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert op(x, weight, bits, bias).dtype == F.linear(x, weight * keep, bias).dtype == torch.float64


def test_a_weight_that_is_also_the_input_is_multiplied() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ F.linear(self.weight, self.weight)

    model, given = Square(), torch.randn(2, 6)
    mask = PackedMask.pack(torch.rand(6, 6) < 0.5)
    with admit.untouched(model):
        captured = capture(model, (given,), {})
    origin = origin_of(model, captured)
    fast = emit_trainable(captured.program, captured.entry, {}, origin, {"weight": mask}, masked_matmul=True)
    assert not any(node.target is masked_linear for node in fast.graph.nodes)
    fast(given).square().sum().backward()
    assert not fast.get_parameter("weight").grad[~mask.unpack()].any()


def test_the_op_is_whole() -> None:
    x, weight, bits, bias, _ = operands(2, 3, dtype=torch.float32)
    for given in ((x, weight, bits, bias), (x.requires_grad_(), weight.requires_grad_(), bits, None)):
        torch.library.opcheck(op, given)


@pytest.mark.parametrize("device", DEVICES)
def test_what_waits_for_the_backward_pass_is_no_second_weight(device: str) -> None:
    x, weight, bits, bias, _ = operands(4, o=32, i=64, dtype=torch.float32, device=device)
    held: list[Tensor] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        op(x.requires_grad_(), weight.requires_grad_(), bits, bias)
    own = {t.data_ptr() for t in (x, weight, bits)}
    assert held and all(t.data_ptr() in own for t in held)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_it_computes_as_torchs_linear(device: str, dtype: torch.dtype) -> None:
    x, weight, bits, bias, keep = operands(4, o=32, i=64, dtype=torch.float32, device=device)
    weight.requires_grad_()
    with torch.autocast(device, dtype):
        found, expected = op(x, weight, bits, bias), F.linear(x, weight * keep, bias)
    assert found.dtype is dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=6e-2)
    (gradient,) = torch.autograd.grad(found.float().sum(), weight)
    (wanted,) = torch.autograd.grad(expected.float().sum(), weight)
    assert gradient.dtype is torch.float32
    torch.testing.assert_close(gradient, wanted, rtol=2e-2, atol=6e-2)


class Net(nn.Module):
    """Linear layers, a weight that an embedding reads as well, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.conv = nn.Conv1d(16, 16, 1)
        self.head = nn.Linear(16, 11)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.two(F.gelu(self.one(x)))
        return self.head(self.conv(x.mT).mT)


PLAN = Plan([Rule(f"{name}.weight", Unstructured(0.6)) for name in ("one", "two", "conv", "head")])
ids = torch.arange(12).view(2, 6) % 11


def both(device: str = "cpu") -> tuple[Any, Any]:
    model = Net().eval().to(device)

    def make(**options: Any) -> Any:
        call = (ids.to(device),)
        return fxprune.transform(model, PLAN, call, trainable=True, options=options, progress=False)

    return make(), make(masked_matmul=True)


def loss(model: Any, device: str = "cpu") -> Tensor:
    return F.cross_entropy(model(ids.to(device)).flatten(0, 1), ids.flatten().roll(1).to(device))


def steps(model: Any, device: str = "cpu", count: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(count):
        found = loss(model, device)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))
    return losses


@pytest.mark.parametrize("device", DEVICES)
def test_a_trainable_result_takes_the_same_steps(device: str) -> None:
    plain, fast = both(device)
    targets = [node.target for node in fast.graph.nodes]
    assert targets.count(masked_linear) == 2
    # What an embedding reads is multiplied, once where it is tied; a convolution does so itself.
    assert targets.count(torch.ops.aten.mul.Tensor) == 1 and fast.one.weight_keep.dtype is torch.uint8
    # Sums of up to 24 products in another order; Adam divides by the roots of small squares, which magnifies that.
    torch.testing.assert_close(fast(ids.to(device)), plain(ids.to(device)), rtol=4e-6, atol=4e-6)
    assert steps(fast, device) == pytest.approx(steps(plain, device), rel=1e-4 if device == "cpu" else 1e-3)
    zeros = fast.selection.mask["one.weight"].unpack().logical_not().to(device)
    assert not fast.one.weight.detach()[zeros].any() and fast.one.weight.detach()[~zeros].all()


@pytest.mark.slow
def test_copies_and_compiled_code_go_on_as_the_result() -> None:
    _, fast = both()
    expected = fast(ids)
    again = pickle.loads(pickle.dumps(fast))
    assert_same(again(ids), expected)
    assert_same(copy.deepcopy(fast)(ids), expected)
    other, compiled = copy.deepcopy(fast), torch.compile(fast, fullgraph=True)
    found = loss(compiled)
    found.backward()
    loss(other).backward()
    assert_same(fast.two.weight.grad, other.two.weight.grad)
    assert_same(found, loss(other))


@pytest.mark.parametrize("masked_matmul", [False, True])
def test_what_was_trained_is_captured_with_its_zeros(masked_matmul: bool) -> None:
    trained = both()[masked_matmul]
    steps(trained)
    options = {"compile": False, "layout": "nonzeros"}
    again = fxprune.transform(trained.eval(), None, (ids,), options=options, progress=False)
    assert_same(again(ids), trained(ids).detach())
    layouts = {row.name: row.layout for row in again.report.weights}
    assert layouts["one.weight"] == layouts["two.weight"] == "nonzeros"
    assert not any(node.target in (op, torch.ops.aten.mul.Tensor) for node in again.graph.nodes)
    assert not [name for name, _ in again.named_buffers() if name.endswith("_mask")]
    assert any(note.endswith("constant masks in the model: 4") for note in again.report.notes)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_are_not_contiguous(device: str) -> None:
    x, weight, bits, bias, keep = operands(4, dtype=torch.float32, device=device)
    turned = weight.T.contiguous().T
    assert not turned.is_contiguous()
    tensors = x.requires_grad_(), turned.requires_grad_()
    found, expected = op(*tensors, bits, bias), F.linear(x, turned * keep, bias)
    assert_same(found, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=4e-6, atol=4e-6)


def test_the_option_is_read() -> None:
    with pytest.raises(InputError, match="masked_matmul"):
        fxprune.transform(Net().eval(), PLAN, (ids,), trainable=True, options={"masked_matmul": 1})
