"""What conftest.py promises every test."""

from __future__ import annotations

import os

import torch
from torch import nn


def test_memory_that_is_not_written_shows() -> None:
    like = torch.ones(2)
    strided, permuted = torch.empty_strided((2,), (1,)), torch.empty_permuted((1, 2), (1, 0))
    for made in (torch.empty(2), torch.empty_like(like), like.new_empty(2), strided, permuted):
        assert bool(made.isnan().all())
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2


def test_exported_programs_have_it_not() -> None:
    class Fills(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(x).fill_(2.0) + x

    program = torch.export.export(Fills(), (torch.ones(2),))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.empty_like.default,
        torch.ops.aten.fill_.Scalar,
        torch.ops.aten.add.Tensor,
    ]
    assert torch.compile(Fills(), backend="eager")(torch.ones(2)).tolist() == [3.0, 3.0]


def test_one_thread_and_stages_that_are_checked() -> None:
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    assert "FXPRUNE_CHECK" in os.environ
