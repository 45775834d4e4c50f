"""Selection: exact counts, torch's masks, ties by lowest index, existing masks, memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fxprune.errors import InputError
from fxprune.plan.patterns import Existing
from fxprune.plan.plan import Candidate, Plan, Rule, Sparsity, Unstructured
from fxprune.select import mask as mask_module
from fxprune.select.elements import select
from fxprune.select.mask import PackedMask
from fxprune.select.selection import Selection
from tests.own_process import printed

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def choose(
    weights: Mapping[str, Tensor],
    sparsity: Sparsity,
    scope: str = "local",
    existing: Mapping[str, PackedMask | Tensor] | None = None,
    pattern: str = "*",
) -> Selection:
    plan = Plan([Rule(pattern, sparsity, scope)])
    binding = plan.bind({name: Candidate(tuple(w.shape), w.dtype, True) for name, w in weights.items()})
    return select(weights, existing or {}, plan, binding)


def random(shape: list[int] | tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(weights: list[Tensor], count: int, existing: list[Tensor] | None = None) -> list[Tensor]:
    """The definition: order by (masked first, score, position in the pool), mask the first `count`."""
    flat = torch.cat([w.double().abs().flatten() for w in weights])
    if existing is not None:
        kept = torch.cat([keep.flatten() for keep in existing])
        flat = torch.where(kept, flat, -1.0)
        count = max(count, int((~kept).sum()))
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    keep[flat.argsort(stable=True)[:count]] = False
    return [part.view_as(w) for part, w in zip(keep.split([w.numel() for w in weights]), weights, strict=True)]


def torch_masks(weights: Mapping[str, Tensor], amount: int | float, scope: str) -> dict[str, Tensor]:
    modules = {}
    for name, weight in weights.items():
        modules[name] = nn.Module()
        modules[name].weight = nn.Parameter(weight.clone())
    if scope == "global":
        pairs = [(module, "weight") for module in modules.values()]
        torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=amount)
    else:
        for module in modules.values():
            torch_prune.l1_unstructured(module, "weight", amount)
    return {name: module.weight_mask != 0 for name, module in modules.items()}


@pytest.fixture(params=["small pieces", "whole pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small pieces":
        monkeypatch.setattr(mask_module, "CHUNK", 16)


shapes = st.lists(st.integers(1, 12), min_size=1, max_size=4)
amounts = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.5, 0.9, 1.0]))


@settings(deadline=None, max_examples=120)
@given(
    many=st.lists(shapes, min_size=1, max_size=4),
    amount=amounts,
    scope=st.sampled_from(["local", "global"]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_masks_are_torchs(many: list[list[int]], amount: float, scope: str, dtype: torch.dtype, seed: int) -> None:
    weights = {f"w{i}": random(shape, dtype, seed + i) for i, shape in enumerate(many)}
    ours = choose(weights, Unstructured(amount), scope).mask
    theirs = torch_masks(weights, amount, scope)
    pools = [list(weights)] if scope == "global" else [[name] for name in weights]
    for pool in pools:
        score = torch.cat([weights[name].abs().flatten() for name in pool])
        a = torch.cat([ours[name].unpack().flatten() for name in pool])
        b = torch.cat([theirs[name].flatten() for name in pool])
        assert int((~a).sum()) == int((~b).sum()) == round(amount * score.numel())
        # they may differ among elements that tie at the threshold, and nowhere else
        if bool((~a).any()):
            tied = score == score[~a].max()
            assert torch.equal(a[~tied], b[~tied])
            if int((~a & tied).sum()) == int(tied.sum()):
                assert torch.equal(a, b)


@settings(deadline=None, max_examples=80)
@given(
    many=st.lists(shapes, min_size=1, max_size=3),
    amount=amounts,
    dtype=st.sampled_from(FLOATS),
    levels=st.integers(1, 5),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ties_take_the_lowest_index(
    many: list[list[int]], amount: float, dtype: torch.dtype, levels: int, masked: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    signed = [torch.randint(-levels, levels + 1, shape, generator=draw) for shape in many]
    weights = [(value * 0.25).to(dtype) for value in signed]
    kept = [torch.rand(shape, generator=draw) < 0.7 for shape in many] if masked else None
    named = {f"w{i}": w for i, w in enumerate(weights)}
    existing: dict[str, PackedMask | Tensor] = {f"w{i}": keep for i, keep in enumerate(kept or [])}
    found = choose(named, Unstructured(amount), "global", existing)
    count = round(amount * sum(w.numel() for w in weights))
    for name, wanted in zip(named, reference(weights, count, kept), strict=True):
        assert torch.equal(found.mask[name].unpack(), wanted)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("amount", [0, 1, 7, 39, 40, 0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("values", ["zero", "equal", "minus zero", "subnormal", "random", "huge"])
def test_hard_values(amount: int | float, values: str) -> None:
    weight = {
        "zero": torch.zeros(40),
        "equal": torch.full((40,), -2.5),
        "minus zero": torch.tensor([0.0, -0.0] * 20),
        "subnormal": random((40,)) * 1e-42,
        "random": random((40,)),
        "huge": torch.tensor([3.4028235e38, 1e-45] * 20),
    }[values].view(8, 5)
    found = choose({"w": weight}, Unstructured(amount)).mask["w"].unpack()
    count = amount if isinstance(amount, int) else round(amount * 40)
    assert torch.equal(found, reference([weight], count)[0])


@pytest.mark.usefixtures("pieces")
def test_dtypes_mix_in_one_pool() -> None:
    weights = [random((9, 5), dtype, seed) for seed, dtype in enumerate(FLOATS)]
    for used in (weights, weights[1:], weights[2:]):
        named = {f"w{i}": w for i, w in enumerate(used)}
        found = choose(named, Unstructured(0.6), "global")
        for name, wanted in zip(named, reference(used, round(0.6 * 45 * len(used))), strict=True):
            assert torch.equal(found.mask[name].unpack(), wanted)


def test_fp8() -> None:
    weight = random((16, 16)).to(torch.float8_e4m3fn)
    found = choose({"w": weight}, Unstructured(0.5)).mask["w"].unpack()
    assert torch.equal(found, reference([weight], 128)[0])


@pytest.mark.usefixtures("pieces")
def test_strided_weights() -> None:
    weight = random((6, 5, 4, 3)).to(memory_format=torch.channels_last)
    for strided in (weight, random((12, 10)).t(), random((20, 10))[::2, 1:], random((1, 6)).expand(4, 6)):
        found = choose({"w": strided}, Unstructured(0.5)).mask["w"].unpack()
        assert torch.equal(found, reference([strided], strided.numel() // 2)[0])


@pytest.mark.parametrize(("size", "amount", "count"), [(5, 0.5, 2), (7, 0.5, 4), (3, 0.5, 2), (10, 0.25, 2)])
def test_fractions_round_half_to_even(size: int, amount: float, count: int) -> None:
    found = choose({"w": random((size, 1))}, Unstructured(amount))
    assert found.mask["w"].kept() == size - count
    assert found.asked["w"] == count / size


def test_empty_and_scalar_weights() -> None:
    weights = {"none": torch.ones(0, 4), "one": torch.tensor(3.0), "some": random((3, 3))}
    for scope in ("local", "global"):
        found = choose(weights, Unstructured(1.0), scope)
        assert [found.reached(name) for name in weights] == [0.0, 1.0, 1.0]
    assert choose({"none": weights["none"]}, Unstructured(0.5), "global").mask["none"].shape == (0, 4)


def test_global_pools_only_what_the_rule_won() -> None:
    weights = {"a.x": random((8, 8)), "a.y": random((8, 8), seed=1) * 10, "b": random((8, 8), seed=2) * 1e-3}
    plan = Plan([Rule("*", Unstructured(0.5), "global"), Rule("b", Unstructured(3))])
    binding = plan.bind({name: Candidate((8, 8), w.dtype, True) for name, w in weights.items()})
    found = select(weights, {}, plan, binding)
    wanted = reference([weights["a.x"], weights["a.y"]], 64)
    assert torch.equal(found.mask["a.x"].unpack(), wanted[0])
    assert torch.equal(found.mask["a.y"].unpack(), wanted[1])
    assert found.mask["b"].kept() == 61
    assert found.asked == {"a.x": 0.5, "a.y": 0.5, "b": 3 / 64}


def test_existing_masks_count_and_are_never_revived() -> None:
    weight = torch.arange(1.0, 101).view(10, 10)
    keep = torch.ones(10, 10, dtype=torch.bool)
    keep[5:] = False  # the largest ones, so that only the mask can say that they go first
    held = choose({"w": weight}, Unstructured(0.3), existing={"w": keep})
    assert torch.equal(held.mask["w"].unpack(), keep)
    assert held.asked["w"] == 0.3 and held.reached("w") == 0.5
    more = choose({"w": weight}, Unstructured(0.6), existing={"w": PackedMask.pack(keep)})
    assert torch.equal(more.mask["w"].unpack(), keep & (weight > 10))
    # a zero in the weight is not a masked element: those go before it
    weight[0, 0] = 0.0
    more = choose({"w": weight}, Unstructured(51), existing={"w": keep})
    assert not bool(more.mask["w"].unpack()[0, 0]) and more.reached("w") == 0.51


def test_zeros_count_towards_the_amount() -> None:
    weight = random((10, 10)) * (torch.arange(100).view(10, 10) % 2)
    assert torch.equal(choose({"w": weight}, Unstructured(0.5)).mask["w"].unpack(), weight != 0)


def test_weights_no_rule_binds_keep_their_masks() -> None:
    weights = {"a": random((4, 4)), "b": random((4, 4), seed=1), "c": random((4, 4), seed=2)}
    keep = weights["b"] > 0
    found = choose(weights, Unstructured(0.5), existing={"b": keep}, pattern="a")
    assert list(found.mask) == ["a", "b"] and torch.equal(found.mask["b"].unpack(), keep)
    assert found.asked == {"a": 0.5, "b": None}
    assert found.reached("c") == 0.0


@pytest.mark.usefixtures("pieces")
def test_existing_rule_takes_masks_else_zeros() -> None:
    weights = {"masked": random((6, 7)), "zeros": random((6, 7)).relu() * -1, "dense": random((6, 7))}
    keep = random((6, 7), seed=5) > 0
    found = choose(weights, Existing(), existing={"masked": keep})
    assert torch.equal(found.mask["masked"].unpack(), keep)
    assert torch.equal(found.mask["zeros"].unpack(), weights["zeros"] != 0)
    assert found.reached("dense") == 0.0
    assert set(found.asked.values()) == {None}


def test_a_function_as_score() -> None:
    weight = random((6, 7))
    found = choose({"w": weight}, Unstructured(0.5, lambda w: (w - w.max()).abs())).mask["w"].unpack()
    assert torch.equal(found, reference([weight - weight.max()], 21)[0])
    calls = []

    def noisy(w: Tensor) -> Tensor:
        calls.append(1)
        return torch.rand_like(w)

    assert choose({"w": weight}, Unstructured(0.5, noisy)).mask["w"].kept() == 21
    assert len(calls) == 1


def test_apply() -> None:
    weight = random((4, 5))
    keep = random((4, 5), seed=1) > 0
    broken = torch.where(keep, weight, float("nan"))
    selection = Selection(mask={"w": PackedMask.pack(keep)})
    out = selection.apply("w", broken)
    assert torch.equal(out, torch.where(keep, weight, 0.0))
    assert not bool(torch.signbit(selection.apply("w", -weight.abs()))[~keep].any())
    assert selection.apply("other", weight) is weight
    for dtype in (torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        assert selection.apply("w", weight.to(dtype)).dtype == dtype
    selection.values["w"] = weight * 2
    assert torch.equal(selection.apply("w", broken), torch.where(keep, weight * 2, 0.0))
    with pytest.raises(InputError) as error:
        selection.apply("w", random((5, 4)))
    assert error.value.where and error.value.why and error.value.do


def test_a_selection_pickles_and_copies() -> None:
    selection = choose({"w": random((5, 5))}, Unstructured(0.5))
    for other in (pickle.loads(pickle.dumps(selection)), copy.deepcopy(selection)):
        assert torch.equal(other.mask["w"].bits, selection.mask["w"].bits)
        assert other.asked == selection.asked and other.reached("w") == selection.reached("w")


def test_weights_are_only_read() -> None:
    weight = nn.Parameter(random((5, 5)))
    before = weight.detach().clone()
    found = choose({"w": weight}, Unstructured(0.5))
    assert torch.equal(weight.detach(), before) and weight.grad is None
    assert found.mask["w"].bits.dtype == torch.uint8 and not found.mask["w"].bits.requires_grad


@pytest.mark.parametrize(
    ("weight", "mask", "words"),
    [
        (torch.tensor([[1.0, float("nan")]]), None, ['"enc.w" [1, 2]', "NaN"]),
        (torch.tensor([[1.0, float("inf")]]), None, ['"enc.w"', "infinity"]),
        (torch.ones(2, 2, device="meta"), None, ['"enc.w"', "meta"]),
        (torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool), ['"enc.w"', "[2, 3]", "[2, 2]"]),
        (torch.ones(2, 2), torch.ones(2, 2), ['"enc.w"', "float32", "bool"]),
        (torch.ones(2, 2), PackedMask.pack(torch.ones(4, dtype=torch.bool)), ['"enc.w"', "[4]", "[2, 2]"]),
    ],
)
def test_bad_weights_and_masks(weight: Tensor, mask: Tensor | PackedMask | None, words: list[str]) -> None:
    for sparsity in (Unstructured(0.5), Existing()):
        if mask is None and weight.is_meta and isinstance(sparsity, Existing):
            continue
        with pytest.raises(InputError) as error:
            choose({"enc.w": weight}, sparsity, existing=None if mask is None else {"enc.w": mask})
        assert error.value.what and error.value.where and error.value.why and error.value.do
        for word in words:
            assert word in str(error.value)


def test_a_mask_for_an_unknown_weight() -> None:
    with pytest.raises(InputError, match=r'"x".*no weight'):
        choose({"w": random((2, 2))}, Existing(), existing={"x": torch.ones(2, 2, dtype=torch.bool)})


MEASURE = """
import resource, sys, torch
from fxprune.plan.plan import Candidate, Plan, Rule, Unstructured
from fxprune.select.elements import select

def peak():
    if sys.platform == "linux":
        # getrusage's peak would begin at that of the process that started this one.
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def run(weights):
    plan = Plan([Rule("*", Unstructured(0.9), "global")])
    binding = plan.bind({n: Candidate(tuple(w.shape), w.dtype, True) for n, w in weights.items()})
    return select(weights, {}, plan, binding)

run({"warm": torch.randn(100, 100)})
ramp = torch.arange(1000.0)
weights = {str(i): ramp.repeat(10_000) + i for i in range(3)}
weights["0"] = weights["0"].view(1000, 10_000).t()
before = peak()
selection = run(weights)
print(peak() - before, sum(w.numel() for w in weights.values()))
"""


def test_peak_memory() -> None:
    pytest.importorskip("resource")
    extra, size = map(int, printed(MEASURE).split())
    assert size == 30_000_000
    assert extra < size / 8 + 64 * 2**20
