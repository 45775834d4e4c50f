"""conditions: whether what an entry check of a file demands of a call is arithmetic on sizes, and nothing else.

The conditions of an entry check are Python, which is compiled and run. From a file they could be any Python.
"""

from __future__ import annotations

import ast
import re

from torch.fx import Graph

from fxprune.capture.entry import EntryCheck, TensorInput
from fxprune.errors import FileError

_PLAIN = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.Compare, ast.Eq,
    ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is, ast.IsNot, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.FloorDiv, ast.Mod, ast.Load, ast.IfExp, ast.Tuple,
)  # fmt: skip
_FUNCTIONS = {"max", "min", "abs", "int", "float", "bool", "round"}
_OF_MODULES = {
    "math": {"ceil", "floor", "trunc", "sqrt", "log2", "pow", "inf"},
    "torch": {"sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite"},
}
_OF_TENSORS = {"size", "stride", "storage_offset", "dim", "numel"}
_SYMBOL = re.compile(r"\b[a-z]+\d+\b")
_NUMBERS = {int: 2**63, float: float("inf"), bool: 1}
_MOST_EXPONENT = 8
_MOST_TEXT = 20_000


def check_conditions(entry: EntryCheck, graph: Graph) -> None:
    """Raises FileError where a condition is more than arithmetic, or the inputs are not those of the graph."""
    inputs = graph.find_nodes(op="placeholder")
    if not len(entry.inputs) == len(entry.paths) == len(inputs):
        raise FileError("cannot read the file", why="what it demands of inputs is not for as many as its graph has")
    for want in entry.inputs:
        if isinstance(want, tuple) and not _is_known(want):
            raise FileError("cannot read the file", why=f"it demands {str(want)[:60]} of an input")
        if isinstance(want, TensorInput) and not all(map(_is_size, want.sizes)):
            raise FileError("cannot read the file", why=f"it demands an input of sizes {str(want.sizes)[:80]}")
    for condition, _ in entry.guards:
        if not is_arithmetic(condition):
            why = f"it demands of a call what is no arithmetic on sizes: {condition[:60]!r}"
            raise FileError("cannot read the file", why=why)


def _is_known(want: tuple[str, object]) -> bool:
    kind, value = want
    return kind == "constant" or (kind == "type" and value in (int, float, bool))


def _is_size(size: int | str) -> bool:
    """Whether this is a size, or an expression of symbols."""
    if isinstance(size, int):
        return size >= 0
    return is_arithmetic(_SYMBOL.sub("1", size))


def is_arithmetic(condition: str) -> bool:
    """Whether a condition, Python over `a[index].size()[dim]`, computes with numbers and sizes alone."""
    if len(condition) > _MOST_TEXT:
        return False
    try:
        tree = ast.parse(condition, mode="eval")
        return all(_may_stand(node) for node in ast.walk(tree)) and _names_are_used_well(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _may_stand(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=None):
            return True
        case ast.Constant(value=bool() | int() | float() as value):
            return abs(value) <= _NUMBERS[type(value)]
        case ast.Constant():
            return False
        case ast.Pow():
            return True
        case ast.BinOp(op=ast.Pow(), right=right):
            return isinstance(right, ast.Constant) and right.value in range(_MOST_EXPONENT + 1)
        case ast.BinOp(op=op):
            return isinstance(op, _PLAIN)
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            return name in _FUNCTIONS
        case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=name), keywords=[]):
            return name in _OF_MODULES.get(module, ())
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=[], keywords=[]):
            return name in _OF_TENSORS and _is_input(value)
        case ast.Subscript(value=value, slice=ast.Constant(value=index)):
            return isinstance(index, int) and (isinstance(value, ast.Call) or _is_input(node))
        case ast.Attribute(value=ast.Name(id=module), attr=name):
            return name in _OF_MODULES.get(module, ())
        case ast.Attribute(value=value, attr=name):
            return name in _OF_TENSORS and _is_input(value)
        case ast.Name(id=name):
            return name in _FUNCTIONS or name in _OF_MODULES or name in ("a", "inf")
    return isinstance(node, _PLAIN)


def _is_input(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "a"


def _names_are_used_well(tree: ast.AST) -> bool:
    """Whether functions are called and modules asked for what they have, and neither is handed around."""
    used = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    used |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {id(node.value) for node in ast.walk(tree) if _is_input(node) and isinstance(node, ast.Subscript)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in _OF_TENSORS]
    return all(node.id == "inf" or id(node) in used for node in names) and all(id(a) in used for a in attributes)
