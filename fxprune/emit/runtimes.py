"""runtimes: which runtimes load a result, and whether what was pruned makes it faster there."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from tabulate import tabulate

_GPU = {"semi24", "cusparselt", "blocks", "nonzeros8"}
_TWO_OF_FOUR = {"semi24", "cusparselt"}
_MULTIPLIED = "zeros are stored and multiplied as other numbers"


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One runtime: how a result gets there, whether it is faster there than the model was, and why, or why not.

    tested  whether this repository runs it so (tests, benchmarks.runtimes); else it is what the runtime's manual says
    """

    name: str
    by: str
    faster: bool | None
    why: str
    tested: bool


@dataclasses.dataclass(frozen=True)
class Runtimes:
    """The runtimes for one result; prints as a table."""

    rows: tuple[Runtime, ...]

    def __iter__(self) -> Iterator[Runtime]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Runtime:
        """The row of one runtime. Raises KeyError."""
        return {row.name: row for row in self.rows}[name]

    def __str__(self) -> str:
        said = {True: "yes", False: "no", None: "-"}
        body = [(r.name, r.by, said[r.faster], r.why, "tested" if r.tested else "documented") for r in self.rows]
        return tabulate(
            body, headers=("runtime", "by", "faster there", "why", "known by"), maxcolwidths=[22, 30, 12, 60, 10]
        )


def runtimes_of(*, shrunk: bool, layouts: Collection[str]) -> Runtimes:
    """The runtimes for a result that has lost channels, heads or blocks (`shrunk`), with weights in these layouts."""
    packed = {layout for layout in layouts if layout != "dense"}
    smaller = "its layers are smaller" if shrunk else ""
    on_gpu, pairs = packed & _GPU, packed & _TWO_OF_FOUR

    def dense(*, tested: bool, name: str, by: str) -> Runtime:
        """A runtime that has no kernel for zeros."""
        why = "; ".join(filter(None, (smaller, _MULTIPLIED if packed else "")))
        return Runtime(
            name, by, True if shrunk else False if packed else None, why or "nothing of it is smaller", tested
        )

    own = "; ".join(
        filter(None, (smaller, f"packed weights have kernels ({', '.join(sorted(packed))})" if packed else ""))
    )
    gain = True if shrunk or packed else None
    rows = [
        Runtime("fxprune", "fxprune.save, fxprune.load", gain, own or "nothing of it is smaller", True),
        Runtime(
            "torch.export", 'export(..., "x.pt2"), import fxprune', gain, own or "nothing of it is smaller", not on_gpu
        ),
    ]
    if on_gpu:
        why = "its Triton kernels are launched from Python, which a package does without"
        rows.append(Runtime("AOTInductor", 'export(..., format="aoti")', False, why, False))
    else:
        rows.append(Runtime("AOTInductor", 'export(..., format="aoti")', gain, own or "nothing of it is smaller", True))
    rows.append(dense(name="onnxruntime", by='export(..., "x.onnx")', tested=True))
    openvino = dense(name="OpenVINO", by='export(..., "x.onnx")', tested=True)
    if packed:
        why = f"{openvino.why}; its decompression of sparse weights is for int8 weights on CPUs with AMX"
        openvino = dataclasses.replace(openvino, why=why)
    rows.append(openvino)
    tensorrt = dense(name="TensorRT", by='export(..., "x.onnx")', tested=False)
    if pairs:
        why = "two zeros of each four are used where BuilderFlag.SPARSE_WEIGHTS is set and a layer is faster so"
        tensorrt = dataclasses.replace(tensorrt, faster=True, why="; ".join(filter(None, (smaller, why))))
    rows.append(tensorrt)
    if shrunk:
        why = f"{smaller}; {_MULTIPLIED}" if packed else smaller
        rows.append(Runtime("your own class", "fxprune.write_back", True, why, True))
    return Runtimes(tuple(rows))
