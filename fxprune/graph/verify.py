"""verify: whether a program keeps what every program promises. README.md beside this file has the promises in words."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.errors import CheckError

from .memory import base, writes
from .program import Program, fetch_any

# Nodes shown before and after the one that is at fault.
_AROUND = 10

# What an entry check demands of a flat input's sizes: an int where the graph is only right for it.
Sizes = Sequence[Any] | None


def verify(
    program: Program,
    stage: str,
    *,
    origin: Program | None = None,
    sizes: Sequence[Sizes] = (),
    known: set[tuple[object, ...]] | None = None,
) -> None:
    """Raises CheckError where `program`, as `stage` left it, breaks a promise; the message has the nodes around it.

    `origin` is the captured program, which says what the model returns and writes to. `sizes` are those that the entry
    check demands of each placeholder. `known` takes up which ops were run, so that the next stage's program need not
    run those that it left as they are.
    """
    for node, broken in _faults(program, origin or program, sizes, set() if known is None else known):
        nodes = list(program.graph.nodes)
        place = nodes.index(node) if node is not None else 0
        around = nodes[max(0, place - _AROUND) : place + _AROUND]
        listing = "\n".join(f"{'->' if n is node else '  '} {n.format_node() or n.name}" for n in around)
        raise CheckError(
            f"the stage {stage} left a program that breaks a promise",
            where=f"node {node.name}" if node is not None else "the graph",
            why=f"{broken}\n{listing}\n",
            do="This is a fault of fxprune: please report it with FXPRUNE_TRACE=<dir>.",
        )


def _faults(
    program: Program, origin: Program, sizes: Sequence[Sizes], known: set[tuple[object, ...]]
) -> Iterator[tuple[Node | None, str]]:
    yield from _names(program)
    yield from _attributes(program)
    yield from _inputs(program, origin, sizes)
    yield from _memory(program, origin)
    yield from _values(program, known)


def _names(program: Program) -> Iterator[tuple[Node | None, str]]:
    """Names are unique, and a node stands after what it reads."""
    seen: set[str] = set()
    standing: set[Node] = set()
    for node in program.graph.nodes:
        if node.name in seen:
            yield node, f"the name {node.name} stands twice"
        if late := [read.name for read in node.all_input_nodes if read not in standing]:
            yield node, f"it reads {', '.join(late)}, which stands after it or in another graph"
        if strangers := [user.name for user in node.users if user.graph is not program.graph]:
            yield node, f"its user {', '.join(strangers)} is of another graph"
        seen.add(node.name)
        standing.add(node)


def _attributes(program: Program) -> Iterator[tuple[Node | None, str]]:
    """Every get_attr finds its tensor, which is as its fake value says."""
    for node in program.graph.nodes:
        if node.op == "get_attr":
            try:
                value = fetch_any(program, str(node.target))
            except AttributeError as error:
                yield node, f"it fetches what the program does not hold: {error}"
                continue
            fake = node.meta.get("val")
            if isinstance(value, Tensor) and isinstance(fake, Tensor) and (wrong := _differs(fake, value)):
                yield node, f"its fake value is not true: {wrong}"
        elif node.op not in ("placeholder", "call_function", "output"):
            yield node, f"it is a {node.op}; a program fetches and calls functions only"


def _inputs(program: Program, origin: Program, sizes: Sequence[Sizes]) -> Iterator[tuple[Node | None, str]]:
    """The placeholders are those of the capture, and the entry check demands every size that they specialise."""
    mine, theirs = (each.graph.find_nodes(op="placeholder") for each in (program, origin))
    if [n.name for n in mine] != [n.name for n in theirs]:
        yield None, f"it takes {[n.name for n in mine]}, the model takes {[n.name for n in theirs]}"
    for node, wanted in zip(mine, sizes):
        fake = node.meta.get("val")
        if wanted is None or not isinstance(fake, Tensor):
            continue
        for dim, (size, demanded) in enumerate(zip(fake.shape, wanted)):
            if isinstance(size, int) and size != demanded:
                yield node, f"dim {dim} is {size} in the graph, and the entry check takes {demanded}"


def _memory(program: Program, origin: Program) -> Iterator[tuple[Node | None, str]]:
    """Nothing of the program's own is written to; inputs are written to and handed out only where the model does."""
    written = {memory.name for node in origin.graph.nodes for memory in writes(node) if memory.op == "placeholder"}
    for node in program.graph.nodes:
        for memory in writes(node):
            if memory.op == "get_attr":
                yield node, f'it writes to "{memory.target}", so that a call would not depend on its inputs alone'
            if memory.op == "placeholder" and memory.name not in written:
                yield node, f"it writes to the input {memory.name}, and the model does not"
    handed = {base(node).name for node in origin.graph.output_node().all_input_nodes}
    for node in program.graph.output_node().all_input_nodes:
        memory = base(node)
        if memory.op == "placeholder" and memory.name not in handed:
            yield node, f"it hands out memory of the input {memory.name}, and the model does not"
    mine, theirs = (_handed_out(each) for each in (program, origin))
    if len(mine) != len(theirs):
        yield None, f"it hands out {len(mine)} tensors, the model hands out {len(theirs)}"
    for (a, old_a), (b, old_b) in itertools.combinations(zip(mine, theirs), 2):
        if base(a) is base(b) and base(old_a) is not base(old_b):
            yield b, f"it hands out memory that {a.name} is too, and in the model these are apart"


