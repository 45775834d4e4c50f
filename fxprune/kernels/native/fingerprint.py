"""fingerprint: a number that tells whether a tensor holds what it held, whoever may have written to it.

Versions count what torch's own ops write, and miss what is written through `.data`, to shared memory or by others.
The number is the sum, modulo 2^64, of splitmix64's finalizer (Steele et al., 2014) of each 64-bit word and its place.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import function_of_object

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def fingerprint(tensor: Tensor) -> int:
    """A number for the values of a tensor of any kind and strides. Where one word changes the number does, always.

    On the CPU it reads the tensor once, about as fast as memory gives it; elsewhere it waits for the device.
    """
    tensor = tensor.detach().contiguous()
    # A subclass may have its data elsewhere.
    is_plain = type(tensor) is Tensor and tensor.device.type == "cpu"
    compiled = function_of_object("fxprune_fingerprint") if is_plain else None
    if compiled is None:
        return fingerprint_reference(tensor)
    compiled.restype, compiled.argtypes = ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_int64)
    return compiled(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def fingerprint_reference(tensor: Tensor) -> int:
    """The same in plain torch: the definition, and the fallback."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -len(data) % 8)).clone().view(torch.int64)
    words = words + torch.arange(1, len(words) + 1, device=words.device) * _signed(_STEP)
    words = (words ^ _shifted(words, 30)) * _signed(_FIRST)
    words = (words ^ _shifted(words, 27)) * _signed(_SECOND)
    return int((words ^ _shifted(words, 31)).sum()) % 2**64


def _signed(number: int) -> int:
    """An unsigned 64-bit number as the signed one of the same bits."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shifts right, and zeros come in: torch's own shift copies the sign."""
    return (words >> bits) & (2 ** (64 - bits) - 1)
