"""without_blocks: residual blocks and branches leave the modules of a model, as they left its graph."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.check.calls import Call
from fxprune.graph.program import owner

from .attributes import Kind, Place, counts_of, held_objects, numbers
from .sizes import Sizes

_LISTS = (nn.ModuleList, nn.Sequential)


class Bypass(nn.Module):
    """Stands where a residual block stood, and hands on its first argument.

    `more` is how many values the block answered besides, which are None now; None where it answered no tuple.
    """

    def __init__(self, more: int | None) -> None:
        super().__init__()
        self.more = more

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, alone or as the first of a tuple."""
        first = args[0] if args else next(iter(kwargs.values()))
        return first if self.more is None else (first, *[None] * self.more)


class NoBranch(nn.Module):
    """Stands where a branch of a residual sum stood, and answers zeros, so that the stream goes on as it is.

    The zeros are like its first tensor argument, but where `sizes` has a size other than -1. `more` is how many values
    the branch answered besides, which are None now; None where it answered no tuple.
    """

    def __init__(self, more: int | None = None, sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.more, self.sizes = more, sizes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros, alone or as the first of a tuple."""
        like = _first_tensor(args, kwargs)
        sizes = (like.shape[dim] if size == -1 else size for dim, size in enumerate(self.sizes or like.shape))
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        zeros = like.new_zeros(tuple(sizes), dtype=dtype)
        return zeros if self.more is None else (zeros, *[None] * self.more)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a module answered in a call: how many values besides its first, None for no tuple, and the first's sizes.

    `sizes` is empty where they are those of the first tensor argument, and has -1 where one of them is.
    """

    more: int | None = None
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class WayOut:
    """How modules leave a copy of a model: paths deleted from lists, bypassed, and answering zeros."""

    deleted: tuple[str, ...]
    bypassed: tuple[str, ...]
    zeros: tuple[str, ...]


def ways_out(
    model: nn.Module, paths: Sequence[str], branches: Sequence[str], without_ops: Sequence[str]
) -> list[WayOut]:
    """How the dropped modules `paths` can leave, in the order to try it.

    `branches` are those of them that are added to a residual stream, `without_ops` other modules whose ops left with
    them: they are bypassed before they stay, and blocks are deleted before they are bypassed.
    """
    blocks = [path for path in paths if path not in branches]
    listed = [path for path in blocks if is_listed(model, path)]
    return [
        WayOut(tuple(deleted), (*(path for path in blocks if path not in deleted), *bypassed), tuple(branches))
        for deleted in ([listed, []] if listed else [[]])
        for bypassed in ([without_ops, ()] if without_ops else [()])
    ]


def is_listed(model: nn.Module, path: str) -> bool:
    """Whether a module is an element of a list of modules, which can lose it."""
    return type(owner(model, path)[0]) in _LISTS


def take_out(model: nn.Module, way: WayOut, answered: Mapping[str, Answer]) -> list[Kind]:
    """Lets the modules leave a model, in place; `answered` is what they answered, as `answers` found it.

    Returns the attributes that may count the elements of lists which lost some.
    """
    stand_ins: dict[str, nn.Module] = {path: Bypass(answered[path].more) for path in way.bypassed}
    stand_ins |= {path: NoBranch(answered[path].more, answered[path].sizes) for path in way.zeros}
    for path, module in stand_ins.items():
        parent, leaf = owner(model, path)
        parent._modules[leaf] = module
    return delete_blocks(model, way.deleted)


def sizes_kept(model: nn.Module, way: WayOut, sizes: Sizes) -> list[Kind]:
    """The sizes that stand-ins of branches remember, which may be others now."""
    found = []
    for path in way.zeros:
        module = model.get_submodule(path)
        for name, item, value in numbers(module):
            news = sizes.news_of(value) if name == "sizes" else []
            if news:
                place = Place(module, name, item, value, [value, *news], path)
                found.append(Kind(f"{NoBranch.__name__}.{name}[{item}]", [place]))
    return found


def delete_blocks(model: nn.Module, paths: Sequence[str]) -> list[Kind]:
    """Takes modules out of the lists that they are elements of, in place, and numbers those that stay anew.

    Returns the attributes that may count the elements of these lists.
    """
    gone: defaultdict[str, list[int]] = defaultdict(list)
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        gone[parent].append(list(model.get_submodule(parent)._modules).index(leaf))
    kinds: list[Kind] = []
    for parent, places in gone.items():
        blocks: Any = model.get_submodule(parent)
        count, indices = len(blocks), _index_attributes(list(blocks))
        kinds += counts_of(list(_holders(model, parent)), count, places)
        for place in sorted(places, reverse=True):
            del blocks[place]
        for place, block in enumerate(blocks):
            for inner, name in indices:
                setattr(block.get_submodule(inner), name, place)
    return kinds


def _index_attributes(blocks: list[nn.Module]) -> list[tuple[str, str]]:
    """(path inside a block, attribute) of the numbers that are each block's own place in the list."""
    found: set[tuple[str, str]] | None = None
    for place, block in enumerate(blocks):
        own = {
            (path, name)
            for path, module in block.named_modules()
            for name, value in vars(module).items()
            if type(value) is int and value == place
        }
        found = own if found is None else found & own
    return sorted(found or ()) if len(blocks) > 1 else []


def _holders(model: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """(path, object) of the modules around a list, and of the objects that they hold, inner before outer."""
    names, seen = path.split("."), set()
    for depth in range(len(names) - 1, -1, -1):
        around = ".".join(names[:depth])
        module = model.get_submodule(around)
        for holder in (module, *held_objects(module)):
            if id(holder) not in seen:
                seen.add(id(holder))
                yield around, holder


def answers(model: nn.Module, paths: Sequence[str], call: Call) -> dict[str, Answer]:
    """What modules answer in a call of the model."""
    found = dict.fromkeys(paths, Answer())
    hooks = []
    for path in paths:

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            found[path] = _answer(_first_tensor(args, kwargs), output)

        hooks.append(model.get_submodule(path).register_forward_hook(note, with_kwargs=True))
    args, kwargs = call.copy()
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _answer(like: Tensor | None, output: Any) -> Answer:
    first = output[0] if isinstance(output, tuple) else output
    more = len(output) - 1 if isinstance(output, tuple) else None
    if like is None or not isinstance(first, Tensor) or first.shape == like.shape:
        return Answer(more)
    theirs = [*like.shape, *[-1] * len(first.shape)]
    return Answer(more, tuple(-1 if size == other else size for size, other in zip(first.shape, theirs)))


def _first_tensor(args: Any, kwargs: Any) -> Any:
    """The first tensor among the arguments of a call, of floats where there is one; None where there is none."""
    leaves = pytree.tree_leaves((args, tuple(kwargs.values())))
    tensors = sorted((leaf for leaf in leaves if isinstance(leaf, Tensor)), key=lambda t: not t.is_floating_point())
    return next(iter(tensors), None)
