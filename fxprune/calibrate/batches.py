"""batches: calibration data as calls of the captured program, cut anew so that results do not depend on the cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from .. import admit
from ..capture import Capture, capture
from ..check import Call, compare, outputs, refuse
from ..errors import InputError

# A batch is cut so that the largest tensor of the graph has about as many numbers as this.
_LARGEST = 1 << 22
_MOST_SAMPLES = 256
# How far, relative to the largest output, a sample may differ from itself in a batch: by rounding alone.
_APART = 1e-4
# The argument by which transformers models say which positions are text and which are padding.
_MASK = "attention_mask"


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call: flat inputs in the program's order, which positions count [b, s] bool (None: all), and its name."""

    flat: tuple[Any, ...]
    valid: Tensor | None = None
    label: str = "this batch"


def read_calls(data: Any, samples: int | None = None, argument: str = "batches") -> list[Call]:
    """Any iterable of inputs -> calls of the model; with `samples`, just so many along dim 0.

    An item is a tensor, a tuple or list of arguments, a mapping of keyword arguments, or a pair (tuple or list,
    mapping) of both. Raises InputError naming `argument` for anything else, and for fewer samples than asked.
    """
    where = f"{argument}="
    refuse_no_series(data, argument)
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise InputError(f"cannot take samples={samples!r}", why="it is not a whole number, 1 or more")
    calls: list[Call] = []
    found = 0
    for index, item in enumerate(data):
        call = read_call(item, f"{argument}[{index}]")
        size = samples_of(call)
        if size == 0:
            raise InputError(
                "cannot calibrate with an empty batch",
                where=call.label,
                why="its tensors have size 0 in dim 0",
                do="Leave it out.",
            )
        if samples is not None and size is not None and found + size > samples:
            call = _first(call, size, samples - found)
            size = samples - found
        calls.append(call)
        found += size or 1
        if samples is not None and found >= samples:
            break
    if not calls:
        raise InputError("cannot calibrate without data", where=where, why="it has no batches", do="Give at least one.")
    if samples is not None and found < samples:
        raise InputError(
            f"cannot calibrate on {samples} samples",
            where=where,
            why=f"there are {found}",
            do="Give more data, or ask for fewer samples.",
        )
    return calls


def refuse_no_series(data: Any, argument: str) -> None:
    """Raises InputError naming `argument` unless `data` is an iterable of batches."""
    if isinstance(data, (Tensor, Mapping, str, bytes, nn.Module)) or not isinstance(data, Iterable):
        raise InputError(
            f"cannot calibrate with a {type(data).__name__}",
            where=f"{argument}=",
            why="it is not a series of batches",
            do="Give a DataLoader, a list or a generator; a single batch goes into a list: [batch].",
        )


def read_call(item: Any, where: str) -> Call:
    """One item of a series of batches as a call of the model. Raises InputError naming `where`."""
    if isinstance(item, Tensor):
        return Call(where, (item,), {})
    if isinstance(item, Mapping):
        wrong = [key for key in item if not isinstance(key, str)]
        if not wrong:
            return Call(where, (), dict(item))
    elif isinstance(item, (tuple, list)):
        if len(item) == 2 and isinstance(item[0], (tuple, list)) and isinstance(item[1], Mapping):
            return Call(where, tuple(item[0]), dict(item[1]))
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(list(item))):
            return Call(where, tuple(item), {})
    raise InputError(
        f"cannot calibrate with a {type(item).__name__}",
        where=where,
        why="it is no batch of inputs",
        do="A batch is a tensor, a tuple of arguments, a dict of keyword arguments, or a pair of both.",
    )


def _tensors(call: Call) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]


def samples_of(call: Call) -> int | None:
    """The size of dim 0 that all tensors of a call share; None where they do not."""
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in _tensors(call)}
    return sizes.pop() if len(sizes) == 1 else None


def _first(call: Call, size: int, count: int) -> Call:
    return _map(call, lambda t: t[:count]) if count < size else call


def _map(call: Call, change: Any) -> Call:
    args, kwargs = pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, (call.args, call.kwargs))
    return Call(call.label, args, kwargs)


def capture_for(model: nn.Module, calls: Sequence[Call], dynamic_shapes: Any = None) -> Capture:
    """The model captured so that all these calls fit: sizes that differ between them are dynamic.

    Raises InputError naming the first call that the model or the captured program does not take.
    """
    first, varying = calls[0], _varying(calls)
    _check_devices(model, calls)
    wanted = _run(model, first)
    shapes = dynamic_shapes
    if shapes is None and varying:
        shapes = ShapesCollection()
        leaves = pytree.tree_leaves((first.args, first.kwargs))
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.dim():
                shapes[leaf] = {dim: Dim.AUTO for dim in {0, *varying.get(place, ())}}
    captured = capture(model, first.args, first.kwargs, shapes)
    row = compare("capture = your model", first, wanted, outputs(captured.program, first))
    if not row.ok and not varying and dynamic_shapes is None:
        # A model that takes sizes for something else than numbers can only be captured with every size fixed.
        captured = capture(model, first.args, first.kwargs, static=True)
        row = compare("capture = your model", first, wanted, outputs(captured.program, first))
    if not row.ok:
        raise refuse(
            row, "Does it draw random numbers, or keep state between calls? Such a model cannot be calibrated."
        )
    for call in calls:
        check_call(captured, call)
    return captured


