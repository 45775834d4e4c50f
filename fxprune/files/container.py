"""container: one safetensors file with a document, the text of JSON, in its header, and a checksum of every part.

The reference library of the format writes files and reads them: it holds names, types, sizes and places of tensors
against the file's length before any is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fxprune.errors import FileError
from fxprune.graph.compat import read_tensors

from .writing import written

# Of this version of the format are the files that `write` makes; `read` takes no newer ones.
VERSION = 1
# The format's limit for a header is 100 MB; a document that is longer lies among the tensors.
_MOST_IN_HEADER = 50_000_000
_DOCUMENT = "fxprune.document"
_MORE = {"strides", "complex", "device"}


def write(path: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that holds these, or leaves what was there as it was. Raises FileError."""
    stored: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    places: set[int] = set()
    for key, tensor in tensors.items():
        value, about[key] = _storable(key, tensor)
        # The library refuses what shares memory.
        stored[key] = value.clone() if value.data_ptr() in places else value
        places.add(stored[key].data_ptr())
    text = json.dumps({**document, "tensors": about}, allow_nan=False, separators=(",", ":"))
    header = {"format": "pt", "fxprune": str(VERSION), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    if len(text) < _MOST_IN_HEADER:
        header["document"] = text
    else:
        stored[_DOCUMENT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with written(path) as temporary:
        try:
            save_file(stored, temporary, header)
        except safetensors.SafetensorError as error:
            why, do = str(error), "Look whether there is room on the disk."
            raise FileError(f'cannot write to "{path}"', why=why, do=do) from error


def read(
    path: str | os.PathLike[str],
    place: Callable[[torch.device], torch.device] = lambda device: device,
    *,
    progress: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a file that `write` made, in memory of their own, where `place` says.

    Raises FileError where it is no such file, or is not whole.
    """
    if not Path(path).is_file():
        what = "it is a folder" if Path(path).is_dir() else "there is no such file"
        raise FileError(f'cannot load "{path}"', why=what)
    try:
        with read_tensors(path) as (header, keys, tensor_of):
            document = _document(path, header or {}, tensor_of)
            about = document.pop("tensors", None)
            if not isinstance(about, dict) or set(about) != set(keys) - {_DOCUMENT}:
                raise _broken(path, "its tensors are not those that it speaks of")
            bar = tqdm(about.items(), desc="load", disable=None if progress else True, leave=False)
            tensors = {key: _restored(path, key, tensor_of(key), more, place) for key, more in bar}
    except safetensors.SafetensorError as error:
        why = f"it is no safetensors file, or not all of one ({error})"
        raise FileError(f'cannot load "{path}"', why=why, do="Save it again with fxprune.save.") from error
    except OSError as error:
        raise FileError(f'cannot load "{path}"', why=error.strerror or str(error)) from error
    return document, tensors


def _document(path: str | os.PathLike[str], header: Mapping[str, str], tensor_of: Any) -> dict[str, Any]:
    if "fxprune" not in header:
        raise FileError(
            f'cannot load "{path}"',
            why="fxprune did not write it; it holds tensors and no model",
            do="Give a file that fxprune.save wrote. A state_dict goes into a model by its load_state_dict.",
        )
    version = header["fxprune"]
    if not version.isdecimal() or int(version) > VERSION:
        raise FileError(
            f'cannot load "{path}"',
            why=f"it is of version {version[:20]} of the format, and this fxprune knows {VERSION}",
            do="Install a newer fxprune.",
        )
    text = header["document"] if "document" in header else bytes(tensor_of(_DOCUMENT).tolist()).decode()
    if hashlib.sha256(text.encode()).hexdigest() != header.get("sha256"):
        raise _broken(path, "its description is not what was written")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its description is no JSON ({error})") from error
    if not isinstance(document, dict):
        raise _broken(path, "its description is no table")
    return document


def _storable(key: str, tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """A tensor as the format has them, contiguous and in memory of its own, and what else there is to say of it."""
    if tensor.layout is not torch.strided or tensor.is_quantized or type(tensor) not in (Tensor, torch.nn.Parameter):
        kind = type(tensor).__name__ if tensor.layout is torch.strided else tensor.layout
        raise FileError("cannot save a tensor", where=f'"{key}"', why=f"it is a {kind}, not a plain dense one")
    value, about = tensor.detach().resolve_neg().resolve_conj(), {}
    if value.device.type == "meta":
        raise FileError("cannot save a tensor", where=f'"{key}"', why="it has no values (device meta)")
    if value.device.type != "cpu":
        about["device"], value = str(value.device), value.cpu()
    if not value.is_contiguous():
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        turned = value.permute(order)
        # Strides are kept where they are another order of the dimensions; what is expanded is written out.
        if turned.is_contiguous():
            about["strides"], value = list(value.stride()), turned
        else:
            value = value.contiguous()
    if value.is_complex():
        about["complex"], value = True, torch.view_as_real(value)
    if value.untyped_storage().nbytes() != value.nbytes:
        value = value.clone()
    about["sum"] = _sum(value)
    return value, about


def _restored(
    path: str | os.PathLike[str],
    key: str,
    value: Tensor,
    about: Any,
    place: Callable[[torch.device], torch.device],
) -> Tensor:
    if not isinstance(about, dict) or about.keys() - {"sum"} > _MORE:
        raise _broken(path, f'what it says of tensor "{key}" is broken')
    if _sum(value) != about.get("sum"):
        raise _broken(path, f'tensor "{key}" is not what was written')
    try:
        if about.get("complex"):
            value = torch.view_as_complex(value)
        if "strides" in about:
            strides = about["strides"]
            order = sorted(range(len(strides)), key=lambda dim: strides[dim], reverse=True)
            back = [order.index(dim) for dim in range(len(order))]
            value = value.permute(back)
        device = torch.device(about.get("device", "cpu"))
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise _broken(path, f'what it says of tensor "{key}" is broken') from error
    return value.to(place(device))


def _sum(value: Tensor) -> str:
    data = value.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()[:32]


def _broken(path: str | os.PathLike[str], why: str) -> FileError:
    return FileError(
        f'cannot load "{path}"',
        why=f"{why}: the file was changed, or not copied whole",
        do="Copy it again, or save the result again.",
    )
