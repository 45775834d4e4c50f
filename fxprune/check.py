"""check: the result held against the oracle, the captured model with the selection applied and nothing else changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.couple.removal import Removal, named_arguments
from fxprune.graph.program import Program, names_of_parameters

from .capture import Capture
from .entry import TensorInput
from .errors import CheckError, InputError
from .selection import Selection

# max|a - b| / max|b| per output tensor, end to end over a whole model. A half type loses about one unit in the last
# place at every rounding that a compiler moves; over tens of layers that adds up to these.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one call, with words that say what it is."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copy(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that a model may write to: the tensors are copies with the same strides."""
        return pytree.tree_map(lambda leaf: _copy(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs))


@dataclasses.dataclass(frozen=True)
class CheckRow:
    """One comparison: what with what, on which input, the largest relative error over the outputs, its tolerance."""

    what: str
    call: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance (a NaN error is not)."""
        return self.error <= self.tolerance


class Oracle(torch.fx.Interpreter):
    """Runs a captured program with the selection's values and zeros applied as weights are fetched, one at a time.

    `removal` says which slices of which tensors leave, and are zero here, and which statistics run over the rest. With
    `wide` a program in half precision runs in float32, where rounding hides nothing.
    """

    def __init__(
        self, program: Program, selection: Selection, removal: Removal | None = None, *, wide: bool = False
    ) -> None:
        super().__init__(program)
        self._selection = selection
        self._removal = removal or Removal()
        self._wide = wide
        self._canonical = names_of_parameters(program)

    def fetch_attr(self, target: str) -> Any:
        """The parameter or buffer with the selection's value, masked where the selection masks it."""
        value = super().fetch_attr(target)
        if not isinstance(value, Tensor):
            return value
        value = self._selection.apply(self._canonical.get(target, target), value.detach())
        return self._widened(self._removal.apply(target, value))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The input of this name."""
        return self._widened(super().placeholder(target, args, kwargs))

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> tuple[Any, Any]:
        """The arguments of a node, with dtypes among them as wide as the tensors."""
        return pytree.tree_map(self._widened, super().fetch_args_kwargs_from_env(n))

    def _widened(self, value: Any) -> Any:
        if self._wide and isinstance(value, torch.dtype):
            return torch.float32 if value in HALF else value
        if self._wide and isinstance(value, Tensor) and value.dtype in HALF:
            return value.float()
        return value

    def run_node(self, n: torch.fx.Node) -> Any:
        """The node's value; a statistic over an axis that shrinks runs over what is kept of it."""
        statistic = self._removal.statistics.get(n.name)
        if statistic is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return statistic.run(n, named_arguments(n.target, args, kwargs))

    def outputs(self, call: Call) -> list[Any]:
        """Flat outputs of one call."""
        return run_flat(self, call)


def run_flat(interpreter: torch.fx.Interpreter, call: Call) -> list[Any]:
    """Flat outputs of one call of a program that an interpreter runs."""
    program = interpreter.module
    with torch.no_grad():
        flat = program.graph.process_inputs(*_in_order(program, *call.copy()))  # pyright: ignore
        return pytree.tree_leaves(interpreter.run(*flat, enable_io_processing=False))


def _in_order(program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    info = getattr(program.graph._codegen, "pytree_info", None)
    if info is None:
        return [*args, *kwargs.values()]
    names = [n for n in info.orig_args if n != "self"]
    return [*args, *(kwargs[n] for n in names[len(args) :])]


def _copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return tensor.clone()
    # Elements of an expanded tensor share memory, so the memory is copied, not the elements.
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((span,), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride())


def outputs(function: Any, call: Call) -> list[Any]:
    """Flat outputs of any callable, without gradients."""
    args, kwargs = call.copy()
    with torch.no_grad():
        return [
            v.detach().clone() if isinstance(v, Tensor) else v for v in pytree.tree_leaves(function(*args, **kwargs))
        ]


def compare(what: str, call: Call, expected: Sequence[Any], got: Sequence[Any]) -> CheckRow:
    """Largest max|a - b| / max|b| over the output tensors.

    Floating outputs that are not finite must be so in the same places; other outputs must be equal.
    """
    worst, tolerance = 0.0, TOLERANCE[torch.float32]
    if len(expected) != len(got):
        return CheckRow(f"{what}: {len(expected)} outputs expected, {len(got)} given", call.label, float("nan"), 0.0)
    for a, b in zip(got, expected, strict=True):
        error, limit = _difference(a, b)
        error = math.inf if math.isnan(error) else error
        if error / limit > worst / tolerance:
            worst, tolerance = error, limit
    return CheckRow(what, call.label, worst, tolerance)


def _difference(got: Any, expected: Any) -> tuple[float, float]:
    exact = TOLERANCE[torch.float64]
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return (0.0 if type(got) is type(expected) and got == expected else float("inf")), exact
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf"), exact
    if expected.numel() == 0:
        return 0.0, exact
    if not (expected.is_floating_point() or expected.is_complex()):
        return (0.0 if torch.equal(got, expected) else float("inf")), exact
    limit = TOLERANCE.get(torch.empty((), dtype=expected.dtype).real.dtype, TOLERANCE[torch.float32])
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), finite) or not _equal_with_nan(got[~finite], expected[~finite]):
        return float("inf"), limit
    if not bool(finite.any()):
        return 0.0, limit
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = got[finite].to(wide), expected[finite].to(wide)
    scale = float(b.abs().max())
    error = float((a - b).abs().max())
    return (error / scale if scale > 0 else error), limit


