"""conditions: what a captured program demands of its inputs, read off its placeholders and export's guards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxprune.graph import compat

from . import signature
from .entry import EntryCheck, TensorInput


class ForeignGuard(LookupError):
    """A condition of a capture speaks of something that is not an input, so that no call can be held to it."""


def entry_check(
    program: torch.fx.GraphModule,
    exported: torch.export.ExportedProgram,
    forward: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> EntryCheck:
    """Reads sizes, ranges, constants and guards off a captured program.

    Raises ForeignGuard where a guard speaks of something that is not an input: then only a capture without dynamic
    sizes is safe.
    """
    placeholders = program.graph.find_nodes(op="placeholder")
    codegen = program.graph._codegen
    names = [n.name for n in placeholders]
    spec = None
    if isinstance(codegen, _PyTreeCodeGen):
        names = [n for n in codegen.pytree_info.orig_args if n != "self"]
        spec = codegen.pytree_info.in_spec
    sources, paths = _sources(forward, args, kwargs, [n.name for n in placeholders], names)
    inputs = tuple(_describe(n) for n in placeholders)
    guards = _symbol_guards(placeholders, paths, exported.range_constraints)
    for code in compat.guards_code(exported):
        condition, readable = code, code
        for index, source in sources.items():
            condition = condition.replace(source, f"a[{index}]")
            readable = readable.replace(source, paths[index])
        if "L[" in condition:
            raise ForeignGuard(f"a condition speaks of something that is not an input ({code})")
        guards.append((condition, readable))
    conditions = tuple(dict.fromkeys(guards))
    order, same = signature.positional(forward), signature.left_out(forward)
    return EntryCheck(tuple(names), tuple(paths), inputs, conditions, spec, order, same)


def _sources(
    forward: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    given: Sequence[str],
) -> tuple[dict[int, str], list[str]]:
    """Guard sources (`L['x']['k'][0]`) and readable paths of the flat inputs, in placeholder order.

    `given` are the names of the arguments, which say all where there is no signature: an ExportedProgram has none.
    """
    roots: list[tuple[str, str, Any]] = []
    parameters = signature.parameters_of(forward)
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    star = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    keywords = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    double_star = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    for index, value in enumerate(args):
        if index < len(by_position) or not parameters:
            name = by_position[index].name if parameters else given[index]
            roots.append((f"L['{name}']", name, value))
        else:
            roots.append((f"L['{star}'][{index - len(by_position)}]", f"{star}[{index - len(by_position)}]", value))
    for name, value in kwargs.items():
        source = f"L['{name}']" if name in keywords or double_star is None else f"L['{double_star}']['{name}']"
        roots.append((source, name, value))
    sources: dict[int, str] = {}
    paths: list[str] = []
    for source, name, value in roots:
        for path, _ in pytree.tree_leaves_with_path(value):
            suffix = pytree.keystr(path)
            sources[len(paths)] = source + suffix
            paths.append(name + suffix)
    if len(paths) != len(names):
        return {}, list(names)
    return sources, paths


def _describe(node: torch.fx.Node) -> TensorInput | tuple[str, Any] | None:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return TensorInput(value.dtype, value.device, tuple(_size(s) for s in value.shape))
    for symbolic, kind in ((torch.SymInt, int), (torch.SymFloat, float), (torch.SymBool, bool)):
        if isinstance(value, symbolic):
            return ("type", kind)
    return ("constant", value)


def _size(size: int | torch.SymInt) -> int | str:
    if isinstance(size, int):
        return size
    # A size that began as a symbol and was fixed on the way is an expression without symbols.
    expression = size.node.expr
    return int(expression) if expression.is_Integer else str(expression)


def _symbol_guards(
    placeholders: Sequence[torch.fx.Node], paths: Sequence[str], ranges: Mapping[sympy.Symbol, Any]
) -> list[tuple[str, str]]:
    """Range, equality and divisibility conditions that follow from the symbols in the placeholders' sizes."""
    guards: list[tuple[str, str]] = []
    first: dict[sympy.Expr, tuple[str, str]] = {}
    for index, node in enumerate(placeholders):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            entries = [(f"a[{index}].size()[{d}]", f"{paths[index]}.size()[{d}]", s) for d, s in enumerate(value.shape)]
        elif isinstance(value, torch.SymInt):
            entries = [(f"a[{index}]", paths[index], value)]
        else:
            continue
        for code, readable, size in entries:
            if isinstance(size, int):
                continue
            expr = sympy.sympify(size.node.expr)
            if expr in first:
                guards.append((f"{code} == {first[expr][0]}", f"{readable} == {first[expr][1]}"))
                continue
            first[expr] = (code, readable)
            if expr in ranges:
                low, high = ranges[expr].lower, ranges[expr].upper
                # Export writes 2 for "not specialised on 0 and 1"; smaller sizes are held against the model by check.
                if low.is_Integer and int(low) > 2:
                    guards.append((f"{code} >= {int(low)}", f"{readable} >= {int(low)}"))
                if high.is_Integer and int(high) < 2**31:
                    guards.append((f"{code} <= {int(high)}", f"{readable} <= {int(high)}"))
    for expr, (code, readable) in list(first.items()):
        symbols = [s for s in expr.free_symbols if isinstance(s, sympy.Symbol)]
        if isinstance(expr, sympy.Symbol) or len(symbols) != 1:
            continue
        slope = sympy.diff(expr, symbols[0])
        if slope.is_Integer and int(slope) > 1:
            offset = int(cast(Any, sympy.simplify(expr.subs(symbols[0], 0))))
            guards.append((f"({code} - {offset}) % {int(slope)} == 0", f"({readable} - {offset}) % {int(slope)} == 0"))
        if symbols[0] in first:
            other_code, other_readable = first[symbols[0]]
            guards.append(
                (
                    f"{code} == {_substitute(expr, symbols[0], other_code)}",
                    f"{readable} == {_substitute(expr, symbols[0], other_readable)}",
                )
            )
    return guards


def _substitute(expr: sympy.Expr, symbol: sympy.Symbol, text: str) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    return str(PythonPrinter().doprint(expr)).replace(str(symbol), f"({text})")
