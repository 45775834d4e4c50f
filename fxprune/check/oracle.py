"""The oracle: a captured program with the selection applied as its weights are fetched, and nothing else changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.couple.removal import Removal
from fxprune.graph.program import Program, named_arguments, names_of_parameters
from fxprune.select.selection import Selection

from .calls import Call

# What becomes of a type where a program runs in a wider one.
_WIDER = {
    torch.float32: {torch.float16: torch.float32, torch.bfloat16: torch.float32},
    torch.float64: {
        **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
        **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
    },
}


def widened(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, or the name of a type, in `dtype` (float32 or float64) where it is a narrower float."""
    wider = _WIDER[dtype]
    if isinstance(value, Tensor):
        return value.to(wider[value.dtype]) if value.dtype in wider else value
    return wider.get(value, value) if isinstance(value, torch.dtype) else value


def nudged(tensor: Tensor, seed: int) -> Tensor:
    """A copy of a tensor of floats with each element as it is or off by one rounding, up or down."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor.device, tensor.real.dtype)
    return tensor * (1 + steps * torch.finfo(tensor.dtype).eps)


class Oracle(torch.fx.Interpreter):
    """Runs a captured program with the selection's values and zeros applied as weights are fetched, one at a time.

    `removal` says which slices of which tensors leave, and are zero here, and which statistics run over the rest. With
    `wide` narrower floats become float32, where the rounding of half types hides nothing, or float64. With `seed`
    parameters and buffers are off by what one rounding of their elements may be.
    """

    def __init__(
        self,
        program: Program,
        selection: Selection,
        removal: Removal | None = None,
        *,
        wide: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(program)
        self.program = program
        self.selection = selection
        self.removal = removal or Removal()
        self._wide, self._seed = wide, seed
        self.canonical = names_of_parameters(program)

    def fetch_attr(self, target: str) -> Any:
        """The parameter or buffer with the selection's value, masked where the selection masks it."""
        value = super().fetch_attr(target)
        if not isinstance(value, Tensor):
            return value
        value = value.detach() if self._seed is None else nudged(value.detach(), self._seed)
        return self.applied(target, value)

    def applied(self, name: str, value: Tensor) -> Tensor:
        """What stands in the place of the tensor of this name, whose own value is `value`."""
        value = self.selection.apply(self.canonical.get(name, name), value)
        return self._widened(self.removal.apply(name, value))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The input of this name."""
        return self._widened(super().placeholder(target, args, kwargs))

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> tuple[Any, Any]:
        """The arguments of a node, with dtypes among them as wide as the tensors."""
        found = super().fetch_args_kwargs_from_env(n)
        return found if self._wide is None else pytree.tree_map(self._widened, found)

    def _widened(self, value: Any) -> Any:
        return value if self._wide is None else widened(value, self._wide)

    def in_float64(self) -> Oracle:
        """The same in float64."""
        return Oracle(self.program, self.selection, self.removal, wide=torch.float64)

    def nudged(self, seed: int) -> Oracle:
        """The same with tensors that are off by one rounding of their elements."""
        return Oracle(self.program, self.selection, self.removal, wide=self._wide, seed=seed)

    def run_node(self, n: torch.fx.Node) -> Any:
        """The node's value; a statistic over an axis that shrinks runs over what is kept of it."""
        statistic = self.removal.statistics.get(n.name)
        if statistic is None:
            found = super().run_node(n)
            # Where a tensor is made, its type may be written nowhere.
            return found if self._wide is None else pytree.tree_map(self._widened, found)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return statistic.run(n, named_arguments(n.target, args, kwargs))

    def outputs(self, call: Call) -> list[Any]:
        """Flat outputs of one call."""
        return run_flat(self, call)


def run_flat(interpreter: torch.fx.Interpreter, call: Call) -> list[Any]:
    """Flat outputs of one call of a program that an interpreter runs."""
    with torch.no_grad():
        return run(interpreter, *call.copy())


def run(interpreter: torch.fx.Interpreter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Flat outputs of a program that an interpreter runs, of these very tensors."""
    program = interpreter.module
    flat = program.graph.process_inputs(*_in_order(program, args, kwargs))  # pyright: ignore
    return pytree.tree_leaves(interpreter.run(*flat, enable_io_processing=False))


def _in_order(program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    info = getattr(program.graph._codegen, "pytree_info", None)
    if info is None:
        return [*args, *kwargs.values()]
    names = [n for n in info.orig_args if n != "self"]
    return [*args, *(kwargs[n] for n in names[len(args) :])]
