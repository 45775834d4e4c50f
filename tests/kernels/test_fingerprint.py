"""Fingerprints: compiled and in plain torch the same, for every kind of tensor, and other for every change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxprune.kernels import native
from fxprune.kernels.native import fingerprint as module
from fxprune.kernels.native.fingerprint import fingerprint, fingerprint_reference

KINDS = {
    "float32": torch.randn(300, 400),
    "columns": torch.randn(7, 30)[:, 3:8],
    "rows": torch.randn(7, 3)[1:],
    "expanded": torch.randn(1).expand(5, 5),
    "bool": torch.rand(13) < 0.5,
    "bytes not aligned": torch.arange(1003, dtype=torch.uint8)[3:],
    "bfloat16": torch.randn(5, dtype=torch.bfloat16),
    "complex": torch.randn(5, dtype=torch.complex64),
    "float8": torch.randn(9).to(torch.float8_e4m3fn),
    "number": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = KINDS[kind]
    expected = fingerprint_reference(tensor)
    assert fingerprint(tensor) == expected == fingerprint(tensor.clone(memory_format=torch.contiguous_format))
    torch.set_num_threads(2)
    assert fingerprint(tensor) == expected
    monkeypatch.setattr(module, "function_of_object", lambda name: None)
    assert fingerprint(tensor) == expected


@pytest.mark.skipif(not native.status().available, reason=native.status().detail)
def test_it_is_compiled_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fingerprint_reference", lambda tensor: pytest.fail("plain torch is slow"))
    assert fingerprint(torch.ones(3))


def changes(tensor: Tensor) -> dict[str, Tensor]:
    flat = tensor.view(-1)
    found = {f"element {i} negated": torch.cat([flat[:i], -flat[i : i + 1], flat[i + 1 :]]) for i in range(len(flat))}
    found |= {f"{i} and {i + 1} swapped": flat[[*range(i), i + 1, i, *range(i + 2, len(flat))]] for i in range(63)}
    found |= {f"turned by {i}": flat.roll(i) for i in range(1, 64)}
    found |= {"negated": -flat, "doubled": flat * 2, "reversed": flat.flip(0), "zero": flat * 0}
    found |= {f"bit {b}": (flat.view(torch.int32) ^ (1 << b)).view(torch.float32) for b in range(31)}
    return found | {"as it was": flat}


def test_every_change_shows() -> None:
    tensor = torch.randn(8, 8)
    prints = {name: fingerprint(changed) for name, changed in changes(tensor).items()}
    assert len(set(prints.values())) == len(prints)
    assert prints["as it was"] == fingerprint(tensor)


def test_what_another_process_writes_shows(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(4096))
    shared = torch.from_file(str(file), shared=True, size=1024)
    before = fingerprint(shared)
    program = f"f = open({str(file)!r}, 'r+b'); f.seek(2048); f.write(b'x')"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert fingerprint(shared) != before