def check_call(captured: Capture, call: Call) -> None:
    """Raises InputError naming the call unless the captured program is right for it."""
    try:
        captured.entry.check(call.args, call.kwargs)
    except InputError as error:
        raise InputError(
            "cannot calibrate with this batch",
            where=call.label,
            why=str(error),
            do="Give batches like the first one, or say with dynamic_shapes= which sizes may differ.",
        ) from error


def _run(model: nn.Module, call: Call) -> list[Any]:
    with admit.untouched(model):
        try:
            return outputs(model, call)
        except Exception as error:
            shapes = ", ".join(f"{list(t.shape)} {t.dtype}" for t in _tensors(call))
            said = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                "cannot run the model on a batch",
                where=f"{call.label} ({shapes or 'no tensors'})",
                why=f"{type(model).__name__} raises {type(error).__name__}: {said}",
                do="Give inputs alone, without labels: a tensor, a tuple of arguments or a dict of keyword arguments.",
            ) from error


def _varying(calls: Sequence[Call]) -> dict[int, set[int]]:
    """Leaf -> its dimensions, other than 0, whose size is not the same in all calls."""
    found: dict[int, set[int]] = {}
    first = pytree.tree_leaves((calls[0].args, calls[0].kwargs))
    for call in calls[1:]:
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        for place, (a, b) in enumerate(zip(first, leaves)):
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim():
                for dim in range(1, a.dim()):
                    if a.shape[dim] != b.shape[dim]:
                        found.setdefault(place, set()).add(dim)
    return found


def _check_devices(model: nn.Module, calls: Sequence[Call]) -> None:
    devices = {p.device for p in model.parameters()}
    for call in calls:
        for tensor in _tensors(call):
            if devices and tensor.device not in devices and tensor.dim():
                raise InputError(
                    "cannot calibrate with data on another device",
                    where=call.label,
                    why=f"it is on {tensor.device}, and the model on {', '.join(sorted(map(str, devices)))}",
                    do="Move the data or the model, so that model(batch) works.",
                )


def cut(captured: Capture, calls: Sequence[Call]) -> list[Batch]:
    """Calls -> batches of one size for each shape, in order, whatever the size of the calls.

    Where samples cannot be told apart (tensors whose dim 0 differs, or a model that lets samples of a batch see each
    other), calls stay as they are.
    """
    if any(samples_of(call) is None for call in calls) or not _cuttable(captured, calls[0]):
        return [batch_of(captured, call) for call in calls]
    size = _samples_at_a_time(captured)
    by_shape: dict[Any, list[Call]] = {}
    for call in calls:
        by_shape.setdefault(_signature(call), []).append(call)
    batches = []
    for alike in by_shape.values():
        leaves = [pytree.tree_flatten((call.args, call.kwargs)) for call in alike]
        spec = leaves[0][1]
        columns = zip(*(flat for flat, _ in leaves), strict=True)
        joined = [torch.cat(list(column)) if isinstance(column[0], Tensor) else column[0] for column in columns]
        names = [call.label for call in alike for _ in range(samples_of(call) or 0)]
        for start in range(0, len(names), size):
            first, last = names[start], names[min(start + size, len(names)) - 1]
            part = [t[start : start + size] if isinstance(t, Tensor) else t for t in joined]
            args, kwargs = pytree.tree_unflatten(part, spec)
            batches.append(batch_of(captured, Call(first if first == last else f"{first} to {last}", args, kwargs)))
    return batches


def _signature(call: Call) -> Any:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    return str(spec), tuple(
        (tuple(leaf.shape[1:]), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    )


def _cuttable(captured: Capture, call: Call) -> bool:
    """Whether two samples give the same apart as together."""
    size = samples_of(call)
    if size is None or size < 1:
        return False
    both = _map(call, lambda t: t[:2] if t.shape[0] > 1 else torch.cat([t, t]))
    one, other = _map(both, lambda t: t[:1]), _map(both, lambda t: t[1:])
    try:
        for each in (both, one):
            captured.entry.check(each.args, each.kwargs)
        together, apart = outputs(captured.program, both), [outputs(captured.program, c) for c in (one, other)]
    except (InputError, RuntimeError):
        return False
    for whole, *parts in zip(together, *apart, strict=True):
        if not isinstance(whole, Tensor) or whole.dim() == 0 or whole.shape[0] != 2:
            return False
        joined = torch.cat(parts)
        if compare("", call, [whole], [joined]).error > _APART:
            return False
    return True


def _samples_at_a_time(captured: Capture) -> int:
    largest, batch = 1, 1
    for node in captured.program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op != "get_attr":
            numbers = [int(s) if isinstance(s, int) else _hint(s) for s in value.shape]
            count = 1
            for number in numbers:
                count *= number
            largest = max(largest, count)
            if node.op == "placeholder" and numbers:
                batch = max(batch, numbers[0])
    return max(1, min(_MOST_SAMPLES, _LARGEST * batch // largest))


def _hint(size: torch.SymInt) -> int:
    try:
        return int(size.node.hint) if size.node.hint is not None else 64
    except Exception:
        return 64


def batch_of(captured: Capture, call: Call) -> Batch:
    """A call as flat inputs of the captured program, with the positions that its attention mask leaves."""
    flat = captured.entry.flatten(call.args, call.kwargs)
    valid = None
    for path, leaf in zip(captured.entry.paths, flat, strict=True):
        if path == _MASK and isinstance(leaf, Tensor) and leaf.dim() == 2:
            valid = leaf != 0
    return Batch(tuple(flat), None if valid is None or bool(valid.all()) else valid, call.label)
