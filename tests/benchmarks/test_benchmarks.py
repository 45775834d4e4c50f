"""The benchmarks' own arithmetic and tables; what they measure is not tested here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import machine, minilm
from fxprune.errors import CheckError


def row(**changes: Any) -> minilm.Row:
    measured: minilm.Row = {
        "threads": 1,
        "sparsity": 0.9,
        "dense": "torch.compile + freezing",
        "dense_ms": 30.0,
        "pruned_ms": 10.0,
        "ratio": 3.0,
        "ratio_low": 2.9,
        "ratio_high": 3.1,
        "difference": 1e-6,
        "dense_bytes": 90_000_000,
        "pruned_bytes": 54_000_000,
    }
    return measured | changes


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("AMD EPYC 7B13 64-Core Processor", "amd-epyc-7b13-64-core"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c"),
        ("AMD EPYC", "amd-epyc"),
    ],
)
def test_slugs_are_file_names(name: str, wanted: str) -> None:
    assert machine.slug(name) == wanted


def test_the_machine_is_described() -> None:
    facts = machine.describe_machine()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["torch"] == torch.__version__


def test_every_row_is_judged_and_some_twice() -> None:
    verdicts = minilm.judge([row(), row(sparsity=0.3, ratio=0.97), row(sparsity=0.8, ratio=2.2)])
    assert [met for _, met in verdicts] == [True, True, False, False, True]


def test_onnxruntime_has_a_column_only_where_it_was_measured() -> None:
    plain = minilm.format_table([row()])
    assert "onnxruntime ms" not in plain and "3.00x [2.90, 3.10]" in plain
    assert "onnxruntime ms" in minilm.format_table([row(), row(onnxruntime_ms=40.0, onnxruntime_ratio=4.0)])


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_result_gives_no_figure(error: float) -> None:
    batch = (torch.zeros(1, 2), torch.ones(1, 2))

    def gives(value: float) -> minilm.Model:
        return lambda ids, attention_mask: (torch.tensor([1.0, value]),)

    assert minilm.check(gives(1.0), gives(1.0), [batch], "90%") == 0.0
    with pytest.raises(CheckError, match="no figure for 90%"):
        minilm.check(gives(1.0), gives(1.0 + error), [batch], "90%")
