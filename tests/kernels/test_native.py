"""Building and loading the C++ kernels: the cache, two processes at once, other flags, and no compiler."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fxprune import FxPruneWarning, errors
from fxprune.errors import BuildError
from fxprune.kernels import native
from fxprune.kernels.native import build, cache

ROOT = Path(__file__).resolve().parents[2]

# Packs a weight, multiplies at several sizes, and prints the state and the largest relative error.
PROGRAM = """
import torch
from fxprune.kernels import native
from fxprune.lower.layouts.bitmap import CpuBitmap
from fxprune.lower.layouts.nonzeros import Nonzeros
from fxprune.lower.layouts.site import Site
torch.manual_seed(0)
worst = 0.0
plain = torch.where(torch.rand(90, 203) < 0.2, torch.randn(90, 203), torch.zeros(()))
plain[7], plain[8] = 0.0, torch.randn(203)
for layout, dtype, digits in (
    (Nonzeros(), torch.float32, 1), (CpuBitmap(), torch.float32, 1),
    (CpuBitmap(), torch.bfloat16, 2**-16), (CpuBitmap(), torch.float16, 2**-13),
):
    w, bias = plain.to(dtype), torch.randn(90).to(dtype)
    for tuned in (1, 16):
        site = Site("w", "n", w, bias, (tuned,), "gelu")
        fit = layout.fits(site)
        for tokens in (0, 1, 2, 3, 8, 30, 65):
            x = torch.randn(tokens, 203).to(dtype)
            y = layout.call(x, layout.pack(site), bias, "gelu")
            exact = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), w.double(), bias.double()))
            assert y.shape == exact.shape
            worst = max([worst, *(digits * (y - exact).abs() / exact.abs().clamp(min=1)).flatten().tolist()])
print(native.status().available, native.status().isa or "-", worst, fit.ok, fit.why, sep="|")
"""


# Where it matters that there is an object, not how fast that is.
QUICK = {"FXPRUNE_NATIVE_FLAGS": "-O0"}


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "FXPRUNE_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen[str], warned: str = "") -> tuple[str, str, float, str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("FxPruneWarning") == bool(warned) and warned in err, err
    available, isa, worst, fits, why = out.strip().split("|")
    return available, isa, float(worst), fits, why


def objects(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


needs_compiler = pytest.mark.skipif(not native.status().available, reason=native.status().detail)


def test_status_says_what_runs() -> None:
    status = native.status()
    assert status.detail and bool(status.isa) == status.available
    assert native.load() is status


def test_switched_off_the_plain_kernel_answers(tmp_path: Path) -> None:
    available, _, worst, fits, why = finish(start(tmp_path, FXPRUNE_NATIVE="0"))
    assert (available, fits) == ("False", "True") and worst < 1e-5
    assert "slow" in why and "FXPRUNE_NATIVE=0" in why
    assert objects(tmp_path) == []


def test_without_a_compiler_the_plain_kernel_answers(tmp_path: Path) -> None:
    available, _, worst, _, why = finish(start(tmp_path, CXX="no-such-compiler"), "without its C++ kernels")
    assert available == "False" and "no-such-compiler" in why and worst < 1e-5


def test_a_failing_compiler_is_reported(tmp_path: Path) -> None:
    available, _, worst, _, why = finish(
        start(tmp_path, FXPRUNE_NATIVE_FLAGS="--no-such-flag"), "without its C++ kernels"
    )
    assert available == "False" and "compile" in why and worst < 1e-5
    assert objects(tmp_path) == []


@needs_compiler
@pytest.mark.slow
def test_two_processes_build_at_once_and_a_third_reuses(tmp_path: Path) -> None:
    for answer in [finish(p) for p in (start(tmp_path, **QUICK), start(tmp_path, **QUICK))]:
        assert answer[0] == "True" and answer[2] < 1e-5
    built = objects(tmp_path)
    assert len(built) == 1 and built[0].suffix == ".so"
    stamp = built[0].stat().st_mtime_ns
    assert finish(start(tmp_path, **QUICK))[0] == "True"
    assert objects(tmp_path) == built and built[0].stat().st_mtime_ns == stamp


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(native.status().isa != "AVX-512", reason="needs a CPU with AVX-512 beside AVX2")
@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("-mno-avx512f -DFXPRUNE_GATHERS=1", "AVX2"),
        ("-mno-avx512f -mno-f16c -DFXPRUNE_GATHERS=0", "AVX2"),
        ("-mno-avx512vbmi2 -DFXPRUNE_GATHERS=1", "AVX-512"),
    ],
)
def test_other_builds_give_the_same(flags: str, isa: str, tmp_path: Path) -> None:
    answer = finish(start(tmp_path, FXPRUNE_NATIVE_FLAGS=flags))
    assert answer[:2] == ("True", isa) and answer[2] < 1e-5


@needs_compiler
def test_the_key_follows_flags_sources_and_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    command = build.compiler()
    keys = {build.key(command)}
    monkeypatch.setenv("FXPRUNE_NATIVE_FLAGS", "-O1")
    keys.add(build.key(command))
    monkeypatch.setattr(build, "cpu", lambda: "another machine")
    keys.add(build.key(command))
    monkeypatch.setattr(build, "SOURCES", (Path(__file__),))
    keys.add(build.key(command))
    assert len(keys) == 4


@needs_compiler
@pytest.mark.parametrize("of_another", [False, True], ids=["own folder", "a folder that others can write"])
def test_an_unwritable_cache_is_told_and_a_private_folder_takes_its_place(tmp_path: Path, of_another: bool) -> None:
    (tmp_path / "file").write_text("")
    here = tmp_path / "tmp"
    here.mkdir()
    theirs = here / f"fxprune-{os.getuid()}"
    if of_another:
        theirs.mkdir()
        theirs.chmod(0o777)
    answer = finish(start(tmp_path / "file" / "cache", TMPDIR=str(here), **QUICK), "cannot write to its cache")
    assert answer[0] == "True" and answer[2] < 1e-5
    (built,) = here.glob("fxprune-*/nonzeros-*.so")
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    assert (built.parent == theirs) is not of_another


def test_a_home_that_is_none_is_an_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FXPRUNE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(cache, "_temporary", lambda: tmp_path)
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(FxPruneWarning, match="home directory"):
        assert cache.cached("x") == tmp_path / "x"


def test_what_a_cache_that_cannot_be_written_holds_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "built.so").write_text("")
    monkeypatch.setenv("FXPRUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", lambda **_: pytest.fail("what is there need not be written"))
    assert cache.cached("built.so") == tmp_path / "built.so"


def test_a_compiler_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "TIMEOUT", 0.1)
    with pytest.raises(BuildError, match="timed out"):
        build.run(["sleep", "5"])
