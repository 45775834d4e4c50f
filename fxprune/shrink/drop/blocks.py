"""blocks: the residual blocks of a graph, and the branches of its sums, by the paths of the modules that they are.

A block is the nodes traced in one call of a module. It is residual if one tensor leaves it, and a way leads from that
tensor back to an input of the same shape through at least one sum (residual.py says what else the way may pass). It is
a branch if a way leads from that tensor on to the one sum that adds it to something else (branch.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeGuard

from torch import Tensor
from torch.fx import Node

from fxprune.errors import PlanError
from fxprune.graph.program import Program, fetch
from fxprune.plan.plan import Plan, near
from fxprune.select.selection import Selection

from .branch import Added, Leaving, added, leaving_together
from .facts import (
    GENERAL,
    NO_WRITES,
    Facts,
    Refusal,
    calls_by_module,
    described,
    output_of,
    paths_around,
    reader_beside,
)
from .residual import Ways, same_kind, source, ways_back


@dataclasses.dataclass(frozen=True)
class Bypass:
    """One call of a block: node `exit` answers what `entry` held before `start`, the call's first op.

    Of a branch, `exit` is the sum that adds it, which is `start` too, `entry` the other addend, and `tail` are the
    nodes outside of the module that leave with it, from its output to the sum.
    """

    entry: str
    exit: str
    start: str
    tail: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """A block that can leave: its module path, its calls, and how many elements of parameters leave with it alone."""

    path: str
    calls: tuple[Bypass, ...]
    parameters: int

    @property
    def is_branch(self) -> bool:
        """Whether it is added to a residual stream, and does not add to it itself."""
        return any(call.tail for call in self.calls)


def module_paths(program: Program) -> list[str]:
    """The paths of the modules that nodes were traced in, in the order of their first nodes, outer before inner."""
    return list(calls_by_module(program.graph))


def find_blocks(program: Program, paths: Iterable[str]) -> list[Block]:
    """The blocks of the modules `paths`, each with all of its calls.

    Each is residual, or else a branch; those that are branches leave together. Raises PlanError where one is neither or
    cannot leave.
    """
    facts = Facts(program)
    residual = {path: _as_residual(facts, path) for path in paths}
    branches = leaving_together(facts, [path for path, calls in residual.items() if not _all_leave(calls)])
    return [_block(facts, path, calls, branches) for path, calls in residual.items()]


def find_branches(program: Program, paths: Sequence[str]) -> tuple[str, ...]:
    """Those of the dropped modules that are branches of a sum, and no residual blocks. Raises PlanError."""
    return tuple(block.path for block in find_blocks(program, paths) if block.is_branch) if paths else ()


def idle_modules(program: Program, left: Program, paths: Sequence[str]) -> tuple[str, ...]:
    """The modules besides the dropped ones, outer ones first, that compute nothing in what is `left` of a program.

    Those that hold a dropped module, or lie in one, are not among them.
    """
    # A second call of a module may have a path of its own, with a number behind "@".
    used = {path.partition("@")[0] for path, calls in calls_by_module(left.graph).items() if _computes(calls)}
    idle = [path for path in calls_by_module(program.graph) if "@" not in path and path not in used]
    return tuple(_outermost(path for path in idle if not any(_is_in(path, p) or _is_in(p, path) for p in paths)))


def _computes(calls: Sequence[Sequence[Node]]) -> bool:
    """Whether calls of a module make tensors, and do not only hand theirs on."""
    inside = {node for nodes in calls for node in nodes}
    return any(isinstance(node.meta.get("val"), Tensor) and source(node, set()) in inside for node in inside)


def choose_blocks(program: Program, plan: Plan | None, replay: Selection | None) -> tuple[str, ...]:
    """The module paths of the blocks that a plan, or an earlier selection, drops. Raises PlanError."""
    if replay is not None:
        return replay.drop
    return tuple(plan.blocks(module_paths(program))) if plan is not None and plan.drops else ()


def _block(facts: Facts, path: str, residual: Sequence[Bypass | Refusal], together: Leaving) -> Block:
    if _all_leave(residual):
        return Block(path, tuple(residual), _leaving_parameters(facts, path, residual))
    branches = _as_branches(facts, path, together)
    if not _all_leave(branches):
        raise _cannot(facts, path, residual, branches)
    alone = _as_branches(facts, path, leaving_together(facts, [path]))
    return Block(path, tuple(branches), _leaving_parameters(facts, path, alone if _all_leave(alone) else branches))


def _all_leave(calls: Sequence[Bypass | Refusal]) -> TypeGuard[Sequence[Bypass]]:
    return all(isinstance(call, Bypass) for call in calls)


def _as_residual(facts: Facts, path: str) -> list[Bypass | Refusal]:
    if path not in facts.calls:
        raise _unknown(path, list(facts.calls))
    return [_bypass(facts, nodes) for nodes in facts.calls[path]]


def _as_branches(facts: Facts, path: str, leaving: Leaving) -> list[Bypass | Refusal]:
    found = [added(facts, nodes, leaving) for nodes in facts.calls[path]]
    return [one if isinstance(one, Refusal) else _without(one) for one in found]


def _without(branch: Added) -> Bypass:
    return Bypass(branch.stream.name, branch.sum.name, branch.sum.name, tuple(node.name for node in branch.tail))


def _bypass(facts: Facts, nodes: list[Node]) -> Bypass | Refusal:
    """The entry and exit of one call of a residual block."""
    inside, exit = set(nodes), output_of(facts, nodes)
    if isinstance(exit, Refusal):
        return exit
    ways = ways_back(exit, nodes, facts.varying)
    if not ways.entries:
        return Refusal(_why_not(facts, exit, nodes, inside, ways))
    fewest = min(ways.entries.values())
    entries = {source(node, set()): node for node, norms in ways.entries.items() if norms == fewest}
    if len(entries) > 1:
        names = " and ".join(node.name for node in entries.values())
        why = f"its input cannot be told apart: sums lead from {exit.name} back to {names}"
        return Refusal(why, "Drop a block that adds to one input only.")
    entry = next(iter(entries.values()))
    start = next(node for node in nodes if facts.place[node] > facts.place[entry])
    problem = _written(facts, nodes, inside, entry, exit, start)
    return Refusal(problem, NO_WRITES) if problem else Bypass(entry.name, exit.name, start.name)


def _why_not(facts: Facts, exit: Node, nodes: list[Node], inside: set[Node], ways: Ways) -> str:
    inputs = [n for node in nodes for n in node.all_input_nodes if n not in inside and n in facts.varying]
    if ways.changed:
        return f"no residual sum: its input {described(ways.changed[0])} becomes {described(exit)}"
    if ways.sumless:
        return f"no residual sum: no branch is added on the way from {ways.sumless[0].name} to {exit.name}"
    if inputs and not any(same_kind(node, exit) for node in inputs):
        return f"its shape changes from {described(inputs[0])} to {described(exit)}"
    ends = ", ".join(f"{node.name} ({node.target})" for node in list(dict.fromkeys(ways.ends))[:3])
    return f"no residual sum found: the ways back from {exit.name} end at {ends}"


def _written(facts: Facts, nodes: list[Node], inside: set[Node], entry: Node, exit: Node, start: Node) -> str:
    """Why the block's writes in place keep it from leaving; "" where they do not.

    A write to the entry itself (x += branch) leaves with the block if nobody else looks at that memory afterwards.
    """
    base = facts.memory.base
    for node in nodes:
        for memory in facts.memory.writes.get(node, ()):
            if memory is base[exit] and facts.place[node] > facts.place[exit]:
                return f"{node.name} ({node.target}) writes to its output after the residual sum"
            if memory in inside:
                continue
            if memory is not base[entry]:
                return f"{node.name} ({node.target}) writes to {memory.name}, which is computed outside"
            reader = reader_beside(facts, memory, nodes, inside, exit, start)
            if reader is not None:
                return f"{node.name} ({node.target}) writes to {memory.name}, which {reader.name} reads later"
    return ""


def _leaving_parameters(facts: Facts, path: str, calls: Sequence[Bypass]) -> int:
    gone = {node for nodes in facts.calls[path] for node in nodes}
    instead = {facts.named[call.exit]: facts.named[call.entry] for call in calls}
    left = Counter()
    for node, count in facts.needs.without(gone, instead).items():
        if node in facts.parameter:
            left[facts.parameter[node]] += bool(facts.needs.count[node]) - bool(count)
    leaving = (name for name, count in left.items() if count > 0 and count == facts.reads[name])
    return sum(fetch(facts.program, name).numel() for name in leaving)


def _unknown(path: str, paths: list[str]) -> PlanError:
    children = [p for p in paths if p.startswith(f"{path}.")] if path else []
    if not path:
        why, do = "it is the whole model", "Name a module inside it."
    elif children:
        depth = path.count(".") + 1
        named = list(dict.fromkeys(".".join(p.split(".")[: depth + 1]) for p in children))
        why, do = "it only holds modules that are called one by one", f"Name those: {', '.join(named[:5])}."
    else:
        close = near(path, paths)
        why = "no op that the output depends on was traced in a module of this name"
        do = f"Near it: {', '.join(close)}." if close else "See dict(model.named_modules()) for the names."
    return PlanError("cannot drop this block", where=f'"{path}"', why=why, do=do)


def _cannot(
    facts: Facts, path: str, residual: Sequence[Bypass | Refusal], branches: Sequence[Bypass | Refusal]
) -> PlanError:
    """The error for a module of which one call at least is no residual block, and one at least no branch."""
    index, block = next((i, call) for i, call in enumerate(residual) if isinstance(call, Refusal))
    branch = next(call for call in branches if isinstance(call, Refusal))
    where = f'"{path}"' + (f", call {index + 1} of {len(residual)}" if len(residual) > 1 else "")
    why = block.why if branch.why == block.why else f"{block.why}; nor is it a branch: {branch.why}"
    found = _near(facts, path, [node for call in branches if isinstance(call, Refusal) for node in call.ends])
    do = block.do if block.do != GENERAL else branch.do
    do += f" These could go: {', '.join(found)}." if found else ""
    return PlanError("cannot drop this block", where=where, why=why, do=do)


def _near(facts: Facts, path: str, ends: Sequence[Node]) -> list[str]:
    """Up to three modules that could go: residual blocks inside `path`, or branches there, or else what is around it.

    Around it are the modules where the way on from it ends, if they are branches or blocks, and the next outer one.
    """
    inside = [p for p in facts.calls if p.startswith(f"{path}.")]
    outer = [p for p in sorted(facts.calls, key=len, reverse=True) if path.startswith(f"{p}.")]
    beside = [p for node in ends for p in paths_around(node).values() if p != path and p not in outer]
    blocks = _outermost(p for p in inside if _all_leave(_as_residual(facts, p)))
    if found := [*itertools.islice(blocks, 3)] or [*itertools.islice(_outermost(_leaves(facts, inside)), 3)]:
        return found
    around = itertools.islice(_leaves(facts, outer), 1)
    return [*itertools.islice(_outermost(_leaves(facts, beside)), 2), *around]


def _leaves(facts: Facts, paths: Iterable[str]) -> Iterator[str]:
    """Those of the modules that could leave alone."""
    for path in paths:
        calls = _as_residual(facts, path)
        if _all_leave(calls) or _all_leave(_as_branches(facts, path, leaving_together(facts, [path]))):
            yield path


def _outermost(paths: Iterable[str]) -> Iterator[str]:
    """The paths that lie in no path before them."""
    found: list[str] = []
    for path in paths:
        if not any(_is_in(path, other) for other in found):
            found.append(path)
            yield path


def _is_in(path: str, other: str) -> bool:
    """Whether a module lies in another one, or is it."""
    return f"{path}.".startswith(f"{other}.")
