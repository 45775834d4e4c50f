"""compiled: a graph as Inductor's code for the sizes that it is called with, called without Dynamo.

torch.compile guards each call against whatever may have changed about a module. The tensors of a result are its own,
and what its inputs must be like is known, so its graph goes to Inductor as it is: a call costs a comparison of sizes.
Inductor's freezing needs this too: given to torch.compile as an option it does nothing, for by then Dynamo has made
inputs of the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.check.calls import Call
from fxprune.check.compare import compare
from fxprune.errors import warn_once
from fxprune.graph import compat
from fxprune.graph.environment import words_of
from fxprune.graph.memory import writes
from fxprune.graph.program import Program

# Programs kept for one graph: one for the example's sizes, one for all others, and more where that one is not for all.
MOST_PROGRAMS = 8
aten = torch.ops.aten
_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
# Tensors that have memory of their own, in strides, to read.
_PLAIN = {Tensor, nn.Parameter}
_SIZES = Call("sizes of a call", (), {})


class Sized(NamedTuple):
    """A program, and whether it is one for these input tensors."""

    fits: Callable[[Sequence[Tensor]], bool]
    run: Callable[..., Sequence[Any]]


class Compiled:
    """A graph as code for the sizes that it is called with.

    The first program is for the sizes and strides of the first call alone. A call of another size makes one for all
    sizes, or, where that cannot be, one for these; inputs in other strides are copied. Without `options` of Inductor
    the graph runs as it is, and takes any inputs.
    """

    def __init__(self, program: Program, entry: EntryCheck, options: Mapping[str, Any] | None) -> None:
        self._program, self._options = program, dict(options or {})
        tensors = {i: want for i, want in enumerate(entry.inputs) if isinstance(want, TensorInput)}
        self._wants = tensors if options is not None else dict(enumerate(entry.inputs))
        self._takes_all = len(self._wants) == len(entry.inputs)
        self.programs: tuple[Sized, ...] = () if options is not None else (Sized(lambda _: True, self._graph),)

    def __call__(self, flat: Sequence[Any]) -> Sequence[Any]:
        """The outputs that are no constants, for flat inputs that the entry check has let pass."""
        inputs = flat if self._takes_all else [flat[i] for i in self._wants]
        for program in self.programs:
            if program.fits(inputs):
                return program.run(*inputs)
        if not all(map(_is_plain, inputs)):
            return self._graph(*inputs)
        if self.programs and not all(t.is_contiguous() for t in inputs):
            inputs = [t.contiguous() for t in inputs]
        return self._found_or_made(list(inputs)).run(*inputs)

    @functools.cached_property
    def _graph(self) -> Callable[..., Sequence[Any]]:
        """The graph, not compiled."""
        return self._flat().forward

    def _found_or_made(self, inputs: list[Tensor]) -> Sized:
        """The program for these inputs, made where there is none. Raises the error of the first."""
        if len(self.programs) >= MOST_PROGRAMS:
            warn_once(f"a result runs eager, which is slower, for sizes that come after {MOST_PROGRAMS} others")
            return Sized(lambda _: True, self._graph)
        with compat.alone():
            found = next((each for each in self.programs if each.fits(inputs)), None)
            if found is None:
                found = self._compile(inputs) if not self.programs else self._another(inputs)
                self.programs += (found,)
        return found

    def _another(self, inputs: list[Tensor]) -> Sized:
        """A program for all sizes, or for these; the graph itself where there cannot be one.

        None is used before it has been held against the graph: with symbolic sizes Inductor's freezing takes an image
        that it has laid out anew for the old one where it is read a second time (torch 2.13).
        """
        why = ""
        for dynamic, freezing in self._tries():
            try:
                program = self._compile(inputs, dynamic=dynamic, freezing=freezing)
                row = compare("compiled = graph", _SIZES, self._graph(*inputs), program.run(*inputs))
            # Whatever a compiler raises; the first program came out.
            except Exception as error:
                why = words_of(error)
                continue
            why = f"what was compiled for them is off by {row.error:.1e}"
            if row.ok and program.fits(inputs):
                return program
        shapes = [t.shape for t in inputs]
        warn_once(f"a result runs eager, which is slower, for some sizes: {why}")
        return Sized(lambda others: [t.shape for t in others] == shapes, self._graph)

    def _tries(self) -> Sequence[tuple[bool, bool]]:
        """How to compile for another size: for all sizes or for these, frozen or not; the first that is right is taken.

        Convolutions are much faster frozen. For linear layers of any size Inductor knows nothing better than their
        weights as they are, and each program that is frozen holds a copy of them.
        """
        has_convolutions = any(node.target in _CONVOLUTIONS for node in self._program.graph.nodes)
        return ((True, True), (True, False), (False, True)) if has_convolutions else ((True, False), (False, False))

    def _compile(self, inputs: list[Tensor], *, dynamic: bool = False, freezing: bool = True) -> Sized:
        from torch._inductor.compile_fx import compile_fx

        shapes = ShapeEnv()
        mode = FakeTensorMode(shape_env=shapes)
        fakes = [
            _fake(mode, tensor, [dynamic and isinstance(size, str) for size in want.sizes], f"t{index}")
            for index, (tensor, want) in enumerate(zip(inputs, self._wants.values(), strict=True))
            if isinstance(want, TensorInput)
        ]
        options = {key: value for key, value in self._options.items() if freezing or key != "freezing"}
        module = self._flat()
        graphs: list[Any] = []
        # What comes out of AOTAutograd's own cache has its wrappers around it already.
        anew = torch._functorch.config.patch(enable_autograd_cache=False)  # pyright: ignore[reportAttributeAccessIssue]
        quietly, freed = compat.quiet_export(), compat.constants_go_with_code()
        with torch.no_grad(), tracing(TracingContext(mode)), quietly, freed, anew:
            wrapped = compile_fx(module, fakes, _collecting(graphs), config_patches=options)
            run = _without_wrappers(wrapped, graphs, module, inputs)  # pyright: ignore[reportArgumentType]
        return Sized(_condition(shapes, fakes), run)

    def _flat(self) -> GraphModule:
        return GraphModule(self._program, flat_graph(self._program, list(self._wants)))


def can_compile(program: Program, entry: EntryCheck) -> bool:
    """Whether a graph is a function of tensors and constants, which writes to none of them, and of which tensors come.

    Inductor's code takes each input for memory of its own, which matters where one is written to.
    """
    inputs = program.graph.find_nodes(op="placeholder")
    written = {memory for node in program.graph.nodes for memory in writes(node)}
    for node, want in zip(inputs, entry.inputs, strict=True):
        is_constant = not isinstance(want, TensorInput) and want is not None and want[0] == "constant"
        if node in written or not (isinstance(want, TensorInput) or (is_constant and not node.users)):
            return False
    has_tensors = any(isinstance(want, TensorInput) for want in entry.inputs)
    return has_tensors and any(isinstance(value, Node) for value in returned(program))


def returned(program: Program) -> list[Any]:
    """What the graph returns, flat: nodes and constants."""
    return pytree.tree_leaves(program.graph.output_node().args)


def flat_graph(program: Program, inputs: Sequence[int]) -> Graph:
    """The graph as a function of the inputs at these places that returns a tuple of what it computes, no constants."""
    graph = Graph()
    copied: dict[Node, Node] = {}
    places = {node: place for place, node in enumerate(program.graph.find_nodes(op="placeholder"))}
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(tuple(copied[value] for value in returned(program) if isinstance(value, Node)))
        elif node not in places or places[node] in inputs:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    return graph


def _is_plain(tensor: Tensor) -> bool:
    """Whether compiled code can read a tensor: wrappers, sparse ones and views that negate are others to it."""
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_neg():
        return False
    return not (tensor.is_complex() and tensor.is_conj())


def _collecting(graphs: list[Any]) -> Callable[..., Any]:
    """Inductor's compiler of one graph, which puts what it made into a list."""
    from torch._inductor.compile_fx import compile_fx_inner

    def compile_one(*args: Any, **kwargs: Any) -> Any:
        graphs.append(compile_fx_inner(*args, **kwargs))
        return graphs[-1]

    return compile_one