def _handed_out(program: Program) -> list[Node]:
    leaves = pytree.tree_leaves(program.graph.output_node().args)
    return [leaf for leaf in leaves if isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), Tensor)]


def _values(program: Program, known: set[tuple[object, ...]]) -> Iterator[tuple[Node | None, str]]:
    """Fake values are true: every op makes what its node says of what is said of the nodes that it reads."""
    inputs = program.graph.find_nodes(op="placeholder")
    fakes = [n.meta["val"] for n in inputs if isinstance(n.meta.get("val"), Tensor)]
    mode = getattr(fakes[0], "fake_mode", None) if fakes else None
    if mode is None:
        return
    ignoring = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else contextlib.nullcontext()
    # As export ran them: ops that decompose by the python dispatcher ask less of symbolic sizes.
    with mode, enable_python_dispatcher(), ignoring, torch.no_grad():
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            read = {n: _said(program, n, mode) for n in node.all_input_nodes}
            told = node.meta.get("val")
            about = (node.format_node(), *map(_shapes, (told, *read.values())))
            if about in known or any(value is None for value in read.values()):
                continue
            # An op that writes to what it reads must not change what is said of that.
            apart = {n: value.detach() if isinstance(value, Tensor) else value for n, value in read.items()}
            args, kwargs = map_arg((node.args, node.kwargs), lambda n, apart=apart: apart[n])
            try:
                made = node.target(*args, **kwargs)  # pyright: ignore
            except Exception as error:
                yield node, f"it cannot run on what it reads: {type(error).__name__}: {error}"
                return
            for fake, value in zip(pytree.tree_leaves(told), pytree.tree_leaves(made)):
                if isinstance(fake, Tensor) and isinstance(value, Tensor) and (wrong := _differs(fake, value)):
                    yield node, f"its fake value is not true: {wrong}"
            known.add(about)


def _said(program: Program, node: Node, mode: Any) -> Any:
    """A node's fake value, that of what it fetches where none is said, and None where nothing is."""
    if node.op != "get_attr" or "val" in node.meta:
        return node.meta.get("val")
    value = fetch_any(program, str(node.target))
    return mode.from_tensor(value.detach(), static_shapes=True) if isinstance(value, Tensor) else value


def _shapes(value: Any) -> tuple[object, ...]:
    """What is compared of fake values, to know them again."""
    leaves = pytree.tree_leaves(value)
    return tuple((tuple(map(str, v.shape)), v.dtype, v.device) if isinstance(v, Tensor) else str(v) for v in leaves)


def _differs(fake: Tensor, value: Tensor) -> str:
    """What a fake value says of a tensor that is not so; nothing where it is true."""
    if fake.dtype != value.dtype:
        return f"it says {fake.dtype}, the tensor is {value.dtype}"
    if fake.device != value.device:
        return f"it says {fake.device}, the tensor is on {value.device}"
    said, found = list(map(_size, fake.shape)), list(map(_size, value.shape))
    if len(said) != len(found) or any(a != b for a, b in zip(said, found) if a is not None and b is not None):
        return f"it says {list(fake.shape)}, the tensor is {list(value.shape)}"
    return ""


def _size(size: Any) -> int | None:
    """A size as a number: the example's for a symbolic one, None where only a run tells it."""
    return size if isinstance(size, int) else getattr(size.node, "hint", None)
