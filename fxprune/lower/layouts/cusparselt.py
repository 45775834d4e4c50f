"""The cusparselt layout: two values of each four in NVIDIA's format, for many tokens on CUDA.

torch's own operators compress and multiply. Which of the library's algorithms is fastest depends on the sizes, and the
default one can be slower than dense, so it is searched for each shape and power of two of tokens, at the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import InputError
from fxprune.kernels.triton import activation as activations
from fxprune.measure.timing import interleave

from .gpu import GpuLayout
from .semi24 import refuse_24
from .site import Site

# Both sizes of a weight of 16-bit floats are multiples of this, and the rows of x of that.
_SIDE, _ROWS = 16, 8
_compress = torch.ops.aten._cslt_compress.default
_multiply = torch.ops.aten._cslt_sparse_mm.default
_algorithms: dict[tuple[object, ...], int] = {}


class CuSparseLt(GpuLayout):
    """Half the values and two bits for each, in one tensor that only the library reads."""

    name = "cusparselt"
    tensors = ("compressed",)

    def refuses(self, site: Site) -> str:
        """What `semi24` refuses, sizes that the library does not take, and a torch without it."""
        if not torch.backends.cusparselt.is_available():
            return "this torch comes without cuSPARSELt"
        o, i = site.weight.shape
        if o % _SIDE or i % _SIDE:
            return f"[{o}, {i}] are not both multiples of {_SIDE}"
        # It is unpacked by a product with the identity.
        if not bool(site.weight.isfinite().all()):
            return "it holds values that are not finite"
        return refuse_24(site.weight)

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """It, compressed."""
        return (_compress(weight),)

    def join(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight: 1 times each value, plus zeros."""
        (compressed,) = tensors
        if compressed.device.type != "cuda":
            raise InputError(
                "cannot read a weight in the layout cusparselt",
                why=f"only the library on a GPU knows its format, and the weight is on {compressed.device}",
                do="Move the result back to CUDA, or transform the model where it is to run.",
            )
        eye = torch.eye(shape[1], dtype=compressed.dtype, device=compressed.device)
        return _multiply(compressed, eye)

    def launch(
        self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, shape: tuple[int, int], activation: str
    ) -> Tensor:
        """By the library's product with x^T, whose transpose it stores."""
        (compressed,), m = tensors, len(x)
        if not m:
            return x.new_empty(0, shape[0])
        # The library takes for contiguous what is not, so rows that lie apart are moved.
        given = (x if m % _ROWS == 0 and x.is_contiguous() else F.pad(x, (0, 0, 0, -m % _ROWS)).contiguous()).t()
        algorithm = _algorithm(compressed, given, bias, shape)
        y = _multiply(compressed, given, bias=bias, transpose_result=True, alg_id=algorithm)
        return activations.reference(y[:m].contiguous(), activation)

    def bytes_of(self, weight: Tensor) -> float:
        """Half the values and two bits for each of them."""
        return weight.numel() * (weight.element_size() / 2 + 1 / 8)


def _algorithm(compressed: Tensor, given: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> int:
    """The library's fastest algorithm for so many tokens; its default while a CUDA graph is recorded."""
    tokens = given.shape[1]
    key = (*shape, (tokens - 1).bit_length(), given.dtype, bias is not None, given.device)
    if key not in _algorithms:
        if torch.cuda.is_current_stream_capturing():
            return 0
        _algorithms[key] = _search(compressed, given, bias)
    return _algorithms[key]


def _search(compressed: Tensor, given: Tensor, bias: Tensor | None) -> int:
    """The fastest of all algorithms that take these operands, timed in turns.

    torch's own search may answer with one that is only fast when the work is split in a way that it does not tell.
    """
    most = torch.backends.cusparselt.get_max_alg_id()
    calls: dict[int, Callable[[], Tensor]] = {}
    for number in range(1 if most is None else most + 1):
        calls[number] = lambda n=number: _multiply(compressed, given, bias=bias, transpose_result=True, alg_id=n)
        try:
            calls[number]()
        except RuntimeError:  # The library has no such algorithm for these sizes.
            del calls[number]
    samples = interleave(list(calls.values()), given.device, seconds=0.02)
    return min(zip(calls, samples, strict=True), key=lambda pair: pair[1].typical)[0] if calls else 0