def _without_wrappers(
    wrapped: Callable[..., Sequence[Any]], graphs: Sequence[Any], module: nn.Module, inputs: Sequence[Tensor]
) -> Callable[..., Sequence[Any]]:
    """Inductor's code itself, where it does the same.

    AOTAutograd's wrappers, which take as long as a small layer, are for gradients, inputs that are written to, and
    outputs that share memory with inputs. Here there are neither gradients nor writes; the rest is looked at.
    """
    code = getattr(graphs[0], "current_callable", None) if len(graphs) == 1 else None
    want, memory = wrapped(*inputs), {t.untyped_storage().data_ptr() for t in inputs}
    if code is None or any(isinstance(y, Tensor) and y.untyped_storage().data_ptr() in memory for y in want):
        return wrapped
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    # Parameters that were not frozen are arguments too, before the others.
    for weights in ((), tuple(tensor for _, tensor in named)):
        try:
            got = code([*weights, *inputs])
        # Code that wants other arguments raises whatever it meets first.
        except Exception:
            continue
        if len(got) == len(want) and all(map(_same, got, want)):
            return functools.partial(_boxed, code, weights)
    return wrapped


def _boxed(code: Callable[[list[Any]], Sequence[Any]], weights: Sequence[Tensor], *inputs: Tensor) -> Sequence[Any]:
    """Calls code that takes its arguments as one list."""
    return code([*weights, *inputs])


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def _fake(mode: FakeTensorMode, tensor: Tensor, dynamic: Sequence[bool], name: str) -> Tensor:
    sizes = [DimDynamic.DYNAMIC if each else DimDynamic.STATIC for each in dynamic]
    context = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * len(sizes))
    return mode.from_tensor(tensor.detach(), symbolic_context=context, source=ConstantSource(name))


def _condition(shapes: ShapeEnv, fakes: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool]:
    """Whether a program that was made for `fakes` is right for other tensors: their sizes, strides, and what Inductor
    took for granted about sizes on its way.
    """
    conditions, symbols, names = [], [], []
    for index, fake in enumerate(fakes):
        a, static = f"a[{index}]", not any(isinstance(size, torch.SymInt) for size in fake.shape)
        conditions.append(f"plain({a})")
        if static:
            conditions.append(f"{a}.shape == {tuple(fake.shape)}")
        for dim, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt):
                symbols.append(size)
                names.append(f"{a}.shape[{dim}]")
            elif not static:
                conditions.append(f"{a}.shape[{dim}] == {size}")
        strides = f"{a}.stride() == {tuple(fake.stride())}"
        conditions.append(f"{a}.is_contiguous()" if fake.is_contiguous() else strides)
    if symbols:
        guards = shapes.produce_guards_expression(symbols) or "True"
        for place, name in enumerate(names):
            guards = guards.replace(f"L['t{place}']", name)
        conditions.append(f"({guards})")
    return eval(f"lambda a: {' and '.join(conditions)}", {**compat.guard_names(), "plain": _is_plain})
