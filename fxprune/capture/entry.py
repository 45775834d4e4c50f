"""EntryCheck: what a captured graph demands of its inputs, as plain data, checked before every call.

torch.export specialises sizes, Python constants and relations between sizes. A graph run outside of what it was
captured for gives wrong numbers without a word, so the conditions travel with the result and a call that breaks one is
refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from fxprune.errors import InputError
from fxprune.graph import compat


@dataclasses.dataclass(frozen=True)
class TensorInput:
    """A tensor placeholder: `sizes` holds an int where the size is fixed, a symbol's name or expression elsewhere.

    `contiguous` is None where the layout in memory does not matter, as it does for few models.
    """

    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int | str, ...]
    contiguous: bool | None = None


@dataclasses.dataclass(frozen=True)
class EntryCheck:
    """Conditions on the flat inputs of a program.

    `names` are the call's argument names and `paths` the readable names of the flat inputs. `inputs` describes each
    flat input: a TensorInput, or ("constant", value) for a Python value fixed at capture, or ("type", type) for a
    number that may change, or None for anything else.
    `guards` are (condition, readable) pairs, Python over `a[index].size()[dim]`. `order` holds the names of the model's
    positional parameters, where it has a signature; `left_out` the values of an argument that are the same as leaving
    it out, whether it was captured or not.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    inputs: tuple[TensorInput | tuple[str, Any] | None, ...]
    guards: tuple[tuple[str, str], ...]
    spec: Any = None
    order: tuple[str, ...] = ()
    left_out: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Binds a call to the captured signature and flattens it; raises InputError where it does not fit."""
        structured = self.bound(args, kwargs)
        values = [*structured[0], *structured[1].values()]
        if self.names == self.paths and all(isinstance(v, torch.Tensor) for v in values):
            return values
        specs = self.spec
        if specs is None:
            return pytree.tree_leaves(values)
        flat, seen = pytree.tree_flatten(structured)
        if seen == specs:
            return flat
        # Only the order of a dict's keys may differ. The graph takes what it knows by key and would drop the rest.
        try:
            known = fx_pytree.tree_flatten_spec(structured, specs)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
            known = []
        if len(known) != len(flat):
            raise InputError(
                "cannot call with another structure of arguments",
                why=f"the model was captured with {', '.join(self.paths) or 'none'}, got {len(flat)} values",
                do="Pass arguments nested as at capture, or transform again with the call you want.",
            )
        return known

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call as the captured one was written: by position what it gave so, and by name the rest, in its order.

        Raises InputError where an argument is missing, or one is given that the graph knows nothing of.
        """
        rest = self._by_name(args, kwargs)
        values = [rest.pop(name) if name in rest else self._default(name) for name in self.names]
        for name, value in rest.items():
            if self.left_out.get(name) and not self._is_left_out(name, value):
                raise InputError(
                    f"cannot call with {name} = {_short(value)}",
                    why=f"the model was captured without it, which is {self.left_out[name][-1]!r}",
                    do="Leave it out, or transform again with the call you want.",
                )
        extra = [name for name in rest if name not in self.left_out]
        if extra:
            raise self._refuse_extra(", ".join(extra))
        return tuple(values[: self._positional]), dict(zip(self.names[self._positional :], values[self._positional :]))

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names that the model has for them."""
        # What is given beyond the model's parameters went to *args at the capture.
        names = (*self.order, *self.names[len(self.order) : self._positional])
        if len(args) > len(names):
            raise self._refuse_extra(f"{len(args) - len(names)} positional")
        found = dict(zip(names, args))
        for name, value in kwargs.items():
            if name in found:
                raise InputError(
                    f'cannot call with two values for "{name}"',
                    why="one is given by position and one by name",
                    do="Give one of them.",
                )
            found[name] = value
        return found

    @functools.cached_property
    def _positional(self) -> int:
        """How many arguments the captured call gave by position."""
        return len(self.names) if self.spec is None else compat.children_of(self.spec)[0].num_children

    def _default(self, name: str) -> Any:
        """The value that an argument was captured with, where leaving it out is the same."""
        place = self.paths.index(name) if name in self.paths else None
        want = self.inputs[place] if place is not None else None
        if isinstance(want, tuple) and want[0] == "constant" and self._is_left_out(name, want[1]):
            return want[1]
        raise InputError(
            f'cannot call without argument "{name}"',
            why=f"the model was captured with the arguments {', '.join(self.names)}",
            do="Pass all of them, or transform again with the call you want.",
        )

    def _is_left_out(self, name: str, value: Any) -> bool:
        return any(_same_constant(known, value) for known in self.left_out.get(name, ()))

    def _refuse_extra(self, extra: str) -> InputError:
        return InputError(
            f"cannot take the arguments {extra}",
            why=f"the model was captured with the arguments {', '.join(self.names) or '(none)'}",
            do="Leave them out, or transform again with the call you want.",
        )

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """The flat inputs of a call. Raises InputError unless the captured graph is right for it."""
        flat = args if self._is_flat and not kwargs and len(args) == len(self.names) else self.flatten(args, kwargs)
        if not self._accepts(flat):
            self._refuse(flat)
        return flat

    @functools.cached_property
    def _is_flat(self) -> bool:
        """Whether the arguments of a call that gives all by position are the flat inputs."""
        by_place = (*self.order, *self.names[len(self.order) : self._positional])
        if by_place[: len(self.names)] != self.names:
            return False
        return self.names == self.paths and all(isinstance(want, TensorInput) for want in self.inputs)

    @functools.cached_property
    def _accepts(self) -> Callable[[Sequence[Any]], bool]:
        """Whether flat inputs are as they must be, in one generated function: a call is to cost microseconds."""
        lines, names = [], {**compat.guard_names(), "Tensor": torch.Tensor, "same": _same_constant}
        for index, want in enumerate(self.inputs):
            a = f"a[{index}]"
            if isinstance(want, TensorInput):
                names |= {f"dtype{index}": want.dtype, f"device{index}": want.device}
                lines.append(f"if not isinstance({a}, Tensor) or {a}.dtype is not dtype{index}: return False")
                on = f"not {a}.is_cpu" if want.device.type == "cpu" else f"{a}.device != device{index}"
                lines += [f"if {on}: return False", f"s = {a}.shape"]
                sizes = [f"s[{d}] != {size}" for d, size in enumerate(want.sizes) if isinstance(size, int)]
                lines.append(f"if {' or '.join([f'len(s) != {len(want.sizes)}', *sizes])}: return False")
                if want.contiguous is not None:
                    lines.append(f"if {a}.is_contiguous() is not {want.contiguous}: return False")
            elif want is not None:
                names[f"want{index}"] = want[1]
                wrong = f"type({a}) is not want{index}" if want[0] == "type" else f"not same(want{index}, {a})"
                lines.append(f"if {wrong}: return False")
        # Sizes far from the captured ones can make a divisor zero; the condition is then not met.
        lines += ["try:", *(f"    if not ({condition}): return False" for condition, _ in self.guards), "    pass"]
        lines += ["except ZeroDivisionError:", "    return False", "return True"]
        exec("\n    ".join(["def accepts(a):", f"if len(a) != {len(self.inputs)}: return False", *lines]), names)
        return names["accepts"]

    def _refuse(self, flat: Sequence[Any]) -> None:
        """Raises InputError with what is wrong about flat inputs."""
        for path, want, got in zip(self.paths, self.inputs, flat, strict=True):
            if isinstance(want, TensorInput):
                _check_tensor(path, want, got)
            elif want is not None and want[0] == "type":
                if type(got) is not want[1]:
                    raise InputError(
                        f"cannot call with {path} = {got!r}",
                        why=f"the model was captured with any {want[1].__name__} there",
                        do="Pass one, or transform again with the value you want.",
                    )
            elif want is not None and not _same_constant(want[1], got):
                raise InputError(
                    f"cannot call with {path} = {got!r}",
                    why=f"the value {want[1]!r} was fixed when the model was captured",
                    do="Transform again with the value you want.",
                )
        raise InputError(
            "cannot call with these sizes",
            why=f"the graph is only right where {self._failed(flat)}; got {_sizes_text(self.paths, flat)}",
            do="Transform again with example inputs of this size, or say dynamic_shapes=.",
        )

    def _failed(self, flat: Sequence[Any]) -> str:
        """The first guard that flat inputs do not meet, readable."""
        failed = (readable for condition, readable in self.guards if not _is_met(condition, flat))
        return next(failed, "nothing is known to be wrong (please report it)")

    def takes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call is accepted."""
        try:
            self.check(args, kwargs)
        except InputError:
            return False
        return True

    def allowing(self, symbols: Sequence[str], size: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> EntryCheck:
        """The same check, where conditions that this call does not meet are none where these dynamic sizes are `size`.

        The graph must have been found right there.
        """
        flat, places = self.flatten(args, kwargs), [self._size_of(symbol) for symbol in symbols]
        condition, readable = (" and ".join(f"{place} == {size}" for place in each) for each in zip(*places))
        guards = tuple(
            (code, words) if _is_met(code, flat) else (f"({code}) or {condition}", f"{words} or {readable}")
            for code, words in self.guards
        )
        return dataclasses.replace(self, guards=guards)

    def has_least(self, symbol: str) -> bool:
        """Whether a dynamic size has a least value that is a condition by itself, as a Dim of torch.export gives it."""
        condition, _ = self._size_of(symbol)
        return any(code.startswith(f"{condition} >= ") for code, _ in self.guards)

    def above(self, symbol: str, size: int, unless: Sequence[str] = ()) -> EntryCheck:
        """The same check, which also demands more than `size` of a dynamic size, unless all of `unless` are `size`."""
        first, *rest = [self._size_of(each) for each in (symbol, *unless)]
        texts = [f"{place} > {size}" for place in first]
        if rest:
            allowed = (" and ".join(f"{place} == {size}" for place in each) for each in zip(*rest))
            texts = [f"{text} or {other}" for text, other in zip(texts, allowed)]
        return dataclasses.replace(self, guards=(*self.guards, (texts[0], texts[1])))

    def _size_of(self, symbol: str) -> tuple[str, str]:
        """A dynamic size as conditions have it, and readable."""
        index, dim = next(
            (index, dim)
            for index, want in enumerate(self.inputs)
            if isinstance(want, TensorInput)
            for dim, size in enumerate(want.sizes)
            if size == symbol
        )
        return f"a[{index}].size()[{dim}]", f"{self.paths[index]}.size()[{dim}]"

    def strided_as(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> EntryCheck:
        """The same check that also demands tensors contiguous, or not, as in this call."""
        inputs = tuple(
            dataclasses.replace(want, contiguous=got.is_contiguous()) if isinstance(want, TensorInput) else want
            for want, got in zip(self.inputs, self.flatten(args, kwargs), strict=True)
        )
        return dataclasses.replace(self, inputs=inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> EntryCheck:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _short(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]


def _is_met(condition: str, flat: Sequence[Any]) -> bool:
    """Whether flat inputs meet a condition; where sizes far from the captured ones make a divisor zero they do not."""
    try:
        return bool(eval(condition, {**compat.guard_names(), "a": flat}))
    except ZeroDivisionError:
        return False


def _check_tensor(path: str, want: TensorInput, got: Any) -> None:
    if not isinstance(got, torch.Tensor):
        raise InputError(
            f"cannot call with {path} of type {type(got).__name__}",
            why="the model was captured with a tensor there",
            do="Pass a tensor, or transform again with the call you want.",
        )
    if got.dtype != want.dtype or got.device != want.device:
        raise InputError(
            f"cannot call with {path} of {got.dtype} on {got.device}",
            why=f"the model was captured with {want.dtype} on {want.device}",
            do="Convert the input, or transform again with an input like this.",
        )
    if want.contiguous not in (None, got.is_contiguous()):
        raise InputError(
            f"cannot call with {path}, which is {'not ' * want.contiguous}contiguous",
            why="the model computes something else for other strides, and was captured for those of its example",
            do="Pass the tensor as in the example (x.contiguous()), or transform again with an input like this.",
        )
    shape = got.shape
    if len(shape) != len(want.sizes) or any(
        isinstance(w, int) and g != w for g, w in zip(shape, want.sizes, strict=False)
    ):
        raise InputError(
            f"cannot call with {path} of shape {list(shape)}",
            why=f"the model was captured for [{', '.join(map(str, want.sizes))}]",
            do="Transform again with example inputs of this size, or make the size dynamic with dynamic_shapes=.",
        )


def _same_constant(want: Any, got: Any) -> bool:
    if isinstance(want, float) and isinstance(got, float) and math.isnan(want):
        return math.isnan(got)
    return type(want) is type(got) and bool(want == got)


def _sizes_text(paths: Sequence[str], flat: Sequence[Any]) -> str:
    return ", ".join(f"{p} {list(v.shape)}" for p, v in zip(paths, flat, strict=True) if isinstance(v, torch.Tensor))
