"""Compile the C++ kernels once per machine and torch version, and keep the object in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from fxprune.errors import BuildError
from fxprune.graph.environment import variable

from .cache import cached

HERE = Path(__file__).parent
SOURCES = tuple(sorted(HERE.glob("*.cpp")))
# torch 2.11's stable ABI: the object does not depend on the C++ ABI of the torch it was built with.
FLAGS = (
    "-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-fno-math-errno",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)  # fmt: skip
TIMEOUT = 300


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX (which may carry arguments) or the first of g++, c++, clang++."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    what = f"$CXX ({chosen[0]})" if chosen else "g++, c++ or clang++"
    raise BuildError("no C++ compiler", why=f"{what} is not on the PATH")


def flags() -> list[str]:
    """The compiler's flags; FXPRUNE_NATIVE_FLAGS adds to them (e.g. -mno-avx512f)."""
    return [*FLAGS, *shlex.split(variable("FXPRUNE_NATIVE_FLAGS"))]


@cache
def cpu() -> str:
    """What -march=native depends on: the machine's kind and the features its processor reports."""
    lines: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.split(":")[0].strip() in ("flags", "Features", "model name", "model", "CPU part"):
                lines.add(line)
    except OSError:
        lines.add(platform.processor())
    return "\n".join([platform.system(), platform.machine(), *sorted(lines)])


def key(command: list[str]) -> str:
    """A hash of everything that the object depends on."""
    ask = [*command, "--version"]
    version = run(ask)
    digest = hashlib.sha256()
    for source in sorted([*SOURCES, *HERE.glob("*.h")]):
        digest.update(source.read_bytes())
    commands = [part for source in SOURCES for part in compiling(command, source, "")] + linking(command, [], "", "")
    for part in (*commands, version.stdout, torch.__version__, cpu()):
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:24]


def build() -> Path:
    """Path of the compiled object, compiled now unless the cache has it. Raises BuildError."""
    command = compiler()
    name = f"nonzeros-{key(command)}.so"
    try:
        target = cached(name)
        if target.exists():
            return target
        # Written beside its final name and moved there in one step: others see all of it or nothing.
        handle, temporary = tempfile.mkstemp(suffix=".so", prefix="building-", dir=target.parent)
        os.close(handle)
    except OSError as error:
        why, do = str(error), "Set FXPRUNE_CACHE_DIR to a writable directory."
        raise BuildError("cannot write the compiled kernels", where=name, why=why, do=do) from error
    try:
        compile_to(command, temporary, soname(target))
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def compiling(command: list[str], source: Path, target: str) -> list[str]:
    """The whole command that compiles one of SOURCES."""
    include = f"-I{Path(torch.__file__).parent / 'include'}"
    return [*command, *flags(), include, "-c", "-o", target, str(source)]


def soname(target: Path) -> str:
    """The name by which the dynamic linker knows an object: one that is in the process is not loaded a second time."""
    return f"libfxprune-{target.stem}.so.1"


def linking(command: list[str], parts: list[str], target: str, name: str) -> list[str]:
    """The whole command that makes one object of what was compiled, known by `name`."""
    lib = f"-L{Path(torch.__file__).parent / 'lib'}"
    named = [f"-Wl,-soname,{name}"] if platform.system() == "Linux" else []
    # No rpath: by the time the object is loaded, torch's library is in the process and is found by its name.
    return [*command, *flags(), "-o", target, *parts, lib, "-ltorch_cpu", *named]


def compile_to(command: list[str], target: str, name: str) -> None:
    """Run the compiler on SOURCES, side by side; its first error line becomes the BuildError's reason."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = [str(Path(folder) / f"{number}.o") for number in range(len(SOURCES))]
        commands = [compiling(command, *each) for each in zip(SOURCES, parts, strict=True)]
        for asked, done in zip(commands, pool.map(run, commands), strict=True):
            _require_success(asked, done)
        require_success(linking(command, parts, target, name))


def require_success(command: list[str]) -> None:
    """Runs a command of the compiler. Raises BuildError with its first error line where it fails."""
    _require_success(command, run(command))


def _require_success(command: list[str], done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        why = errors[0].strip() if errors else f"exit status {done.returncode}"
        raise BuildError("the C++ kernels do not compile", where=shlex.join(command), why=why)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What a command of the compiler says, and its exit status."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError("cannot run the C++ compiler", where=command[0], why=str(error)) from error
