"""What torch.nn.utils.prune gets wrong: copies, attention, recurrent weights, tied weights, biases, 8-bit floats."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune as theirs
from torch import Tensor, nn

import fxprune.prune as prune
from fxprune.capture.hooks import fold_existing


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if name.endswith("_mask")}


def step(model: nn.Module, x: Tensor, rate: float = 0.01) -> None:
    optimiser = torch.optim.SGD(model.parameters(), rate)
    out = model(x)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    optimiser.step()


class Attention(nn.Module):
    """Self-attention pruned everywhere, and a reference that multiplies by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        nn.init.normal_(self.mha.in_proj_bias)
        nn.init.normal_(self.mha.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


ATTENTION = [("out_proj", "weight"), ("out_proj", "bias"), ("", "in_proj_weight"), ("", "in_proj_bias")]


def net(lib: object = prune) -> nn.Module:
    """Every kind of module, pruned once and twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LSTM(8, 8, bidirectional=True))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.ln_structured(model[0], "weight", 2, 2, 0)
    prune.random_unstructured(model[2], "weight", 0.5, generator=torch.Generator().manual_seed(1))
    prune.custom_from_mask(model[2], "bias", torch.arange(8) % 2)
    prune.l1_unstructured(model[3], "weight_hh_l0_reverse", 0.5)
    return model


@pytest.mark.parametrize("when", ["at once", "after a forward", "after a step", "after torch's pruning"])
def test_a_deep_copy_is_pruned_alike_and_independent(when: str) -> None:
    model, x = net(), torch.randn(3, 4, 6)
    if when != "at once":
        step(model, x, 0.0 if when == "after a forward" else 0.01)
    if when == "after torch's pruning":
        theirs.l1_unstructured(model[0], "weight", 2)
        theirs.random_unstructured(model[2], "weight", 2)
        model(x)
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert twin[0].weight.grad_fn is not None  # the copy's own graph, to its own parameter
    assert torch.equal(twin(x)[0], model(x)[0])
    again = copy.deepcopy(twin)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = model[0].weight.detach().clone()
    for other in (twin, again):
        step(other, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(twin[0].weight_orig, again[0].weight_orig)
    assert not torch.equal(twin[0].weight_orig, model[0].weight_orig)
    for name, mask in masks(model).items():
        assert torch.equal(masks(twin)[name], mask)
    assert torch.equal((twin(x)[0], twin[0].weight)[1] == 0, model[0].weight_mask == 0)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_pickled_models_are_pruned_alike(save: str) -> None:
    model, x = net(), torch.randn(3, 4, 6)
    if save == "pickle":
        read = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
    assert torch.equal(read(x)[0], model(x)[0]) and prune.is_pruned(read)
    prune.l1_unstructured(read[0], "weight", 3)
    step(read, x)
    assert torch.equal(copy.deepcopy(read)(x)[0], read(x)[0])
    prune.remove(read[2], "weight")


def test_a_frozen_and_a_no_grad_weight() -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    prune.l1_unstructured(model, "weight", 5)
    assert torch.equal(copy.deepcopy(model).weight, model.weight)
    with torch.no_grad():
        other = prune.l1_unstructured(nn.Linear(4, 4), "weight", 5)
    other(torch.ones(1, 4)).sum().backward()
    assert torch.equal(other.weight_orig.grad, other.weight_mask)


def test_multihead_attention_follows_its_optimiser() -> None:
    model, plain = Attention(), Attention()
    x = torch.randn(2, 3, 8)
    for path, name in ATTENTION:
        prune.l1_unstructured(model.mha.get_submodule(path), name, 0.4)
    for _ in range(3):  # the second backward fails in torch: the graph of the first weight is gone
        model.zero_grad()
        step(model, x)
    out = model(x)
    for path, name in ATTENTION:
        module = model.mha.get_submodule(path)
        value = getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")
        assert torch.equal(getattr(module, name), value) and (value == 0).any()
        gradient = getattr(module, f"{name}_orig").grad
        assert not gradient[getattr(module, f"{name}_mask") == 0].any()
        plain.mha.get_submodule(path).get_parameter(name).data.copy_(value)
    assert torch.equal(out, plain(x))
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-6)  # the fast path reads the weights, too
    folded, found = fold_existing(model)
    assert torch.allclose(folded(x), plain(x), atol=1e-6) and len(found) == 4
    assert type(folded.mha.out_proj) is type(plain.mha.out_proj) and prune.is_pruned(model)


def test_out_proj_in_copies_files_and_state_dicts() -> None:
    model, x = Attention(), torch.randn(2, 3, 8)
    kind, parameter, text = type(model.mha.out_proj), model.mha.out_proj.weight, repr(model)
    prune.l1_unstructured(model.mha.out_proj, "weight", 0.5)
    prune.ln_structured(model.mha.out_proj, "weight", 1, 2, 0, include_bias=True)
    step(model, x)
    assert isinstance(model.mha.out_proj, kind) and repr(model) == text
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        step(other, x)
        assert not torch.equal(other(x), model(x))
    fresh = Attention()
    prune.load_state_dict(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x)) and list(fresh.state_dict()) == list(model.state_dict())
    step(fresh, x)
    expected = model(x)
    theirs.remove(model.mha.out_proj, "weight")
    assert model.mha.out_proj.weight is parameter
    prune.remove(model.mha.out_proj, "bias")
    assert type(model.mha.out_proj) is kind and torch.equal(model(x), expected)
    assert not theirs.is_pruned(model)
    step(model, x)


def test_transformer_layer_in_training_and_evaluation() -> None:
    """Pruned parts must be followed where the layer's fast path reads weights without calling the modules."""
    torch.manual_seed(0)
    layer, plain = (nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True) for _ in range(2))
    places = [
        ("self_attn.out_proj", "weight"),
        ("self_attn", "in_proj_weight"),
        ("linear1", "weight"),
        ("norm1", "weight"),
    ]
    for path, name in places:
        prune.l1_unstructured(layer.get_submodule(path), name, 0.5)
    x = torch.randn(2, 3, 8)
    for _ in range(2):
        layer.zero_grad()
        step(layer, x)
    layer.eval(), plain.eval()
    with torch.no_grad():
        found = layer(x)
        state = fold_existing(layer)[0].state_dict()
        plain.load_state_dict(state)
        assert torch.allclose(found, plain(x), atol=1e-6)


