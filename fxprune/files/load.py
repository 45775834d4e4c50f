"""load: a result, or a selection, from a file that `save` wrote."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch

from fxprune.capture.entry import EntryCheck
from fxprune.emit.pruned import PrunedModule, pruned_over
from fxprune.emit.report import Report
from fxprune.emit.settings import Settings
from fxprune.emit.trainable.module import TrainableModule, trainable_over
from fxprune.errors import FileError
from fxprune.select.selection import Selection

from .adapt import adapted
from .conditions import check_conditions
from .container import read
from .graphs import graph_from
from .kinds import conforms
from .modules import modules_from
from .packaged import run_package
from .plain import Reader
from .portable import restore
from .trees import tree_from
from .trust import validate


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    outputs: Literal["own", "plain"] = "own",
    operators: Collection[str] = (),
    retune: bool = False,
    compiled: bool = False,
    progress: bool = True,
) -> Any:
    """What `save` wrote to `path`: a selection, or a result with the same weights, bit for bit, report and selection.

    It compiles at its first call, as any result does; with `compiled` it runs the package that `save(compiled=True)`
    wrote beside it, if it was made for such a processor and torch. That is code: say so for files that you trust alone.
    Otherwise nothing in the file is run, nor looked up by name outside of tables: operators are ATen's, fxprune's and
    those of the namespaces in `operators`; every tensor is held against its checksum and packed weights against their
    format, so that no kernel leaves their memory.

    It is on the devices where it was, or all of it on `device`. Weights in a layout that has no kernel here are packed
    anew into one that has, and the report says so; with `retune` layouts are chosen, and timed, anew for all weights.

    A model's own classes of outputs are used where this process knows them, or transformers has them. With
    outputs="plain" the result returns dicts and tuples in their place.

    Raises FileError with what is wrong for a file that is not whole, of another kind or of a newer version, or that
    needs what is not here.
    """
    if outputs not in ("own", "plain"):
        raise FileError(f"cannot load with outputs={outputs!r}", do='Say "own" or "plain".')
    place = _placed(device)
    document, tensors = read(path, place, progress=progress)
    reader = Reader(tensors, lambda data, reader: tree_from(data, reader), place)
    with _about(path):
        kind = document["kind"]
        if kind == "selection":
            return _record(reader, document["selection"], Selection)
        if kind not in ("pruned", "trainable"):
            raise FileError("cannot read the file", why=f"it holds a {str(kind)[:40]!r}, and no result or selection")
        made = document.get("package")
        if not conforms(made, dict[str, str] | None):
            raise FileError("cannot read the file", why="what it says of a package is broken")
        result = _result(document, reader, kind, operators, plain=outputs == "plain")
    if isinstance(result, TrainableModule):
        return result
    restore(result)
    result = adapted(result, retune=retune, progress=progress)
    if compiled:
        run_package(result, path, None if retune else made)
    return result


def _placed(device: str | torch.device | None) -> Callable[[torch.device], torch.device]:
    """Where to put what was on a device. Raises FileError for one that is not here."""
    wanted = None if device is None else torch.device(device)

    def place(saved: torch.device) -> torch.device:
        found = wanted or saved
        if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
            raise FileError(
                "cannot load the saved model here",
                why=f"it is for {found}, which this machine has not",
                do='Say load(path, device="cpu"), or which device it is to be on.',
            )
        return found

    return place


def _result(
    document: Mapping[str, Any], reader: Reader, kind: str, operators: Collection[str], *, plain: bool
) -> PrunedModule | TrainableModule:
    root = modules_from(document["modules"], reader, operators)
    graph = graph_from(document["graph"], reader, trusted=operators, plain=plain)
    entry = _record(reader, document["entry"], EntryCheck)
    check_conditions(entry, graph)
    settings = _record(reader, document["settings"], Settings)
    plan = document["plan"]
    sizes = document["sizes"]
    if not conforms(plan, str | None) or not conforms(sizes, dict[str, int]):
        raise FileError("cannot read the file", why="its plan is no text, or its sizes are no numbers")
    validate(root, graph)
    meta: dict[str, Any] = {
        "entry": entry,
        "report": _record(reader, document["report"], Report),
        "selection": _record(reader, document["selection"], Selection),
        "settings": settings,
        "plan": plan,
        "sizes": sizes,
    }
    if kind == "pruned":
        meta["compile"] = _options(document["compile"], settings)
    root.__dict__["meta"] = meta
    return (pruned_over if kind == "pruned" else trainable_over)(root, graph)


def _options(data: Any, settings: Settings) -> dict[str, Any] | None:
    if data is None:
        return None
    options = settings.inductor_options() or {}
    if not data["freezing"]:
        options.pop("freezing", None)
    return options


def _record(reader: Reader, data: Any, kind: type) -> Any:
    found = reader.decode(data)
    if type(found) is not kind:
        raise FileError(
            "cannot read the file", why=f"where a {kind.__name__} should be there is a {type(found).__name__}"
        )
    return found


@contextlib.contextmanager
def _about(path: str | os.PathLike[str]) -> Any:
    """Errors on the way are told as errors of this file."""
    try:
        yield
    except FileError as error:
        do = error.do or "Save the result again with this version of fxprune."
        where = f"{error.what}" + (f" at {error.where}" if error.where else "")
        raise FileError(f'cannot load "{path}"', where="", why=f"{where}: {error.why}", do=do) from error
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        SyntaxError,
        MemoryError,
        ArithmeticError,
    ) as error:
        why = f"its description is broken ({type(error).__name__}: {str(error)[:100]})"
        raise FileError(f'cannot load "{path}"', why=why, do="Save the result again.") from error
