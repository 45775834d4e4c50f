"""One amount over many weights: their elements are ranked together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fxprune.select.mask import PackedMask, chunks
from fxprune.select.threshold import Shard

from .amount import to_prune
from .attach import Method, write
from .combine import check_scores, combined
from .elements import CustomFromMask, L1Unstructured, ranking
from .errors import InputError, MissingError, WrongScoresError, WrongShapeError, WrongTypeError, located
from .masked import is_byte_float, packed
from .method import join
from .place import Owners, Place, place, start_mask
from .undo import unchanged_on_failure

_WHAT = "cannot prune globally"


@dataclass
class Pooled:
    """One parameter of the pool: every place that holds it, what is ranked, and the mask so far (None: none)."""

    places: list[Place]
    ranked: Tensor
    start: Tensor | None


def global_unstructured(
    parameters: Iterable[tuple[nn.Module, str]],
    pruning_method: Callable[..., Method],
    importance_scores: dict[tuple[nn.Module, str], Tensor] | None = None,
    *,
    model: nn.Module | None = None,
    **kwargs: Any,
) -> None:
    """Prune `amount` of all elements of `parameters` together, by one ranking over them.

    Args:
        parameters: any iterable of (module, name). A tied parameter counts once and is masked at each listed owner.
        pruning_method: a class whose PRUNING_TYPE is "unstructured", such as L1Unstructured.
        importance_scores: {(module, name): tensor of the parameter's shape}, ranked in the parameter's place; those
            that are not in it are ranked by themselves.
        model: where to look for further owners of tied parameters, which get the same masks.
        kwargs: for pruning_method, such as amount=0.2 or generator=.

    L1Unstructured needs one bit an element besides the state; other methods see all elements in one tensor. Dtypes and
    devices may differ. If anything raises, every module is as it was.

    Raises a ValueError for an empty or repeated entry, a TypeError for a method of another PRUNING_TYPE.

    >>> from collections import OrderedDict
    >>> net = nn.Sequential(OrderedDict([("first", nn.Linear(10, 4)), ("second", nn.Linear(4, 1))]))
    >>> parameters_to_prune = ((net.first, "weight"), (net.second, "weight"))
    >>> prune.global_unstructured(parameters_to_prune, pruning_method=prune.L1Unstructured, amount=10)
    >>> print(sum(torch.nn.utils.parameters_to_vector(net.buffers()) == 0))
    tensor(10)
    """
    if not isinstance(parameters, Iterable):
        why = f"parameters is a {type(parameters).__name__}, not an iterable"
        raise WrongTypeError(_WHAT, why=why, do="Give (module, name) pairs.")
    scores = {} if importance_scores is None else importance_scores
    if not isinstance(scores, dict):
        why = f"importance_scores is a {type(scores).__name__}, not a dict"
        raise WrongTypeError(_WHAT, why=why, do="Give {(module, name): scores}.")
    listed = _listed(parameters)
    pool = _pool(listed, scores, None if model is None else Owners(model))
    with located(f"{len(listed)} parameters"):
        method = _method(pruning_method, kwargs)
        masks = _counted(pool, method) if _is_l1(method) else _concatenated(pool, method)
    places = [each.places for each in pool]
    pool.clear()  # so that what the new masks replace is freed as they come
    with unchanged_on_failure([each for tied in places for each in tied]) as memories:
        memory = {id(each.module): each for each in memories}
        for tied, mask in zip(places, masks, strict=True):
            for each in tied:
                if memory[id(each.module)].pack(each.name):  # the old pruned tensor leaves before the new mask comes
                    vars(each.module).pop(each.name, None)
            write(CustomFromMask(mask), tied, join)


def _listed(parameters: Iterable[Any]) -> list[Place]:
    found: list[Place] = []
    seen: set[tuple[int, str]] = set()
    for index, item in enumerate(parameters):
        if not isinstance(item, Iterable):
            why = f"entry {index} is a {type(item).__name__}"
            raise WrongTypeError(_WHAT, why=why, do="Give (module, name) pairs.")
        pair = tuple(item)
        if len(pair) != 2:
            raise InputError(_WHAT, why=f"entry {index} has {len(pair)} parts", do="Give (module, name) pairs.")
        each = place(*pair)
        if each.value() is None:
            raise MissingError(_WHAT, where=str(each), why="it is None", do="Leave out what the module does not have.")
        each.parameter()
        if (id(each.module), each.name) in seen:
            raise InputError(_WHAT, where=str(each), why=f"entry {index} names it again", do="Name it once.")
        seen.add((id(each.module), each.name))
        found.append(each)
    if not found:
        raise InputError(_WHAT, why="parameters is empty", do="Give (module, name) pairs.")
    return found


def _pool(listed: list[Place], scores: dict[tuple[nn.Module, str], Tensor], more: Owners | None) -> list[Pooled]:
    """The parameters behind the places, each once, with the scores that were given for them."""
    tied: dict[int, list[Place]] = {}
    for each in listed:
        tied.setdefault(id(each.parameter()), []).append(each)
    pool = []
    for places in tied.values():
        given = [each for each in places if (each.module, each.name) in scores]
        ranked = scores[given[0].module, given[0].name] if given else places[0].value()
        for each in given:
            _check(each, scores[each.module, each.name])
            if not _same(ranked, scores[each.module, each.name]):
                why = f"it is tied to {given[0]}, and the two have different importance scores"
                raise InputError(_WHAT, where=str(each), why=why, do="Give the scores under one of the names.")
        if more is not None:
            own = {(id(each.module), each.name) for each in places}
            others = more.others(places[0])
            places = places + [each for each in others if (id(each.module), each.name) not in own]
        pool.append(Pooled(places, ranked.detach(), start_mask(places)))
    return pool


def _check(each: Place, scores: Tensor) -> None:
    try:
        with located(each):
            check_scores(scores, each.value(), "the parameter")
    except WrongShapeError as error:
        raise WrongScoresError(error.what, where=error.where, why=error.why, do=error.do) from None


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or all(bool((x == y.to(x.device)).all()) for x, y in zip(chunks(a), chunks(b), strict=True))


def _method(make: Callable[..., Method], kwargs: dict[str, Any]) -> Method:
    if not callable(make):
        why = f"pruning_method is a {type(make).__name__}, not a class"
        raise WrongTypeError(_WHAT, why=why, do="Give a class such as L1Unstructured.")
    method = make(**kwargs)
    kind = getattr(method, "PRUNING_TYPE", None)
    if kind is None:
        why = f"{type(method).__name__} has no PRUNING_TYPE"
        raise MissingError(_WHAT, why=why, do='Set it to "unstructured".')
    if kind != "unstructured":
        why = f"the PRUNING_TYPE of {type(method).__name__} is {kind!r}"
        raise WrongTypeError(_WHAT, why=why, do='Only "unstructured" methods rank elements over several weights.')
    if not isinstance(method, torch_prune.BasePruningMethod):
        why = f"{type(method).__name__} is not a pruning method"
        raise WrongTypeError(_WHAT, why=why, do="Subclass BasePruningMethod.")
    method._tensor_name = "temp"
    return method


def _is_l1(method: Method) -> bool:
    computes = type(method).compute_mask
    return computes is L1Unstructured.compute_mask or computes is torch_prune.L1Unstructured.compute_mask


def _counted(pool: list[Pooled], method: Any) -> list[PackedMask]:
    """What stays, for each parameter, by one count over all magnitudes; nothing is concatenated."""
    bits = [None if each.start is None else packed(each.start) for each in pool]
    kept = tuple(_alive(each, mask) for each, mask in zip(pool, bits, strict=True))
    ranked = tuple(each.ranked for each in pool)
    shard = Shard(ranked, kept, ranking(ranked))
    masks = shard.keep_all_but(to_prune(method.amount, shard.alive()))
    for index, each in enumerate(pool):
        if each.start is not None and bits[index] is None:  # what is neither 0 nor 1 is not ranked and stays
            keep = masks[index].unpack() | (each.start != 1).to(masks[index].bits.device)
            masks[index] = PackedMask.pack(keep)
    return masks


def _alive(each: Pooled, bits: PackedMask | None) -> PackedMask | None:
    """What may still be pruned, on the device of what is ranked; `bits` is the mask so far where it is 0 and 1."""
    if each.start is None:
        return None
    start, device = each.start, each.ranked.device
    if bits is not None:
        return PackedMask(bits.shape, bits.bits.to(device))
    return PackedMask.from_chunks(start.shape, device, ((piece == 1).to(device) for piece in chunks(start)))


def _concatenated(pool: list[Pooled], method: Method) -> list[Tensor]:
    """The new mask of each parameter, by a method that sees all elements in one tensor, in the order given."""
    device = pool[0].ranked.device
    ranked, start = [], []
    for each in pool:
        t = each.ranked.float() if is_byte_float(each.ranked) else each.ranked
        ranked.append(t.reshape(-1).to(device))
        mask = torch.ones_like(t) if each.start is None else each.start
        start.append((mask.float() if is_byte_float(mask) else mask).reshape(-1).to(device))
    found = combined(method, torch.cat(ranked), torch.cat(start))
    parts = found.split([each.ranked.numel() for each in pool])
    return [part.view(each.ranked.shape) for part, each in zip(parts, pool, strict=True)]
