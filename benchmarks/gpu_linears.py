"""Sparse linear layers on a GPU against cuBLAS on the same weight, for `benchmarks.gpu`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.lower.layouts import CuSparseLt
from fxprune.measure.timing import interleave_graphs
from triton_kernels import bitmap, blocks, gemv24, nonzeros, prune24

# [o, i] of the linear layers of Llama 2 7B, in the order of their bytes.
SHAPES = ((11008, 4096), (4096, 11008), (4096, 4096), (12288, 4096))
# A graph multiplies by so many copies of a weight, which hides what it costs to start one.
COPIES = 4
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The tensors of a 2:4 weight: values and meta, or one that only a library reads."""

    tensors: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """A sparse linear layer: x [m, i], its weight [o, i] dense, what it is packed as, and how that is multiplied.

    `limit` is how many times more the dense product must move, in bytes, or multiply.
    """

    kernel: str
    case: str
    x: Tensor
    weight: Tensor
    packed: Any
    multiply: Callable[[Tensor, Any], Tensor]
    limit: float


def close(found: Tensor, wanted: Tensor) -> float:
    """max|a - b| / max|b|; what bfloat16 results of float32 sums may differ by is 2 ** -7 at most."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-30))


def random_weight(o: int, i: int, zeros: float, device: torch.device, dtype: torch.dtype, tile: int = 1) -> Tensor:
    """A weight [o, i] with so many zeros, in squares of side `tile`."""
    keep = torch.rand(o // tile, i // tile, device=device) >= zeros
    weight = torch.randn(o, i, device=device, dtype=dtype)
    return torch.where(keep.repeat_interleave(tile, 0).repeat_interleave(tile, 1), weight, 0.0)


def size_of(packed: Any) -> int:
    """Bytes of the tensors that a weight is packed as."""
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(vars(packed)) if isinstance(t, Tensor))


def copied(packed: Any) -> Any:
    """The same in memory of its own."""
    return type(packed)(
        **{name: pytree.tree_map_only(Tensor, torch.clone, value) for name, value in vars(packed).items()}
    )


def works(
    device: torch.device, dtype: torch.dtype, *, quick: bool = False, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> Iterator[Work]:
    """Every layout at its shapes, amounts of zeros and numbers of tokens."""
    for o, i in shapes[:1] if quick else shapes:
        yield from two_of_four(o, i, device, dtype)
        yield from scattered(o, i, device, dtype)
        yield from tiled(o, i, device, dtype)


def moved(o: int, i: int, tokens: int, packed: Any = None) -> int:
    """Bytes of the weight, packed or dense, of x and of y."""
    return (2 * o * i if packed is None else size_of(packed)) + 2 * tokens * (o + i)


def two_of_four(o: int, i: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """2:4 by our kernel for few tokens, by cuSPARSELt for many."""
    pair = Pair(prune24.pack(random_weight(o, i, 0.0, device, dtype)))
    weight = prune24.unpack(*pair.tensors)

    def gemv(x: Tensor, packed: Pair) -> Tensor:
        values, meta = packed.tensors
        return gemv24.linear(x, values, meta)

    for tokens in (1, 4, 16):
        x = torch.randn(tokens, i, device=device, dtype=dtype)
        limit = moved(o, i, tokens) / moved(o, i, tokens, pair)
        yield Work("gemv24", f"M={tokens}", x, weight, pair, gemv, limit)
    if not torch.backends.cusparselt.is_available():
        return
    library = CuSparseLt()
    compressed = Pair(library.split(weight))

    def product(x: Tensor, packed: Pair) -> Tensor:
        return library.launch(x, packed.tensors, None, (o, i), "")

    for tokens in (64, 512, 2048, 4096):
        x = torch.randn(tokens, i, device=device, dtype=dtype)
        yield Work("cusparselt", f"M={tokens}", x, weight, compressed, product, 2.0)


def scattered(o: int, i: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """Zeros anywhere."""
    for layout, zeros in ((nonzeros, (0.7, 0.8, 0.9)), (bitmap, (0.5, 0.6))):
        name = layout.__name__.rpartition(".")[2]
        for amount in zeros:
            weight = random_weight(o, i, amount, device, dtype)
            packed = layout.pack(weight)
            for tokens in (1, 4, 16):
                x = torch.randn(tokens, i, device=device, dtype=dtype)
                limit = moved(o, i, tokens) / moved(o, i, tokens, packed)
                yield Work(name, f"{amount:.0%}, M={tokens}", x, weight, packed, layout.linear, limit)


def tiled(o: int, i: int, device: torch.device, dtype: torch.dtype, tile: int = 64) -> Iterator[Work]:
    """Zero tiles; with many tokens the multiply-adds are the limit, and they shrink as the tiles do."""
    for amount in (0.5, 0.8, 0.9):
        weight = random_weight(o, i, amount, device, dtype, tile)
        packed = blocks.pack(weight, (tile, tile))
        for tokens in (1, 16, 2048):
            x = torch.randn(tokens, i, device=device, dtype=dtype)
            many = o * i / max(1, packed.values.numel())
            limit = many if tokens >= 64 else moved(o, i, tokens) / moved(o, i, tokens, packed)
            yield Work("blocks", f"{amount:.0%}, M={tokens}", x, weight, packed, blocks.linear, limit)


def error_of(work: Work) -> float:
    """How far the packed product is from that of plain torch in float32."""
    return close(work.multiply(work.x, work.packed), F.linear(work.x.float(), work.weight.float()))


def measure(work: Work, seconds: float) -> Row:
    """The row of one layer; without times where it is wrong."""
    o, i = work.weight.shape
    row: Row = {"kernel": work.kernel, "case": work.case, "shape": f"{o}x{i}", "limit": work.limit}
    row["error"] = error_of(work)
    if row["error"] > 2**-7:
        return row
    weights = [work.weight, *(work.weight.clone() for _ in range(COPIES - 1))]
    packed = [work.packed, *(copied(work.packed) for _ in range(COPIES - 1))]
    functions = [
        lambda: [F.linear(work.x, weight) for weight in weights],
        lambda: [work.multiply(work.x, each) for each in packed],
    ]
    dense, sparse = (
        median(samples) / COPIES for samples in interleave_graphs(functions, work.x.device, seconds=seconds)
    )
    return row | {"dense": dense, "sparse": sparse, "ratio": dense / sparse}