def _equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return bool(torch.all((a == b) | (torch.isnan(a) & torch.isnan(b))))


def is_finite(values: Sequence[Any]) -> bool:
    """Whether no floating tensor among them holds an infinity or a NaN."""
    return all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor) and v.is_floating_point())


def second_call(call: Call, seed: int = 0) -> Call:
    """Another input of the same sizes: floats drawn anew around the example's mean and spread, other tensors shuffled.

    Each tensor is drawn by itself, also where the example hands in one tensor twice.
    """
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = pytree.tree_map(
        lambda leaf: _redraw(leaf, generator) if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs)
    )
    return Call("second input", args, kwargs)


def _redraw(leaf: Tensor, generator: torch.Generator) -> Tensor:
    if leaf.numel() == 0 or leaf.is_complex():
        return leaf
    if leaf.is_floating_point():
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        old = leaf.detach().double().cpu()
        # Infinities say where to look (an attention mask), so they stay.
        finite = old[torch.isfinite(old)]
        spread = float(finite.std()) if finite.numel() > 1 else 1.0
        drawn = noise * (spread or 1.0) + (float(finite.mean()) if finite.numel() else 0.0)
        fresh = torch.where(torch.isfinite(old), drawn, old).to(leaf.dtype).to(leaf.device)
        return _laid_out_as(leaf, fresh)
    order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
    return _laid_out_as(leaf, leaf.reshape(-1)[order].reshape(leaf.shape))


def turned_call(call: Call, seed: int = 0) -> Call | None:
    """The call with other values where a flag or a 0/1 mask has one value throughout; None where there is none.

    Shuffling such a tensor changes nothing, and whatever hangs on its other value would go unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    turned = False

    def turn(leaf: Any) -> Any:
        nonlocal turned
        if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex() or leaf.numel() < 2:
            return leaf
        if leaf.dtype != torch.bool and leaf.device.type != "cpu":
            # An index that a table does not have is an error on a CPU, and the end of the process on a GPU.
            return leaf
        first = int(leaf.flatten()[0])
        if first not in (0, 1) or bool((leaf != first).any()):
            return leaf
        turned = True
        coins = torch.rand(leaf.shape, generator=generator).to(leaf.device) < 0.5
        return _laid_out_as(leaf, torch.where(coins, 1 - first, first).to(leaf.dtype))

    args, kwargs = pytree.tree_map(turn, (call.args, call.kwargs))
    return Call("flags turned", args, kwargs) if turned else None


def _laid_out_as(example: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with its dimensions in memory in the order of the example's."""
    if example.layout is not torch.strided:
        return tensor
    order = sorted(range(example.dim()), key=lambda dim: -example.stride(dim))
    back = sorted(range(example.dim()), key=lambda place: order[place])
    return tensor.permute(order).contiguous().permute(back)


def restrided_call(call: Call) -> Call:
    """The same values in other strides: contiguous tensors transposed in memory, others contiguous."""

    def restride(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.dim() == 0:
            return leaf
        if not leaf.is_contiguous():
            return leaf.contiguous()
        if leaf.dim() == 1:
            return torch.stack([leaf, leaf], dim=1)[:, 0]
        return leaf.transpose(-1, -2).contiguous().transpose(-1, -2)

    args, kwargs = pytree.tree_map(restride, (call.args, call.kwargs))
    return Call("other strides", args, kwargs)


def resized_call(capture: Capture, call: Call) -> Call | None:
    """The call at another size in every dynamic dimension, or None where no other size is allowed."""
    flat = capture.entry.flatten(call.args, call.kwargs)
    sizes: dict[str, int] = {}
    for want, got in zip(capture.entry.inputs, flat, strict=True):
        if isinstance(want, TensorInput):
            sizes.update({s: got.shape[d] for d, s in enumerate(want.sizes) if isinstance(s, str)})
    if not sizes:
        return None
    for change in (lambda n: n + 1, lambda n: 2 * n, lambda n: n - 1, lambda n: n // 2, lambda n: 4 * n):
        new = {symbol: change(size) for symbol, size in sizes.items()}
        if min(new.values()) < 1 or new == sizes:
            continue
        leaves = iter(zip(capture.entry.inputs, flat, strict=True))

        def resize(_: Any, leaves: Any = leaves, new: dict[str, int] = new) -> Any:
            want, example = next(leaves)
            if not isinstance(want, TensorInput):
                return example
            got = example
            for dim, size in enumerate(want.sizes):
                if isinstance(size, str):
                    got = got.index_select(dim, torch.arange(new[size], device=got.device) % got.shape[dim])
            return _laid_out_as(example, got)

        args, kwargs = pytree.tree_map(resize, (call.args, call.kwargs))
        try:
            capture.entry.check(args, kwargs)
        except InputError:
            continue
        shapes = ", ".join(str(list(t.shape)) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        return Call(f"second size {shapes}", args, kwargs)
    return None


def refuse(row: CheckRow, what_next: str) -> CheckError:
    """The error for a comparison that failed."""
    return CheckError(
        f"{row.what}: the outputs differ by {row.error:.2e} relative, {row.tolerance:.0e} is allowed",
        where=row.call,
        why="the graph does not compute what the model computes",
        do=what_next,
    )
