"""One method after others: what is left of a weight for the newest, and the mask of all together."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.utils import prune as torch_prune

from .errors import InputError, MissingError, WrongIndexError, WrongMaskError, WrongShapeError, WrongTypeError
from .masked import as_bytes, is_byte_float


def combined(method: torch_prune.BasePruningMethod, t: Tensor, mask: Tensor) -> Tensor:
    """The mask (shape and dtype of t) after `method` has pruned what `mask` leaves of t."""
    new = mask.to(t.dtype, copy=True)
    where = _remaining(method, t, mask)
    part = method.compute_mask(_pick(t, where), default_mask=_pick(mask, where))
    if not isinstance(part, Tensor):
        why = f"compute_mask of {type(method).__name__} returned a {type(part).__name__}"
        raise MissingError("cannot use a mask", why=why, do="Return a tensor of the shape of default_mask.")
    picked = _pick(new, where)
    try:
        part = part.to(new.device, new.dtype).expand(picked.shape)
    except RuntimeError as error:
        why = f"compute_mask of {type(method).__name__} returned shape {list(part.shape)} for {list(picked.shape)}"
        raise WrongMaskError(
            "cannot use a mask", why=why, do="Return a tensor of the shape of default_mask."
        ) from error
    if is_byte_float(new):
        as_bytes(new)[where] = as_bytes(part.contiguous())
    else:
        new[where] = part
    return new


def check_scores(scores: Tensor, t: Tensor, what: object) -> None:
    """Raise an AssertionError where importance scores have another shape than `what`, t."""
    if not isinstance(scores, Tensor):
        why = f"they are a {type(scores).__name__}, not a tensor"
        raise MissingError("cannot use importance scores", why=why, do=f"Give a tensor of shape {list(t.shape)}.")
    if scores.shape != t.shape:
        why = f"they have shape {list(scores.shape)}, {what} {list(t.shape)}"
        raise WrongShapeError("cannot use importance scores", why=why, do="Give one score for each element.")


def _remaining(method: torch_prune.BasePruningMethod, t: Tensor, mask: Tensor) -> Any:
    """The index of what `method` may still prune of t."""
    kind = getattr(method, "PRUNING_TYPE", None)
    if kind == "unstructured":
        return mask == 1
    if kind == "global":
        return (slice(None),) * t.dim()
    if kind == "structured":
        return _channels(method, t, mask)
    what, do = f"cannot apply {type(method).__name__}", 'Set it to "unstructured", "structured" or "global".'
    if kind is None:
        raise MissingError(what, why="it has no PRUNING_TYPE", do=do)
    raise InputError(what, why=f"its PRUNING_TYPE is {kind!r}", do=do)


def _channels(method: torch_prune.BasePruningMethod, t: Tensor, mask: Tensor) -> Any:
    what = f"cannot apply {type(method).__name__}"
    if not hasattr(method, "dim"):
        why = "it is structured and has no attribute dim"
        raise MissingError(what, why=why, do="Set self.dim to the dim of the channels.")
    dim: Any = method.dim  # pyright: ignore[reportAttributeAccessIssue]
    try:
        axis = range(t.dim())[dim]
    except IndexError:
        why = f"dim={dim} is not a dimension of a tensor of shape {list(t.shape)}"
        raise WrongIndexError(what, why=why, do=f"Give a dim from {-t.dim()} to {t.dim() - 1}.") from None
    except TypeError:
        why = f"dim={dim!r} is a {type(dim).__name__}, not an int"
        raise WrongTypeError(what, why=why, do=f"Give a dim from {-t.dim()} to {t.dim() - 1}.") from None
    index: list[Any] = [slice(None)] * t.dim()
    index[axis] = alive(mask, axis)
    return tuple(index)


def alive(mask: Tensor, axis: int) -> Tensor:
    """mask -> bool [mask.shape[axis]]: which slices along `axis` hold anything that is not masked."""
    rows = (mask != 0).movedim(axis, 0)
    return rows.flatten(1).any(1) if rows.dim() > 1 else rows


def _pick(t: Tensor, where: Any) -> Tensor:
    return as_bytes(t)[where].view(t.dtype) if is_byte_float(t) else t[where]
