"""Every Triton kernel compiled ahead of time, without a GPU: its registers, spills and shared memory.

    python -m benchmarks.aot [--quick] [--targets 80 90]

The table goes to results/aot.json with a digest of each kernel's source, so that a test can tell when it is stale.
`--quick` compiles one configuration of each kernel and writes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"
KERNELS = RESULTS.parent.parent / "triton_kernels"
TARGETS = (80, 90)
Row = dict[str, Any]


@dataclass(frozen=True)
class Build:
    """One configuration of one kernel: its arguments' types, its constants (a type by its name), and options."""

    module: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3

    @property
    def label(self) -> str:
        """What tells the configurations of one kernel apart."""
        kinds = sorted({t[1:] for t in self.types.values() if t[:1] == "*"} & {"fp32", "fp16", "bf16", "i16"})
        constants = [f"{name}={value}" for name, value in self.constants.items()]
        return " ".join([*kinds, *constants, f"warps={self.warps}", f"stages={self.stages}"])


def builds() -> Iterator[Build]:
    """Every kernel, its most telling configuration first."""
    table = {"addresses": "*i64", "alive": "*i64", "lengths": "*i32", "chunks": "i32"}
    for integer in ("int16", "int32"):
        sizes = {"INTEGER": integer, "SIZE": 65536, "BLOCK": 2048}
        yield Build("select", "_sample", {**table, "found": "*i32"}, {"EACH": 16, "SPACING": 4096, **sizes})
        counted = {"low": "i32", "shift": "i32"}
        yield Build("select", "_count_few", {**table, "found": "*i32", **counted}, {"BUCKETS": 8, **sizes})
        yield Build("select", "_count_many", {**table, "found": "*i64", **counted}, {"BUCKETS": 65536, **sizes})
        yield Build(
            "select",
            "_mask",
            {**table, "outs": "*i64", "threshold": "i32", "takes": "*i32", "equals": "*i32"},
            sizes,
        )
    for kind in ("bf16", "fp16", "fp32"):
        each, precision = f"*{kind}", "ieee"
        dims = {"m": "i32", "n": "i32", "k": "i32", "stride": "i32", "i": "i32"}
        for turned in (True, False):
            half = ((128, 128, 64, 8), (64, 128, 64, 4), (16, 64, 64, 4))
            for rows, columns, depth, warps in ((64, 64, 32, 8), (16, 64, 32, 4)) if kind == "fp32" else half:
                constants = {"BIAS": turned, "TURNED": turned, "WHOLE_BYTES": True, "PRECISION": precision}
                constants |= {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}
                types = {"a": each, "weight": each, "bits": "*u8", "bias": each, "found": each, **dims}
                yield Build("masked", "_masked", types, constants, warps)
        types = {"dy": each, "x": each, "bits": "*u8", "found": each, "o": "i32", "i": "i32", "m": "i32"}
        types |= {"dy_stride": "i32", "x_stride": "i32"}
        side, warps = (64, 4) if kind == "fp32" else (128, 8)
        yield Build("masked", "_gradient_weight", types, {"PRECISION": precision, "SIDE": side, "DEPTH": 32}, warps)
    for kind in ("i16", "i32"):
        each = f"*{kind}"
        types = {"weight": each, "keep": "*u8", "groups": "i32", "n": "i32", "m": "i32"}
        for lanes in (4, 8, 16):
            yield Build("prune24", "_select", types, {"LANES": lanes, "BLOCK": 1024 // lanes, "WHOLE": True})
        types = {"weight": each, "values": each, "meta": "*i32", "fours": "i32", "words": "i32"}
        yield Build("prune24", "_pack", types, {"BLOCK": 256})
        yield Build("prune24", "_unpack", types, {"BLOCK": 256})
        types = {"values": each, "columns": "*u8", "chunks": "*u8", "order": "*i32", "starts": "*i64", "weight": each}
        places = {"PLACES": 16, "GROUPS": 8, "GROUP": 8, "CHUNK": 256}
        yield Build("nonzeros", "_unpack", {**types, "o": "i32", "i": "i32"}, places)
        types = {"bits": "*i32", "values": each, "starts": "*i64", "ranks": "*u16", "weight": each}
        types |= {"o": "i32", "i": "i32", "words": "i32"}
        yield Build("bitmap", "_unpack", types, {"ROWS": 8, "WORDS": 16})
    for kind in ("bf16", "fp16", "fp32"):
        each = f"*{kind}"
        shared = {"BIAS": True, "KIND": 2}
        types = {"x": each, "values": each, "columns": "*i32", "starts": "*i32", "order": "*i32", "bias": each}
        types |= {"found": each, "m": "i32", "o": "i32", "stride": "i32"}
        for rows, side, warps in ((128, 64, 8), (16, 64, 4), (128, 32, 4), (16, 32, 4)):
            constants = {**shared, "PRECISION": "ieee", "SHARES": 1, "ROWS": rows, "H": side, "W": side}
            yield Build("blocks", "_blocks", types, constants, warps, 2 if kind == "fp32" else 7)
        types = {"sums": "*fp32", "bias": each, "y": each, "size": "i32", "o": "i32"}
        yield Build("blocks", "_add", types, {**shared, "SHARES": 8, "BLOCK": 1024})
        for tokens in (1, 4):
            few = {**shared, "TOKENS": tokens}
            types = {"x": each, "values": each, "columns": "*u8", "chunks": "*u8", "order": "*i32", "starts": "*i64"}
            types |= {"bias": each, "y": each, "m": "i32", "o": "i32", "stride": "i32"}
            yield Build("nonzeros", "_nonzeros", types, {**few, "PLACES": 16, "GROUPS": 8, "GROUP": 8, "CHUNK": 256})
            types = {"x": "*i64", "values": each, "meta": "*i32", "bias": each, "y": each}
            types |= {"m": "i32", "o": "i32", "fours": "i32", "stride": "i32"}
            if kind != "fp32":
                yield Build("gemv24", "_gemv24", types, {**few, "ROWS": 8, "WORDS": 16})
            types = {"x": each, "bits": "*i32", "values": each, "starts": "*i64", "ranks": "*u16", "bias": each}
            types |= {"y": each, "m": "i32", "o": "i32", "i": "i32", "words": "i32", "stride": "i32"}
            yield Build("bitmap", "_bitmap", types, {**few, "ROWS": 8, "WORDS": 16})


def compiled(build: Build, target: int) -> Row:
    """Compile one configuration for sm_`target`; registers a thread, bytes spilled and bytes of shared memory."""
    triton = importlib.import_module("triton")
    compiler, base = (importlib.import_module(f"triton.{name}") for name in ("compiler", "backends.compiler"))
    language = importlib.import_module("triton.language")
    kernel = getattr(importlib.import_module(f"triton_kernels.{build.module}"), build.kernel)
    constants = {name: getattr(language, str(value), value) for name, value in build.constants.items()}
    given = {**build.types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: given[name] for name in kernel.arg_names}
    # What torch allocates, and the sizes that matter, are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind != "constexpr"
    }
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": build.warps, "num_stages": build.stages}
    made = triton.compile(source, target=base.GPUTarget("cuda", target, 32), options=options)
    row: Row = {"kernel": f"{build.module}.{build.kernel}", "build": build.label, "target": f"sm_{target}"}
    return row | usage(made.asm["cubin"], triton) | {"shared": made.metadata.shared}


def usage(cubin: bytes, triton: Any) -> Row:
    """What the assembler says that a kernel takes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said.stdout + said.stderr))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def digest(module: str) -> str:
    """A digest of a kernel file and of what kernels share."""
    files = [KERNELS / f"{name}.py" for name in (module, "activation", "language")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def table(rows: Sequence[Row]) -> str:
    """One line for each configuration and target."""
    names = ("kernel", "target", "registers", "spilled", "shared", "build")
    return tabulate([[row[name] for name in names] for row in rows], headers=names, disable_numparse=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel; writes nothing")
    parser.add_argument("--targets", nargs="+", type=int, default=TARGETS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print and save."""
    if os.environ.pop("TRITON_INTERPRET", None):
        return subprocess.run([sys.executable, "-m", "benchmarks.aot", *(argv or sys.argv[1:])], check=False).returncode
    given = parse(argv)
    chosen = list(builds())
    if given.quick:
        chosen = list({(build.module, build.kernel): build for build in reversed(chosen)}.values())
    work = [(build, target) for build in chosen for target in given.targets]
    rows = [compiled(build, target) for build, target in tqdm(work, desc="aot", disable=None, leave=False)]
    print(table(rows))
    if not given.quick:
        digests = {module: digest(module) for module in sorted({build.module for build in chosen})}
        found = {"benchmark": "aot", "triton": importlib.import_module("triton").__version__, "sources": digests}
        (given.results / "aot.json").write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")
        print("written: aot.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