@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_weights_follow_their_optimiser(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model, plain = make(4, 5, num_layers=2), make(4, 5, num_layers=2)
    names = ["weight_ih_l0", "weight_hh_l1", "bias_ih_l1"]
    for name in names:
        prune.l1_unstructured(model, name, 0.4)
    x = torch.randn(3, 2, 4)
    for _ in range(3):
        model.zero_grad()
        step(model, x)
    for name in plain._flat_weights_names:
        value = (
            getattr(model, f"{name}_orig") * getattr(model, f"{name}_mask") if name in names else getattr(model, name)
        )
        plain.get_parameter(name).data.copy_(value)
    assert torch.equal(model(x)[0], plain(x)[0])
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x)[0], plain(x)[0])
    assert torch.equal(model.double()(x.double())[0].float(), plain.double()(x.double())[0].float())
    for name in names:
        prune.remove(model, name)
    assert all(isinstance(weight, nn.Parameter) for weight in model._flat_weights)
    step(model, x.double())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.third = nn.Embedding(6, 4), nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
        self.head.weight = self.third.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x)) + self.third(self.embed(x))


CALLS: dict[str, Callable[[nn.Module, nn.Module], object]] = {
    "identity": lambda m, model: prune.identity(m, "weight", model=model),
    "l1": lambda m, model: prune.l1_unstructured(m, "weight", 0.5, model=model),
    "random": lambda m, model: prune.random_unstructured(m, "weight", 0.5, model=model),
    "ln": lambda m, model: prune.ln_structured(m, "weight", 2, 2, 0, model=model),
    "channels": lambda m, model: prune.random_structured(m, "weight", 2, 1, model=model),
    "mask": lambda m, model: prune.custom_from_mask(m, "weight", torch.rand(6, 4) > 0.5, model=model),
    "global": lambda m, model: prune.global_unstructured(
        [(m, "weight")], prune.L1Unstructured, amount=0.5, model=model
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_owner_of_a_tied_weight_is_masked(name: str) -> None:
    model = Tied()
    weight = model.embed.weight
    for round_, first in enumerate((model.head, model.embed)):
        CALLS[name](first, model)
        for owner in (model.embed, model.head, model.third):
            assert owner.weight_orig is weight and torch.equal(owner.weight_mask, first.weight_mask)
            (hook,) = [hook for hook in owner._forward_pre_hooks.values()]
            assert (len(hook) if round_ else 1) == round_ + 1
    step(model, torch.arange(6))
    model(torch.arange(6))
    assert torch.equal(model.embed.weight, model.head.weight)
    twin = copy.deepcopy(model)
    assert twin.embed.weight_orig is twin.head.weight_orig
    folded, found = fold_existing(model)
    assert folded.embed.weight is folded.head.weight and len(found) == 3
    prune.remove(model.third, "weight", model=model)
    assert model.embed.weight is model.head.weight is weight and not prune.is_pruned(model)


def test_tied_owners_pruned_apart_before() -> None:
    """What either owner lost stays lost at both, and the amount is of what remains."""
    model = Tied()
    prune.custom_from_mask(model.embed, "weight", torch.arange(24).view(6, 4) >= 6)
    prune.l1_unstructured(model.head, "weight", 9, model=model)
    assert (model.head.weight_mask == 0).sum() == 15
    assert torch.equal(model.embed.weight_mask, model.head.weight_mask)
    model = Tied()
    prune.custom_from_mask(model.embed, "weight", torch.arange(24).view(6, 4) >= 6)
    prune.custom_from_mask(model.head, "weight", torch.arange(24).view(6, 4) < 20)
    prune.identity(model.third, "weight", model=model)
    expected = [0.0] * 6 + [1.0] * 14 + [0.0] * 4
    for owner in (model.embed, model.head, model.third):
        assert owner.weight_mask.flatten().tolist() == expected


def test_the_bias_goes_with_its_channels() -> None:
    torch.manual_seed(0)
    for module, dim in [
        (nn.Linear(5, 6), 0),
        (nn.Conv2d(4, 6, 3, groups=2), 0),
        (nn.ConvTranspose1d(4, 6, 3), 1),
        (nn.Bilinear(2, 3, 6), 0),
        (nn.Linear(5, 6), -2),
    ]:
        prune.l1_unstructured(module, "bias", 1)
        prune.ln_structured(module, "weight", 2, 2, dim, include_bias=True)
        alive = module.weight_mask.movedim(dim, 0).flatten(1).any(1)
        assert (~alive).sum() == 2 and not module.bias_mask[~alive].any()
        assert module.bias_mask[alive].sum() >= 3
        before = module.bias_mask
        prune.random_structured(module, "weight", 1, dim, include_bias=True)
        gone = alive & ~module.weight_mask.movedim(dim, 0).flatten(1).any(1)
        assert gone.sum() == 1 and torch.equal(module.bias_mask, before * ~gone)
    module = prune.ln_structured(nn.Linear(5, 6), "weight", 2, 2, 0)  # these leave their bias, which stays
    prune.ln_structured(module, "weight", 1, 2, 0, include_bias=True)
    assert module.bias_mask.sum() == 5 and module.weight_mask.amax(1).sum() == 3
    bare = prune.ln_structured(nn.Linear(5, 6, bias=False), "weight", 2, 2, 0, include_bias=True)
    assert (bare.weight_mask.amax(1) == 0).sum() == 2
    model = Tied()
    prune.ln_structured(model.head, "weight", 2, 2, 0, include_bias=True, model=model)
    assert torch.equal(model.head.bias_mask, model.embed.weight_mask.amax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_generator_draws_what_its_seed_would(dtype: torch.dtype) -> None:
    for name, rest in (("random_unstructured", ()), ("random_structured", (1,))):
        for seed in (0, 7):
            seeded, given = nn.Linear(40, 40, dtype=dtype), nn.Linear(40, 40, dtype=dtype)
            generator = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed)
            for _ in range(2):
                getattr(theirs, name)(seeded, "weight", 0.4, *rest)
            state = torch.get_rng_state()
            for _ in range(2):
                getattr(prune, name)(given, "weight", 0.4, *rest, generator=generator)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(given.weight_mask, seeded.weight_mask)
    method = prune.RandomUnstructured(0.5, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    expected = theirs.RandomUnstructured(0.5).prune(torch.ones(4, 5))
    assert torch.equal(method.prune(torch.ones(4, 5)), expected)
    pickle.dumps(given)
    (hook,) = copy.deepcopy(given)._forward_pre_hooks.values()
    assert hook[0].amount == 0.4 and hook[0].generator is None and copy.deepcopy(method).generator is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats(dtype: torch.dtype) -> None:
    values = (torch.randperm(56) - 28).view(8, 7).float()
    module, same = (nn.Linear(7, 8) for _ in range(2))
    module.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    same.weight = nn.Parameter(values.to(dtype).float())
    for each in (module, same):
        torch.manual_seed(0)
        prune.l1_unstructured(each, "weight", 3, importance_scores=values)
        prune.l1_unstructured(each, "weight", 0.25)
        prune.ln_structured(each, "weight", 2, "nuc", 0)
        prune.random_structured(each, "weight", 1, 1)
        prune.custom_from_mask(each, "weight", torch.arange(56).view(8, 7) != 5)
        prune.global_unstructured([(each, "weight"), (each, "bias")], prune.L1Unstructured, amount=0.0)
    assert module.weight_mask.dtype == dtype and module.weight.dtype == dtype
    assert torch.equal(module.weight_mask.float(), same.weight_mask)
    assert torch.equal(module.weight.float(), same.weight + 0.0)
    prune.random_unstructured(module, "weight", 4)
    prune.global_unstructured([(module, "weight"), (same, "weight")], prune.RandomUnstructured, amount=0.2)
    folded, found = fold_existing(module)
    assert torch.equal(folded.weight.float(), module.weight.float())
    assert torch.equal(found["weight"], module.weight_mask.float() != 0)
    copy.deepcopy(module)
    expected = module.weight.float()
    prune.remove(module, "weight")
    assert torch.equal(module.weight.float(), expected)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_layouts_other_than_contiguous(layout: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 6, 3, 3)
    odd = {
        "channels_last": lambda: values.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: values.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda: torch.stack([values, values], -1)[..., 0],
    }[layout]()
    assert not odd.is_contiguous()
    module, plain = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)
    module.weight, plain.weight = nn.Parameter(odd), nn.Parameter(values.clone())
    for each in (module, plain):
        torch.manual_seed(1)
        prune.l1_unstructured(each, "weight", 0.3)
        prune.random_unstructured(each, "weight", 0.2)
        if layout == "channels_last":
            assert module.weight_mask.is_contiguous(memory_format=torch.channels_last)
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
        prune.ln_structured(each, "weight", 1, 2, 1)
        prune.random_structured(each, "weight", 1, 0)
        prune.custom_from_mask(each, "weight", values > -1)
        prune.global_unstructured([(each, "weight"), (each, "bias")], prune.L1Unstructured, amount=0.3)
        prune.global_unstructured([(each, "weight"), (each, "bias")], prune.RandomUnstructured, amount=0.3)
    assert torch.equal(module.weight_mask, plain.weight_mask) and torch.equal(module.weight, plain.weight)
    if layout == "channels_last":
        for tensor in (module.weight, module.weight_mask, module.weight_orig):
            assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_no_elements_and_no_dimensions() -> None:
    module = nn.Module()
    module.empty, module.scalar = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.tensor(3.0))
    for n in (2, float("inf"), "nuc"):
        prune.ln_structured(module, "empty", 0.7, n, 1)
    prune.l1_unstructured(module, "empty", 0.5)
    prune.random_unstructured(module, "empty", 0.5)
    prune.random_unstructured(module, "scalar", 0.5)  # half to even: none of one
    assert module.scalar == 3
    prune.global_unstructured([(module, "empty"), (module, "scalar")], prune.L1Unstructured, amount=1)
    assert module.scalar == 0 and module.scalar_mask.shape == () and module.empty_mask.shape == (0, 3)


def test_a_mask_of_another_device_or_dtype_fits() -> None:
    module = nn.Linear(2, 3)
    prune.custom_from_mask(module, "bias", torch.tensor([True, False, True]))
    prune.custom_from_mask(module, "weight", torch.tensor([[0.5, 1], [0, 1], [1, 0.25]]))
    assert torch.equal(module.weight, module.weight_orig * torch.tensor([[0.5, 1], [0, 1], [1, 0.25]]))
    assert module.bias_mask.dtype is torch.float32 and torch.equal(module.bias_mask, torch.tensor([1.0, 0, 1]))
    (one, two) = module._forward_pre_hooks.values()
    assert torch.equal(one.mask, torch.tensor([True, False, True])) and torch.equal(two.mask, module.weight_mask)
    meta = prune.l1_unstructured(nn.Linear(3, 3, device="meta"), "weight", 0.5)
    assert meta.weight.is_meta and meta.weight_mask.is_meta
    prune.ln_structured(meta := nn.Linear(3, 3, device="meta"), "weight", 1, 2, 0)
    assert meta.weight.is_meta and meta.weight_mask.is_meta


def test_a_default_device_does_not_matter():
    """A mask is counted on the CPU whatever device new tensors get."""
    first, second = (nn.Linear(6, 5) for _ in range(2))
    second.load_state_dict(first.state_dict())
    theirs.l1_unstructured(first, "weight", amount=0.4)
    with torch.device("meta"):
        prune.l1_unstructured(second, "weight", amount=0.4)
    assert torch.equal(first.weight_mask, second.weight_mask)


def test_owners_of_one_tensor_have_masks_of_their_own():
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    model[1].weight = model[0].weight
    prune.l1_unstructured(model[0], "weight", amount=0.4, model=model)
    assert torch.equal(model[0].weight_mask, model[1].weight_mask)


def test_a_copy_under_no_grad_trains():
    layer = prune.l1_unstructured(nn.Linear(6, 5), "weight", amount=0.4)
    with torch.no_grad():
        other = copy.deepcopy(layer)
    other(torch.randn(2, 6)).sum().backward()
    assert other.weight_orig.grad is not None and layer.weight_orig.grad is None


def test_a_seed_is_no_generator():
    with pytest.raises(TypeError, match=r"torch\.Generator"):
        prune.random_unstructured(nn.Linear(6, 5), "weight", amount=0.4, generator=42)
