"""Errors in four parts: what failed, where, why, and what to do about it; and warnings, each given once."""

from __future__ import annotations

import warnings


class FxPruneError(Exception):
    """Base of every error fxprune raises on purpose.

    `what` is one clause ("cannot bind rule 2"), `where` names the parameter, node or call, `why` gives the cause,
    `do` tells the reader how to go on. Only `what` is required; all four stay readable as attributes.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = what, where, why, do
        text = what
        if where:
            text += f" at {where}"
        if why:
            text += f": {why}"
        text = text.rstrip(".") + "."
        if do:
            text += f" {do}"
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.why, self.do))


def _rebuild(kind: type[FxPruneError], what: str, where: str, why: str, do: str) -> FxPruneError:
    return kind(what, where=where, why=why, do=do)


class PlanError(FxPruneError, ValueError):
    """The plan asks for something that does not exist or cannot be done."""


class InputError(FxPruneError, ValueError):
    """A model, example input or call that cannot be accepted."""


class CaptureError(FxPruneError, RuntimeError):
    """torch.export could not turn the model into a graph."""


class CheckError(FxPruneError, RuntimeError):
    """A result differs from the oracle by more than the tolerance of its dtype."""


class BuildError(FxPruneError, RuntimeError):
    """The native kernels could not be compiled or loaded on this machine."""


class FileError(FxPruneError, ValueError):
    """A file that cannot be written, read or trusted."""


class FxPruneWarning(UserWarning):
    """Something is slower than it need be, or not as it looks, on this machine or in this process."""


_warned: set[str] = set()


def warn_once(text: str) -> None:
    """Warns with an FxPruneWarning, the first time that a process says this text."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, FxPruneWarning, stacklevel=2)
