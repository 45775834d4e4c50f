"""Masks of fxprune.prune and of torch.nn.utils.prune, bit for bit, over modules, amounts, norms, dims and rounds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as theirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fxprune.prune as ours

MODULES = {
    "linear": lambda a, b, k: nn.Linear(a, b),
    "conv1d": lambda a, b, k: nn.Conv1d(a, b, k),
    "conv2d": lambda a, b, k: nn.Conv2d(a, b, k),
    "conv3d": lambda a, b, k: nn.Conv3d(a, b, k),
    "transposed": lambda a, b, k: nn.ConvTranspose2d(a, b, k),
    "grouped": lambda a, b, k: nn.Conv2d(2 * a, 2 * b, k, groups=2),
    "embedding": lambda a, b, k: nn.Embedding(a, b),
    "bilinear": lambda a, b, k: nn.Bilinear(a, b, k),
}
NORMS = [0, 1, 2, 3, 0.5, -1, float("inf"), -float("inf"), "fro", "nuc"]


@dataclass(frozen=True)
class Round:
    """One call: the function, its amount, norm and dim, whether scores are given, and the seed set before it."""

    how: str
    amount: float
    n: Any
    dim: int
    scored: bool
    seed: int


def rounds() -> st.SearchStrategy[Round]:
    amounts = st.one_of(st.floats(0, 1), st.sampled_from([0.5, 0.25, 0.1, 1.0]), st.integers(0, 9))
    how = st.sampled_from(["l1", "ln", "random", "channels", "identity", "mask"])
    seeds = st.integers(0, 9999)
    return st.builds(Round, how, amounts, st.sampled_from(NORMS), st.integers(-5, 4), st.booleans(), seeds)


def modules() -> st.SearchStrategy[nn.Module]:
    size = st.integers(1, 6)
    return st.builds(
        lambda kind, a, b, k, seed: (torch.manual_seed(seed), MODULES[kind](a, b, k))[1],
        st.sampled_from(sorted(MODULES)),
        size,
        size,
        st.integers(1, 3),
        st.integers(0, 9999),
    )


def prune(lib: Any, module: nn.Module, step: Round) -> None:
    """Apply one round by either library, with the same scores and the same random numbers."""
    generator = torch.Generator().manual_seed(step.seed)
    shape = module.weight.shape
    scores = torch.randn(shape, generator=generator) if step.scored else None
    mask = torch.rand(shape, generator=generator) > 0.3
    torch.manual_seed(step.seed)
    if step.how == "l1":
        lib.l1_unstructured(module, "weight", step.amount, importance_scores=scores)
    elif step.how == "ln":
        lib.ln_structured(module, "weight", step.amount, step.n, step.dim, importance_scores=scores)
    elif step.how == "random":
        lib.random_unstructured(module, "weight", step.amount)
    elif step.how == "channels":
        lib.random_structured(module, "weight", step.amount, step.dim)
    elif step.how == "identity":
        lib.identity(module, "weight")
    else:
        lib.custom_from_mask(module, "weight", mask)


def tied_at_threshold(module: nn.Module, step: Round) -> bool:
    """Whether the lowest channels' scores are not all different, so that torch may choose freely.

    A channel's score is of what remains of it, and channels that are gone take no part.
    """
    if step.how not in ("ln", "channels"):
        return False
    if not -module.weight.dim() <= step.dim < module.weight.dim():
        return False
    weight, mask = module.weight.detach(), getattr(module, "weight_mask", None)
    if step.scored:
        weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step.seed))
    axis = range(weight.dim())[step.dim]
    alive = slice(None) if mask is None else mask.movedim(axis, 0).flatten(1).any(1)
    rows = weight.movedim(axis, 0)[alive].flatten(1).double()
    if step.how == "channels" or not len(rows):
        return False
    p = {"fro": 2, "nuc": 2}.get(step.n, step.n)
    norms = torch.linalg.vector_norm(rows, p, dim=1)
    gaps = norms.sort().values.diff()
    return bool((gaps <= 1e-5 * norms.max()).any()) or not bool(norms.isfinite().all())


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(modules(), st.lists(rounds(), min_size=1, max_size=3))
def test_masks_equal_torchs(module: nn.Module, steps: list[Round]) -> None:
    other = copy.deepcopy(module)
    original = module.weight
    for step in steps:
        tied = tied_at_threshold(module, step)
        try:
            prune(theirs, other, step)
        except Exception as error:
            if step.n in ("fro", "nuc") and isinstance(error, RuntimeError):
                return  # torch has no such norm of this weight
            with pytest.raises(Exception) as mine:
                prune(ours, module, step)
            assert isinstance(mine.value, type(error))
            return
        prune(ours, module, step)
        if tied:
            left = [each.weight_mask.movedim(step.dim, 0).flatten(1).any(1).sum() for each in (module, other)]
            assert left[0] == left[1]
            return
        assert module.weight_mask.dtype == module.weight_orig.dtype
        assert torch.equal(module.weight_mask, other.weight_mask.to(module.weight_mask.dtype))
        assert torch.equal(module.weight, other.weight)
        assert torch.equal(module.weight.signbit(), other.weight.signbit())
        assert module.weight_orig is original and torch.equal(original, other.weight_orig)
        assert list(module.state_dict()) == list(other.state_dict())


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(modules(), rounds(), st.integers(0, 9999))
def test_ties_take_the_same_number_and_the_lowest_index_first(module: nn.Module, step: Round, seed: int) -> None:
    """Weights of few values: as many go as torch takes, and where ours differs, the elements were equal."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(-2, 3, module.weight.shape, generator=generator).float()
    module.weight = nn.Parameter(few.clone())
    other = copy.deepcopy(module)
    if step.how not in ("l1", "ln") or step.n == "nuc":
        step = Round("l1", step.amount, 1, 0, False, step.seed)
    step = Round(step.how, step.amount, {"fro": 2}.get(step.n, step.n), step.dim, False, step.seed)
    try:
        prune(theirs, other, step)
    except (IndexError, ValueError):
        return
    prune(ours, module, step)
    if step.how == "l1":
        score, mask, theirs_mask = few.abs().flatten(), module.weight_mask.flatten(), other.weight_mask.flatten()
    else:
        axis = range(few.dim())[step.dim]
        rows = few.movedim(axis, 0).flatten(1)
        score = torch.norm(few, p=step.n, dim=[d for d in range(few.dim()) if d != axis])
        mask = module.weight_mask.movedim(axis, 0).flatten(1).amax(1)
        theirs_mask = other.weight_mask.movedim(axis, 0).flatten(1).amax(1)
        assert len(rows) == len(score)
    assert mask.sum() == theirs_mask.sum()
    gone, gone_there = score[mask == 0].sort().values, score[theirs_mask == 0].sort().values
    assert torch.equal(gone, gone_there)
    if len(gone):
        at = score == gone[-1]
        order = mask[at]
        assert torch.equal(order, order.sort().values)  # zeros first: the lowest index goes first


