"""batches: calibration data as calls of the model, and the model captured so that it takes them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from fxprune.capture import admit
from fxprune.capture.capture import Capture, capture
from fxprune.check.calls import Call
from fxprune.check.compare import CheckRow, compare, outputs, refuse
from fxprune.errors import InputError
from fxprune.graph.environment import words_of

# The argument by which transformers models say which positions are text and which are padding, and those of the text.
_MASK = "attention_mask"
_TEXTS = ("input_ids", "inputs_embeds")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call: flat inputs in the program's order, and which positions count [b, s] bool (None: all).

    `labels` say which of the user's batches each sample comes from, or all of them. `texts` are the places in `flat` of
    what those positions are read from, [b, s, ...].
    """

    flat: tuple[Any, ...]
    valid: Tensor | None = None
    labels: tuple[str, ...] = ("this batch",)
    texts: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """The user's batches that the samples come from, in words."""
        first, last = self.labels[0], self.labels[-1]
        return first if first == last else f"{first} to {last}"

    def copied(self) -> list[Any]:
        """The flat inputs with a copy of each tensor: a program that writes to its inputs writes to no user's."""
        return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.flat]

    def label_of(self, marked: Tensor) -> str:
        """The user's batch with the first sample that `marked` [b, ...] bool marks; all of them where it has none."""
        if len(self.labels) > 1 and marked.dim() and marked.shape[0] == len(self.labels) and bool(marked.any()):
            return self.labels[int(in_any_place(marked).nonzero()[0])]
        return self.label


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
            f"cannot read batches from a {type(data).__name__}",
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
        f"cannot use a {type(item).__name__} as a batch",
        where=where,
        why="it is no batch of inputs",
        do="A batch is a tensor, a tuple of arguments, a dict of keyword arguments, or a pair of both.",
    )


def tensors_of(call: Call) -> list[Tensor]:
    """The tensors among the arguments of a call."""
    return [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]


def samples_of(call: Call) -> int | None:
    """The size of dim 0 that all tensors of a call but single numbers share; None where they do not."""
    sizes = {tensor.shape[0] for tensor in tensors_of(call) if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def _first(call: Call, size: int, count: int) -> Call:
    return map_tensors(call, lambda t: t[:count]) if count < size else call


def has_samples(leaf: object) -> bool:
    """Whether a leaf is a tensor with a dim 0, which runs over samples."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def in_any_place(marked: Tensor) -> Tensor:
    """For each sample whether any element of it is marked: [b, ...] bool -> [b] bool."""
    return marked.any(tuple(range(1, marked.dim()))) if marked.dim() > 1 else marked


def map_tensors(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """A call with every tensor changed but single numbers."""
    args, kwargs = pytree.tree_map(lambda x: change(x) if has_samples(x) else x, (call.args, call.kwargs))
    return Call(call.label, args, kwargs)


def capture_for(model: nn.Module, calls: Sequence[Call], dynamic_shapes: Any = None) -> Capture:
    """The model captured so that all these calls fit: sizes that differ between them are dynamic.

    Raises InputError naming the first call that the model or the captured program does not take.
    """
    first, varying = calls[0], _varying(calls)
    _check_devices(model, calls)
    _run(model, first)
    shapes = dynamic_shapes
    if shapes is None and varying:
        shapes = ShapesCollection()
        leaves = pytree.tree_leaves((first.args, first.kwargs))
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.dim():
                shapes[leaf] = {dim: Dim.AUTO for dim in {0, *varying.get(place, ())}}
    captured = _captured(model, first, shapes)
    row = _compared(model, captured, calls)
    if not row.ok and not varying and dynamic_shapes is None:
        # A model that takes sizes for something else than numbers can only be captured with every size fixed.
        captured = _captured(model, first, static=True)
        row = _compared(model, captured, calls)
    if not row.ok:
        raise refuse(
            row,
            "Does it draw random numbers, keep state between calls, or read values off its inputs? Such a model cannot "
            "be calibrated.",
        )
    for call in calls:
        check_call(captured, call)
    return captured


def _captured(model: nn.Module, call: Call, shapes: Any = None, *, static: bool = False) -> Capture:
    with admit.untouched(model):
        return capture(model, call.args, call.kwargs, shapes, static=static)


def _compared(model: nn.Module, captured: Capture, calls: Sequence[Call]) -> CheckRow:
    """The captured program held against the model on the first two calls, on two samples where they can be cut.

    A second call shows what the first one's values were read for.
    """
    row = _compared_on(model, captured, calls[0])
    if not row.ok or len(calls) == 1:
        return row
    check_call(captured, calls[1])
    return _compared_on(model, captured, calls[1])


def _compared_on(model: nn.Module, captured: Capture, call: Call) -> CheckRow:
    size = samples_of(call)
    few = call if size is None else _first(call, size, 2)
    try:
        captured.entry.check(few.args, few.kwargs)
    except InputError:
        few = call
    # Random streams are put back after the model, so that the program draws the numbers that the model drew.
    expected, again = _run(model, few, times=2)
    itself = compare("your model = itself, called twice", few, expected, again)
    return compare("capture = your model", few, expected, outputs(captured.program, few)) if itself.ok else itself


def check_call(captured: Capture, call: Call) -> None:
    """Raises InputError naming the call unless the captured program is right for it."""
    try:
        captured.entry.check(call.args, call.kwargs)
    except InputError as error:
        raise InputError(
            "cannot use this batch",
            where=call.label,
            why=str(error),
            do="Give batches like the first one, or say with dynamic_shapes= which sizes may differ.",
        ) from error


def _run(model: nn.Module, call: Call, times: int = 1) -> list[list[Any]]:
    """The outputs of a call, made so many times, each of which finds what the one before left."""
    with admit.untouched(model):
        try:
            return [outputs(model, call) for _ in range(times)]
        except Exception as error:
            shapes = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors_of(call))
            raise InputError(
                "cannot run the model on a batch",
                where=f"{call.label} ({shapes or 'no tensors'})",
                why=f"{type(model).__name__} raises {words_of(error)}",
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
        for tensor in tensors_of(call):
            if devices and tensor.device not in devices and tensor.dim():
                raise InputError(
                    "cannot use data on another device",
                    where=call.label,
                    why=f"it is on {tensor.device}, and the model on {', '.join(sorted(map(str, devices)))}",
                    do="Move the data or the model, so that model(batch) works.",
                )


def batch_of(captured: Capture, call: Call, labels: tuple[str, ...] = ()) -> Batch:
    """A call as flat inputs of the captured program, with the positions that its attention mask leaves.

    `labels` name the user's batches that its samples come from, where they are several.
    """
    flat = tuple(captured.entry.flatten(call.args, call.kwargs))
    paths, labels = list(captured.entry.paths), labels or (call.label,)
    mask = next((leaf for path, leaf in zip(paths, flat, strict=True) if path == _MASK), None)
    valid = _valid(mask) if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if valid is None:
        return Batch(flat, None, labels)
    like = [n for n, t in enumerate(flat) if isinstance(t, Tensor) and t is not mask and t.shape[:2] == valid.shape]
    named = [n for n in like if paths[n] in _TEXTS]
    return Batch(flat, valid, labels, tuple(named or like[:1]))


def _valid(mask: Tensor) -> Tensor | None:
    """The positions [b, s] that a mask leaves; None where it leaves all."""
    # What is added to attention scores is negative where it hides; what multiplies is zero there, and not everywhere.
    added = mask.is_floating_point() and not bool((mask > 0).any())
    valid = mask == 0 if added else mask != 0
    return None if bool(valid.all()) else valid
