"""Changes to a saved file: of its bytes, as accidents and carelessness make them, and of what it says, with checksums
made anew, as somebody would who wants harm.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.files.container import read, write

# Values that are at home nowhere, or where they do harm.
_NUMBERS = (-1, 0, 1, 2, 7, 255, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 10**25, -(2**63), 0.5)
_WORDS = (
    "", "x", "__class__", "self", "aten.from_file.default", "aten.save.default", "aten.as_strided.default", "os.system",
    "prims.copy_to.default", "fxprune.net.default", "a[0].__class__", "__import__('os')", "2**10**10", '"', "\n",
    "é" * 40, "nonzeros", "blocks", "semi24", "cuda:7", "meta", "import", "0.weight.columns",
)  # fmt: skip
_FORMS: tuple[Any, ...] = (
    None, True, [], {}, [[]], {"node": 10**9}, {"node": -1}, {"tensor": "nothing"}, {"tuple": []}, {"dtype": "float99"},
    {"Selection": {}}, {"Report": {"model": 3}}, {"float": "x"}, {"type": "eval"}, {"slice": [1]}, {"of": "os.system"},
    {"dict": [[{"dict": []}, 1]]}, {"node": 0}, {"device": "cuda:9"}, {"Size": [-5]}, {"note": ["a", "loud"]},
)  # fmt: skip


def changed(original: Path, target: Path, seed: int) -> tuple[str, bool]:
    """Writes a changed copy of `original`; returns the kind of change, and whether a checksum must tell of it."""
    dice = random.Random(seed)
    if dice.random() < 0.4:
        kind = dice.choice(sorted(_BYTES))
        before = original.read_bytes()
        target.write_bytes(_BYTES[kind](bytearray(before), dice))
        return f"bytes: {kind}", target.read_bytes() != before
    document, tensors = read(original)
    if dice.random() < 0.5:
        kind = _change_text(document, dice)
    else:
        kind = _change_tensor(tensors, dice)
    write(target, document, tensors)
    return kind, False


def _flip(data: bytearray, dice: random.Random) -> bytes:
    for _ in range(dice.choice((1, 1, 2, 8))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def _flip_header(data: bytearray, dice: random.Random) -> bytes:
    end = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    data[dice.randrange(end)] = dice.randrange(256)
    return bytes(data)


def _truncate(data: bytearray, dice: random.Random) -> bytes:
    return bytes(data[: dice.randrange(len(data))])


def _lengthen(data: bytearray, dice: random.Random) -> bytes:
    at = dice.choice((len(data), dice.randrange(len(data))))
    return bytes(data[:at]) + dice.randbytes(dice.choice((1, 8, 4096))) + bytes(data[at:])


def _blank(data: bytearray, dice: random.Random) -> bytes:
    at, size = dice.randrange(len(data)), dice.choice((4, 64, 4096))
    data[at : at + size] = bytes(len(data[at : at + size]))
    return bytes(data)


def _move(data: bytearray, dice: random.Random) -> bytes:
    size = dice.choice((8, 64, 512))
    a, b = dice.randrange(len(data)), dice.randrange(len(data))
    data[a : a + size] = data[b : b + size].ljust(len(data[a : a + size]), b"\0")[: len(data[a : a + size])]
    return bytes(data)


def _say_length(data: bytearray, dice: random.Random) -> bytes:
    data[:8] = dice.choice((0, 1, 8, 10**8, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)


_BYTES: dict[str, Callable[[bytearray, random.Random], bytes]] = {
    "bits flipped": _flip, "a byte of the header": _flip_header, "cut off": _truncate, "longer": _lengthen,
    "blank": _blank, "moved": _move, "another length": _say_length,
}  # fmt: skip


def _change_text(document: dict[str, Any], dice: random.Random) -> str:
    """One to three places of the document hold something else, are gone or stand twice."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        holder, key = dice.choice(places)
        match dice.choice(("value", "value", "form", "other", "near", "gone", "twice")):
            case "value":
                holder[key] = dice.choice((*_NUMBERS, *_WORDS))
            case "form":
                holder[key] = copy.deepcopy(dice.choice(_FORMS))
            case "other":
                elsewhere, place = dice.choice(places)
                holder[key] = copy.deepcopy(elsewhere[place])
            case "near" if isinstance(holder[key], int):
                holder[key] += dice.choice((-1, 1, 16, -(2**16)))
            case "near" if isinstance(holder[key], str):
                holder[key] += dice.choice(_WORDS)
            case "gone":
                del holder[key]
            case "twice" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
    json.dumps(document)
    return "what it says"


def _places(value: Any) -> Any:
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


def _change_tensor(tensors: dict[str, Tensor], dice: random.Random) -> str:
    """Elements, the length, the dtype or the place of one tensor are others."""
    name = dice.choice([name for name, tensor in tensors.items() if tensor.numel()] or list(tensors))
    tensor = tensors[name].clone()
    match dice.choice(("elements", "elements", "elements", "length", "dtype", "another", "order")):
        case "elements":
            flat = tensor.reshape(-1)
            for _ in range(dice.choice((1, 1, 2, 5))):
                at = dice.randrange(max(1, flat.numel()))
                flat[at] = _drawn(flat, dice)
            tensors[name] = flat.view(tensor.shape)
        case "length":
            size = dice.choice((0, 1, tensor.numel() // 2, tensor.numel() + 1, 3 * tensor.numel()))
            tensors[name] = tensor.reshape(-1).repeat(3)[:size] if tensor.numel() else torch.zeros(size)
        case "dtype":
            tensors[name] = tensor.to(
                dice.choice((torch.int64, torch.int16, torch.float32, torch.uint8, torch.bfloat16))
            )
        case "another":
            tensors[name] = tensors[dice.choice(list(tensors))].clone()
        case "order":
            tensors[name] = tensor.reshape(-1)[torch.randperm(tensor.numel())].view(tensor.shape)
    return "what its tensors hold"


def _drawn(flat: Tensor, dice: random.Random) -> Any:
    if flat.dtype == torch.bool or flat.is_complex():
        return bool(dice.randrange(2))
    if flat.is_floating_point():
        return dice.choice((float("nan"), float("inf"), 0.0, -1e30, 3.5))
    limits = torch.iinfo(flat.dtype)
    near = int(flat[dice.randrange(flat.numel())]) + dice.choice((-1, 1))
    drawn = dice.choice((limits.min, limits.max, 0, -1, 1, near, dice.randrange(limits.min, limits.max)))
    return max(limits.min, min(limits.max, drawn))