def test_many_equal_channels_go_from_the_front() -> None:
    module = nn.Linear(3, 200)
    module.weight = nn.Parameter(torch.ones(200, 3))
    ours.ln_structured(module, "weight", 77, 2, 0)
    assert torch.equal(module.weight_mask[:, 0], (torch.arange(200) >= 77).float())


@pytest.mark.parametrize("step", [Round("random", 0.4, 1, 0, False, 3), Round("channels", 2, 1, 1, False, 3)])
def test_the_same_numbers_are_drawn(step: Round) -> None:
    module, other = nn.Linear(9, 7), nn.Linear(9, 7)
    after = []
    for lib, each in ((ours, module), (theirs, other)):
        prune(lib, each, step)
        after.append(torch.rand(5))
    assert torch.equal(*after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # 60 different magnitudes, also in bf16
    values = (torch.randperm(60) + 1).view(10, 6).to(dtype) * torch.randn(10, 6).sign().to(dtype)
    module, other = nn.Linear(6, 10), nn.Linear(6, 10)
    for lib, each in ((ours, module), (theirs, other)):
        each.weight = nn.Parameter(values.clone())
        lib.l1_unstructured(each, "weight", 0.3)
        lib.ln_structured(each, "weight", 0.3, n=2, dim=0)
        lib.l1_unstructured(each, "weight", 7)
    assert torch.equal(module.weight_mask, other.weight_mask) and module.weight_mask.dtype == dtype


def test_nan_and_infinity_are_the_largest() -> None:
    values = torch.tensor([[3.0, float("nan"), 1.0], [float("inf"), 2.0, -float("inf")]])
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    for lib, each in ((ours, module), (theirs, other)):
        each.weight = nn.Parameter(values.clone())
        lib.l1_unstructured(each, "weight", 3)
        assert torch.equal(each.weight_mask, torch.tensor([[0.0, 1, 0], [1, 0, 1]]))
    other, module = nn.Linear(3, 2), nn.Linear(3, 2)
    for lib, each in ((ours, module), (theirs, other)):
        each.weight = nn.Parameter(values.clone())
        lib.ln_structured(each, "weight", 2, n=1, dim=1)
        assert torch.equal(each.weight_mask[0], torch.tensor([0.0, 1, 0]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.float64, torch.float16])
def test_scores_of_any_dtype(dtype: torch.dtype) -> None:
    scores = (torch.randperm(60, generator=torch.Generator().manual_seed(1)) + 3).view(10, 6).to(dtype)
    module, other = nn.Linear(6, 10), nn.Linear(6, 10)
    ours.l1_unstructured(module, "weight", 0.35, importance_scores=scores)
    theirs.l1_unstructured(other, "weight", 0.35, importance_scores=scores)
    assert torch.equal(module.weight_mask, other.weight_mask)
    ours.ln_structured(module, "weight", 2, 2, 0, importance_scores=scores)  # torch has no norm of integers
    if dtype.is_floating_point:
        theirs.ln_structured(other, "weight", 2, 2, 0, importance_scores=scores)
        assert torch.equal(module.weight_mask, other.weight_mask.float())
    assert module.weight_mask.dtype is torch.float32


def test_large_integers_are_ranked_exactly() -> None:
    scores = torch.tensor([[2**60 + 3, -(2**60) - 1, 2**60 + 2, -128]])
    module = nn.Linear(4, 1)
    ours.l1_unstructured(module, "weight", 2, importance_scores=scores)
    assert module.weight_mask.tolist() == [[1, 0, 1, 0]]
    ours.l1_unstructured(small := nn.Linear(2, 1), "weight", 1, torch.tensor([[-128, 127]], dtype=torch.int8))
    assert small.weight_mask.tolist() == [[1, 0]]
    ours.l1_unstructured(small := nn.Linear(2, 1), "weight", 1, torch.tensor([[True, False]]))
    assert small.weight_mask.tolist() == [[1, 0]]
    pool = [(nn.Linear(3, 1), "weight"), (nn.Linear(2, 1), "weight")]
    scores = {pool[0]: torch.tensor([[2**30 + 1, 2**30, 2**30 + 2]]), pool[1]: torch.tensor([[2.0**30, 0.5]])}
    ours.global_unstructured(pool, ours.L1Unstructured, scores, amount=4)
    assert pool[0][0].weight_mask.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("n", NORMS)
def test_norms_of_every_weight(n: Any) -> None:
    """Against the definition, slice by slice."""
    weight = torch.randn(4, 3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (weight, weight[..., 0, 0], weight[..., 0], weight[:, :, :0]):
        for dim in range(-t.dim(), t.dim()):
            found = ours._compute_norm(t, n, dim)
            slices = t.movedim(dim, 0)
            if t.numel() == 0:
                assert torch.equal(found, torch.zeros(len(slices), dtype=t.dtype))
            elif n == "nuc":
                matrices = [s.reshape(1, -1) if s.dim() == 1 else s.flatten(1) for s in slices]
                expected = torch.stack([torch.linalg.svdvals(m).sum() for m in matrices])
                torch.testing.assert_close(found, expected)
            else:
                p = 2 if n == "fro" else n
                expected = torch.stack([torch.linalg.vector_norm(s.flatten(), p) for s in slices])
                torch.testing.assert_close(found, expected)
