"""write_back: the smaller model is of the user's class, and computes what the shrunk graph computes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxprune
from fxprune import Channels, Drop, Plan, Rule, Unstructured
from fxprune.check.calls import Call
from fxprune.errors import FxPruneError, InputError
from fxprune.own_class.attributes import kinds_of
from fxprune.own_class.sizes import Sizes
from fxprune.own_class.target import find_targets
from fxprune.select.selection import Selection
from tests.own_class.own_models import (
    Attention,
    Pieces,
    Residual,
    Stack,
    WrittenOut,
    count,
    pruned,
    same,
    snapshot,
    written,
)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


def cnn(groups: int = 1) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), Residual(16, groups), nn.ReLU(), nn.Conv2d(16, 24, 3),
        nn.GroupNorm(2, 24), nn.ConvTranspose2d(24, 8, 3), nn.PReLU(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.lstm, self.out = nn.Linear(8, 16), nn.LSTM(16, 24, 2, batch_first=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.into(x))[0])


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (mlp, (3, 8)),
    "cnn": (cnn, (2, 3, 11, 11)),
    "depthwise": (lambda: cnn(16), (2, 3, 11, 11)),
    "grouped": (lambda: cnn(4), (2, 3, 11, 11)),
    "attention": (lambda: nn.Sequential(Attention(), nn.LayerNorm(32), Attention()).eval(), (2, 5, 32)),
    "pieces": (lambda: nn.Sequential(Pieces(), nn.ReLU(), nn.Linear(16, 3)).eval(), (4, 16)),
    "stack": (lambda: nn.Sequential(Stack(), nn.Linear(16, 3)).eval(), (3, 16)),
    "recurrent": (lambda: Recurrent().eval(), (2, 5, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_copy_is_the_shrunk_graph(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    before = snapshot(model)
    fast = pruned(model, (x,))
    own = written(model, fast.selection, x)
    assert type(own) is type(model)
    assert count(own) == fast.report.parameters[1] < count(model)
    # Another batch size, and values that no check has seen.
    y = torch.randn(2 * shape[0] + 1, *shape[1:])
    torch.testing.assert_close(own(y), fast(y), rtol=1e-4, atol=1e-5)
    assert same(snapshot(model), before)
    assert not {p.data_ptr() for p in own.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_attributes_of_torch_layers_follow() -> None:
    model, x = cnn(16), torch.randn(2, 3, 11, 11)
    own = written(model, pruned(model, (x,)).selection, x)
    for module in own.modules():
        if isinstance(module, nn.Conv2d):
            assert list(module.weight.shape[:2]) == [module.out_channels, module.in_channels // module.groups]
    assert own[3].first.groups == own[3].first.out_channels < 16
    assert own[3].norm.num_features == len(own[3].norm.running_mean)
    assert own[6].num_channels == len(own[6].weight)
    assert (own[8].num_parameters, own[11].in_features) == (len(own[8].weight), own[11].weight.shape[1])


def test_attributes_of_the_users_classes_follow() -> None:
    model, x = nn.Sequential(Attention()).eval(), torch.randn(2, 5, 32)
    own = written(model, pruned(model, (x,)).selection, x)[0]
    assert (own.num_heads, own.head_dim, own.inner) == (2, 8, 16)
    # What was the old width of a head stays in the scale.
    assert own.scale == 8**-0.5


def test_items_of_tuples_and_tables_follow_and_what_was_the_same_number_stays() -> None:
    model, x = nn.Sequential(Pieces()).eval(), torch.randn(4, 16)
    own = written(model, pruned(model, (x,)).selection, x)[0]
    assert own.pieces == (8, 8)
    assert own.table == {"rows": 8, "both": 2}
    assert own.width == 16


def test_layers_of_different_widths() -> None:
    model, x = nn.Sequential(Attention(), Attention()).eval(), torch.randn(2, 5, 32)
    plan = Plan([Rule("0.*", Channels(0.25)), Rule("1.*", Channels(0.75))])
    own = written(model, pruned(model, (x,), plan).selection, x)
    assert (own[0].num_heads, own[1].num_heads) == (3, 1)


def test_a_size_in_the_code_is_an_error_that_names_it() -> None:
    model, x = nn.Sequential(OrderedDict(attention=WrittenOut())).eval(), torch.randn(2, 5, 32)
    selection = pruned(model, (x,)).selection
    with pytest.raises(FxPruneError) as caught:
        written(model, selection, x)
    error = caught.value
    assert '"attention" (WrittenOut)' in error.where
    assert "own_models.py:" in error.why and "the size 4, which is 2 now" in error.why
    assert "trainable=True" in error.do


def test_a_tensor_made_in_the_code_is_an_error() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) * torch.tensor([float(i) for i in range(16)]))

    model, x = Scaled().eval(), torch.randn(3, 4)
    selection = pruned(model, (x,)).selection
    assert selection.keep
    with pytest.raises(FxPruneError, match="makes this tensor itself"):
        written(model, selection, x)


def test_masks_only() -> None:
    model, x = mlp(), torch.randn(3, 8)
    selection = fxprune.transform(
        model, Plan([Rule("*.weight", Unstructured(0.5))]), (x,), trainable=True, progress=False
    ).selection
    own = written(model, selection, x)
    for name in ("0.weight", "2.weight"):
        keep = selection.mask[name].unpack()
        assert not keep.all()
        assert torch.equal(own.get_parameter(name), torch.where(keep, model.get_parameter(name), 0.0))


def test_values_take_the_place_of_the_models_own() -> None:
    model, x = mlp(), torch.randn(3, 8)
    selection = pruned(model, (x,)).selection
    selection.values = {"0.weight": torch.randn(32, 8), "2.bias": torch.randn(5)}
    own = written(model, selection, x)
    kept = selection.keep["0.weight"] if "0.weight" in selection.keep else next(iter(selection.keep.values()))
    torch.testing.assert_close(own[0].weight.detach(), selection.values["0.weight"][kept])
    assert torch.equal(own[2].bias, selection.values["2.bias"])


def test_pruning_hooks_become_plain_weights() -> None:
    model, x = mlp(), torch.randn(3, 8)
    prune.l1_unstructured(model[0], "weight", 0.5)
    expected = model[0].weight.detach().clone()
    own = written(model, pruned(model, (x,), Plan([])).selection, x)
    assert not own[0]._forward_pre_hooks and "weight_orig" not in dict(own.named_parameters())
    # What masks left dead may have gone.
    assert set(own[0].weight.flatten().tolist()) <= {*expected.flatten().tolist(), 0.0}
    torch.testing.assert_close(own(x), model(x))
    assert prune.is_pruned(model[0])


def test_parametrized_weights_become_plain_ones() -> None:
    model, x = mlp(), torch.randn(3, 8)
    parametrizations.weight_norm(model[0])
    fast = pruned(model, (x,))
    own = written(model, fast.selection, x)
    assert type(own[0]) is nn.Linear and own[0].out_features == 16
    torch.testing.assert_close(own(x), fast(x), rtol=1e-4, atol=1e-5)
    assert type(model[0]) is not nn.Linear


def test_shared_modules_and_tied_weights_stay_so() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mlp, self.head = nn.Embedding(20, 16), mlp_of(16), nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight
            self.again = self.mlp

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.again(self.mlp(self.table(ids))))

    model, ids = Tied().eval(), torch.randint(20, (3, 7))
    fast = pruned(model, (ids,))
    own = written(model, fast.selection, ids)
    assert own.head.weight is own.table.weight and own.again is own.mlp
    assert count(own) < count(model)
    torch.testing.assert_close(own(ids), fast(ids), rtol=1e-4, atol=1e-5)


def mlp_of(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width))


def test_modes_and_gradients_are_the_users() -> None:
    model, x = cnn(), torch.randn(2, 3, 11, 11)
    selection = pruned(model, (x,)).selection
    model.train()
    model[3].norm.eval()
    model[0].weight.requires_grad_(False)
    before = snapshot(model)
    own = written(model, selection, x)
    assert [m.training for m in own.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in own.parameters()] == [p.requires_grad for p in model.parameters()]
    assert same(snapshot(model), before)
    own(x).sum().backward()
    assert own[11].weight.grad is not None and own[0].weight.grad is None


def test_gradients_are_those_of_a_result_that_trains() -> None:
    model, x = nn.Sequential(Attention(), nn.Linear(32, 4)).eval(), torch.randn(2, 5, 32)
    selection = pruned(model, (x,)).selection
    student = fxprune.transform(model, None, (x,), selection=selection, trainable=True, progress=False)
    own = written(model, selection, x)
    student(x).square().sum().backward()
    own(x).square().sum().backward()
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.grad, student.get_parameter(name).grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("listed", [True, False])
def test_dropped_blocks_leave(listed: bool) -> None:
    model, x = Stack(listed=listed).eval(), torch.randn(3, 16)
    path = "blocks.1" if listed else "two"
    fast = pruned(model, (x,), Plan([Rule("*", Channels(0.5)), Drop(path)]))
    own = written(model, fast.selection, x)
    assert count(own) == fast.report.parameters[1]
    torch.testing.assert_close(own(x), fast(x), rtol=1e-4, atol=1e-5)
    if listed:
        assert [block.layer_idx for block in own.blocks] == [0, 1] and own.num_layers == 2
    assert len(list(model.children())) == len(list(own.children()))


def test_a_block_of_a_sequential_and_two_of_a_list() -> None:
    x = torch.randn(2, 16, 6, 6)
    model = nn.Sequential(Residual(), Residual(), nn.Flatten(), nn.Linear(16 * 36, 3)).eval()
    fast = pruned(model, (x,), Plan([Drop("0")]))
    own = written(model, fast.selection, x)
    assert len(own) == 3
    torch.testing.assert_close(own(x), fast(x), rtol=1e-4, atol=1e-5)
    stack, y = Stack(4).eval(), torch.randn(3, 16)
    fast = pruned(stack, (y,), Plan([Drop("blocks.0"), Drop("blocks.2")]))
    own = written(stack, fast.selection, y)
    assert len(own.blocks) == own.num_layers == 2
    torch.testing.assert_close(own(y), fast(y), rtol=1e-4, atol=1e-5)


def test_dead_channels_leave_where_the_class_has_a_place_for_their_constants() -> None:
    model, x = mlp(), torch.randn(3, 8)
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    fast = pruned(model, (x,), Plan([]))
    assert fast.selection.dead
    own = written(model, fast.selection, x)
    assert (own[0].out_features, own[2].in_features) == (16, 16)
    torch.testing.assert_close(own(x), model(x), rtol=1e-4, atol=1e-5)


def test_dead_channels_that_stay_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxprune.errors, "_warned", set())
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8, bias=False)).eval()
    with torch.no_grad():
        model[0].bias.fill_(1.0)  # What the next layer reads of a dead channel is no zero, and it has no bias.
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    x = torch.randn(3, 8)
    fast = pruned(model, (x,), Plan([]))
    assert fast.selection.dead
    with pytest.warns(fxprune.FxPruneWarning, match="left dead stay"):
        own = written(model, fast.selection, x)
    assert own[0].out_features == 32
    torch.testing.assert_close(own(x), model(x), rtol=1e-4, atol=1e-5)


def test_modules_that_the_example_does_not_reach_are_told() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.auxiliary = mlp(), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    two, x = Two().eval(), torch.randn(3, 8)
    selection = pruned(two, (x,)).selection
    with pytest.warns(fxprune.FxPruneWarning, match="does not reach these, which keep their sizes: auxiliary"):
        written(two, selection, x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda m, x: (m, Plan([]), (x,)), "as a selection"),
        (lambda m, x: (m, Selection(), None), "without example inputs"),
        (lambda m, x: (torch.export.export(m, (x,)), Selection(), (x,)), "ExportedProgram"),
        (lambda m, x: (m, Selection(keep={"no.such": torch.tensor([0])}), (x,)), "replay"),
    ],
)
def test_what_is_refused(arguments: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        fxprune.write_back(*arguments(mlp(), torch.randn(3, 8)), progress=False)


def test_the_step_of_a_kernel_is_no_size_that_follows() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 9, 9)
    target = find_targets(model, pruned(model, (x,)).selection, Call("example", (x,), {}), [], None)[0]
    # Two groups become one, and a step of two stays.
    assert 2 in Sizes(target.before, target.after).at("1").literals
    assert kinds_of(dict(model.named_modules()), Sizes(target.before, target.after)) == []
