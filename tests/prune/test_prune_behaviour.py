"""What PyTorch's own tests of pruning assert, one behaviour a test, held for fxprune.prune."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.utils.prune as theirs
from torch import Tensor, nn

import fxprune.prune as prune

PLACES = [(kind, name) for kind in ("linear", "conv3d") for name in ("weight", "bias")]
SIGNS = [[1, 2, 3, 4], [-4, -3, -2, -1]]


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 7) if kind == "linear" else nn.Conv3d(2, 2, 2)


def given(rows: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows))
    layer.weight = nn.Parameter(torch.tensor(rows, dtype=torch.float32))
    return layer


@pytest.fixture
def layer() -> Iterator[nn.Linear]:
    """Linear [2, 5] whose random pruning takes (1, 0) and (0, 3)."""
    mask = torch.ones(2, 5)
    mask[1, 0] = mask[0, 3] = 0
    with mock.patch("fxprune.prune.RandomUnstructured.compute_mask", return_value=mask):
        yield prune.random_unstructured(nn.Linear(5, 2), "weight", amount=0.9)


@pytest.mark.parametrize("amount", [0.34, 1500, 0, 0.0, 1, 1.0])
def test_valid_amounts(amount: float) -> None:
    prune._validate_pruning_amount_init(amount)
    prune._validate_pruning_amount(0.3, 0)
    prune._validate_pruning_amount(19, 20)
    prune._validate_pruning_amount(1, 1)


@pytest.mark.parametrize(
    ("amount", "kind"), [("ten", TypeError), (1.1, ValueError), (20.0, ValueError), (-10, ValueError)]
)
def test_invalid_amounts(amount: object, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        prune._validate_pruning_amount_init(amount)
    with pytest.raises(ValueError):
        prune._validate_pruning_amount(20, 19)


@pytest.mark.parametrize(
    ("amount", "size", "count"),
    [(0, 15, 0), (10, 15, 10), (1, 15, 1), (1.0, 15, 15), (0.4, 17, 7), (0.5, 5, 2), (0.5, 7, 4)],
)
def test_counts(amount: float, size: int, count: int) -> None:
    assert prune._compute_nparams_toprune(amount, size) == count


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_state(kind: str, name: str) -> None:
    module = make(kind)
    original = getattr(module, name)
    values = original.detach().clone()
    prune.random_unstructured(module, name, amount=0.5)
    kept, mask, now = (getattr(module, name + end) for end in ("_orig", "_mask", ""))
    assert kept is original and torch.equal(kept, values)
    assert mask.shape == now.shape == kept.shape and mask.dtype == kept.dtype
    assert torch.equal(now, kept * mask)
    assert name not in dict(module.named_parameters()) and f"{name}_mask" in dict(module.named_buffers())
    assert prune.is_pruned(module) and theirs.is_pruned(module)
    assert isinstance(pickle.loads(pickle.dumps(module)), type(module))
    prune.remove(module, name)
    assert getattr(module, name) is original and torch.equal(original, now)
    assert dict(module.named_parameters()).keys() == {"weight", "bias"} and not dict(module.named_buffers())
    assert not prune.is_pruned(module)
    with pytest.raises(ValueError):
        prune.remove(module, name)


def test_the_identity_changes_nothing() -> None:
    module, x = nn.Linear(5, 2), torch.ones(1, 5)
    module(x).sum().backward()
    out, gradients = module(x), [p.grad.clone() for p in (module.weight, module.bias)]
    module.zero_grad()
    prune.identity(module, "weight")
    found = module(x)
    found.sum().backward()
    assert torch.equal(found, out) and torch.equal(module(x), module(x))
    assert torch.equal(module.weight_orig.grad, gradients[0]) and torch.equal(module.bias.grad, gradients[1])


def test_masked_elements_get_no_gradient_and_do_not_move(layer: nn.Linear) -> None:
    layer(torch.ones(1, 5)).sum().backward()
    assert torch.equal(layer.weight_orig.grad, layer.weight_mask) and torch.equal(layer.bias.grad, torch.ones(2))
    before = layer.weight_orig.detach().clone()
    torch.optim.SGD(layer.parameters(), 1.0).step()
    gone = layer.weight_mask == 0
    assert torch.equal(layer.weight_orig[gone], before[gone])
    assert not torch.equal(layer.weight_orig[~gone], before[~gone])


def test_the_forward_uses_what_is_left(layer: nn.Linear) -> None:
    x = torch.ones(1, 5)
    expected = x @ (layer.weight_orig * layer.weight_mask).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    before = layer(x)
    prune.remove(layer, "weight")
    assert torch.equal(layer(x), before) and layer.weight[1, 0] == layer.weight[0, 3] == 0


def test_methods_pile_up_in_one_container() -> None:
    module = nn.Conv3d(2, 2, 2)
    prune.l1_unstructured(module, "weight", 0.1)
    first = module.weight_mask
    prune.ln_structured(module, "weight", 0.3, n=2, dim=0)
    prune.ln_structured(module, "weight", 0.1, n=float("inf"), dim=1)
    (hook,) = module._forward_pre_hooks.values()
    assert isinstance(hook, prune.PruningContainer) and isinstance(hook, theirs.PruningContainer)
    assert len(hook) == 3 and hook._tensor_name == "weight"
    assert [type(method) for method in hook] == [prune.L1Unstructured, prune.LnStructured, prune.LnStructured]
    assert isinstance(hook[0], theirs.L1Unstructured) and isinstance(hook[1], theirs.LnStructured)
    assert not module.weight_mask[first == 0].any()


def test_a_container_takes_methods_of_one_parameter() -> None:
    container, one, two = prune.PruningContainer(), prune.L1Unstructured(2), prune.L1Unstructured(2)
    container._tensor_name = one._tensor_name = "test"
    two._tensor_name = "other"
    assert len(container) == 0
    container.add_pruning_method(one)
    with pytest.raises(ValueError):
        container.add_pruning_method(two)
    for wrong in (10, "ugh"):
        with pytest.raises(TypeError):
            container.add_pruning_method(wrong)
    assert list(container) == [one] and list(prune.PruningContainer(one, one)) == [one, one]


def test_a_container_computes_on_what_is_left() -> None:
    container = prune.PruningContainer()
    container._tensor_name = "test"
    t = torch.arange(1.0, 9).view(2, 4)
    start = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]])
    for method, expected in [
        (prune.L1Unstructured(2), [[0, 0, 1, 0], [1, 1, 0, 1]]),
        (prune.LnStructured(1, n=2, dim=0), [[0, 0, 0, 0], [1, 1, 0, 1]]),
        (prune.LnStructured(1, n=2, dim=1), [[0, 1, 1, 0], [0, 1, 0, 1]]),
    ]:
        method._tensor_name = "test"
        container.add_pruning_method(method)
        found = container.compute_mask(t, start)
        assert found.tolist() == expected and found.dtype is torch.float32
    assert start.tolist() == [[1, 1, 1, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize(
    ("scores", "first", "second"),
    [
        (None, [[0, 2, 3, 4], [-4, -3, -2, 0]], [[0, 0, 3, 4], [-4, -3, 0, 0]]),
        ([[4.0, 2, 1, 3], [-3, -1, -2, -4]], [[1, 2, 0, 4], [-4, 0, -2, -1]], [[1, 0, 0, 4], [-4, 0, 0, -1]]),
    ],
)
def test_l1_by_hand(scores: list[list[float]] | None, first: list[list[int]], second: list[list[int]]) -> None:
    module = given(SIGNS)
    for expected in (first, second):
        ranked = None if scores is None else torch.tensor(scores)
        prune.l1_unstructured(module, "weight", 2, importance_scores=ranked)
        assert module.weight.tolist() == expected


def test_equal_magnitudes_go_by_number() -> None:
    t = 2 * torch.randint(-1, 2, (10, 7), generator=torch.Generator().manual_seed(0))
    mask = prune.L1Unstructured(0.2).compute_mask(t, default_mask=torch.ones_like(t))
    assert (mask == 0).sum() == 14


def test_random_channels_are_whole() -> None:
    t = torch.randn(5, 4, 2)
    mask = prune.RandomStructured(0.6, dim=2).compute_mask(t, default_mask=torch.ones_like(t))
    assert sorted((mask == 0).sum((0, 1)).tolist()) == [0, 20]


CONV = [[[[1.0, 2.0], [1.0, 2.5]], [[0.5, 1.0], [0.1, 0.1]], [[-3.0, -5.0], [0.1, -1.0]]]]
SCORES = [[[[10.0, 1.0], [10.0, 1.0]], [[30.0, 3.0], [30.0, 3.0]], [[-20.0, -2.0], [-20.0, -2.0]]]]


@pytest.mark.parametrize(("scores", "channel", "column"), [(None, 1, 0), (SCORES, 0, 1)])
def test_ln_by_hand(scores: list[object] | None, channel: int, column: int) -> None:
    module = nn.Conv2d(3, 1, 2)
    module.weight.data = torch.tensor(CONV)
    ranked = None if scores is None else torch.tensor(scores)
    expected = torch.ones(1, 3, 2, 2)
    expected[:, channel] = 0
    prune.ln_structured(module, "weight", amount=1, n=2, dim=1, importance_scores=ranked)
    assert torch.equal(module.weight_mask, expected)
    expected[..., column] = 0
    prune.ln_structured(module, "weight", amount=1, n=1, dim=-1, importance_scores=ranked)
    assert torch.equal(module.weight_mask, expected)


@pytest.mark.parametrize(
    ("scored", "m", "n"),
    [(False, [[0, 2, 3, 4], [-4, -3, -2, 0]], [[0, 0, -2.0]]), (True, [[1, 2, 0, 4], [-4, 0, -2, -1]], [[0, 0.1, 0]])],
)
def test_global_by_hand(scored: bool, m: list[list[float]], n: list[list[float]]) -> None:
    one, two = given(SIGNS), given([[0, 0.1, -2]])
    scores = {
        (one, "weight"): torch.tensor([[4.0, 2, 1, 3], [-3, -1, -2, -4]]),
        (two, "weight"): torch.tensor([[0, 10.0, -0.2]]),
    }
    pairs = ((one, "weight"), (two, "weight"))
    given_scores = scores if scored else None
    prune.global_unstructured(pairs, prune.L1Unstructured, importance_scores=given_scores, amount=4)
    assert torch.equal(one.weight, torch.tensor(m)) and torch.equal(two.weight, torch.tensor(n))


def test_a_custom_mask_joins_the_old_one() -> None:
    mask, start = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    found = prune.CustomFromMask(mask=mask).compute_mask(torch.rand(2, 4), start)
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_roll_back(kind: str, name: str) -> None:
    module = make(kind)
    broken = mock.patch("fxprune.prune.L1Unstructured.compute_mask", side_effect=Exception("HA!"))
    with broken, pytest.raises(Exception, match="HA!"):
        prune.l1_unstructured(module, name, 0.9)
    assert dict(module.named_parameters()).keys() == {"weight", "bias"} and not dict(module.named_buffers())


@pytest.mark.parametrize("whole", [True, False])
def test_saved_models_and_state_dicts(whole: bool) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1))

    model, file = net(), io.BytesIO()
    prune.l1_unstructured(module=model[0], name="weight", amount=0.9)
    keys = set(model.state_dict())
    assert {"0.weight_orig", "0.weight_mask"} <= keys and "0.weight" not in keys
    weight = model[0].weight
    if not whole:
        prune.remove(module=model[0], name="weight")
    torch.save(model if whole else model.state_dict(), file)
    file.seek(0)
    read = torch.load(file, weights_only=not whole)
    if not whole:
        other = net()
        other.load_state_dict(read)
        read, keys = other, set(net().state_dict())
    assert set(read.state_dict()) == keys and torch.equal(read[0].weight, weight)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [(None, [[0, 0, 1, 0], [1, 1, 0, 1]]), ([[1, 2, 3, 4], [1.5, 1.6, 1.7, 1.8]], [[0, 1, 1, 0], [0, 1, 0, 1]])],
)
def test_bare_tensors(scores: list[list[float]] | None, expected: list[list[int]]) -> None:
    t = torch.arange(1.0, 9).view(2, 4)
    start = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]])
    ranked = t if scores is None else torch.tensor(scores)
    method = prune.L1Unstructured(2)
    assert torch.equal(method.prune(t, start, importance_scores=ranked), t * torch.tensor(expected))
    if scores is None:
        assert torch.equal(method.prune(t, start), t * torch.tensor(expected))


def test_recurrent_weights_are_parameters_again_after_removal() -> None:
    module = nn.LSTM(32, 32)
    prune.l1_unstructured(module, "weight_ih_l0", 0.5)
    assert sum(isinstance(weight, nn.Parameter) for weight in module._flat_weights) == 3
    prune.remove(module, "weight_ih_l0")
    assert sum(isinstance(weight, nn.Parameter) for weight in module._flat_weights) == 4
    names = dict(module.named_parameters())
    assert isinstance(names["weight_ih_l0"], Tensor) and "weight_ih_l0_orig" not in names
